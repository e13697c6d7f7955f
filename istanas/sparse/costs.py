"""Weights of the l1 norm from the costs of the candidates: what costs more needs more evidence to be kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from istanas.errors import ConfigError
from istanas.sparse.lasso import Array, as_float64


def cost_weights(
    costs: Sequence[Sequence[float] | npt.NDArray[Any]], cost_weight: float, *, field: str = "costs"
) -> list[Array]:
    """Return the weights c of `recover` from the costs of all candidates of a search.

        c_i = 1 + mu cost_i / mean(cost)

    The mean is over the candidates of all nodes, so that a multiply-add counts the same everywhere, and mu has no unit:
    at mu = 1, a candidate of average cost is penalised twice as much as one without cost.

    Args:
        costs: For each node the cost of each candidate, >= 0, in any unit.
        cost_weight: mu >= 0.
        field: Name of the costs in an error message.

    Returns:
        For each node the weights, >= 1. All are 1 if mu or all costs are 0.

    Raises:
        ConfigError: If mu or a cost is negative or not finite.

    Example:
        >>> [c.tolist() for c in cost_weights([[0.0, 3.0], [1.0]], 0.5)]
        [[1.0, 2.125], [1.375]]
    """
    if not (cost_weight >= 0 and np.isfinite(cost_weight)):
        raise ConfigError(f"{cost_weight} is not a number >= 0", field="cost_weight", remedy="use 0 or more")
    nodes = [as_float64(each) for each in costs]
    every = np.concatenate([np.ravel(each) for each in nodes]) if nodes else np.zeros(0)
    wrong = every[~((every >= 0) & np.isfinite(every))]
    if len(wrong):
        raise ConfigError(f"an entry is {wrong[0]}", field=field, remedy="give finite numbers >= 0")
    largest = float(every.max(initial=0.0))
    if cost_weight == 0 or largest == 0:
        return [np.ones_like(each) for each in nodes]
    mean = float((every / largest).mean())  # The scale of the costs has no influence, and must not overflow.
    return [1.0 + cost_weight * (each / largest / mean) for each in nodes]
