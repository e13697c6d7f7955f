"""The interface to Ray Tune, which places trials and replaces lost ones: what sweeps and searches share.

Ray Tune's own files are deleted, because a job resumes from its own state.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ray.tune import Callback
from ray.tune.result import EXPR_ERROR_FILE
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from istanas.errors import IstanasError
from pipeline.base.text import last_line
from pipeline.cluster.lost_cluster import watch_cluster
from pipeline.cluster.places import Plan
from pipeline.runs.layout import LOG_FOLDER

# Keys of the reports that a trial sends.
FINISHED, FAILED = "finished", "failed"  # in the last report; FAILED holds the reason
NODE = "node"  # the node of the trial

# Ray Tune's settings: no result files, no terminal output, and no handling of Ctrl-C.
ENVIRONMENT = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # The last report of a trial has no epoch.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
# Ray ends a process this many seconds after the loss of the cluster's head; a job reports the loss shortly before.
RECONNECT_TIMEOUT = "RAY_gcs_rpc_server_reconnect_timeout_s"
SECONDS_BEFORE_RAY = 15.0

Handle = TypeVar("Handle")


class TaskSearcher(Searcher, Generic[Handle]):
    """A Ray Tune searcher that provides the tasks of trials and receives their reports.

    A subclass defines `_suggest` and `_end`. It has the state; Tune saves none of it.

    Args:
        loss_reason: Returns the reason for the last loss of a trial's process; called with Tune's id.

    Attributes:
        error: An error of this process. Tune would attribute it to the trial if it were raised.
    """

    def __init__(self, loss_reason: Callable[[str], str]) -> None:
        super().__init__()
        self._loss_reason = loss_reason
        self._trials: dict[str, Handle] = {}  # Tune's id -> what the subclass knows the trial by
        # Tune's id -> the last report, which Tune does not repeat for a lost trial.
        self._last_reports: dict[str, dict[str, Any]] = {}
        self.error: Exception | None = None

    @property
    def ends_trials(self) -> bool:
        """Whether Tune ends all running trials now, after an error of this process."""
        return self.error is not None

    def suggest(self, trial_id: str) -> Any:
        """Return the task of the next trial, or `FINISHED`."""
        try:
            return self._suggest(trial_id)
        except Exception as error:
            self.error = error
            return Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record a report."""
        if trial_id not in self._trials:  # a warm-up
            return
        try:
            self._last_reports[trial_id] = result
            self._record(self._trials[trial_id], result)
        except Exception as error:
            self.error = error

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Record the end of a trial, with its last report."""
        if trial_id not in self._trials or self.error is not None:
            return
        try:
            last = self._last_reports.pop(trial_id, {})
            lost = self._loss_reason(trial_id) if error else None
            self._end(self._trials.pop(trial_id), dict(result or last), lost)
        except Exception as own_error:
            self.error = own_error

    def _suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Enter the next trial into `_trials` and return its task, or return `FINISHED`, or None to be asked again."""
        raise NotImplementedError

    def _record(self, trial: Handle, result: dict[str, Any]) -> None:
        """Handle a report."""

    def _end(self, trial: Handle, result: dict[str, Any], lost: str | None) -> None:
        """Handle the end of a trial; `lost` is the reason if its process was lost too often."""
        raise NotImplementedError

    def save(self, checkpoint_path: str) -> None:
        """Write an empty file: the state is the subclass's."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the state is the subclass's."""

    def __getstate__(self) -> dict[str, Any]:
        """Return no state: Tune pickles its searcher, but the pickle is never loaded."""
        return {}


@dataclass(frozen=True)
class TuneJob:
    """What Ray Tune is to run.

    Args:
        name: The job in error messages: "sweep" or "search".
        trainable: The function that a trial's process calls with its task.
        plan: The resources of a trial, and the number of concurrent trials.
        restarts: Number of times that a trial's lost process is replaced.
        folder: The run directory, for Ray's logs.
    """

    name: str
    trainable: Callable[[dict[str, Any]], None]
    plan: Plan
    restarts: int
    folder: Path


