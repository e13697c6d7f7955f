"""Opening of a run: its record, and the repair of files that a killed run left damaged."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable
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
from pipeline.runs.outcome import INTERRUPTED, OUTCOME_TAG
from pipeline.runs.record import DatasetUse, MetricsLine, RunRecord, new_key
from pipeline.tracking.store import store_uri
from pipeline.training.epoch_record import EpochRecord, load_progress, read_records

MOST_OF_A_TAG = 1000  # characters; MLflow refuses more than 8,000, and shows far fewer


@dataclass(frozen=True)
class JobSpec:
    """What distinguishes one job from another.

    Args:
        kind: "search", "retrain" or "sweep".
        name: of the run, before the configuration's hash.
        digits: hash of what decides the result.
        config: the whole configuration.
        sections: of the configuration that this job depends on.
        parent: run directory of the search that a retraining belongs to, or of the sweep that a trial belongs to.
        tags, description: for MLflow.
        epochs: of the whole job, for the bar.
        unit: what the bar counts, if not epochs.
    """

    kind: str
    name: str
    digits: str
    config: Config
    sections: tuple[str, ...]
    epochs: int
    parent: str | None = None
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    description: str = ""
    unit: str = "epoch"

    @property
    def path(self) -> Path:
        """The run directory."""
        return bucket.local(self.config.runtime.runs_dir) / f"{self.name}-{self.digits}"


NOT_THE_RUNS = {LOCK_FILE, OWNER_FILE, LOG_FOLDER, CLEARING_FILE}  # what is there before a run begins


def with_outcome(record: RunRecord, word: str) -> RunRecord:
    """A record that says what became of its run, where MLflow's own words do not, or did not before."""
    if word != INTERRUPTED and OUTCOME_TAG not in record.tags:
        return record
    return dataclasses.replace(record, tags={**record.tags, OUTCOME_TAG: word})


def mend(
    run: RunDir,
    spec: JobSpec,
    say: Callable[[str], None],
    metrics_anew: Callable[[], list[MetricsLine]] | None = None,
) -> None:
    """Restore those damaged files of a run that its checkpoints and its configuration can replace."""
    try:
        run.read()
    except CheckpointError as error:
        say(f"warning: {_what(error)}: replaced, the damaged file is {RECORD_FILE}.damaged")
        # A copy: without a record, whatever is here would count as nothing.
        shutil.copyfile(run.path / RECORD_FILE, run.path / f"{RECORD_FILE}.damaged")
        run.write(_new_record(spec))
    finished = run.read().status == "FINISHED"
    try:
        run.environment()
    except CheckpointError as error:
        damaged = f"{ENVIRONMENT_FILE}.damaged"
        # Where a finished run was computed, nothing else says. One that resumes writes where it is computed now.
        done = "set aside as" if finished else "replaced, the damaged file is"
        say(f"warning: {_what(error)}: {done} {damaged}")
        os.replace(run.path / ENVIRONMENT_FILE, run.path / damaged)
    try:
        run.metrics()
        # A run that goes on writes its last line again, one that has finished does not.
        if run.ends_in_mid_line() and finished:
            raise CheckpointError(f"{run.path / METRICS_FILE}: ends in mid-line; restore it, or use --fresh")
    except CheckpointError as error:
        # Every line is in the log, too; a sweep that resumes makes its own from the study.
        folder = run.path / CHECKPOINTS
        lines = [metrics_line(record) for record in read_records(folder, load_progress(folder))]
        if not lines and finished:
            lines = _of_a_finished_run(metrics_anew, error)
        say(f"warning: {_what(error)}: restored")
        run.replace_metrics(lines)
    if finished and spec.kind == "search":
        _restore_tables(run, spec, say)


def _what(error: CheckpointError) -> str:
    """Return what is wrong with a file, without the remedy."""
    return str(error).partition("; ")[0]


def _restore_tables(run: RunDir, spec: JobSpec, say: Callable[[str], None]) -> None:
    """Restore the damaged tables of a finished search; an unfinished one does so when it resumes."""
    folder, lines = run.path / CHECKPOINTS, run.metrics()
    try:
        progress = load_progress(folder)
        if progress.epochs != (lines[-1].step if lines else 0):
            return  # The checkpoints were deleted, or the last one is damaged, which has been said.
        tables = SearchTables(run.path, spec.config.space.cell_space())
        for file in tables.replace(read_records(folder, progress), finished=True):
            say(restored(file))
    except CheckpointError as error:  # The result of a finished run does not depend on its checkpoints.
        say(f"warning: {error}")


def _of_a_finished_run(
    metrics_anew: Callable[[], list[MetricsLine]] | None, error: CheckpointError
) -> list[MetricsLine]:
    if metrics_anew is None:
        raise error
    try:
        return metrics_anew()
    except IstanasError as gone:
        raise CheckpointError(f"{error} ({one_line(gone)})") from None


def mend_lost_record(run: RunDir, spec: JobSpec, say: Callable[[str], None]) -> None:
    """Make the record anew where there are checkpoints without one, unless a --fresh was killed that deletes them."""
    checkpoints = any((run.path / CHECKPOINTS).glob("epoch-*.pt"))
    if checkpoints and not run.exists() and not (run.path / CLEARING_FILE).exists():
        say(f"warning: {run.path / RECORD_FILE}: missing, though there are checkpoints: restored")
        run.write(_new_record(spec))


def metrics_line(record: EpochRecord) -> MetricsLine:
    """The line of an epoch in a run's metrics."""
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
    """The record of a new run, or the one of the run that goes on."""
    if run.exists():
        old = run.read()
        tags = {**old.tags, **_common_tags(spec.config)}
        # Those that it was begun with, which are the same: `check_same_pictures`.
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
        tags=record.tags | ({"istanas.missing_classes": missing[:MOST_OF_A_TAG]} if missing else {}),
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
        tags={**_common_tags(spec.config), **spec.tags},
        description=spec.description,
        parent=spec.parent,
        status="RUNNING",
        started_ms=now_ms(),
        ended_ms=None,
        artifacts=(CONFIG_FILE, ENVIRONMENT_FILE),
        result={},
        datasets=datasets,
    )


def _common_tags(config: Config) -> dict[str, str]:
    """What every run is looked for by, beside what its record says."""
    return {"istanas.seed": str(config.seed), "istanas.workers": str(config.runtime.workers)}


def clear(path: Path) -> None:
    """Delete all but lock and Ray's logs, the record first: a kill in between leaves nothing that looks like a run."""
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
