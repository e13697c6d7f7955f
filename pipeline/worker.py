"""What runs on every worker: device, backend and precision (one function), data, the epochs of a job, resume.

The same functions run in the user's process and on Ray Train's workers (`pipeline.launch`); how many train
together they learn from torch's process group. A worker knows no Ray, no MLflow and no console: rank 0 gives
checkpoints to a `Store` and tells an `Observer` what happened. The order after each epoch is checkpoint first,
observer second, so that whatever an observer has seen can be told again after a kill.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from istanas.data import (
    Augmentation,
    ImageDataset,
    batches,
    load_dataset,
    stratified_split,
    stratified_subset,
)
from istanas.distributed import Ranks
from istanas.errors import CheckpointError, ConfigError
from istanas.measure import target_cost
from istanas.nets import MIN_IMAGE_SIZE, Supernet, TargetNet, to_channels_last
from istanas.search import TwoStageSearch, TwoStageSettings
from istanas.space import Genotype
from istanas.training import (
    Compute,
    Metrics,
    Totals,
    check_finite,
    derive_seed,
    evaluate,
    learning_rate,
    train_target_epoch,
)
from pipeline import checkpoint
from pipeline.checkpoint import Store
from pipeline.config import Config, RuntimeSettings
from pipeline.resources import count, threads_in_process, usable_cores

Record = dict[
    str, Any
]  # of one epoch: epoch, timestamp_ms, seconds, workers, metrics, and for a search nodes and genotype


class Observer(Protocol):
    """Who wants to know how a job goes."""

    def note(self, text: str) -> None:
        """Called with a line for people."""

    def resumed(self, history: list[Record], workers: int) -> None:
        """Called before the first epoch of `workers` workers, with the epochs of the checkpoint (none: a new run)."""

    def step(self, epoch: int, step: int, n_steps: int, read: Callable[[], Metrics]) -> None:
        """Called after every training step (epochs from 0, steps from 1); `read` waits for the device."""

    def epoch_done(self, history: list[Record]) -> None:
        """Called after every epoch, its checkpoint written; the last record is the new one."""

    def go_on(self) -> bool:
        """Called after every epoch; False ends these workers' part of the job here, for others to go on."""


class Silent:
    """The observer of every rank but the first."""

    def note(self, text: str) -> None:
        pass

    def resumed(self, history: list[Record], workers: int) -> None:
        pass

    def step(self, epoch: int, step: int, n_steps: int, read: Callable[[], Metrics]) -> None:
        pass

    def epoch_done(self, history: list[Record]) -> None:
        pass

    def go_on(self) -> bool:
        return True


@dataclass(frozen=True)
class SearchSplit:
    """Indices into the training pictures: for the weights, for the alphas."""

    weights: torch.Tensor
    alphas: torch.Tensor


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
        torch.set_float32_matmul_precision("high")  # TF32 where float32 is left
        torch.backends.cudnn.benchmark = True
    return compute


def describe_place(compute: Compute, ranks: Ranks) -> str:
    """One line for people: who computes, on what, with how many threads."""
    threads = f"{count(torch.get_num_threads(), 'thread')}, {count(usable_cores(), 'core')} on this machine"
    if not dist.is_initialized():
        return f"in this process, {compute.device.type}, {threads}"
    return f"{count(ranks.size, 'worker')} ({compute.device.type}, {compute.backend}), each {threads}"


