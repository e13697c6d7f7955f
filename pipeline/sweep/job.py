"""The sweep job: many searches with other settings, asked of Optuna, placed and stopped by Ray Tune, kept in MLflow."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from optuna.exceptions import OptunaError
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from istanas.data import ImageDataset
from istanas.errors import ConfigError, IstanasError
from istanas.space import Genotype
from istanas.training import Compute, derive_seed
from pipeline import storage, summary
from pipeline.cluster import LOG_FOLDER, Allotment, Runtime, cluster_nodes, last_line, noticing_its_loss
from pipeline.config import known_methods, run_hash, to_yaml, with_settings
from pipeline.fit import warnings_of_trials
from pipeline.jobs.job import (
    CELL_FIGURES,
    CONFIG_FILE,
    GENOTYPE_FILE,
    JobSpec,
    Outcome,
    RunObserver,
    announce,
    as_written,
    check_data,
    close,
    close_below,
    console_line,
    deliver_below,
    execute,
    settled_spec,
)
from pipeline.jobs.results import SweepResult
from pipeline.jobs.search import check_solver, search_spec, write_genotype
from pipeline.launch import with_absolute_paths
from pipeline.outcome import INTERRUPTED, OUTCOME_TAG, PRUNED, TRIAL_TAG
from pipeline.pictures import check_fit, datasets_used, settle_stems
from pipeline.preflight import check_gpus, check_nodes
from pipeline.references import BEST
from pipeline.resources import Node, WorkerRange, count, workers_that_fit
from pipeline.rundir import DatasetUse, MetricsLine, RunDir, atomic_write
from pipeline.schema import Config, OneStageSearchSettings, SearchSettings, TwoStageSearchSettings
from pipeline.searcher import Losses, StudySearcher, first_settings, make_scheduler
from pipeline.study import (
    FAILED,
    NODE,
    WARNED,
    best_trial,
    ended_study,
    first_number,
    keep_study,
    n_failed,
    open_study,
    own_study,
    own_trials,
    storage_uri,
)
from pipeline.sweep_report import PAGE_FILE, TABLE_FILE, kendall_tau, sweep_frame, write_figures, write_table
from pipeline.sweep_space import (
    N_CHECKED,
    Settings,
    check_space,
    extreme_settings,
    methods_of,
    random_settings,
    readable,
    sweep_of,
    trial_config,
    values_of,
)
from pipeline.tracking import one_line, public_uri, store_uri
from pipeline.trial import run_trial

SECTIONS = ("data", "space", "search", "retrain", "sweep")
RAYS_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"
SECONDS_BEFORE_RAY = 15.0  # would end the process because the cluster's head is gone
EPOCH_KEYS = ("search.epochs", "search.max_search_epochs", "search.train_epochs")
FIT_THE_PICTURES = {"cutout", "batch_size", "max_pictures", "alpha_fraction", "image_size"}
# Tune's own: no files that nobody reads, no words on the terminal, no handler that turns Ctrl-C into an end, and
# no complaint about a trial's last report, which has no epoch.
ENVIRONMENT = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
STATUS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED", TrialState.FAIL: "FAILED"}
OUTCOMES = {**STATUS, TrialState.PRUNED: PRUNED}
WORDS = {TrialState.COMPLETE: "done", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}


@dataclass(frozen=True)
class Plan:
    """What each trial gets, and how many run at once.

    Args:
        cpus: of each trial, or of each of its workers.
        gpus: likewise; a fraction shares one.
        workers: Ray Train workers of a trial; 0: it runs in its own process.
        fit: how many trials the machines can hold.
        at_once: how many run, `sweep.max_concurrent` kept.
    """

    cpus: int
    gpus: float
    workers: int
    fit: int
    at_once: int

    def __str__(self) -> str:
        each = count(self.cpus, "core") + (f" and {self.gpus:g} GPU" if self.gpus else "")
        if self.workers:
            each = f"{count(self.workers, 'worker')} of {each}"
        return f"a trial has {each}; {self.fit} fit, {self.at_once} at once"


def plan_trials(config: Config, nodes: Sequence[Node]) -> Plan:
    """`divide`, and refuse what holds no trial.

    Raises:
        IstanasError: if not even one trial fits.
    """
    plan = divide(config, nodes)
    if plan.fit == 0:
        cpus, gpus = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
        raise IstanasError(
            f"no trial fits: {str(plan).partition(';')[0]}, there are {count(cpus, 'core')} and {count(gpus, 'GPU')}: "
            "lower --workers, sweep.cpus_per_trial or sweep.gpus_per_trial, or name a cluster with --address"
        )
    return plan


def divide(config: Config, nodes: Sequence[Node]) -> Plan:
    """Divide the machines among trials; of none, `fit` is 0.

    Args:
        config: of the sweep.
        nodes: what there is.
    """
    sweep, workers = sweep_of(config), config.runtime.worker_range.maximum
    gpus_there = sum(node.gpus for node in nodes)
    gpu = config.runtime.device == "cuda" or (config.runtime.device == "auto" and gpus_there > 0)
    if workers > 1:
        cpus = config.runtime.threads if config.runtime.threads is not None else 1
        gpus, fit = float(gpu), workers_that_fit(nodes, cpus, gpu) // workers
    else:
        workers, cpus = 0, sweep.cpus_per_trial
        gpus = sweep.gpus_per_trial if sweep.gpus_per_trial is not None else float(gpu)
        fit = sum(min(node.cpus // cpus, _shares(node.gpus, gpus)) for node in nodes)
    most = fit if sweep.max_concurrent is None else sweep.max_concurrent
    return Plan(cpus, gpus, workers, fit, min(fit, most, sweep.trials))


def _shares(gpus: int, each: float) -> int:
    """How many trials the GPUs of a node can hold; as many as you like that need none."""
    if each == 0:
        return 10**9
    return gpus * int(1 / each + 1e-9) if each < 1 else int(gpus // each)


def sweep_spec(config: Config, name: str) -> JobSpec:
    """The sweep that a configuration describes.

    Raises:
        ConfigError: if it has none.
    """
    sweep = sweep_of(config)
    return JobSpec(
        kind="sweep",
        name=f"{name}-sweep",
        digits=run_hash(config, "sweep"),
        config=config,
        sections=SECTIONS,
        epochs=sweep.trials,
        unit="trial",
    )


def run_sweep(config: Config, *, name: str, fresh: bool, console: Console, runtime: Runtime) -> SweepResult:
    """Try many settings and keep the best.

    Args:
        config: with a `sweep` section.
        name: of the run.
        fresh: start over, study included.
        console: for people.
        runtime: Ray.

    Returns:
        See `SweepResult`.

    Raises:
        ConfigError: if the space does not fit the schema.
        IstanasError: if too many trials failed, or no trial fits; the same command goes on.
    """
    check_space(config)  # before the pictures are looked at, which may take a while
    spec = settled_spec(config, console, lambda each: sweep_spec(each, name))

    def prepare(dataset: ImageDataset) -> tuple[Plan, Study]:
        check_sweep(config, dataset)
        os.environ.update({**ENVIRONMENT, **os.environ})
        dashboard, say = config.runtime.worker_range.maximum > 1, console_line(console)
        runtime.start(spec.path, dashboard=dashboard, say=say)
        with runtime.noticing_a_clients_loss("pre-flight", spec.path):
            if runtime.joined:
                _prepare_cluster(config, runtime, say)
            plan = plan_trials(config, cluster_nodes())
        return plan, open_study(config, spec.path.name, fresh=fresh, run_dir=spec.path)

    def body(run: RunDir, observer: RunObserver, prepared: tuple[Plan, Study]) -> Outcome:
        plan, study = prepared
        observer.note(str(plan))
        trials = _Trials(config, plan, run, study, observer)
        try:
            trials.go_on()
            with runtime.noticing_a_clients_loss("sweep", run.path):
                _run_tune(config, plan, run.path, study, trials, observer)
            outcome = _finish(config, run, study, observer)
        except OptunaError as error:
            database = public_uri(storage_uri(config, spec.path.name))
            raise IstanasError(
                f"sweep.storage is {database}: failed ({one_line(error.__cause__ or error)}); "
                "when it is well again, the same command goes on"
            ) from error
        finally:
            trials.leave()
        return outcome

    def metrics_anew() -> list[MetricsLine]:
        done = [t for t in own_trials(ended_study(config, spec.path.name)) if t.state.is_finished()]
        if len(done) < sweep_of(config).trials:
            raise IstanasError("the study lacks trials")
        return _metrics_lines(config, done)

    result = execute(
        spec,
        prepare,
        body,
        warn=lambda dataset: warnings_of_space(config, dataset),
        metrics_anew=metrics_anew,
        describe=lambda _: "",
        fresh=fresh,
        console=console,
        datasets=lambda dataset: _datasets(config, dataset),
    )
    return cast(SweepResult, result)


def _prepare_cluster(config: Config, runtime: Runtime, say: Callable[[str], None]) -> None:
    """The pre-flight, and, on a cluster that may yet grow, the wait for room for one trial.

    Raises:
        IstanasError: if a check fails, or there is no room in time.
    """
    check_nodes(config, say, trials=True, known=runtime.examined)
    nodes = cluster_nodes()
    plan = divide(config, nodes)
    asked, there = math.ceil(plan.gpus * max(plan.workers, 1)), sum(node.gpus for node in nodes)
    check_gpus(asked, there, config.runtime.wait_minutes, say)
    if plan.fit == 0:
        workers, device = max(plan.workers, 1), torch.device("cuda" if plan.gpus else "cpu")
        runtime.wait(Allotment(WorkerRange(workers, workers), plan.cpus, Compute(device)), say)
        check_nodes(config, say, trials=True, known=runtime.examined)


def _datasets(config: Config, dataset: ImageDataset) -> tuple[DatasetUse, ...]:
    """The pictures that all trials may use; none are the same for all if the split itself is swept."""
    if any(key == "seed" or key.startswith("data.") for key in sweep_of(config).space):
        return ()
    return datasets_used(config, dataset, "sweep")


def check_sweep(config: Config, dataset: ImageDataset) -> None:
    """Refuse before anything starts what no trial, or not every trial, could be.

    Args:
        config: of the sweep.
        dataset: its pictures.

    Raises:
        ConfigError: one line per mistake.
        IstanasError: if a solver is missing.
    """
    check_space(config)
    solvers = sweep_of(config).space.get("space.solver")
    chosen = [config.space.solver] if solvers is None else solvers.value
    for solver in [chosen] if isinstance(chosen, str) else chosen:
        check_solver(solver)
    if config.tracking.uri is not None and public_uri(config.tracking.uri) != config.tracking.uri:
        raise ConfigError(
            "tracking.uri holds a password, which would go from process to process with every trial: set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and leave it out of the address"
        )
    in_process = config.runtime.model_copy(update={"workers": 0, "address": None})
    # Of the sweep's own settings only what no key of the space replaces is a trial's.
    check_data(config.model_copy(update={"runtime": in_process}), dataset, ())
    check_space_fits(config, dataset, _jobs_of_trials(config))


def _jobs_of_trials(config: Config) -> tuple[str, ...]:
    return ("search", "retrain") if sweep_of(config).objective == "retrained" else ("search",)


def warnings_of_space(config: Config, dataset: ImageDataset) -> list[str]:
    """Return a line for people about each setting of the sweep, or value of its space, that makes no sense.

    Args:
        config: of the sweep, which `check_sweep` accepts.
        dataset: its pictures.
    """
    return warnings_of_trials(_named_trials(config), dataset, _jobs_of_trials(config), sweep_of(config).space)


def _named_trials(config: Config) -> Iterator[Config]:
    """Yield trials that together have every value that the space names, as far as the values fit together.

    Pictures of another size are another data set, which its trial opens.
    """
    for settings in extreme_settings(config):
        try:
            trial = trial_config(config, settings)
        except ConfigError:  # two bounds that do not fit together: such a trial fails, the others do not
            continue
        if trial.data.image_size == config.data.image_size:
            yield trial


def check_space_fits(config: Config, dataset: ImageDataset, jobs: Sequence[str]) -> None:
    """Check against the pictures what the space allows: its bounds, and some settings drawn at random.

    Raises:
        ConfigError: for settings that do not fit.
    """
    drawn = (random_settings(config, derive_seed(config.seed, "check", n)) for n in range(N_CHECKED))
    checked: set[str] = set()
    for settings in (*extreme_settings(config), *drawn):
        try:
            trial = trial_config(config, settings)
        except ConfigError:  # two bounds that do not fit together: such a trial fails, the others do not
            continue
        sizes = {"data": trial.data, **{job: getattr(trial, job) for job in jobs}}
        decisive = str({name: part.model_dump(include=FIT_THE_PICTURES) for name, part in sizes.items()})
        # Pictures of another size are another data set, which its trial opens.
        if decisive in checked or trial.data.image_size != config.data.image_size:
            continue
        checked.add(decisive)
        in_process = trial.runtime.model_copy(update={"workers": 0})
        try:
            check_fit(trial.model_copy(update={"runtime": in_process}), dataset, jobs)
        except ConfigError as error:
            raise ConfigError(f"sweep.space allows {readable(settings)}: {error}") from None


def print_dry_run(config: Config, console: Console, runtime: Runtime, samples: int = 5) -> Plan:
    """The resolved space, some settings, resources, and how many trials fit at once; no trial is started.

    Args:
        config: with a `sweep` section.
        console: for people.
        runtime: a cluster that is named is asked what it has; else this machine is.
        samples: how many settings to show.
    """
    from rich.table import Table

    check_space(config)
    sweep = sweep_of(config)
    table = Table("key", "values")
    for key, parameter in sweep.space.items():
        table.add_row(key, str(parameter))
    console.print(table)
    say = console_line(console)
    stopping = f"asha (grace {sweep.grace_epochs}, factor {sweep.reduction_factor})"
    say(
        f"{count(sweep.trials, 'trial')}, objective {sweep.objective} ({', '.join(sweep.objectives)}), searcher "
        f"{sweep.searcher}, scheduler {stopping if sweep.scheduler == 'asha' else 'none'}"
    )
    for settings in first_settings(config, samples):
        say(f"to begin with: {readable(settings)}")
    with tempfile.TemporaryDirectory() as logs:
        plan = plan_trials(config, runtime.nodes(Path(logs), say))
    say(str(plan))
    return plan


class _Trials:
    """What this process does around its trials: their runs opened and closed, the table and the bar kept."""

    def __init__(self, config: Config, plan: Plan, run: RunDir, study: Study, observer: RunObserver) -> None:
        self._config, self._plan, self._run, self._study = config, plan, run, study
        self._observer = observer
        self._open: dict[int, tuple[Path, Config]] = {}  # begun, and not ended
        self._began: dict[int, float] = {}  # in this sitting, when
        self._took: list[float] = []  # seconds of the trials of this sitting that have ended
        self._delivered = not own_trials(study)  # an earlier sitting may have found no store

    def go_on(self) -> None:
        """Say what is there from an earlier sitting, and make the figures anew from the study."""
        storage.fetch_records(self._run.path)
        done = [t for t in own_trials(self._study) if t.state.is_finished()]
        self._run.replace_metrics(_metrics_lines(self._config, done))
        begun, learnt = len(own_trials(self._study)) - len(done), first_number(self._study)
        if learnt or sweep_of(self._config).start_from:
            self._observer.note(
                f"learnt from {count(learnt, 'trial')} of {sweep_of(self._config).start_from} that lie in this space"
            )
        if done or begun:
            self._observer.note(
                f"resumed: {count(len(done), 'trial')} done, {begun} to go on with, "
                f"{sweep_of(self._config).trials - len(done) - begun} to come"
            )
        self._show()

    def begins(self, index: int, settings: Settings) -> dict[str, Any]:
        config = self._of_trial(settings)
        name, parent = f"trial-{index:04d}", storage.named(self._run.path)
        tags = {"istanas.sweep": self._run.path.name, "istanas.trial": str(index)}
        spec = search_spec(config, name, parent=parent, tags=tags)
        self._keep()  # else another sitting might draw other settings for a trial that was announced
        announce(spec)
        self._open[index] = spec.path, config
        self._began[index] = time.monotonic()
        return {
            "config": config,
            "name": name,
            "parent": parent,
            "tags": tags,
            "run_dir": storage.shown(spec.path),
            "objective": sweep_of(self._config).objective,
            "objectives": sweep_of(self._config).objectives,
        }

    def warm_ups(self) -> list[dict[str, Any]]:
        """A task for each process that will have trials, one after the other."""
        left = sweep_of(self._config).trials - sum(t.state.is_finished() for t in own_trials(self._study))
        # Workers of a trial are processes of its own.
        number = 0 if self._plan.workers else min(self._plan.at_once, left)
        return [{"warm_up": self._of_trial({})}] * number

    def ended(self, index: int, state: TrialState, result: dict[str, Any]) -> None:
        path, config = self._open.pop(index)
        self._took.append(time.monotonic() - self._began.pop(index))
        tags = {TRIAL_TAG: state.name, OUTCOME_TAG: OUTCOMES[state]}
        if "digest" in result:
            tags["istanas.genotype"] = result["digest"]
        if NODE in result:
            tags["istanas.node"] = result[NODE]
        if FAILED in result:
            tags["istanas.reason"] = result[FAILED]
        kept = ("valid_top1", "retrained_top1", "digest", "params", "macs", "seconds")
        figures = {name: result[name] for name in kept if name in result}
        self._delivered &= close(path, config, STATUS[state], tags, figures)

    def leave(self) -> None:
        """Close the runs that this sitting leaves unfinished, and deliver what the store has not got.

        Those of trials, of their retrainings, and of an earlier sitting that this one did not come to.
        """
        self._open.clear()
        try:
            frame = sweep_frame(self._config, self._study)
            running = frame["state"] == TrialState.RUNNING.name
            if running.any():  # the study knows no other word for a trial that the same command resumes
                frame.loc[running, "state"] = INTERRUPTED
                write_table(self._run.path, frame)
            self._delivered &= close_below(self._run.path, self._config)
            if not self._delivered:
                deliver_below(self._run.path, self._config)
        except (OSError, IstanasError, OptunaError) as error:
            # A full disk, a storage that is away: it must not hide what else has failed.
            self._observer.note(
                f"runs of trials are left RUNNING ({one_line(error)}), the same command mends that"
            )

    def told(self, index: int) -> None:
        done = [t for t in own_trials(self._study) if t.state.is_finished()]
        self._run.replace_metrics(_metrics_lines(self._config, done))
        self._show()
        self._keep()
        left = sweep_of(self._config).trials - len(done)
        self._observer.trial_done(
            describe_trial(index, self._trial(index)),
            len(done),
            seconds_left(self._took, left, self._plan.at_once),
        )
        self._observer.deliver()

    def _keep(self) -> None:
        """Have the study in the storage, if the run lies in one, before anybody is told what it holds."""
        keep_study(self._config, self._run.path)
        storage.push(self._run.path)

    def _show(self) -> None:
        write_table(self._run.path, sweep_frame(self._config, self._study))
        done = sum(t.state.is_finished() for t in own_trials(self._study))
        if done > 0:
            self._observer.step(done - 1, 1, 1, lambda: None)

    def _trial(self, index: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[first_number(self._study) + index]

    def _of_trial(self, settings: Settings) -> Config:
        """A trial's configuration, as it holds in its own process."""
        config, plan = settle_stems(trial_config(self._config, settings)), self._plan
        runtime: dict[str, Any] = {
            "workers": plan.workers,
            "threads": plan.cpus,
            "address": None,
            "device": "cuda" if plan.gpus else "cpu",
            "runs_dir": storage.named(self._run.path),
        }
        uri = store_uri(config.tracking.uri)
        # A password in the environment stays there.
        tracking = {"uri": uri if public_uri(uri) == uri else None, "name": None, "models": False}
        return config.model_copy(
            update={
                "runtime": config.runtime.model_copy(update=runtime),
                "tracking": config.tracking.model_copy(update=tracking),
                "data": with_absolute_paths(config.data),
            }
        )


