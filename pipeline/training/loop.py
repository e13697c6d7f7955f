"""The training loop that runs on every worker: data, the epochs of a job, checkpoints and resuming.

The same functions run in the user's process and on Ray Train's workers (`pipeline.cluster.launch`); how many train
together they learn from torch's process group. A worker knows no Ray, no MLflow and no console: rank 0 gives
checkpoints to a `Store` and tells an `Observer` what happened. The order after each epoch is checkpoint first,
observer second, so that whatever an observer has seen can be told again after a kill.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from istanas.data import ImageDataset
from istanas.distributed import Ranks
from istanas.errors import CheckpointError, DivergedError
from istanas.nets import TargetNet, absorb_into_batchnorm
from istanas.space import Genotype
from istanas.training import Compute, Totals, derive_seed
from pipeline.config.schema import Config, OneStageConfig, RuntimeSettings, TwoStageConfig
from pipeline.runs import checkpoint
from pipeline.runs.checkpoint import Store
from pipeline.training.build import build_one_stage, build_target
from pipeline.training.compute import compute_for, describe_place
from pipeline.training.data_workers import noticing_their_loss
from pipeline.training.epoch_record import EpochRecord, Progress, Rollback, load_latest
from pipeline.training.epochs import (
    EpochJob,
    Measured,
    OneStageJob,
    RetrainJob,
    TwoStageJob,
    check_same_genotype,
)
from pipeline.training.observer import Observer, Silent
from pipeline.training.pictures import check_same_data, data_digest


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
        if isinstance(found, DivergedError):
            _check_rollback(config.runtime, found, epoch, n_rollbacks)
            reason = f"{found.problem}, {found.remedy}"
            undone = (*undone, Rollback(reason=reason, lr_factor=0.5 ** (n_rollbacks + 1)))
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
) -> Measured | DivergedError:
    """Return what the epoch measured, or the error of its divergence, on every rank alike."""
    try:
        return job.run_epoch(epoch, tell, lr_factor)
    except DivergedError as error:
        return error.with_traceback(None)  # Its traceback would keep the network in memory.


def _check_rollback(settings: RuntimeSettings, error: DivergedError, epoch: int, before: int) -> None:
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
    raise DivergedError(f"{error.problem}, {error.remedy}; {last}: {remedy}")


def _describe_rollback(settings: RuntimeSettings, error: DivergedError, epoch: int, number: int) -> str:
    to = f"the end of epoch {epoch}" if epoch else "the start"
    return (
        f"{error.problem}: rolled back to {to}, with half the learning rate "
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
