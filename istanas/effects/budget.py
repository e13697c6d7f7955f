"""Budgets: architectures whose candidates cost at most so much, and the best of them by Lagrangian relaxation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from istanas.effects.coding import Architecture, Array, heaviest, layout
from istanas.errors import ConfigError
from istanas.space.base import SearchSpace

_FACTOR, _GROWTHS, _HALVINGS = 4.0, 30, 40  # of the search for a multiplier


@dataclass(frozen=True, eq=False)
class Budget:
    """Upper limits on the sums of the costs of an architecture's candidates.

    Args:
        costs: Costs of all candidates for each of K limits, >= 0, (K, N).
        most: The limits, (K,).
        allowed: A further condition, which is only evaluated within the limits; `None` for none.

    Example:
        >>> budget = Budget(np.array([[1.0, 2.0, 3.0]]), np.array([2.0]))
        >>> budget.allows((1,)), budget.allows((2,))
        (True, False)
    """

    costs: Array
    most: Array
    allowed: Callable[[Architecture], bool] | None = None

    def allows(self, kept: Architecture) -> bool:
        """Return whether an architecture is within the limits."""
        within = bool((self.costs[:, list(kept)].sum(1) <= self.most).all())
        return within and (self.allowed is None or self.allowed(kept))

    @property
    def joint(self) -> tuple[Array, float]:
        """The costs, each divided by the largest one of its row, and summed, (N,); and the sum of the divided limits.

        An architecture within all limits is within this one, but not conversely.
        """
        highest = self.costs.max(1)
        scale = np.where(highest > 0, highest, 1.0)
        return (self.costs / scale[:, None]).sum(0), float((self.most / scale).sum())


def relaxed(space: SearchSpace, effects: Array, budget: Budget) -> tuple[Array, npt.NDArray[np.int64]]:
    """Return the multiplier of a budget for each row of effects, and the best architecture with this price of costs.

    With the joint cost c, an architecture x and its score e x, the multiplier is the smallest lambda >= 0 with which
    the best architecture by (e - lambda c) x is within the limits. No architecture within the limits has a score above
    (e - lambda c) x + lambda C, where C is the joint limit. So x is the best one if
    lambda (C - c x) is 0, and otherwise no architecture within the limits has a score above e x + lambda (C - c x).

    Args:
        space: The search space.
        effects: Effects of all candidates, (S, N).
        budget: The limits. The condition `allowed` is ignored.

    Returns:
        The multipliers, (S,), and the kept candidates in ascending order, (S, kept).

    Raises:
        ConfigError: If no architecture is within the limits.

    Example:
        >>> from istanas.space import NasBench201Space
        >>> budget = Budget(np.tile([0.0, 0.0, 1.0, 9.0, 0.0], (1, 6)), np.array([27.0]))
        >>> _, kept = relaxed(NasBench201Space(), np.tile([0.0, 1.0, 2.0, 3.0, 0.5], (1, 6)), budget)
        >>> kept.tolist()  # nor_conv_1x1 on all edges, which are alike, although two nor_conv_3x3 would fit
        [[2, 7, 12, 17, 22, 27]]

    Source: Everett, Generalized Lagrange multiplier method, Operations Research 1963.
    """
    numbering, (cost, _) = layout(space), budget.joint

    def within(weights: Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        kept = heaviest(numbering, effects - weights[:, None] * cost)
        return kept, (budget.costs[:, kept].sum(-1) <= budget.most[:, None]).all(0)

    low = np.zeros(len(effects))
    _, done = within(low)
    high = np.where(done, 0.0, np.ptp(effects, axis=1) + np.finfo(np.float64).tiny)
    for _ in range(_GROWTHS):
        _, done = within(high)
        if done.all():
            break
        high = np.where(done, high, _FACTOR * high)
    else:
        raise ConfigError(f"no architecture of {space.name} is within it", field="budget", remedy="raise it")
    for _ in range(_HALVINGS if high.any() else 0):
        middle = (low + high) / 2
        _, done = within(middle)
        low, high = np.where(done, low, middle), np.where(done, middle, high)
    kept, _ = within(high)
    return high, kept
