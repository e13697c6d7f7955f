"""The prior that shares effects between the places of an operation: its covariance, and what it is worth."""

import numpy as np
import pytest

from istanas.effects import (
    Posterior,
    architecture,
    balanced_design,
    coded,
    fit_effects,
    join_fidelities,
    linear_system,
    ridge,
)
from istanas.effects.fit import _evidence
from istanas.effects.sharing import RATIOS, operations, prior_root, unrooted
from istanas.space import CellSpace, NasBench201Space

SPACE = NasBench201Space()


@pytest.mark.parametrize("space", [NasBench201Space(), CellSpace(n_nodes=3)])
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_root_has_the_covariance_of_own_and_shared_parts(space: NasBench201Space, ratio: float) -> None:
    L, O = prior_root(space, ratio), operations(space)  # noqa: E741
    np.testing.assert_allclose(L @ L.T, np.eye(len(O)) + ratio * O @ O.T, atol=1e-10)
    assert (O.sum(1) == 1).all()


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_prior_variance_is_that_of_an_effect(ratio: float) -> None:
    """The own part has the variance 1, so that an effect has 1 + r."""
    posterior = Posterior(np.zeros(30), np.eye(30), 1.0, 1.0, np.zeros((1, 30)), np.ones(30))
    assert unrooted(posterior, prior_root(SPACE, ratio)).prior_variance == pytest.approx(1.0 + ratio)


def planted(
    effects: np.ndarray, n: int, noise: float, seed: int
) -> tuple[list[tuple[int, ...]], list[float]]:
    """Measurements of random architectures with these effects; a loss is minus the score."""
    rng = np.random.default_rng(seed)
    kept = [architecture(SPACE, SPACE.random_supports(int(rng.integers(2**31)))) for _ in range(n)]
    score = coded(SPACE, kept) @ effects
    score = score / score.std() + noise * rng.standard_normal(n)
    return kept, (-score).tolist()


def errors(effects: np.ndarray, seeds: range) -> tuple[float, float]:
    """The mean correlation of true and fitted scores of all architectures, shared and independent."""
    others = coded(SPACE, [architecture(SPACE, SPACE.random_supports(seed)) for seed in range(500)])
    found: tuple[list[float], list[float]] = ([], [])
    for seed in seeds:
        kept, losses = planted(effects, 30, 0.7, seed)
        for ratios, results in zip((RATIOS, (0.0,)), found, strict=True):
            posterior = fit_effects(SPACE, kept, losses, [3] * 30, n_draws=2, seed=0, ratios=ratios)
            results.append(float(np.corrcoef(others @ posterior.mean, others @ effects)[0, 1]))
    return float(np.mean(found[0])), float(np.mean(found[1]))


def test_common_effects_are_found_with_fewer_measurements() -> None:
    shared, independent = errors(np.tile([-2.0, 0.0, 1.0, 2.0, -1.0], 6), range(10))
    assert shared > independent + 0.1
    assert shared > 0.9


def test_effects_that_have_nothing_in_common_lose_little() -> None:
    """The effects of each operation sum to zero over the edges."""
    effects = np.random.default_rng(0).standard_normal((6, 5))
    effects -= effects.mean(0)
    effects -= effects.mean(1, keepdims=True)
    shared, independent = errors(effects.ravel(), range(10))
    assert shared > independent - 0.03


def test_draws_have_the_covariance_of_the_posterior() -> None:
    kept = balanced_design(SPACE, 30, seed=0)
    losses = [1.0 if 3 in each or 8 in each else 2.0 for each in kept]
    posterior = fit_effects(SPACE, kept, losses, [3] * 30, n_draws=20_000, seed=0)
    np.testing.assert_allclose(np.cov(posterior.draws.T), posterior.covariance, atol=0.05)
    np.testing.assert_allclose(posterior.draws.mean(0), posterior.mean, atol=0.05)


def test_the_evidence_of_two_fidelities_is_the_density_of_the_scores() -> None:
    """Against the restricted likelihood of the scores, by dense matrices, up to a constant."""
    rng = np.random.default_rng(0)
    rows = coded(SPACE, balanced_design(SPACE, 24, seed=0))
    values, index = rng.standard_normal(24), np.repeat([0, 1], 12)
    constants = []
    for ratio in (0.0, 1.0, 4.0):
        root = prior_root(SPACE, ratio)
        joined = join_fidelities(rows @ root, values, index, 2)
        system = linear_system(rows @ root, values, index, joined)
        posterior = ridge(system, 1, 0, least_share=0.1)
        found = _evidence(system, posterior, index, joined)
        slope, noise = np.array(joined.slopes)[index], np.array(joined.noise)[index]
        x = slope[:, None] * rows
        covariance = posterior.noise_variance * np.diag(noise**2) + posterior.prior_variance * (
            x @ root @ root.T @ x.T
        )
        # Contrasts within each fidelity remove the offsets.
        contrasts = np.kron(np.eye(2), np.linalg.qr(np.eye(12) - 1 / 12)[0][:, :11]).T
        inner, y = contrasts @ covariance @ contrasts.T, contrasts @ values
        exact = -0.5 * (np.linalg.slogdet(inner)[1] + y @ np.linalg.solve(inner, y))
        constants.append(found - exact)
    np.testing.assert_allclose(constants, constants[0], atol=1e-8)
