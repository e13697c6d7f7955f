"""The run directory: record, metrics and lock.

The record (`run.json`) is replaced atomically, one line per epoch is appended to `metrics.jsonl` and flushed, and a
lock excludes other processes. A killed writer leaves at most an incomplete last line, which is ignored.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from istanas.errors import CheckpointError, ConfigError
from istanas.limits import METRICS_BYTES, RECORD_BYTES, read_at_most
from pipeline.base.files import append, atomic_write
from pipeline.runs.layout import ENVIRONMENT_FILE, LOCK_FILE, METRICS_FILE, OWNER_FILE, RECORD_FILE
from pipeline.runs.record import MetricsLine, RunRecord, new_key

if TYPE_CHECKING:
    from pipeline.runs.mirror import Mirror

_LOG = logging.getLogger(__name__)

_DIGESTED_BYTES = 4096  # the last lines of metrics.jsonl


def ensure_content(path: Path, content: bytes) -> None:
    """Give a file exactly this content: a file that starts with it is truncated, any other is replaced atomically.

    Args:
        path: The file; it and its directory are created if they do not exist.
        content: The whole content.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "lines"
        >>> for before in (b"first, torn", b"other"):
        ...     _ = file.write_bytes(before); ensure_content(file, b"first"); print(file.read_text())
        first
        first
    """
    if path.is_file():
        with open(path, "rb") as stream:
            if stream.read(len(content)) == content:
                if stream.read(1):
                    os.truncate(path, len(content))
                return
    atomic_write(path, content)


def is_absent(error: BaseException) -> bool:
    """Return whether an error of reading a file means that the file does not exist.

    Only an absent or damaged file may be replaced. A file without read permission, or on a disk or network that
    fails at the moment, may be intact.

    Example:
        >>> import errno
        >>> is_absent(FileNotFoundError()), is_absent(PermissionError()), is_absent(OSError(errno.EIO, "I/O"))
        (True, False, False)
    """
    return isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)


def unreadable_error(error: OSError, path: Path) -> CheckpointError:
    """Return the error for a file of a run that exists but cannot be read.

    Args:
        error: The error of reading the file, for which `is_absent` is false.
        path: The file.

    Example:
        >>> import errno
        >>> print(unreadable_error(PermissionError(errno.EACCES, "Permission denied"), Path("run/epoch-0001.pt")))
        run/epoch-0001.pt: cannot be read (Permission denied); make it readable and run the same command again
    """
    reason = error.strerror or str(error)
    return CheckpointError(
        f"cannot be read ({reason})",
        field=str(path),
        remedy="make it readable and run the same command again",
    )


def _dump_line(line: MetricsLine) -> bytes:
    return (json.dumps(line._asdict()) + "\n").encode()


class RunDir:
    """A run directory: record, metrics and lock.

    Args:
        path: The directory; it need not exist.
        mirror: The mirror of a run in a storage that this process has acquired, see `runs.bucket.acquired`.

    Example:
        >>> import tempfile
        >>> run = RunDir(tempfile.mkdtemp())
        >>> run.append_metrics(1, {"train/loss": 2.5}, timestamp_ms=1000)
        >>> run.metrics()
        [MetricsLine(step=1, timestamp_ms=1000, metrics={'train/loss': 2.5})]
        >>> run.exists()
        False
    """

    def __init__(self, path: str | os.PathLike[str], mirror: "Mirror | None" = None) -> None:
        self.path, self.mirror = Path(path), mirror

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    def push(self, *, once: bool = False) -> None:
        """Send all changes to the storage that mirrors the run, if there is one; see `Mirror.push`."""
        if self.mirror is not None:
            self.mirror.push(once=once)

    def push_cleared(self) -> None:
        """Send a run directory that was cleared to start over, and delete the runs inside it in the storage."""
        if self.mirror is not None:
            self.mirror.push_cleared()

    def exists(self) -> bool:
        """Return whether a run was started here (there is a `run.json`)."""
        return (self.path / RECORD_FILE).is_file()

    def read(self) -> RunRecord:
        """Return the record.

        Raises:
            CheckpointError: `run.json` is missing, is not JSON, or lacks a field.
        """
        file = self.path / RECORD_FILE
        try:
            data = json.loads(read_at_most(file, RECORD_BYTES))
        except FileNotFoundError:
            raise CheckpointError(
                "missing", field=str(file), remedy="give the directory of a run that was started"
            ) from None
        except (ValueError, RecursionError) as error:
            raise _broken_record(file, f"not JSON ({error})") from None
        fields = dataclasses.fields(RunRecord)
        absent = [f.name for f in fields if f.default is MISSING and f.name not in _keys(data)]
        if absent:
            raise _broken_record(file, f"lacks {', '.join(absent)}")
        # Unknown fields of a later version are ignored; missing fields of an earlier one get their defaults.
        values = {f.name: data[f.name] for f in fields if f.name in data}
        try:
            return TypeAdapter(RunRecord).validate_python(values)
        except ValidationError as error:
            (wrong, *_) = error.errors(include_input=False, include_url=False)
            field = ".".join(map(str, wrong["loc"]))
            raise _broken_record(file, f"{field:.60} is wrong ({wrong['msg']})") from None

    def write(self, record: RunRecord) -> None:
        """Replace the record atomically; an empty `key` is replaced by the stored one, or by a new one.

        Args:
            record: The whole new record.
        """
        if not record.key:
            key = self.read().key if self.exists() else new_key()
            record = dataclasses.replace(record, key=key)
        atomic_write(self.path / RECORD_FILE, json.dumps(dataclasses.asdict(record), indent=2) + "\n")

    def append_metrics(self, step: int, metrics: dict[str, float], timestamp_ms: int) -> None:
        """Append one step's metrics; they are on the disk when this returns.

        Args:
            step: The epoch, counted by the caller.
            metrics: Values by name, e.g. `{"train/loss": 1.2}`.
            timestamp_ms: When they were measured, in ms since 1970.
        """
        file = self.path / METRICS_FILE
        values = {name: float(value) for name, value in metrics.items()}
        append(
            file,
            _dump_line(MetricsLine(int(step), int(timestamp_ms), values)),
            at=_end_of_whole_lines(file),
        )

    def metrics(self) -> list[MetricsLine]:
        """Return all complete lines in the order written; an incomplete last line is ignored with a warning.

        Raises:
            CheckpointError: a complete line was not written by `append_metrics`.
        """
        return self.metrics_from(0)[0]

    def metrics_from(self, start: int) -> tuple[list[MetricsLine], int]:
        """Return the complete lines from an offset on, as `metrics` does, and the offset of their end.

        Args:
            start: The offset in bytes at which a line starts.

        Raises:
            CheckpointError: a complete line was not written by `append_metrics`.
        """
        file = self.path / METRICS_FILE
        try:
            *complete, torn = read_at_most(file, METRICS_BYTES, start=start).split(b"\n")
        except FileNotFoundError:
            return [], start
        except ValueError as error:
            raise CheckpointError(
                str(error), field=str(file), remedy="restore it, or start over with --fresh"
            ) from None
        if torn:
            _LOG.warning("%s: ignored a half-written last line (the writer was killed)", file)
        where = "line" if start == 0 else f"after byte {start}, line"
        lines = [_parse_line(line, file, f"{where} {number}") for number, line in enumerate(complete, 1)]
        return lines, start + sum(len(line) + 1 for line in complete)

    def metrics_digest(self, end: int) -> str:
        """Return a digest of the metrics before an offset; "" if the file is shorter.

        Only the last lines before the offset are hashed; their timestamps make them unique.

        Args:
            end: The offset in bytes.
        """
        start = max(0, end - _DIGESTED_BYTES)
        try:
            with open(self.path / METRICS_FILE, "rb") as stream:
                stream.seek(start)
                data = stream.read(end - start)
        except FileNotFoundError:
            return ""
        return hashlib.sha256(data).hexdigest() if len(data) == end - start else ""

    def ends_in_mid_line(self) -> bool:
        """Return whether the last line of metrics is incomplete."""
        try:
            data = read_at_most(self.path / METRICS_FILE, METRICS_BYTES)
        except FileNotFoundError:
            return False
        return data != b"" and not data.endswith(b"\n")

    def replace_metrics(self, lines: Iterable[MetricsLine]) -> None:
        """Replace all metrics atomically; a resumed run drops those that it will measure again.

        Args:
            lines: The new metrics.
        """
        ensure_content(self.path / METRICS_FILE, b"".join(_dump_line(line) for line in lines))

    def environment(self) -> dict[str, Any]:
        """Return the environment of the run (`runs.environment`); empty if there is none yet, or in an old run.

        Raises:
            CheckpointError: the file was not written by `write_environment`.
        """
        file = self.path / ENVIRONMENT_FILE
        try:
            found = json.loads(read_at_most(file, RECORD_BYTES))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"not JSON ({error})", field=str(file), remedy="restore or remove it"
            ) from None
        if not isinstance(found, dict):
            raise CheckpointError("not a JSON object", field=str(file), remedy="restore or remove it")
        return found

    @contextlib.contextmanager
    def lock(self, *, wait: float = 0) -> Iterator[None]:
        """Lock the run directory; the operating system releases the lock when the process ends.

        Args:
            wait: Seconds to wait for another process that has locked it; -1 waits without limit.

        Raises:
            ConfigError: another process has locked it; the message names that process.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        owner = self.path / OWNER_FILE
        lock = FileLock(self.path / LOCK_FILE, timeout=wait)
        try:
            lock.acquire()
        except Timeout:
            raise ConfigError(
                f"in use by {_read_owner(owner)}",
                field=f"run directory {self.path}",
                remedy="wait until it ends or stop it",
            ) from None
        try:
            atomic_write(owner, f"process {os.getpid()} on {socket.gethostname()}")
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()


def _broken_record(file: Path, problem: str) -> CheckpointError:
    return CheckpointError(problem, field=str(file), remedy="restore it or use --fresh")


def _keys(data: Any) -> set[str]:
    return set(data) if isinstance(data, dict) else set()


def _read_owner(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # the other process has the lock and has not written the file yet
        return "another process"


def _end_of_whole_lines(file: Path) -> int:
    """Return the offset of the next line: an incomplete line that a killed writer left is overwritten."""
    if not file.exists():
        return 0
    with open(file, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        if size == 0 or os.pread(stream.fileno(), 1, size - 1) == b"\n":
            return size
        _LOG.warning("%s: dropped a half-written last line (the writer was killed)", file)
        return os.pread(stream.fileno(), size, 0).rfind(b"\n") + 1


def _parse_line(line: bytes, file: Path, where: str) -> MetricsLine:
    try:
        data = json.loads(line)
        metrics = {str(name): float(value) for name, value in data["metrics"].items()}
        return MetricsLine(int(data["step"]), int(data["timestamp_ms"]), metrics)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise CheckpointError(
            f"{where} is not a line of metrics",
            field=str(file),
            remedy="run the command of the run again, which restores the file",
        ) from None
