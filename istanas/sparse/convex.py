"""The LASSO as a convex program: CVXPY with CLARABEL, or with MOSEK, which requires a licence.

CVXPY and MOSEK are imported inside the functions, because `istanas` must work without them. The solver is always
passed by name, because CVXPY would choose MOSEK even without a licence.
"""

from __future__ import annotations

import warnings
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from istanas.errors import SolverError
from istanas.sparse.homotopy import on_support
from istanas.sparse.lasso import Array, Indices, critical_l1, estimated_gap

_OPTIONS: dict[str, dict[str, Any]] = {
    "clarabel": {"tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12},
    "mosek": {
        "mosek_params": {
            "MSK_DPAR_INTPNT_CO_TOL_REL_GAP": 1e-12,
            "MSK_DPAR_INTPNT_CO_TOL_PFEAS": 1e-12,
            "MSK_DPAR_INTPNT_CO_TOL_DFEAS": 1e-12,
        }
    },
}
# Interior-point methods leave every entry slightly off 0. The supports to try are the entries above these fractions
# of ||z||.
_CUTS = (1e-10, 1e-8, 1e-6, 1e-4)


class Solved(NamedTuple):
    """The codes z (B, n) and the numbers of interior-point iterations (B,) of `solve_convex`."""

    z: Array
    n_iter: Indices


def solve_convex(
    A: Array, b: Array, l1_weight: float, solver: str = "clarabel", max_iter: int | None = None
) -> Solved:
    """Minimise 1/2 ||A z - b||^2 + l1 ||z||_1 node by node, then compute the code on the support in closed form.

    Each node is solved in units of ||b||, so that the solver's absolute tolerances do not depend on its scale. The
    closed form replaces the solver's code where it has the smaller duality gap.

    Args:
        A: Measurement matrices, float64 (B, m, n).
        b: Compressed parameters, float64 (B, m).
        l1_weight: l1 > 0.
        solver: "clarabel" or "mosek".
        max_iter: Bound on the interior-point iterations, >= 1; `None` uses the solver's own bound.

    Returns:
        The codes and the numbers of iterations.

    Raises:
        SolverError: If MOSEK has no licence, or the solver fails.

    Example:
        >>> solve_convex(np.eye(2)[None], np.array([[1.0, 0.25]]), 0.5).z.round(9)
        array([[0.5, 0. ]])
    """
    if solver == "mosek" and (reason := _licence_error()) is not None:
        raise SolverError(
            f"MOSEK has no usable licence ({reason})",
            field="solver",
            remedy="put the licence at ~/mosek/mosek.lic or set MOSEKLM_LICENSE_FILE to it, or choose 'homotopy' or "
            "'clarabel', which need none",
        )
    z = np.zeros((A.shape[0], A.shape[2]))
    n_iter = np.zeros(A.shape[0], dtype=np.int64)
    for i in range(A.shape[0]):
        scale = float(np.linalg.norm(b[i]))
        if scale > 0:
            try:
                code, n_iter[i] = _interior_point(A[i], b[i] / scale, l1_weight / scale, solver, max_iter)
            except SolverError:
                # Far above the critical l1 the solver may fail. The minimiser is 0 there.
                if critical_l1(A[i], b[i]) > l1_weight:
                    raise
            else:
                z[i] = _polish(A[i], b[i], scale * code, l1_weight)
    return Solved(z, n_iter)


def mosek_licence() -> str | None:
    """Return whether MOSEK has a usable licence. The licence is checked once per process.

    Returns:
        "usable (MOSEK x.y.z)", or `None` without the package or without a valid licence.

    Example:
        >>> mosek_licence() is None or "usable" in mosek_licence()
        True
    """
    if _licence_error() is not None:
        return None
    import mosek

    return f"usable (MOSEK {'.'.join(str(part) for part in mosek.Env.getversion())})"


@cache
def _licence_error() -> str | None:
    """Return why MOSEK cannot run, or `None`. Cached, because an unreachable licence server takes seconds."""
    try:
        import mosek
    except ImportError:
        return "the package mosek is not installed"
    try:
        mosek.Env().checkoutlicense(mosek.feature.pton)
    except mosek.Error as error:
        code = error.errno
        return f"{getattr(code, 'name', code)}"
    return None


@lru_cache(maxsize=64)
def _problem(m: int, n: int) -> Any:
    """Return the parametrised problem of a shape. Cached, because compiling it takes longer than solving it."""
    import cvxpy

    cp: Any = cvxpy  # Its type information lacks the atoms.
    A, b, l1 = cp.Parameter((m, n)), cp.Parameter(m), cp.Parameter(nonneg=True)
    z = cp.Variable(n)
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(A @ z - b) + l1 * cp.norm1(z)))
    return problem, A, b, l1, z


def _interior_point(
    A: Array, b: Array, l1_weight: float, solver: str, max_iter: int | None
) -> tuple[Array, int]:
    problem, A_, b_, l1_, z_ = _problem(*A.shape)
    options = dict(_OPTIONS[solver])
    if max_iter is not None and solver == "clarabel":
        options["max_iter"] = max_iter
    if max_iter is not None and solver == "mosek":
        options["mosek_params"] = {**options["mosek_params"], "MSK_IPAR_INTPNT_MAX_ITERATIONS": max_iter}
    with warnings.catch_warnings():
        # CVXPY warns that a solution may be inaccurate. Here, the duality gap decides whether it is.
        warnings.simplefilter("ignore")
        try:
            A_.value, b_.value, l1_.value = A, b, l1_weight
            # Without a warm start a code depends only on its own problem, so that a resumed search is bit-identical.
            problem.solve(solver=solver.upper(), warm_start=False, **options)
        except (
            Exception
        ) as error:  # CVXPY, its canonicalisation and the solvers raise errors of many classes.
            _problem.cache_clear()  # CVXPY reuses its solver object, and a failed one breaks later nodes.
            reason = " ".join(str(error).split())
            raise SolverError(
                f"{solver!r} failed ({reason})", field="solver", remedy="choose 'homotopy'"
            ) from error
    if z_.value is None:
        _problem.cache_clear()
        raise SolverError(
            f"{solver!r} ended with the status {problem.status!r}", field="solver", remedy="choose 'homotopy'"
        )
    return np.asarray(z_.value, dtype=np.float64), int(problem.solver_stats.num_iters or 0)


def _polish(A: Array, b: Array, z: Array, l1_weight: float) -> Array:
    """Return the code with the smallest duality gap among z, 0, and the closed forms on the supports of `_CUTS`."""
    size = np.linalg.norm(z)
    signs = np.stack([np.where(np.abs(z) > cut * size, np.sign(z), 0).astype(np.int8) for cut in _CUTS])
    # Supports with dependent columns have no closed form. Their codes have a large gap and are not chosen.
    closed = on_support(
        np.broadcast_to(A, (len(_CUTS), *A.shape)),
        np.broadcast_to(b, (len(_CUTS), *b.shape)),
        l1_weight,
        signs,
    )
    candidates = np.concatenate([z[None], np.zeros_like(z)[None], closed])
    gaps = estimated_gap(A, b, candidates, l1_weight)
    return np.asarray(candidates[int(np.where(np.isnan(gaps), np.inf, gaps).argmin())])
