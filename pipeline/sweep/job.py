"""The sweep job: many searches with other settings, asked of Optuna, placed and stopped by Ray Tune, kept in MLflow."""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from optuna.exceptions import OptunaError
from optuna.study import Study
from optuna.trial import TrialState
from rich.console import Console

from istanas.data import ImageDataset
from istanas.errors import IstanasError
from istanas.space import Genotype
from istanas.training import Compute
from pipeline.base.files import atomic_write
from pipeline.base.text import count, one_line
from pipeline.cluster.allotment import Allotment, cluster_nodes
from pipeline.cluster.preflight import check_gpus, check_nodes
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.load import run_hash, to_yaml, with_settings
from pipeline.config.schema import Config
from pipeline.config.workers import WorkerRange
from pipeline.jobs.lifecycle import Outcome, console_line, execute, settled_spec
from pipeline.jobs.observer import RunObserver
from pipeline.jobs.opening import JobSpec, as_written
from pipeline.jobs.results import SweepResult
from pipeline.report import mlflow_note
from pipeline.report.trials import TABLE_FILE, kendall_tau, write_table
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.genotype_file import write_genotype
from pipeline.runs.layout import CELL_FIGURES, CONFIG_FILE, GENOTYPE_FILE
from pipeline.runs.record import DatasetUse, MetricsLine
from pipeline.sweep.bookkeeping import Trials, metrics_of_trials
from pipeline.sweep.check import check_sweep, warnings_of_space
from pipeline.sweep.plan import Plan, divide, plan_trials
from pipeline.sweep.report import PAGE_FILE, sweep_frame, write_figures
from pipeline.sweep.searcher import first_settings
from pipeline.sweep.space import Settings, check_space, readable, sweep_of
from pipeline.sweep.study import (
    FAILED,
    best_trial,
    ended_study,
    n_failed,
    open_study,
    own_study,
    own_trials,
    storage_uri,
)
from pipeline.sweep.tune import run_tune
from pipeline.tracking.references import BEST
from pipeline.tracking.store import public_uri
from pipeline.training.pictures import datasets_used, settle_stems

SECTIONS = ("data", "space", "search", "retrain", "sweep")
# Tune's own: no files that nobody reads, no words on the terminal, no handler that turns Ctrl-C into an end, and
# no complaint about a trial's last report, which has no epoch.
ENVIRONMENT = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


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
        trials = Trials(config, plan, run, study, observer)
        try:
            trials.go_on()
            with runtime.noticing_a_clients_loss("sweep", run.path):
                run_tune(config, plan, run.path, study, trials, observer)
            outcome = _finish(config, run, study, observer)
        except OptunaError as error:
            database = public_uri(storage_uri(config, spec.path.name))
            raise IstanasError(
                f"the database {database} failed ({one_line(error.__cause__ or error)})",
                field="sweep.storage",
                remedy="restore the database, then run the same command again to resume",
            ) from error
        finally:
            trials.leave()
        return outcome

    def metrics_anew() -> list[MetricsLine]:
        done = [t for t in own_trials(ended_study(config, spec.path.name)) if t.state.is_finished()]
        if len(done) < sweep_of(config).trials:
            raise IstanasError(
                f"the study {spec.path.name} has {count(len(done), 'finished trial')} of {sweep_of(config).trials}"
            )
        return metrics_of_trials(config, done)

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


def _finish(config: Config, run: RunDir, study: Study, observer: RunObserver) -> Outcome:
    sweep, trials = sweep_of(config), own_trials(study)
    states = Counter(t.state for t in trials)
    if n_failed(study) > sweep.max_failures:
        first = next(t for t in trials if t.state == TrialState.FAIL)
        raise IstanasError(
            f"{count(n_failed(study), 'trial')} failed, more than {sweep.max_failures} (the first: "
            f"{first.user_attrs.get(FAILED)})",
            field="sweep.max_failures",
            remedy="run the same command with a higher value to resume",
        )
    own = own_study(study)
    best = best_trial(own)
    if best is None:
        raise IstanasError(
            "no trial has finished: all failed or were stopped early",
            field="sweep",
            remedy=f"see {run.path / TABLE_FILE}, change the space, or set sweep.scheduler=none",
        )
    frame = sweep_frame(config, study)
    write_table(run.path, frame)
    figures = write_figures(run.path, config, own, frame, observer.note)
    attributes = best.user_attrs
    found = bucket.local(attributes["run_dir"])
    bucket.fetch_parts(found, lambda name: name == GENOTYPE_FILE)
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
        description=mlflow_note.of_sweep(
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