def open_dataset(
    config: Config, jobs: Sequence[str], progress: Callable[[int, int], None] | None = None
) -> ImageDataset:
    """Load the data set and check the settings of the jobs to come ("search", "retrain") against it.

    Raises:
        DataError: if the data is missing or broken.
        ConfigError: if the settings do not fit it.
    """
    d = config.data
    dataset = load_dataset(
        d.name,
        root=d.root,
        download=d.download,
        cache_dir=d.cache_dir,
        image_size=d.image_size,
        progress=progress,
    )
    side = min(dataset.height, dataset.width)
    if side < MIN_IMAGE_SIZE:
        raise ConfigError(
            f"data.image_size: pictures of {d.name} are {dataset.height}x{dataset.width}, networks need at least "
            f"{MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE}: set data.image_size"
        )
    workers = config.runtime.worker_range.maximum
    for job in jobs:
        cutout, batch_size = getattr(config, job).cutout, getattr(config, job).batch_size
        if cutout > side:
            raise ConfigError(f"{job}.cutout is {cutout}, above the pictures' side of {side}: lower it")
        if batch_size < 2 * workers:  # batch norm needs two pictures
            raise ConfigError(
                f"{job}.batch_size is {batch_size}, of all workers together: {workers} need at least {2 * workers}, "
                "raise it or lower runtime.workers"
            )
    holdout = holdout_indices(config, dataset)
    if holdout is not None and len(holdout) == 0:
        raise ConfigError(
            f"data.holdout is {config.data.holdout}: of {len(dataset.train)} pictures it keeps none, raise it or set 0"
        )
    return dataset


def check_same_data(saved: dict[str, Any], dataset: ImageDataset) -> None:
    """Refuse to go on with other pictures than a checkpoint was made from.

    Raises:
        CheckpointError: if the data set's digest differs.
    """
    if saved.get("data") != dataset.digest:
        raise CheckpointError(
            f"data set {dataset.name} has changed since the checkpoint of this run, "
            "restore it or start over with --fresh"
        )


def training_indices(config: Config, dataset: ImageDataset) -> torch.Tensor:
    """The training pictures that may be trained on: all but the hold-out."""
    labels = dataset.train.labels
    if config.data.holdout == 0:
        return torch.arange(len(labels))
    return stratified_split(labels, config.data.holdout, derive_seed(config.seed, "holdout"))[0]


def holdout_indices(config: Config, dataset: ImageDataset) -> torch.Tensor | None:
    """The training pictures kept for choosing, or None."""
    if config.data.holdout == 0:
        return None
    return stratified_split(dataset.train.labels, config.data.holdout, derive_seed(config.seed, "holdout"))[1]


def search_split(config: Config, dataset: ImageDataset) -> SearchSplit:
    """Weight and alpha parts of the training pictures: stratified, seeded, disjoint.

    Raises:
        ConfigError: if a part would be empty.
    """
    s = config.search
    usable = training_indices(config, dataset)
    if s.max_pictures is not None:
        if s.max_pictures > len(usable):
            raise ConfigError(
                f"search.max_pictures is {s.max_pictures}, above the {len(usable)} there are: lower it"
            )
        labels = dataset.train.labels[usable]
        usable = usable[stratified_subset(labels, s.max_pictures, derive_seed(config.seed, "subset"))]
    seed = derive_seed(config.seed, "split")
    weights, alphas = stratified_split(dataset.train.labels[usable], s.alpha_fraction, seed)
    if len(weights) == 0 or len(alphas) == 0:
        raise ConfigError(
            f"search.alpha_fraction is {s.alpha_fraction}: of {len(usable)} pictures it leaves {len(weights)} for the "
            f"weights and {len(alphas)} for the alphas, choose another"
        )
    return SearchSplit(usable[weights], usable[alphas])


def genotype_cost(config: Config, dataset: ImageDataset, genotype: Genotype) -> dict[str, float]:
    """Parameters and multiply-adds of the target network under the retraining's settings."""
    r = config.retrain
    cost = target_cost(
        genotype,
        init_channels=r.init_channels,
        layers=r.layers,
        num_classes=dataset.num_classes,
        shape=(dataset.channels, dataset.height, dataset.width),
        stem=r.stem,
        op_batchnorm=r.op_batchnorm,
    )
    return {"target/params": float(cost.params), "target/macs": float(cost.macs)}


