"""The files of one run and how they are written: the run directory is the truth, MLflow its mirror.

`run.json` (the record) is replaced atomically, `metrics.jsonl` grows by one flushed line an epoch, and a lock
keeps a second process out. A kill at any moment leaves at worst a torn last line, which is skipped.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from istanas.errors import CheckpointError, ConfigError
from istanas.limits import METRICS_BYTES, RECORD_BYTES, read_at_most

_LOG = logging.getLogger(__name__)

RECORD_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
ENVIRONMENT_FILE = "environment.json"
LOCK_FILE = ".run.lock"
OWNER_FILE = ".run.lock.owner"
_DIGESTED_BYTES = 4096  # of metrics.jsonl, some lines
OWN_PICTURES = "folder"  # the `data.name` of pictures that are no data set with a name


def data_label(name: str, root: str | None) -> str:
    """Return what a data set is called: its name, own pictures by the last parts of their folder.

    Two folders whose last parts are the same are told apart by a digest of the whole path.

    Args:
        name: `data.name`.
        root: `data.root`, the folder.

    Example:
        >>> data_label("digits", None), data_label("folder", "/data/Pets/my cats")
        ('digits', 'pets-my-cats-be8e75')
    """
    if name != OWN_PICTURES or root is None:
        return name
    source = str(Path(root).expanduser().absolute())
    parts = [re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in Path(source).parts[-2:]]
    digest = hashlib.sha256(source.encode(errors="surrogateescape")).hexdigest()[:6]
    return "-".join([*filter(None, parts), digest])


# The parts of a data set, by context, in the words that people read.
_PART = {
    "training": "training part",
    "alphas": "alpha half",
    "hold-out": "hold-out part",
    "test": "test split",
}


@dataclass(frozen=True)
class DatasetUse:
    """Pictures that a run uses, and what for.

    Args:
        name: of the data set, see `data_label`.
        context: "training", "alphas", "hold-out" or "test".
        digest: of these pictures and their labels (16 hexadecimal digits), the same on every machine.
        source: where they come from: a folder, or who ships them.
        pictures, classes: how many.
        shape: (C, H, W) of a picture, as a network sees it.
        missing: names of the classes that have no picture among them.
    """

    name: str
    context: str
    digest: str
    source: str
    pictures: int
    classes: int
    shape: tuple[int, ...]
    missing: tuple[str, ...] = ()

    def describe_missing(self) -> str | None:
        """One line about the classes without pictures; None if there are none."""
        return describe_missing(self.context, self.missing, self.classes) if self.missing else None


def describe_missing(context: str, missing: Sequence[str], classes: int) -> str:
    """One line about the classes of which a part of a data set has no picture.

    Args:
        context: the part, see `DatasetUse`.
        missing: names of these classes.
        classes: how many there are in all.

    Example:
        >>> describe_missing("alphas", ["bee"], 3)
        'the alpha half has no picture of bee; accuracies on it cover 2 of 3 classes'
    """
    names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
    return (
        f"the {_PART[context]} has no picture of {names}; accuracies on it cover {classes - len(missing)} of "
        f"{classes} classes"
    )


@dataclass(frozen=True)
class RunRecord:
    """What one run is and where it stands (`run.json`). Times are milliseconds since the epoch, UTC.

    Args:
        data_digest: of all pictures that the run may read, whatever part of them it uses; "" if it is not known.
        pictures: lines for people: what pictures there are, how they are read, what is left out or missing.
    """

    name: str
    kind: str
    method: str
    dataset: str
    key: str
    params: dict[str, str | int | float | bool | None]
    tags: dict[str, str]
    description: str
    parent: str | None
    status: str
    started_ms: int
    ended_ms: int | None
    artifacts: tuple[str, ...]
    result: dict[str, Any]
    datasets: tuple[DatasetUse, ...] = ()
    data_digest: str = ""
    pictures: tuple[str, ...] = ()

    @property
    def data_label(self) -> str:
        """What the data set is called, see the function of this name."""
        root = self.params.get("data.root")
        if not isinstance(root, str):
            return self.dataset
        return data_label(self.dataset, self.datasets[0].source if self.datasets else root)

    def measured_on(self, metric: str) -> DatasetUse | None:
        """The pictures that a metric is measured on; None if it is measured on none, or they are not known.

        Args:
            metric: "train/...", "valid/..." (on the hold-out, or on the alpha half) or "test/...".
        """
        return next((use for c in contexts_of(metric) for use in self.datasets if use.context == c), None)


def contexts_of(metric: str) -> tuple[str, ...]:
    """The contexts whose pictures a metric may be measured on, the first of them that there is.

    Example:
        >>> contexts_of("valid/top1"), contexts_of("target/params")
        (('hold-out', 'alphas'), ())
    """
    by_split = {"train": ("training",), "valid": ("hold-out", "alphas"), "test": ("test",)}
    return by_split.get(metric.partition("/")[0], ())


class MetricsLine(NamedTuple):
    """The metrics of one step, with the time (ms since the epoch) at which they were measured."""

    step: int
    timestamp_ms: int
    metrics: dict[str, float]


def new_key() -> str:
    """A fresh unique id for a run (32 hexadecimal digits)."""
    return uuid.uuid4().hex


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Replace a file's content so that a crash leaves either the old or the new content, never a mixture.

    Args:
        path: the file; its directory is created if need be.
        data: the whole new content; text is written as UTF-8.

    Raises:
        OSError: the directory can't be written.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a" / "note.txt"
        >>> atomic_write(file, "first"); atomic_write(file, "second")
        >>> file.read_text(), [p.name for p in file.parent.iterdir()]
        ('second', ['note.txt'])
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = data.encode() if isinstance(data, str) else data
    # Beside the target, because a rename is atomic only within one file system.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)  # now: it is told how much is free without it
        raise refused(error, target, len(content)) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(target.parent)


def append(path: Path, data: bytes, *, at: int) -> None:
    """Cut a file to some length and add to it; the data is on the disk when this returns.

    Args:
        path: the file; it and its directory are created if need be.
        data: what to add.
        at: bytes of the file that stay.

    Raises:
        OSError: the disk refuses; the first `at` bytes are then all that the file holds.
        ValueError: the file has fewer than `at` bytes.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "lines"
        >>> append(file, b"first, torn", at=0); append(file, b" and second", at=5)
        >>> file.read_text()
        'first and second'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    created = not path.exists()
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size < at:
            raise ValueError(f"it has {size} bytes, not at least {at}")
        os.ftruncate(stream.fileno(), at)
        stream.seek(at)
        left = memoryview(data)
        try:
            while left:  # A write may take only a part of the data, for example when a disk fills up.
                left = left[stream.write(left) :]
            os.fsync(stream.fileno())
        except OSError as error:
            os.ftruncate(stream.fileno(), at)
            raise refused(error, path, len(data)) from error
    if created:
        sync_directory(path.parent)


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


