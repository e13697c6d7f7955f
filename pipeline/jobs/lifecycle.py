"""What every job does around its worker: run directory, lock, resume, record, tracker, results on disk.

A job is flat: open the directory, stop if it is finished, run the worker, write the results, close the record.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from istanas.data import ImageDataset
from istanas.errors import CheckpointError, DataError, IstanasError
from istanas.search import NodeReport
from istanas.space import CellSpace
from istanas.training import Metrics
from pipeline import storage
from pipeline.cluster import LOG_FOLDER
from pipeline.config import flat_params, to_yaml, without_passwords
from pipeline.environment import write_environment
from pipeline.fit import check_left_for_training, warnings_of
from pipeline.outcome import INTERRUPTED, OUTCOME_TAG
from pipeline.pages import REPORT_PAGE
from pipeline.pictures import (
    check_fit,
    check_same_pictures,
    data_digest,
    data_folder_is_missing,
    describe_pictures,
    load_pictures,
    possible_stems,
    settle_stems,
)
from pipeline.progress import EpochBar
from pipeline.record import EpochRecord, Progress, load_progress, read_progress, read_records
from pipeline.report_page import write_report
from pipeline.resources import count
from pipeline.rundir import (
    ENVIRONMENT_FILE,
    LOCK_FILE,
    METRICS_FILE,
    OWNER_FILE,
    RECORD_FILE,
    DatasetUse,
    MetricsLine,
    RunDir,
    RunRecord,
    append,
    atomic_write,
    make_hold,
    new_key,
)
from pipeline.schema import Config
from pipeline.tracking import Tracker, one_line, open_tracker, store_uri
from pipeline.worker import compute_for

_LOG = logging.getLogger(__name__)

SECONDS_TO_END = 60.0  # for a process that has been told to end, and still holds its run
MOST_OF_A_TAG = 1000  # characters; MLflow refuses more than 8,000, and shows far fewer
CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.yaml"
GENOTYPE_FILE = "genotype.json"
TRAJECTORY_FILE = "trajectory.csv"
CODES_FILE = "codes.csv"
TRAJECTORY_COLUMNS = (
    "epoch",
    "cell",
    "node",
    "picks",
    "edge_weights",
    "state",
    "changed",
    "distance",
    "gap",
    "truncation",
    "margin",
)
CODES_COLUMNS = ("epoch", "cell", "node", "state", "op", "magnitude")
CELL_FIGURES = ("cells/normal.svg", "cells/normal.png", "cells/reduce.svg", "cells/reduce.png")


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
        return storage.local(self.config.runtime.runs_dir) / f"{self.name}-{self.digits}"


@dataclass(frozen=True)
class Outcome:
    """What a job's body hands over: the figures of `--json`, what to upload, what to say."""

    result: dict[str, Any]
    artifacts: tuple[str, ...]
    tags: dict[str, str]
    description: str


