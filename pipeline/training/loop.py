"""The training loop that runs on every worker: the epochs of a job, checkpoints and resuming.

The same functions run in the user's process and on Ray Train's workers (`pipeline.cluster.launch`); torch's process
group tells them how many workers train together. A worker uses neither Ray nor MLflow nor the console: rank 0 passes
checkpoints to a `Store` and events to an `Observer`. After each epoch, the checkpoint is written before the observer is
called, so that every event that an observer has received can be reported again after a kill.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from istanas.data import ImageDataset
from istanas.distributed import Ranks
from istanas.errors import CheckpointError, DivergedError
from istanas.nets import TargetNetwork, absorb_into_batchnorm
from istanas.seeds import derive_seed
from istanas.space import Genotype
from istanas.training import Compute, Totals
from pipeline.base.text import count
from pipeline.config.schema import Config, RuntimeSettings
from pipeline.runs import checkpoint
from pipeline.runs.checkpoint import Store
from pipeline.training.build import build_search, build_target, ema_model, ema_network
from pipeline.training.compute import compute_for, describe_place
from pipeline.training.data_workers import report_lost_workers
from pipeline.training.epoch_record import EpochRecord, Progress, Rollback, load_latest
from pipeline.training.epochs import (
    EpochJob,
    EpochResult,
    RetrainJob,
    SearchJob,
    check_same_genotype,
)
from pipeline.training.observer import Observer, Silent
from pipeline.training.pictures import check_same_data, data_digest


def search_worker(config: Config, dataset: ImageDataset, store: Store, observer: Observer) -> Progress:
    """Run or resume a search, together with the other ranks of torch's process group if there is one.

    Args:
        config: The whole configuration; its method selects the search.
        dataset: The data set from `open_dataset`.
        store: Checkpoint store; only rank 0's is used. The last checkpoint of a search that trains its network
            contains it, see `searched_network`.
        observer: Receives the events; only rank 0's is used.

    Returns:
        The last epoch's record, whose genotype is the result, and sums over all epochs.
    """

    def make(compute: Compute, ranks: Ranks) -> EpochJob:
        return SearchJob(config, dataset, compute, ranks)

    digest = data_digest(config, dataset, "search")
    return _run_epochs(make, config, dataset, digest, store, observer)


def retrain_worker(
    config: Config, dataset: ImageDataset, store: Store, observer: Observer, genotype: Genotype
) -> Progress:
    """Run or resume the training of a genotype's network from scratch, together with the other ranks if there are any.

    Args:
        config: The whole configuration.
        dataset: The data set from `open_dataset`.
        store: Checkpoint store; only rank 0's is used. The last checkpoint contains the trained network, see
            `trained_network`.
        observer: Receives the events; only rank 0's is used.
        genotype: The cells.

    Returns:
        The last epoch's record, which has the test metrics, and sums over all epochs.
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
    job, progress = start_or_resume(make, dataset, store, compute, ranks)
    observer.note(describe_place(compute, ranks))
    observer.resumed(progress, ranks.size)
    rollbacks: tuple[Rollback, ...] = ()  # diverged attempts at the next epoch
    while not job.is_done(progress):
        epoch = progress.epochs
        seed_epoch(config, epoch, ranks)

        def on_step(step: int, n_steps: int, totals: Totals, epoch: int = epoch) -> None:
            on_cpu = compute.device.type == "cpu"
            observer.step(epoch, step, n_steps, totals.metrics if on_cpu else lambda: None)

        start = time.perf_counter()
        n_rollbacks = progress.rollbacks + len(rollbacks)
        with report_lost_workers(config.runtime.data_workers):
            result = _attempt(job, epoch, on_step, 0.5**n_rollbacks)
        seconds = time.perf_counter() - start
        if isinstance(result, DivergedError):
            _check_rollback(config.runtime, result, epoch, n_rollbacks)
            rollbacks = (*rollbacks, Rollback(reason=str(result), lr_factor=0.5 ** (n_rollbacks + 1)))
            del job  # two networks may not fit on a GPU
            job, progress = start_or_resume(make, dataset, store, compute, ranks)
            observer.note(_describe_rollback(config.runtime, result, epoch, n_rollbacks + 1))
            continue
        if n_rollbacks > 0:
            result.metrics["train/rollbacks"] = float(n_rollbacks)
        progress = record_epoch(
            job, progress, result, seconds, digest, store, ranks=ranks, rollbacks=rollbacks
        )
        rollbacks = ()
        observer.epoch_done(progress)
        if not ranks.from_first(observer.should_continue):
            break
    return progress


