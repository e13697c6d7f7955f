"""What runs on every worker: device, backend and precision (one function), data, the epochs of a job, resume.

The same functions run in the user's process and on Ray Train's workers (`pipeline.launch`); how many train
together they learn from torch's process group. A worker knows no Ray, no MLflow and no console: rank 0 gives
checkpoints to a `Store` and tells an `Observer` what happened. The order after each epoch is checkpoint first,
observer second, so that whatever an observer has seen can be told again after a kill.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from istanas.data import ImageDataset
from istanas.distributed import Ranks
from istanas.errors import CheckpointError, ConfigError, DivergedError
from istanas.nets import TargetNet, absorb_into_batchnorm
from istanas.space import Genotype
from istanas.training import Compute, Metrics, Totals, derive_seed
from pipeline import checkpoint
from pipeline.checkpoint import Store
from pipeline.data_workers import noticing_their_loss
from pipeline.epochs import (
    EpochJob,
    Measured,
    OneStageJob,
    RetrainJob,
    TwoStageJob,
    build_one_stage,
    build_target,
    check_same_genotype,
)
from pipeline.pictures import check_same_data, data_digest
from pipeline.record import EpochRecord, Progress, Rollback, load_latest
from pipeline.resources import count, threads_in_process, usable_cores
from pipeline.schema import Config, OneStageConfig, RuntimeSettings, TwoStageConfig


class Observer(Protocol):
    """Who wants to know how a job goes."""

    def note(self, text: str) -> None:
        """Called with a line for people."""

    def resumed(self, progress: Progress, workers: int) -> None:
        """Called before the first epoch of `workers` workers, with what the checkpoint says is done."""

    def step(self, epoch: int, step: int, n_steps: int, read: Callable[[], Metrics | None]) -> None:
        """Called after every training step (epochs from 0, steps from 1).

        `read` gives the epoch's figures so far, or None where that would make the device wait: on a GPU.
        """

    def epoch_done(self, progress: Progress) -> None:
        """Called after every epoch, its checkpoint written; the last record is the epoch's."""

    def go_on(self) -> bool:
        """Called after every epoch; False ends these workers' part of the job here, for others to go on."""


class Silent:
    """The observer of every rank but the first."""

    def note(self, text: str) -> None:
        pass

    def resumed(self, progress: Progress, workers: int) -> None:
        pass

    def step(self, epoch: int, step: int, n_steps: int, read: Callable[[], Metrics | None]) -> None:
        pass

    def epoch_done(self, progress: Progress) -> None:
        pass

    def go_on(self) -> bool:
        return True


def choose_compute(settings: RuntimeSettings, gpus: int) -> Compute:
    """Decide device, precision and (as `Compute.backend`) how workers talk: the only place that does.

    Args:
        settings: what is asked for.
        gpus: how many GPUs the job may use, here or on a cluster.

    Raises:
        ConfigError: if what is asked for can't be.
    """
    if settings.device == "cuda" and gpus == 0:
        raise ConfigError(
            "runtime.device is cuda, and no GPU is usable here: choose cpu or auto, or see `istanas doctor`"
        )
    device = torch.device("cuda" if gpus > 0 and settings.device != "cpu" else "cpu")
    if device.type == "cpu":
        if settings.precision == "bf16":
            raise ConfigError("runtime.precision is bf16, and there is no GPU here: choose fp32 or auto")
        return Compute(device)
    return Compute(device, None if settings.precision == "fp32" else torch.bfloat16)


