"""Recovery of sparse codes from compressed parameters: one interface to all solvers, and certified results."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from istanas.errors import SolverError
from istanas.settings import Solver
from istanas.sparse.certificates import DECISION_TOL, Certificate, certificate
from istanas.sparse.convex import solve_convex
from istanas.sparse.homotopy import solve_path, try_supports
from istanas.sparse.ista import iterate
from istanas.sparse.lasso import ORDINARY, Array, Indices, as_float64, critical_l1, objective

SOLVERS: tuple[str, ...] = get_args(Solver)
FALLBACKS = ("homotopy", "clarabel", "fista")  # Tried in this order after the requested solver.
FALLBACK_FISTA_ITER = 300_000  # Iterations of FISTA as the last fallback.
# Errors that a failing solver raises. Invalid arguments are rejected earlier.
_SOLVER_FAILURES = (SolverError, ArithmeticError, RuntimeError, np.linalg.LinAlgError)
_LEAST, _LARGEST = 5e-324, float(np.finfo(np.float64).max)  # The smallest and the largest positive number.
_CHUNK = 128  # Nodes certified at a time: their matrices fit into the processor's cache.

Members: TypeAlias = npt.NDArray[np.bool_] | None


class RecoveryWarning(UserWarning):
    """A warning that the codes of some nodes are not certified to the tolerance. It gives their gaps."""


@dataclass(frozen=True, eq=False)
class RecoveryResult:
    """The code of one node with its certificate.

    Args:
        z: The code, (n,), of the kind, dtype and device of b.
        gap: An upper bound, rounding included, of the relative duality gap of the float64 code,
            (P(z) - D) / (1/2 ||b||^2), >= 0; 0 for b = 0.
        n_iter: The solver's steps, >= 0: gradient steps, segments of the path, or interior-point iterations.
        converged: Whether gap <= tol and decision_gap <= DECISION_TOL, of the float64 code.
        objective: P(z).
        solver: Name of the solver that found the code.
        support_reused: Whether the given support was still right and no path was followed.
        decision_gap: The same bound in units of P(z), which decides whether the largest entries can be trusted; NaN if
            it was not computed.
    """

    z: Any
    gap: float
    n_iter: int
    converged: bool
    objective: float
    solver: str
    support_reused: bool = False
    decision_gap: float = float("nan")

    @property
    def support(self) -> Indices:
        """The indices of the nonzeros of z in ascending order, for the `support` of the next `recover`."""
        return np.flatnonzero(as_float64(self.z)).astype(np.int64)


def recover(
    A: Any,
    b: Any,
    l1_weight: float = 1e-5,
    solver: str = "homotopy",
    *,
    tol: float = 1e-9,
    max_iter: int | None = None,
    support: Sequence[int] | npt.NDArray[Any] | None = None,
    costs: Sequence[float] | npt.NDArray[Any] | None = None,
) -> RecoveryResult:
    """Recover the sparse code of one node: z = argmin 1/2 ||A z - b||^2 + l1 sum_i c_i |z_i|.

    Without costs, all c_i are 1. With costs, y_i = c_i z_i turns the problem into the one without costs, with the
    columns A_i / c_i, so every solver solves it, and the gaps of the result are certified for y.

    Args:
        A: Measurement matrix, (m, n), array or tensor; m >= n is allowed.
        b: Compressed parameters, (m,), array or tensor.
        l1_weight: l1 > 0.
        solver: "homotopy" (exact), "clarabel", "mosek" (requires a licence), "ista" or "fista" (approximate).
        tol: Relative duality gap to reach, > 0.
        max_iter: Bound on the solver's steps, >= 1; `None` uses the solver's own bound.
        support: The nonzeros of an earlier code (`RecoveryResult.support`), which are tried first; only for "homotopy".
        costs: Weights c of the l1 norm, (n,), > 0, see `cost_weights`; `None` for 1.

    Returns:
        The code and its certificate. If columns are dependent, there may be several minimisers; any of them may be
        returned.

    Raises:
        SolverError: If an argument is invalid, or the solver cannot run.

    Warns:
        RecoveryWarning: If the gap stays above `tol`, or above `DECISION_TOL` P(z).

    Example:
        >>> result = recover(np.eye(2), np.array([1.0, 0.25]), l1_weight=0.5)
        >>> result.z, result.converged
        (array([0.5, 0. ]), True)
    """
    supports, all_costs = (None if each is None else [each] for each in (support, costs))
    problems = _checked([A], [b], l1_weight, solver, tol, max_iter, supports, all_costs)
    return _warned_of(problems, l1_weight, solver, tol, max_iter)[0]


def recover_nodes(
    As: Sequence[Any] | Array | Tensor,
    bs: Sequence[Any] | Array | Tensor,
    l1_weight: float = 1e-5,
    solver: str = "homotopy",
    *,
    tol: float = 1e-9,
    max_iter: int | None = None,
    supports: Sequence[Sequence[int] | npt.NDArray[Any] | None] | None = None,
    costs: Sequence[Sequence[float] | npt.NDArray[Any]] | None = None,
) -> list[RecoveryResult]:
    """Recover the codes of many nodes at once. Nodes may differ in size, and do not influence each other.

    Args:
        As: Measurement matrices, each (m, n).
        bs: Compressed parameters, each (m,): a sequence, or the rows of an array or tensor.
        l1_weight: As in `recover`.
        solver: As in `recover`.
        tol: As in `recover`.
        max_iter: As in `recover`.
        supports: For every node an earlier support or `None`.
        costs: For every node the weights of `recover`, or `None` for 1 everywhere.

    Returns:
        One result per node, in order.

    Raises:
        SolverError: As in `recover`. The message names the node.

    Warns:
        RecoveryWarning: Once, with the gaps of all nodes that did not converge.

    Example:
        >>> results = recover_nodes([np.eye(2), np.eye(1)], [np.ones(2), np.zeros(1)], l1_weight=0.5)
        >>> [result.z.tolist() for result in results]
        [[0.5, 0.5], [0.0]]
    """
    problems = _checked(list(As), list(bs), l1_weight, solver, tol, max_iter, supports, costs)
    return _warned_of(problems, l1_weight, solver, tol, max_iter)


def recover_certified(
    As: Sequence[Any],
    bs: Sequence[Any],
    l1_weight: float = 1e-5,
    solver: str = "homotopy",
    *,
    tol: float = 1e-9,
    supports: Sequence[Sequence[int] | npt.NDArray[Any] | None] | None = None,
    costs: Sequence[Sequence[float] | npt.NDArray[Any]] | None = None,
    names: Sequence[str] | None = None,
) -> list[RecoveryResult]:
    """Recover certified codes of many nodes. Nodes on which a solver fails are passed to the next solver.

    The solvers are `solver` and then those of `FALLBACKS`, the last of which may take many steps.

    Args:
        As: As in `recover_nodes`.
        bs: As in `recover_nodes`.
        l1_weight: As in `recover`.
        solver: As in `recover`.
        tol: As in `recover`.
        supports: As in `recover_nodes`.
        costs: As in `recover_nodes`.
        names: Names of the nodes for the error message; `None` uses their numbers.

    Returns:
        One converged result per node, in order. Its `solver` is the one that succeeded.

    Raises:
        SolverError: As in `recover_nodes`; also if no solver certifies a node, with the gap of each solver.

    Example:
        >>> [result.solver for result in recover_certified([np.eye(2)], [np.ones(2)], 0.5)]
        ['homotopy']
    """
    problems = _checked(list(As), list(bs), l1_weight, solver, tol, None, supports, costs)
    stages: list[tuple[str, int | None, Members]] = [(solver, None, problems.members)]
    for name in FALLBACKS:
        # The requested solver is repeated only where the result can differ: without a support, or with more steps.
        if name == "homotopy" and supports is not None:
            stages += [(name, None, problems.members), (name, None, None)][solver == name :]
        elif name != solver or name == "fista":
            stages.append((name, FALLBACK_FISTA_ITER if name == "fista" else None, None))
    results: dict[int, RecoveryResult] = {}
    failures: dict[int, list[str]] = {node: [] for node in range(len(As))}
    for name, max_iter, members in stages:
        left = [node for node in failures if node not in results]
        if not left:
            break
        parts = problems._replace(members=members).of(left)
        tried = name if members is None else f"{name} from the last support"
        for node, found in zip(left, _tried(parts, l1_weight, name, tol, max_iter), strict=True):
            if isinstance(found, str):
                failures[node].append(f"{tried}: {found}")
            elif found.converged:
                results[node] = found
            else:
                failures[node].append(f"{tried}: {_missed(found, tol)}")
    left = [node for node in failures if node not in results]
    if left:
        named = [str(node) if names is None else names[node] for node in left]
        raise SolverError(
            f"with {l1_weight:g} no solver recovers {', '.join(named[:8])}{', ...' if left[8:] else ''} to a relative "
            f"duality gap of {tol:g} ({'; '.join(failures[left[0]])})",
            field="l1_weight",
            remedy="raise it, or lower arch_lr",
        )
    return [results[node] for node in failures]


class _Problems(NamedTuple):
    """A batch of checked problems, in the variables y = c z if there are costs."""

    A: Array
    b: Array
    sizes: list[int]
    given: list[Any]  # The vectors b as the caller passed them.
    members: Members  # Whether each candidate is in the given support.
    costs: Array | None  # c, (B, n). The columns of A are divided by them.

    def of(self, nodes: list[int]) -> _Problems:
        """Return the problems of these nodes."""
        if len(nodes) == len(self.sizes):
            return self
        return _Problems(
            self.A[nodes],
            self.b[nodes],
            [self.sizes[node] for node in nodes],
            [self.given[node] for node in nodes],
            None if self.members is None else self.members[nodes],
            None if self.costs is None else self.costs[nodes],
        )


def _tried(
    problems: _Problems, l1_weight: float, solver: str, tol: float, max_iter: int | None
) -> list[RecoveryResult | str]:
    """Return one solver's results, or why it failed on a node. A failure does not affect the other nodes."""
    try:
        return [*_certify(problems, l1_weight, solver, tol, max_iter)]
    except _SOLVER_FAILURES as error:
        if len(problems.sizes) == 1:
            return [" ".join(str(error).split())[:200]]
    single = [problems.of([node]) for node in range(len(problems.sizes))]
    return [found for part in single for found in _tried(part, l1_weight, solver, tol, max_iter)]