def record_epoch(
    job: EpochJob,
    progress: Progress,
    result: EpochResult,
    seconds: float,
    digest: str,
    store: Store,
    *,
    ranks: Ranks,
    rollbacks: tuple[Rollback, ...] = (),
) -> Progress:
    """Write the checkpoint of a finished epoch, and return the progress after it.

    Args:
        job: The job after the epoch.
        progress: The progress before it.
        result: The results of the epoch.
        seconds: Its duration.
        digest: Digest of the pictures, see `data_digest`.
        store: Checkpoint store; only rank 0's is used.
        ranks: The processes that trained together.
        rollbacks: The diverged attempts at the epoch.
    """
    epoch = progress.epochs + 1  # counted from 1, like MLflow's steps
    record = EpochRecord(
        epoch=epoch,
        timestamp_ms=int(time.time() * 1000),
        seconds=seconds,
        workers=ranks.size,
        metrics=result.metrics,
        rollbacks=rollbacks,
        search=result.search,
    )
    offset = progress.log.offset
    progress, line = progress.after(record)
    if ranks.is_first:
        state = {**job.state(), "progress": progress.to_state(), "data": digest}
        store.write(epoch, checkpoint.serialize(state), line, offset)
    return progress


Job = TypeVar("Job", bound=EpochJob)


def start_or_resume(
    make: Callable[[Compute, Ranks], Job],
    dataset: ImageDataset,
    store: Store,
    compute: Compute,
    ranks: Ranks,
) -> tuple[Job, Progress]:
    """Return the job and its progress, restored from the newest checkpoint if there is one."""
    job = make(compute, ranks)
    saved = _load(store, dataset, ranks)
    if saved is None:
        return job, Progress()
    return job, _restore(job, saved)


def _attempt(
    job: EpochJob, epoch: int, on_step: Callable[[int, int, Totals], None], lr_factor: float
) -> EpochResult | DivergedError:
    """Return the epoch's result; if a rank diverged, return the error on every rank."""
    try:
        return job.run_epoch(epoch, on_step, lr_factor)
    except DivergedError as error:
        # A copy without the traceback, which would keep the network in memory.
        return DivergedError(error.problem, field=error.field, remedy=error.remedy)


def _check_rollback(settings: RuntimeSettings, error: DivergedError, epoch: int, before: int) -> None:
    """Check that a diverged run may be rolled back, and was not rolled back too often.

    Raises:
        DivergedError: It may not. The message names the epoch, the last good checkpoint and the remedy.
    """
    if settings.on_nan == "rollback" and before < settings.max_rollbacks:
        return
    last = f"the last good checkpoint is of epoch {epoch}" if epoch else "there is no checkpoint before it"
    if settings.on_nan == "rollback":
        times = count(before, "time")
        raise DivergedError(
            f"{error.problem}; it was rolled back {times}; {last}",
            field=error.field,
            remedy=f"raise runtime.max_rollbacks to continue, or {error.remedy}",
        )
    where = f"from epoch {epoch}" if epoch else "from the start"
    raise DivergedError(
        f"{error.problem}; {last}",
        field=error.field,
        remedy=f"{error.remedy}, or resume {where} at half the rate with --set runtime.on_nan=rollback",
    )


def _describe_rollback(settings: RuntimeSettings, error: DivergedError, epoch: int, number: int) -> str:
    to = f"the end of epoch {epoch}" if epoch else "the start"
    return (
        f"{error.problem}: rolled back to {to}, with half the learning rate "
        f"({0.5**number:g} of the configured one; rollback {number} of {settings.max_rollbacks})"
    )


