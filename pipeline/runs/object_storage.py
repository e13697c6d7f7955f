"""Objects below an address in a storage (`s3://` or `gs://`), accessed with pyarrow's file systems, as Ray does."""

from __future__ import annotations

import contextlib
import logging
import posixpath
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tenacity

from istanas import buckets
from istanas.errors import ConfigError, IstanasError
from pipeline.base.addresses import CREDENTIALS
from pipeline.base.redaction import without_secrets

_LOG = logging.getLogger(__name__)


class StorageError(IstanasError):
    """A storage is unreachable or full, or denies access."""


class Stamp(NamedTuple):
    """Size and modification time (ns), by which two versions of a file are distinguished.

    A file in a local copy gets the time of its object once both have the same content.
    """

    size: int
    changed: int


def stamp_of(path: Path) -> Stamp | None:
    """Return the stamp of a file, or None if there is no such file."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return Stamp(stat.st_size, stat.st_mtime_ns)


class Objects:
    """The objects below one address. An object is written completely or not at all.

    Args:
        address: `s3://BUCKET/PREFIX` or `gs://BUCKET/PREFIX`.

    Raises:
        ConfigError: the address is invalid.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        with self.failures():
            self._fs, self._base = file_system(address)

    def put(self, name: str, data: Any) -> None:
        """Write an object."""
        # In one piece: an upload that is interrupted before `close` leaves no object.
        stream = self._fs.open_output_stream(f"{self._base}/{name}")
        stream.write(data)
        stream.close()

    def get(self, name: str) -> bytes:
        """Return the content of an object.

        Raises:
            FileNotFoundError: there is no such object.
        """
        try:
            with self._fs.open_input_stream(f"{self._base}/{name}") as stream:
                data: bytes = stream.read()
        except OSError as error:
            if "NO_SUCH_KEY" in str(error):  # deleted after pyarrow had requested its length
                raise FileNotFoundError(name) from None
            raise
        return data

    def delete(self, name: str) -> None:
        """Delete an object, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(f"{self._base}/{name}")

    def delete_folder(self, name: str = "") -> None:
        """Delete all objects in a folder, by default all below the address."""
        self._fs.delete_dir(f"{self._base}/{name}" if name else self._base)

    def stamps(self, folder: str | None = None) -> dict[str, Stamp]:
        """Return names and stamps of all objects, or only of those directly in a folder."""
        from pyarrow.fs import FileSelector, FileType

        place = f"{self._base}/{folder}" if folder else self._base
        infos = self._fs.get_file_info(FileSelector(place, recursive=folder is None, allow_not_found=True))
        files = [info for info in infos if info.type == FileType.File]
        return {posixpath.relpath(info.path, self._base): Stamp(info.size, info.mtime_ns) for info in files}

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Convert errors of the storage to `StorageError`."""
        try:
            yield
        except OSError as error:
            if not _is_of_storage(error):
                raise
            scheme = self.address.partition("://")[0]
            raise StorageError(
                f"{self.address}: {reason_of(error)}",
                field="runtime.runs_dir",
                remedy=f"{_remedy(error, scheme)}, then run the same command again",
            ) from error

    def retrying(self, work: Callable[[], None], seconds: float) -> None:
        """Repeat work that fails while the storage is unreachable.

        Args:
            work: The function to call; it must be safe to repeat.
            seconds: How long to try.

        Raises:
            StorageError: the storage was unreachable for this time.
        """

        def warn(state: tenacity.RetryCallState) -> None:
            if state.attempt_number == 1 and state.outcome is not None:
                _LOG.warning(
                    "%s: can't be reached (%s); trying again for %.0f minutes",
                    self.address,
                    reason_of(state.outcome.exception()),
                    seconds / 60,
                )

        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_of_storage),
            wait=tenacity.wait_exponential(max=30),
            stop=tenacity.stop_after_delay(seconds),
            before_sleep=warn,
            reraise=True,
        )
        with self.failures():
            attempts(work)
        if attempts.statistics["attempt_number"] > 1:
            _LOG.warning("%s: is reachable again and complete", self.address)


def file_system(address: str) -> tuple[Any, str]:
    """Return pyarrow's file system for an address, and the path in it.

    Raises:
        ConfigError: the address is invalid.
    """
    try:
        return buckets.file_system(address)
    except (ValueError, TypeError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ConfigError(
            f"{address}: {' '.join(str(error).split()):.200}",
            field="runtime.runs_dir",
            remedy="correct the address",
        ) from None


def reason_of(error: BaseException | None) -> str:
    """Return the message of a storage error, shortened and without secrets."""
    text = " ".join(str(error).split())
    return without_secrets(text.partition("AWS Error ")[2] or text)[:200]


def _is_of_storage(error: BaseException) -> bool:
    """Return whether an error comes from a storage; errors of the local disk have an error number."""
    return isinstance(error, OSError) and error.errno is None


def _remedy(error: OSError, scheme: str) -> str:
    text = str(error)
    denied = ("ACCESS_DENIED", "CREDENTIALS", "INVALID_ACCESS_KEY", "SIGNATURE")
    if any(word in text for word in denied):
        return f"give credentials that may list, read, write and delete there ({CREDENTIALS[scheme]})"
    if "NO_SUCH_BUCKET" in text:
        return "create the bucket, or correct its name"
    return "check network and endpoint, and that the storage is up"
