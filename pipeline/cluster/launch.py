"""Execution of a job's worker function: in this process, or on Ray Train's workers, which report to this process.

Workers need no shared disk and no MLflow: rank 0 sends every checkpoint and every metric to a mailbox (a small actor
next to this process), and this process writes them to the run directory. Since no other process writes there, a
worker that dies leaves no incomplete file.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from istanas.data import ImageDataset
from istanas.errors import IstanasError
from istanas.space import Genotype
from istanas.training import Metrics
from pipeline.base.addresses import is_remote
from pipeline.base.home_folder import ensure_usable_home
from pipeline.base.text import last_line
from pipeline.cluster.allotment import Allotment, cluster_nodes
from pipeline.cluster.mailbox import OWN_KINDS, Mailbox
from pipeline.cluster.preflight import check_gpus, check_nodes
from pipeline.cluster.process_group import torch_config
from pipeline.cluster.ray_runtime import Runtime
from pipeline.cluster.reservations import release
from pipeline.config.plugins import ship
from pipeline.config.schema import Config
from pipeline.runs.layout import LOG_FOLDER
from pipeline.training.epoch_record import FolderStore, Progress, load_latest
from pipeline.training.loop import retrain_worker, search_worker
from pipeline.training.observer import Observer
from pipeline.training.pictures import open_dataset

Job = Literal["search", "retrain"]
WORKERS: dict[Job, Callable[..., Progress]] = {"search": search_worker, "retrain": retrain_worker}

SECONDS_BETWEEN_STEPS = 1.0  # between reported steps: each report costs time on a worker's core
SECONDS_BETWEEN_LOOKS = 1.0  # between checks whether workers have ended; their messages arrive immediately
SECONDS_TO_END = 10.0  # for Ray Train's controller, after Ctrl-C or an error
SECONDS_BETWEEN_KILLS = 0.2  # between attempts to end it: it may not have started yet
SECONDS_TO_POST = 30.0  # before a message of the controller is given up
SECONDS_TO_START = 180.0  # least time that new workers have to start before the job counts as stuck
RESUMES = "run the same command again to resume from the last checkpoint"


def run_job(
    job: Job,
    config: Config,
    dataset: ImageDataset,
    store: FolderStore,
    observer: Observer,
    runtime: Runtime,
    genotype: Genotype | None = None,
) -> Progress:
    """Run all epochs of a job.

    Args:
        job: The kind of job.
        config: The whole configuration; `runtime.workers` selects this process or Ray's workers.
        dataset: The data set as `open_dataset` returns it; Ray's workers open their own.
        store: Where the run's checkpoints are written.
        observer: Receives every step and epoch, in this process.
        runtime: Ray, started by `prepare_workers` if there are workers.
        genotype: The genotype to retrain.

    Returns:
        The record of the last epoch, and sums over all epochs.

    Raises:
        IstanasError: The job was stopped; the same command resumes it.
    """
    arguments = () if genotype is None else (genotype,)
    if config.runtime.worker_range.maximum == 0:
        return WORKERS[job](config, dataset, store, observer, *arguments)
    return _RayJob(job, config, store, observer, runtime, arguments).run()


def prepare_workers(config: Config, run_dir: Path, runtime: Runtime, say: Callable[[str], None]) -> None:
    """Start or join Ray, run the pre-flight checks, and wait for free resources, if the job has workers.

    A failure leaves no run behind.

    Raises:
        IstanasError: Ray does not answer at the address, a check failed, or the resources were not free in time.
    """
    if config.runtime.worker_range.maximum == 0:
        return
    runtime.start(run_dir, say=say)
    allotment = runtime.allot()
    if runtime.joined:
        first = not runtime.examined
        check_nodes(config, say, trials=False, known=runtime.examined)
        if first and allotment.gpu:
            there = sum(node.gpus for node in cluster_nodes())
            check_gpus(allotment.workers.minimum, there, config.runtime.wait_minutes, say)
    runtime.wait(allotment, say)
    if runtime.joined:  # checks nodes that were added meanwhile
        check_nodes(config, say, trials=False, known=runtime.examined)


# ---------- in the user's process
class _RayJob:
    """A job on Ray Train's workers, controlled by the process that started it."""

    def __init__(
        self,
        job: Job,
        config: Config,
        store: FolderStore,
        observer: Observer,
        runtime: Runtime,
        arguments: tuple[Any, ...],
    ) -> None:
        self._job, self._config, self._store, self._observer = job, config, store, observer
        self._folder, self._runtime, self._arguments = store.folder, runtime, arguments
        self._epochs = config.retrain.epochs if job == "retrain" else config.search.max_epochs
        self._progress = Progress()
        self._reservation = ""  # the placement group of the current workers
        self._stuck_at = float("inf")  # time at which the job counts as stuck, unless workers start earlier
        # Counts lost controllers, and lost workers of elastic jobs. Ray Train counts lost workers of other jobs.
        self._failures_left = config.runtime.max_failures
        self._ended = ""  # how the last group of workers ended: "finished", or "made room" for a larger group

    def run(self) -> Progress:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        allotment = self._runtime.allot()  # once: a job that loses its GPUs must not continue on CPUs
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(Mailbox)
        actor = actor.options(num_cpus=0, scheduling_strategy=here)
        newest = load_latest(self._folder)
        self._mailbox = actor.remote(None if newest is None else newest.data)
        del newest
        try:
            # More than one group is needed if an elastic job grows or shrinks, or a controller is lost.
            while self._ended != "finished":
                self._ended = ""
                self._run_group(allotment)
        except ray.exceptions.RayError as error:  # The mailbox, or Ray itself, was lost.
            raise self._failed(f"Ray was lost ({last_line(error)})") from error
        finally:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(self._mailbox)
        return self._progress

    def _run_group(self, allotment: Allotment) -> None:
        """Call Ray Train's `fit` once, and handle the events that arrive meanwhile."""
        import ray

        number = self._number_of_workers(allotment)
        trainer = _trainer(
            self._job, self._config, allotment, number, self._arguments, self._mailbox, self._folder
        )
        fit = _Fit(trainer.fit)
        try:
            self._follow(fit, allotment)
        finally:
            self._end(fit)
        if self._ended:  # Later errors of Ray's processes do not matter.
            return
        if isinstance(fit.error, ray.exceptions.RayActorError) and self._failures_left > 0:
            self._failures_left -= 1
            reason = last_line(fit.error)
            self._observer.note(
                f"lost Ray Train's controller ({reason}): starting a new one and repeating the epoch"
            )
            # The workers end with their controller, but Ray keeps their resources reserved.
            if self._reservation:
                release(self._reservation)
        elif allotment.workers.elastic and self._may_continue(fit.error):
            return
        elif fit.error is not None:
            raise self._failed(f"the workers failed too often ({last_line(fit.error)})") from fit.error
        else:
            raise self._failed("the workers ended without a result")

    def _follow(self, fit: _Fit, allotment: Allotment) -> None:
        """Handle the events of a group of workers until `fit` has ended."""
        import ray

        self._stuck_at = min(self._stuck_at, time.monotonic() + self._patience())
        while True:
            ended = fit.ended
            events = ray.get(self._mailbox.take.remote(timeout=SECONDS_BETWEEN_LOOKS))
            for kind, *payload in events:
                if kind not in OWN_KINDS:
                    payload = pickle.loads(payload[0])
                if kind in ("started", "lost"):
                    self._stuck_at = time.monotonic() + self._patience() if kind == "lost" else float("inf")
                self._handle(kind, payload, allotment)
            if ended and not events:
                break
            if time.monotonic() > self._stuck_at:
                raise self._failed(f"no worker has started for {self._patience() / 60:.0f} minutes")

    def _end(self, fit: _Fit) -> None:
        """End Ray Train's controller if it still runs, as after Ctrl-C, and wait for the thread of `fit`.

        Ray ends this process if a thread uses Ray while it shuts down.
        """
        import ray

        deadline = time.monotonic() + SECONDS_TO_END
        with contextlib.suppress(ray.exceptions.RayError):  # The mailbox, or Ray itself, was lost.
            while not fit.ended and time.monotonic() < deadline:
                controller = ray.get(self._mailbox.controller.remote(), timeout=SECONDS_TO_END)
                if controller is not None:
                    ray.kill(controller)
                fit.wait(SECONDS_BETWEEN_KILLS)

    def _failed(self, problem: str) -> IstanasError:
        return IstanasError(
            f"{self._job}: {problem}, see {self._folder.parent / LOG_FOLDER} and Ray's own logs",
            remedy=RESUMES,
        )

    def _number_of_workers(self, allotment: Allotment) -> int | tuple[int, int]:
        """Return the number of workers to start; an elastic job waits for its minimum and takes all that fit."""
        workers = allotment.workers
        if not workers.elastic:
            return workers.maximum
        began = time.monotonic()
        self._runtime.wait(allotment, self._observer.note)
        self._stuck_at += time.monotonic() - began
        number = self._runtime.room(allotment)
        # With the range, Ray Train requests the maximum, so that an autoscaling cluster grows. But Ray Train counts
        # resources of other jobs as free, so it gets a single number if there are other jobs.
        alone = number >= self._runtime.capacity(allotment)
        return (workers.minimum, workers.maximum) if alone else number

    def _may_continue(self, error: BaseException | None) -> bool:
        """Return whether an elastic job continues, with as many workers as fit, after an error of Ray Train."""
        from ray.train import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError

        if not isinstance(error, TrainingFailedError):
            return False
        if not isinstance(error, WorkerGroupError):  # `_make_loss_callback` has reported that error.
            what = str(error.controller_failure if isinstance(error, ControllerError) else error)
            reason = " ".join(what.split()).partition(". ")[0]
            self._observer.note(f"the workers ended, or did not start ({reason:.200}): starting them again")
        if isinstance(error, ControllerError) and self._stuck_at < float("inf"):  # No worker has started yet.
            return True
        lost = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
        if isinstance(error, PreemptionError) or any(getattr(each, "preempted", False) for each in lost):
            return True  # Preempted machines are not failures of the job, and do not count.
        self._failures_left -= 1
        return self._failures_left >= 0

    def _patience(self) -> float:
        return max(60 * self._config.runtime.wait_minutes, SECONDS_TO_START)

    def _handle(self, kind: str, payload: list[Any], allotment: Allotment) -> None:
        import ray

        if kind == "started":
            (self._reservation,) = payload
        elif kind == "note":
            self._observer.note(*payload)
        elif kind == "resumed":
            self._observer.resumed(*payload)
        elif kind == "step":
            epoch, step, n_steps, metrics = payload
            self._observer.step(epoch, step, n_steps, lambda: metrics)
        elif kind == "checkpoint":
            epoch, data, line, offset, workers = payload
            self._store.write(epoch, data, line, offset)
            grow = (
                epoch < self._epochs
                and workers < allotment.workers.maximum
                and self._runtime.has_room_for_one_more(allotment)
            )
            ray.get(self._mailbox.kept.remote(epoch, not grow))
        elif kind == "epoch":
            self._observer.epoch_done(*payload)
        elif kind in ("finished", "made room"):
            (self._progress,) = payload
            self._ended = kind
        elif kind == "failed":
            (error,) = payload
            raise error
        elif kind == "lost":
            self._observer.note(f"{payload[0]}: replacing it and repeating the epoch")


