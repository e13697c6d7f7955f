"""Limits of an architecture's cost, and how an architecture that exceeds them is made cheaper."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from istanas.errors import ConfigError
from istanas.measure import Cost
from istanas.settings import CostUnit, LimitSettings
from istanas.space import Decision, Genotype, SearchSpace
from istanas.space.base import Supports
from istanas.space.operations import NONE
from istanas.sparse.lasso import Array

if TYPE_CHECKING:
    from istanas.effects.budget import Budget

_EXAMPLES = 5  # Architectures whose costs show that of the rest of the network.
_ROUNDING = 1e-6  # in parameters or multiply-adds: sums of whole numbers that were averaged are not exact.

CandidateCosts = Mapping[str, Sequence[Array]]
"""For each kind and decision the costs of its candidates, see `istanas.candidates.candidate_costs`."""

CostsOfCandidates = Callable[[CostUnit, bool], CandidateCosts]
"""Returns the costs of candidates in a unit, as the mean over their places or, if True, as the sum."""


class Limit(NamedTuple):
    """A setting that limits a cost: its name, the unit of the cost, and the unit in words."""

    setting: str
    unit: CostUnit
    words: str


LIMITS = (
    Limit("max_params", "params", "parameters"),
    Limit("max_macs", "macs", "multiply-adds"),
    Limit("max_latency_ms", "latency", "ms"),
)
"""The settings of `LimitSettings`."""


class Excess(NamedTuple):
    """A limit that an architecture exceeds: the setting, and a text."""

    limit: str
    text: str


def limits_of(settings: LimitSettings) -> list[tuple[Limit, float]]:
    """Return the limits that are set, with their values.

    Example:
        >>> [(limit.unit, most) for limit, most in limits_of(LimitSettings(max_macs=9))]
        [('macs', 9)]
    """
    values = ((limit, getattr(settings, limit.setting)) for limit in LIMITS)
    return [(limit, most) for limit, most in values if most is not None]


def exceeded(settings: LimitSettings, cost: Cost) -> Excess | None:
    """Return a limit that a cost exceeds, or `None`.

    Example:
        >>> exceeded(LimitSettings(max_params=10), Cost(params=11, macs=5)).text
        '11 parameters are above max_params = 10'
    """
    for limit, most in limits_of(settings):
        value = getattr(cost, limit.unit)
        if value > most:
            return Excess(
                limit.setting, f"{_shown(value)} {limit.words} are above {limit.setting} = {most:,}"
            )
    return None


def _shown(value: float) -> str:
    """Return a cost in words. A fraction is rounded up, so that the shown number is a limit that the cost keeps.

    Example:
        >>> _shown(1234567), _shown(1.23412)
        ('1,234,567', '1.235')
    """
    return f"{value:,}" if isinstance(value, int) else f"{math.ceil(value * 1000) / 1000:,}"


def flattened(space: SearchSpace, costs: CandidateCosts) -> Array:
    """Return the costs of all candidates, numbered consecutively, (N,)."""
    return np.concatenate([np.asarray(costs[d.kind][d.index], np.float64) for d in space.all_decisions()])


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
    # Imported here because of scipy.stats, which most searches do not need.
    from istanas.effects.choice import best_architecture
    from istanas.effects.coding import supports_of

    flat = flattened(space, costs)
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
        candidate_costs: CostsOfCandidates | None,
    ) -> None:
        self._space, self._settings = space, settings
        self._cost, self._candidate_costs = cost, candidate_costs

    @property
    def exist(self) -> bool:
        """Whether there is a limit."""
        return bool(limits_of(self._settings))

    def costs_in(self, unit: CostUnit, *, total: bool) -> CandidateCosts:
        """Return the costs of candidates in a unit, as the mean over their places, or in `total`."""
        assert self._candidate_costs is not None, "limits and weights require the costs of candidates"
        return self._candidate_costs(unit, total)

    def excess(self, supports: Supports) -> Excess | None:
        """Return a limit that an architecture exceeds, or `None`."""
        if not self.exist:
            return None
        return exceeded(self._settings, self._cost_of(supports))

    def check(self) -> None:
        """Check that there is an architecture within the limits.

        Raises:
            ConfigError: If none was found. With one limit, the message has the smallest cost that was found.
        """
        limits = limits_of(self._settings)
        for limit, most in limits:
            least = min(getattr(self._cost_of(each), limit.unit) for each in self._cheapest(limit.unit))
            if least > most:
                raise ConfigError(
                    f"{most:,} is below the cheapest architecture, which has {_shown(least)}",
                    field=limit.setting,
                    remedy=f"use {_shown(least)} or more, or a smaller network",
                )
        if len(limits) > 1 and not self._found_within():
            *others, last = (f"{most:,} {limit.words}" for limit, most in limits)
            raise ConfigError(
                f"no architecture was found that has at most {', '.join(others)} and {last}",
                field=limits[-1][0].setting,
                remedy=f"raise it or {limits[0][0].setting}, or use a smaller network",
            )

    def budget(self) -> Budget | None:
        """Return the limits as a budget of the candidates' costs, after `check`; `None` if there are none.

        The cost of a network is that of its candidates and that of the rest. The rest is the largest one of a few
        architectures: in one that reads a single state, parts of the network may not run. Such an architecture counts
        as if they did.

        Raises:
            ConfigError: If no architecture is within a limit when all parts of its network count.
        """
        # Imported here because most searches have no limits.
        from istanas.effects.budget import Budget
        from istanas.effects.coding import heaviest, layout, supports_of
        from istanas.effects.design import balanced_design

        if not self.exist:
            return None
        examples = balanced_design(self._space, _EXAMPLES, 0)
        costs, most = [], []
        for limit, value in limits_of(self._settings):
            each = flattened(self._space, self.costs_in(limit.unit, total=True))
            rest = max(
                getattr(self._cost_of(supports_of(self._space, kept)), limit.unit) - each[list(kept)].sum()
                for kept in examples
            )
            least = rest + each[heaviest(layout(self._space), -each)].sum()
            if least > value + _ROUNDING:
                shown = _shown(math.ceil(least) if isinstance(value, int) else float(least))
                raise ConfigError(
                    f"{value:,} is below the cheapest architecture in which all parts of the network run, which has "
                    f"{shown}",
                    field=limit.setting,
                    remedy=f"use {shown} or more, or another method",
                )
            costs.append(each)
            most.append(value - rest + _ROUNDING)
        return Budget(
            np.array(costs),
            np.array(most),
            lambda kept: self.excess(supports_of(self._space, kept)) is None,
        )

    def _found_within(self) -> list[dict[str, list[tuple[int, ...]]]]:
        """Return the cheapest architectures, in any unit, that are within the limits."""
        units: tuple[CostUnit, ...] = ("macs", "params")
        if self._settings.max_latency_ms is not None:
            units += ("latency",)
        return [each for unit in units for each in self._cheapest(unit) if self.excess(each) is None]

    def _cheapest(self, unit: CostUnit) -> Iterator[dict[str, list[tuple[int, ...]]]]:
        """Yield architectures with the smallest sums of costs: of all candidates, and of those that read one state.

        Where all decisions of a kind read the same state, parts of the network may not run, which costs less.
        """
        costs = self.costs_in(unit, total=True)
        highest = 1.0 + max(float(each.max()) for kind in costs for each in costs[kind])
        states: dict[str, list[int | None]] = {
            kind: [None, *sorted({state for _, state in each[0].candidates})]
            for kind, each in self._space.decisions.items()
        }
        for chosen in itertools.product(*states.values()):
            only = dict(zip(states, chosen, strict=True))
            yield cheapest(
                self._space,
                {
                    kind: [
                        np.asarray(costs[kind][d.index])
                        + highest * np.array([only[kind] not in (None, state) for _, state in d.candidates])
                        for d in each
                    ]
                    for kind, each in self._space.decisions.items()
                },
            )

    def within(
        self,
        supports: Supports,
        magnitudes: Mapping[str, Sequence[Any]],
        changeable: Collection[tuple[str, int]] | None = None,
    ) -> dict[str, list[tuple[int, ...]]]:
        """Exchange kept candidates for cheaper ones until an architecture is within the limits.

        An exchange saves some of the cost, in units of the limit; with two limits, some of the sum of both. It is the
        one that loses the least magnitude for what it saves. If there is none, the result is one of the cheapest
        architectures, as far as the decisions may change.

        Args:
            supports: The architecture.
            magnitudes: For each kind and decision how much speaks for each candidate, (n,), such as |z|.
            changeable: The decisions (kind, index) that may change; `None` for all. With fewer, the result may exceed a
                limit.
        """
        kept = {kind: [tuple(support) for support in each] for kind, each in supports.items()}
        decisions = self._space.all_decisions()
        free = {(d.kind, d.index) for d in decisions} if changeable is None else set(changeable)
        while self.excess(kept) is not None:
            options = [
                (lost / saved, decision.kind, decision.index, support)
                for decision in decisions
                if (decision.kind, decision.index) in free
                for lost, saved, support in exchanges(
                    decision,
                    kept[decision.kind][decision.index],
                    [float(each) for each in magnitudes[decision.kind][decision.index]],
                    self._relative_costs(decision),
                )
            ]
            if not options:
                for least in self._found_within()[:1]:
                    kept = {
                        kind: [least[kind][i] if (kind, i) in free else old for i, old in enumerate(each)]
                        for kind, each in kept.items()
                    }
                return kept
            _, kind, index, support = min(options)
            kept[kind][index] = support
        return kept

    def _relative_costs(self, decision: Decision) -> Array:
        """Return the costs of a decision's candidates as the sum of their shares of the limits.

        An exchange that saves some of this sum cannot be undone by a later one, so that exchanges end.
        """
        shares = [
            np.asarray(self.costs_in(limit.unit, total=True)[decision.kind][decision.index], dtype=np.float64)
            / most
            for limit, most in limits_of(self._settings)
        ]
        return np.asarray(sum(shares), dtype=np.float64)

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


MOST_FAILURES = 1000
"""Number of random architectures above the limits, after which further ones are made cheaper."""


def within_limits(
    limits: Limits, space: SearchSpace, draws: Iterator[Supports], wanted: int, seed: int
) -> Iterator[dict[str, list[tuple[int, ...]]]]:
    """Yield random architectures within the limits.

    After 1,000 draws above the limits, further ones are made cheaper by exchanges of candidates with random magnitudes,
    so that the search ends. Such architectures are no longer drawn uniformly.

    Args:
        limits: The limits.
        space: The search space.
        draws: Random architectures without end.
        wanted: Number of architectures.
        seed: Seed of the magnitudes.
    """
    rng, failures = np.random.Generator(np.random.PCG64(seed)), 0
    for _ in range(wanted):
        supports = next(draws)
        while limits.excess(supports) is not None and failures < MOST_FAILURES:
            supports, failures = next(draws), failures + 1
        magnitudes = {
            kind: [rng.random(d.n_candidates) for d in each] for kind, each in space.decisions.items()
        }
        yield limits.within(supports, magnitudes)
