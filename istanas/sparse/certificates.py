"""Certificates: upper bounds, rounding included, of the distance of a code's objective from the minimum.

All functions are stateless and broadcast over leading batch dimensions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from istanas.sparse.lasso import ORDINARY, Array, as_float64, matvec, rmatvec

DECISION_TOL = 1e-5
"""Largest gap of a certified code, in units of P(z).

Where P(z) is a tiny part of 1/2 ||b||^2, a gap in units of the latter does not bound the error of the code. This was
measured with uniform A (7 x 14 to 7 x 35), l1 = 1e-5, and FISTA stopped at a gap of eps P(z): the two largest entries
differed from those of the minimiser in 252 of 22,260 codes for eps = 1e-3, in 19 of 21,770 for 1e-4, and in none of
21,634 for 1e-5. Rounding z to float64 leaves a gap of up to 1e-10 ||b|| P(z), so 1e-5 certifies exact codes up to ||b||
of about 1e5.
"""

_UNIT = 2.0**-53
_SMALLEST = 5e-324  # The smallest positive number. It replaces a divisor of 0, so that 0 / 0 is 0.


class Certificate(NamedTuple):
    """Upper bounds of P(z) - min P, rounding included, as `certificate` returns them.

    Args:
        gap: The bound in units of P(0) = 1/2 ||b||^2, >= 0, of shape (...).
        decision_gap: The bound in units of P(z), >= 0, of shape (...).
    """

    gap: Any
    decision_gap: Any

    def holds(self, tol: float) -> npt.NDArray[np.bool_]:
        """Return whether the codes are certified: gap <= tol and decision_gap <= DECISION_TOL, of shape (...).

        Example:
            >>> bool(Certificate(1e-10, 0.5).holds(1e-9))
            False
        """
        return np.asarray((self.gap <= tol) & (self.decision_gap <= DECISION_TOL))


def certificate(A: Any, b: Any, z: Any, l1_weight: float = 1e-5) -> Certificate:
    """Return the duality gap of a code in units of P(0) and of P(z), see `duality_gap`.

    Args:
        A: Measurement matrices, (..., m, n).
        b: Compressed parameters, (..., m).
        z: Codes, (..., n).
        l1_weight: l1 > 0.

    Returns:
        Both gaps, of shape (...); 0 where b and z are 0.

    Example:
        >>> certificate([[1.0]], [1.0], [0.5], l1_weight=0.5).holds(1e-9).item()  # the minimiser is 1 - 0.5
        True
    """
    with np.errstate(all="ignore"):
        gap, energy, primal, _ = _bound(A, b, z, l1_weight)
        return Certificate(gap / np.maximum(energy, _SMALLEST), gap / np.maximum(primal, _SMALLEST))


def duality_gap(A: Any, b: Any, z: Any, l1_weight: float = 1e-5, *, relative: bool = True) -> Any:
    """Return an upper bound of P(z) - min P: the duality gap P(z) - D(theta), with an allowance for rounding.

    theta = s r, s = min(1, l1 / ||A^T r||_inf), r = b - A z, D = 1/2 ||b||^2 - 1/2 ||b - theta||^2. The gap is
    computed as 1/2 (1 - s)^2 ||r||^2 + sum_i (l1 |z_i| - s z_i A_i^T r), a sum of terms that are never negative. The
    difference P - D has the same value, but loses all digits to cancellation.

    The allowance for rounding is as follows. Let u = 2^-53, alpha = max |A_ij| and zeta = max |z_i|. A z is computed in
    two parts, the leading one exactly. Therefore r has an error of at most 3 u |r_i| + e, where
    e = n (2n + 6) 2^(1 - q) u alpha zeta and q is about 23. A_i^T r is then known to within
    d = sqrt(m) alpha ((m + 5) u ||r|| + sqrt(m) e). With M = max(||A^T r||_inf, l1) and d' = d + 16 u M, the scale s is
    known to within d' s / M. The gap is computed with the smallest s and raised by 4 d' ||z||_1 and by
    4 (m + n + 16) u of itself, which covers the worst s and A^T r and the rounding of every term. Where d' exceeds
    M / 5, the gap is inf. Extreme b are scaled by the power of two at max |b|, so that no intermediate value overflows
    before the result does. The underflow of values below 1e-300 max |b| is not bounded.

    Args:
        A: Measurement matrices, (..., m, n).
        b: Compressed parameters, (..., m).
        z: Codes, (..., n).
        l1_weight: l1 > 0.
        relative: Whether to divide by P(0) = 1/2 ||b||^2. For b = 0 the quotient is 0 if the gap is 0, else inf.

    Returns:
        The gap, >= 0, float64 of shape (...). It is at least the gap in exact arithmetic, and inf where values leave
        the range of float64.

    Example:
        >>> bool(duality_gap([[1.0]], [1.0], [0.5], l1_weight=0.5) < 1e-14)  # the minimiser is 1 - 0.5
        True

    Source: Higham, Accuracy and Stability of Numerical Algorithms, 2002, chapter 3.
    """
    if relative:
        return certificate(A, b, z, l1_weight).gap
    with np.errstate(all="ignore"):
        gap, _, _, exponent = _bound(A, b, z, l1_weight)
        # A positive gap that underflows is rounded up, so that it stays an upper bound.
        return np.ldexp(gap, 2 * exponent) + _SMALLEST * (gap > 0)


class _Bound(NamedTuple):
    """Quantities in units of 2^exponent. gap, gap / energy and gap / primal are upper bounds of the exact values."""

    gap: Array
    energy: Array
    primal: Array
    exponent: npt.NDArray[np.int32] | int


def _bound(A: Any, b: Any, z: Any, l1_weight: float) -> _Bound:
    A, b, z = as_float64(A), as_float64(b), as_float64(z)
    peak = np.abs(b).max(-1)
    if ORDINARY[0] <= peak.min(initial=1.0) and peak.max(initial=1.0) <= ORDINARY[1]:
        return _bound_in_units(A, b, z, l1_weight, 0)
    # The exponent is limited so that l1 stays a normal number and no factor is infinite. If b is then still too large,
    # the gap is infinite.
    own = math.frexp(l1_weight)[1]
    exponent = np.minimum(np.maximum(np.frexp(peak)[1], max(own, 0) - 1000), min(own, 0) + 960)
    factor = np.ldexp(1.0, -exponent)
    return _bound_in_units(A, b * factor[..., None], z * factor[..., None], l1_weight * factor, exponent)


def _bound_in_units(A: Array, b: Array, z: Array, l1: Any, exponent: Any) -> _Bound:
    m, n = A.shape[-2:]
    magnitude = np.abs(z)
    total = magnitude.sum(-1)
    residual, rest, entry = _residual(A, b, z, magnitude.max(-1))
    correlation = rmatvec(A, residual)
    norm, rest = np.sqrt(np.vecdot(residual, residual)), m**0.5 * rest

    # A^T r is known to within `off`, and the scale s = l1 / largest to within a `share` of itself.
    largest = np.maximum(np.abs(correlation).max(-1), l1)
    off = m**0.5 * entry * ((m + 5) * _UNIT * norm + rest) + 16.0 * _UNIT * largest
    share = off / largest
    scale = (l1 / largest) * (1.0 - share)
    cost = np.asarray(l1)[..., None] * magnitude
    slack = np.maximum(cost - scale[..., None] * (z * correlation), 0.0).sum(-1)
    gap = 0.5 * ((1.0 - scale) * (norm + rest)) ** 2 + slack + 4.0 * off * total
    gap = np.where((share <= 0.2) & (gap < np.inf), (1.0 + 4.0 * (m + n + 16) * _UNIT) * gap, np.inf)
    primal = 0.5 * np.maximum((1.0 - (m + 8) * _UNIT) * norm - rest, 0.0) ** 2 + l1 * total
    return _Bound(gap, 0.5 * np.vecdot(b, b), primal, exponent)


def _residual(A: Array, b: Array, z: Array, largest: Array) -> tuple[Array, Array, Array]:
    """Return r = b - A z to nearly full precision, its error term `rest`, and the largest |entry| of A.

    The error of r is at most 3 u |r| + rest.

    A and z are split at a bit for which the product of the leading parts is exact in any order of summation.
    """
    n = A.shape[-1]
    bits = (53 - (n - 1).bit_length()) // 2
    cut = 2.0 ** (54 - bits)
    # One long axis broadcasts ten times faster than two short ones.
    flat = A.reshape(*A.shape[:-2], A.shape[-2] * n)
    entry = np.abs(flat).max(-1)
    at_A, at_z = cut * entry[..., None], cut * largest[..., None]
    A_high, z_high = flat + at_A, z + at_z
    A_high -= at_A
    z_high -= at_z
    lead = b - matvec(A_high.reshape(A.shape), z_high)
    residual = lead - (matvec(A, z - z_high) + matvec((flat - A_high).reshape(A.shape), z_high))
    rest = (n * (2 * n + 6) * 2.0 ** (1 - bits) * _UNIT) * entry * largest
    return residual, rest, entry