def seconds_left(took: Sequence[float], left: int, at_once: int) -> float:
    """Estimate how long the rest of a sweep takes: trials run in rounds, each as long as a trial took on average.

    Args:
        took: seconds of the trials that have ended, at least one.
        left: how many have not ended.
        at_once: how many run at once.

    Example:
        >>> seconds_left([50.0, 70.0], left=9, at_once=2)
        300.0
    """
    return fmean(took) * math.ceil(left / at_once)


def describe_trial(index: int, trial: FrozenTrial) -> str:
    """One line for people about an ended trial."""
    figures = trial.user_attrs
    text = f"trial {index} {WORDS[trial.state]}"
    if FAILED in figures:
        text += f" ({figures[FAILED]})"
    if "valid_top1" in figures:
        text += f": top-1 {100 * figures['valid_top1']:.1f} %"
        if "retrained_top1" in figures:
            again = ", known from another trial" if figures.get("reused") else ""
            text += f", retrained {100 * figures['retrained_top1']:.1f} %{again}"
        text += f", {count(figures['epochs'], 'epoch')}, {figures['seconds']:.1f} s"
    if "rollbacks" in figures:
        text += f", rolled back {count(figures['rollbacks'], 'time')}"
    text = f"{text}; {readable(figures.get('settings', {}))}"
    return "\n".join([text, *(f"warning: trial {index}: {warned}" for warned in figures.get(WARNED, ()))])


