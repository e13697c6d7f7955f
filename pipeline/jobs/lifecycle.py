"""The life cycle that all jobs share: run directory, lock, resuming, record, tracker, result.

`execute` opens the run directory. If the run is finished, it returns the result. Otherwise, it checks the pictures,
runs the job's steps and closes the record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rich.console import Console

from istanas.data import ImageDataset
from istanas.errors import DataError, IstanasError
from pipeline.base.addresses import is_remote
from pipeline.base.files import atomic_write
from pipeline.base.text import one_line
from pipeline.config.load import to_yaml
from pipeline.config.schema import Config
from pipeline.jobs.closing import close_running, fetch_for_mlflow, runs_below, tracker_of
from pipeline.jobs.context import JobContext, say_pictures
from pipeline.jobs.observer import RunObserver
from pipeline.jobs.opening import (
    NOT_THE_RUNS,
    JobSpec,
    as_written,
    clear,
    now_ms,
    open_record,
    repair,
    restore_lost_record,
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
from pipeline.training.data_checks import warnings_of
from pipeline.training.epoch_record import EpochRecord
from pipeline.training.pictures import (
    check_fit,
    check_same_pictures,
    data_are_missing,
    data_digest,
    describe_pictures,
    has_own_root,
    load_pictures,
    possible_stems,
    settle_stems,
)

_LOG = logging.getLogger(__name__)

SECONDS_TO_END = 60.0  # wait for a terminated process that still holds the lock of its run

Prepared = TypeVar("Prepared")


@dataclass(frozen=True)
class Outcome:
    """What a job's `run` step returns.

    Args:
        result: The figures that `--json` prints.
        artifacts: Files in the run directory that MLflow receives.
        tags: MLflow tags of the finished run.
        description: Description of the finished run in MLflow, in Markdown.
    """

    result: dict[str, Any]
    artifacts: tuple[str, ...]
    tags: dict[str, str]
    description: str


@dataclass(frozen=True)
class JobSteps(Generic[Prepared]):
    """The steps in which jobs differ; `execute` calls them in this order.

    Args:
        datasets: Returns the parts of the pictures that the job uses.
        prepare: Checks the settings against the pictures and starts what the job needs. An error that it raises leaves
            no new run directory behind.
        warn: Returns warnings about settings that make no sense with the pictures.
        run: Trains, and writes the results to the run directory.
        describe: Returns one line for the user about an epoch.
        rebuild_metrics: Returns the metrics of a finished run without checkpoints whose metrics file is damaged; None
            if they cannot be rebuilt.
        has_report: Whether the run gets the page `report.html`, which shows one genotype.
    """

    datasets: Callable[[ImageDataset], tuple[DatasetUse, ...]]
    prepare: Callable[[ImageDataset], Prepared]
    warn: Callable[[ImageDataset], list[str]]
    run: Callable[[RunDir, RunObserver, Prepared], Outcome]
    describe: Callable[[EpochRecord], str]
    rebuild_metrics: Callable[[], list[MetricsLine]] | None = None
    has_report: bool = True


def execute(context: JobContext, spec: JobSpec, steps: JobSteps[Prepared]) -> dict[str, Any]:
    """Run a job to its end, resume it, or return the result of a finished one.

    Args:
        context: The context of the job.
        spec: The identity of the run, with the configuration that is used.
        steps: The steps of the job.

    Returns:
        The figures that `--json` prints.

    Raises:
        CheckpointError: The pictures have changed since the run was started.
        IstanasError: An error of `steps`. After an error of `run`, the status is FAILED, and the same command resumes.
    """
    config = spec.config
    with _locked(spec, context) as run:
        old = None if context.fresh else _repaired_record(run, spec, steps, context)
        if old is not None and old.status == "FINISHED":
            return _finished_result(run, old, spec, steps, context)
        dataset = _load_for(run, spec, old, context.console)
        used, digest = steps.datasets(dataset), data_digest(config, dataset, spec.kind)
        if old is not None:
            check_same_pictures(old, dataset, digest, used)
        # The trials of a sweep may have different stems, so each prints its own, as each search of a benchmark does.
        networks = (spec.kind,) if spec.kind in ("search", "retrain") else ()
        pictures = describe_pictures(config, dataset, used, networks)
        prepared = steps.prepare(dataset)
        say_pictures((*pictures, *steps.warn(dataset)), context.say)
        _clear_old_run(run, context)
        tracker = tracker_of(run, config)
        record = open_record(run, spec, used, digest, pictures)
        write_environment(run, spec.kind)
        atomic_write(run.path / CONFIG_FILE, to_yaml(as_written(config)))
        run.push()  # includes the key that identifies the MLflow run
        tracker.deliver()
        context.say(f"{spec.kind}: {bucket.shown(run.path)}")
        return _run_and_close(run, record, tracker, spec, steps, prepared, context)


def _repaired_record(
    run: RunDir, spec: JobSpec, steps: JobSteps[Any], context: JobContext
) -> RunRecord | None:
    """Repair the damaged files of an existing run and return its record; None if there is no run."""
    restore_lost_record(run, spec, context.say)
    if not run.exists():
        return None
    repair(run, spec, context.say, steps.rebuild_metrics)
    return run.read()


def _finished_result(
    run: RunDir, record: RunRecord, spec: JobSpec, steps: JobSteps[Any], context: JobContext
) -> dict[str, Any]:
    """Return the result of a finished run, provided its pictures have not changed."""
    _check_finished(spec, record, steps.datasets, context)
    tracker = tracker_of(run, spec.config)
    tracker.deliver()  # MLflow may have been unreachable when the run finished
    run.push()
    context.say(f"{spec.kind}: already finished, see {bucket.shown(run.path)}; --fresh starts over")
    return _with_ids(record.result, run, tracker)


def _clear_old_run(run: RunDir, context: JobContext) -> None:
    """Delete the run that `--fresh` replaces, or the remains of a killed `--fresh`."""
    if context.fresh and run.exists():
        close_running([run, *runs_below(run.path)], context.config)
    if context.fresh or not run.exists():
        clear(run.path)
        run.push_cleared()


def _run_and_close(
    run: RunDir,
    record: RunRecord,
    tracker: Tracker,
    spec: JobSpec,
    steps: JobSteps[Prepared],
    prepared: Prepared,
    context: JobContext,
) -> dict[str, Any]:
    """Run the job's `run` step, and write its outcome to the record and to MLflow."""
    space = spec.config.space.build()
    try:
        with EpochBar(context.console, spec.kind, spec.epochs, spec.unit) as bar:
            observer = RunObserver(run, tracker, bar, space, steps.describe, context.on_epoch, spec.unit)
            outcome = steps.run(run, observer, prepared)
        final = dataclasses.replace(
            record,
            status="FINISHED",
            ended_ms=now_ms(),
            result=outcome.result,
            artifacts=(*outcome.artifacts, ENVIRONMENT_FILE),
            tags={**with_outcome(record, "FINISHED").tags, **outcome.tags},
            description="\n\n".join([outcome.description, *_missing_classes(record)]),
        )
        if steps.has_report:
            page = write_page(REPORT_PAGE, lambda: write_report(run, final), context.say)
            final = dataclasses.replace(final, artifacts=(*final.artifacts, *page))
        run.write(final)
        run.push()
    except SystemExit:
        raise
    except BaseException as error:
        ended = INTERRUPTED if isinstance(error, KeyboardInterrupt) else "FAILED"
        _close_failed(run, with_outcome(record, ended), tracker, context.say)
        raise
    if not tracker.deliver():
        context.say(f"not in MLflow yet: deliver it with istanas sync {bucket.shown(run.path)}")
    run.push()  # includes the state of the delivery
    return _with_ids(outcome.result, run, tracker)


