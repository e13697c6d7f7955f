"""DARTS: a softmax over the operations of each edge, trained by first-order or second-order alternating steps.

This module does no I/O: the caller passes batches and stores the results.

Source:
    Liu, Simonyan, Yang, DARTS: Differentiable Architecture Search, ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from istanas.data import Batch
from istanas.search.softmax import SoftmaxSearch
from istanas.settings import DartsSettings
from istanas.training import BatchLike, Totals, cross_entropy, without_gradients

FINITE_DIFFERENCE = 0.01
"""Euclidean length of the step of the finite difference, as published."""


class DartsSearch(SoftmaxSearch[DartsSettings]):
    """DARTS: its state, its steps and its epochs. For the arguments see `Search`.

    The weight of operation o on edge e is exp(alpha_e,o) / sum over o' of exp(alpha_e,o'). With `second_order`, the
    alphas follow the gradient of L_valid(w', alpha), where w' is w after a step of SGD with momentum on L_train:

        grad_alpha L_valid(w', alpha) - xi (grad_alpha L_train(w+, alpha) - grad_alpha L_train(w-, alpha)) / (2 eps)

    with w+- = w +- eps grad_w' L_valid(w', alpha), eps = 0.01 / ||grad_w' L_valid(w', alpha)||_2, and xi the learning
    rate of the weights.

    Differences from the published code: the operation `none` is not a candidate in the DARTS space; the learning rate
    falls step by step; each pass over the alpha half uses every picture once.

    Example:
        >>> from istanas.nets import Supernet
        >>> from istanas.space import CellSpace
        >>> from istanas.training import Compute
        >>> from istanas.training import Compute
        >>> net = Supernet(CellSpace(n_nodes=2), 2, 3, 10, alpha_size=lambda decision: decision.n_candidates)
        >>> search = DartsSearch(net, DartsSettings(epochs=1), Compute(torch.device("cpu")), seed=0)
        >>> batch = (torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
        >>> search.train_epoch([batch], lambda: [batch], n_steps=1).count
        2
        >>> [len(node.picks) for node in search.finish_epoch().nodes]
        [2, 2, 2, 2]

    Source:
        Liu, Simonyan, Yang, DARTS: Differentiable Architecture Search, ICLR 2019.
    """

    kind = "darts"

    def step(self, batch: BatchLike, alpha_batch: BatchLike | None, totals: Totals) -> None:
        """Run an alpha step and then a weight step, see `AlternatingSearch.step`."""
        if alpha_batch is None or not self.settings.second_order:
            super().step(batch, alpha_batch, totals)
            return
        self.unrolled_alpha_step(alpha_batch, batch)
        self.weight_step(batch, totals)

    def unrolled_alpha_step(self, alpha_batch: BatchLike, batch: BatchLike) -> None:
        """Run one Adam step on the alphas with their second-order gradient.

        Args:
            alpha_batch: The batch of L_valid.
            batch: The batch of L_train, which the next weight step uses, too.
        """
        weights, alphas = self.supernet.active_parameters(), self.supernet.active_alphas()
        xi = self.weight_optimizer.param_groups[0]["lr"]
        before = copies(weights)
        self._move_one_step(weights, batch, xi)
        statistics = copies(self.supernet.active_buffers())
        self._backward(self._forward_for_both, alpha_batch)
        directions, gradients = gradients_of(weights), gradients_of(alphas)
        # The weights of one step ahead are not the network's, and leave no trace in its running statistics.
        restore(self.supernet.active_buffers(), statistics)
        seconds = self._second_derivatives(weights, before, directions, batch)
        for b, first, second in zip(alphas, gradients, seconds, strict=True):
            b.grad = first - xi * second
        self.before_alpha_update()
        self.alpha_optimizer.step()

    def _move_one_step(self, weights: Sequence[Tensor], batch: BatchLike, xi: float) -> None:
        """Move the weights by one step of SGD with momentum on L_train, without a change of the momentum."""
        with torch.no_grad():
            edge_weights = self.supernet.edge_weights()
        self._backward(self._forward_for_weights, batch, edge_weights)
        s, state = self.settings, self.weight_optimizer.state
        with torch.no_grad():
            for w in weights:
                assert w.grad is not None
                step = w.grad + s.weight_decay * w
                momentum = state.get(w, {}).get("momentum_buffer")
                w -= xi * (step if momentum is None else step + s.momentum * momentum)

    def _second_derivatives(
        self,
        weights: Sequence[Tensor],
        values: Sequence[Tensor],
        directions: Sequence[Tensor],
        batch: BatchLike,
    ) -> list[Tensor]:
        """Return the derivative of grad_alpha L_train along a direction of the weights, by a central difference.

        Args:
            weights: The weights.
            values: Values of the weights at which the derivative is taken, and which the weights have afterwards.
            directions: The direction, a tensor for each weight.
            batch: The batch of L_train.
        """
        eps = FINITE_DIFFERENCE / torch.cat([d.flatten() for d in directions]).norm()
        sides = []
        for sign in (1.0, -1.0):
            restore(weights, [v + sign * eps * d for v, d in zip(values, directions, strict=True)])
            with without_gradients(self.weights):
                self._backward(self._forward_for_alphas, batch)
            sides.append(gradients_of(self.supernet.active_alphas()))
        restore(weights, values)
        return [(plus - minus) / (2 * eps) for plus, minus in zip(*sides, strict=True)]

    def _backward(self, forward: object, batch: BatchLike, *arguments: object) -> None:
        """Compute new gradients of the loss on a batch."""
        images, target, weight = Batch(*batch)
        with self.compute.autocast():
            logits = forward(images, *arguments)  # type: ignore[operator]
        self.weight_optimizer.zero_grad(set_to_none=True)
        self.alpha_optimizer.zero_grad(set_to_none=True)
        (cross_entropy(logits, target) * weight).backward()

    def _wrap(self) -> None:
        super()._wrap()
        if self.settings.second_order:
            both = [*self.supernet.active_parameters(), *self.supernet.active_alphas()]
            self._forward_for_both = self.ranks.data_parallel(self.supernet, both)


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of tensors, without gradients."""
    return [t.detach().clone() for t in tensors]


def gradients_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of the gradients of tensors, which all have one."""
    return copies([t.grad for t in tensors if t.grad is not None])


def restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Give tensors these values."""
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