def _metrics_lines(config: Config, done: Sequence[FrozenTrial]) -> list[MetricsLine]:
    """The sweep's own figures: after every ended trial, in the order of their ends."""
    lines: list[MetricsLine] = []
    best: float | None = None
    states: Counter[str] = Counter()
    place = sweep_of(config).objectives.index("top1")
    for step, trial in enumerate(sorted(done, key=lambda t: (t.datetime_complete, t.number)), start=1):
        states[trial.state.name.lower()] += 1
        metrics = {f"sweep/{s}": float(states[s]) for s in ("complete", "pruned", "fail")}
        if trial.state == TrialState.COMPLETE:
            best = trial.values[place] if best is None else max(best, trial.values[place])
        if best is not None:
            metrics["sweep/best_top1"] = best
        assert trial.datetime_complete is not None
        lines.append(MetricsLine(step, int(trial.datetime_complete.timestamp() * 1000), metrics))
    return lines


def _run_tune(
    config: Config, plan: Plan, folder: Path, study: Study, trials: _Trials, observer: RunObserver
) -> None:
    """One sitting of Ray Tune. What it keeps on the disk is not needed again: the study and the trials' runs are."""
    import ray
    from ray import tune

    losses = Losses(observer.note)
    searcher = StudySearcher(config, study, trials, losses.why, trials.warm_ups())

    class Over(tune.Stopper):
        """Ends the sitting when our own part has failed."""

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return searcher.error is not None

    if plan.workers:
        # The trial itself only waits for its workers. A bundle of nothing is refused, so it has a byte.
        resources = tune.PlacementGroupFactory([{"CPU": 0, "memory": 1}])
    else:
        resources = tune.PlacementGroupFactory(
            [{"CPU": plan.cpus, **({"GPU": plan.gpus} if plan.gpus else {})}]
        )
    files = (folder / LOG_FOLDER / "tune").resolve()
    shutil.rmtree(files, ignore_errors=True)  # of sittings that were interrupted
    sitting = f"sitting-{uuid.uuid4().hex[:8]}"
    tuner = _tuner(
        files,
        trainable=tune.with_resources(run_trial, resources),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=make_scheduler(config, study, max_epochs(config)),
            num_samples=-1,
            max_concurrent_trials=plan.at_once,
            reuse_actors=plan.workers == 0,  # workers of a stopped trial end with its process
        ),
        run_config=tune.RunConfig(
            name=sitting,
            storage_path=str(files),
            stop=Over(),
            callbacks=[losses],
            failure_config=tune.FailureConfig(max_failures=sweep_of(config).max_restarts),
            verbose=0,
        ),
    )
    try:
        with _noticing_the_loss_of_ray(folder / LOG_FOLDER):
            tuner.fit()
    except (tune.TuneError, ray.exceptions.RayError) as error:
        raise IstanasError(
            f"sweep: Ray Tune could not go on ({last_line(error)}), see {folder / LOG_FOLDER}; the same command does"
        ) from error
    shutil.rmtree(files / sitting, ignore_errors=True)
    if searcher.error is not None:
        if isinstance(searcher.error, IstanasError | OptunaError | OSError):
            raise searcher.error
        raise IstanasError(
            f"sweep: could not go on ({last_line(searcher.error)}); the same command does"
        ) from searcher.error