def _load_for(run: RunDir, spec: JobSpec, old: RunRecord | None, console: Console) -> ImageDataset:
    """Load the pictures of a job; `old` is the record of the run that is resumed.

    Raises:
        DataError: The pictures are missing or broken.
    """
    try:
        return load_data(spec.config, console)
    except DataError as error:
        data = spec.config.data
        if old is None or not has_own_root(data) or not data_are_missing(data, error):
            raise
        what = "the bucket" if is_remote(str(data.root)) else "the folder"
        raise type(error)(
            error.problem,
            field=error.field,
            remedy=f"restore {what} to resume {bucket.shown(run.path)}, or name another one for a new run",
        ) from error


def _check_finished(
    spec: JobSpec,
    record: RunRecord,
    datasets: Callable[[ImageDataset], tuple[DatasetUse, ...]],
    context: JobContext,
) -> None:
    """Refuse the result of a finished run if its pictures have changed; warn if they are missing.

    Raises:
        CheckpointError: The pictures have changed.
        DataError: The pictures have changed, and no job could use them.
    """
    try:
        dataset = load_data(spec.config, context.console, download=False)
    except DataError as error:
        if not data_are_missing(spec.config.data, error):
            raise
        context.say(f"warning: the pictures of this result cannot be checked any more: {error}")
        return
    check_same_pictures(record, dataset, data_digest(spec.config, dataset, spec.kind), datasets(dataset))


