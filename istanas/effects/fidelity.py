"""Fidelities: how the scores of cheap measurements relate to those of expensive ones, and which one comes next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from istanas.effects.coding import Array
from istanas.effects.model import Fidelities, Levels, linear_system
from istanas.effects.posterior import ridge_moments, ridge_variances
from istanas.errors import ConfigError

# Prior standard deviation of a slope around 1. It is wide, because later stages of a search measure a selection, whose
# normal scores have the same spread as those of all architectures, so that the slope of a first stage is below 1.
_SLOPE_SPREAD = 0.5
_PSEUDO = 2.0  # Measurements that the common noise counts for, in the estimate of a fidelity's own noise.
_STEPS, _SETTLED = 100, 1e-4


def join_fidelities(rows: Array, score: Array, fidelity: Levels, n_fidelities: int) -> Fidelities:
    """Estimate the slope and the noise of each fidelity by expectation maximisation.

    The model is y = offset_f + slope_f (x z) + N(0, noise_f^2) with the ridge prior of z. The expectation is the ridge
    posterior, mean and V, of the joint system. With centred x and y, the maximisation is

        slope_f = (sum y (x mean) / noise_f^2 + 1 / s^2) / (sum ((x mean)^2 + x V x) / noise_f^2 + 1 / s^2),
        noise_f^2 = (sum (y - slope_f x mean)^2 + slope_f^2 x V x + 2 noise^2) / (M_f + 1),

    with a prior N(1, s^2 = 0.25) of the slopes, and the common noise as two further measurements. The term x V x
    prevents a slope from growing because the posterior mean is shrunk. The slope of the highest fidelity in use is 1.

    Args:
        rows: Coded architectures, (M, N).
        score: Their scores, (M,).
        fidelity: The fidelity of each measurement, 0 to F - 1, (M,), from the lowest to the highest.
        n_fidelities: Number F of fidelities, >= 1.

    Returns:
        Slopes and noise. A fidelity without measurements has 1 for both.

    Raises:
        ConfigError: As in `linear_system`.

    Example:
        >>> join_fidelities(np.array([[1.0], [-1.0], [1.0]]), np.array([1.0, -1.0, 1.2]), [0, 0, 0], 1)
        Fidelities(slopes=(1.0,), noise=(1.0,))

    Source: Kennedy, O'Hagan, Biometrika 2000 (autoregressive fidelities); Dempster, Laird, Rubin, 1977.
    """
    levels = np.asarray(fidelity, dtype=np.int64)
    slopes, noise = np.ones(n_fidelities), np.ones(n_fidelities)
    plain = linear_system(rows, score, levels, Fidelities(tuple(slopes), tuple(noise)))
    used = np.unique(levels)
    if len(used) < 2 or plain.freedom < 2 or not plain.b.any():
        return Fidelities(tuple(slopes.tolist()), tuple(noise.tolist()))
    highest = used[-1]
    for _ in range(_STEPS):
        system = linear_system(rows, score, levels, Fidelities(tuple(slopes), tuple(noise)))
        common, prior = ridge_variances(system)
        mean, covariance = ridge_moments(system, common, prior)
        variances = common * noise**2
        before = np.concatenate([slopes, noise])
        for level in used:
            own = levels == level
            x, y = rows[own] - rows[own].mean(0), score[own] - score[own].mean()
            fitted, spread = x @ mean, float(((x @ covariance) * x).sum())
            if level != highest:
                weight, prior_weight = 1.0 / variances[level], 1.0 / _SLOPE_SPREAD**2
                top = float(y @ fitted) * weight + prior_weight
                slopes[level] = top / ((float(fitted @ fitted) + spread) * weight + prior_weight)
            misfit = float(np.square(y - slopes[level] * fitted).sum()) + slopes[level] ** 2 * spread
            variances[level] = (misfit + _PSEUDO * common) / (own.sum() - 1 + _PSEUDO)
        noise[used] = np.sqrt(variances[used] / variances[highest])
        if np.abs(np.concatenate([slopes, noise]) - before).max() < _SETTLED:
            break
    return Fidelities(tuple(slopes.tolist()), tuple(noise.tolist()))


def next_fidelity(
    spread: float,
    slopes: Sequence[float],
    noise: Sequence[float],
    bias: Sequence[float],
    seconds: Sequence[float],
) -> int:
    """Return the fidelity of the next measurement: the one with the most information per second that still counts.

    A measurement at fidelity f of an architecture whose score has the posterior variance v reduces the entropy by

        1/2 log(1 + slope_f^2 v / noise_f^2)  nats, in seconds_f.

    That alone would choose the same fidelity for ever, since noise averages out. What does not average out is the
    bias of a fidelity: the part of its score that belongs to the architecture, but not to its score at the highest
    fidelity, such as how fast it learns in the first epochs. Its standard deviation over architectures is bias_f. While
    the architectures that are still in question differ by more than that, the fidelity orders them; once they differ
    by less, no number of measurements at f does. Therefore the information is compared among the fidelities with
    bias_f <= spread, where spread is the standard deviation of the scores among the architectures that Thompson
    sampling would measure (`np.std` of their posterior means, or the root of v for one). If there is none, the one with
    the smallest bias is used, of equal ones the fastest.

    Args:
        spread: Standard deviation of the scores that are still in question, >= 0.
        slopes: Slope of each fidelity, (F,).
        noise: Standard deviation of each fidelity's noise, > 0, (F,).
        bias: Standard deviation of each fidelity's bias, >= 0, (F,), as a comparison of cheap with long trainings finds
            it; divided by the slope it is on the scale of `spread`.
        seconds: Seconds of a measurement, > 0, (F,).

    Raises:
        ConfigError: If the lengths differ, or a noise or a time is not positive.

    Example:
        >>> [next_fidelity(s, (1, 1), (1, 0.8), (0.5, 0.1), (20, 60)) for s in (1.0, 0.3)]
        [0, 1]

    Source: MacKay, Information-based objective functions for active data selection, Neural Computation 1992; Kandasamy
        et al., Multi-fidelity Gaussian process bandit optimisation, JAIR 2019 (a fidelity is left when its posterior is
        narrower than its bias).
    """
    values = [np.asarray(each, dtype=np.float64) for each in (slopes, noise, bias, seconds)]
    if len({len(each) for each in values}) != 1 or not len(values[0]):
        raise ConfigError(
            f"{[len(each) for each in values]} values",
            field="fidelities",
            remedy="give slope, noise, bias and seconds of each fidelity",
        )
    slope, deviation, error, cost = values
    if not ((deviation > 0).all() and (cost > 0).all()):
        raise ConfigError(
            f"noise {list(noise)} and seconds {list(seconds)}",
            field="fidelities",
            remedy="use positive numbers",
        )
    sharp = np.flatnonzero(error <= spread)
    if not len(sharp):
        return int(np.lexsort((cost, error))[0])
    rate = 0.5 * np.log1p((slope * spread / deviation) ** 2) / cost
    return int(sharp[np.argmax(rate[sharp])])