class RunObserver:
    """Writes what the worker reports: metrics to the run directory first, to MLflow second, a line to the console."""

    def __init__(
        self,
        run: RunDir,
        tracker: Tracker,
        bar: EpochBar,
        space: CellSpace,
        describe: Callable[[EpochRecord], str],
        tell: Callable[[Progress], None] | None = None,
    ) -> None:
        self._run, self._tracker, self._bar, self._describe = run, tracker, bar, describe
        self._tell, self._tables = tell, _SearchTables(run.path, space)

    def note(self, text: str) -> None:
        self._bar.line(text)

    def resumed(self, progress: Progress, workers: int) -> None:
        # The checkpoint decides: what was measured after it will be measured again, what it holds is not lost.
        lines = []

        def records() -> Iterator[EpochRecord]:
            for record in self._records(progress):
                lines.append(metrics_line(record))
                yield record

        self._restore_tables(records())
        self._run.replace_metrics(lines)
        self._tracker.deliver()
        if progress.last is not None:
            self._bar.line(f"resumed after epoch {progress.epochs}")
            before = progress.last.workers
            if workers != before:
                self._bar.line(
                    f"{count(workers, 'worker')} instead of {before}: the same global batch and schedule, but no "
                    "longer bit for bit the run that it would have been"
                )
            if self._tell is not None:
                for then in read_progress(self._run.path / CHECKPOINTS, progress):
                    self._tell(then)
        self._bar.begin(progress.epochs)

    def step(self, epoch: int, step: int, n_steps: int, read: Callable[[], Metrics | None]) -> None:
        self._bar.step(epoch, step, n_steps, read)

    def epoch_done(self, progress: Progress) -> None:
        new = progress.newest
        self._run.append_metrics(new.epoch, new.metrics, new.timestamp_ms)
        if not self._tables.append(new):
            self._restore_tables(self._records(progress))
        self._bar.epoch_line(self._describe(new), new.epoch)
        self._tracker.deliver()
        storage.push(self._run.path)
        if self._tell is not None:
            self._tell(progress)

    def go_on(self) -> bool:
        return True

    def trial_done(self, text: str, done: int, seconds_left: float) -> None:
        """Write the line of a trial that has ended, the last of `done`, with the time that the others will take."""
        self._bar.epoch_line(text, done, seconds_left)

    def deliver(self) -> None:
        """Bring MLflow up to date with what else was written to the run directory."""
        self._tracker.deliver()

    def _restore_tables(self, records: Iterable[EpochRecord]) -> None:
        for file in self._tables.replace(records):
            self._bar.line(_restored(file))

    def _records(self, progress: Progress) -> Iterator[EpochRecord]:
        return read_records(self._run.path / CHECKPOINTS, progress)


class _SearchTables:
    """`trajectory.csv` and `codes.csv` of a search, to which every epoch adds its rows.

    Args:
        folder: the run directory.
        space: the cells of the search.
    """

    def __init__(self, folder: Path, space: CellSpace) -> None:
        self._folder, self._space = folder, space
        self._kept: KeptCodes = {}
        self._sizes = {TRAJECTORY_FILE: 0, CODES_FILE: 0}

    def replace(self, records: Iterable[EpochRecord], *, finished: bool = False) -> list[Path]:
        """Make the tables what the records of all epochs done make them.

        Args:
            records: of the epochs, from the first.
            finished: whether no other epoch was begun. Else a kill may have left rows of a later epoch in a table, or
                only a part of the last epoch's rows.

        Returns:
            The tables that no kill has left as they were: they had been damaged.
        """
        contents = {name: io.BytesIO() for name in self._sizes}
        before_last = dict(self._sizes)
        self._kept, self._sizes = {}, dict.fromkeys(self._sizes, 0)
        for record in records:
            before_last = dict(self._sizes)
            for name, rows in self._rows(record).items():
                self._sizes[name] += contents[name].write(rows)
        damaged = []
        for name, content in contents.items():
            file, new = self._folder / name, content.getvalue()
            if not new:
                file.unlink(missing_ok=True)
                continue
            old = file.read_bytes() if file.is_file() else b""
            torn = len(old) >= before_last[name] and new.startswith(old)
            if old != new and (finished or not (torn or old.startswith(new))):
                damaged.append(file)
            make_hold(file, new)
        return damaged

    def append(self, record: EpochRecord) -> bool:
        """Add the rows of the next epoch; False if a table is shorter than it was left: it has been damaged since."""
        for name, rows in self._rows(record).items():
            try:
                append(self._folder / name, rows, at=self._sizes[name])
            except ValueError:
                return False
            self._sizes[name] += len(rows)
        return True

    def _rows(self, record: EpochRecord) -> dict[str, bytes]:
        """The rows of an epoch by table, with the head of the table before the first; none of what searches nothing."""
        tables = {
            TRAJECTORY_FILE: (TRAJECTORY_COLUMNS, list(trajectory_rows(record))),
            CODES_FILE: (CODES_COLUMNS, list(codes_rows(record, self._space, self._kept))),
        }
        if not tables[TRAJECTORY_FILE][1]:
            return {}
        text = {}
        for name, (columns, rows) in tables.items():
            stream = io.StringIO()
            csv.writer(stream, lineterminator="\n").writerows(
                [columns, *rows] if self._sizes[name] == 0 else rows
            )
            text[name] = stream.getvalue().encode()
        return text


