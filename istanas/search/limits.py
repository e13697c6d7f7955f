"""Limits of an architecture's cost, and how an architecture that exceeds them is made cheaper."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from istanas.errors import ConfigError
from istanas.measure import Cost
from istanas.settings import CostUnit, LimitSettings
from istanas.space import Decision, Genotype, SearchSpace
from istanas.space.base import Supports
from istanas.space.operations import NONE
from istanas.sparse.lasso import Array

CandidateCosts = Mapping[str, Sequence[Array]]
"""For each kind and decision the costs of its candidates, see `istanas.candidates.candidate_costs`."""


class Excess(NamedTuple):
    """A limit that an architecture exceeds: the setting, and a text."""

    limit: str
    text: str

    @property
    def unit(self) -> CostUnit:
        """The unit of the limit."""
        return "params" if self.limit == "max_params" else "macs"


def exceeded(settings: LimitSettings, cost: Cost) -> Excess | None:
    """Return a limit that a cost exceeds, or `None`.

    Example:
        >>> exceeded(LimitSettings(max_params=10), Cost(params=11, macs=5)).text
        '11 parameters are above max_params = 10'
    """
    for value, limit, name, unit in (
        (cost.params, settings.max_params, "max_params", "parameters"),
        (cost.macs, settings.max_macs, "max_macs", "multiply-adds"),
    ):
        if limit is not None and value > limit:
            return Excess(name, f"{value:,} {unit} are above {name} = {limit:,}")
    return None


def cheapest(space: SearchSpace, costs: CandidateCosts) -> dict[str, list[tuple[int, ...]]]:
    """Return the supports with the smallest sum of costs. Of candidates of equal cost, `none` comes last.

    Args:
        space: The search space.
        costs: The costs of its candidates.

    Example:
        >>> from istanas.space import NasBench201Space
        >>> costs = {"cell": [np.array([0.0, 0.0, 3.0, 4.0, 0.5])] * 6}  # none, skip_connect, ...
        >>> cheapest(NasBench201Space(), costs)["cell"]
        [(1,), (1,), (1,), (1,), (1,), (1,)]
    """
    from istanas.effects.choice import (
        best_architecture,  # imports scipy.stats, which most searches do not need
    )
    from istanas.effects.coding import supports_of

    flat = np.concatenate([np.asarray(costs[d.kind][d.index], np.float64) for d in space.all_decisions()])
    names = [operation for d in space.all_decisions() for operation, _ in d.candidates]
    tie = 1e-9 * max(float(flat.max()), 1.0) * np.array([name == NONE for name in names])
    found = supports_of(space, best_architecture(space, -(flat + tie)))
    return {kind: [tuple(support) for support in each] for kind, each in found.items()}


class Limits:
    """The limits of a search.

    Args:
        space: The search space.
        settings: The limits.
        cost: Returns the cost of a genotype's target network; `None` if there are no limits.
        candidate_costs: Returns the costs of candidates in a unit; `None` if nothing has to be made cheaper.
    """

    def __init__(
        self,
        space: SearchSpace,
        settings: LimitSettings,
        cost: Callable[[Genotype], Cost] | None,
        candidate_costs: Callable[[CostUnit], CandidateCosts] | None,
    ) -> None:
        self._space, self._settings, self._cost, self._candidate_costs = (
            space,
            settings,
            cost,
            candidate_costs,
        )

    @property
    def exist(self) -> bool:
        """Whether there is a limit."""
        return self._settings.max_params is not None or self._settings.max_macs is not None

    def costs_in(self, unit: CostUnit) -> CandidateCosts:
        """Return the costs of candidates in a unit."""
        assert self._candidate_costs is not None, (
            "limits and weights of costs require the costs of candidates"
        )
        return self._candidate_costs(unit)

    def excess(self, supports: Supports) -> Excess | None:
        """Return a limit that an architecture exceeds, or `None`."""
        if not self.exist:
            return None
        return exceeded(self._settings, self._cost_of(supports))

    def check(self) -> None:
        """Check that the cheapest architecture is within the limits.

        Raises:
            ConfigError: If it is not.
        """
        units: tuple[tuple[CostUnit, str], ...] = (("params", "max_params"), ("macs", "max_macs"))
        for unit, limit in units:
            if (most := getattr(self._settings, limit)) is None:
                continue
            least = getattr(self._cost_of(cheapest(self._space, self.costs_in(unit))), unit)
            if least > most:
                raise ConfigError(
                    f"{most:,} is below the cheapest architecture, which has {least:,}",
                    field=limit,
                    remedy=f"use {least:,} or more, or a smaller network",
                )

    def within(
        self, supports: Supports, magnitudes: Mapping[str, Sequence[Any]]
    ) -> dict[str, list[tuple[int, ...]]]:
        """Exchange kept candidates for cheaper ones until an architecture is within the limits.

        Each exchange is the one that loses the least magnitude for what it saves. If no exchange saves anything, parts
        of the network that no candidate reads may still cost something: then the result is the cheapest architecture,
        which `check` has compared with the limits.

        Args:
            supports: The architecture.
            magnitudes: For each kind and decision how much speaks for each candidate, (n,), such as |z|.
        """
        kept = {kind: [tuple(support) for support in each] for kind, each in supports.items()}
        while (found := self.excess(kept)) is not None:
            costs = self.costs_in(found.unit)
            options = [
                (lost / saved, decision.kind, decision.index, support)
                for decision in self._space.all_decisions()
                for lost, saved, support in exchanges(
                    decision,
                    kept[decision.kind][decision.index],
                    [float(each) for each in magnitudes[decision.kind][decision.index]],
                    costs[decision.kind][decision.index],
                )
            ]
            if not options:
                return cheapest(self._space, costs)
            _, kind, index, support = min(options)
            kept[kind][index] = support
        return kept

    def _cost_of(self, supports: Supports) -> Cost:
        assert self._cost is not None, "limits require a cost"
        return self._cost(self._space.genotype(supports))


def exchanges(
    decision: Decision, support: Sequence[int], magnitudes: Sequence[float], costs: Array
) -> Iterator[tuple[float, float, tuple[int, ...]]]:
    """Yield the exchanges of a kept candidate for a cheaper one, other than `none`.

    Args:
        decision: The decision.
        support: Its kept candidates.
        magnitudes: How much speaks for each candidate, (n,).
        costs: The costs of its candidates, (n,).

    Yields:
        The lost magnitude (>= 0), the saved cost (> 0), and the new support.

    Example:
        >>> pair = Decision("node", 0, (("a", 0), ("b", 0), ("c", 0)), sparsity=1)
        >>> list(exchanges(pair, (0,), [3.0, 1.0, 2.0], np.array([5.0, 1.0, 7.0])))
        [(2.0, 4.0, (1,))]
    """
    for kept in support:
        others = [c for c in support if c != kept]
        taken = {decision.edges[c] for c in others} if decision.one_per_edge else set()
        for candidate, (operation, _) in enumerate(decision.candidates):
            saved = float(costs[kept] - costs[candidate])
            free = candidate not in others and decision.edges[candidate] not in taken
            if saved > 0 and free and operation != NONE:
                lost = max(magnitudes[kept] - magnitudes[candidate], 0.0)
                yield lost, saved, tuple(sorted([*others, candidate]))


DRAWS = (
    1000  # random architectures for each one that is wanted, before the limits count as too low for chance
)


def within_limits(
    limits: Limits, space: SearchSpace, draws: Iterator[Supports], wanted: int
) -> Iterator[dict[str, list[tuple[int, ...]]]]:
    """Yield random architectures within the limits.

    After 1,000 draws for each wanted one, the others are exchanged for cheaper candidates at random instead of drawn,
    so that the search ends.

    Args:
        limits: The limits.
        space: The search space.
        draws: Random architectures without end.
        wanted: Number of architectures.
    """
    equal = {kind: [np.zeros(d.n_candidates) for d in each] for kind, each in space.decisions.items()}
    found = 0
    for number, supports in enumerate(draws):
        tired = number >= DRAWS * wanted
        if tired or limits.excess(supports) is None:
            yield limits.within(supports, equal)
            found += 1
        if found == wanted:
            return
