"""Runs a job's worker function: in this process, or on Ray Train's workers, which report to this process.

Workers need no common disk and no MLflow: rank 0 gives every checkpoint and every figure to a mailbox (a small
actor beside this process), and this process writes them to the run directory. So whatever dies, what has been
written is whole, and only one process ever writes.
"""

from __future__ import annotations

import contextlib
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
from pipeline.base.home_folder import ensure_usable_home
from pipeline.base.text import last_line
from pipeline.cluster.allotment import Allotment, cluster_nodes
from pipeline.cluster.mailbox import OWN_KINDS, Mailbox
from pipeline.cluster.preflight import check_gpus, check_nodes
from pipeline.cluster.process_group import torch_config
from pipeline.cluster.ray_runtime import Runtime
from pipeline.cluster.reservations import release
from pipeline.config.schema import Config, DataSettings
from pipeline.runs import checkpoint
from pipeline.runs.layout import LOG_FOLDER
from pipeline.training.epoch_record import FolderStore, Progress, load_latest
from pipeline.training.loop import retrain_worker, search_worker
from pipeline.training.observer import Observer
from pipeline.training.pictures import open_dataset

Job = Literal["search", "retrain"]
WORKERS: dict[Job, Callable[..., Progress]] = {"search": search_worker, "retrain": retrain_worker}

SECONDS_BETWEEN_STEPS = 1.0  # that are told: each is a message, for which a worker's core works
SECONDS_BETWEEN_LOOKS = 1.0  # whether workers have ended without a word; messages come at once
SECONDS_TO_START = 180.0  # at least, for new workers to come up, before the job counts as stuck


def run_job(
    job: Job,
    config: Config,
    dataset: ImageDataset,
    folder: Path,
    observer: Observer,
    runtime: Runtime,
    genotype: Genotype | None = None,
) -> Progress:
    """Run a job's epochs to their end.

    Args:
        job: which.
        config: the whole configuration; `runtime.workers` says where.
        dataset: as `open_dataset` gives it; Ray's workers open their own.
        folder: of the checkpoints.
        observer: told of every step and epoch, in this process.
        runtime: Ray, started by `prepare_workers` if there are workers.
        genotype: of a retraining.

    Returns:
        The last epoch's record, and sums over all epochs.

    Raises:
        IstanasError: whatever stops the job; the same command goes on.
    """
    arguments = () if genotype is None else (genotype,)
    if config.runtime.worker_range.maximum == 0:
        return WORKERS[job](config, dataset, FolderStore(folder), observer, *arguments)
    return _RayJob(job, config, folder, observer, runtime, arguments).run()