class _Fit:
    """`trainer.fit` in a separate thread, because the main thread handles events and Ctrl-C."""

    def __init__(self, fit: Callable[[], Any]) -> None:
        self._fit = fit
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._fit()
        except BaseException as error:  # The main thread raises it.
            self.error = error

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)


def _trainer(
    job: Job,
    config: Config,
    allotment: Allotment,
    number: int | tuple[int, int],
    arguments: tuple[Any, ...],
    mailbox: Any,
    folder: Path,
) -> Any:
    """Return Ray Train's trainer of a job. Its storage is not read again, because this module stores the checkpoints.

    The trainer of an elastic job does not restart workers: the caller counts how many fit, and creates another
    trainer.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    failures: dict[str, Any] = {"max_failures": config.runtime.max_failures}
    if allotment.workers.elastic:
        failures = dict.fromkeys(("max_failures", "controller_failure_limit", "max_preemption_failures"), 0)
    run = RunConfig(
        name=f"{job}-{uuid.uuid4().hex[:8]}",
        storage_path=str((folder.parent / LOG_FOLDER / "train").resolve()),
        failure_config=FailureConfig(**failures),
        callbacks=[_make_loss_callback(mailbox), _make_start_callback(mailbox)],
    )
    scaling: dict[str, Any] = {
        "num_workers": number,
        "use_gpu": allotment.gpu,
        "resources_per_worker": allotment.bundle,
        # Ray would resize the group within an epoch. This module ends the workers between epochs instead.
        "elastic_resize_monitor_interval_s": 1e9,
    }
    return TorchTrainer(
        _worker_loop,
        # The configuration and the genotype may depend on plugins, which the worker loads first.
        train_loop_config={
            "work": ship((job, _on_workers(config, allotment), arguments)),
            "mailbox": mailbox,
        },
        torch_config=torch_config(allotment.compute.backend),
        scaling_config=ScalingConfig(**scaling),
        run_config=run,
    )


def _on_workers(config: Config, allotment: Allotment) -> Config:
    """Return the configuration with the device, threads and absolute paths that are chosen for all workers."""
    runtime = config.runtime.model_copy(
        update={"device": allotment.compute.device.type, "threads": allotment.threads}
    )
    return with_absolute_paths(config.model_copy(update={"runtime": runtime}))


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with absolute paths of the files that it reads, which any working directory can use.

    The address of a bucket stays as it is.
    """
    update = {}
    for name, keys in (("data", ("root", "cache_dir")), ("search", ("latency_table",))):
        section = getattr(config, name)
        paths = {key: getattr(section, key, None) for key in keys}
        absolute = {
            key: str(Path(path).expanduser().resolve())
            for key, path in paths.items()
            if path is not None and not is_remote(path)
        }
        update[name] = section.model_copy(update=absolute)
    return config.model_copy(update=update)


