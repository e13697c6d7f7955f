"""The weighted LASSO, 1/2 ||A z - b||^2 + l1 sum c_i |z_i|: all solvers, an independent solver, and the weights."""

from typing import Any

import numpy as np
import pytest
import torch

from istanas.errors import ConfigError, SolverError
from istanas.sparse import (
    SOLVERS,
    cost_weights,
    mosek_licence,
    recover,
    recover_certified,
    recover_nodes,
    top_support,
)

L1 = 1e-5


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.mosek if name == "mosek" else ()) for name in SOLVERS]
)
def solver(request: pytest.FixtureRequest) -> str:
    if request.param == "mosek" and mosek_licence() is None:
        pytest.skip("MOSEK has no usable licence here")
    return str(request.param)


def problem(seed: int, m: int = 7, n: int = 14) -> tuple[Any, Any, float, Any]:
    """Return A with columns of unit length, b, a moderate l1 and weights between 0.2 and 5."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((m, n))
    A /= np.linalg.norm(A, axis=0)
    b = rng.standard_normal(m)
    c = np.exp(rng.uniform(-1.6, 1.6, n))
    return A, b, 0.2 * float((np.abs(A.T @ b) / c).max()), c


def weighted_objective(A: Any, b: Any, z: Any, l1: float, c: Any) -> float:
    return float(0.5 * np.sum((A @ z - b) ** 2) + l1 * np.sum(c * np.abs(z)))


# ---------- weights of 1
@pytest.mark.filterwarnings(
    "ignore::istanas.sparse.RecoveryWarning"
)  # 50 steps are too few, and enough to compare
def test_weights_of_one_change_no_bit_of_the_golden_problems(golden_dir: Any, solver: str) -> None:
    data = np.load(golden_dir / "recovery.npz")
    pairs = [(data[f"{seed}/{node}/A"], data[f"{seed}/{node}/b"]) for seed in range(6) for node in range(4)]
    As, bs = zip(*pairs, strict=True)
    limit = {"max_iter": 50, "tol": 1e9} if solver in ("ista", "fista") else {}
    plain = recover_nodes(As, bs, L1, solver, **limit)
    ones = [np.ones(A.shape[1]) for A in As]
    for without, with_ones in zip(plain, recover_nodes(As, bs, L1, solver, costs=ones, **limit), strict=True):
        np.testing.assert_array_equal(without.z, with_ones.z)
        assert (without.gap, without.objective) == (with_ones.gap, with_ones.objective)


# ---------- other weights
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_the_weighted_problem_written_for_clarabel(solver: str, seed: int) -> None:
    import cvxpy as cp

    A, b, l1, c = problem(seed)
    z = cp.Variable(A.shape[1])
    weighted = 0.5 * cp.sum_squares(A @ z - b) + l1 * (c @ cp.abs(z))
    best = cp.Problem(cp.Minimize(weighted)).solve(solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12)
    result = recover(A, b, l1, solver, tol=1e-12, costs=c)
    assert result.converged
    assert result.objective == pytest.approx(best, rel=1e-8)
    assert weighted_objective(A, b, result.z, l1, c) == pytest.approx(result.objective, rel=1e-12)
    np.testing.assert_allclose(result.z, z.value, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_the_published_problems_satisfy_the_weighted_optimality_conditions(
    golden_dir: Any, seed: int
) -> None:
    """|A_i^T r| <= l1 c_i, with equality and the sign of z_i where z_i is not 0."""
    data = np.load(golden_dir / "recovery.npz")
    rng = np.random.default_rng(seed)
    for node in range(4):
        A, b = data[f"{seed}/{node}/A"], data[f"{seed}/{node}/b"]
        c = rng.uniform(1.0, 3.0, A.shape[1])
        result = recover(A, b, L1, costs=c)
        assert result.converged
        correlation = A.T @ (b - A @ result.z)
        assert np.abs(correlation / c).max() <= L1 * (1 + 1e-6)
        kept = result.z != 0
        np.testing.assert_allclose(correlation[kept], L1 * c[kept] * np.sign(result.z[kept]), rtol=1e-5)


def test_a_common_weight_is_a_larger_l1(solver: str) -> None:
    A, b, l1, _ = problem(5)
    weighted = recover(A, b, l1, solver, tol=1e-12, costs=np.full(14, 3.0))
    plain = recover(A, b, 3 * l1, solver, tol=1e-12)
    np.testing.assert_allclose(weighted.z, plain.z, atol=1e-6)
    assert weighted.objective == pytest.approx(plain.objective, rel=1e-9)


def test_what_costs_more_leaves_the_support() -> None:
    """Of two candidates with the same column, the cheaper one is kept, whichever it is."""
    rng = np.random.default_rng(0)
    A = rng.random((7, 14))
    A[:, 3] = A[:, 9]
    b = 2 * A[:, 3]
    for cheap, dear in ((3, 9), (9, 3)):
        c = np.ones(14)
        c[dear] = 1.5
        assert top_support(recover(A, b, L1, costs=c).z, 1).tolist() == [cheap]


def test_nodes_of_unequal_sizes_have_their_own_weights() -> None:
    problems = [problem(seed, n=n) for seed, n in ((0, 14), (1, 21), (2, 9))]
    As, bs, _, cs = zip(*problems, strict=True)
    together = recover_nodes(As, bs, 0.1, costs=cs)
    for A, b, c, result in zip(As, bs, cs, together, strict=True):
        alone = recover(A, b, 0.1, costs=c)
        np.testing.assert_allclose(result.z, alone.z, atol=1e-14)
        assert result.z.shape == c.shape


def test_an_earlier_support_is_reused_and_tensors_stay_tensors() -> None:
    A, b, l1, c = problem(3)
    first = recover(A, torch.as_tensor(b), l1, costs=c)
    assert isinstance(first.z, torch.Tensor)
    (again,) = recover_certified([A], [torch.as_tensor(b)], l1, supports=[first.support], costs=[c])
    assert again.support_reused
    torch.testing.assert_close(again.z, first.z, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (np.ones(13), "costs: shape (13,); use (14,)"),
        (np.zeros(14), "costs: an entry is 0.0; give finite positive numbers"),
        (-np.ones(14), "costs: an entry is -1.0; give finite positive numbers"),
        (np.full(14, np.nan), "costs: an entry is nan; give finite positive numbers"),
        (np.full(14, 1e-320), "A: an entry is"),
    ],
)
def test_wrong_weights_are_refused(costs: Any, message: str) -> None:
    A, b, l1, _ = problem(0)
    with pytest.raises(SolverError) as caught:
        recover(A, b, l1, costs=costs)
    assert str(caught.value).startswith(message)


def test_weights_of_a_missing_node_are_refused() -> None:
    A, b, l1, c = problem(0)
    with pytest.raises(SolverError, match="1 entries for 2 nodes"):
        recover_nodes([A, A], [b, b], l1, costs=[c])
    with pytest.raises(SolverError, match=r"shape \(2,\) of node 1"):
        recover_nodes([A, A], [b, b], l1, costs=[c, c[:2]])


# ---------- weights from costs
def test_weights_have_no_unit_and_a_common_mean() -> None:
    costs = [np.array([0.0, 3.0, 1.0]), np.array([4.0])]
    weights = cost_weights(costs, 0.5)
    np.testing.assert_allclose(np.concatenate(weights), [1.0, 1.75, 1.25, 2.0])
    for scale in (1e-300, 1e300):
        scaled = cost_weights([scale * each for each in costs], 0.5)
        np.testing.assert_allclose(np.concatenate(scaled), np.concatenate(weights), rtol=1e-14)


@pytest.mark.parametrize(("costs", "mu"), [([[1.0, 2.0]], 0.0), ([[0.0, 0.0], [0.0]], 3.0)])
def test_weights_are_exactly_one_without_a_cost(costs: Any, mu: float) -> None:
    assert all((each == 1.0).all() for each in cost_weights(costs, mu))


def test_wrong_costs_and_a_negative_weight_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cost_weight: -0\.1 is not a number >= 0"):
        cost_weights([[1.0]], -0.1)
    for wrong in (-1.0, np.nan, np.inf):
        with pytest.raises(ConfigError, match="table: an entry is"):
            cost_weights([[1.0, wrong]], 1.0, field="table")
