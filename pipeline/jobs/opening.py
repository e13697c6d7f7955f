"""Opening of runs: their records, and the repair of files that a killed run left damaged."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from istanas.errors import CheckpointError, IstanasError
from pipeline.base.text import one_line
from pipeline.config.load import flat_params, without_passwords
from pipeline.config.schema import Config
from pipeline.jobs.search_tables import SearchTables, restored
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import (
    CHECKPOINTS,
    CLEARING_FILE,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    LOCK_FILE,
    LOG_FOLDER,
    METRICS_FILE,
    OWNER_FILE,
    RECORD_FILE,
)
from pipeline.runs.outcome import INTERRUPTED
from pipeline.runs.record import DatasetUse, MetricsLine, RunRecord, new_key
from pipeline.runs.tags import Tag, common_tags
from pipeline.tracking.store import store_uri
from pipeline.training.epoch_record import EpochRecord, load_progress, read_records

MAX_TAG_LENGTH = 1000  # characters; MLflow rejects more than 8,000 and shows far fewer


@dataclass(frozen=True)
class JobSpec:
    """The identity of a run: kind, name, configuration and hash.

    Args:
        kind: "search", "retrain", "sweep", "benchmark", "rank" or "versus".
        name: Name of the run, without the configuration's hash.
        digits: Hash of everything that decides the result.
        config: The whole configuration.
        sections: Sections of the configuration that the job depends on.
        parent: Run directory of the search that a retraining belongs to, of the sweep that a trial belongs to, or of
            the benchmark or the comparison that started a search.
        tags: MLflow tags.
        description: Description of the MLflow run.
        epochs: Number of epochs of the whole job, for the progress bar.
        unit: What the progress bar counts.
    """

    kind: str
    name: str
    digits: str
    config: Config
    sections: tuple[str, ...]
    epochs: int
    parent: str | None = None
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    description: str = ""
    unit: str = "epoch"

    @property
    def path(self) -> Path:
        """The run directory."""
        return bucket.local(self.config.runtime.runs_dir) / f"{self.name}-{self.digits}"


NOT_THE_RUNS = {LOCK_FILE, OWNER_FILE, LOG_FOLDER, CLEARING_FILE}  # entries that exist before a run starts


def with_outcome(record: RunRecord, word: str) -> RunRecord:
    """Return the record with the tag that distinguishes interrupted from failed runs; MLflow's status does not."""
    if word != INTERRUPTED and Tag.OUTCOME not in record.tags:
        return record
    return dataclasses.replace(record, tags={**record.tags, Tag.OUTCOME: word})


def repair(
    run: RunDir,
    spec: JobSpec,
    say: Callable[[str], None],
    rebuild_metrics: Callable[[], list[MetricsLine]] | None = None,
) -> None:
    """Repair the damaged files of a run that can be rebuilt from its checkpoints and its configuration.

    Args:
        run: The run.
        spec: Its job.
        say: Receives a line about each file.
        rebuild_metrics: Returns the metrics of a finished run without checkpoints; None if they cannot be rebuilt.

    Raises:
        CheckpointError: A file of a finished run cannot be rebuilt.
    """
    try:
        run.read()
    except CheckpointError as error:
        say(f"warning: {_what(error)}: replaced, the damaged file is {RECORD_FILE}.damaged")
        # A copy, because a run directory without a record does not count as a run.
        shutil.copyfile(run.path / RECORD_FILE, run.path / f"{RECORD_FILE}.damaged")
        run.write(_new_record(spec))
    finished = run.read().status == "FINISHED"
    try:
        run.environment()
    except CheckpointError as error:
        damaged = f"{ENVIRONMENT_FILE}.damaged"
        # The environment of a finished run cannot be rebuilt. A run that resumes writes a new file.
        done = "renamed to" if finished else "replaced, the damaged file is"
        say(f"warning: {_what(error)}: {done} {damaged}")
        os.replace(run.path / ENVIRONMENT_FILE, run.path / damaged)
    try:
        run.metrics()
        # A run that resumes writes its last line again; a finished run does not.
        if run.ends_in_mid_line() and finished:
            raise CheckpointError(
                "ends in the middle of a line",
                field=str(run.path / METRICS_FILE),
                remedy="restore it, or use --fresh",
            )
    except CheckpointError as error:
        # The epoch log has every line, too. A sweep that resumes rebuilds its metrics from the study.
        folder = run.path / CHECKPOINTS
        lines = [metrics_line(record) for record in read_records(folder, load_progress(folder))]
        if not lines and finished:
            lines = _rebuilt(rebuild_metrics, error)
        say(f"warning: {_what(error)}: restored")
        run.replace_metrics(lines)
    if finished and spec.kind == "search":
        _restore_tables(run, spec, say)


