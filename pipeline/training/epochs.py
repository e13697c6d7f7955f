"""The epochs of each kind of job, and the state of its checkpoints."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from istanas.data import ImageDataset, stratified_subset
from istanas.data.mixing import mixing
from istanas.distributed import Ranks
from istanas.errors import CheckpointError
from istanas.measure import Cost
from istanas.nets import absorb_into_batchnorm, to_channels_last
from istanas.search import RecoveryReport, Search
from istanas.seeds import derive_seed
from istanas.space import Genotype
from istanas.training import (
    Compute,
    Metrics,
    Totals,
    check_finite,
    evaluate,
    learning_rate,
    train_target_epoch,
)
from pipeline.config.schema import Config, RetrainSettings
from pipeline.training.build import build_retraining, build_search, ema_model, ema_network, network_cost
from pipeline.training.compute import compiled
from pipeline.training.epoch_record import Progress, SearchRecord
from pipeline.training.pictures import Batches, retrain_augmentation, search_augmentation
from pipeline.training.splits import splits_of

OnStep = Callable[[int, int, Totals], None]
"""Called after each training step with (steps done, steps of the epoch, totals so far)."""


class EpochResult(NamedTuple):
    """The results of an epoch: its metrics, and for a search the state of the nodes."""

    metrics: dict[str, float]
    search: SearchRecord | None = None


class EpochJob(Protocol):
    """A job that is trained epoch by epoch."""

    def load(self, saved: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""

    def is_done(self, progress: Progress) -> bool:
        """Return whether no epoch is left."""

    def run_epoch(self, epoch: int, on_step: OnStep, lr_factor: float) -> EpochResult:
        """Train epoch `epoch` (from 0) and measure.

        Raises:
            DivergedError: If a rank diverged; all ranks raise it. Afterwards, a new job must load a checkpoint.
        """

    def state(self) -> dict[str, Any]:
        """Return the state from which `load` resumes with identical results."""


class SearchJob:
    """A search, including the training of the network that it found if the method trains it."""

    def __init__(self, config: Config, dataset: ImageDataset, compute: Compute, ranks: Ranks) -> None:
        self._config, self._dataset, self._compute, self._ranks = config, dataset, compute, ranks
        self._splits = splits_of(config, dataset, "search")
        self.search = build_search(config, dataset, compute, ranks)
        self._batches = Batches(
            config, dataset, compute, ranks, config.search.batch_size, search_augmentation(config)
        )

    def load(self, saved: dict[str, Any]) -> None:
        self.search.load_state_dict(saved["search"])

    def is_done(self, progress: Progress) -> bool:
        converged = progress.last is not None and progress.last.found().converged
        return self.search.is_done or converged

    def run_epoch(self, epoch: int, on_step: OnStep, lr_factor: float) -> EpochResult:
        searching = self.search.is_searching
        metrics = self._train_and_validate(epoch, on_step, lr_factor)
        trained = self.search.trained_genotype()
        return self._result(epoch, metrics, trained, self.search.finish_epoch(), searching=searching)

    def _train_and_validate(self, epoch: int, on_step: OnStep, lr_factor: float) -> dict[str, float]:
        """Train an epoch, and return its metrics and those of the pictures for choosing."""
        metrics = self._train(epoch, on_step, lr_factor)
        choosing = self.choosing()
        validated = self.search.validate_epoch(choosing) if choosing is not None and metrics else None
        return metrics if validated is None else metrics | _named("valid", validated)

    def _result(
        self,
        epoch: int,
        metrics: dict[str, float],
        trained: Genotype,
        recovery: RecoveryReport,
        *,
        searching: bool,
    ) -> EpochResult:
        """Return the result of an epoch that trained an architecture and ended with a choice."""
        search = self.search
        genotype = search.genotype()
        assert search.cost is not None
        metrics = metrics | {
            **recovery.metrics(),
            "arch/skip_ratio": genotype.skip_ratio(),
            **search.metrics(),
            **_cost_metrics(search.cost(genotype)),
        }
        if search.trained is not None and is_tested(*search.trained, self._config.search.test_interval):
            metrics |= _named("test", self._test())
        frozen = search.freezings
        found = SearchRecord(
            nodes=tuple(recovery.nodes),
            trained_genotype=trained.to_json(),
            genotype=genotype.to_json(),
            start_nodes=tuple(search.first_recovery.nodes) if epoch == 0 else (),
            converged=search.has_converged(recovery),
            searching=searching,
            rejection=recovery.rejection,
            frozen=None if frozen is None else tuple(frozen),
        )
        return EpochResult(metrics, found)

    def choosing(self) -> _Choosing | None:
        """Return the pictures for choosing: the alpha half, otherwise the hold-out; `None` if there is neither."""
        splits = self._splits
        indices = splits.alphas if splits.alphas is not None else splits.holdout
        if indices is None:
            return None
        labels = self._dataset.train.labels[indices]
        return _Choosing(
            self.search,
            self._batches,
            indices,
            labels,
            splits.training,
            derive_seed(self._config.seed, "choosing"),
        )

    def _train(self, epoch: int, on_step: OnStep, lr_factor: float) -> dict[str, float]:
        """Train an epoch and return its metrics; there are none if the method trains nothing."""
        search, alphas = self.search, self._splits.alphas
        pass_over = search.picture_epoch(epoch)
        batches = self._batches.training("weights", self._splits.training, pass_over)
        n_steps = len(batches)
        passes = itertools.count()  # an alpha half that is shorter than the weight half is used several times

        def alpha_batches(passes: Iterator[int] = passes) -> Any:
            n = next(passes)
            purpose = "alphas" if n == 0 else f"alphas/{n}"
            return self._batches.training(purpose, self._splits.alpha_half(), pass_over)

        start = time.perf_counter()
        train = search.train_epoch(
            batches,
            None if alphas is None else alpha_batches,
            n_steps,
            lambda step, totals: on_step(step, n_steps, totals),
            lr_factor=lr_factor,
        )
        seconds = time.perf_counter() - start
        if train is None:
            return {}
        if not search.accepts_divergence:
            _check_finite(self._config, train, search.supernet, epoch, search.ranks)
        # If the alphas are trained, each step trains on a weight batch and an alpha batch.
        n_pictures = train.count if next(passes) == 0 else 2 * train.count
        return {**_named("train", train), "images_per_second": n_pictures / seconds}

    def _test(self) -> Metrics:
        """Measure the network, as it would be exported now, on the test split."""
        net = to_channels_last(absorb_into_batchnorm(self.search.supernet))
        return evaluate(net, self._batches.measuring("test", None), self._compute, self._ranks)

    def state(self) -> dict[str, Any]:
        return {"search": self.search.state_dict()}


@dataclass(frozen=True)
class _Choosing:
    """The pictures for choosing at the end of an epoch, see `istanas.search.base.Choosing`."""

    search: Search[Any]
    batches: Batches
    indices: torch.Tensor
    labels: torch.Tensor
    weight_indices: torch.Tensor
    seed: int

    def __call__(self) -> Metrics:
        return self.search.validate(self.batches.measuring("train", self.indices))

    def pictures(self, count: int | None = None) -> Any:
        chosen = self.indices
        if count is not None and count < len(chosen):
            chosen = chosen[stratified_subset(self.labels, count, self.seed)]
        return self.batches.shuffled("choosing", chosen)

    def training(self) -> Any:
        return self.batches.shuffled("statistics", self.weight_indices)


class RetrainJob:
    """Training of a genotype's network from scratch."""

    def __init__(
        self, config: Config, dataset: ImageDataset, compute: Compute, ranks: Ranks, genotype: Genotype
    ) -> None:
        self._config, self._compute, self._ranks, self._genotype = config, compute, ranks, genotype
        r = config.retrain
        self._net, self._optimizer = build_retraining(config, genotype, dataset, compute)
        self._splits = splits_of(config, dataset, "retrain")
        self._batches = Batches(config, dataset, compute, ranks, r.batch_size, retrain_augmentation(config))
        self._mix = mixing(r.mixup, r.cutmix, dataset.num_classes)
        self._forward = compiled(config.runtime, compute, self._net.forward_with_auxiliary)
        self._ema = ema_model(self._net, r.ema_decay) if r.ema_decay > 0 else None
        self._cost = _cost_metrics(network_cost(config, r, dataset, genotype))

    def load(self, saved: dict[str, Any]) -> None:
        check_same_genotype(saved, self._genotype)
        self._net.load_state_dict(saved["net"])
        self._optimizer.load_state_dict(saved["optimizer"])
        if self._ema is not None:
            self._ema.load_state_dict(saved["ema"])

    def is_done(self, progress: Progress) -> bool:
        return progress.epochs >= self._config.retrain.epochs

    def run_epoch(self, epoch: int, on_step: OnStep, lr_factor: float) -> EpochResult:
        r, net = self._config.retrain, self._net
        net.drop_path_prob = r.drop_path * epoch / r.epochs
        batches = self._batches.training("retrain", self._splits.training, epoch)
        n_steps = len(batches)

        def after_step(step: int, totals: Totals) -> None:
            if self._ema is not None:
                self._ema.update_parameters(net)
            on_step(step, n_steps, totals)

        start = time.perf_counter()
        train = train_target_epoch(
            net,
            self._optimizer,
            batches,
            self._compute,
            lr_at=lambda step: lr_factor * retraining_rate(r, epoch + step / n_steps),
            auxiliary_weight=r.auxiliary_weight,
            label_smoothing=r.label_smoothing,
            grad_clip=r.grad_clip,
            observe=after_step,
            ranks=self._ranks,
            mix=self._mix,
            forward=self._forward,
        )
        seconds = time.perf_counter() - start
        _check_finite(self._config, train, net, epoch, self._ranks)
        net.eval()
        if self._ema is not None:
            self._ema.eval()
            self._ranks.average(ema_network(self._ema).active_buffers())
        metrics = {**_named("train", train), **self._cost, "images_per_second": train.count / seconds}
        if self._splits.holdout is not None:
            metrics |= _named("valid", self._measure("train", self._splits.holdout))
        if is_tested(epoch + 1, r.epochs, r.test_every):
            metrics |= _named("test", self._measure("test", None))
        return EpochResult(metrics)

    def _measure(self, split: str, indices: torch.Tensor | None) -> Metrics:
        net = self._net if self._ema is None else ema_network(self._ema)
        return evaluate(net, self._batches.measuring(split, indices), self._compute, self._ranks)

    def state(self) -> dict[str, Any]:
        return {
            "kind": "retrain",
            "genotype": self._genotype.to_json(),
            "net": self._net.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            **({} if self._ema is None else {"ema": self._ema.state_dict()}),
        }