def _restored(file: Path) -> str:
    """Return the warning for a table that was damaged."""
    return f"warning: {file}: it was damaged: restored from the log of epochs"


Prepared = TypeVar("Prepared")
CLEARING_FILE = ".clearing"  # while a --fresh deletes
_NOT_THE_RUNS = {LOCK_FILE, OWNER_FILE, LOG_FOLDER, CLEARING_FILE}  # what is there before a run begins


def execute(
    spec: JobSpec,
    prepare: Callable[[ImageDataset], Prepared],
    body: Callable[[RunDir, RunObserver, Prepared], Outcome],
    *,
    describe: Callable[[EpochRecord], str],
    fresh: bool,
    console: Console,
    datasets: Callable[[ImageDataset], tuple[DatasetUse, ...]],
    tell: Callable[[Progress], None] | None = None,
    warn: Callable[[ImageDataset], list[str]] | None = None,
    metrics_anew: Callable[[], list[MetricsLine]] | None = None,
    wait: float = 0,
) -> dict[str, Any]:
    """Run a job to its end, or go on with it, or return the result of a finished one.

    Args:
        spec: which job.
        prepare: checks and starts whatever the job needs for its pictures; what it refuses leaves nothing behind.
        body: runs the worker and writes the results.
        describe: one line for an epoch.
        fresh: start over, deleting what the run directory holds.
        console: for people.
        datasets: the parts of the pictures that the job uses.
        tell: called after every epoch, and when a run resumes for each epoch done; it may raise SystemExit to leave
            the run as it is, for others to close.
        warn: lines about settings that make no sense with the pictures; None: about the job's own.
        metrics_anew: what the metrics of a finished run without checkpoints are, should its file be damaged.
        wait: so many seconds for another process that works on the same run; -1: for ever.

    Returns:
        The figures of `--json`.

    Raises:
        CheckpointError: the pictures are not those that the run was begun with.
        IstanasError: whatever `prepare` and `body` raise; after the latter the record says FAILED, and the same
            command resumes.
    """
    run = RunDir(spec.path)
    with _locked(run, console, wait=wait):
        if not fresh:
            _mend_lost_record(run, spec, console_line(console))
        if not fresh and run.exists():
            _mend(run, spec, console_line(console), metrics_anew)
        old = run.read() if not fresh and run.exists() else None
        if old is not None and old.status == "FINISHED":
            _check_finished(spec, old, datasets, console)
            tracker = tracker_of(run, spec.config)
            tracker.deliver()  # in case the store was down when it finished
            storage.push(run.path)
            console.print(
                f"{spec.kind}: finished before, see {storage.shown(run.path)}; --fresh starts over",
                highlight=False,
                soft_wrap=True,
            )
            return _with_ids(run.read().result, run, tracker)
        dataset = _load_for(run, spec, old, console)
        check_left_for_training(spec.config, dataset, (spec.kind,))  # before the rest is divided into halves
        used, digest = datasets(dataset), data_digest(spec.config, dataset, spec.kind)
        if old is not None:
            check_same_pictures(old, dataset, digest, used)
        networks = () if spec.kind == "sweep" else (spec.kind,)  # of a sweep, trials may have others
        lines = describe_pictures(spec.config, dataset, used, networks)
        prepared = prepare(dataset)
        told = warnings_of(spec.config, dataset, (spec.kind,)) if warn is None else warn(dataset)
        tell_pictures([*lines, *told], console)
        if fresh and run.exists():
            close_running([run, *_runs_below(run.path)], spec.config)
        if fresh or not run.exists():  # without a record: what a --fresh that was killed left
            _clear(run.path)
            storage.push_cleared(run.path)
        tracker = tracker_of(run, spec.config)
        record = _open_record(run, spec, used, digest, lines)
        write_environment(run, spec.kind)
        atomic_write(run.path / CONFIG_FILE, to_yaml(as_written(spec.config)))
        storage.push(run.path)  # with the key by which its MLflow run is found again
        tracker.deliver()
        console.print(f"{spec.kind}: {storage.shown(run.path)}", highlight=False, soft_wrap=True)
        space = spec.config.space.cell_space()
        try:
            with EpochBar(console, spec.kind, spec.epochs, spec.unit) as bar:
                outcome = body(run, RunObserver(run, tracker, bar, space, describe, tell), prepared)
            final = dataclasses.replace(
                record,
                status="FINISHED",
                ended_ms=_now_ms(),
                result=outcome.result,
                artifacts=(*outcome.artifacts, ENVIRONMENT_FILE),
                tags={**_with_outcome(record, "FINISHED").tags, **outcome.tags},
                description="\n\n".join([outcome.description, *_missing_lines(record)]),
            )
            page = write_page(REPORT_PAGE, lambda: write_report(run, final), console_line(console))
            final = dataclasses.replace(final, artifacts=(*final.artifacts, *page))
            run.write(final)
            storage.push(run.path)
        except SystemExit:
            raise
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            record = _with_outcome(record, INTERRUPTED if stopped else "FAILED")
            _close_failed(run, record, tracker, console_line(console))
            raise
        if not tracker.deliver():
            console.print(
                f"not in MLflow yet: deliver it with istanas sync {storage.shown(run.path)}",
                highlight=False,
                soft_wrap=True,
            )
        storage.push(run.path)  # what the tracker noted
        return _with_ids(outcome.result, run, tracker)