def is_full(error: BaseException) -> bool:
    """Whether it is a disk, a quota or a limit on files that has no room left.

    Example:
        >>> is_full(OSError(errno.ENOSPC, "No space left")), is_full(OSError(errno.EACCES, "Permission denied"))
        (True, False)
    """
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_absent(error: BaseException) -> bool:
    """Return whether an error of reading a file means that there is no such file, not that it is out of reach.

    Only an absent or damaged file may be replaced. A file without read permission, or on a disk or a network
    that fails now, may be whole.

    Example:
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
        >>> print(out_of_reach(PermissionError(errno.EACCES, "Permission denied"), Path("run/epoch-0001.pt")))
        run/epoch-0001.pt: cannot be read (Permission denied); make it readable and run the same command again
    """
    reason = error.strerror or str(error)
    return CheckpointError(
        f"{path}: cannot be read ({reason}); make it readable and run the same command again"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine, or its GPU, has no memory left; torch says so of either only in words.

    Example:
        >>> is_out_of_memory(RuntimeError("CUDA error: out of memory")), is_out_of_memory(RuntimeError("no"))
        (True, False)
    """
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)


def refused(error: OSError, path: Path, needed: int) -> OSError:
    """The error with what the system leaves out of it: which file, and, of a full disk, what it needs and what is free.

    Args:
        error: of writing the file.
        path: of the file.
        needed: bytes.
    """
    text = error.strerror
    if is_full(error):
        try:
            free = f", {shutil.disk_usage(path.parent).free / 1e6:.2f} MB are free"
        except OSError:
            free = ""
        text = f"{text} ({needed / 1e6:.2f} MB are needed{free})"
    return OSError(f"{path}: {error}") if text is None else OSError(error.errno, text, str(path))


def sync_directory(directory: Path) -> None:
    """Make created, renamed and deleted files of a folder survive a power cut.

    Args:
        directory: the folder. Where the system cannot open a folder, nothing is done.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _dump_line(line: MetricsLine) -> bytes:
    return (json.dumps(line._asdict()) + "\n").encode()


class RunDir:
    """One run's directory: its record, its metrics and its lock.

    Example:
        >>> import tempfile
        >>> run = RunDir(tempfile.mkdtemp())
        >>> run.append_metrics(1, {"train/loss": 2.5}, timestamp_ms=1000)
        >>> run.metrics()
        [MetricsLine(step=1, timestamp_ms=1000, metrics={'train/loss': 2.5})]
        >>> run.exists()
        False
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

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
        """Where the run was computed, see `pipeline.environment`; empty if it has not begun, or is of an old version.

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
