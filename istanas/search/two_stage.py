"""Two-stage ISTA-NAS: alternate alpha and weight steps on a sparse supernet, and recover the codes after each epoch.

This module does no I/O: the caller passes batches and stores the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from istanas.data import Batch
from istanas.distributed import Ranks
from istanas.errors import DataError
from istanas.nets import Supernet
from istanas.search.state import RecoveryReport, SearchState
from istanas.settings import TwoStageSettings
from istanas.training import (
    BatchLike,
    Compute,
    Metrics,
    Observer,
    Totals,
    clip_gradients,
    cross_entropy,
    evaluate,
    learning_rate,
    set_learning_rate,
    without_gradients,
)


class TwoStageSearch(SearchState):
    """A two-stage search: its state, its steps and its epochs.

    Args:
        supernet, settings, compute, seed, ranks: See `SearchState`.

    Example:
        >>> from istanas.space import CellSpace
        >>> net = Supernet(CellSpace(n_nodes=2), 2, 2, 10)
        >>> search = TwoStageSearch(net, TwoStageSettings(epochs=1), Compute(torch.device("cpu")), seed=0)
        >>> batch = (torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
        >>> search.train_epoch([batch], lambda: [batch], n_steps=1).count
        2
        >>> len(search.recover().nodes)
        4

    Source:
        Yang et al., ISTA-NAS, NeurIPS 2020.
    """

    kind = "two_stage"

    def __init__(
        self,
        supernet: Supernet,
        settings: TwoStageSettings,
        compute: Compute,
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(supernet, settings, compute, seed, ranks)
        self.settings = settings
        self.first_recovery = self.recover()

    def train_epoch(
        self,
        weight_batches: Iterable[BatchLike],
        alpha_batches: Callable[[], Iterable[BatchLike]],
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
        self.supernet.train()
        totals = Totals(self.compute.device)
        s = self.settings
        for step, (batch, alpha_batch) in enumerate(
            zip(weight_batches, endless(alpha_batches), strict=False)
        ):
            lr = lr_factor * learning_rate(s.lr, s.lr_min, self.epoch + step / n_steps, s.epochs)
            set_learning_rate(self.weight_optimizer, lr)
            self.alpha_step(alpha_batch)
            self.weight_step(batch, totals)
            if observe is not None:
                observe(step + 1, totals)
        self.ranks.average(self.supernet.active_buffers())
        self.epoch += 1
        return totals.metrics(self.ranks)

    def alpha_step(self, batch: BatchLike) -> None:
        """Run one Adam step on the compressed alphas. Gradients of the weights are not computed."""
        images, target, weight = Batch(*batch)
        with without_gradients(self.weights):
            with self.compute.autocast():
                logits = self._forward_for_alphas(images)
            loss = cross_entropy(logits, target)
            self.alpha_optimizer.zero_grad(set_to_none=True)
            (loss * weight).backward()
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
            logits = self._forward_for_weights(images, edge_weights)
        loss = cross_entropy(logits, target)
        self.weight_optimizer.zero_grad(set_to_none=True)
        (loss * weight).backward()
        clip_gradients(self.supernet.active_parameters(), self.settings.grad_clip)
        self.weight_optimizer.step()
        totals.add(loss, logits, target)

    def validate(self, batches: Iterable[BatchLike]) -> Metrics:
        """Return loss and accuracies of the active architecture in eval mode, over the pictures of all ranks."""
        self.supernet.eval()
        with torch.no_grad():
            edge_weights = self.supernet.edge_weights()

        def forward(images: Tensor) -> Tensor:
            logits: Tensor = self.supernet(images, edge_weights)
            return logits

        return evaluate(forward, batches, self.compute, self.ranks)

    def recover(self) -> RecoveryReport:
        """Recover every node's code from its b, and make the operations of its largest entries active.

        Rank 0 recovers the codes for all ranks.

        Returns:
            The changes and each node's certificate. Distances are 0 at the first recovery.

        Raises:
            SolverError: If no solver certifies the code of a node.
            IstanasError: If the ranks have different architectures.
        """
        recovered = self.recover_codes(self.places)
        self.install({new.place: new.code for new in recovered})
        return RecoveryReport(self.report(recovered))

    def _wrap(self) -> None:
        self._forward_for_weights = self.ranks.data_parallel(self.supernet, self.supernet.active_parameters())
        self._forward_for_alphas = self.ranks.data_parallel(self.supernet, self.supernet.active_alphas())

    def has_converged(self, report: RecoveryReport) -> bool:
        """Return whether every code moved by at most `termination_tol` in the last epoch."""
        tol = self.settings.termination_tol
        return tol is not None and all(node.distance <= tol for node in report.nodes)


def endless(make_batches: Callable[[], Iterable[BatchLike]]) -> Iterator[BatchLike]:
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