def _load_for(run: RunDir, spec: JobSpec, old: RunRecord | None, console: Console) -> ImageDataset:
    """Load the pictures of a job; `old` is the record of the run that resumes.

    Raises:
        DataError: if they are missing or broken.
    """
    try:
        return load_data(spec.config, console)
    except DataError as error:
        if old is None or spec.config.data.name != "folder" or not data_folder_is_missing(spec.config.data):
            raise
        what = str(error).partition("; ")[0]
        raise DataError(
            f"{what}; restore the folder to resume {storage.shown(run.path)}, or name another one for a new run"
        ) from error


def _check_finished(
    spec: JobSpec,
    record: RunRecord,
    datasets: Callable[[ImageDataset], tuple[DatasetUse, ...]],
    console: Console,
) -> None:
    """Refuse the result of a finished run if its pictures have changed; if they are gone, say so.

    Raises:
        CheckpointError: if they have changed.
        DataError: if they have changed to something that no job could use.
    """
    try:
        dataset = load_data(spec.config, console, download=False)
    except DataError as error:
        if not data_folder_is_missing(spec.config.data):
            raise
        console_line(console)(f"warning: the pictures of this result cannot be looked at any more: {error}")
        return
    check_same_pictures(record, dataset, data_digest(spec.config, dataset, spec.kind), datasets(dataset))


def _with_outcome(record: RunRecord, word: str) -> RunRecord:
    """A record that says what became of its run, where MLflow's own words do not, or did not before."""
    if word != INTERRUPTED and OUTCOME_TAG not in record.tags:
        return record
    return dataclasses.replace(record, tags={**record.tags, OUTCOME_TAG: word})


def _close_failed(run: RunDir, record: RunRecord, tracker: Tracker, say: Callable[[str], None]) -> None:
    """Say FAILED in record and store; what refuses even that must not hide why the run has failed."""
    try:
        run.write(dataclasses.replace(record, status="FAILED", ended_ms=_now_ms()))
        tracker.deliver()
        storage.push(run.path, once=True)
    except (OSError, IstanasError) as error:
        say(f"{storage.shown(run.path)}: still says RUNNING ({one_line(error)}), the same command mends that")


