"""A search whose measurements are Ray Tune trials, several at a time (`search.max_concurrent`).

The division of labour is simple, so that nothing can be lost or written twice:

- A trial (`run_measurement`) receives an architecture and its number, opens the pictures, trains in its own process,
  and reports the metrics. It writes no files and does not use MLflow. A trial that loses its process starts again.
- The process of the search has all state. Whenever there is room, it draws the next architecture
  (`MeasuredSearch.draw`). When a measurement finishes, it writes the run of that measurement
  (`measurement-NNNN` in the run directory, a child of the search in MLflow) and then, as one epoch of the search, the
  checkpoint, the metrics and the tables.

Therefore resuming needs no state of Ray Tune: the checkpoint has the finished and the pending measurements. The pending
ones are repeated, with the same numbers and the same results. A measurement that was drawn after the checkpoint is
drawn again from the same posterior. Its run exists only once the measurement is finished, so that a kill leaves no run
that seems to be running.
"""

from __future__ import annotations

import functools
import math
import os
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from ray.tune.search import Searcher

from istanas.data import ImageDataset
from istanas.distributed import Ranks
from istanas.errors import CheckpointError, IstanasError
from istanas.search.measured import MeasuredSearch, Planned
from istanas.space import Genotype
from istanas.training import Compute
from pipeline.base.home_folder import ensure_usable_home
from pipeline.base.text import count, one_line
from pipeline.cluster.allotment import cluster_nodes
from pipeline.cluster.launch import with_absolute_paths
from pipeline.cluster.places import Plan, trials_that_fit, wait_for_places
from pipeline.cluster.ray_runtime import Runtime
from pipeline.cluster.tune import (
    ENVIRONMENT,
    FAILED,
    FINISHED,
    NODE,
    LossReasons,
    TaskSearcher,
    TuneJob,
    node_of_trial,
    run_tune,
)
from pipeline.config.plugins import Shipped, ship
from pipeline.config.schema import Config, DataSettings
from pipeline.config.threads import threads_per_worker
from pipeline.config.workers import Node
from pipeline.jobs.closing import deliver_below, tracker_of, without_models
from pipeline.jobs.observer import RunObserver
from pipeline.jobs.opening import now_ms
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import measurement_folder
from pipeline.runs.record import MetricsLine, RunRecord, new_key
from pipeline.runs.tags import Tag, common_tags
from pipeline.training.epoch_record import FolderStore, Progress
from pipeline.training.loop import record_epoch, start_or_resume
from pipeline.training.measurements import Measured, MeasurementJob, measure
from pipeline.training.pictures import data_digest, load_pictures

MEASURED = "measured"  # the key of a trial's result, as text: Tune flattens dictionaries
RESUMES = "run the same command again to resume"


# ---------- in the process of the search
def prepare_trials(config: Config, run_dir: Path, runtime: Runtime, say: Callable[[str], None]) -> None:
    """Start or join Ray, and check that there is room for a trial.

    Raises:
        IstanasError: If Ray does not answer, a check of the cluster fails, or no trial fits.
    """
    os.environ.update({**ENVIRONMENT, **os.environ})
    runtime.start(run_dir, say=say)
    if runtime.joined:
        wait_for_places(config, lambda nodes: divide(config, nodes), runtime, say, trials_write=False)
    nodes = cluster_nodes()
    divide(config, nodes).check_fit(nodes, "lower runtime.threads, or name a cluster with --address")


