"""From measured losses to a linear system: scores, and fidelities that are joined by an offset and a slope each.

A measurement is an architecture with rows x (see `coding`), a fidelity f, and a loss. Its score is

    y = offset_f + slope_f (x z) + noise,  noise ~ N(0, noise_f^2),

with the effects z on the scale of the highest fidelity, whose slope is 1. The offsets are removed by centring rows and
scores within each fidelity. Divided by the noise, all measurements are equations of one system A z = b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from istanas.effects.coding import Array
from istanas.errors import ConfigError

Levels: TypeAlias = Sequence[int] | npt.NDArray[Any]
Score = Literal["normal", "log"]


def normal_scores(losses: Sequence[float] | Array) -> Array:
    """Return the normal scores of losses, -Phi^-1((rank - 3/8) / (M + 1/4)): a small loss has a high score.

    They depend on the order of the losses only, so that neither a diverged training nor the skewness of the losses
    decides the fit. Equal losses share the mean of their ranks; NaN and infinity are the largest losses, all equal.

    Args:
        losses: Measured losses, (M,).

    Returns:
        Scores, (M,), with a sum of 0 if no losses are equal.

    Example:
        >>> normal_scores([0.5, float("nan")]).round(2).tolist()
        [0.59, -0.59]

    Source: Blom, Statistical Estimates and Transformed Beta-Variables, 1958.
    """
    from scipy.stats import rankdata  # Its import takes 0.7 s, which every command would spend.

    values = np.asarray(losses, dtype=np.float64)
    ranks = rankdata(np.where(np.isfinite(values), values, np.inf))
    return np.asarray(-ndtri((ranks - 0.375) / (len(values) + 0.25)) if len(values) else values)


def log_scores(losses: Sequence[float] | Array) -> Array:
    """Return -log(loss), on which a relative change of the loss has the same effect everywhere.

    Args:
        losses: Measured losses, (M,), positive and finite.

    Raises:
        ConfigError: If a loss is not.

    Example:
        >>> log_scores([1.0, 0.5]).round(2).tolist()
        [-0.0, 0.69]
    """
    values = np.asarray(losses, dtype=np.float64)
    wrong = values[~((values > 0) & np.isfinite(values))]
    if len(wrong):
        raise ConfigError(
            f"{wrong[0]} has no logarithm",
            field="losses",
            remedy="use normal scores, which accept every loss",
        )
    return -np.log(values)


def scores(losses: Sequence[float] | Array, fidelity: Levels, kind: Score = "normal") -> Array:
    """Return the scores of losses, whose ranks are taken within each fidelity.

    Args:
        losses: Measured losses, (M,).
        fidelity: The fidelity of each measurement, (M,).
        kind: "normal" or "log".

    Raises:
        ConfigError: As in `log_scores`.

    Example:
        >>> scores([1.0, 2.0, 0.1, 0.2], [0, 0, 1, 1]).round(2).tolist()
        [0.59, -0.59, 0.59, -0.59]
    """
    if kind == "log":
        return log_scores(losses)
    values, level_of = np.asarray(losses, dtype=np.float64), np.asarray(fidelity)
    result = np.zeros(len(values))
    for level in np.unique(level_of):
        result[level_of == level] = normal_scores(values[level_of == level])
    return result


def levels(fidelities: Sequence[Any]) -> list[int]:
    """Return the position of each fidelity among the different ones, from the lowest, 0, to the highest.

    Args:
        fidelities: Values that can be compared, such as numbers of epochs or `istanas.settings.Fidelity`, (M,).

    Example:
        >>> levels([(5, 3), (5, 3), (17, 2)])
        [0, 0, 1]
    """
    order = {each: position for position, each in enumerate(sorted(set(fidelities)))}
    return [order[each] for each in fidelities]


@dataclass(frozen=True, eq=False)
class System:
    """The equations A z = b + noise of all measurements, without their offsets and in units of their noise.

    Args:
        A: Rows of the measurements, centred within each fidelity, times slope / noise, (M, N).
        b: Scores, centred within each fidelity, divided by the noise, (M,).
        n_offsets: Number of fidelities, whose offsets were removed. It reduces the degrees of freedom.
    """

    A: Array
    b: Array
    n_offsets: int = 1

    @property
    def freedom(self) -> int:
        """Degrees of freedom of b, M - n_offsets."""
        return len(self.b) - self.n_offsets


@dataclass(frozen=True)
class Fidelities:
    """The slope and the noise of each fidelity, from the lowest to the highest one, whose slope is 1.

    Args:
        slopes: By how much a score of each fidelity rises with a score of the highest one, (F,).
        noise: Standard deviation of each fidelity's noise, in units of the noise of the highest one, > 0, (F,).
    """

    slopes: tuple[float, ...] = (1.0,)
    noise: tuple[float, ...] = (1.0,)


def linear_system(
    rows: Array, score: Array, fidelity: Levels | None = None, fidelities: Fidelities | None = None
) -> System:
    """Return the equations of all measurements.

    Args:
        rows: Coded architectures, (M, N), as `coding.coded` returns them.
        score: Their scores, (M,).
        fidelity: The fidelity of each measurement, 0 to F - 1, (M,); `None` if there is only one.
        fidelities: The slope and noise of each fidelity; `None` if there is only one.

    Raises:
        ConfigError: If shapes differ, there are no measurements, values are not finite, or a fidelity is unknown.

    Example:
        >>> system = linear_system(np.array([[1.0], [-1.0]]), np.array([3.0, 1.0]))
        >>> system.A.ravel().tolist(), system.b.tolist(), system.freedom
        ([1.0, -1.0], [1.0, -1.0], 1)
    """
    joined = Fidelities() if fidelities is None else fidelities
    levels = np.zeros(len(score), dtype=np.int64) if fidelity is None else np.asarray(fidelity, np.int64)
    _check(rows, score, levels, len(joined.slopes))
    A, b = np.array(rows, dtype=np.float64), np.array(score, dtype=np.float64)
    used = np.unique(levels)
    for level in used:
        own = levels == level
        A[own] = (A[own] - A[own].mean(0)) * (joined.slopes[level] / joined.noise[level])
        b[own] = (b[own] - b[own].mean()) / joined.noise[level]
    return System(A, b, len(used))


def offsets(rows: Array, score: Array, effects: Array, fidelity: Levels, fidelities: Fidelities) -> Array:
    """Return the offset of each fidelity, mean(y) - slope mean(x z); NaN for a fidelity without measurements, (F,).

    Example:
        >>> offsets(np.array([[1.0], [-1.0]]), np.array([3.0, 1.0]), np.ones(1), [0, 0], Fidelities())
        array([2.])
    """
    levels = np.asarray(fidelity)
    found = np.full(len(fidelities.slopes), np.nan)
    for level in np.unique(levels):
        own = levels == level
        found[level] = (score[own] - fidelities.slopes[level] * (rows[own] @ effects)).mean()
    return found


def repeat_variance(architectures: Sequence[object], score: Array) -> tuple[float, int]:
    """Return the variance between repeated measurements of the same architecture, and its degrees of freedom.

    sum over architectures of sum_k (y_k - mean y)^2 / sum of (repeats - 1). The residuals of the additive model contain
    this noise and what the model cannot describe; the difference of both variances is the lack of fit.

    Args:
        architectures: The architecture of each measurement, of one fidelity, hashable, (M,).
        score: The scores, (M,).

    Returns:
        The variance, NaN without repeats, and its degrees of freedom.

    Example:
        >>> repeat_variance(["a", "b", "a"], np.array([1.0, 5.0, 3.0]))
        (2.0, 1)
    """
    groups: dict[object, list[float]] = {}
    for each, value in zip(architectures, score, strict=True):
        groups.setdefault(each, []).append(float(value))
    freedom = sum(len(values) - 1 for values in groups.values())
    total = sum(float(np.square(np.array(values) - np.mean(values)).sum()) for values in groups.values())
    return (total / freedom if freedom else float("nan")), freedom


def _check(rows: Array, score: Array, levels: npt.NDArray[np.int64], n_fidelities: int) -> None:
    if rows.ndim != 2 or len(rows) == 0 or score.shape != (len(rows),) or levels.shape != score.shape:
        raise ConfigError(
            f"{rows.shape} rows, {score.shape} scores and {levels.shape} fidelities",
            field="rows",
            remedy="give one row, score and fidelity for each measurement, at least one",
        )
    if not (np.isfinite(rows).all() and np.isfinite(score).all()):
        raise ConfigError("NaN or infinite scores", field="score", remedy="compute them with scores()")
    if levels.min() < 0 or levels.max() >= n_fidelities:
        raise ConfigError(
            f"{levels.max() if levels.min() >= 0 else levels.min()} is not one of {n_fidelities} fidelities",
            field="fidelity",
            remedy=f"use 0 to {n_fidelities - 1}",
        )