def _noticing_the_loss_of_ray(logs: Path) -> AbstractContextManager[None]:
    import ray

    if ray.util.client.ray.is_connected():  # which `Runtime` watches
        return contextlib.nullcontext()
    # By then Ray ends the process itself: a head that comes back in time is waited for as long as may be.
    patience = float(os.environ.get(RAYS_PATIENCE, "60"))
    seconds = max(5.0, patience - SECONDS_BEFORE_RAY)
    return noticing_its_loss("sweep", logs, ray.get_runtime_context().gcs_address, seconds)


def _tuner(files: Path, **options: Any) -> Any:
    """Ray Tune, controlled from this process, whether it is a node of the cluster or a mere client (ray://).

    Of a client, Ray would move searcher and all to the head node; but study, runs and terminal are worked on here.
    """
    import ray
    from ray import tune
    from ray.tune.execution import class_cache

    # Ray would write AWS's keys into its logs, by which it sends them to trials. These have those of their node: a
    # Ray that is started here hands on this process's, and on a cluster the pre-flight asks each node.
    class_cache.ENV_VARS_TO_PROPAGATE = {
        name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")
    }
    if not ray.util.client.ray.is_connected():
        return tune.Tuner(**options)
    from ray.train._internal import storage as of_ray
    from ray.tune.impl.tuner_internal import TunerInternal

    of_ray._get_ray_train_session_dir = lambda: str(
        files
    )  # Ray looks for its own on a node, which this is not
    return TunerInternal(**options, _tuner_kwargs={"_remote": False})