class _Batches:
    """Makes this rank's batches of a job: every pass follows from (seed, purpose, epoch, rank)."""

    def __init__(
        self,
        config: Config,
        dataset: ImageDataset,
        compute: Compute,
        ranks: Ranks,
        batch_size: int,
        cutout: int,
    ) -> None:
        self._dataset, self._compute, self._ranks, self._batch_size = dataset, compute, ranks, batch_size
        self._seed, self._workers = config.seed, config.runtime.data_workers
        self._augmentation = Augmentation(config.data.crop_padding, config.data.horizontal_flip, cutout)

    def training(self, purpose: str, indices: torch.Tensor, epoch: int) -> Any:
        """Shuffled and augmented."""
        return batches(
            self._dataset,
            "train",
            indices,
            batch_size=self._batch_size,
            augmentation=self._augmentation,
            device=self._compute.device,
            seed=derive_seed(self._seed, purpose),
            epoch=epoch,
            shuffle=True,
            # A rank's last batch of one picture has no variance for batch norm to divide by.
            drop_last=0 < len(indices) % self._batch_size < 2 * self._ranks.size
            and len(indices) > self._batch_size,
            rank=self._ranks.rank,
            world_size=self._ranks.size,
            workers=self._workers,
        )

    def measuring(self, split: Any, indices: torch.Tensor | None) -> Any:
        """In order, only normalised."""
        return batches(
            self._dataset,
            split,
            indices,
            batch_size=max(self._batch_size, 256),
            augmentation=None,
            device=self._compute.device,
            seed=0,
            epoch=0,
            shuffle=False,
            rank=self._ranks.rank,
            world_size=self._ranks.size,
            workers=self._workers,
        )


def build_search(config: Config, dataset: ImageDataset, compute: Compute, ranks: Ranks) -> TwoStageSearch:
    """The search at its start."""
    s, space = config.search, config.space
    torch.manual_seed(derive_seed(config.seed, "init"))
    supernet = Supernet(
        space.cell_space(),
        s.init_channels,
        s.layers,
        dataset.num_classes,
        n_measurements=space.n_measurements,
        stem=s.stem,
        in_channels=dataset.channels,
    )
    to_channels_last(supernet.to(compute.device))
    settings = TwoStageSettings(
        epochs=s.epochs,
        lr=s.lr,
        lr_min=s.lr_min,
        momentum=s.momentum,
        weight_decay=s.weight_decay,
        grad_clip=s.grad_clip,
        arch_lr=s.arch_lr,
        arch_betas=(s.arch_betas[0], s.arch_betas[1]),
        arch_weight_decay=s.arch_weight_decay,
        n_measurements=space.n_measurements,
        matrix=space.matrix,
        matrix_seed=config.matrix_seed,
        l1_weight=space.l1_weight,
        solver=space.solver,
        termination_tol=s.termination_tol,
    )
    return TwoStageSearch(supernet, settings, compute, config.seed, ranks)


