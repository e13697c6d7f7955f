"""Choices within a budget, against lists of all architectures."""

import numpy as np
import pytest

from istanas.effects import (
    Budget,
    balanced_design,
    best_architecture,
    count_within,
    layout,
    relaxed,
)
from istanas.errors import ConfigError
from istanas.space import SearchSpace
from tests.istanas.effects.spaces import NAS_BENCH_201, SMALL, SPACES
from tests.istanas.effects.test_choice import everything


def drawn_budget(space: SearchSpace, seed: int, share: float, n_limits: int) -> Budget:
    """Return limits that about this share of random architectures keeps, of costs of which some are equal."""
    rng = np.random.default_rng(seed)
    costs = rng.choice([0.0, 0.0, 1.0, 2.5, 7.0], size=(n_limits, layout(space).n_candidates))
    sums = [costs[:, list(kept)].sum(1) for kept in balanced_design(space, 60, seed)]
    return Budget(costs, np.quantile(sums, share, axis=0))


@pytest.mark.parametrize("space", [*SMALL.values(), NAS_BENCH_201], ids=[*SMALL, "nas_bench_201"])
@pytest.mark.parametrize("n_limits", [1, 2])
def test_the_best_within_a_budget_is_that_of_a_list_of_all(space: SearchSpace, n_limits: int) -> None:
    every = everything(space)
    for seed in range(2):
        budget = drawn_budget(space, seed, 0.4, n_limits)
        effects = np.random.default_rng(seed + 50).normal(size=layout(space).n_candidates)
        rows = np.array(every)
        inside = rows[(budget.costs[:, rows].sum(-1) <= budget.most[:, None]).all(0)]
        ranked = inside[np.argsort(-effects[inside].sum(1), kind="stable")]
        first, second = (tuple(row) for row in ranked[:2].tolist())
        assert best_architecture(space, effects, budget=budget) == first
        assert best_architecture(space, effects, budget=budget, excluded={first}) == second
        assert count_within(space, budget, 10**6) == len(inside)
        assert count_within(space, budget, 2) == 2


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_the_relaxation_keeps_the_budget_and_bounds_the_best(space: SearchSpace) -> None:
    budget = drawn_budget(space, 3, 0.2, 1)
    effects = np.random.default_rng(4).normal(size=(8, layout(space).n_candidates))
    prices, kept = relaxed(space, effects, budget)
    cost, limit = budget.joint
    assert all(budget.allows(tuple(row)) for row in kept.tolist())
    assert (prices > 0).any()
    for row, price, own in zip(effects, prices, kept, strict=True):
        best = best_architecture(space, row, budget=budget)
        bound = (row - price * cost)[own].sum() + price * limit
        assert row[own].sum() - 1e-9 <= row[list(best)].sum() <= bound + 1e-9


@pytest.mark.parametrize("name", ["nas_bench_201", "darts"])
def test_a_design_within_a_budget_is_distinct_and_varied(name: str) -> None:
    space = SPACES[name]
    budget = drawn_budget(space, 5, 0.2, 1)
    design = balanced_design(space, 12, 0, budget)
    assert all(budget.allows(kept) for kept in design)
    assert len(set(design)) == 12
    assert balanced_design(space, 5, 0, budget) == design[:5]
    plenty = Budget(budget.costs, np.array([1e9]))
    assert balanced_design(space, 5, 0, plenty) == balanced_design(space, 5, 0)
    even = Budget(budget.costs, budget.most, lambda kept: sum(kept) % 2 == 0)
    assert all(even.allows(kept) for kept in balanced_design(space, 3, 0, even))


def test_a_budget_that_no_architecture_keeps_is_an_error() -> None:
    budget = Budget(np.ones((1, layout(NAS_BENCH_201).n_candidates)), np.array([5.0]))
    with pytest.raises(ConfigError, match="no architecture of nas_bench_201 is within it"):
        best_architecture(NAS_BENCH_201, np.zeros(30), budget=budget)
