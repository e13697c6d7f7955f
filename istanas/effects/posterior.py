"""Posteriors of the effects: the Bayesian counterparts of the LASSO, for what a point estimate cannot say.

Both have the likelihood b | z ~ N(A z, sigma^2 I). The prior of the ridge is z ~ N(0, tau^2 I). That of spike-and-slab
has an additional probability 1 - pi that an effect is exactly 0. In simulated searches Thompson sampling from the ridge
found better architectures (tests/benchmarks/results/README.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from istanas.effects.coding import Array
from istanas.effects.model import System
from istanas.errors import ConfigError

# Decimal exponents of sigma^2 / tau^2, in units of the largest eigenvalue of A^T A.
_RATIOS = (-4.0, 6.0)
# The last step of the exponent is 10 / 32 / 16^3, which changes the ratio by 0.02 %.
_GRID, _REFINEMENTS = 33, 4
_LEAST = 1e-12  # Least noise variance in units of the variance of b, for systems without noise.


@dataclass(frozen=True, eq=False)
class Posterior:
    """What the measurements say about the effects.

    Args:
        mean: Posterior mean, (N,).
        covariance: Posterior covariance, (N, N).
        noise_variance: Estimate of sigma^2, with the part of the scores that no effects describe, >= 0.
        prior_variance: Estimate of the variance of an effect before the measurements, >= 0.
        draws: Independent draws of the effects, (S, N).
        inclusion: Probability that an effect is not 0, (N,); 1 for a ridge.
    """

    mean: Array
    covariance: Array
    noise_variance: float
    prior_variance: float
    draws: Array
    inclusion: Array

    def intervals(self, level: float = 0.9) -> Array:
        """Return central intervals of the effects by the quantiles of the draws, (N, 2).

        Args:
            level: Probability of an interval, in (0, 1).

        Example:
            >>> system = System(np.array([[1.0], [-1.0]]), np.array([1.0, -1.0]))
            >>> bool(np.ptp(ridge(system, 100, seed=0).intervals(0.5)) > 0)
            True
        """
        tail = (1.0 - level) / 2
        return np.quantile(self.draws, [tail, 1.0 - tail], axis=0).T


def ridge_moments(system: System, noise_variance: float, prior_variance: float) -> tuple[Array, Array]:
    """Return the mean and the covariance of the ridge posterior.

    V = tau^2 (I - A^T (A A^T + (sigma^2 / tau^2) I)^-1 A), mean = tau^2 A^T (tau^2 A A^T + sigma^2 I)^-1 b, which equal
    V = (A^T A / sigma^2 + I / tau^2)^-1 and V A^T b / sigma^2.

    Args:
        system: The equations.
        noise_variance: sigma^2 > 0.
        prior_variance: tau^2 > 0.

    Example:
        >>> mean, covariance = ridge_moments(System(np.array([[1.0]]), np.array([2.0])), 1.0, 1.0)
        >>> mean.tolist(), covariance.tolist()
        ([1.0], [[0.5]])

    Source: Bishop, Pattern Recognition and Machine Learning, 2006, section 3.3.
    """
    return _Spectrum.of(system).moments(noise_variance, prior_variance)


def log_evidence(system: System, ratio: float) -> float:
    """Return the log marginal likelihood of the ridge, maximised over sigma^2, up to a constant.

    b ~ N(0, sigma^2 C), C = I + A A^T / ratio, and with m = `System.freedom`
    -1/2 (m log(b^T C^-1 b / m) + log det C). The removed offsets make it the restricted likelihood.

    Args:
        system: The equations.
        ratio: sigma^2 / tau^2 > 0.

    Example:
        >>> rows = np.array([[0.5], [-0.5]] * 10)
        >>> log_evidence(System(rows, 4 * rows[:, 0]), 1.0) < log_evidence(System(rows, 4 * rows[:, 0]), 0.1)
        True

    Source: Bishop, 2006, section 3.5; Patterson, Thompson, Biometrika 1971 (restricted likelihood).
    """
    return float(_Spectrum.of(system).log_evidence(np.array([ratio]))[0])


@dataclass(frozen=True, eq=False)
class _Spectrum:
    """A system by the singular value decomposition of A.

    Args:
        eigenvalues: Eigenvalues of A A^T in descending order, (K,), K = min(M, N).
        along: b along the left singular vectors, (K,).
        right: The right singular vectors as rows, (K, N).
        rest: Squared norm of the rest of b.
        freedom: Degrees of freedom of b.
    """

    eigenvalues: Array
    along: Array
    right: Array
    rest: float
    freedom: int

    @classmethod
    def of(cls, system: System) -> _Spectrum:
        left, singular, right = np.linalg.svd(system.A, full_matrices=False)
        along = left.T @ system.b
        rest = max(float(system.b @ system.b - along @ along), 0.0)
        return cls(singular**2, along, right, rest, system.freedom)

    def noise_variance(self, ratio: Array) -> Array:
        """Return b^T C^-1 b / m of each ratio."""
        energy = self.rest + float(self.along @ self.along)
        inside = self.rest + (self.along**2 * (ratio / np.add.outer(self.eigenvalues, ratio)).T).sum(-1)
        return np.asarray(np.maximum(inside, max(_LEAST * energy, np.finfo(np.float64).tiny)) / self.freedom)

    def log_evidence(self, ratio: Array) -> Array:
        determinant = np.log1p(np.divide.outer(self.eigenvalues, ratio)).sum(0)
        return np.asarray(-0.5 * (self.freedom * np.log(self.noise_variance(ratio)) + determinant))

    def variances(self, least_share: float = 0.0) -> tuple[float, float]:
        """Return (sigma^2, tau^2) at the maximum of the evidence, by a grid of the ratio that is refined.

        The ratio is bounded such that tau^2 tr(A A^T) / m is at least `least_share` of itself plus sigma^2.
        """
        unit = float(self.eigenvalues[0]) or 1.0
        low, high = _RATIOS
        for _ in range(_REFINEMENTS):
            grid = np.linspace(low, high, _GRID)
            best = grid[int(np.argmax(self.log_evidence(unit * 10.0**grid)))]
            step = grid[1] - grid[0]
            low, high = max(best - step, _RATIOS[0]), min(best + step, _RATIOS[1])
        ratio = unit * 10.0**best
        if least_share > 0 and self.eigenvalues[0] > 0:
            ratio = min(ratio, float(self.eigenvalues.sum()) / self.freedom * (1 - least_share) / least_share)
        noise = float(self.noise_variance(np.array([ratio]))[0])
        return noise, noise / float(ratio)

    def moments(self, noise_variance: float, prior_variance: float) -> tuple[Array, Array]:
        """Return what `ridge_moments` returns."""
        ratio = noise_variance / prior_variance
        shrink = self.eigenvalues / (self.eigenvalues + ratio)
        covariance = prior_variance * (np.eye(self.right.shape[1]) - (self.right.T * shrink) @ self.right)
        # V A^T b / sigma^2 along the right singular vectors.
        mean = self.right.T @ (np.sqrt(self.eigenvalues) * self.along / (self.eigenvalues + ratio))
        return mean, covariance


def ridge(system: System, n_draws: int, seed: int, *, least_share: float = 0.0) -> Posterior:
    """Return the ridge posterior, whose noise and prior variance maximise the marginal likelihood.

    Args:
        system: The equations, with at least one degree of freedom.
        n_draws: Number of draws S, >= 1.
        seed: An integer >= 0.
        least_share: The prior attributes at least this share of the variance of the scores to the effects, in [0, 1).
            With few measurements, the marginal likelihood is often largest without any effects, and the posterior would
            be certain that no architecture is better than another.

    Returns:
        The posterior; see `ridge_moments` for its mean and covariance.

    Raises:
        ConfigError: If there are too few measurements to estimate a variance.

    Example:
        >>> rows = np.array([[0.5], [-0.5]] * 10)
        >>> ridge(System(rows, 4 * rows[:, 0]), 10, seed=0).mean.round(2).tolist()
        [4.0]

    Source: MacKay, Bayesian interpolation, Neural Computation 1992.
    """
    check_freedom(system)
    spectrum = _Spectrum.of(system)
    noise, prior = spectrum.variances(least_share)
    mean, covariance = spectrum.moments(noise, prior)
    rng = np.random.Generator(np.random.PCG64(seed))
    values, vectors = np.linalg.eigh(covariance)
    factor = vectors * np.sqrt(np.maximum(values, 0.0))
    draws = mean + rng.standard_normal((n_draws, len(mean))) @ factor.T
    return Posterior(mean, covariance, noise, prior, draws, np.ones(len(mean)))


def ridge_variances(system: System) -> tuple[float, float]:
    """Return (sigma^2, tau^2) that maximise the marginal likelihood of the ridge.

    Example:
        >>> rows = np.array([[0.5], [-0.5]] * 10)
        >>> noise, prior = ridge_variances(System(rows, 4 * rows[:, 0]))
        >>> noise < 0.01 < prior
        True
    """
    return _Spectrum.of(system).variances()


def check_freedom(system: System) -> None:
    """Check that a variance can be estimated.

    Raises:
        ConfigError: If there are not more measurements than fidelities.
    """
    if system.freedom < 1:
        raise ConfigError(
            f"{len(system.b)} measurements at {system.n_offsets} fidelities are too few",
            field="measurements",
            remedy="measure two architectures or more at one fidelity",
        )
