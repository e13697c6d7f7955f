"""The record of an epoch, and the sums over all epochs that a job needs when it resumes and when it ends."""

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
    """An attempt at an epoch that diverged.

    Args:
        reason: how it diverged, for people.
        lr_factor: by which the learning rate of all further attempts and epochs is multiplied.
    """

    reason: str
    lr_factor: float


@dataclass(frozen=True, kw_only=True)
class SearchRecord:
    """What an epoch of a search adds to its record.

    Args:
        nodes: after the recovery at the end of the epoch.
        trained_genotype: JSON of the architecture that was trained in the epoch.
        genotype: JSON of the architecture after the recovery.
        start_nodes: after the recovery before any training; only in the record of the first epoch.
        converged: whether a two-stage search ends here, before its last epoch.
        searching: False once the architecture of a one-stage search is fixed and only trained.
        rejection: why a one-stage search rejected the recovered architecture, or None.
        frozen: the nodes of a one-stage search that have frozen so far; None in a two-stage search.
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
        """Yield the nodes after every recovery of the epoch; that before any training counts as epoch 0."""
        if self.start_nodes:
            yield 0, self.start_nodes
        if self.searching:
            yield epoch, self.nodes


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """What is kept of an epoch.

    Args:
        epoch: its number, from 1, as in the metrics.
        timestamp_ms: when it ended, in milliseconds since 1970, UTC.
        seconds: that it took.
        workers: that trained together.
        metrics: name -> value.
        rollbacks: the attempts at this epoch that diverged.
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
        """Return the record in one line, every number exact."""
        return json.dumps(asdict(self))

    def normalized(self) -> EpochRecord:
        """Return the record as `from_json` accepts it: an integer where a float belongs becomes a float.

        Raises:
            CheckpointError: if a value has another type than its field.

        Example:
            >>> record = EpochRecord(epoch=1, timestamp_ms=1000, seconds=2, workers=1, metrics={"train/loss": 3})
            >>> record.normalized().metrics
            {'train/loss': 3.0}
        """
        return _parse_record(self.to_json())

    @classmethod
    def from_json(cls, text: str) -> EpochRecord:
        """Return the record that `to_json` wrote.

        Raises:
            CheckpointError: if `to_json` does not write such a text.

        Example:
            >>> EpochRecord.from_json("{}")
            Traceback (most recent call last):
            istanas.errors.CheckpointError: not the record of an epoch (epoch: Field required)
        """
        record = _parse_record(text)
        # The reader above tolerates unknown keys and missing ones that have a default.
        if record.to_json() != text:
            raise CheckpointError(
                "not the record of an epoch (it has other keys, or was written differently)"
            )
        return record

    def found(self) -> SearchRecord:
        """Return what the epoch of a search adds.

        Raises:
            CheckpointError: if it is an epoch of a retraining.
        """
        if self.search is None:
            raise CheckpointError("the record is of a retraining, not of a search; start over with --fresh")
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
    """How far a job has come: constant in size, whatever the number of epochs.

    Args:
        last: record of the last epoch; None before the first.
        seconds: of all epochs.
        rollbacks: of all epochs; each has halved the learning rate for good.
        log: where the log of all records ends.
    """

    last: EpochRecord | None = None
    seconds: float = 0.0
    rollbacks: int = 0
    log: LogEnd = field(default_factory=LogEnd)

    @property
    def epochs(self) -> int:
        """The number of epochs done."""
        return self.log.epochs

    @property
    def newest(self) -> EpochRecord:
        """The record of the last epoch.

        Raises:
            CheckpointError: if no epoch is done.
        """
        if self.last is None:
            raise CheckpointError("no epoch is done: run the same command again")
        return self.last

    def after(self, record: EpochRecord) -> tuple[Progress, bytes]:
        """Return the progress after one more epoch, and the epoch's line in the log.

        Args:
            record: of the epoch.

        Raises:
            CheckpointError: if the record has a value of a wrong type, or is too large for the log.
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
        """Return it as plain data, for a checkpoint."""
        last = None if self.last is None else self.last.to_json()
        return {
            "last": last,
            "seconds": self.seconds,
            "rollbacks": self.rollbacks,
            "log": asdict(self.log),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Rebuild the progress from `to_state`'s output.

        Raises:
            CheckpointError: if it was not made by `to_state`.
        """
        try:
            plain = json.loads(json.dumps(state))  # no tensors, which a checkpoint may hold
            last = None if plain["last"] is None else EpochRecord.from_json(plain["last"])
            log = _LOG_END.validate_json(json.dumps(plain["log"]), strict=True)
            progress = cls(
                last=last, seconds=float(plain["seconds"]), rollbacks=int(plain["rollbacks"]), log=log
            )
            if log.epochs != (0 if last is None else last.epoch) or log.offset < 0:
                raise ValueError("its numbers do not fit together")
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"the checkpoint holds no progress of a job ({type(error).__name__}: {reason:.100}): --fresh "
                "starts over"
            ) from None
        return progress