def divide(config: Config, nodes: Sequence[Node]) -> Plan:
    """Divide the machines among the measurements; `Plan.fit` is 0 if none fits.

    A trial has `runtime.threads` cores; by default, the cores are divided among the trials. It has a GPU, or if there
    are fewer GPUs than trials, an equal share of one.

    Args:
        config: The configuration.
        nodes: The machines.
    """
    wanted, gpus_there = config.search.trials_at_once, sum(node.gpus for node in nodes)
    gpu = config.runtime.device == "cuda" or (config.runtime.device == "auto" and gpus_there > 0)
    per_gpu = -(-wanted // max(gpus_there, 1))  # rounded up
    gpus = (1.0 / per_gpu if gpus_there else 1.0) if gpu else 0.0
    threads = config.runtime.threads
    cpus = threads if threads is not None else threads_per_worker(nodes, wanted, gpu=False)
    fit = trials_that_fit(nodes, cpus, gpus)
    return Plan(cpus, gpus, 0, fit, min(fit, wanted))


def run_measurements(
    config: Config, dataset: ImageDataset, run: RunDir, store: FolderStore, observer: RunObserver
) -> Progress:
    """Make or resume all measurements of a search, after `prepare_trials`.

    Args:
        config: The whole configuration.
        dataset: The data set.
        run: The run directory.
        store: Where the checkpoints are written.
        observer: Receives the finished measurements as epochs.

    Returns:
        The record of the last epoch, and sums over all epochs.

    Raises:
        IstanasError: If a measurement fails, or its process is lost too often. The same command resumes the search.
    """
    cpu = Compute(torch.device("cpu"))
    job, progress = start_or_resume(
        lambda compute, ranks: MeasurementJob(config, dataset, compute, ranks), dataset, store, cpu, Ranks()
    )
    observer.resumed(progress, workers=1)
    runs = MeasurementRuns(config, run)
    if job.is_done(progress):
        runs.deliver_rest()  # The process may have been killed after the last checkpoint.
        return progress
    plan = divide(config, cluster_nodes())
    observer.note(str(plan))
    losses = LossReasons(observer.note, "the process of a trial was lost, and its measurement is repeated")
    ledger = _Ledger(config, dataset, job, progress, runs, store, observer)
    searcher = MeasurementSearcher(
        job.search,
        _task_of(config, dataset, plan),
        ledger.add,
        losses.reason,
        restarts=config.runtime.max_failures,
        note=observer.note,
    )
    run_tune(TuneJob("search", run_measurement, plan, restarts=0, folder=run.path), searcher, losses)
    ledger.runs.deliver_rest()
    return ledger.progress


def _task_of(config: Config, dataset: ImageDataset, plan: Plan) -> Callable[[Planned], dict[str, Any]]:
    """Return a function that returns the task of a measurement for its process."""
    update = {
        "runtime": plan.runtime_of_trial(config.runtime),
        # The address of the store may contain a password, and a trial does not use it.
        "tracking": config.tracking.model_copy(update={"enabled": False, "uri": None}),
    }
    own, digest = with_absolute_paths(config.model_copy(update=update)), dataset.train_digest
    return lambda planned: {"task": ship((own, digest, planned))}


class MeasurementSearcher(TaskSearcher[Planned]):
    """A Ray Tune searcher whose trials are the measurements of a search.

    Args:
        search: The search, which draws the measurements. Those that are pending already are repeated first.
        task_of: Returns the task of a measurement for its process.
        add: Receives a finished measurement, and returns whether the search is over.
        loss_reason: See `TaskSearcher`.
        restarts: Number of times that a lost measurement is repeated. Tune's own restarts do not cover a process that
            is lost while it starts.
        note: Receives a line about each loss.
    """

    def __init__(
        self,
        search: MeasuredSearch,
        task_of: Callable[[Planned], dict[str, Any]],
        add: Callable[[Planned, dict[str, Any]], bool],
        loss_reason: Callable[[str], str],
        restarts: int,
        note: Callable[[str], None],
    ) -> None:
        super().__init__(loss_reason)
        self._note, self._losses = note, Counter[int]()
        self._search, self._task_of, self._add, self._restarts = search, task_of, add, restarts
        self._repeated = list(search.pending)
        self._is_over = False

    @property
    def ends_trials(self) -> bool:
        """Whether Tune ends all running trials now: after an error, or when the search has converged."""
        return super().ends_trials or self._is_over

    def _suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.ends_trials:
            return Searcher.FINISHED
        planned = self._repeated.pop(0) if self._repeated else self._search.draw()
        if planned is None:
            # One of the running trials may be lost, and then its measurement is repeated.
            return None if self._trials else Searcher.FINISHED
        self._trials[trial_id] = planned
        return self._task_of(planned)

    def _end(self, trial: Planned, result: dict[str, Any], lost: str | None) -> None:
        if self._is_over:  # Tune has ended a trial that the search does not need any more.
            return
        if lost is not None:
            self._losses[trial.number] += 1
            if self._losses[trial.number] <= self._restarts:
                self._repeated.append(trial)
                self._note(f"the process of a trial was lost, and its measurement is repeated: {lost}")
                return
            times = count(self._restarts, "time")
            raise IstanasError(
                f"the process of measurement {trial.number} was lost more than {times} (runtime.max_failures): {lost}",
                field="search",
                remedy=RESUMES,
            )
        if FINISHED not in result:
            raise IstanasError(
                f"measurement {trial.number} failed: {result.get(FAILED, 'it ended without a result')}",
                field="search",
                remedy=f"correct the cause, then {RESUMES}",
            )
        self._is_over = self._add(trial, result)


class _Ledger:
    """The finished measurements: each becomes a run of its own and an epoch of the search.

    Attributes:
        progress: The progress of the search.
        runs: The runs of the measurements.
    """

    def __init__(
        self,
        config: Config,
        dataset: ImageDataset,
        job: MeasurementJob,
        progress: Progress,
        runs: MeasurementRuns,
        store: FolderStore,
        observer: RunObserver,
    ) -> None:
        self._job, self.progress, self.runs = job, progress, runs
        self._store, self._observer = store, observer
        self._digest = data_digest(config, dataset, "search")

    def add(self, planned: Planned, result: dict[str, Any]) -> bool:
        """Record a measurement, and return whether the search is over."""
        measured = Measured.from_json(result[MEASURED])
        outcome = self._job.receive(self.progress.epochs, planned, measured.metrics)
        genotype = self._job.search.genotype_of(planned)
        run = self.runs.write(planned, genotype, measured, str(result[NODE]))
        self.progress = record_epoch(
            self._job, self.progress, outcome, measured.seconds, self._digest, self._store, ranks=Ranks()
        )
        self._observer.step(self.progress.epochs - 1, 1, 1, lambda: None)
        self._observer.epoch_done(self.progress)
        self.runs.deliver(run)
        return self._job.is_done(self.progress)


class MeasurementRuns:
    """The runs of the measurements, in the run directory of their search and as its children in MLflow.

    Args:
        config: The configuration of the search.
        run: Its run directory.
    """

    def __init__(self, config: Config, run: RunDir) -> None:
        self._config, self._run = without_models(config), run
        self._space = config.space.build()
        # MLflow may lack runs of an earlier process.
        self._delivered = not any(run.path.glob(measurement_folder("*")))

    def write(self, planned: Planned, genotype: Genotype, measured: Measured, node: str) -> RunDir:
        """Write the run of a finished measurement; one that a killed process has written is replaced."""
        run = RunDir(self._run.path / measurement_folder(f"{planned.number:04d}"))
        run.path.mkdir(exist_ok=True)
        ended, metrics = now_ms(), measured.metrics
        has_loss = math.isfinite(metrics.get("valid/loss", math.inf))
        kept = {name: value for name, value in metrics.items() if name.startswith(("train/", "valid/"))}
        run.replace_metrics([MetricsLine(planned.fidelity.epochs, ended, kept)] if kept else [])
        run.write(
            RunRecord(
                name=f"measurement-{planned.number:04d}",
                kind="measurement",
                method=self._config.method,
                dataset=self._config.data.name,
                key=_key_of(run),
                params={
                    "number": planned.number,
                    "architecture": self._space.text(genotype) or genotype.to_json(),
                    "epochs": planned.fidelity.epochs,
                    "layers": planned.fidelity.layers,
                },
                tags={
                    **common_tags(self._config),
                    Tag.GENOTYPE: genotype.digest(),
                    Tag.NODE: node,
                    **({} if has_loss else {Tag.REASON: "the training has diverged"}),
                },
                description="",
                parent=bucket.named(self._run.path),
                status="FINISHED",
                started_ms=ended - int(1000 * measured.seconds),
                ended_ms=ended,
                artifacts=(),
                result={"digest": genotype.digest(), "seconds": measured.seconds},
            )
        )
        return run

    def deliver(self, run: RunDir) -> None:
        """Send a measurement to MLflow."""
        self._delivered &= tracker_of(run, self._config).deliver()

    def deliver_rest(self) -> None:
        """Send what MLflow may lack of all measurements."""
        if not self._delivered:
            self._run.push()
            deliver_below(self._run.path, self._config)


def _key_of(run: RunDir) -> str:
    """Return the key of an existing run, by which MLflow finds it, or a new one."""
    try:
        return run.read().key
    except (
        CheckpointError
    ):  # There is none yet, or its file is damaged; the measurement is at hand to replace it.
        return new_key()


# ---------- in the process of a trial
def run_measurement(sent: dict[str, Shipped]) -> None:
    """Make a measurement; this is Ray Tune's trainable.

    Args:
        sent: "task", with the configuration, the digest of the training pictures, and the `Planned` measurement.
    """
    from ray import tune

    ensure_usable_home()
    try:
        config, digest, planned = sent["task"].open()
        measured = measure(config, _pictures(config.data.model_dump_json()), digest, planned)
    except Exception as error:  # Tune would start the trial again, with the same error.
        traceback.print_exc()  # into Ray's logs
        tune.report({FAILED: one_line(error)})
        return
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # Other trials may share the GPU.
    tune.report({FINISHED: True, NODE: node_of_trial(), MEASURED: measured.to_json()})


@functools.lru_cache(maxsize=1)
def _pictures(settings: str) -> ImageDataset:
    """Load the pictures once for all trials of this process.

    Args:
        settings: JSON of the settings.
    """
    return load_pictures(DataSettings.model_validate_json(settings))