def retraining_rate(r: RetrainSettings, epoch: float) -> float:
    """Return the learning rate of a retraining after `epoch` epochs, which may include a share of the current one."""
    return learning_rate(r.lr, r.lr_min, epoch, r.epochs, schedule=r.schedule, warmup_epochs=r.warmup_epochs)


def is_tested(done: int, epochs: int, every: int) -> bool:
    """Return whether the test split is measured after `done` of `epochs` training epochs.

    Example:
        >>> [is_tested(done, 5, 2) for done in range(6)], is_tested(5, 5, 0)
        ([False, False, True, False, True, True], False)
    """
    return every > 0 and (done == epochs or (done > 0 and done % every == 0))


def check_same_genotype(saved: dict[str, Any], genotype: Genotype) -> None:
    """Check that a checkpoint belongs to the retraining of a genotype.

    Raises:
        CheckpointError: If it does not.
    """
    if saved.get("kind") != "retrain" or saved["genotype"] != genotype.to_json():
        raise CheckpointError(
            "the checkpoint does not belong to the retraining of this genotype",
            remedy="start over with --fresh",
        )


def _check_finite(config: Config, train: Metrics, net: torch.nn.Module, epoch: int, ranks: Ranks) -> None:
    check_finite(train, net.parameters(), epoch + 1, max_loss=config.runtime.max_loss, ranks=ranks)


def _cost_metrics(cost: Cost) -> dict[str, float]:
    counted = {"target/params": float(cost.params), "target/macs": float(cost.macs)}
    return counted if cost.latency is None else {**counted, "target/latency_ms": cost.latency}


def _named(split: str, metrics: Metrics) -> dict[str, float]:
    named = {f"{split}/loss": metrics.loss, f"{split}/top1": metrics.top1}
    return named if metrics.top5 is None else {**named, f"{split}/top5": metrics.top5}