def _mend(
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
        tables = _SearchTables(run.path, spec.config.space.cell_space())
        for file in tables.replace(read_records(folder, progress), finished=True):
            say(_restored(file))
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


def _mend_lost_record(run: RunDir, spec: JobSpec, say: Callable[[str], None]) -> None:
    """Make the record anew where there are checkpoints without one, unless a --fresh was killed that deletes them."""
    checkpoints = any((run.path / CHECKPOINTS).glob("epoch-*.pt"))
    if checkpoints and not run.exists() and not (run.path / CLEARING_FILE).exists():
        say(f"warning: {run.path / RECORD_FILE}: missing, though there are checkpoints: restored")
        run.write(_new_record(spec))


def metrics_line(record: EpochRecord) -> MetricsLine:
    """The line of an epoch in a run's metrics."""
    return MetricsLine(record.epoch, record.timestamp_ms, record.metrics)


def write_page(name: str, write: Callable[[], Any], say: Callable[[str], None]) -> tuple[str, ...]:
    """Write one of a run's pages; one that can't be written costs a line, and not the run.

    Returns:
        Its name, if it is there.
    """
    try:
        write()
    except Exception as error:  # the results are on the disk already
        say(f"{name}: not written ({one_line(error)})")
        return ()
    return (name,)


@contextlib.contextmanager
def _locked(run: RunDir, console: Console, *, wait: float = 0) -> Iterator[None]:
    """Hold the run directory; what was refused before any work leaves no empty run behind."""
    with run.lock(wait=wait):
        try:
            with storage.held(run.path, console_line(console), wait=wait):
                yield
        finally:
            if not run.exists() and {entry.name for entry in run.path.iterdir()} <= _NOT_THE_RUNS:
                shutil.rmtree(run.path)


def announce(spec: JobSpec) -> str | None:
    """Open a run that another process will work on: its record and its MLflow run, whose id comes from here.

    Args:
        spec: of the run; one that is there goes on.

    Returns:
        The MLflow run's id; None if there is no store, or it can't be reached.
    """
    run = RunDir(spec.path)
    _fetch_for_mlflow(run)
    with run.lock(wait=SECONDS_TO_END):
        if run.exists():
            _mend(run, spec, _LOG.warning)
        else:
            _open_record(run, spec)
            storage.send(run.path, RECORD_FILE)  # with the key by which its MLflow run is found again
        tracker = tracker_of(run, spec.config)
        tracker.deliver()
        storage.send(run.path, storage.LINK_FILE)
    return tracker.run_id


def close(path: Path, config: Config, status: str, tags: dict[str, str], result: dict[str, Any]) -> bool:
    """Close a run whose process is gone or waits to be ended, in its record and in MLflow; a finished one is tagged.

    Not under the run's lock: a process that waits to be ended still holds it.

    Args:
        path: the run directory.
        config: of the run.
        status: as MLflow calls it: FINISHED, FAILED or KILLED.
        tags: what became of it.
        result: the figures that it had reached.

    Returns:
        Whether MLflow has all of it.
    """
    run = RunDir(path)
    _fetch_for_mlflow(run)
    record = run.read()
    if record.status != "FINISHED":
        record = dataclasses.replace(record, status=status, ended_ms=_now_ms(), result=result)
    run.write(dataclasses.replace(record, tags={**record.tags, **tags}))
    delivered = tracker_of(run, config).deliver()
    storage.send(path, storage.LINK_FILE, RECORD_FILE)
    return delivered


def deliver_below(path: Path, config: Config) -> bool:
    """Deliver to MLflow the ended runs in a run directory: a sweep's trials and retrainings.

    Returns:
        Whether MLflow has all of them.
    """
    delivered = []
    for run in _runs_below(path):  # each of them
        if _status(run) not in ("RUNNING", None):
            _fetch_for_mlflow(run)
            delivered.append(tracker_of(run, _without_models(config)).deliver())
            storage.send(run.path, storage.LINK_FILE)
    return all(delivered)


def close_below(path: Path, config: Config) -> bool:
    """`close_running` of the runs in a run directory, a sweep's."""
    return close_running(_runs_below(path), config)


def close_running(runs: Sequence[RunDir], config: Config) -> bool:
    """Close those runs that still say RUNNING, though nobody works on them any more: killed, or left by who did.

    Returns:
        Whether MLflow has all of them.
    """
    left = [run for run in runs if _status(run) == "RUNNING"]
    delivered = [
        close(run.path, _without_models(config), "KILLED", {OUTCOME_TAG: INTERRUPTED}, {}) for run in left
    ]
    return all(delivered)


def _status(run: RunDir) -> str | None:
    """None of a run whose record can't be read: it can be neither closed nor delivered, its own command mends it."""
    try:
        return run.read().status
    except CheckpointError:
        return None


def _runs_below(path: Path) -> list[RunDir]:
    """A sweep's trials and retrainings."""
    storage.fetch_records(path)
    return [RunDir(file.parent) for file in sorted(path.glob(f"*/{RECORD_FILE}"))]


def _fetch_for_mlflow(run: RunDir) -> None:
    """Have here of a run in a storage, which another machine may have worked on, what MLflow may lack."""
    storage.fetch_parts(
        run.path, lambda name: not name.startswith(f"{CHECKPOINTS}/") and not name.endswith(".log")
    )


def _without_models(config: Config) -> Config:
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"models": False})})


