"""The record of an epoch, and the totals over all epochs that a job needs to resume and to finish."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from istanas.errors import CheckpointError
from istanas.search import Freezing, NodeReport
from pipeline.runs import checkpoint, epoch_log
from pipeline.runs.checkpoint import Checkpoint
from pipeline.runs.epoch_log import LogEnd


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """A diverged attempt at an epoch.

    Args:
        reason: How it diverged, for the user.
        lr_factor: Factor of the learning rate of all further attempts and epochs.
    """

    reason: str
    lr_factor: float


@dataclass(frozen=True, kw_only=True)
class SearchRecord:
    """The part of an epoch's record that only a search has.

    Args:
        nodes: The nodes after the recovery at the end of the epoch.
        trained_genotype: JSON of the architecture that was trained in the epoch.
        genotype: JSON of the architecture after the recovery.
        start_nodes: The nodes after the recovery before any training; only in the record of the first epoch.
        converged: Whether a two-stage search ends here, before its last epoch.
        searching: False if a one-stage search only trains its final architecture.
        rejection: Why a one-stage search rejected the recovered architecture, or None.
        frozen: The nodes of a one-stage search that have frozen so far; None in a two-stage search.
    """

    nodes: tuple[NodeReport, ...]
    trained_genotype: str
    genotype: str
    start_nodes: tuple[NodeReport, ...] = ()
    converged: bool = False
    searching: bool = True
    rejection: str | None = None
    frozen: tuple[Freezing, ...] | None = None

    def recoveries(self, epoch: int) -> Iterator[tuple[int, tuple[NodeReport, ...]]]:
        """Yield (epoch, nodes) after every recovery of the epoch; the one before any training counts as epoch 0."""
        if self.start_nodes:
            yield 0, self.start_nodes
        if self.searching:
            yield epoch, self.nodes


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """The record of an epoch.

    Args:
        epoch: Its number, from 1, as in the metrics.
        timestamp_ms: Time of its end, in milliseconds since 1970, UTC.
        seconds: Its duration.
        workers: Number of workers that trained together.
        metrics: Name -> value.
        rollbacks: The diverged attempts at this epoch.
        search: None in a retraining.

    Example:
        >>> record = EpochRecord(epoch=1, timestamp_ms=1000, seconds=0.1, workers=1, metrics={"train/loss": 2.5})
        >>> EpochRecord.from_json(record.to_json()) == record
        True
    """

    epoch: int
    timestamp_ms: int
    seconds: float
    workers: int
    metrics: dict[str, float]
    rollbacks: tuple[Rollback, ...] = ()
    search: SearchRecord | None = None

    def to_json(self) -> str:
        """Return the record as one line of JSON with exact numbers."""
        return json.dumps(asdict(self))

    def normalized(self) -> EpochRecord:
        """Return the record in the form that `from_json` accepts, with integers in float fields converted.

        Raises:
            CheckpointError: If the type of a value differs from that of its field.

        Example:
            >>> record = EpochRecord(epoch=1, timestamp_ms=1000, seconds=2, workers=1, metrics={"train/loss": 3})
            >>> record.normalized().metrics
            {'train/loss': 3.0}
        """
        return _parse_record(self.to_json())

    @classmethod
    def from_json(cls, text: str) -> EpochRecord:
        """Return the record from the text that `to_json` wrote.

        Raises:
            CheckpointError: If the text is not exactly as `to_json` writes it.

        Example:
            >>> EpochRecord.from_json("{}")
            Traceback (most recent call last):
            istanas.errors.CheckpointError: not the record of an epoch (epoch: Field required)
        """
        record = _parse_record(text)
        # The parser also accepts unknown keys, and missing keys that have a default.
        if record.to_json() != text:
            raise CheckpointError(
                "not the record of an epoch (it has other keys, or was written differently)"
            )
        return record

    def found(self) -> SearchRecord:
        """Return `search` of an epoch of a search.

        Raises:
            CheckpointError: If it is an epoch of a retraining.
        """
        if self.search is None:
            raise CheckpointError(
                "the record belongs to a retraining, not to a search", remedy="start over with --fresh"
            )
        return self.search


_RECORD, _LOG_END = TypeAdapter(EpochRecord), TypeAdapter(LogEnd)


def _parse_record(text: str) -> EpochRecord:
    try:
        return _RECORD.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"{where:.60}: {first['msg']}" if where else first["msg"]
        raise CheckpointError(f"not the record of an epoch ({reason:.200})") from None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a job; its size does not depend on the number of epochs.

    Args:
        last: Record of the last epoch; None before the first.
        seconds: Duration of all epochs.
        rollbacks: Number of rollbacks in all epochs; each has halved the learning rate for the rest of the job.
        log: End of the log of all records.
    """

    last: EpochRecord | None = None
    seconds: float = 0.0
    rollbacks: int = 0
    log: LogEnd = field(default_factory=LogEnd)

    @property
    def epochs(self) -> int:
        """Return the number of finished epochs."""
        return self.log.epochs

    @property
    def newest(self) -> EpochRecord:
        """Return the record of the last epoch.

        Raises:
            CheckpointError: If no epoch is finished.
        """
        if self.last is None:
            raise CheckpointError("no epoch is finished", remedy="run the same command again")
        return self.last

    def after(self, record: EpochRecord) -> tuple[Progress, bytes]:
        """Return the progress after one more epoch, and the epoch's line in the log.

        Args:
            record: The epoch's record.

        Raises:
            CheckpointError: If the record has a value of a wrong type, or is too large for the log.
        """
        record = record.normalized()
        log, line = self.log.after(record.to_json())
        progress = Progress(
            last=record,
            seconds=self.seconds + record.seconds,
            rollbacks=self.rollbacks + len(record.rollbacks),
            log=log,
        )
        return progress, line

    def to_state(self) -> dict[str, Any]:
        """Return the progress as plain data for a checkpoint."""
        last = None if self.last is None else self.last.to_json()
        return {
            "last": last,
            "seconds": self.seconds,
            "rollbacks": self.rollbacks,
            "log": asdict(self.log),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Restore the progress from the output of `to_state`.

        Raises:
            CheckpointError: If `to_state` cannot have returned it.
        """
        try:
            plain = json.loads(json.dumps(state))  # rejects tensors, which a checkpoint may contain
            last = None if plain["last"] is None else EpochRecord.from_json(plain["last"])
            log = _LOG_END.validate_json(json.dumps(plain["log"]), strict=True)
            progress = cls(
                last=last, seconds=float(plain["seconds"]), rollbacks=int(plain["rollbacks"]), log=log
            )
            if log.epochs != (0 if last is None else last.epoch) or log.offset < 0:
                raise ValueError("its numbers are inconsistent")
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"the checkpoint does not contain the progress of a job ({type(error).__name__}: {reason:.100})",
                remedy="start over with --fresh",
            ) from None
        return progress


def read_records(folder: Path, progress: Progress) -> Iterator[EpochRecord]:
    """Yield the records of all finished epochs, from the log.

    Args:
        folder: Folder of the checkpoints.
        progress: The progress in the checkpoint.

    Raises:
        CheckpointError: If both the log and its copy are damaged.

    Warns:
        BrokenCheckpointWarning: For every damaged segment of the log, which was restored from its copy.
    """
    for number, text in enumerate(epoch_log.read(folder, progress.log), start=1):
        try:
            record = EpochRecord.from_json(text)
            if record.epoch != number:
                raise CheckpointError(f"the record of epoch {record.epoch}")
        except CheckpointError as error:
            raise CheckpointError(
                f"line {number} of the log is {error.problem}",
                field=str(folder),
                remedy="start over with --fresh",
            ) from None
        yield record


def read_progress(folder: Path, progress: Progress) -> Iterator[Progress]:
    """Yield the progress after each finished epoch, from the log; for arguments and errors see `read_records`."""
    then = Progress()
    for record in read_records(folder, progress):
        then, _ = then.after(record)
        yield then


def load_latest(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint that is intact and matches the log, or None before the first.

    Version 0.1 kept the records of all epochs in each of its checkpoints. Such a checkpoint is converted in memory, and
    its records are written to the log. Its file is not changed; the next epoch writes a checkpoint in the new format.

    Args:
        folder: Folder of the checkpoints; may be missing.

    Raises:
        CheckpointError: See `checkpoint.read_latest`; also if the checkpoint is not one of a job's epochs.
        OSError: If the log of a run of version 0.1 cannot be written; its checkpoints are then unchanged.

    Warns:
        BrokenCheckpointWarning: See `checkpoint.read_latest` and `epoch_log.verify`.
    """
    return checkpoint.read_latest(folder, functools.partial(_with_log, folder))


def load_progress(folder: Path) -> Progress:
    """Return the progress in the newest checkpoint of a folder; for arguments and errors see `load_latest`."""
    found = load_latest(folder)
    return Progress() if found is None else Progress.from_state(found.state["progress"])


@dataclass(frozen=True)
class FolderStore:
    """Checkpoint store in a local folder.

    Args:
        folder: Folder of the checkpoints.
        push: Called after every checkpoint to send the run directory to its remote storage.
    """

    folder: Path
    push: Callable[[], None] = lambda: None

    def read(self) -> bytes | None:
        found = load_latest(self.folder)
        return None if found is None else found.data

    def write(self, epoch: int, data: bytes, line: bytes, offset: int) -> None:
        checkpoint.write(self.folder, epoch, data, line, offset)
        self.push()


def _with_log(folder: Path, found: Checkpoint) -> Checkpoint:
    """Check that a checkpoint matches the log, or convert it from version 0.1, and return it."""
    if "history" in found.state:
        return _convert(folder, found.state)
    try:
        progress = Progress.from_state(found.state.get("progress", {}))
    except CheckpointError as error:
        raise error.in_source(str(folder)) from None
    epoch_log.verify(folder, progress.log)
    return found


def _convert(folder: Path, saved: dict[str, Any]) -> Checkpoint:
    progress, state = Progress(), {key: value for key, value in saved.items() if key != "history"}
    try:
        records = [_of_version_0_1(found) for found in saved["history"]]
        for record in records:
            progress, _ = progress.after(record)
        if not records:
            raise ValueError("there are none")
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
        RecursionError,
        CheckpointError,
    ) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"the newest checkpoint has no valid records of epochs ({type(error).__name__}: {reason:.100})",
            field=str(folder),
            remedy="start over with --fresh",
        ) from None
    epoch_log.rewrite(folder, (record.to_json() for record in records))
    state["progress"] = progress.to_state()
    return Checkpoint(checkpoint.serialize(state), state)


def _of_version_0_1(found: Mapping[str, Any]) -> EpochRecord:
    """Convert a record of version 0.1, a dictionary with only the keys of its kind of job."""

    def nodes(key: str) -> tuple[NodeReport, ...]:
        return tuple(NodeReport(**node) for node in found.get(key, ()))

    search = None
    if "nodes" in found:
        frozen = found.get("frozen")
        search = SearchRecord(
            nodes=nodes("nodes"),
            trained_genotype=found["trained_genotype"],
            genotype=found["genotype"],
            start_nodes=nodes("start_nodes"),
            converged=found.get("converged", False),
            searching=found.get("searching", True),
            rejection=found.get("rejection"),
            frozen=None if frozen is None else tuple(Freezing(**each) for each in frozen),
        )
    return EpochRecord(
        **{name: found[name] for name in ("epoch", "timestamp_ms", "seconds", "workers")},
        metrics=found["metrics"],
        rollbacks=tuple(Rollback(**each) for each in found.get("rollbacks", ())),
        search=search,
    ).normalized()
