from itertools import combinations, product
from typing import Any

import numpy as np
import pytest

from istanas.effects import (
    Architecture,
    Budget,
    Posterior,
    best_architecture,
    coded,
    improvement,
    layout,
    probability_best,
    ranked_architectures,
    thompson,
)
from istanas.errors import ConfigError
from istanas.space import SearchSpace
from tests.istanas.effects.spaces import NAS_BENCH_201, SMALL, SPACES, Blocks


def everything(space: SearchSpace) -> list[Architecture]:
    """Return all architectures by listing the supports of each decision."""
    choices = []
    for decision, part in zip(space.all_decisions(), layout(space).parts(), strict=True):
        own = [
            support
            for support in combinations(range(decision.n_candidates), decision.sparsity)
            if not decision.one_per_edge or len({decision.edges[c] for c in support}) == decision.sparsity
        ]
        choices.append([tuple(part.start + c for c in support) for support in own])
    return [tuple(c for part in parts for c in part) for parts in product(*choices)]


def posterior_of(draws: np.ndarray) -> Posterior:
    n = draws.shape[1]
    return Posterior(draws.mean(0), np.cov(draws.T), 1.0, 1.0, draws, np.ones(n))


def budget_of(space: SearchSpace, allowed: Any) -> Budget:
    return Budget(np.zeros((1, layout(space).n_candidates)), np.zeros(1), allowed)


