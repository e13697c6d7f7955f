"""The interface to Ray Tune, which places trials and stops them early."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from optuna.exceptions import OptunaError
from optuna.study import Study
from ray.tune import Callback
from ray.tune.result import EXPR_ERROR_FILE

from istanas.errors import IstanasError
from pipeline.base.text import last_line
from pipeline.cluster.lost_cluster import watch_cluster
from pipeline.config.keys import known_methods
from pipeline.config.schema import Config, SearchSection, config_class
from pipeline.jobs.observer import RunObserver
from pipeline.runs.layout import LOG_FOLDER
from pipeline.sweep.bookkeeping import TrialRuns
from pipeline.sweep.plan import Plan
from pipeline.sweep.searcher import StudySearcher, make_scheduler
from pipeline.sweep.space import methods_of, sweep_of, values_of
from pipeline.sweep.trial import run_trial

# Ray ends a process this many seconds after the loss of the cluster's head; a sweep reports the loss shortly before.
RECONNECT_TIMEOUT = "RAY_gcs_rpc_server_reconnect_timeout_s"
SECONDS_BEFORE_RAY = 15.0
EPOCH_KEYS = ("search.epochs", "search.max_search_epochs", "search.train_epochs")


def run_tune(
    config: Config, plan: Plan, folder: Path, study: Study, trials: TrialRuns, observer: RunObserver
) -> None:
    """Run Ray Tune until no trial is left. Its own files are deleted, because a sweep resumes from the study.

    Raises:
        IstanasError: If Ray Tune fails or a trial cannot continue.
    """
    import ray
    from ray import tune

    losses = _LossReasons(observer.note)
    searcher = StudySearcher(config, study, trials, losses.reason, trials.warm_ups())

    class StopOnError(tune.Stopper):
        """A stopper that ends Ray Tune after an error of the searcher."""

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return searcher.error is not None

    if plan.workers:
        # The trial itself only waits for its workers. Ray rejects an empty bundle, so it reserves one byte.
        resources = tune.PlacementGroupFactory([{"CPU": 0, "memory": 1}])
    else:
        resources = tune.PlacementGroupFactory(
            [{"CPU": plan.cpus, **({"GPU": plan.gpus} if plan.gpus else {})}]
        )
    files = (folder / LOG_FOLDER / "tune").resolve()
    shutil.rmtree(files, ignore_errors=True)  # files of interrupted processes
    name = f"session-{uuid.uuid4().hex[:8]}"
    _keep_aws_keys_out_of_logs()
    tuner = tune.Tuner(
        tune.with_resources(run_trial, resources),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=make_scheduler(config, study, max_epochs(config)),
            num_samples=-1,
            max_concurrent_trials=plan.at_once,
            reuse_actors=plan.workers == 0,  # The workers of a stopped trial end with its process.
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(files),
            stop=StopOnError(),
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
    shutil.rmtree(files / name, ignore_errors=True)
    if searcher.error is not None:
        if isinstance(searcher.error, IstanasError | OptunaError | OSError):
            raise searcher.error
        raise IstanasError(
            f"failed ({last_line(searcher.error)})",
            field="sweep",
            remedy="run the same command again to resume",
        ) from searcher.error


class _LossReasons(Callback):
    """A callback that records why processes of trials were lost; Tune does not tell its searcher.

    Args:
        note: Called with a line for the user.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._folders: dict[str, str] = {}  # Tune's id -> the folder with Ray's error message

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Remember the folder of a trial."""
        self._folders[trial.trial_id] = trial.local_path

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Report that a trial resumes in another process."""
        self._folders[trial.trial_id] = trial.local_path  # A trial may be recovered before it was started.
        self._note(
            f"the process of a trial was lost, and the trial resumes in another one: {self.reason(trial.trial_id)}"
        )

    def reason(self, trial_id: str) -> str:
        """Return Ray's reason for the last loss of a trial's process."""
        folder = self._folders.get(trial_id)
        file = None if folder is None else Path(folder, EXPR_ERROR_FILE)
        text = file.read_text() if file is not None and file.is_file() else "Ray gives no reason"
        return last_line(text.partition(" Some common causes")[0])  # Ray's general advice follows.

    def __getstate__(self) -> dict[str, Any]:
        """Return no state: Tune pickles its callbacks, but the pickle is never loaded."""
        return {}


def _watch_cluster(logs: Path) -> AbstractContextManager[None]:
    """Report the loss of the cluster's head shortly before Ray would end this process without a message."""
    import ray

    timeout = float(os.environ.get(RECONNECT_TIMEOUT, "60"))
    seconds = max(5.0, timeout - SECONDS_BEFORE_RAY)
    return watch_cluster("sweep", logs, ray.get_runtime_context().gcs_address, seconds)


def _keep_aws_keys_out_of_logs() -> None:
    """Stop Ray from sending AWS keys to trials, which would write them into its logs.

    Trials use the keys of their node instead. A local Ray inherits those of this process; on a cluster, the pre-flight
    check covers each node.
    """
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE = {
        name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")
    }


def max_epochs(config: Config) -> int:
    """Return the largest number of epochs that a trial may report, over all values of the space."""
    space = sweep_of(config).space

    def most(method: str) -> int:
        settings: SearchSection = config.search if method == config.method else config_class(method)().search  # type: ignore[call-arg]
        swept = [key for key in space if key.startswith("search.") and method in known_methods(key)]
        highest = {
            key.partition(".")[2]: max(map(int, values_of(space[key]))) for key in swept if key in EPOCH_KEYS
        }
        return settings.model_copy(update=highest).max_epochs

    return max(map(most, methods_of(config)))
