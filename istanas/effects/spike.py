"""The spike-and-slab posterior of the effects, by Gibbs sampling with many chains at once."""

from __future__ import annotations

import numpy as np

from istanas.effects.coding import Array
from istanas.effects.model import System
from istanas.effects.posterior import Posterior, check_freedom

# Priors in units of the standard deviation of b: inverse gamma (shape, scale) of both variances, weak.
_NOISE = (1.0, 0.5)
_SLAB = (1.0, 0.2)


def gibbs_sweep(
    gram: Array,
    pull: Array,
    z: Array,
    noise_variance: Array,
    slab_variance: Array,
    share: Array,
    rng: np.random.Generator,
) -> Array:
    """Draw every effect once, given all others, in all chains.

    With c_j = A_j^T (b - sum_{i != j} A_i z_i), v = (A_j^T A_j / sigma^2 + 1 / tau^2)^-1 and mu = v c_j / sigma^2, the
    effect z_j is 0 with odds (1 - pi) : pi sqrt(v / tau^2) exp(mu^2 / (2 v)), and else N(mu, v).

    Args:
        gram: A^T A, (N, N).
        pull: A^T b, (N,).
        z: Effects of C chains, (C, N).
        noise_variance: sigma^2 of each chain, (C,).
        slab_variance: tau^2 of each chain, (C,).
        share: pi, the prior probability of an effect, of each chain, in (0, 1), (C,).
        rng: The generator.

    Returns:
        The new effects, (C, N).

    Source: George, McCulloch, Variable selection via Gibbs sampling, JASA 1993; Kuo, Mallick, Sankhya 1998.
    """
    # Everything that does not depend on z is computed for all effects at once; candidates are rows here.
    own = gram.diagonal()[:, None]
    v = 1.0 / (own / noise_variance + 1.0 / slab_variance)
    weight, jump = v / noise_variance, np.sqrt(v) * rng.standard_normal(v.shape)
    uniform = rng.random(v.shape)
    # u < probability in logits, log(u / (1 - u)) < log odds, which does not overflow.
    logit = np.log(uniform) - np.log1p(-uniform)
    bar = logit - (np.log(share) - np.log1p(-share)) - 0.5 * np.log(v / slab_variance)
    effects = z.T.copy()
    for j, row in enumerate(gram):
        mu = weight[j] * (pull[j] - row @ effects + own[j] * effects[j])
        effects[j] = np.where(2.0 * v[j] * bar[j] < mu**2, mu + jump[j], 0.0)
    return effects.T


def spike_and_slab(
    system: System, n_draws: int, seed: int, *, sweeps: int = 100, start: Array | None = None
) -> Posterior:
    """Return the posterior under which an effect is 0 with probability 1 - pi, and else N(0, tau^2).

    pi is uniform a priori. In units of the standard deviation of b, sigma^2 is inverse gamma (1, 0.5) and tau^2 is
    inverse gamma (1, 0.2). All three are drawn in each sweep. There is one chain for each draw, so that the draws are
    independent; mean, covariance and inclusion are those of the second half of all chains.

    Args:
        system: The equations.
        n_draws: Number of draws and of chains S, >= 1.
        seed: An integer >= 0.
        sweeps: Sweeps of every chain, >= 2.
        start: Effects at which the chains begin, (S, N), such as the draws of an earlier posterior, after which fewer
            sweeps are enough; `None` for zeros.

    Raises:
        ConfigError: If there are too few measurements to estimate a variance.

    Example:
        >>> rows = np.array([[0.5], [-0.5]] * 10)
        >>> posterior = spike_and_slab(System(rows, 4 * rows[:, 0]), 20, seed=0)
        >>> posterior.mean.round(1).tolist(), bool(posterior.inclusion[0] > 0.99)
        ([4.0], True)

    Source: Mitchell, Beauchamp, Bayesian variable selection in linear regression, JASA 1988.
    """
    check_freedom(system)
    rng = np.random.Generator(np.random.PCG64(seed))
    n = system.A.shape[1]
    unit = float(np.sqrt(system.b @ system.b / system.freedom)) or 1.0
    b = system.b / unit
    gram, pull, energy = system.A.T @ system.A, system.A.T @ b, float(b @ b)
    z = np.zeros((n_draws, n)) if start is None else start / unit
    noise, slab, share = np.ones(n_draws), np.full(n_draws, _SLAB[1]), np.full(n_draws, 0.5)
    kept: list[Array] = []
    variances: list[tuple[float, float]] = []
    for sweep in range(sweeps):
        z = gibbs_sweep(gram, pull, z, noise, slab, share, rng)
        misfit = np.maximum(energy - 2 * z @ pull + np.einsum("ci,ij,cj->c", z, gram, z), 0.0)
        noise = _inverse_gamma(rng, _NOISE[0] + system.freedom / 2, _NOISE[1] + misfit / 2)
        count = (z != 0).sum(1)
        slab = _inverse_gamma(rng, _SLAB[0] + count / 2, _SLAB[1] + (z**2).sum(1) / 2)
        share = np.clip(rng.beta(1.0 + count, 1.0 + n - count), 1e-9, 1 - 1e-9)
        if 2 * sweep >= sweeps:
            kept.append(z)
            variances.append((float(noise.mean()), float((share * slab).mean())))
    states = np.concatenate(kept)
    noise_variance, prior_variance = np.mean(variances, axis=0) * unit**2
    return Posterior(
        mean=states.mean(0) * unit,
        covariance=np.atleast_2d(np.cov(states.T, bias=True)) * unit**2,
        noise_variance=float(noise_variance),
        prior_variance=float(prior_variance),
        draws=z * unit,
        inclusion=(states != 0).mean(0),
    )


def _inverse_gamma(rng: np.random.Generator, shape: float | Array, scale: Array) -> Array:
    return np.asarray(scale / rng.gamma(shape, size=scale.shape))