def search_worker(config: Config, dataset: ImageDataset, store: Store, observer: Observer) -> list[Record]:
    """Run (or go on with) a two-stage search, with the other ranks of torch's process group if there is one.

    Args:
        config: the whole configuration.
        dataset: as `open_dataset` gives it.
        store: of checkpoints; only rank 0's is used.
        observer: told of every step and epoch; only rank 0's is.

    Returns:
        One record an epoch; the last one's genotype is the result.
    """
    compute = compute_for(config.runtime)
    ranks = Ranks.current(compute.device)
    observer = observer if ranks.is_first else Silent()
    split = search_split(config, dataset)
    search = build_search(config, dataset, compute, ranks)
    history: list[Record] = []
    saved = _load(store, dataset, ranks)
    if saved is not None:
        search.load_state_dict(saved["search"])
        history = saved["history"]
    observer.note(describe_place(compute, ranks))
    observer.resumed(history, ranks.size)
    source = _Batches(config, dataset, compute, ranks, config.search.batch_size, config.search.cutout)
    while search.epoch < config.search.epochs and not (history and history[-1]["converged"]):
        epoch = search.epoch
        _seed_epoch(config, epoch, ranks)
        weight_batches = source.training("weights", split.weights, epoch)
        n_steps = len(weight_batches)

        passes = itertools.count()  # over an alpha half that is shorter than the weight half

        def alpha_batches(epoch: int = epoch, passes: Iterator[int] = passes) -> Any:
            n = next(passes)
            return source.training("alphas" if n == 0 else f"alphas/{n}", split.alphas, epoch)

        def observe(step: int, totals: Totals, epoch: int = epoch, n_steps: int = n_steps) -> None:
            observer.step(epoch, step, n_steps, totals.metrics)

        start = time.perf_counter()
        train = search.train_epoch(weight_batches, alpha_batches, n_steps, observe)
        seconds = time.perf_counter() - start
        check_finite(train, search.supernet.parameters(), epoch + 1)
        genotype_trained = search.supernet.genotype()
        valid = search.validate(source.measuring("train", split.alphas))
        recovery = search.recover()
        genotype = search.supernet.genotype()
        metrics = {
            **_named("train", train),
            **_named("valid", valid),
            **recovery.metrics(),
            "arch/skip_ratio": genotype.skip_ratio(),
            "arch/frozen_nodes": 0.0,  # nodes freeze in one-stage search only
            **genotype_cost(config, dataset, genotype),
            # Each step takes a weight batch and an alpha batch through the network.
            "images_per_second": 2 * train.count / seconds,
        }
        record = _record(epoch + 1, metrics, time.perf_counter() - start, ranks)
        if epoch == 0:
            record["start_nodes"] = search.first_recovery.to_rows()
        record["nodes"] = recovery.to_rows()
        record["trained_genotype"] = genotype_trained.to_json()
        record["genotype"] = genotype.to_json()
        record["converged"] = search.has_converged(recovery)
        history.append(record)
        if ranks.is_first:
            state = {"search": search.state_dict(), "history": history, "data": dataset.digest}
            store.write(search.epoch, checkpoint.serialize(state))
        observer.epoch_done(history)
        if not ranks.from_first(observer.go_on):
            break
    return history


def build_target(config: Config, genotype: Genotype, dataset: ImageDataset) -> TargetNet:
    """The network that a retraining trains, freshly initialised."""
    r = config.retrain
    torch.manual_seed(derive_seed(config.seed, "init"))
    return TargetNet(
        genotype,
        r.init_channels,
        r.layers,
        dataset.num_classes,
        stem=r.stem,
        auxiliary=r.auxiliary_weight > 0,
        op_batchnorm=r.op_batchnorm,
        in_channels=dataset.channels,
    )


def retrain_worker(
    config: Config, dataset: ImageDataset, store: Store, observer: Observer, genotype: Genotype
) -> list[Record]:
    """Train (or go on training) the network of a genotype from scratch, with the other ranks if there are any.

    Args:
        config: the whole configuration.
        dataset: as `open_dataset` gives it.
        store: of checkpoints; only rank 0's is used. The last one holds the trained network, see `trained_network`.
        observer: told of every step and epoch; only rank 0's is.
        genotype: the cells.

    Returns:
        One record an epoch; the last one holds the test figures.
    """
    r = config.retrain
    compute = compute_for(config.runtime)
    ranks = Ranks.current(compute.device)
    observer = observer if ranks.is_first else Silent()
    net = build_target(config, genotype, dataset)
    to_channels_last(net.to(compute.device))
    optimizer = torch.optim.SGD(
        net.parameters(),
        r.lr,
        momentum=r.momentum,
        weight_decay=r.weight_decay,
        nesterov=r.nesterov,
        fused=compute.device.type == "cuda",
    )
    history: list[Record] = []
    saved = _load(store, dataset, ranks)
    if saved is not None:
        check_same_genotype(saved, genotype)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        history = saved["history"]
    observer.note(describe_place(compute, ranks))
    observer.resumed(history, ranks.size)
    indices, holdout = training_indices(config, dataset), holdout_indices(config, dataset)
    source = _Batches(config, dataset, compute, ranks, r.batch_size, r.cutout)
    cost = genotype_cost(config, dataset, genotype)
    for epoch in range(len(history), r.epochs):
        _seed_epoch(config, epoch, ranks)
        net.drop_path_prob = r.drop_path * epoch / r.epochs
        train_batches = source.training("retrain", indices, epoch)
        n_steps = len(train_batches)

        def lr_at(step: int, epoch: int = epoch, n_steps: int = n_steps) -> float:
            progress = (epoch + step / n_steps) / r.epochs
            return learning_rate(
                r.lr, r.lr_min, progress, schedule=r.schedule, warmup=r.warmup_epochs / r.epochs
            )

        def observe(step: int, totals: Totals, epoch: int = epoch, n_steps: int = n_steps) -> None:
            observer.step(epoch, step, n_steps, totals.metrics)

        start = time.perf_counter()
        train = train_target_epoch(
            net,
            optimizer,
            train_batches,
            compute,
            lr_at=lr_at,
            auxiliary_weight=r.auxiliary_weight,
            label_smoothing=r.label_smoothing,
            grad_clip=r.grad_clip,
            observe=observe,
            ranks=ranks,
        )
        seconds = time.perf_counter() - start
        check_finite(train, net.parameters(), epoch + 1)
        net.eval()
        metrics = {**_named("train", train), **cost, "images_per_second": train.count / seconds}
        if holdout is not None:
            metrics.update(_named("valid", evaluate(net, source.measuring("train", holdout), compute, ranks)))
        if (epoch + 1) % r.test_every == 0 or epoch + 1 == r.epochs:
            metrics.update(_named("test", evaluate(net, source.measuring("test", None), compute, ranks)))
        history.append(_record(epoch + 1, metrics, time.perf_counter() - start, ranks))
        if ranks.is_first:
            state = {
                "kind": "retrain",
                "genotype": genotype.to_json(),
                "net": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "history": history,
                "data": dataset.digest,
            }
            store.write(epoch + 1, checkpoint.serialize(state))
        observer.epoch_done(history)
        if not ranks.from_first(observer.go_on):
            break
    return history


