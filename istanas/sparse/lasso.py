"""The LASSO, P(z) = 1/2 ||A z - b||^2 + l1 ||z||_1: objective, dual point, optimality, top-s support, margin.

All functions are stateless, compute in float64 numpy, and broadcast over leading batch dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from istanas.errors import ConfigError, SolverError

Array: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.int64]
# Range of max |b|. Outside this range squares may under- or overflow, so problems are solved in units of their b.
ORDINARY = (1e-75, 1e75)
_EPS = float(np.finfo(np.float64).eps)


def as_float64(values: Any) -> Array:
    """Convert an array, a tensor (on any device, with or without gradient) or a nested sequence to float64 numpy.

    Args:
        values: Numbers of any kind and shape.

    Example:
        >>> as_float64([1, 2]).dtype
        dtype('float64')
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()  # numpy has no bfloat16.
    return np.asarray(values, dtype=np.float64)


def matvec(A: Array, x: Array) -> Array:
    """Return A x, (..., m), of A (..., m, n) and x (..., n).

    Example:
        >>> matvec(np.eye(2), np.array([1.0, 2.0]))
        array([1., 2.])
    """
    return (A @ x[..., None])[..., 0]


def rmatvec(A: Array, r: Array) -> Array:
    """Return A^T r, (..., n), of A (..., m, n) and r (..., m).

    Example:
        >>> rmatvec(np.array([[1.0, 2.0]]), np.array([3.0]))
        array([3., 6.])
    """
    return (r[..., None, :] @ A)[..., 0, :]


def objective(A: Any, b: Any, z: Any, l1_weight: float = 1e-5) -> Any:
    """Return the LASSO objective, P(z) = 1/2 ||A z - b||^2 + l1 ||z||_1, without division by m or n.

    Args:
        A: Measurement matrices, (..., m, n).
        b: Compressed parameters, (..., m).
        z: Codes, (..., n).
        l1_weight: l1 > 0.

    Returns:
        P(z), float64 of shape (...); inf where it is above the range of float64.

    Example:
        >>> float(objective([[1.0, 0.0]], [2.0], [1.0, 3.0], l1_weight=0.5))
        2.5

    Source: Yang et al., ISTA-NAS, NeurIPS 2020.
    """
    A, b, z = as_float64(A), as_float64(b), as_float64(z)
    with np.errstate(over="ignore"):
        # Halving before squaring avoids an overflow where the result is finite.
        half = 0.5 * (b - matvec(A, z))
        return 2.0 * (half**2).sum(-1) + l1_weight * np.abs(z).sum(-1)


def dual_point(A: Any, b: Any, z: Any, l1_weight: float = 1e-5) -> Array:
    """Return a feasible point of the dual: theta = r min(1, l1 / ||A^T r||_inf), r = b - A z.

    Args:
        A: Measurement matrices, (..., m, n).
        b: Compressed parameters, (..., m).
        z: Codes, (..., n).
        l1_weight: l1 > 0.

    Returns:
        theta, (..., m), with ||A^T theta||_inf <= l1.

    Example:
        >>> dual_point([[2.0]], [4.0], [0.0], l1_weight=1.0)
        array([0.5])

    Source: Bonnefoy et al., Dynamic screening, IEEE TSP 2015 (residual scaling).
    """
    A, b, z = as_float64(A), as_float64(b), as_float64(z)
    with np.errstate(over="ignore", invalid="ignore"):
        residual = b - matvec(A, z)
        theta: Array = residual * _feasible_scale(rmatvec(A, residual), l1_weight)[..., None]
        return theta