def load_data(config: Config, console: Console, *, download: bool = True) -> ImageDataset:
    """The pictures; a picture folder's are checked and decoded under the eyes of people."""
    return load_pictures(
        config.data,
        progress=_progress("decoding", console),
        checking=_progress("checking", console),
        download=download,
    )


def settled(config: Config, console: Console) -> Config:
    """The configuration with the stems that fit the pictures, for which those may have to be looked at."""
    return settle_stems(config, _progress("checking", console))


def settled_spec(config: Config, console: Console, describe: Callable[[Config], JobSpec]) -> JobSpec:
    """Return the job with the stems that fit the pictures, which decide which run it is.

    If the pictures cannot be looked at, it is the run that is already there: its result, and what to do about its
    pictures, do not depend on how the stem was given.

    Args:
        config: the configuration.
        console: for people.
        describe: makes the job of a configuration whose stems are settled.

    Raises:
        DataError: if the pictures cannot be looked at, and not exactly one run is there that they may belong to.
        ConfigError: if a network is too narrow for its stem.
    """
    try:
        return describe(settled(config, console))
    except DataError:
        storage.fetch_records(storage.local(config.runtime.runs_dir))
        possible = map(describe, possible_stems(config))
        begun = [spec for spec in possible if RunDir(spec.path).exists()]
        if len(begun) != 1:
            raise
        return begun[0]


def check_data(config: Config, dataset: ImageDataset, jobs: Sequence[str]) -> None:
    """Check the settings of the jobs to come against the pictures and, in process, this machine."""
    if config.runtime.worker_range.maximum == 0:
        compute_for(config.runtime)
    check_left_for_training(config, dataset, jobs)
    check_fit(config, dataset, jobs)


def tell_pictures(lines: Sequence[str], console: Console) -> None:
    """Write what people should know about the pictures, before any work."""
    for line in lines:
        console_line(console)(line if line.startswith("warning: ") else f"pictures: {line}")


def console_line(console: Console) -> Callable[[str], None]:
    """What writes a line for people."""
    return lambda text: console.print(text, highlight=False, soft_wrap=True, markup=False)


def _progress(doing: str, console: Console) -> Callable[[int, int], None]:
    """Tell, every tenth of the way, how many pictures are done (once, before they are cached)."""
    told = -1

    def progress(done: int, total: int) -> None:
        nonlocal told
        tenth = 10 * done // max(total, 1)
        if tenth != told:
            told = tenth
            console.print(f"{doing} pictures: {done} of {total}", highlight=False)

    return progress