def read_records(folder: Path, progress: Progress) -> Iterator[EpochRecord]:
    """Yield the records of all epochs done, from the log.

    Args:
        folder: of the checkpoints.
        progress: as the checkpoint holds it.

    Raises:
        CheckpointError: if the log is damaged and its copy, too.

    Warns:
        BrokenCheckpointWarning: for every segment of the log that was damaged, and replaced from its copy.
    """
    for number, text in enumerate(epoch_log.read(folder, progress.log), start=1):
        try:
            record = EpochRecord.from_json(text)
            if record.epoch != number:
                raise CheckpointError(f"the record of epoch {record.epoch}")
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: line {number} of the log is {error}; use --fresh") from None
        yield record


def read_progress(folder: Path, progress: Progress) -> Iterator[Progress]:
    """Yield the progress after each epoch done, from the log; arguments and errors as of `read_records`."""
    then = Progress()
    for record in read_records(folder, progress):
        then, _ = then.after(record)
        yield then


def load_latest(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint that is whole and matches the log, or None before the first.

    Version 0.1 kept the records of all epochs in each of its checkpoints. Such a checkpoint is converted in memory, and
    its records are written to the log. Its file stays as it is: the next epoch writes a checkpoint of the new form.

    Args:
        folder: of the checkpoints; may be missing.

    Raises:
        CheckpointError: see `checkpoint.read_latest`; or it is a checkpoint of something else than a job's epochs.
        OSError: if the log of a run of version 0.1 cannot be written; its checkpoints are then untouched.

    Warns:
        BrokenCheckpointWarning: see `checkpoint.read_latest` and `epoch_log.verify`.
    """
    return checkpoint.read_latest(folder, functools.partial(_with_log, folder))


def load_progress(folder: Path) -> Progress:
    """Return how far the job is whose checkpoints lie in a folder; arguments and errors as of `load_latest`."""
    found = load_latest(folder)
    return Progress() if found is None else Progress.from_state(found.state["progress"])


@dataclass(frozen=True)
class FolderStore:
    """Checkpoint store in a local folder.

    Args:
        folder: the folder of the checkpoints.
        push: sends the run directory to the storage that mirrors it; called after every checkpoint.
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
    """Return a checkpoint that is known to match the log."""
    if "history" in found.state:
        return _convert(folder, found.state)
    try:
        progress = Progress.from_state(found.state.get("progress", {}))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    epoch_log.verify(folder, progress.log)
    return found


def _convert(folder: Path, saved: dict[str, Any]) -> Checkpoint:
    progress, state = Progress(), {key: value for key, value in saved.items() if key != "history"}
    try:
        records = [_of_version_0_1(found) for found in saved["history"]]
        for record in records:
            progress, _ = progress.after(record)
        if not records:
            raise ValueError("none")
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
            f"{folder}: the newest checkpoint has no records of epochs ({type(error).__name__}: {reason:.100}): "
            "--fresh starts over"
        ) from None
    epoch_log.rewrite(folder, (record.to_json() for record in records))
    state["progress"] = progress.to_state()
    return Checkpoint(checkpoint.serialize(state), state)


def _of_version_0_1(found: Mapping[str, Any]) -> EpochRecord:
    """Return the record that version 0.1 kept as a dictionary, which had only the keys of its kind of job."""

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
