"""One run's directory: its record, its metrics and its lock; MLflow mirrors it.

`run.json` (the record) is replaced atomically, `metrics.jsonl` grows by one flushed line an epoch, and a lock
keeps a second process out. A kill at any moment leaves at worst a torn last line, which is skipped.
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

_DIGESTED_BYTES = 4096  # of metrics.jsonl, some lines


def make_hold(path: Path, content: bytes) -> None:
    """Make a file hold just this: one that merely goes on after it is cut, any other replaced atomically.

    Args:
        path: the file; it and its directory are created if need be.
        content: the whole content.

    Raises:
        OSError: the disk refuses.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "lines"
        >>> for before in (b"first, torn", b"other"):
        ...     _ = file.write_bytes(before); make_hold(file, b"first"); print(file.read_text())
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
    """Return whether an error of reading a file means that there is no such file, not that it is out of reach.

    Only an absent or damaged file may be replaced. A file without read permission, or on a disk or a network
    that fails now, may be whole.

    Example:
        >>> import errno
        >>> is_absent(FileNotFoundError()), is_absent(PermissionError()), is_absent(OSError(errno.EIO, "I/O"))
        (True, False, False)
    """
    return isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)


def out_of_reach(error: OSError, path: Path) -> CheckpointError:
    """Return the error for a file of a run that cannot be read now, in one line.

    Args:
        error: of reading the file; not one for which `is_absent` holds.
        path: of the file.

    Example:
        >>> import errno
        >>> print(out_of_reach(PermissionError(errno.EACCES, "Permission denied"), Path("run/epoch-0001.pt")))
        run/epoch-0001.pt: cannot be read (Permission denied); make it readable and run the same command again
    """
    reason = error.strerror or str(error)
    return CheckpointError(
        f"{path}: cannot be read ({reason}); make it readable and run the same command again"
    )


def _dump_line(line: MetricsLine) -> bytes:
    return (json.dumps(line._asdict()) + "\n").encode()


