"""Ray Tune as a sweep uses it: it places trials and stops them early."""

from __future__ import annotations

import os
import shutil
import uuid
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from optuna.exceptions import OptunaError
from optuna.study import Study

from istanas.errors import IstanasError
from pipeline.base.text import last_line
from pipeline.cluster.loss import watch_cluster
from pipeline.config.keys import known_methods
from pipeline.config.schema import Config, OneStageSearchSettings, SearchSettings, TwoStageSearchSettings
from pipeline.jobs.observer import RunObserver
from pipeline.runs.layout import LOG_FOLDER
from pipeline.sweep.bookkeeping import Trials
from pipeline.sweep.plan import Plan
from pipeline.sweep.searcher import Losses, StudySearcher, make_scheduler
from pipeline.sweep.space import methods_of, sweep_of, values_of
from pipeline.sweep.trial import run_trial

RAYS_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"
SECONDS_BEFORE_RAY = 15.0  # would end the process because the cluster's head is gone
EPOCH_KEYS = ("search.epochs", "search.max_search_epochs", "search.train_epochs")


def run_tune(
    config: Config, plan: Plan, folder: Path, study: Study, trials: Trials, observer: RunObserver
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
    _keep_aws_keys_out_of_logs()
    tuner = tune.Tuner(
        tune.with_resources(run_trial, resources),
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
        with _watch_cluster(folder / LOG_FOLDER):
            tuner.fit()
    except (tune.TuneError, ray.exceptions.RayError) as error:
        raise IstanasError(
            f"Ray Tune failed ({last_line(error)})",
            field="sweep",
            remedy=f"see the logs in {folder / LOG_FOLDER}, and run the same command again to resume",
        ) from error
    shutil.rmtree(files / sitting, ignore_errors=True)
    if searcher.error is not None:
        if isinstance(searcher.error, IstanasError | OptunaError | OSError):
            raise searcher.error
        raise IstanasError(
            f"failed ({last_line(searcher.error)})",
            field="sweep",
            remedy="run the same command again to resume",
        ) from searcher.error


def _watch_cluster(logs: Path) -> AbstractContextManager[None]:
    import ray

    # A head that comes back is waited for as long as possible: until shortly before Ray itself ends the process.
    patience = float(os.environ.get(RAYS_PATIENCE, "60"))
    seconds = max(5.0, patience - SECONDS_BEFORE_RAY)
    return watch_cluster("sweep", logs, ray.get_runtime_context().gcs_address, seconds)


def _keep_aws_keys_out_of_logs() -> None:
    """Stop Ray from writing AWS's keys into its logs, through which it would send them to trials.

    Trials have the keys of their node: a Ray that is started here inherits the environment of this process, and on a
    cluster the pre-flight checks ask each node.
    """
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE = {
        name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")
    }


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
