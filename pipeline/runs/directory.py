"""The run directory: record, metrics and lock.

The record (`run.json`) is replaced atomically, `metrics_file` appends one line per epoch to `metrics.jsonl`, and a lock
excludes other processes.
"""

import contextlib
import dataclasses
import json
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from istanas.errors import CheckpointError, ConfigError
from istanas.limits import RECORD_BYTES, read_at_most
from pipeline.base.files import atomic_write
from pipeline.runs import metrics_file
from pipeline.runs.layout import ENVIRONMENT_FILE, LOCK_FILE, METRICS_FILE, OWNER_FILE, RECORD_FILE
from pipeline.runs.record import MetricsLine, RunRecord, new_key

if TYPE_CHECKING:
    from pipeline.runs.mirror import Mirror


def is_absent(error: BaseException) -> bool:
    """Return whether an error from reading a file means that the file does not exist.

    Only an absent or damaged file may be replaced. A file without read permission, or on a disk or network that
    fails temporarily, may be intact.

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
        """Send a run directory that was cleared to start over, and delete the runs inside it from the storage."""
        if self.mirror is not None:
            self.mirror.push_cleared()

    def exists(self) -> bool:
        """Return whether a run was started here, that is, whether `run.json` exists."""
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
        """Append one step's metrics; see `metrics_file.append_line`."""
        values = {name: float(value) for name, value in metrics.items()}
        metrics_file.append_line(self._metrics, MetricsLine(int(step), int(timestamp_ms), values))

    def metrics(self) -> list[MetricsLine]:
        """Return all complete lines of metrics; see `metrics_file.read_lines`."""
        return metrics_file.read_lines(self._metrics)[0]

    def metrics_from(self, start: int) -> tuple[list[MetricsLine], int]:
        """Return the complete lines of metrics after an offset, and the end offset; see `metrics_file.read_lines`."""
        return metrics_file.read_lines(self._metrics, start)

    def metrics_digest(self, end: int) -> str:
        """Return a digest of the metrics before an offset; see `metrics_file.digest`."""
        return metrics_file.digest(self._metrics, end)

    def ends_in_mid_line(self) -> bool:
        """Return whether the last line of metrics is incomplete."""
        return metrics_file.ends_in_mid_line(self._metrics)

    def replace_metrics(self, lines: Iterable[MetricsLine]) -> None:
        """Replace all metrics atomically; a resumed run removes those of the epochs that it repeats."""
        metrics_file.replace_lines(self._metrics, lines)

    @property
    def _metrics(self) -> Path:
        return self.path / METRICS_FILE

    def environment(self) -> dict[str, Any]:
        """Return the environment of the run (`runs.environment`), or {} if none was written.

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
