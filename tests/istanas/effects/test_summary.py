"""The summary of measurements: intervals that cover planted effects, certain choices, and the next measurements."""

import math

import numpy as np
import pytest

from istanas.effects import (
    CERTAIN,
    TOSS_UP,
    Architecture,
    EffectsSummary,
    Posterior,
    balanced_design,
    best_of_draws,
    choice_probabilities,
    coded,
    count_certain,
    fit_effects,
    kept_probabilities,
    layout,
    predicted_score,
    sum_to_zero,
    summarize,
)
from istanas.space import SearchSpace
from tests.istanas.effects.spaces import NAS_BENCH_201, SMALL, SPACES, Blocks
from tests.istanas.effects.test_choice import everything, posterior_of


def summary_of(
    space: SearchSpace, measured: list[Architecture], losses: list[float], n_draws: int = 1000
) -> EffectsSummary:
    data = measured, losses, [1] * len(measured)
    return summarize(space, fit_effects(space, *data, n_draws=n_draws, seed=0), *data, seed=0)


def drawn(space: SearchSpace, seed: int, n_draws: int = 200) -> Posterior:
    """A posterior of independent draws."""
    return posterior_of(np.random.default_rng(seed).normal(size=(n_draws, layout(space).n_candidates)))


@pytest.mark.parametrize("space", SMALL.values(), ids=SMALL)
def test_the_best_of_each_draw_is_the_best_of_all_architectures(space: SearchSpace) -> None:
    posterior, all_of_them = drawn(space, seed=1), everything(space)
    values = posterior.draws @ coded(space, all_of_them).T
    listed = [all_of_them[index] for index in values.argmax(1)]
    assert [tuple(row) for row in best_of_draws(space, posterior).tolist()] == listed
    kept = [np.mean([c in best for best in listed]) for c in range(layout(space).n_candidates)]
    np.testing.assert_allclose(kept_probabilities(space, posterior), kept)
    chosen = listed[0]
    equal = [
        np.mean([set(best) & set(own) == set(chosen) & set(own) for best in listed])
        for own in (range(part.start, part.stop) for part in layout(space).parts())
    ]
    np.testing.assert_allclose(choice_probabilities(space, posterior, chosen), equal)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_the_probabilities_of_a_decision_sum_to_the_number_that_it_keeps(space: SearchSpace) -> None:
    kept = kept_probabilities(space, drawn(space, seed=2))
    for decision, part in zip(space.all_decisions(), layout(space).parts(), strict=True):
        assert kept[part].sum() == pytest.approx(decision.sparsity)


@pytest.mark.parametrize(("n", "least"), [(80, 0.92), (50, 0.88), (30, 0.84), (20, 0.8)])
def test_intervals_cover_planted_effects(n: int, least: float) -> None:
    """Over 60 studies with different effects, 95 % intervals cover 95 % of the effects, or less after few measurements.

    The variances are estimated, and count as known.
    """
    covered, widths = [], []
    measured = balanced_design(NAS_BENCH_201, n, seed=0)
    rows = coded(NAS_BENCH_201, measured)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        truth = sum_to_zero(NAS_BENCH_201, rng.standard_normal(30))
        score = rows @ truth + 1.5 * rng.standard_normal(n)
        low, high = summary_of(NAS_BENCH_201, measured, list(np.exp(-score))).intervals.T
        scaled = truth / score.std()  # scores are in standard deviations of the measured ones
        covered.append(((low <= scaled) & (scaled <= high)).mean())
        widths.append((high - low).mean() / np.std(truth / score.std()))
    assert least <= np.mean(covered) <= 0.98
    assert np.mean(widths) < 2.5  # in standard deviations of an effect; without measurements it is 3.9


def test_a_clear_choice_is_certain_and_equal_candidates_are_not() -> None:
    space = Blocks((2, 2, 3), (1, 1, 1))
    effects = np.array([0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 4.0])
    measured = balanced_design(space, 12, seed=0) * 4
    summaries = []
    for seed in range(20):
        noise = np.random.default_rng(seed).standard_normal(len(measured))
        losses = [math.exp(-effects[list(kept)].sum() - e) for kept, e in zip(measured, noise, strict=True)]
        summaries.append(summary_of(space, measured, losses))
    choices = np.array([summary.choices for summary in summaries])
    assert (choices[:, [0, 2]] >= CERTAIN).all()
    # The probability of a choice between equal candidates is uniform between 1/2 and 1.
    assert (choices[:, 1] >= CERTAIN).mean() <= 0.3
    assert (choices[:, 1] < TOSS_UP).mean() >= 0.15
    assert [count_certain(row) for row in choices] == (choices >= CERTAIN).sum(1).tolist()
    for summary in summaries:
        assert (summary.best[0], summary.best[2]) == (1, 6)
        assert summary.kept[[1, 6]].min() >= CERTAIN
        assert summary.intervals[6, 0] > 0
        # The LASSO finds the candidates that stand out.
        assert summary.code[6] > 0
        assert summary.code[1] > summary.code[0]
        assert 0 <= summary.gap <= 1e-9
    assert np.mean([(summary.code[2:4] == 0).all() for summary in summaries]) >= 0.7


def test_a_prediction_has_the_mean_and_the_deviation_of_the_draws() -> None:
    measured = balanced_design(NAS_BENCH_201, 40, seed=3)
    losses = list(np.random.default_rng(3).random(40))
    posterior = fit_effects(NAS_BENCH_201, measured, losses, [1] * 40, n_draws=20_000, seed=0)
    values = posterior.draws @ coded(NAS_BENCH_201, measured[:1])[0]
    mean, deviation = predicted_score(NAS_BENCH_201, posterior, measured[0])
    assert mean == pytest.approx(values.mean(), abs=0.03)
    assert deviation == pytest.approx(values.std(), rel=0.03)


@pytest.mark.parametrize(("n_measured", "left"), [(5, 5), (9, 3), (11, 1), (12, 0)])
def test_the_next_measurements_are_new_ones_as_far_as_there_are_any(n_measured: int, left: int) -> None:
    space = Blocks((3, 4), (1, 1))
    measured = everything(space)[:n_measured]
    summary = summary_of(space, measured, list(np.random.default_rng(0).random(n_measured)))
    following = [kept for kept, _, _ in summary.following]
    assert len(following) == len(set(following)) == left
    assert set(following).isdisjoint(measured)


def test_what_was_measured_at_a_lower_fidelity_may_be_measured_again() -> None:
    space = Blocks((2, 2), (1, 1))
    every = everything(space)
    data = [*every, every[0]], [1.0, 2.0, 3.0, 4.0, 1.0], [1, 1, 1, 1, 5]
    posterior = fit_effects(space, *data, n_draws=100, seed=0)
    summary = summarize(space, posterior, *data, seed=0)
    assert {kept for kept, _, _ in summary.following} == set(every[1:])
    assert 0 < summary.probability_best <= 1