def _what(error: CheckpointError) -> str:
    """Return the damaged file and the problem, without the remedy."""
    return error.problem if error.field is None else f"{error.field}: {error.problem}"


def _restore_tables(run: RunDir, spec: JobSpec, say: Callable[[str], None]) -> None:
    """Restore the damaged tables of a finished search; an unfinished search restores them when it resumes."""
    folder, lines = run.path / CHECKPOINTS, run.metrics()
    try:
        progress = load_progress(folder)
        if progress.epochs != (lines[-1].step if lines else 0):
            return  # The checkpoints were deleted, or the last one is damaged and `load_progress` warned about it.
        tables = SearchTables(run.path, spec.config.space.build())
        for file in tables.replace(read_records(folder, progress), finished=True):
            say(restored(file))
    except CheckpointError as error:  # the result of a finished run does not depend on its checkpoints
        say(f"warning: {error}")


def _rebuilt(
    rebuild_metrics: Callable[[], list[MetricsLine]] | None, error: CheckpointError
) -> list[MetricsLine]:
    """Return the metrics of a finished run without checkpoints.

    Raises:
        CheckpointError: They cannot be rebuilt. The message names the damaged file and the reason.
    """
    if rebuild_metrics is None:
        raise error
    try:
        return rebuild_metrics()
    except IstanasError as reason:
        raise CheckpointError(
            f"{error.problem}, and it cannot be rebuilt ({one_line(reason)})",
            field=error.field,
            remedy="restore it, or start over with --fresh",
        ) from None


def restore_lost_record(run: RunDir, spec: JobSpec, say: Callable[[str], None]) -> None:
    """Recreate a missing record if there are checkpoints, unless a killed `--fresh` was about to delete them."""
    checkpoints = any((run.path / CHECKPOINTS).glob("epoch-*.pt"))
    if checkpoints and not run.exists() and not (run.path / CLEARING_FILE).exists():
        say(f"warning: {run.path / RECORD_FILE}: missing although there are checkpoints: restored")
        run.write(_new_record(spec))


def metrics_line(record: EpochRecord) -> MetricsLine:
    """Return an epoch's line in the metrics file."""
    return MetricsLine(record.epoch, record.timestamp_ms, record.metrics)


def as_written(config: Config) -> Config:
    """Return the configuration as it is written to files: without passwords, and with the resolved tracking URI."""
    if config.tracking.uri is not None:
        tracking = config.tracking.model_copy(update={"uri": store_uri(config.tracking.uri)})
        config = config.model_copy(update={"tracking": tracking})
    return without_passwords(config)


def open_record(
    run: RunDir,
    spec: JobSpec,
    datasets: tuple[DatasetUse, ...] = (),
    digest: str = "",
    pictures: tuple[str, ...] = (),
) -> RunRecord:
    """Write and return the record of a new run, or the updated record of a run that resumes."""
    if run.exists():
        old = run.read()
        tags = {**old.tags, **common_tags(spec.config)}
        # Keep those of the first start; `check_same_pictures` has verified that they are the same.
        used = old.datasets if old.datasets else datasets
        record = dataclasses.replace(old, status="RUNNING", ended_ms=None, tags=tags, datasets=used)
        record = with_outcome(record, "RUNNING")
    else:
        record = _new_record(spec, datasets)
    missing = "; ".join(f"{use.context}: {', '.join(use.missing)}" for use in record.datasets if use.missing)
    record = dataclasses.replace(
        record,
        data_digest=digest or record.data_digest,
        pictures=pictures or record.pictures,
        tags=record.tags | ({Tag.MISSING_CLASSES: missing[:MAX_TAG_LENGTH]} if missing else {}),
    )
    run.write(record)
    return record


def _new_record(spec: JobSpec, datasets: tuple[DatasetUse, ...] = ()) -> RunRecord:
    return RunRecord(
        name=spec.name,
        kind=spec.kind,
        method=spec.config.method,
        dataset=spec.config.data.name,
        key=new_key(),
        params=flat_params(spec.config, spec.sections),
        tags={**common_tags(spec.config), **spec.tags},
        description=spec.description,
        parent=spec.parent,
        status="RUNNING",
        started_ms=now_ms(),
        ended_ms=None,
        artifacts=(CONFIG_FILE, ENVIRONMENT_FILE),
        result={},
        datasets=datasets,
    )


def clear(path: Path) -> None:
    """Delete the contents of a run directory, except the lock and Ray's logs.

    The record is deleted first, so that a process killed in between leaves nothing that looks like a run.
    """
    (path / CLEARING_FILE).touch()
    (path / RECORD_FILE).unlink(missing_ok=True)
    for entry in path.iterdir():
        if entry.name in NOT_THE_RUNS:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (path / CLEARING_FILE).unlink()


def now_ms() -> int:
    """Return the time in milliseconds since the epoch."""
    return int(time.time() * 1000)
