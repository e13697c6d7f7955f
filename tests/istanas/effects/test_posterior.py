from itertools import product

import numpy as np
import pytest
from scipy.linalg import null_space
from scipy.stats import multivariate_normal

from istanas.effects import (
    System,
    balanced_design,
    coded,
    gibbs_sweep,
    linear_system,
    log_evidence,
    ridge,
    ridge_moments,
    ridge_variances,
    spike_and_slab,
)
from istanas.effects.posterior import Posterior
from istanas.errors import ConfigError
from tests.istanas.effects.spaces import NAS_BENCH_201, SPACES


def random_system(m: int, n: int, seed: int = 0) -> System:
    rng = np.random.default_rng(seed)
    return linear_system(rng.normal(size=(m, n)), rng.normal(size=m))


@pytest.mark.parametrize(("m", "n"), [(12, 5), (5, 12)])
def test_ridge_moments_are_the_textbook_inverse(m: int, n: int) -> None:
    system, noise, prior = random_system(m, n), 0.7, 2.3
    expected = np.linalg.inv(system.A.T @ system.A / noise + np.eye(n) / prior)
    mean, covariance = ridge_moments(system, noise, prior)
    np.testing.assert_allclose(covariance, expected, atol=1e-10)
    np.testing.assert_allclose(mean, expected @ system.A.T @ system.b / noise, atol=1e-10)


@pytest.mark.parametrize(("m", "n"), [(12, 5), (5, 12)])
def test_evidence_is_the_density_of_the_contrasts_of_the_scores(m: int, n: int) -> None:
    """The restricted likelihood is the density of Q^T y, where the columns of Q span what the offset does not.

    Differences between two ratios remove the constant, at the noise variance that maximises each.
    """
    system = random_system(m, n)
    contrasts = null_space(np.ones((1, m)))
    b, A = contrasts.T @ system.b, contrasts.T @ system.A

    def dense(ratio: float) -> float:
        shape = np.eye(m - 1) + A @ A.T / ratio
        noise = b @ np.linalg.solve(shape, b) / (m - 1)
        return float(multivariate_normal(cov=noise * shape).logpdf(b))

    difference = log_evidence(system, 0.3) - log_evidence(system, 5.0)
    assert difference == pytest.approx(dense(0.3) - dense(5.0), rel=1e-9)


def test_variances_maximise_the_evidence() -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(60, 10))
    system = linear_system(rows, rows @ rng.normal(size=10) + rng.normal(size=60))
    noise, prior = ridge_variances(system)
    best = log_evidence(system, noise / prior)
    assert all(log_evidence(system, noise / prior * 10.0**e) <= best for e in np.linspace(-3, 3, 61))


def test_variances_are_estimated_without_bias_on_average() -> None:
    """With 80 measurements and 20 unknowns, the restricted likelihood finds noise 0.5 and prior variance 2."""
    found = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(80, 20))
        truth = rng.normal(scale=2**0.5, size=20)
        found.append(ridge_variances(linear_system(rows, rows @ truth + rng.normal(scale=0.5**0.5, size=80))))
    mean, error = np.mean(found, axis=0), np.std(found, axis=0) / 10
    assert abs(mean[0] - 0.5) < 4 * error[0]
    assert abs(mean[1] - 2.0) < 4 * error[1]


@pytest.mark.parametrize("fit", [ridge, spike_and_slab], ids=["ridge", "spike_and_slab"])
def test_intervals_cover_planted_effects(fit: object) -> None:
    """The effects come from each posterior's own prior; of 40 x 10 intervals of 90 %, 84 to 96 % hold the truth."""
    inside = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(40, 10))
        truth = rng.normal(size=10)
        if fit is spike_and_slab:
            truth *= rng.random(10) < 0.5
        system = linear_system(rows, rows @ truth + rng.normal(size=40))
        posterior = ridge(system, 400, seed) if fit is ridge else spike_and_slab(system, 200, seed, sweeps=30)
        low, high = posterior.intervals(0.9).T
        inside.append((low <= truth) & (truth <= high))
    assert 0.84 < np.mean(inside) < 0.96


def test_draws_of_the_ridge_have_its_moments() -> None:
    posterior = ridge(random_system(30, 6), 40_000, seed=0)
    scale = np.sqrt(posterior.covariance.diagonal())
    np.testing.assert_allclose(posterior.draws.mean(0) / scale, posterior.mean / scale, atol=0.03)
    np.testing.assert_allclose(np.cov(posterior.draws.T), posterior.covariance, atol=0.04 * scale.max() ** 2)


