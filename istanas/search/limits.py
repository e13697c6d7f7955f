"""Limits of an architecture's cost, and the architecture that costs least."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from istanas.effects.choice import best_architecture
from istanas.effects.coding import supports_of
from istanas.measure import Cost
from istanas.settings import CostSettings
from istanas.space import Genotype, SearchSpace
from istanas.sparse.lasso import Array


class Excess(NamedTuple):
    """A limit that an architecture exceeds: the setting, and a text."""

    limit: str
    text: str


def has_limits(settings: CostSettings) -> bool:
    """Return whether the settings have any limit."""
    return settings.max_params is not None or settings.max_macs is not None


def exceeded(settings: CostSettings, cost: Cost) -> Excess | None:
    """Return a limit that a cost exceeds, or `None`.

    Example:
        >>> exceeded(CostSettings(max_params=10), Cost(params=11, macs=5)).text
        '11 parameters are above max_params = 10'
    """
    for value, limit, name, unit in (
        (cost.params, settings.max_params, "max_params", "parameters"),
        (cost.macs, settings.max_macs, "max_macs", "multiply-adds"),
    ):
        if limit is not None and value > limit:
            return Excess(name, f"{value:,} {unit} are above {name} = {limit:,}")
    return None


def cheapest(space: SearchSpace, costs: dict[str, tuple[Array, ...]]) -> Genotype:
    """Return the architecture with the smallest sum of its candidates' costs.

    Args:
        space: The search space.
        costs: For each kind and decision the costs of its candidates.

    Example:
        >>> from istanas.space import NasBench201Space
        >>> costs = {"cell": tuple(np.array([1.0, 2.0, 3.0, 4.0, 0.5]) for _ in range(6))}
        >>> set(cheapest(NasBench201Space(), costs).operations())
        {'avg_pool_3x3'}
    """
    flat = np.concatenate([costs[kind][index] for kind in space.kinds for index in range(len(costs[kind]))])
    return space.genotype(supports_of(space, best_architecture(space, -flat)))