def compute_for(settings: RuntimeSettings) -> Compute:
    """`choose_compute` for this process, which is then set up for it.

    Raises:
        ConfigError: if what is asked for can't be.
    """
    compute = choose_compute(settings, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    torch.set_num_threads(threads_in_process(settings.threads))
    if compute.device.type == "cuda":
        set_float32_precision(compute)
        torch.backends.cudnn.benchmark = True
    return compute


def set_float32_precision(compute: Compute) -> None:
    """Allow TF32 only if the job computes in bf16; with `precision: fp32`, products and convolutions are float32.

    torch's own default rounds the operands of cuDNN's convolutions to TF32's 10 mantissa bits.
    """
    tf32 = compute.autocast_dtype is not None
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def describe_place(compute: Compute, ranks: Ranks) -> str:
    """One line for people: who computes, on what, with how many threads."""
    threads = f"{count(torch.get_num_threads(), 'thread')}, {count(usable_cores(), 'core')} on this machine"
    if not dist.is_initialized():
        return f"in this process, {compute.device.type}, {threads}"
    return f"{count(ranks.size, 'worker')} ({compute.device.type}, {compute.backend}), each {threads}"


def search_worker(config: Config, dataset: ImageDataset, store: Store, observer: Observer) -> Progress:
    """Run (or go on with) a search, with the other ranks of torch's process group if there is one.

    Args:
        config: the whole configuration; its method says which search.
        dataset: as `open_dataset` gives it.
        store: of checkpoints; only rank 0's is used. Of a one-stage search, the last one holds the trained
            network, see `searched_network`.
        observer: told of every step and epoch; only rank 0's is.

    Returns:
        The last epoch's record, whose genotype is the result, and sums over all epochs.
    """

    def make(compute: Compute, ranks: Ranks) -> EpochJob:
        if isinstance(config, OneStageConfig):
            return OneStageJob(config, dataset, compute, ranks)
        assert isinstance(config, TwoStageConfig)
        return TwoStageJob(config, dataset, compute, ranks)

    digest = data_digest(config, dataset, "search")
    return _run_epochs(make, config, dataset, digest, store, observer)


def retrain_worker(
    config: Config, dataset: ImageDataset, store: Store, observer: Observer, genotype: Genotype
) -> Progress:
    """Train (or go on training) the network of a genotype from scratch, with the other ranks if there are any.

    Args:
        config: the whole configuration.
        dataset: as `open_dataset` gives it.
        store: of checkpoints; only rank 0's is used. The last one holds the trained network, see `trained_network`.
        observer: told of every step and epoch; only rank 0's is.
        genotype: the cells.

    Returns:
        The last epoch's record, which has the test figures, and sums over all epochs.
    """
    return _run_epochs(
        lambda compute, ranks: RetrainJob(config, dataset, compute, ranks, genotype),
        config,
        dataset,
        data_digest(config, dataset, "retrain"),
        store,
        observer,
    )


def _run_epochs(
    make: Callable[[Compute, Ranks], EpochJob],
    config: Config,
    dataset: ImageDataset,
    digest: str,
    store: Store,
    observer: Observer,
) -> Progress:
    compute = compute_for(config.runtime)
    ranks = Ranks.current(compute.device)
    observer = observer if ranks.is_first else Silent()
    job, progress = _begin(make, dataset, store, compute, ranks)
    observer.note(describe_place(compute, ranks))
    observer.resumed(progress, ranks.size)
    undone: tuple[Rollback, ...] = ()  # attempts at the next epoch that diverged
    while not job.is_done(progress):
        epoch = progress.epochs
        _seed_epoch(config, epoch, ranks)

        def tell(step: int, n_steps: int, totals: Totals, epoch: int = epoch) -> None:
            on_cpu = compute.device.type == "cpu"
            observer.step(epoch, step, n_steps, totals.metrics if on_cpu else lambda: None)

        start = time.perf_counter()
        n_rollbacks = progress.rollbacks + len(undone)
        with noticing_their_loss(config.runtime.data_workers):
            found = _attempt(job, epoch, tell, 0.5**n_rollbacks)
        seconds = time.perf_counter() - start
        if isinstance(found, str):
            _check_rollback(config.runtime, found, epoch, n_rollbacks)
            undone = (*undone, Rollback(reason=found, lr_factor=0.5 ** (n_rollbacks + 1)))
            del job  # two networks may be too much for a GPU
            job, progress = _begin(make, dataset, store, compute, ranks)
            observer.note(_describe_rollback(config.runtime, found, epoch, n_rollbacks + 1))
            continue
        if n_rollbacks > 0:
            found.metrics["train/rollbacks"] = float(n_rollbacks)
        record = EpochRecord(
            epoch=epoch + 1,  # done, counted from 1 as people and MLflow's steps do
            timestamp_ms=int(time.time() * 1000),
            seconds=seconds,
            workers=ranks.size,
            metrics=found.metrics,
            rollbacks=undone,
            search=found.search,
        )
        offset = progress.log.offset
        progress, line = progress.after(record)
        undone = ()
        if ranks.is_first:
            state = {**job.state(), "progress": progress.to_state(), "data": digest}
            store.write(epoch + 1, checkpoint.serialize(state), line, offset)
        observer.epoch_done(progress)
        if not ranks.from_first(observer.go_on):
            break
    return progress


def _begin(
    make: Callable[[Compute, Ranks], EpochJob],
    dataset: ImageDataset,
    store: Store,
    compute: Compute,
    ranks: Ranks,
) -> tuple[EpochJob, Progress]:
    """The job as the newest checkpoint left it, or as it starts."""
    job = make(compute, ranks)
    saved = _load(store, dataset, ranks)
    if saved is None:
        return job, Progress()
    return job, _restore(job, saved)


def _attempt(
    job: EpochJob, epoch: int, tell: Callable[[int, int, Totals], None], lr_factor: float
) -> Measured | str:
    """What the epoch leaves, or how it diverged, on every rank alike; the error itself would hold on to the network."""
    try:
        return job.run_epoch(epoch, tell, lr_factor)
    except DivergedError as error:
        return str(error)


def _check_rollback(settings: RuntimeSettings, reason: str, epoch: int, before: int) -> None:
    """Stop a diverged run that is not to be rolled back, or was so too often.

    Raises:
        DivergedError: naming epoch, last good checkpoint and remedy.
    """
    if settings.on_nan == "rollback" and before < settings.max_rollbacks:
        return
    last = f"the last good checkpoint is of epoch {epoch}" if epoch else "there is no checkpoint before it"
    if settings.on_nan == "rollback":
        remedy = f"it was rolled back {before} times already, raise runtime.max_rollbacks to go on"
    else:
        where = "from there" if epoch else "at the start"
        remedy = f"the same command with --set runtime.on_nan=rollback goes on {where} with half of it"
    raise DivergedError(f"{reason}; {last}: {remedy}")


def _describe_rollback(settings: RuntimeSettings, reason: str, epoch: int, number: int) -> str:
    to = f"the end of epoch {epoch}" if epoch else "the start"
    return (
        f"{reason.partition(', lower')[0]}: rolled back to {to}, with half the learning rate "
        f"({0.5**number:g} of what is set; rollback {number} of {settings.max_rollbacks})"
    )


def trained_network(config: Config, genotype: Genotype, dataset: ImageDataset, folder: Path) -> TargetNet:
    """The network that a finished retraining left in its folder, with the last epoch's weights, in eval mode.

    Raises:
        CheckpointError: if the last epoch's checkpoint is not there or not whole.
    """
    saved = _last(folder, config.retrain.epochs)
    net = build_target(config, genotype, dataset)
    with _of_this_job():
        check_same_genotype(saved, genotype)
        net.load_state_dict(saved["net"])
    return net.eval()


def searched_network(config: OneStageConfig, dataset: ImageDataset, folder: Path, epochs: int) -> TargetNet:
    """The network that a one-stage search of so many epochs left in its folder: absorbed, on the CPU, in eval mode.

    Raises:
        CheckpointError: if the last epoch's checkpoint is not there or not whole, or is of another search.
        ConfigError: if a node is still ACTIVE.
    """
    saved = _last(folder, epochs)
    search = build_one_stage(config, dataset, Compute(torch.device("cpu")), Ranks())
    with _of_this_job():
        search.load_state_dict(saved["search"])
    return absorb_into_batchnorm(search.supernet)


def _last(folder: Path, epochs: int) -> dict[str, Any]:
    found = load_latest(folder)
    if found is None or Progress.from_state(found.state["progress"]).epochs != epochs:
        raise CheckpointError(
            f"{folder}: the last epoch's checkpoint is broken, the same command trains it again"
        )
    return found.state


def _load(store: Store, dataset: ImageDataset, ranks: Ranks) -> dict[str, Any] | None:
    """Rank 0's newest checkpoint, on every rank; all must look at the same pictures as it did."""
    ranks.check_same(f"data set {dataset.name}", dataset.digest)
    data = ranks.from_first(store.read)
    if data is None:
        return None
    saved = checkpoint.deserialize(data)
    check_same_data(saved, dataset)
    return saved


def _restore(job: EpochJob, saved: dict[str, Any]) -> Progress:
    """Have the job go on from a checkpoint; returns what is done.

    Raises:
        CheckpointError: the checkpoint is whole, but not one that this program wrote for this job.
    """
    with _of_this_job():
        job.load(saved)
        return Progress.from_state(saved["progress"])


@contextlib.contextmanager
def _of_this_job() -> Iterator[None]:
    """Turn what a whole checkpoint of another job, or of another program, makes fail into one line."""
    try:
        yield
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        RuntimeError,
        ArithmeticError,
    ) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"the newest checkpoint is none of this job ({type(error).__name__}: {reason:.100}): --fresh starts over"
        ) from error


def _seed_epoch(config: Config, epoch: int, ranks: Ranks) -> None:
    """Seed what draws from the global generator (drop path), on every rank its own stream."""
    rank = (ranks.rank,) if ranks.rank else ()  # rank 0's is that of a run in one process
    torch.manual_seed(derive_seed(config.seed, "epoch", epoch, *rank))
