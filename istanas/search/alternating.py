"""A search that trains weights and alphas in turn: for every weight batch, an alpha step and then a weight step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from istanas.data import Batch
from istanas.errors import DataError
from istanas.search.base import Batches, Search
from istanas.settings import AlternatingSettings
from istanas.training import (
    BatchLike,
    Metrics,
    Observer,
    Totals,
    clip_gradients,
    cross_entropy,
    learning_rate,
    set_learning_rate,
    without_gradients,
)

Settings = TypeVar("Settings", bound=AlternatingSettings)


class AlternatingSearch(Search[Settings]):
    """The epochs and steps of a search that trains weights and alphas in turn.

    Source:
        The alternating optimisation is that of DARTS (Liu et al., ICLR 2019), first order.
    """

    @property
    def is_done(self) -> bool:
        """Whether no epoch is left."""
        return self.epoch >= self.settings.epochs

    @property
    def trains_alphas(self) -> bool:
        """Whether the steps of the current epoch train the alphas."""
        return True

    def train_epoch(
        self,
        weight_batches: Iterable[BatchLike],
        alpha_batches: Batches | None,
        n_steps: int,
        observe: Observer | None = None,
        *,
        lr_factor: float = 1.0,
    ) -> Metrics:
        """Run one epoch: for every weight batch, an alpha step on an alpha batch and then a weight step.

        Afterwards the running statistics of batch norm are averaged over the ranks.

        Args:
            weight_batches: Batches of the pictures that train the weights.
            alpha_batches: Returns the batches of one pass over the pictures that train the alphas. It is called again
                when a pass ends.
            n_steps: Number of weight batches, >= 1.
            observe: Called after every step.
            lr_factor: Factor of the weights' learning rate, > 0; below 1 after a divergence.

        Returns:
            Mean loss and accuracies of the weight steps, over the pictures of all ranks.

        Raises:
            DataError: If a pass over the pictures that train the alphas has no batch.
        """
        assert alpha_batches is not None, "the settings have an alpha_fraction"
        self.supernet.train()
        totals = Totals(self.compute.device)
        s = self.settings
        passes = endless(alpha_batches)
        for step, batch in enumerate(weight_batches):
            lr = lr_factor * learning_rate(s.lr, s.lr_min, self.epoch + step / n_steps, s.epochs)
            set_learning_rate(self.weight_optimizer, lr)
            self.begin_step(step, n_steps)
            self.step(batch, next(passes) if self.trains_alphas else None, totals)
            if observe is not None:
                observe(step + 1, totals)
        self.ranks.average(self.trained_buffers())
        self.epoch += 1
        metrics = totals.metrics(self.ranks)
        self.end_steps()
        return metrics

    def train_step(self, batch: BatchLike, alpha_batch: BatchLike | None) -> None:
        """Run one step of an epoch, to measure its time."""
        assert alpha_batch is not None, "the settings have an alpha_fraction"
        self.begin_step(0, 1)
        self.step(batch, alpha_batch if self.trains_alphas else None, Totals(self.compute.device))

    def begin_step(self, step: int, n_steps: int) -> None:
        """Prepare a step, such as by choosing the operations that it computes. By default nothing is done.

        Args:
            step: Number of the step in its epoch, from 0.
            n_steps: Number of steps of the epoch.
        """

    def end_steps(self) -> None:
        """Install what an epoch is measured with, after its last step. By default nothing is done."""

    def step(self, batch: BatchLike, alpha_batch: BatchLike | None, totals: Totals) -> None:
        """Run an alpha step and then a weight step.

        Args:
            batch: The batch that trains the weights.
            alpha_batch: The batch that trains the alphas; `None` leaves them unchanged.
            totals: The totals to which the weight step is added.
        """
        if alpha_batch is not None:
            self.alpha_step(alpha_batch)
        self.weight_step(batch, totals)

    def after_backward(self, parameters: Sequence[nn.Parameter]) -> None:
        """Change the gradients of these parameters before they are used. By default nothing is done.

        The backward pass of the forward functions of `_wrap` has averaged the gradients over the ranks already.
        """

    def before_alpha_update(self) -> None:
        """Change the gradients of the alphas, which are those over all ranks. By default nothing is done."""

    def trained_buffers(self) -> list[Tensor]:
        """Return the running statistics that the steps of an epoch have changed."""
        return self.supernet.active_buffers()

    def alpha_step(self, batch: BatchLike) -> None:
        """Run one Adam step on the alphas. Gradients of the weights are not computed."""
        images, target, weight = Batch(*batch)
        with without_gradients(self.weights):
            with self.compute.autocast():
                logits = self._forward_for_alphas(images)
            loss = cross_entropy(logits, target)
            self.alpha_optimizer.zero_grad(set_to_none=True)
            (loss * weight).backward()
        self.after_backward(self.supernet.active_alphas())
        self.before_alpha_update()
        self.alpha_optimizer.step()

    def weight_step(self, batch: BatchLike, totals: Totals) -> None:
        """Run one SGD step on the active weights. Gradients of the alphas are not computed.

        Inactive operations have no gradient (`None`), so that the optimiser changes neither their weights nor their
        momentum.
        """
        images, target, weight = Batch(*batch)
        with torch.no_grad():
            edge_weights = self.supernet.edge_weights()
        with self.compute.autocast():
            logits: Tensor = self._forward_for_weights(images, edge_weights)
        loss = cross_entropy(logits, target)
        self.weight_optimizer.zero_grad(set_to_none=True)
        (loss * weight).backward()
        active = self.supernet.active_parameters()
        self.after_backward(active)
        clip_gradients(active, self.settings.grad_clip)
        self.weight_optimizer.step()
        totals.add(loss, logits, target)

    def _wrap(self) -> None:
        """Create the forward functions that average the gradients of the active parameters over the ranks."""
        self._forward_for_weights = self.ranks.data_parallel(self.supernet, self.supernet.active_parameters())
        self._forward_for_alphas = self.ranks.data_parallel(self.supernet, self.supernet.active_alphas())


def endless(make_batches: Batches) -> Iterator[BatchLike]:
    """Yield the batches of one pass after another without end.

    Raises:
        DataError: If a pass has no batch, because the loop would then never yield.
    """
    while True:
        empty = True
        for batch in make_batches():
            empty = False
            yield batch
        if empty:
            raise DataError(
                "the alpha half has 0 batches", remedy="give it pictures, or use a smaller batch_size"
            )
