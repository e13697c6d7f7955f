"""The LASSO as a convex program: CVXPY with CLARABEL (needs no licence) or MOSEK (needs one).

CVXPY and MOSEK are imported inside the functions: `istanas` itself must start without them. The solver is
always named, as CVXPY left to choose takes MOSEK, licence or not.
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
# Interior points leave every entry a little off 0: the supports to try are the entries above these shares of
# ||z||.
_CUTS = (1e-10, 1e-8, 1e-6, 1e-4)


class Solved(NamedTuple):
    """What `solve_convex` returns: codes z (B, n) and the interior-point iterations, n_iter (B,)."""

    z: Array
    n_iter: Indices


def solve_convex(
    A: Array, b: Array, l1_weight: float, solver: str = "clarabel", max_iter: int | None = None
) -> Solved:
    """Minimise 1/2 ||A z - b||^2 + l1 ||z||_1 node by node, then put exact numbers on the support found.

    A node is solved in units of ||b||, so that the solver's absolute tolerances mean the same for every
    scale. The closed form on the support replaces the solver's own numbers where it has the smaller duality
    gap.

    Args:
        A: measurement matrices, float64 (B, m, n).
        b: compressed parameters, float64 (B, m).
        l1_weight: l1 > 0.
        solver: "clarabel" or "mosek".
        max_iter: bound on the interior-point iterations; default: the solver's own.

    Returns:
        The codes and the iterations.

    Raises:
        SolverError: if MOSEK has no licence, or the solver gives up.

    Example:
        >>> solve_convex(np.eye(2)[None], np.array([[1.0, 0.25]]), 0.5).z.round(9)
        array([[0.5, 0. ]])
    """
    if solver == "mosek" and (reason := _licence_error()) is not None:
        raise SolverError(
            f"solver is 'mosek' but MOSEK has no usable licence ({reason}): put the file at ~/mosek/mosek.lic"
            " or name it in MOSEKLM_LICENSE_FILE, or choose solver 'homotopy' or 'clarabel', which need none"
        )
    z = np.zeros((A.shape[0], A.shape[2]))
    n_iter = np.zeros(A.shape[0], dtype=np.int64)
    for i in range(A.shape[0]):
        scale = float(np.linalg.norm(b[i]))
        if scale > 0:
            try:
                code, n_iter[i] = _interior_point(A[i], b[i] / scale, l1_weight / scale, solver, max_iter)
            except SolverError:
                # Far above the critical l1 the solver fails, but the minimiser is 0.
                if critical_l1(A[i], b[i]) > l1_weight:
                    raise
            else:
                z[i] = _polish(A[i], b[i], scale * code, l1_weight)
    return Solved(z, n_iter)


def mosek_licence() -> str | None:
    """What MOSEK says of its licence, asked once a process: a few words if it may run, None if not.

    Returns:
        "usable (MOSEK x.y.z)", or None without the package, without a licence or with an expired one.

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
    """Why MOSEK cannot run, in a few words, or None. Cached: a dead licence host takes seconds to answer."""
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
    """The parametrised problem of a shape: compiling it takes longer than solving it."""
    import cvxpy

    cp: Any = cvxpy  # its type information names no atoms
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
        # "Solution may be inaccurate": the duality gap is the judge of that.
        warnings.simplefilter("ignore")
        try:
            A_.value, b_.value, l1_.value = A, b, l1_weight
            # Without warm start a code depends on its own problem alone, and a resumed search finds the same bits.
            problem.solve(solver=solver.upper(), warm_start=False, **options)
        except Exception as error:  # of cvxpy, of its canonicalisation, of the solver
            _problem.cache_clear()  # CVXPY keeps the solver, and one that broke down spoils later nodes
            reason = " ".join(str(error).split())
            raise SolverError(
                f"solver is {solver!r} and it gave up ({reason}): choose solver 'homotopy'"
            ) from error
    if z_.value is None:
        _problem.cache_clear()
        raise SolverError(f"solver is {solver!r} and ended {problem.status!r}: choose solver 'homotopy'")
    return np.asarray(z_.value, dtype=np.float64), int(problem.solver_stats.num_iters or 0)


def _polish(A: Array, b: Array, z: Array, l1_weight: float) -> Array:
    """The best, by duality gap, of z and the closed forms on the supports that its larger entries may be."""
    size = np.linalg.norm(z)
    signs = np.stack([np.where(np.abs(z) > cut * size, np.sign(z), 0).astype(np.int8) for cut in _CUTS])
    # More columns than measurements, or dependent ones, have no closed form: the gap sorts those out.
    closed = on_support(
        np.broadcast_to(A, (len(_CUTS), *A.shape)),
        np.broadcast_to(b, (len(_CUTS), *b.shape)),
        l1_weight,
        signs,
    )
    candidates = np.concatenate([z[None], np.zeros_like(z)[None], closed])
    gaps = estimated_gap(A, b, candidates, l1_weight)
    return np.asarray(candidates[int(np.where(np.isnan(gaps), np.inf, gaps).argmin())])