def prepare_workers(config: Config, run_dir: Path, runtime: Runtime, say: Callable[[str], None]) -> None:
    """Have Ray running, a cluster examined, and room for the workers, if any; refusals leave nothing behind.

    Raises:
        IstanasError: if there is no Ray at the address, the pre-flight fails, or there is no room in time.
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
    if runtime.joined:  # nodes that were added meanwhile
        check_nodes(config, say, trials=False, known=runtime.examined)


# ---------- in the user's process
class _RayJob:
    """A job on Ray Train's workers, seen from the process that started it."""

    def __init__(
        self,
        job: Job,
        config: Config,
        folder: Path,
        observer: Observer,
        runtime: Runtime,
        arguments: tuple[Any, ...],
    ) -> None:
        self._job, self._config, self._folder, self._observer = job, config, folder, observer
        self._runtime, self._arguments = runtime, arguments
        self._epochs = config.retrain.epochs if job == "retrain" else config.search.max_epochs
        self._progress = Progress()
        self._places = ""  # that the present workers have, as a reservation of Ray's
        self._stuck_at = float("inf")  # when the job counts as stuck, unless workers start before
        # Of Ray Train's controllers, and of elastic jobs' workers; of others', they keep count.
        self._failures_left = config.runtime.max_failures
        self._ended = ""  # how the last group of workers did: "finished", or "made room" for a larger one

    def run(self) -> Progress:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        allotment = self._runtime.allot()  # once: what is lost does not make a job on GPUs one on CPUs
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(Mailbox)
        actor = actor.options(num_cpus=0, scheduling_strategy=here)
        newest = load_latest(self._folder)
        self._mailbox = actor.remote(None if newest is None else newest.data)
        del newest
        try:
            # Once, but for elastic jobs that grow or shrink, and controllers that are lost.
            while self._ended != "finished":
                self._ended = ""
                self._run_group(allotment)
        except ray.exceptions.RayError as error:  # the mailbox or Ray itself has gone
            raise IstanasError(
                f"{self._job}: Ray was lost ({last_line(error)}), see {self._folder.parent / LOG_FOLDER}; the same "
                "command goes on from the last checkpoint"
            ) from error
        finally:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(self._mailbox)
        return self._progress

    def _run_group(self, allotment: Allotment) -> None:
        """One call of Ray Train's `fit`, and all that comes in meanwhile."""
        import ray

        number = self._number_of_workers(allotment)
        trainer = _trainer(
            self._job, self._config, allotment, number, self._arguments, self._mailbox, self._folder
        )
        fit = _Fit(trainer.fit)
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
                raise IstanasError(
                    f"{self._job}: no worker has started for {self._patience() / 60:.0f} minutes, see "
                    f"{self._folder.parent / LOG_FOLDER} and Ray's own logs; the same command goes on"
                )
        if self._ended:  # whatever became of Ray's processes afterwards
            return
        if isinstance(fit.error, ray.exceptions.RayActorError) and self._failures_left > 0:
            self._failures_left -= 1
            reason = last_line(fit.error)
            self._observer.note(
                f"lost Ray Train's controller ({reason}): another starts, the epoch starts again"
            )
            if self._places:  # its workers are gone with it, but Ray keeps their places for them
                release(self._places)
        elif allotment.workers.elastic and self._may_go_on(fit.error):
            return
        elif fit.error is not None:
            raise IstanasError(
                f"{self._job}: the workers failed for good ({last_line(fit.error)}), see "
                f"{self._folder.parent / LOG_FOLDER}; the same command goes on from the last checkpoint"
            ) from fit.error
        else:
            raise IstanasError(
                f"{self._job}: the workers ended without a result, see {self._folder.parent / LOG_FOLDER}; the same "
                "command goes on from the last checkpoint"
            )

    def _number_of_workers(self, allotment: Allotment) -> int | tuple[int, int]:
        """What Ray Train is to start: of an elastic job as many as find places, once there are any."""
        workers = allotment.workers
        if not workers.elastic:
            return workers.maximum
        began = time.monotonic()
        self._runtime.wait(allotment, self._observer.note)
        self._stuck_at += time.monotonic() - began
        number = self._runtime.room(allotment)
        # Told the range, Ray Train asks for as many as are wanted, so that a cluster that can grow does. But it takes
        # what others hold for free: where there are others, it must not know.
        alone = number >= self._runtime.capacity(allotment)
        return (workers.minimum, workers.maximum) if alone else number

    def _may_go_on(self, error: BaseException | None) -> bool:
        """Whether an elastic job goes on after an error of Ray Train's, with as many workers as then find places."""
        from ray.train import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError

        if not isinstance(error, TrainingFailedError):
            return False
        if not isinstance(error, WorkerGroupError):  # which has been said
            what = str(error.controller_failure if isinstance(error, ControllerError) else error)
            reason = " ".join(what.split()).partition(". ")[0]
            self._observer.note(f"the workers ended, or did not start ({reason:.200}): again")
        if isinstance(error, ControllerError) and self._stuck_at < float("inf"):  # none has started yet
            return True
        lost = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
        if isinstance(error, PreemptionError) or any(getattr(each, "preempted", False) for each in lost):
            return True  # a machine was taken away: as often as one is
        self._failures_left -= 1
        return self._failures_left >= 0

    def _patience(self) -> float:
        return max(60 * self._config.runtime.wait_minutes, SECONDS_TO_START)

    def _handle(self, kind: str, payload: list[Any], allotment: Allotment) -> None:
        import ray

        if kind == "started":
            (self._places,) = payload
        elif kind == "note":
            self._observer.note(*payload)
        elif kind == "resumed":
            self._observer.resumed(*payload)
        elif kind == "step":
            epoch, step, n_steps, metrics = payload
            self._observer.step(epoch, step, n_steps, lambda: metrics)
        elif kind == "checkpoint":
            epoch, data, line, offset, workers = payload
            checkpoint.write(self._folder, epoch, data, line, offset)
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
            self._observer.note(f"{payload[0]}: replacing it, the epoch starts again")


class _Fit:
    """`trainer.fit` in a thread of its own: this process has events to handle, and Ctrl-C to listen to."""

    def __init__(self, fit: Callable[[], Any]) -> None:
        self._fit = fit
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._fit()
        except BaseException as error:  # handed to the main thread, which raises it
            self.error = error

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()