def _warned_of(
    problems: _Problems, l1_weight: float, solver: str, tol: float, max_iter: int | None
) -> list[RecoveryResult]:
    """Return one solver's results, and warn if some did not converge."""
    results = _certify(problems, l1_weight, solver, tol, max_iter)
    if not all(result.converged for result in results):
        _warn(results, solver, tol)
    return results


def _certify(
    problems: _Problems, l1_weight: float, solver: str, tol: float, max_iter: int | None
) -> list[RecoveryResult]:
    """Return one solver's codes with their certificates."""
    A, b, sizes, bs, _, costs = problems
    if len(sizes) == 0:
        return []
    y, n_iter, reused = _solve(problems, l1_weight, solver, tol, max_iter)

    found = _certificates(A, b, y, l1_weight)
    figures = (found.gap, n_iter, found.holds(tol), objective(A, b, y, l1_weight), reused, found.decision_gap)
    z = y if costs is None else y / costs
    return [
        RecoveryResult(_like(given, code[:size]), gap, steps, converged, value, solver, again, decision_gap)
        for given, code, size, gap, steps, converged, value, again, decision_gap in zip(
            bs, z, sizes, *(column.tolist() for column in figures), strict=True
        )
    ]


def _certificates(A: Array, b: Array, z: Array, l1_weight: float) -> Certificate:
    """Return the certificates of a batch, computed in parts because large temporary arrays are slow."""
    if len(A) <= _CHUNK:
        return certificate(A, b, z, l1_weight)
    parts = [slice(start, start + _CHUNK) for start in range(0, len(A), _CHUNK)]
    found = [certificate(A[part], b[part], z[part], l1_weight) for part in parts]
    return Certificate(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _solve(
    problems: _Problems, l1_weight: float, solver: str, tol: float, max_iter: int | None
) -> tuple[Array, Indices, npt.NDArray[np.bool_]]:
    """Return codes (B, n), steps (B,), and whether the given support was right (B,). Extreme b are scaled."""
    peak = np.abs(problems.b).max(-1)
    if ORDINARY[0] <= peak.min() and peak.max() <= ORDINARY[1]:
        return _solve_in_units(problems, l1_weight, solver, tol, max_iter)
    extreme = (peak > 0) & ~((peak >= ORDINARY[0]) & (peak <= ORDINARY[1]))
    z, n_iter = np.zeros((len(peak), problems.A.shape[2])), np.zeros(len(peak), dtype=np.int64)
    reused = np.zeros(len(peak), dtype=np.bool_)
    if not extreme.all():
        nodes = np.flatnonzero(~extreme)
        part = problems.of(nodes.tolist())
        z[nodes], n_iter[nodes], reused[nodes] = _solve_in_units(part, l1_weight, solver, tol, max_iter)
    for node in np.flatnonzero(extreme).tolist():
        part, exponent = problems.of([node]), int(np.frexp(peak[node])[1])
        with np.errstate(over="ignore"):
            part = part._replace(b=np.ldexp(part.b, -exponent))
            own_l1 = float(np.ldexp(l1_weight, -exponent))
        if critical_l1(part.A, part.b).item() <= own_l1:
            continue  # The minimiser is 0. In these units l1 may be infinite.
        code, n_iter[[node]], reused[[node]] = _solve_in_units(
            part, max(own_l1, _LEAST), solver, tol, max_iter
        )
        with np.errstate(over="ignore"):
            z[node] = np.clip(np.ldexp(code[0], exponent), -_LARGEST, _LARGEST)
    return z, n_iter, reused


def _solve_in_units(
    problems: _Problems, l1_weight: float, solver: str, tol: float, max_iter: int | None
) -> tuple[Array, Indices, npt.NDArray[np.bool_]]:
    """Return the results of `_solve` for b whose squares are in the range of float64."""
    A, b, _, given, members, _ = problems
    reused = np.zeros(len(A), dtype=np.bool_)
    if solver == "homotopy":
        if members is None:
            return *solve_path(A, b, l1_weight, max_iter), reused
        z, n_iter = np.zeros((A.shape[0], A.shape[2])), np.zeros(len(A), dtype=np.int64)
        tried = np.flatnonzero(members.any(-1))
        if len(tried) == len(A):
            z, reused = try_supports(A, b, l1_weight, members)
        else:
            z[tried], reused[tried] = try_supports(A[tried], b[tried], l1_weight, members[tried])
        rest = ~reused
        if rest.any():
            z[rest], n_iter[rest] = solve_path(A[rest], b[rest], l1_weight, max_iter)
        return z, n_iter, reused
    if solver in ("ista", "fista"):
        cuda = (x.device for x in given if isinstance(x, Tensor) and x.device.type == "cuda")
        device = next(cuda, torch.device("cpu"))
        tensors = torch.from_numpy(A).to(device), torch.from_numpy(b).to(device)
        found = iterate(*tensors, l1_weight, tol=tol, max_iter=max_iter, accelerate=solver == "fista")
        return found.z.cpu().numpy(), found.n_iter.cpu().numpy(), reused
    return *solve_convex(A, b, l1_weight, solver, max_iter), reused


def _checked(
    As: Sequence[Any],
    bs: Sequence[Any],
    l1_weight: float,
    solver: str,
    tol: float,
    max_iter: int | None,
    supports: Any,
    costs: Any,
) -> _Problems:
    """Check the arguments and return the problems as a batch.

    Raises:
        SolverError: If an argument is invalid; the message names the node if there are several.
    """
    _check_arguments(As, bs, l1_weight, solver, tol, max_iter, supports)
    if len(As) == 0:
        return _Problems(np.zeros((0, 1, 1)), np.zeros((0, 1)), [], [], None, None)
    matrices, vectors = [as_float64(A) for A in As], [as_float64(b) for b in bs]
    for node, (A, b) in enumerate(zip(matrices, vectors, strict=True)):
        if A.ndim != 2 or 0 in A.shape or b.shape != A.shape[:1]:
            raise _wrong_shape(A, b, _of_node(node, len(As)))
    sizes = [A.shape[1] for A in matrices]
    A, b = _pad(matrices, vectors)
    _check_finite(A, b)
    weights = _weights(costs, sizes, A.shape[2])
    if weights is not None:
        with np.errstate(over="ignore"):
            A = A / weights[:, None, :]
        _check_finite(A, b)
    return _Problems(A, b, sizes, list(bs), _memberships(supports, sizes, A.shape[2]), weights)


def _check_arguments(
    As: Sequence[Any],
    bs: Sequence[Any],
    l1_weight: float,
    solver: str,
    tol: float,
    max_iter: int | None,
    supports: Any,
) -> None:
    if solver not in SOLVERS:
        raise SolverError(
            f"unknown solver {solver!r}", field="solver", remedy=f"choose from {', '.join(SOLVERS)}"
        )
    if not (l1_weight > 0 and np.isfinite(l1_weight)):
        raise SolverError(
            f"{l1_weight} is not a finite positive number",
            field="l1_weight",
            remedy="choose one, such as 1e-5",
        )
    if not tol > 0:
        raise SolverError(
            f"{tol} is not positive", field="tol", remedy="choose a relative duality gap, such as 1e-9"
        )
    if max_iter is not None and max_iter < 1:
        raise SolverError(
            f"{max_iter} is too small",
            field="max_iter",
            remedy="choose at least 1, or None for the solver's own bound",
        )
    if len(As) != len(bs):
        raise SolverError(
            f"{len(bs)} entries for {len(As)} matrices", field="bs", remedy="give one b for each A"
        )
    if supports is not None and len(supports) != len(As):
        raise SolverError(
            f"{len(supports)} entries for {len(As)} nodes",
            field="supports",
            remedy="give a support or None for each",
        )


def _of_node(node: int, n_nodes: int) -> str:
    return "" if n_nodes == 1 else f" of node {node}"


def _wrong_shape(A: Array, b: Array, of_node: str) -> SolverError:
    if A.ndim != 2 or 0 in A.shape:
        return SolverError(
            f"shape {A.shape}{of_node}",
            field="A",
            remedy="give a matrix (n_measurements, n_candidates), both at least 1",
        )
    return SolverError(
        f"shape {b.shape}{of_node} does not fit A of shape {A.shape}", field="b", remedy=f"use {A.shape[:1]}"
    )


def _check_finite(A: Array, b: Array) -> None:
    """Check all nodes at once: checking thousands one by one would take longer than solving some of them."""
    for name, values in (("A", A), ("b", b)):
        finite = np.isfinite(values)
        if not finite.all():
            first = tuple(np.argwhere(~finite)[0])
            of_node = _of_node(int(first[0]), len(values))
            raise SolverError(
                f"an entry{of_node} is {values[first]}",
                field=name,
                remedy="give finite numbers; if they come from training, check whether it diverged",
            )


def _pad(matrices: list[Array], vectors: list[Array]) -> tuple[Array, Array]:
    """Return problems of unequal sizes as one batch, padded by zeros, which do not change the minimisers."""
    m, n = max(A.shape[0] for A in matrices), max(A.shape[1] for A in matrices)
    batch_A, batch_b = np.zeros((len(matrices), m, n)), np.zeros((len(matrices), m))
    for i, (A, b) in enumerate(zip(matrices, vectors, strict=True)):
        batch_A[i, : A.shape[0], : A.shape[1]] = A
        batch_b[i, : b.shape[0]] = b
    return batch_A, batch_b


def _weights(costs: Any, sizes: list[int], width: int) -> Array | None:
    """Return the weights of the l1 norm as one batch, padded by 1.

    Raises:
        SolverError: If there is not one positive, finite weight for each candidate.
    """
    if costs is None:
        return None
    if len(costs) != len(sizes):
        raise SolverError(
            f"{len(costs)} entries for {len(sizes)} nodes",
            field="costs",
            remedy="give the weights of each node",
        )
    batch = np.ones((len(sizes), width))
    for node, (given, size) in enumerate(zip(costs, sizes, strict=True)):
        own, of_node = as_float64(given), _of_node(node, len(sizes))
        if own.shape != (size,):
            raise SolverError(f"shape {own.shape}{of_node}", field="costs", remedy=f"use {(size,)}")
        wrong = own[~((own > 0) & np.isfinite(own))]
        if len(wrong):
            raise SolverError(
                f"an entry{of_node} is {wrong[0]}", field="costs", remedy="give finite positive numbers"
            )
        batch[node, :size] = own
    return batch


def _memberships(supports: Any, sizes: list[int], width: int) -> npt.NDArray[np.bool_] | None:
    if supports is None:
        return None
    members = np.zeros((len(sizes), width), dtype=np.bool_)
    given = [() if support is None else as_float64(support) for support in supports]
    nodes = np.repeat(np.arange(len(sizes)), [len(support) for support in given])
    indices = np.concatenate(given).astype(np.int64)
    outside = (indices < 0) | (indices >= np.asarray(sizes)[nodes])
    if outside.any():  # All nodes are checked at once, as in `_check_finite`.
        node = int(nodes[outside.argmax()])
        wrong = indices[nodes == node].tolist()
        raise SolverError(
            f"{wrong}{_of_node(node, len(sizes))} has an index out of range",
            field="support",
            remedy=f"choose indices from 0 to {sizes[node] - 1}",
        )
    members[nodes, indices] = True
    return members


def _like(b: Any, z: Array) -> Any:
    if isinstance(b, Tensor):
        return torch.from_numpy(z.copy()).to(
            device=b.device, dtype=b.dtype if b.is_floating_point() else torch.float64
        )
    dtype = getattr(b, "dtype", None)
    return z.astype(dtype if dtype is not None and dtype.kind == "f" else np.float64)


def _missed(result: RecoveryResult, tol: float) -> str:
    """Return a text about the gap that is above its tolerance."""
    if result.gap <= tol:
        return f"gap {result.decision_gap:.2g} of P(z), above {DECISION_TOL:g}"
    return f"gap {result.gap:.2g}"


def _warn(results: Sequence[RecoveryResult], solver: str, tol: float) -> None:
    bad = [node for node, result in enumerate(results) if not result.converged]
    n_iter = max(results[n].n_iter for n in bad)
    named = ", ".join(str(node) for node in bad[:8]) + (", ..." if len(bad) > 8 else "")
    relative = [results[n].gap for n in bad if not results[n].gap <= tol]
    decision = [results[n].decision_gap for n in bad if not results[n].decision_gap <= DECISION_TOL]
    figures = [f"relative duality gap up to {max(relative):.3g}, tolerance {tol:.3g}"] if relative else []
    if decision:
        figures.append(f"gap up to {max(decision):.3g} of P(z), tolerance {DECISION_TOL:g}")
    if solver != "homotopy":
        remedy = "raise max_iter or tol, or use solver 'homotopy'"
    elif decision:
        remedy = "raise l1_weight, which is too small to certify codes of this b in float64"
    else:
        remedy = "raise tol or max_iter"
    warnings.warn(
        f"{solver} did not converge on {len(bad)} of {len(results)} nodes ({named}) after {n_iter} iterations:"
        f" {'; '.join(figures)}; {remedy}",
        RecoveryWarning,
        stacklevel=4,
    )
