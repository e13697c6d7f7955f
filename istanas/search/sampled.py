"""A search whose steps each compute an architecture of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from istanas.nets.networks import Support
from istanas.search.alternating import AlternatingSearch
from istanas.settings import AlternatingSettings
from istanas.training import derive_seed

Settings = TypeVar("Settings", bound=AlternatingSettings)
Supports = Mapping[str, Sequence[Support]]


class SampledSearch(AlternatingSearch[Settings]):
    """A search whose steps each install an architecture, which is the same on all ranks.

    The gradients of its parameters are averaged over the ranks after the backward pass. Other searches use functions of
    `Ranks.data_parallel` instead, which take too long to create in every step.
    """

    installed: Supports
    """The candidates that `install_unweighted` has installed."""

    _step = 0

    def begin_step(self, step: int, n_steps: int) -> None:
        """Remember the number of the step, from which its seeds are derived."""
        self._step = step

    def step_seed(self, purpose: str) -> int:
        """Return a seed of the current step, the same on all ranks."""
        return derive_seed(self.seed, self.kind, purpose, self.epoch, self._step)

    def after_backward(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average the gradients over the ranks."""
        self.ranks.average_gradients(parameters)

    def trained_buffers(self) -> list[Tensor]:
        """Return the running statistics of all operations, because the steps of an epoch compute different ones."""
        return [b for b in self.supernet.buffers() if b.is_floating_point()]

    def _wrap(self) -> None:
        """Use the network itself, because `after_backward` averages the gradients."""
        self._forward_for_weights = self._forward_for_alphas = self.supernet

    def unit_weights(self, kind: str, alphas: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return edge weights of 1 for the installed candidates of one kind, see `SearchNetwork.install`."""
        like = next(p for p in self.weights if p.is_floating_point())
        return [
            torch.ones(len(support), device=like.device, dtype=like.dtype) for support in self.installed[kind]
        ]

    def install_unweighted(self, supports: Supports) -> None:
        """Install candidates with edge weights of 1."""
        self.installed = supports
        self.supernet.install(supports, self.unit_weights)
