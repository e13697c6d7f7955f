"""What every job does around its worker: run directory, lock, resume, record, tracker, results on disk.

A job is flat: open the directory, stop if it is finished, run the worker, write the results, close the record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console

from istanas.data import ImageDataset
from istanas.errors import DataError, IstanasError
from pipeline.base.files import atomic_write
from pipeline.base.text import one_line
from pipeline.config.load import to_yaml
from pipeline.config.schema import Config
from pipeline.jobs.closing import close_running, fetch_for_mlflow, runs_below, tracker_of
from pipeline.jobs.observer import RunObserver
from pipeline.jobs.opening import (
    NOT_THE_RUNS,
    JobSpec,
    as_written,
    clear,
    mend,
    mend_lost_record,
    now_ms,
    open_record,
    with_outcome,
)
from pipeline.jobs.progress import EpochBar
from pipeline.report.run_page import write_report
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.environment import write_environment
from pipeline.runs.layout import CONFIG_FILE, ENVIRONMENT_FILE, LINK_FILE, RECORD_FILE, REPORT_PAGE
from pipeline.runs.outcome import INTERRUPTED
from pipeline.runs.record import DatasetUse, MetricsLine, RunRecord
from pipeline.tracking.tracker import Tracker
from pipeline.training.compute import compute_for
from pipeline.training.data_checks import check_left_for_training, warnings_of
from pipeline.training.epoch_record import EpochRecord, Progress
from pipeline.training.pictures import (
    check_fit,
    check_same_pictures,
    data_digest,
    data_folder_is_missing,
    describe_pictures,
    load_pictures,
    possible_stems,
    settle_stems,
)

_LOG = logging.getLogger(__name__)

SECONDS_TO_END = 60.0  # for a process that has been told to end, and still holds its run


@dataclass(frozen=True)
class Outcome:
    """What a job's body hands over: the figures of `--json`, what to upload, what to say."""

    result: dict[str, Any]
    artifacts: tuple[str, ...]
    tags: dict[str, str]
    description: str


Prepared = TypeVar("Prepared")


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
    run: RunDir | None = None,
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
        run: the run directory, if the caller has acquired it.

    Returns:
        The figures of `--json`.

    Raises:
        CheckpointError: the pictures are not those that the run was begun with.
        IstanasError: whatever `prepare` and `body` raise; after the latter the record says FAILED, and the same
            command resumes.
    """
    run = run if run is not None and run.path == spec.path else RunDir(spec.path)
    with _locked(run, console, wait=wait) as run:
        if not fresh:
            mend_lost_record(run, spec, console_line(console))
        if not fresh and run.exists():
            mend(run, spec, console_line(console), metrics_anew)
        old = run.read() if not fresh and run.exists() else None
        if old is not None and old.status == "FINISHED":
            _check_finished(spec, old, datasets, console)
            tracker = tracker_of(run, spec.config)
            tracker.deliver()  # in case the store was down when it finished
            run.push()
            console.print(
                f"{spec.kind}: finished before, see {bucket.shown(run.path)}; --fresh starts over",
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
            close_running([run, *runs_below(run.path)], spec.config)
        if fresh or not run.exists():  # without a record: what a --fresh that was killed left
            clear(run.path)
            run.push_cleared()
        tracker = tracker_of(run, spec.config)
        record = open_record(run, spec, used, digest, lines)
        write_environment(run, spec.kind)
        atomic_write(run.path / CONFIG_FILE, to_yaml(as_written(spec.config)))
        run.push()  # with the key by which its MLflow run is found again
        tracker.deliver()
        console.print(f"{spec.kind}: {bucket.shown(run.path)}", highlight=False, soft_wrap=True)
        space = spec.config.space.cell_space()
        try:
            with EpochBar(console, spec.kind, spec.epochs, spec.unit) as bar:
                outcome = body(run, RunObserver(run, tracker, bar, space, describe, tell), prepared)
            final = dataclasses.replace(
                record,
                status="FINISHED",
                ended_ms=now_ms(),
                result=outcome.result,
                artifacts=(*outcome.artifacts, ENVIRONMENT_FILE),
                tags={**with_outcome(record, "FINISHED").tags, **outcome.tags},
                description="\n\n".join([outcome.description, *_missing_lines(record)]),
            )
            page = write_page(REPORT_PAGE, lambda: write_report(run, final), console_line(console))
            final = dataclasses.replace(final, artifacts=(*final.artifacts, *page))
            run.write(final)
            run.push()
        except SystemExit:
            raise
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            record = with_outcome(record, INTERRUPTED if stopped else "FAILED")
            _close_failed(run, record, tracker, console_line(console))
            raise
        if not tracker.deliver():
            console.print(
                f"not in MLflow yet: deliver it with istanas sync {bucket.shown(run.path)}",
                highlight=False,
                soft_wrap=True,
            )
        run.push()  # what the tracker noted
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
            f"{what}; restore the folder to resume {bucket.shown(run.path)}, or name another one for a new run"
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


def _close_failed(run: RunDir, record: RunRecord, tracker: Tracker, say: Callable[[str], None]) -> None:
    """Say FAILED in record and store; what refuses even that must not hide why the run has failed."""
    try:
        run.write(dataclasses.replace(record, status="FAILED", ended_ms=now_ms()))
        tracker.deliver()
        run.push(once=True)
    except (OSError, IstanasError) as error:
        say(f"{bucket.shown(run.path)}: still says RUNNING ({one_line(error)}), the same command mends that")


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
def _locked(run: RunDir, console: Console, *, wait: float = 0) -> Iterator[RunDir]:
    """Lock and acquire the run directory; what was refused before any work leaves no empty run behind."""
    with run.lock(wait=wait):
        try:
            with bucket.acquired(run, console_line(console), wait=wait) as mirrored:
                yield mirrored
        finally:
            if not run.exists() and {entry.name for entry in run.path.iterdir()} <= NOT_THE_RUNS:
                shutil.rmtree(run.path)


def announce(spec: JobSpec) -> str | None:
    """Open a run that another process will work on: its record and its MLflow run, whose id comes from here.

    Args:
        spec: of the run; one that is there goes on.

    Returns:
        The MLflow run's id; None if there is no store, or it can't be reached.
    """
    run = RunDir(spec.path)
    fetch_for_mlflow(run)
    with run.lock(wait=SECONDS_TO_END):
        if run.exists():
            mend(run, spec, _LOG.warning)
        else:
            open_record(run, spec)
            bucket.send(run.path, RECORD_FILE)  # with the key by which its MLflow run is found again
        tracker = tracker_of(run, spec.config)
        tracker.deliver()
        bucket.send(run.path, LINK_FILE)
    return tracker.run_id


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
        bucket.fetch_records(bucket.local(config.runtime.runs_dir))
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


def _missing_lines(record: RunRecord) -> list[str]:
    """What a run's figures do not tell: which classes they are not of."""
    return [line for use in record.datasets if (line := use.describe_missing()) is not None]


def _with_ids(result: dict[str, Any], run: RunDir, tracker: Tracker) -> dict[str, Any]:
    return {"run_dir": bucket.shown(run.path), "mlflow_run_id": tracker.run_id, **result}