def max_epochs(config: Config) -> int:
    """The most epochs that a trial may report: a swept number of epochs counts with its highest value."""
    space = sweep_of(config).space
    defaults: dict[str, SearchSettings] = {
        "two_stage": TwoStageSearchSettings(),
        "one_stage": OneStageSearchSettings(),
    }

    def most(method: str) -> int:
        settings = config.search if method == config.method else defaults[method]
        swept = [key for key in EPOCH_KEYS if key in space and method in known_methods(key)]
        highest = {key.partition(".")[2]: max(map(int, values_of(space[key]))) for key in swept}
        return settings.model_copy(update=highest).max_epochs

    return max(map(most, methods_of(config)))


def _finish(config: Config, run: RunDir, study: Study, observer: RunObserver) -> Outcome:
    sweep, trials = sweep_of(config), own_trials(study)
    states = Counter(t.state for t in trials)
    if n_failed(study) > sweep.max_failures:
        first = next(t for t in trials if t.state == TrialState.FAIL)
        raise IstanasError(
            f"sweep: {count(n_failed(study), 'trial')} failed, above sweep.max_failures = {sweep.max_failures} "
            f"(the first: {first.user_attrs.get(FAILED)}); the same command goes on with a higher one"
        )
    own = own_study(study)
    best = best_trial(own)
    if best is None:
        raise IstanasError(
            f"sweep: no trial has finished, all failed or were stopped: see {run.path / TABLE_FILE}, change the space, "
            "or set sweep.scheduler=none"
        )
    frame = sweep_frame(config, study)
    write_table(run.path, frame)
    figures = write_figures(run.path, config, own, frame, observer.note)
    attributes = best.user_attrs
    found = storage.local(attributes["run_dir"])
    storage.fetch_parts(found, lambda name: name == GENOTYPE_FILE)
    genotype = Genotype.from_json((found / GENOTYPE_FILE).read_text())
    _write_best(config, run.path / BEST, attributes["settings"], genotype)
    write_genotype(run.path, genotype)  # so that the sweep itself can be named as a genotype
    result: dict[str, Any] = {
        "best_trial": best.number,
        "best_run_dir": attributes["run_dir"],
        "settings": attributes["settings"],
        "digest": genotype.digest(),
        "genotype": genotype.to_dict(),
        "objective_top1": best.values[sweep.objectives.index("top1")],
        "valid_top1": attributes["valid_top1"],
        "params": attributes["params"],
        "macs": attributes["macs"],
        "trials": len(trials),
        "complete": states[TrialState.COMPLETE],
        "pruned": states[TrialState.PRUNED],
        "failed": states[TrialState.FAIL],
        "epochs": int(frame["epochs"].fillna(0).sum()),
        "seconds": float(frame["seconds"].fillna(0).sum()),
    }
    if sweep.objective == "retrained":
        result |= {
            "retrained_top1": attributes["retrained_top1"],
            "kendall_tau": kendall_tau(frame),
            "retrain_seconds": float(frame["retrain_seconds"].fillna(0).sum()),
        }
    return Outcome(
        result=result,
        artifacts=(
            CONFIG_FILE,
            GENOTYPE_FILE,
            *CELL_FIGURES,
            TABLE_FILE,
            *figures,
            f"{BEST}/{CONFIG_FILE}",
            f"{BEST}/{GENOTYPE_FILE}",
        ),
        tags={"istanas.genotype": genotype.digest()},
        description=summary.of_sweep(
            run.read().data_label,
            {key: str(parameter) for key, parameter in sweep.space.items()},
            result,
            genotype,
            files=(TABLE_FILE, *(file for file in figures if file == PAGE_FILE)),
        ),
    )


def _write_best(config: Config, folder: Path, settings: Settings, genotype: Genotype) -> None:
    """Configuration and genotype of the best trial, ready to be retrained on all training pictures."""
    best = settle_stems(with_settings(config, settings, "best"))
    best = best.model_copy(update={"data": best.data.model_copy(update={"holdout": 0.0})})
    atomic_write(folder / CONFIG_FILE, to_yaml(as_written(best)))
    atomic_write(folder / GENOTYPE_FILE, genotype.to_json() + "\n")