class RunDir:
    """One run's directory: its record, its metrics and its lock.

    Args:
        path: The directory; it need not exist.
        mirror: Of a run in a storage that this process has acquired, see `runs.bucket.acquired`.

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
        """Send what has changed to the storage, if the run is mirrored there; see `Mirror.push`."""
        if self.mirror is not None:
            self.mirror.push(once=once)

    def push_cleared(self) -> None:
        """`push` of a run directory that was cleared to start over: the runs in it are deleted in the storage, too."""
        if self.mirror is not None:
            self.mirror.push_cleared()

    def exists(self) -> bool:
        """Whether a run was ever begun here (there is a `run.json`)."""
        return (self.path / RECORD_FILE).is_file()

    def read(self) -> RunRecord:
        """The record.

        Raises:
            CheckpointError: `run.json` is missing, is not JSON, or lacks a field.
        """
        file = self.path / RECORD_FILE
        try:
            data = json.loads(read_at_most(file, RECORD_BYTES))
        except FileNotFoundError:
            raise CheckpointError(f"{file}: missing; give the directory of a run that was started") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: not JSON ({error}); restore it or use --fresh") from None
        fields = dataclasses.fields(RunRecord)
        absent = [f.name for f in fields if f.default is MISSING and f.name not in _keys(data)]
        if absent:
            raise CheckpointError(f"{file}: lacks {', '.join(absent)}; restore it or use --fresh")
        # Fields of a later version are left aside, those that an earlier one had not are what they are by default.
        values = {f.name: data[f.name] for f in fields if f.name in data}
        try:
            return TypeAdapter(RunRecord).validate_python(values)
        except ValidationError as error:
            (wrong, *_) = error.errors(include_input=False, include_url=False)
            field = ".".join(map(str, wrong["loc"]))
            raise CheckpointError(
                f"{file}: {field:.60} is wrong ({wrong['msg']}); restore it or use --fresh"
            ) from None

    def write(self, record: RunRecord) -> None:
        """Replace the record atomically; an empty `key` becomes the one already stored, or a new one.

        Args:
            record: the whole new record.
        """
        if not record.key:
            key = self.read().key if self.exists() else new_key()
            record = dataclasses.replace(record, key=key)
        atomic_write(self.path / RECORD_FILE, json.dumps(dataclasses.asdict(record), indent=2) + "\n")

    def append_metrics(self, step: int, metrics: dict[str, float], timestamp_ms: int) -> None:
        """Add one step's metrics; they are on the disk when this returns.

        Args:
            step: the epoch, counted by the caller.
            metrics: name -> value, e.g. `{"train/loss": 1.2}`.
            timestamp_ms: when they were measured, ms since the epoch.
        """
        file = self.path / METRICS_FILE
        values = {name: float(value) for name, value in metrics.items()}
        append(
            file,
            _dump_line(MetricsLine(int(step), int(timestamp_ms), values)),
            at=_end_of_whole_lines(file),
        )

    def metrics(self) -> list[MetricsLine]:
        """All complete lines in the order written; a half-written last one is left out with a warning.

        Raises:
            CheckpointError: a complete line is not what `append_metrics` writes.
        """
        return self.metrics_from(0)[0]

    def metrics_from(self, start: int) -> tuple[list[MetricsLine], int]:
        """Return the complete lines from a byte on, as `metrics` does, and the byte at which they end.

        Args:
            start: where a line begins.

        Raises:
            CheckpointError: a complete line is not what `append_metrics` writes.
        """
        file = self.path / METRICS_FILE
        try:
            *complete, torn = read_at_most(file, METRICS_BYTES, start=start).split(b"\n")
        except FileNotFoundError:
            return [], start
        except ValueError as error:
            raise CheckpointError(f"{file}: {error}; restore it, or start over with --fresh") from None
        if torn:
            _LOG.warning("%s: ignored a half-written last line (the writer was killed)", file)
        where = "line" if start == 0 else f"after byte {start}, line"
        lines = [_parse_line(line, file, f"{where} {number}") for number, line in enumerate(complete, 1)]
        return lines, start + sum(len(line) + 1 for line in complete)

    def metrics_digest(self, end: int) -> str:
        """Return a digest that changes if the metrics before a byte are not the same any more; "" if they are fewer.

        The last lines before it are enough: they have the times at which they were measured.

        Args:
            end: the byte.
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
        """Whether the last line of metrics is half-written."""
        try:
            data = read_at_most(self.path / METRICS_FILE, METRICS_BYTES)
        except FileNotFoundError:
            return False
        return data != b"" and not data.endswith(b"\n")

    def replace_metrics(self, lines: Iterable[MetricsLine]) -> None:
        """Replace all metrics atomically (a resumed run drops what it will measure again).

        Args:
            lines: what `metrics()` is to return from now on.
        """
        make_hold(self.path / METRICS_FILE, b"".join(_dump_line(line) for line in lines))

    def environment(self) -> dict[str, Any]:
        """Where the run was computed, see `runs.environment`; empty if it has not begun, or is of an old version.

        Raises:
            CheckpointError: the file is not what `write_environment` writes.
        """
        file = self.path / ENVIRONMENT_FILE
        try:
            found = json.loads(read_at_most(file, RECORD_BYTES))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: not JSON ({error}); restore or remove it") from None
        if not isinstance(found, dict):
            raise CheckpointError(f"{file}: no object; restore or remove it")
        return found

    @contextlib.contextmanager
    def lock(self, *, wait: float = 0) -> Iterator[None]:
        """Hold the run directory for this process; the lock goes with the process, however that ends.

        Args:
            wait: so many seconds until another process has done with it; -1: for ever.

        Raises:
            ConfigError: another process holds it; the message names that process.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        owner = self.path / OWNER_FILE
        lock = FileLock(self.path / LOCK_FILE, timeout=wait)
        try:
            lock.acquire()
        except Timeout:
            raise ConfigError(
                f"run directory {self.path}: in use by {_read_owner(owner)}; wait until it ends or stop it"
            ) from None
        try:
            atomic_write(owner, f"process {os.getpid()} on {socket.gethostname()}")
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()


def _keys(data: Any) -> set[str]:
    return set(data) if isinstance(data, dict) else set()


def _read_owner(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # the other process is between taking the lock and saying so
        return "another process"


def _end_of_whole_lines(file: Path) -> int:
    """Where the next line is written: a killed writer may have left half a line, out of which it must not grow."""
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
            f"{file}: {where} is not a line of metrics; the command of the run restores the file"
        ) from None