@pytest.mark.parametrize("space", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("rounded", [False, True], ids=["distinct effects", "equal effects"])
def test_architectures_are_ranked_like_a_sorted_list_of_all(space: SearchSpace, rounded: bool) -> None:
    all_of_them = everything(space)
    for seed in range(2):
        effects = np.random.default_rng(seed).normal(size=layout(space).n_candidates)
        effects = effects.round() if rounded else effects
        ranked = list(ranked_architectures(space, effects))
        assert sorted(ranked) == sorted(all_of_them)
        values = np.array([effects[list(kept)].sum() for kept in ranked])
        np.testing.assert_allclose(values, np.sort(values)[::-1], atol=1e-12)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_the_best_is_best_in_each_decision(space: SearchSpace) -> None:
    effects = np.random.default_rng(1).normal(size=layout(space).n_candidates)
    best = best_architecture(space, effects)
    value = effects[list(best)].sum()
    for seed in range(200):
        supports = space.random_supports(seed)
        other = sum(
            effects[part.start + c]
            for part, support in zip(
                layout(space).parts(), [s for each in supports.values() for s in each], strict=True
            )
            for c in support
        )
        assert other <= value


def test_excluded_and_forbidden_architectures_are_passed_over() -> None:
    space = SMALL["blocks"]
    effects = np.random.default_rng(2).normal(size=11)
    ranked = list(ranked_architectures(space, effects))
    assert best_architecture(space, effects, excluded=set(ranked[:5])) == ranked[5]
    only = budget_of(space, lambda kept: kept in ranked[7:9])
    assert best_architecture(space, effects, budget=only) == ranked[7]
    with pytest.raises(ConfigError, match="no other architecture of blocks is left"):
        best_architecture(space, effects, excluded=ranked)


def test_thompson_sampling_measures_with_the_probability_of_being_best() -> None:
    """Over 2,000 choices, each frequency is within four standard errors of the probability that it is the best."""
    space = Blocks((3, 3), (1, 1))
    rng = np.random.default_rng(3)
    posterior = posterior_of(rng.normal(size=6) + 0.7 * rng.normal(size=(4000, 6)))
    considered = everything(space)
    probability = probability_best(space, posterior, considered)
    chosen = [thompson(space, posterior, 1, seed)[0] for seed in range(2000)]
    frequency = np.array([chosen.count(kept) for kept in considered]) / 2000
    assert np.ptp(probability) > 0.1
    assert (
        np.abs(frequency - probability) < 4 * np.sqrt(probability * (1 - probability) / 2000) + 1e-3
    ).all()


def test_free_places_get_different_architectures_that_are_not_pending() -> None:
    rng = np.random.default_rng(4)
    posterior = posterior_of(rng.normal(size=30) * 5 + 0.01 * rng.normal(size=(20, 30)))
    pending = {best_architecture(NAS_BENCH_201, posterior.mean)}
    chosen = thompson(NAS_BENCH_201, posterior, 8, seed=0, excluded=pending)
    assert len(set(chosen)) == 8
    assert not pending & set(chosen)
    assert thompson(NAS_BENCH_201, posterior, 8, seed=0, excluded=pending) == chosen
    # What is drawn for one place is the first of what is drawn for several.
    assert thompson(NAS_BENCH_201, posterior, 1, seed=0, excluded=pending) == chosen[:1]
    wide = posterior_of(rng.normal(size=(20, 30)))
    assert thompson(NAS_BENCH_201, wide, 8, seed=0) != thompson(NAS_BENCH_201, wide, 8, seed=1)
    for n in (0, 21):
        with pytest.raises(ConfigError, match=f"{n} places and 20 draws; use 1 to"):
            thompson(NAS_BENCH_201, posterior, n, seed=0)


def test_probabilities_are_those_of_a_normal_difference() -> None:
    from scipy.stats import norm

    space = Blocks((2,), (1,))
    rng = np.random.default_rng(5)
    posterior = posterior_of(np.array([0.3, 0.0]) + rng.normal(size=(20_000, 2)))
    found = probability_best(space, posterior, [(0,), (1,)])
    assert found.sum() == pytest.approx(1.0)
    assert found[0] == pytest.approx(norm.cdf(0.3 / 2**0.5), abs=0.01)

    gain = improvement(space, posterior, (0,))
    assert gain.probability == pytest.approx(norm.sf(0.3 / 2**0.5), abs=0.01)
    spread = 2**0.5
    expected = spread * norm.pdf(0.3 / spread) - 0.3 * norm.sf(0.3 / spread)
    assert gain.expected == pytest.approx(expected, abs=0.01)
    assert improvement(space, posterior, (0,), margin=1.0).probability == pytest.approx(
        norm.sf(1.3 / spread), abs=0.01
    )


def test_equal_architectures_share_the_probability() -> None:
    posterior = posterior_of(np.zeros((4, 2)))
    assert probability_best(Blocks((2,), (1,)), posterior, [(0,), (1,)]).tolist() == [0.5, 0.5]


def test_no_improvement_is_left_under_certainty_or_where_it_is_forbidden() -> None:
    rng = np.random.default_rng(6)
    draws = np.repeat(rng.normal(size=(1, 30)), 5, axis=0)
    best = best_architecture(NAS_BENCH_201, draws[0])
    found = improvement(NAS_BENCH_201, posterior_of(draws), best)
    assert (found.probability, found.expected) == (0.0, 0.0)
    wide = posterior_of(rng.normal(size=(50, 30)))
    assert improvement(NAS_BENCH_201, wide, best).probability > 0.9
    small = SMALL["blocks"]
    wide = posterior_of(rng.normal(size=(50, 11)))
    cheap = np.ones((1, 11))
    cheap[0, [0, 1, 3, 7]] = 0.0
    only = improvement(small, wide, (0, 1, 3, 7), budget=Budget(cheap, np.zeros(1)))
    assert only.probability == 0.0
    assert improvement(small, wide, (0, 1, 3, 7)).probability > 0.5


def test_predictions_are_the_rows_times_the_effects() -> None:
    """The best by the sum of the effects is the best by the coded rows: they differ by a constant."""
    space = SPACES["darts, one per edge"]
    effects = np.random.default_rng(7).normal(size=layout(space).n_candidates)
    best = best_architecture(space, effects)
    second = best_architecture(space, effects, excluded={best})
    difference = coded(space, [best]) @ effects - coded(space, [second]) @ effects
    assert difference[0] == pytest.approx(effects[list(best)].sum() - effects[list(second)].sum())
    assert difference[0] > 0