def estimated_gap(A: Array, b: Array, z: Array, l1_weight: float = 1e-5) -> Any:
    """Return the relative duality gap in float64: the formula of `duality_gap` without its allowance for rounding.

    It is faster and is used to compare codes. It is not a certificate.

    Args:
        A: Measurement matrices, (..., m, n).
        b: Compressed parameters, (..., m).
        z: Codes, (..., n).
        l1_weight: l1 > 0.

    Returns:
        The gap in units of 1/2 ||b||^2 (for b = 0: of 1), float64 of shape (...).

    Example:
        >>> float(estimated_gap(np.eye(1), np.ones(1), np.array([0.5]), l1_weight=0.5))
        0.0
    """
    residual = b - matvec(A, z)
    correlation = rmatvec(A, residual)
    scale = _feasible_scale(correlation, l1_weight)[..., None]
    slack = np.maximum(l1_weight * np.abs(z) - z * correlation * scale, 0.0)
    gap = 0.5 * ((residual * (1.0 - scale)) ** 2).sum(-1) + slack.sum(-1)
    energy = 0.5 * (b**2).sum(-1)
    return gap / np.where(energy > 0, energy, 1.0)


def critical_l1(A: Any, b: Any) -> Any:
    """Return the smallest l1 whose minimiser is zero: ||A^T b||_inf.

    Args:
        A: Measurement matrices, (..., m, n).
        b: Compressed parameters, (..., m).

    Returns:
        float64 of shape (...).

    Example:
        >>> float(critical_l1([[1.0, -3.0]], [2.0]))
        6.0
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return np.abs(rmatvec(as_float64(A), as_float64(b))).max(-1)


def kkt_violation(A: Any, b: Any, z: Any, l1_weight: float = 1e-5) -> Any:
    """Return the violation of the optimality conditions by z.

    With r = b - A z, this is the maximum over i of |A_i^T r - l1 sign(z_i)| where z_i != 0, and of
    max(0, |A_i^T r| - l1) where z_i = 0.

    Args:
        A: Measurement matrices, (..., m, n).
        b: Compressed parameters, (..., m).
        z: Codes, (..., n).
        l1_weight: l1 > 0.

    Returns:
        float64 of shape (...), 0 for an exact minimiser; inf or NaN where A^T r leaves the range of float64.

    Example:
        >>> float(kkt_violation([[1.0]], [1.0], [0.25], l1_weight=0.5))
        0.25
    """
    A, b, z = as_float64(A), as_float64(b), as_float64(z)
    with np.errstate(over="ignore", invalid="ignore"):
        correlation = rmatvec(A, b - matvec(A, z))
        inside = np.maximum(np.abs(correlation) - l1_weight, 0.0)
        return np.where(z != 0, np.abs(correlation - l1_weight * np.sign(z)), inside).max(-1)


def kkt_holds(A: Any, b: Any, z: Any, l1_weight: float = 1e-5) -> Any:
    """Return whether z satisfies the optimality conditions up to rounding in float64.

    `kkt_violation` may be at most 1e-8 l1 or, if larger, the rounding error of A^T (b - A z), but never above 1e-2 l1:
    where a singular system made z huge, the bound on the rounding error would allow any violation.

    Args:
        A: Measurement matrices, (..., m, n).
        b: Compressed parameters, (..., m).
        z: Codes, (..., n).
        l1_weight: l1 > 0.

    Returns:
        bool of shape (...).

    Example:
        >>> bool(kkt_holds([[1.0]], [1.0], [0.5], l1_weight=0.5)), bool(kkt_holds([[1.0]], [1.0], [0.4], 0.5))
        (True, False)
    """
    A, b, z = as_float64(A), as_float64(b), as_float64(z)
    violation = kkt_violation(A, b, z, l1_weight)
    holds = violation <= 1e-8 * l1_weight
    if holds.all():
        return holds
    # An overflow is limited by the 1e-2 l1 below; a NaN (inf times 0) compares as False.
    with np.errstate(over="ignore", invalid="ignore"):
        columns = np.sqrt((A**2).sum(-2))
        terms = np.sqrt((b**2).sum(-1)) + (columns * np.abs(z)).sum(-1)
        rounding = 16.0 * _EPS * columns.max(-1) * terms
    allowed = np.minimum(np.maximum(rounding, 1e-8 * l1_weight), 1e-2 * l1_weight)
    return violation <= allowed


def top_support(z: Any, sparsity: int, *, groups: Sequence[int] | npt.NDArray[Any] | None = None) -> Indices:
    """Return the indices of the `sparsity` largest |z|; among equal entries, those with lower indices are preferred.

    If z has fewer nonzeros, the first zeros are added, because a node of the network needs `sparsity` operations.

    Args:
        z: One code, (n,), array or tensor.
        sparsity: Number of entries to keep, 1 .. n, or 1 .. number of groups.
        groups: The group (edge) of every candidate, (n,). If given, at most one entry of each group is kept.

    Returns:
        The indices in ascending order, int64 of shape (sparsity,).

    Raises:
        ConfigError: If `sparsity` is out of range or `groups` is not of length n.
        SolverError: If z is not one code of finite numbers.

    Example:
        >>> top_support([0.1, -3.0, 2.0], 2).tolist()
        [1, 2]
        >>> top_support([0.1, -3.0, 2.0], 2, groups=[0, 1, 1]).tolist()
        [0, 1]
    """
    return np.sort(_ranked(np.abs(as_float64(z)), sparsity, groups)[:sparsity])


def support_margin(z: Any, sparsity: int, *, groups: Sequence[int] | npt.NDArray[Any] | None = None) -> float:
    """Return the margin of `top_support`: by how much entries of |z| must change before another candidate is kept.

    This is the s-th largest |z| minus the next one. With groups, a kept candidate may be replaced by one of its own
    group, or by one of a group without a kept candidate. The margin is the smallest of these differences.

    Args:
        z: One code, (n,), array or tensor.
        sparsity: As in `top_support`.
        groups: As in `top_support`.

    Returns:
        The margin, >= 0; inf if no other candidate could be kept.

    Raises:
        ConfigError: As in `top_support`.

    Example:
        >>> support_margin([0.5, -3.0, 2.0], 2)
        1.5
        >>> support_margin([5.0, 3.0, 2.5], 2, groups=[0, 1, 1])
        0.5
    """
    magnitude = np.abs(as_float64(z))
    order = _ranked(magnitude, sparsity, groups)
    kept, left = order[:sparsity], order[sparsity:]
    margins = [magnitude[kept[-1]] - magnitude[left[0]]] if len(left) else []
    if groups is not None:
        label = np.asarray(groups)
        for winner in kept:
            others = np.delete(magnitude, winner)[np.delete(label, winner) == label[winner]]
            margins += [magnitude[winner] - others.max()] if len(others) else []
    return float(min(margins, default=np.inf))


def _ranked(magnitude: Array, sparsity: int, groups: Sequence[int] | npt.NDArray[Any] | None) -> Indices:
    """Return the candidates that can be kept, in descending order of |z|."""
    if magnitude.ndim != 1:
        raise SolverError(f"shape {magnitude.shape}", field="z", remedy="give one code of shape (n,)")
    if not np.isfinite(magnitude).all():
        raise SolverError("NaN or infinite entries", field="z", remedy="recover the code from finite A and b")
    order = np.argsort(-magnitude, kind="stable")
    if groups is not None:
        label = np.asarray(groups)
        if label.shape != magnitude.shape:
            raise ConfigError(
                f"shape {label.shape}",
                field="groups",
                remedy=f"give one group for each of the {len(magnitude)} candidates",
            )
        # In descending order of |z|, the first candidate of a group is its best.
        order = order[np.sort(np.unique(label[order], return_index=True)[1])]
    if not 1 <= sparsity <= len(order):
        what = "candidates" if groups is None else "edges, each with one operation"
        raise ConfigError(
            f"{sparsity} cannot be chosen among the node's {len(order)} {what}",
            field="sparsity",
            remedy=f"choose 1 to {len(order)}",
        )
    return order.astype(np.int64)


def truncation_error(z: Any, support: Any) -> float:
    """Return the norm of the entries outside the support: ||z - z_S||_2.

    Args:
        z: One code, (n,), array or tensor.
        support: Kept indices.

    Returns:
        The norm, >= 0.

    Example:
        >>> truncation_error([3.0, 1.0, 4.0], [1])
        5.0
    """
    rest = as_float64(z).copy()
    rest[np.asarray(support, dtype=np.int64)] = 0.0
    return float(np.linalg.norm(rest))


def _feasible_scale(correlation: Array, l1_weight: float) -> Array:
    largest = np.abs(correlation).max(-1)
    return np.asarray(l1_weight / np.maximum(largest, l1_weight), dtype=np.float64)