def test_the_gibbs_sweep_samples_the_exact_posterior() -> None:
    """At fixed variances, inclusion and mean are those of the sum over all 2^4 supports."""
    rng = np.random.default_rng(5)
    A, noise, slab, share = rng.normal(size=(8, 4)), 0.8, 1.5, 0.3
    A[:, 1] += A[:, 0]  # Correlated columns.
    b = A @ [1.0, 0.0, 0.0, 0.6] + rng.normal(size=8)
    weights, means, supports = [], [], list(product([False, True], repeat=4))
    for support in supports:
        own = A[:, support]
        shape = noise * np.eye(8) + slab * own @ own.T
        weights.append(
            multivariate_normal(cov=shape).logpdf(b)
            + sum(support) * np.log(share)
            + (4 - sum(support)) * np.log(1 - share)
        )
        mean = np.zeros(4)
        mean[list(support)] = slab * own.T @ np.linalg.solve(shape, b)
        means.append(mean)
    weight = np.exp(weights - np.max(weights))
    weight /= weight.sum()

    z, kept = np.zeros((4000, 4)), []
    full = [np.full(4000, value) for value in (noise, slab, share)]
    for sweep in range(40):
        z = gibbs_sweep(A.T @ A, A.T @ b, z, *full, rng)
        if sweep >= 15:
            kept.append(z)
    states = np.concatenate(kept)
    np.testing.assert_allclose((states != 0).mean(0), weight @ np.array(supports), atol=0.015)
    np.testing.assert_allclose(states.mean(0), weight @ np.array(means), atol=0.015)


def test_spike_and_slab_finds_which_candidates_have_effects() -> None:
    space = NAS_BENCH_201
    truth = np.zeros(30)
    truth[[3, 8, 21]] = [2.0, -1.5, 1.5]
    rows = coded(space, balanced_design(space, 60, seed=0))
    score = rows @ truth + np.random.default_rng(0).normal(scale=0.3, size=60)
    posterior = spike_and_slab(linear_system(rows, score), 50, seed=0)
    assert sorted(np.argsort(-posterior.inclusion)[:3].tolist()) == [3, 8, 21]
    assert posterior.inclusion[[3, 8, 21]].min() > 0.95
    assert np.median(posterior.inclusion) < 0.3
    assert posterior.noise_variance == pytest.approx(0.09, rel=0.5)


@pytest.mark.parametrize("fit", [ridge, spike_and_slab], ids=["ridge", "spike_and_slab"])
def test_units_of_the_scores_do_not_matter(fit: object) -> None:
    system = random_system(20, 5)
    large = System(system.A, system.b * 1e4)
    small, other = fit(system, 8, 0), fit(large, 8, 0)  # type: ignore[operator]
    np.testing.assert_allclose(other.mean, small.mean * 1e4, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(other.covariance, small.covariance * 1e8, rtol=1e-4, atol=1e-2)
    assert other.noise_variance == pytest.approx(small.noise_variance * 1e8, rel=1e-4)


@pytest.mark.parametrize("fit", [ridge, spike_and_slab], ids=["ridge", "spike_and_slab"])
@pytest.mark.parametrize("name", ["nas_bench_201", "darts"])
def test_few_equal_or_noiseless_measurements_have_a_posterior(fit: object, name: str) -> None:
    space = SPACES[name]
    rows = coded(space, balanced_design(space, 6, seed=0))
    for score in (np.zeros(6), np.ones(6), rows[:, 0]):
        posterior: Posterior = fit(linear_system(rows, score), 4, 0)  # type: ignore[operator]
        for values in (posterior.mean, posterior.covariance, posterior.draws, posterior.noise_variance):
            assert np.isfinite(values).all()
    assert np.abs(fit(linear_system(rows, np.ones(6)), 4, 0).mean).max() < 1e-6 or fit is spike_and_slab  # type: ignore[operator]


@pytest.mark.parametrize("fit", [ridge, spike_and_slab], ids=["ridge", "spike_and_slab"])
def test_one_measurement_is_too_few(fit: object) -> None:
    with pytest.raises(ConfigError, match="1 measurements at 1 fidelities are too few; measure two"):
        fit(linear_system(np.ones((1, 3)), np.ones(1)), 4, 0)  # type: ignore[operator]


def test_more_sweeps_from_a_start_continue_the_chains() -> None:
    """From the draws of a converged posterior few sweeps give what many sweeps give from zero."""
    rng = np.random.default_rng(6)
    rows = rng.normal(size=(40, 8))
    system = linear_system(rows, rows @ rng.normal(size=8) + rng.normal(size=40))
    first = spike_and_slab(system, 200, 1, sweeps=200)
    second = spike_and_slab(system, 200, 2, sweeps=20, start=first.draws)
    np.testing.assert_allclose(second.mean, first.mean, atol=0.05)