def _trainer(
    job: Job,
    config: Config,
    allotment: Allotment,
    number: int | tuple[int, int],
    arguments: tuple[Any, ...],
    mailbox: Any,
    folder: Path,
) -> Any:
    """Ray Train's trainer of a job. Checkpoints are ours, so its own storage holds nothing that is needed.

    An elastic job's starts no workers anew: who calls it looks how many find places, and makes the next trainer.
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
        callbacks=[_make_loss_callback(mailbox)],
    )
    scaling: dict[str, Any] = {
        "num_workers": number,
        "use_gpu": allotment.gpu,
        "resources_per_worker": allotment.bundle,
        # Workers that run are resized between epochs, by ending them there; Ray would do it in an epoch's middle.
        "elastic_resize_monitor_interval_s": 1e9,
    }
    return TorchTrainer(
        _worker_loop,
        train_loop_config={
            "job": job,
            "config": _on_workers(config, allotment),
            "arguments": arguments,
            "mailbox": mailbox,
        },
        torch_config=torch_config(allotment.compute.backend),
        scaling_config=ScalingConfig(**scaling),
        run_config=run,
    )


def _on_workers(config: Config, allotment: Allotment) -> Config:
    """The configuration with all that is decided here, once for all workers: device, threads, absolute paths."""
    runtime = config.runtime.model_copy(
        update={"device": allotment.compute.device.type, "threads": allotment.threads}
    )
    return config.model_copy(update={"runtime": runtime, "data": with_absolute_paths(config.data)})


def with_absolute_paths(data: DataSettings) -> DataSettings:
    """The settings as they hold in another process, whatever its working directory."""
    paths = {key: getattr(data, key) for key in ("root", "cache_dir")}
    return data.model_copy(
        update={key: str(Path(p).expanduser().resolve()) for key, p in paths.items() if p is not None}
    )


def _make_loss_callback(mailbox: Any) -> Any:
    from ray.train import UserCallback

    class Losses(UserCallback):
        """Tells, from Ray Train's controller, that workers were lost."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            lost = ", ".join(f"worker {r} ({last_line(e)})" for r, e in sorted(worker_exceptions.items()))
            mailbox.post.remote(None, "lost", pickle.dumps([f"lost {lost}"]))

    return Losses()


# ---------- on a worker
@dataclass
class _Reporter:
    """Store and observer of rank 0 on a Ray worker: everything goes to the mailbox.

    One thing after the other: an asynchronous actor may take two calls of one caller in any order.
    """

    mailbox: Any
    token: str
    workers: int

    def __post_init__(self) -> None:
        self._told = 0.0
        self._go_on = True
        self._sent: Any = None  # the last that was posted, as a reference

    def read(self) -> bytes | None:
        import ray

        group = ray.util.get_current_placement_group()
        assert group is not None, "Ray Train reserves the places of its workers"
        self._settle()
        data: bytes | None = ray.get(self.mailbox.begin.remote(self.token, group.id.hex()))
        return data

    def write(self, epoch: int, data: bytes, line: bytes, offset: int) -> None:
        import ray

        self._settle()
        kept = self.mailbox.keep.remote(self.token, epoch, data, line, offset, self.workers)
        self._go_on = ray.get(kept)

    def note(self, text: str) -> None:
        self._post("note", text)

    def resumed(self, progress: Progress, workers: int) -> None:
        self._post("resumed", progress, workers)

    def step(self, epoch: int, step: int, n_steps: int, read: Callable[[], Metrics | None]) -> None:
        now = time.monotonic()
        if step == n_steps or now - self._told > SECONDS_BETWEEN_STEPS:
            self._told = now
            self._post("step", epoch, step, n_steps, read())

    def epoch_done(self, progress: Progress) -> None:
        self._post("epoch", progress)

    def go_on(self) -> bool:
        return self._go_on

    def finished(self, progress: Progress) -> None:
        self._post("finished" if self._go_on else "made room", progress)
        self._settle()  # Ray Train ends this process as soon as it has nothing more to do

    def failed(self, error: IstanasError) -> None:
        import ray

        self._settle()
        ray.get(self.mailbox.post.remote(None, "failed", pickle.dumps([error])))

    def _post(self, kind: str, *payload: Any) -> None:
        self._settle()
        self._sent = self.mailbox.post.remote(self.token, kind, pickle.dumps(payload))

    def _settle(self) -> None:
        """Wait until what was posted has arrived."""
        import ray

        if self._sent is not None:
            ray.get(self._sent)


def _worker_loop(settings: dict[str, Any]) -> None:
    """What Ray Train calls on every worker, its process group being set up."""
    from ray.train import get_context

    ensure_usable_home()  # of this node
    context = get_context()
    job, config = settings["job"], settings["config"]
    reporter = _Reporter(settings["mailbox"], uuid.uuid4().hex, context.get_world_size())
    if context.get_world_rank() == 0:
        warnings.showwarning = lambda message, *_, **__: reporter.note(f"warning: {message}")
    try:
        dataset = open_dataset(config, (job,))
        progress = WORKERS[job](config, dataset, reporter, reporter, *settings["arguments"])
    except IstanasError as error:
        # The same again would come of a restart: the user's process stops the job, other ranks may be waiting.
        reporter.failed(error)
        return
    if context.get_world_rank() == 0:
        reporter.finished(progress)
