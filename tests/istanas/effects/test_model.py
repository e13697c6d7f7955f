import numpy as np
import pytest
from scipy.stats import norm

from istanas.effects import (
    Fidelities,
    linear_system,
    log_scores,
    normal_scores,
    offsets,
    repeat_variance,
    scores,
)
from istanas.errors import ConfigError


def test_normal_scores_are_the_quantiles_of_the_ranks() -> None:
    losses = [0.3, 9.0, 0.1, 0.2]
    expected = [-norm.ppf((rank - 0.375) / 4.25) for rank in (3, 4, 1, 2)]
    np.testing.assert_allclose(normal_scores(losses), expected, rtol=1e-12)


def test_normal_scores_share_ranks_and_put_diverged_trainings_last() -> None:
    found = normal_scores([1.0, np.nan, 1.0, np.inf, 0.5])
    assert found[0] == found[2]
    assert found[1] == found[3] == found.min()
    assert found[4] == found.max()
    assert normal_scores([]).tolist() == []


def test_normal_scores_are_invariant_under_increasing_maps() -> None:
    losses = np.random.default_rng(0).gamma(2.0, size=30)
    np.testing.assert_array_equal(normal_scores(losses), normal_scores(np.exp(losses)))


def test_log_scores_are_literal_and_refuse_what_has_no_logarithm() -> None:
    assert log_scores([1.0, np.e]).tolist() == [0.0, -1.0]
    for wrong in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ConfigError, match="has no logarithm; use normal scores"):
            log_scores([1.0, wrong])


def test_ranks_are_taken_within_a_fidelity() -> None:
    losses, levels = [3.0, 1.0, 2.0, 0.4, 0.3], [0, 0, 0, 1, 1]
    found = scores(losses, levels)
    np.testing.assert_allclose(found[:3], normal_scores(losses[:3]))
    np.testing.assert_allclose(found[3:], normal_scores(losses[3:]))
    np.testing.assert_allclose(scores(losses, levels, "log"), -np.log(losses))


def test_the_system_has_the_least_squares_fit_of_the_model_with_offsets() -> None:
    """Minimise the sum of (y - offset_f - slope_f x z)^2 / noise_f^2 with dummy variables for the offsets."""
    rng = np.random.default_rng(1)
    rows, score, levels = rng.normal(size=(30, 4)), rng.normal(size=30), np.arange(30) % 3
    of = Fidelities((0.5, 1.0, 1.0), (2.0, 1.5, 1.0))
    slope, noise = np.array(of.slopes)[levels], np.array(of.noise)[levels]
    dummies = np.eye(3)[levels]
    full = np.hstack([rows * slope[:, None], dummies]) / noise[:, None]
    expected = np.linalg.lstsq(full, score / noise, rcond=None)[0]

    system = linear_system(rows, score, levels, of)
    effects = np.linalg.lstsq(system.A, system.b, rcond=None)[0]
    np.testing.assert_allclose(effects, expected[:4], rtol=1e-9)
    np.testing.assert_allclose(offsets(rows, score, effects, levels, of), expected[4:], rtol=1e-9)
    assert system.freedom == 27


def test_a_fidelity_with_one_measurement_says_nothing() -> None:
    rows, score = np.array([[1.0], [0.0], [5.0]]), np.array([1.0, 0.0, 9.0])
    system = linear_system(rows, score, [0, 0, 1], Fidelities((1.0, 1.0), (1.0, 1.0)))
    assert system.A[2].tolist() == [0.0]
    assert system.b[2] == 0.0
    assert system.freedom == 1
    assert np.isnan(offsets(rows, score, np.ones(1), [0, 0, 0], Fidelities((1.0, 1.0), (1.0, 1.0)))[1])


def test_repeats_estimate_the_variance_of_the_noise() -> None:
    rng = np.random.default_rng(2)
    names = list(range(400)) * 2
    score = np.repeat(rng.normal(size=(1, 400)) * 5, 2, axis=0).ravel() + rng.normal(scale=0.5, size=800)
    variance, freedom = repeat_variance(names, score)
    assert freedom == 400
    assert variance == pytest.approx(0.25, abs=4 * 0.25 * (2 / 400) ** 0.5)  # Four standard errors.
    assert np.isnan(repeat_variance([1, 2], score[:2])[0])


@pytest.mark.parametrize(
    ("rows", "score", "levels", "problem"),
    [
        (np.ones((0, 2)), np.ones(0), [], r"rows: \(0, 2\) rows"),
        (np.ones((3, 2)), np.ones(2), [0, 0], r"rows: \(3, 2\) rows, \(2,\) scores"),
        (np.ones((2, 2)), np.array([1.0, np.nan]), [0, 0], "score: NaN or infinite"),
        (np.ones((2, 2)), np.ones(2), [0, 1], "fidelity: 1 is not one of 1 fidelities; use 0 to 0"),
        (np.ones((2, 2)), np.ones(2), [0, -1], "fidelity: -1 is not one of"),
    ],
)
def test_invalid_measurements(rows: np.ndarray, score: np.ndarray, levels: list[int], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        linear_system(rows, score, levels)