def _make_loss_callback(mailbox: Any) -> Any:
    import ray
    from ray.train import UserCallback

    class Losses(UserCallback):
        """Reports lost workers, from Ray Train's controller.

        Workers also fail if the job has ended without them, for example because a sweep stopped its trial: the job
        takes its mailbox with it. The controller must not start new workers then. If it did so while Ray ends it,
        Ray would never release their reservation, and no other trial would find room.
        """

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            lost = ", ".join(f"worker {r} ({last_line(e)})" for r, e in sorted(worker_exceptions.items()))
            posted = mailbox.post.remote(None, "lost", pickle.dumps([f"lost {lost}"]))
            try:
                ray.get(posted, timeout=SECONDS_TO_POST)
            except (ray.exceptions.ActorUnavailableError, ray.exceptions.GetTimeoutError):
                pass  # The mailbox may come back. Only the message is lost.
            except ray.exceptions.RayActorError:
                os._exit(1)  # Ray Train would handle an exception as a failure, and start new workers.

    return Losses()


def _make_start_callback(mailbox: Any) -> Any:
    import ray
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class Starts(ControllerCallback):
        """Sends a handle of Ray Train's controller, from that controller, so that `_RayJob` can end it.

        Ray Train's public callbacks are not called when a controller starts.
        """

        def after_controller_start(self, train_run_context: Any) -> None:
            mailbox.controlled_by.remote(ray.get_runtime_context().current_actor)

    return Starts()


