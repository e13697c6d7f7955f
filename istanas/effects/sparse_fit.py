"""Effects by the LASSO along its path, with an exact and certified code for every l1.

In large spaces there are fewer measurements than unknowns. If few candidates stand out from the others of their
decision, the LASSO finds them all the same.

Source: Hazan, Klivans, Yuan, Hyperparameter optimization: a spectral approach (Harmonica), ICLR 2018; Cho, Soltani,
Hegde, One-shot neural architecture search via compressive sensing (CoNAS), arXiv 1906.02869. Both recover sparse
polynomials with pairs and triples of choices from random designs; here only the candidates themselves have effects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from istanas.effects.coding import Array
from istanas.effects.model import System
from istanas.effects.posterior import check_freedom, ridge_variances
from istanas.sparse import RecoveryResult, critical_l1, recover_certified

Criterion = Literal["bic", "aicc", "cv"]
_FOLDS = 10


@dataclass(frozen=True, eq=False)
class SparsePath:
    """The codes of a falling l1, and which of them a criterion chooses.

    Args:
        l1: The l1 in descending order, from the one above which the code is 0, (L,).
        codes: The exact minimisers, (L, N).
        gaps: Upper bounds of their relative duality gaps, rounding included, (L,).
        criteria: The criterion of each code, (L,); the smallest is chosen.
        chosen: Index of the chosen code.
    """

    l1: Array
    codes: Array
    gaps: Array
    criteria: Array
    chosen: int

    @property
    def code(self) -> Array:
        """The chosen code, (N,). `coding.sum_to_zero` makes deviations from the mean of it."""
        return np.asarray(self.codes[self.chosen])


def sparse_path(
    system: System, criterion: Criterion = "bic", *, n: int = 40, ratio: float = 1e-3, tol: float = 1e-9
) -> SparsePath:
    """Return the LASSO's codes along a path of l1, and choose one.

    z(l1) = argmin 1/2 ||A z - b||^2 + l1 ||z||_1 for n values of l1 in geometric sequence. The codes are recovered in
    one batch: with b / l1 in place of b, every problem has an l1 of 1 and the code z / l1, and neither the code's
    support nor the relative gap changes.

    With m = `System.freedom`, the degrees of freedom d = rank(A_S) of the support S, and the noise variance sigma^2 of
    the ridge (`posterior.ridge_variances`), the criteria are

    - "bic": ||A z - b||^2 / sigma^2 + d log m, which tends to the true support;
    - "aicc": ||A z - b||^2 / sigma^2 + 2 d + 2 d (d + 1) / (m - d - 1), infinite for d >= m - 1;
    - "cv": the mean squared error of the left-out part in a cross-validation with 10 parts, each measurement number k
      in part k mod 10, at the same l1 per measurement. The offsets are those of all measurements.

    Args:
        system: The equations.
        criterion: "bic", "aicc" or "cv".
        n: Number L of values of l1, >= 2.
        ratio: The smallest l1 in units of the largest, in (0, 1).
        tol: Relative duality gap to reach, > 0.

    Raises:
        SolverError: If no solver certifies a code.
        ConfigError: If there are too few measurements to estimate a variance.

    Example:
        >>> system = System(np.eye(4) - 1 / 4, np.array([2.0, -2.0, 0.1, -0.1]))
        >>> bool(sparse_path(system).gaps.max() <= 1e-9)
        True

    Source: Tibshirani, 1996; Zou, Hastie, Tibshirani, On the degrees of freedom of the lasso, Annals of Statistics
        2007; Tibshirani, Taylor, Annals of Statistics 2012 (dependent columns).
    """
    check_freedom(system)
    largest = float(critical_l1(system.A, system.b))
    l1 = np.geomspace(1.0, ratio, n) * (largest if largest > 0 else 1.0)
    results = _recover(system.A, system.b, l1, tol)
    codes = _codes(results, l1)
    left_out = criterion == "cv"
    criteria = _left_out_error(system, l1, tol) if left_out else _information(system, codes, criterion)
    gaps = np.array([result.gap for result in results])
    return SparsePath(l1, codes, gaps, criteria, int(np.argmin(criteria)))


def _recover(A: Array, b: Array, l1: Array, tol: float) -> list[RecoveryResult]:
    """Return certified codes z / l1 for all l1."""
    names = [f"l1 = {value:g}" for value in l1]
    return recover_certified([A] * len(l1), list(b / l1[:, None]), 1.0, tol=tol, names=names)


def _codes(results: Sequence[RecoveryResult], l1: Array) -> Array:
    return np.stack([value * result.z for value, result in zip(l1, results, strict=True)])


def _information(system: System, codes: Array, criterion: Criterion) -> Array:
    m = system.freedom
    noise, _ = ridge_variances(system)
    misfit = ((codes @ system.A.T - system.b) ** 2).sum(1) / noise
    d = np.array([np.linalg.matrix_rank(system.A[:, z != 0]) if z.any() else 0 for z in codes], dtype=float)
    if criterion == "bic":
        return np.asarray(misfit + d * np.log(m))
    room = m - d - 1
    extra = np.where(room > 0, 2 * d * (d + 1) / np.maximum(room, 1.0), np.inf)
    return np.asarray(misfit + 2 * d + extra)


def _left_out_error(system: System, l1: Array, tol: float) -> Array:
    part = np.arange(len(system.b)) % _FOLDS
    total = np.zeros(len(l1))
    for fold in np.unique(part):
        out = part == fold
        scaled = l1 * (~out).mean()
        codes = _codes(_recover(system.A[~out], system.b[~out], scaled, tol), scaled)
        total += ((codes @ system.A[out].T - system.b[out]) ** 2).sum(1)
    return total / len(system.b)