def _close_failed(run: RunDir, record: RunRecord, tracker: Tracker, say: Callable[[str], None]) -> None:
    """Write FAILED to the record and to MLflow. An error here must not hide the error of the run."""
    try:
        run.write(dataclasses.replace(record, status="FAILED", ended_ms=now_ms()))
        tracker.deliver()
        run.push(once=True)
    except (OSError, IstanasError) as error:
        say(
            f"{bucket.shown(run.path)}: the status is still RUNNING ({one_line(error)}); run the same command again to "
            "correct it"
        )


def write_page(name: str, write: Callable[[], Any], say: Callable[[str], None]) -> tuple[str, ...]:
    """Write one of a run's pages. An error is reported in one line and does not fail the run.

    Returns:
        Its name, if it was written.
    """
    try:
        write()
    except Exception as error:  # the results are on disk already
        say(f"{name}: not written ({one_line(error)})")
        return ()
    return (name,)


@contextlib.contextmanager
def _locked(spec: JobSpec, context: JobContext) -> Iterator[RunDir]:
    """Lock and acquire the run directory; remove it afterwards if the job was refused before it wrote a record."""
    acquired = context.run is not None and context.run.path == spec.path
    run = context.run if context.run is not None and acquired else RunDir(spec.path)
    with run.lock(wait=context.wait):
        try:
            with bucket.acquired(run, context.say, wait=context.wait) as mirrored:
                yield mirrored
        finally:
            if not run.exists() and {entry.name for entry in run.path.iterdir()} <= NOT_THE_RUNS:
                shutil.rmtree(run.path)


def announce(spec: JobSpec) -> str | None:
    """Open a run that another process will execute: its record and its MLflow run.

    Args:
        spec: The run; an existing one is resumed.

    Returns:
        The id of the MLflow run; None if tracking is disabled or MLflow is unreachable.
    """
    run = RunDir(spec.path)
    fetch_for_mlflow(run)
    with run.lock(wait=SECONDS_TO_END):
        if run.exists():
            repair(run, spec, _LOG.warning)
        else:
            open_record(run, spec)
            bucket.send(run.path, RECORD_FILE)  # includes the key that identifies the MLflow run
        tracker = tracker_of(run, spec.config)
        tracker.deliver()
        bucket.send(run.path, LINK_FILE)
    return tracker.run_id


def load_data(config: Config, console: Console, *, download: bool = True) -> ImageDataset:
    """Load the pictures; the progress of checking and decoding a picture folder is shown on the console."""
    return load_pictures(
        config.data,
        progress=progress_on("decoding", console),
        checking=progress_on("checking", console),
        download=download,
    )


def settled(config: Config, console: Console) -> Config:
    """Return the configuration with the stems that fit the pictures; this may read the pictures' headers."""
    return settle_stems(config, progress_on("checking", console))


def settled_spec(config: Config, console: Console, describe: Callable[[Config], JobSpec]) -> JobSpec:
    """Return the job with the stems that fit the pictures, which are part of the run's hash.

    If the pictures cannot be read, the job is that of the only existing run with a possible stem, so that the result of
    a finished run stays available.

    Args:
        config: The configuration.
        console: Where the progress is shown.
        describe: Returns the job of a configuration whose stems are settled.

    Raises:
        DataError: The pictures cannot be read, and there is no such run or more than one.
        ConfigError: A network is too narrow for its stem.
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
    """Check the settings of the given jobs against the pictures and, without workers, against this machine."""
    if config.runtime.worker_range.maximum == 0:
        compute_for(config.runtime)
    check_fit(config, dataset, jobs)


def own_warnings(spec: JobSpec) -> Callable[[ImageDataset], list[str]]:
    """Return the `warn` step of a job that trains one network."""
    return lambda dataset: warnings_of(spec.config, dataset, (spec.kind,))


def progress_on(doing: str, console: Console, what: str = "pictures") -> Callable[[int, int], None]:
    """Return a function that prints the number of processed pictures, or other files, after every tenth of them."""
    printed = -1

    def progress(done: int, total: int) -> None:
        nonlocal printed
        tenth = 10 * done // max(total, 1)
        if tenth != printed:
            printed = tenth
            console.print(f"{doing} {what}: {done} of {total}", highlight=False)

    return progress


def _missing_classes(record: RunRecord) -> list[str]:
    """Return a line for each part of a run's pictures that lacks classes."""
    return [line for use in record.datasets if (line := use.describe_missing()) is not None]


def _with_ids(result: dict[str, Any], run: RunDir, tracker: Tracker) -> dict[str, Any]:
    return {"run_dir": bucket.shown(run.path), "mlflow_run_id": tracker.run_id, **result}
