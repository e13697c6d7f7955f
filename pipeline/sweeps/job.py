"""The sweep job: searches with settings from Optuna, placed and stopped by Ray Tune, tracked in MLflow."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import cast

from optuna.exceptions import OptunaError
from optuna.study import Study
from rich.console import Console

from istanas.data import ImageDataset
from istanas.errors import IstanasError
from pipeline.base.text import count, one_line
from pipeline.cluster.allotment import cluster_nodes
from pipeline.cluster.places import Plan, wait_for_places
from pipeline.cluster.ray_runtime import Runtime
from pipeline.cluster.tune import ENVIRONMENT
from pipeline.config.load import run_hash
from pipeline.config.schema import Config
from pipeline.jobs.context import JobContext, say_to
from pipeline.jobs.lifecycle import JobSteps, Outcome, execute, settled_spec
from pipeline.jobs.observer import RunObserver
from pipeline.jobs.opening import JobSpec
from pipeline.jobs.results import SweepResult
from pipeline.runs.directory import RunDir
from pipeline.runs.record import DatasetUse, MetricsLine
from pipeline.sweeps.bookkeeping import TrialRuns
from pipeline.sweeps.check import check_sweep, warnings_of_space
from pipeline.sweeps.finish import finish_sweep
from pipeline.sweeps.plan import divide, plan_trials
from pipeline.sweeps.resume import finished, metrics_of_trials
from pipeline.sweeps.searcher import first_settings
from pipeline.sweeps.space import check_space, readable, sweep_of
from pipeline.sweeps.study import (
    ended_study,
    open_study,
    storage_uri,
)
from pipeline.sweeps.tune import run_trials_of_sweep
from pipeline.tracking.store import public_uri
from pipeline.training.pictures import datasets_used

SECTIONS = ("data", "space", "search", "retrain", "sweep")


def sweep_spec(config: Config, name: str) -> JobSpec:
    """Return the description of a sweep.

    Raises:
        ConfigError: If the configuration has no `sweep` section.
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


def run_sweep(context: JobContext) -> SweepResult:
    """Run searches with many settings, and keep the best.

    Args:
        context: The context of the job; its configuration has a `sweep` section. `fresh` also deletes the study.

    Raises:
        ConfigError: If the space is invalid.
        IstanasError: If too many trials failed, or no trial fits. The same command resumes the sweep.
    """
    config, runtime = context.config, context.runtime
    check_space(config)  # Checked first, because reading the pictures may take long.
    runtime.check_address()
    spec = settled_spec(config, context.console, lambda each: sweep_spec(each, context.name))

    def prepare(dataset: ImageDataset) -> tuple[Plan, Study]:
        check_sweep(config, dataset)
        os.environ.update({**ENVIRONMENT, **os.environ})
        runtime.start(spec.path, dashboard=config.runtime.worker_range.maximum > 1, say=context.say)
        if runtime.joined:
            wait_for_places(
                config, lambda nodes: divide(config, nodes), runtime, context.say, trials_write=True
            )
        plan = plan_trials(config, cluster_nodes())
        return plan, open_study(config, spec.path.name, fresh=context.fresh, run_dir=spec.path)

    def run_trials(run: RunDir, observer: RunObserver, prepared: tuple[Plan, Study]) -> Outcome:
        plan, study = prepared
        observer.note(str(plan))
        trials = TrialRuns(config, plan, run, study, observer)
        try:
            trials.resume()
            run_trials_of_sweep(config, plan, run.path, study, trials, observer)
            return finish_sweep(config, run, study, observer.note)
        except OptunaError as error:
            database = public_uri(storage_uri(config, spec.path.name))
            raise IstanasError(
                f"the database {database} failed ({one_line(error.__cause__ or error)})",
                field="sweep.storage",
                remedy="restore the database, then run the same command again to resume",
            ) from error
        finally:
            trials.close()

    def rebuild_metrics() -> list[MetricsLine]:
        done = finished(ended_study(config, spec.path.name))
        if len(done) < sweep_of(config).trials:
            raise IstanasError(
                f"the study {spec.path.name} has {count(len(done), 'finished trial')} of {sweep_of(config).trials}"
            )
        return metrics_of_trials(config, done)

    steps = JobSteps(
        datasets=lambda dataset: _datasets(config, dataset),
        prepare=prepare,
        warn=lambda dataset: warnings_of_space(config, dataset),
        run=run_trials,
        describe=lambda _: "",
        rebuild_metrics=rebuild_metrics,
    )
    return cast(SweepResult, execute(context, spec, steps))


def _datasets(config: Config, dataset: ImageDataset) -> tuple[DatasetUse, ...]:
    """Return the pictures that all trials share; none if the space changes the split."""
    if any(key == "seed" or key.startswith("data.") for key in sweep_of(config).space):
        return ()
    return datasets_used(config, dataset, "sweep")


def print_dry_run(config: Config, console: Console, runtime: Runtime, samples: int = 5) -> Plan:
    """Print the space, some settings, and how many trials fit at once, without starting a trial.

    Args:
        config: A configuration with a `sweep` section.
        console: The console for the output.
        runtime: The runtime, whose cluster or machine is divided among the trials.
        samples: The number of settings to print.
    """
    from rich.table import Table

    check_space(config)
    runtime.check_address()
    sweep = sweep_of(config)
    table = Table("key", "values")
    for key, parameter in sweep.space.items():
        table.add_row(key, str(parameter))
    console.print(table)
    say = say_to(console)
    stopping = f"asha (grace {sweep.grace_epochs}, factor {sweep.reduction_factor})"
    say(
        f"{count(sweep.trials, 'trial')}, objective {sweep.objective} ({', '.join(sweep.objectives)}), searcher "
        f"{sweep.searcher}, scheduler {stopping if sweep.scheduler == 'asha' else 'none'}"
    )
    for settings in first_settings(config, samples):
        say(f"sampled settings: {readable(settings)}")
    with tempfile.TemporaryDirectory() as logs:
        plan = plan_trials(config, runtime.nodes(Path(logs), say))
    say(str(plan))
    return plan