def run_tune(
    job: TuneJob, searcher: TaskSearcher[Any], losses: LossReasons, scheduler: TrialScheduler | None = None
) -> None:
    """Run Ray Tune until no trial is left.

    Args:
        job: What is run.
        searcher: Provides the tasks.
        losses: Records the reasons for lost processes.
        scheduler: Stops trials early; None stops none.

    Raises:
        IstanasError: If Ray Tune fails or a trial cannot continue. Other errors of the searcher are wrapped in one.
    """
    import ray
    from ray import tune

    class StopWithSearcher(tune.Stopper):
        """A stopper that ends Ray Tune when the searcher says so."""

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return searcher.ends_trials

    plan, logs = job.plan, job.folder / LOG_FOLDER
    if plan.workers:
        # The trial itself only waits for its workers. Ray rejects an empty bundle, so it reserves one byte.
        resources = tune.PlacementGroupFactory([{"CPU": 0, "memory": 1}])
    else:
        resources = tune.PlacementGroupFactory(
            [{"CPU": plan.cpus, **({"GPU": plan.gpus} if plan.gpus else {})}]
        )
    files = (logs / "tune").resolve()
    shutil.rmtree(files, ignore_errors=True)  # files of interrupted processes
    name = f"session-{uuid.uuid4().hex[:8]}"
    _keep_aws_keys_out_of_logs()
    tuner = tune.Tuner(
        tune.with_resources(job.trainable, resources),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=plan.at_once,
            reuse_actors=plan.workers == 0,  # The workers of a stopped trial end with its process.
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(files),
            stop=StopWithSearcher(),
            callbacks=[losses],
            failure_config=tune.FailureConfig(max_failures=job.restarts),
            verbose=0,
        ),
    )
    try:
        with _watch_cluster(job.name, logs):
            tuner.fit()
    except (tune.TuneError, ray.exceptions.RayError) as error:
        raise IstanasError(
            f"Ray Tune failed ({last_line(error)})",
            field=job.name,
            remedy=f"see the logs in {logs}, and run the same command again to resume",
        ) from error
    shutil.rmtree(files / name, ignore_errors=True)
    if searcher.error is not None:
        raise searcher.error


class LossReasons(Callback):
    """A callback that records why processes of trials were lost; Tune does not tell its searcher.

    Args:
        note: Called with a line for the user.
        message: That line, without the reason.
    """

    def __init__(self, note: Callable[[str], None], message: str) -> None:
        self._note, self._message = note, message
        self._folders: dict[str, str] = {}  # Tune's id -> the folder with Ray's error message

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Remember the folder of a trial."""
        self._folders[trial.trial_id] = trial.local_path

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Report that a trial continues in another process."""
        self._folders[trial.trial_id] = trial.local_path  # A trial may be recovered before it was started.
        self._note(f"{self._message}: {self.reason(trial.trial_id)}")

    def reason(self, trial_id: str) -> str:
        """Return Ray's reason for the last loss of a trial's process."""
        folder = self._folders.get(trial_id)
        file = None if folder is None else Path(folder, EXPR_ERROR_FILE)
        text = file.read_text() if file is not None and file.is_file() else "Ray gives no reason"
        return last_line(text.partition(" Some common causes")[0])  # Ray's general advice follows.

    def __getstate__(self) -> dict[str, Any]:
        """Return no state: Tune pickles its callbacks, but the pickle is never loaded."""
        return {}


def node_of_trial() -> str:
    """Return the node of this trial: its address, and Ray's id, since several nodes may share an address."""
    import ray

    return f"{ray.util.get_node_ip_address()} ({ray.get_runtime_context().get_node_id()[:8]})"


def _watch_cluster(job: str, logs: Path) -> AbstractContextManager[None]:
    """Report the loss of the cluster's head shortly before Ray would end this process without a message."""
    import ray

    timeout = float(os.environ.get(RECONNECT_TIMEOUT, "60"))
    seconds = max(5.0, timeout - SECONDS_BEFORE_RAY)
    return watch_cluster(job, logs, ray.get_runtime_context().gcs_address, seconds)


def _keep_aws_keys_out_of_logs() -> None:
    """Stop Ray from sending AWS keys to trials, which would write them into its logs.

    Trials use the keys of their node instead. A local Ray inherits those of this process; on a cluster, the pre-flight
    check covers each node.
    """
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE = {
        name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")
    }