def trained_network(config: Config, genotype: Genotype, dataset: ImageDataset, folder: Path) -> TargetNetwork:
    """Return the network of a finished retraining in eval mode, with the last epoch's weights or their average.

    Args:
        config: The whole configuration.
        genotype: The cells.
        dataset: The data set that it was trained on.
        folder: Folder of the checkpoints.

    Raises:
        CheckpointError: If the last epoch's checkpoint is missing or damaged.
    """
    saved = _last(folder, config.retrain.epochs)
    net = build_target(config, genotype, dataset)
    with _mismatch_as_checkpoint_error():
        check_same_genotype(saved, genotype)
        net.load_state_dict(saved["net"])
        if config.retrain.ema_decay > 0:
            ema = ema_model(net, config.retrain.ema_decay)
            ema.load_state_dict(saved["ema"])
            net = ema_network(ema)
    return net.eval()


def searched_network(config: Config, dataset: ImageDataset, folder: Path, epochs: int) -> TargetNetwork:
    """Return the network of a finished search that has trained it: absorbed, on the CPU, in eval mode.

    Args:
        config: The whole configuration.
        dataset: The data set that it was trained on.
        folder: Folder of the checkpoints.
        epochs: Number of epochs of the search.

    Raises:
        CheckpointError: If the last epoch's checkpoint is missing or damaged, or belongs to another search.
        ConfigError: If a node is still ACTIVE.
    """
    saved = _last(folder, epochs)
    search = build_search(config, dataset, Compute(torch.device("cpu")), Ranks())
    with _mismatch_as_checkpoint_error():
        search.load_state_dict(saved["search"])
    return absorb_into_batchnorm(search.supernet)


def searched_job(config: Config, dataset: ImageDataset, folder: Path, epochs: int) -> SearchJob:
    """Return a finished search as it was after its last epoch.

    Args, Raises: See `searched_network`.
    """
    saved = _last(folder, epochs)
    compute = compute_for(config.runtime)
    job = SearchJob(config, dataset, compute, Ranks.current(compute.device))
    with _mismatch_as_checkpoint_error():
        job.load(saved)
    return job


def _last(folder: Path, epochs: int) -> dict[str, Any]:
    found = load_latest(folder)
    if found is None or Progress.from_state(found.state["progress"]).epochs != epochs:
        raise CheckpointError(
            "the last epoch's checkpoint is missing or damaged",
            field=str(folder),
            remedy="run the same command again to train it",
        )
    return found.state


def _load(store: Store, dataset: ImageDataset, ranks: Ranks) -> dict[str, Any] | None:
    """Check that all ranks have the checkpoint's pictures, and return rank 0's newest checkpoint on each."""
    ranks.check_same(f"data set {dataset.name}", dataset.digest)
    data = ranks.from_first(store.read)
    if data is None:
        return None
    saved = checkpoint.deserialize(data)
    check_same_data(saved, dataset)
    return saved


def _restore(job: EpochJob, saved: dict[str, Any]) -> Progress:
    """Restore the job from a checkpoint, and return its progress.

    Raises:
        CheckpointError: If the checkpoint is intact, but was not written for this job.
    """
    with _mismatch_as_checkpoint_error():
        job.load(saved)
        return Progress.from_state(saved["progress"])


@contextlib.contextmanager
def _mismatch_as_checkpoint_error() -> Iterator[None]:
    """Convert the errors that an intact checkpoint of another job or program causes to a CheckpointError."""
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
            f"the newest checkpoint does not belong to this job ({type(error).__name__}: {reason:.100})",
            remedy="start over with --fresh",
        ) from error


def seed_epoch(config: Config, epoch: int, ranks: Ranks) -> None:
    """Seed the global generator, from which drop path draws, with a different stream on every rank."""
    rank = (ranks.rank,) if ranks.rank else ()  # rank 0 draws the same numbers as a run in one process
    torch.manual_seed(derive_seed(config.seed, "epoch", epoch, *rank))