# ---------- on a worker
@dataclass
class _Reporter:
    """The store and observer of rank 0 on a Ray worker, which sends everything to the mailbox.

    Each call waits for the previous one, because an asynchronous actor may execute calls in any order.
    """

    mailbox: Any
    token: str
    workers: int

    def __post_init__(self) -> None:
        self._last_step = 0.0
        self._continue = True
        self._sent: Any = None  # reference to the last post

    def read(self) -> bytes | None:
        import ray

        group = ray.util.get_current_placement_group()
        assert group is not None, "Ray Train reserves the places of its workers"
        self._wait_for_post()
        data: bytes | None = ray.get(self.mailbox.begin.remote(self.token, group.id.hex()))
        return data

    def write(self, epoch: int, data: bytes, line: bytes, offset: int) -> None:
        import ray

        self._wait_for_post()
        kept = self.mailbox.keep.remote(self.token, epoch, data, line, offset, self.workers)
        self._continue = ray.get(kept)

    def note(self, text: str) -> None:
        self._post("note", text)

    def resumed(self, progress: Progress, workers: int) -> None:
        self._post("resumed", progress, workers)

    def step(self, epoch: int, step: int, n_steps: int, read: Callable[[], Metrics | None]) -> None:
        now = time.monotonic()
        if step == n_steps or now - self._last_step > SECONDS_BETWEEN_STEPS:
            self._last_step = now
            self._post("step", epoch, step, n_steps, read())

    def epoch_done(self, progress: Progress) -> None:
        self._post("epoch", progress)

    def should_continue(self) -> bool:
        return self._continue

    def finished(self, progress: Progress) -> None:
        self._post("finished" if self._continue else "made room", progress)
        self._wait_for_post()  # Ray Train ends this process when the function returns.

    def failed(self, error: IstanasError) -> None:
        import ray

        self._wait_for_post()
        ray.get(self.mailbox.post.remote(None, "failed", pickle.dumps([error])))

    def _post(self, kind: str, *payload: Any) -> None:
        self._wait_for_post()
        self._sent = self.mailbox.post.remote(self.token, kind, pickle.dumps(payload))

    def _wait_for_post(self) -> None:
        """Wait until the last post has arrived."""
        import ray

        if self._sent is not None:
            ray.get(self._sent)


def _worker_loop(settings: dict[str, Any]) -> None:
    """Run the job on a worker. Ray Train calls it after the process group is set up."""
    from ray.train import get_context

    ensure_usable_home()  # The home folder of this node may differ.
    context = get_context()
    reporter = _Reporter(settings["mailbox"], uuid.uuid4().hex, context.get_world_size())
    if context.get_world_rank() == 0:
        warnings.showwarning = lambda message, *_, **__: reporter.note(f"warning: {message}")
    try:
        job, config, arguments = settings["work"].open()
        dataset = open_dataset(config, (job,))
        progress = WORKERS[job](config, dataset, reporter, reporter, *arguments)
    except IstanasError as error:
        # A restart would fail again. The user's process stops the job, because other ranks may be waiting for this one.
        reporter.failed(error)
        return
    if context.get_world_rank() == 0:
        reporter.finished(progress)
