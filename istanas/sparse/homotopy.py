"""Exact, batched LASSO solver: follow the minimiser from the critical l1, where it is 0, down to the requested l1.

Between two breakpoints the support S and its signs are constant, and the minimiser is linear in the penalty:
z_S(t) = G^-1 (A_S^T b - t sign_S), G = A_S^T A_S. A breakpoint is the next t at which a candidate joins S (its
|A_j^T r| reaches t) or leaves it (its z_i reaches 0). In each iteration, every node of the batch takes its own step.

Squares of values beyond 1e154 overflow. `errstate` silences numpy's warnings about this, because such a code violates
the optimality conditions and is therefore never certified.

Rounding and dependent columns can lead to a wrong support. The optimality conditions detect this, and a primal
active-set method, which requires neither general position nor independent columns, then repairs the node's code.

Source: Osborne, Presnell, Turlach, A new approach to variable selection, IMA J. Numer. Anal. 2000; Efron et al., Least
angle regression, Annals of Statistics 2004; Lawson, Hanson, Solving least squares problems, 1974 (active set).
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from istanas.sparse.lasso import Array, Indices, estimated_gap, kkt_holds, matvec, objective, rmatvec

# A candidate whose |A_j^T r| falls as fast as the penalty never reaches it. Up to rounding, this is the case for
# columns in the span of the columns of S.
_PARALLEL = 1e-9

Mask: TypeAlias = npt.NDArray[np.bool_]
Signs: TypeAlias = npt.NDArray[np.int8]


class Path(NamedTuple):
    """The codes z (B, n) and the numbers of line segments of the paths (B,) of `solve_path`."""

    z: Array
    n_iter: Indices


@np.errstate(over="ignore", invalid="ignore")
def solve_path(A: Array, b: Array, l1_weight: float, max_iter: int | None = None) -> Path:
    """Return the exact minimisers of a batch: z = argmin 1/2 ||A z - b||^2 + l1 ||z||_1.

    Args:
        A: Measurement matrices, float64 (B, m, n); columns of zeros (padding) are never chosen.
        b: Compressed parameters, float64 (B, m).
        l1_weight: l1 > 0.
        max_iter: Bound on the segments of a path, and on the active-set steps; `None` uses 20 (m + n).

    Returns:
        The codes and the numbers of steps.

    Example:
        >>> solve_path(np.eye(2)[None], np.array([[1.0, 0.25]]), 0.5).z
        array([[0.5, 0. ]])
    """
    m, n = A.shape[1:]
    limit = 20 * (m + n) if max_iter is None else max_iter
    signs, n_iter = _follow(A, b, l1_weight, limit)
    z = on_support(A, b, l1_weight, signs)
    for i in np.flatnonzero(~kkt_holds(A, b, z, l1_weight)):
        repaired, steps = active_set(A[i], b[i], l1_weight, z[i], limit)
        n_iter[i] += steps
        better = estimated_gap(A[i], b[i], repaired, l1_weight) < estimated_gap(A[i], b[i], z[i], l1_weight)
        if better or kkt_holds(A[i], b[i], repaired, l1_weight):
            z[i] = repaired
    return Path(z, n_iter)


class _Restricted(NamedTuple):
    """Quantities of problems that are restricted to supports S, as far as they do not depend on the signs."""

    slots: Indices  # The members of S in ascending order, then masked slots.
    used: Mask
    A_S: Array  # Transposed: (B, |S|, m).
    gram: Array
    rows: Indices

    @classmethod
    def to(cls, A: Array, supports: Mask) -> _Restricted:
        count = supports.sum(-1)
        width = int(count.max(initial=0))
        slots = np.argsort(~supports, axis=-1, kind="stable")[:, :width]
        used = np.arange(width) < count[:, None]
        rows = np.arange(len(A))[:, None]
        A_S = A.swapaxes(1, 2)[rows, slots] * used[..., None]
        return cls(slots, used, A_S, _gram(A_S, used), rows)

    def least_squares(self, pull: Array) -> Array:
        """Return z_S = G^-1 pull, where pull = A_S^T b; both are (B, |S|), in slots."""
        return np.where(self.used, _solve(self.gram, pull), 0.0)

    def code(self, b: Array, pull: Array, l1_weight: float, signs: Array) -> Array:
        """Return z_S (B, |S|), see `on_support`; pull = A_S^T b and the signs are (B, |S|), in slots."""
        slope = l1_weight * signs
        z_S = _solve(self.gram, pull - slope)
        z_S += _solve(self.gram, matvec(self.A_S, b - rmatvec(self.A_S, z_S)) - slope)
        return np.where(self.used, z_S, 0.0)

    def to_candidates(self, z_S: Array, n: int) -> Array:
        """Convert z_S to z (B, n). Unused slots refer to candidates outside S, whose code is 0."""
        z = np.zeros((len(z_S), n))
        z[self.rows, self.slots] = z_S
        return z


def on_support(A: Array, b: Array, l1_weight: float, signs: Signs) -> Array:
    """Return the code in closed form on a support with given signs: z_S = G^-1 (A_S^T b - l1 sign_S), refined once.

    Args:
        A: Measurement matrices, float64 (B, m, n).
        b: Compressed parameters, float64 (B, m).
        l1_weight: l1 > 0.
        signs: -1, 0 (not in S) or 1 for every candidate, (B, n).

    Returns:
        z, (B, n); the minimiser if and only if the optimality conditions hold.

    Example:
        >>> on_support(np.eye(2)[None], np.array([[1.0, 2.0]]), 0.5, np.array([[0, 1]], dtype=np.int8))
        array([[0. , 1.5]])
    """
    on_S = _Restricted.to(A, signs != 0)
    signs_S = np.where(on_S.used, signs[on_S.rows, on_S.slots], 0.0)
    z_S = on_S.code(b, matvec(on_S.A_S, b), l1_weight, signs_S)
    return on_S.to_candidates(z_S, A.shape[2])


@np.errstate(over="ignore", invalid="ignore")
def try_supports(A: Array, b: Array, l1_weight: float, supports: Mask) -> tuple[Array, Mask]:
    """Return the codes in closed form on given supports, and whether they satisfy the optimality conditions.

    The signs are first those of the least-squares fit on S, and then those of the resulting code.

    Args:
        A: Measurement matrices, float64 (B, m, n).
        b: Compressed parameters, float64 (B, m).
        l1_weight: l1 > 0.
        supports: Whether each candidate is in the support, (B, n).

    Returns:
        z (B, n), and whether it is the minimiser (B,).

    Example:
        >>> z, right = try_supports(np.eye(2)[None], np.array([[1.0, 0.25]]), 0.5, np.array([[True, False]]))
        >>> z, right
        (array([[0.5, 0. ]]), array([ True]))
    """
    on_S = _Restricted.to(A, supports)
    pull = matvec(on_S.A_S, b)
    z_S = on_S.least_squares(pull)
    for _ in range(2):
        signs = np.sign(z_S)
        z_S = on_S.code(b, pull, l1_weight, signs)
        if np.array_equal(np.sign(z_S), signs):
            break
    z = on_S.to_candidates(z_S, A.shape[2])
    return z, kkt_holds(A, b, z, l1_weight)


@np.errstate(over="ignore", invalid="ignore")
def active_set(A: Array, b: Array, l1_weight: float, z: Array, max_iter: int) -> tuple[Array, int]:
    """Return a minimiser of one node by a primal active-set method. Columns may be dependent.

    Each step lowers P on the signed support: a Newton step if the Gram matrix is regular, else a step in its null
    space. A step ends where a coefficient reaches 0; its candidate then leaves the support. When P is minimal on the
    support, the candidate with the largest |A_j^T r| joins it.

    Args:
        A: Measurement matrix, float64 (m, n).
        b: Compressed parameters, float64 (m,).
        l1_weight: l1 > 0.
        z: Initial code, (n,).
        max_iter: Bound on the steps.

    Returns:
        The last z, which is the best because P never rises, and the number of steps.

    Example:
        >>> z, steps = active_set(np.array([[1.0, 1.0]]), np.array([1.0]), 0.5, np.zeros(2), 10)
        >>> float(z.sum()), kkt_holds([[1.0, 1.0]], [1.0], z, 0.5).item()
        (0.5, True)
    """
    z = z.copy() if objective(A, b, z, l1_weight) < 0.5 * float(b @ b) else np.zeros_like(z)
    sign = np.sign(z)
    for step in range(max_iter):
        S = np.flatnonzero(sign)
        A_S = A[:, S]
        correlation = A.T @ (b - A @ z)
        downhill = correlation[S] - l1_weight * sign[S]
        size = np.sqrt((A_S**2).sum(0)).max(initial=0.0)
        rounding = 16.0 * np.finfo(np.float64).eps * size * (np.linalg.norm(b) + size * np.abs(z).sum())
        if np.abs(downhill).max(initial=0.0) <= max(1e-10 * l1_weight, rounding):
            if kkt_holds(A, b, z, l1_weight):
                return z, step
            outside = np.where(sign == 0, np.abs(correlation), 0.0)
            joins = int(outside.argmax())
            if outside[joins] <= l1_weight:
                return z, step
            sign[joins] = np.sign(correlation[joins])
            continue
        direction, longest = _descent(A_S, downhill)
        falls = direction * sign[S] < 0
        to_zero = np.full(len(S), np.inf)
        to_zero[falls] = z[S][falls] / -direction[falls]
        length = min(longest, float(to_zero.min(initial=np.inf)))
        if not np.isfinite(length):
            return z, step
        z[S] += length * direction
        leaves = S[to_zero <= length]
        z[leaves] = 0.0
        sign[leaves] = 0.0
    return z, max_iter


def _follow(A: Array, b: Array, l1_weight: float, max_iter: int) -> tuple[Signs, Indices]:
    """Return the signs of the minimisers (B, n), 0 outside of their supports, and the numbers of segments (B,)."""
    batch, m, n = A.shape
    signs = np.zeros((batch, n), dtype=np.int8)
    n_iter = np.zeros(batch, dtype=np.int64)
    correlation = rmatvec(A, b)
    first = np.abs(correlation).argmax(-1)
    penalty = np.abs(correlation[np.arange(batch), first])
    # From here on, all arrays contain only the nodes whose path is not complete.
    nodes = np.flatnonzero(penalty > l1_weight)
    A, b, penalty, first = A[nodes], b[nodes], penalty[nodes], first[nodes]
    columns = np.ascontiguousarray(A.swapaxes(1, 2))
    width = min(m, n)
    # The first `count` slots of a node are the members of S in the order of joining; the others are unused.
    slots = np.zeros((len(nodes), width), dtype=np.int64)
    slots[:, 0] = first
    count = np.ones(len(nodes), dtype=np.int64)
    state = np.zeros((len(nodes), n), dtype=np.int8)
    state[np.arange(len(nodes)), first] = np.sign(correlation[nodes, first])
    # A candidate that has just left S (-1: none) lies exactly on the bound. It must not join again at this step.
    left, left_sign = np.full(len(nodes), -1), np.zeros(len(nodes))

    for _ in range(max_iter):
        if len(nodes) == 0:
            break
        row = np.arange(len(nodes))
        k = max(int(count.max()), 1)
        used = np.arange(k) < count[:, None]
        S = slots[:, :k]
        sign_S = np.where(used, state[row[:, None], S], 0).astype(np.float64)
        segment = _segment(A, b, columns[row[:, None], S] * used[..., None], sign_S, used, penalty)

        join_up, join_down = _steps_to_bounds(segment, penalty)
        i = np.flatnonzero(left >= 0)
        join_up[i, left[i]] = np.where(left_sign[i] > 0, np.inf, join_up[i, left[i]])
        join_down[i, left[i]] = np.where(left_sign[i] < 0, np.inf, join_down[i, left[i]])
        closed = (state != 0) | (count == width)[:, None]
        join = np.where(closed, np.inf, np.minimum(join_up, join_down))
        leave = _steps_to_zero(segment, sign_S)

        joiner, leaver = join.argmin(-1), leave.argmin(-1)
        join_step, leave_step, last_step = join[row, joiner], leave[row, leaver], penalty - l1_weight
        step = np.minimum(join_step, leave_step)
        on = step < last_step  # False for a NaN, which the optimality conditions detect later.
        leaves = on & (leave_step <= join_step)
        joins = on & ~leaves
        penalty -= np.where(on, step, last_step)
        n_iter[nodes] += 1

        left[:] = -1
        i = np.flatnonzero(leaves)
        gone, end = slots[i, leaver[i]], count[i] - 1
        left[i], left_sign[i] = gone, state[i, gone]
        slots[i, leaver[i]] = slots[i, end]
        state[i, gone] = 0
        count[i] = end
        i = np.flatnonzero(joins)
        slots[i, count[i]] = joiner[i]
        state[i, joiner[i]] = np.where(join_up[i, joiner[i]] <= join_down[i, joiner[i]], 1, -1)
        count[i] += 1

        if not on.all():
            signs[nodes[~on]] = state[~on]
            nodes, A, b, columns, penalty = nodes[on], A[on], b[on], columns[on], penalty[on]
            slots, state, count, left, left_sign = slots[on], state[on], count[on], left[on], left_sign[on]
    signs[nodes] = state
    return signs, n_iter


class _Segment(NamedTuple):
    """A segment of each path: the values at its upper end, and their change as the penalty falls by 1."""

    code: Array
    grows: Array
    correlation: Array
    falls: Array


def _segment(A: Array, b: Array, A_S: Array, sign_S: Array, used: Mask, penalty: Array) -> _Segment:
    right = np.stack([matvec(A_S, b) - penalty[:, None] * sign_S, sign_S], axis=-1)
    solution = _solve(_gram(A_S, used), right)
    images = np.matmul(solution.swapaxes(1, 2), A_S)
    images[:, 0] = b - images[:, 0]
    rates = np.matmul(images, A)
    return _Segment(solution[..., 0], solution[..., 1], rates[:, 0], rates[:, 1])


def _steps_to_bounds(segment: _Segment, penalty: Array) -> tuple[Array, Array]:
    """Return by how much the penalty falls until A_j^T r reaches it, and until -A_j^T r does; inf if never."""
    above = np.maximum(penalty[:, None] - segment.correlation, 0.0)
    below = np.maximum(penalty[:, None] + segment.correlation, 0.0)
    up, down = 1.0 - segment.falls, 1.0 + segment.falls
    never = np.full_like(up, np.inf)
    return (
        np.divide(above, up, out=never.copy(), where=up > _PARALLEL),
        np.divide(below, down, out=never, where=down > _PARALLEL),
    )


def _steps_to_zero(segment: _Segment, sign_S: Array) -> Array:
    """Return by how much the penalty falls until a member of S reaches 0; inf if never."""
    shrinks = -sign_S * segment.grows
    size = np.maximum(sign_S * segment.code, 0.0)
    return np.divide(size, shrinks, out=np.full_like(size, np.inf), where=shrinks > 0)


def _descent(A_S: Array, downhill: Array) -> tuple[Array, float]:
    """Return a direction that lowers P, and its longest step: 1 for a Newton step, inf in the null space."""
    _, singular, right = np.linalg.svd(A_S, full_matrices=False)
    rank = int((singular > 1e-10 * singular[0]).sum())
    basis = right[:rank]
    flat = downhill - basis.T @ (basis @ downhill)
    if np.linalg.norm(flat) > 1e-8 * np.linalg.norm(downhill):
        return flat, float("inf")
    return basis.T @ ((basis @ downhill) / singular[:rank] ** 2), 1.0


def _gram(A_S: Array, used: Mask) -> Array:
    """Return A_S^T A_S of columns stored as rows (B, k, m), with 1 on the diagonal of unused slots."""
    gram = A_S @ A_S.swapaxes(1, 2)
    diagonals = np.einsum("bkk->bk", gram)  # A view, so that the next line changes `gram`.
    diagonals += ~used
    return gram


def _solve(gram: Array, right: Array) -> Array:
    flat = right.ndim == 2
    columns = right[..., None] if flat else right
    try:
        solution = np.linalg.solve(gram, columns)
    except np.linalg.LinAlgError:
        # numpy fails for the whole batch if one matrix is singular. A ridge of the size of rounding avoids this, and
        # the active-set method later repairs the node.
        k = gram.shape[-1]
        ridge = np.finfo(np.float64).eps * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(k)
        solution = np.linalg.solve(gram + ridge + np.finfo(np.float64).tiny * np.eye(k), columns)
    return np.asarray(solution[..., 0] if flat else solution)