def trained_network(config: Config, genotype: Genotype, dataset: ImageDataset, folder: Path) -> TargetNet:
    """The network that a finished retraining left in its folder, with the last epoch's weights, in eval mode.

    Raises:
        CheckpointError: if the last epoch's checkpoint is not there or not whole.
    """
    saved = checkpoint.load_latest(folder)
    if saved is None or len(saved["history"]) != config.retrain.epochs:
        raise CheckpointError(
            f"{folder}: the last epoch's checkpoint is broken, the same command trains it again"
        )
    check_same_genotype(saved, genotype)
    net = build_target(config, genotype, dataset)
    net.load_state_dict(saved["net"])
    return net.eval()


def check_same_genotype(saved: dict[str, Any], genotype: Genotype) -> None:
    """Refuse to go on from another network's checkpoint.

    Raises:
        CheckpointError: if it is not of this genotype's retraining.
    """
    if saved.get("kind") != "retrain" or saved["genotype"] != genotype.to_json():
        raise CheckpointError("the checkpoint is not of this genotype's retraining, use --fresh")


def _load(store: Store, dataset: ImageDataset, ranks: Ranks) -> dict[str, Any] | None:
    """Rank 0's newest checkpoint, on every rank; all must look at the same pictures as it did."""
    ranks.check_same(f"data set {dataset.name}", dataset.digest)
    data = ranks.from_first(store.read)
    if data is None:
        return None
    saved = checkpoint.deserialize(data)
    check_same_data(saved, dataset)
    return saved


def _seed_epoch(config: Config, epoch: int, ranks: Ranks) -> None:
    """Seed what draws from the global generator (drop path), on every rank its own stream."""
    rank = (ranks.rank,) if ranks.rank else ()  # rank 0's is that of a run in one process
    torch.manual_seed(derive_seed(config.seed, "epoch", epoch, *rank))


def _named(split: str, metrics: Metrics) -> dict[str, float]:
    return {f"{split}/loss": metrics.loss, f"{split}/top1": metrics.top1}


def _record(epoch: int, metrics: dict[str, float], seconds: float, ranks: Ranks) -> Record:
    """One epoch's record; `epoch` counts the epochs done, from 1, as people and MLflow's steps do."""
    return {
        "epoch": epoch,
        "timestamp_ms": int(time.time() * 1000),
        "seconds": seconds,
        "workers": ranks.size,
        "metrics": metrics,
    }