def trajectory_rows(record: EpochRecord) -> Iterator[tuple[Any, ...]]:
    """One row a recovery and node: what it keeps, as `TRAJECTORY_COLUMNS`; epoch 0 is the start, before any training.

    Args:
        record: of any job's epoch; there are no rows unless it searches.
    """
    for epoch, nodes in _recoveries(record):
        for node in nodes:
            yield (
                epoch,
                node.cell,
                node.node,
                " ".join(node.picks),
                " ".join(f"{w:.6g}" for w in node.edge_weights),
                node.state,
                node.changed,
                node.distance,
                node.gap,
                node.truncation,
                node.margin,
            )


KeptCodes = dict[tuple[str, int], list[float]]  # (cell, node) -> magnitudes of its last recovered code


def codes_rows(
    record: EpochRecord, space: CellSpace, kept: KeptCodes
) -> Iterator[tuple[int, str, int, int, str, str]]:
    """Magnitudes of every node's sparse code: `CODES_COLUMNS` of each recovery, node and candidate.

    Left out are epochs whose magnitudes were not recorded, by an early version.

    Args:
        record: of an epoch of a search.
        space: its cells.
        kept: what the epochs before have kept, updated here: a node that is not recovered any more keeps the code
            that it froze with.
    """
    for epoch, nodes in _recoveries(record):
        for node in nodes:
            place = node.cell, node.node
            if node.recovered:
                kept[place] = node.magnitudes
            for candidate, magnitude in enumerate(kept.get(place, ())):
                state, op = space.split(candidate)
                yield epoch, *place, state, space.ops[op], f"{magnitude:.6g}"


def _recoveries(record: EpochRecord) -> Iterator[tuple[int, tuple[NodeReport, ...]]]:
    return iter(()) if record.search is None else record.search.recoveries(record.epoch)


def tracker_of(run: RunDir, config: Config) -> Tracker:
    """The mirror of a run that its configuration asks for."""
    t = config.tracking
    return open_tracker(
        run,
        enabled=t.enabled,
        tracking_uri=t.uri,
        experiment=t.experiment,
        models=t.models,
        registered_model=t.registered_model,
    )


def as_written(config: Config) -> Config:
    """Return the configuration as it is written to files: without passwords, and with the resolved tracking URI."""
    if config.tracking.uri is not None:
        tracking = config.tracking.model_copy(update={"uri": store_uri(config.tracking.uri)})
        config = config.model_copy(update={"tracking": tracking})
    return without_passwords(config)


def _open_record(
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
        record = _with_outcome(record, "RUNNING")
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


def _missing_lines(record: RunRecord) -> list[str]:
    """What a run's figures do not tell: which classes they are not of."""
    return [line for use in record.datasets if (line := use.describe_missing()) is not None]


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
        started_ms=_now_ms(),
        ended_ms=None,
        artifacts=(CONFIG_FILE, ENVIRONMENT_FILE),
        result={},
        datasets=datasets,
    )


def _common_tags(config: Config) -> dict[str, str]:
    """What every run is looked for by, beside what its record says."""
    return {"istanas.seed": str(config.seed), "istanas.workers": str(config.runtime.workers)}


def _clear(path: Path) -> None:
    """Delete all but lock and Ray's logs, the record first: a kill in between leaves nothing that looks like a run."""
    (path / CLEARING_FILE).touch()
    (path / RECORD_FILE).unlink(missing_ok=True)
    for entry in path.iterdir():
        if entry.name in _NOT_THE_RUNS:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (path / CLEARING_FILE).unlink()


def _with_ids(result: dict[str, Any], run: RunDir, tracker: Tracker) -> dict[str, Any]:
    return {"run_dir": storage.shown(run.path), "mlflow_run_id": tracker.run_id, **result}


def _now_ms() -> int:
    return int(time.time() * 1000)
