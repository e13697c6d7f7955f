"""A conformance suite for all LASSO solvers: theorems, comparison with an independent solver, edge cases."""

import time
import warnings

import numpy as np
import pytest
import torch

from istanas.errors import SolverError
from istanas.sparse import (
    SOLVERS,
    RecoveryWarning,
    critical_l1,
    duality_gap,
    kkt_violation,
    mosek_licence,
    objective,
    recover,
    recover_certified,
    recover_nodes,
    top_support,
)

L1 = 1e-5


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.mosek if name == "mosek" else ()) for name in SOLVERS]
)
def solver(request):
    if request.param == "mosek" and mosek_licence() is None:
        pytest.skip("MOSEK has no usable licence here")
    return request.param


@pytest.fixture(params=["homotopy", "clarabel", pytest.param("mosek", marks=pytest.mark.mosek)])
def exact_solver(request):
    if request.param == "mosek" and mosek_licence() is None:
        pytest.skip("MOSEK has no usable licence here")
    return request.param


def published(seed, n_states=3, scale=1.0, m=7):
    """Return a node as in the published search: A uniform in [0, 1), seven candidates an edge."""
    rng = np.random.default_rng(seed)
    return rng.random((m, 7 * n_states)), scale * rng.standard_normal(m)


def easy(seed, m=7, n=14):
    """Return Gaussian columns of unit length and a moderate l1, for which every solver converges quickly."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((m, n))
    A /= np.linalg.norm(A, axis=0)
    b = rng.standard_normal(m)
    return A, b, 0.2 * float(critical_l1(A, b))


# Theorems


@pytest.mark.parametrize("seed", range(4))
def test_certificate_and_optimality_conditions(solver, seed):
    A, b, l1 = easy(seed)
    result = recover(A, b, l1, solver)
    assert result.converged
    assert 0.0 <= result.gap <= 1e-9
    assert result.gap == pytest.approx(float(duality_gap(A, b, result.z, l1)), abs=0, rel=1e-12)
    assert result.objective == float(objective(A, b, result.z, l1))
    # A gap g bounds ||A (z - z*)|| by sqrt(2 g), and so the correlations, because the columns have norm 1.
    tolerance = np.sqrt(2 * result.gap * 0.5 * b @ b) + 1e-14
    correlation = A.T @ (b - A @ result.z)
    assert np.abs(correlation).max() <= l1 + tolerance
    clear = np.abs(result.z) > 1e-3
    assert clear.any()
    np.testing.assert_allclose(correlation[clear], l1 * np.sign(result.z[clear]), atol=2 * tolerance)


def test_gap_bounds_the_distance_to_the_minimum(solver):
    A, b = published(5, scale=0.03)
    best = recover(A, b, L1, "homotopy").objective
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecoveryWarning)
        result = recover(A, b, L1, solver, max_iter=200)
    assert result.gap * 0.5 * b @ b >= result.objective - best - 1e-16
    assert result.converged == (result.gap <= 1e-9)


@pytest.mark.parametrize(("factor", "is_zero"), [(1.001, True), (0.99, False)])
def test_zero_from_the_critical_l1_on(solver, factor, is_zero):
    A, b, _ = easy(1)
    result = recover(A, b, factor * float(critical_l1(A, b)), solver)
    assert result.converged
    assert (not result.z.any()) == is_zero


def test_scaling_b_and_l1_scales_the_code(solver):
    A, b, l1 = easy(2)
    small, large = recover(A, b, l1, solver, tol=1e-11), recover(A, 1e3 * b, 1e3 * l1, solver, tol=1e-11)
    np.testing.assert_allclose(large.z, 1e3 * small.z, rtol=1e-4, atol=1e-2)
    assert large.objective == pytest.approx(1e6 * small.objective, rel=1e-9)


def test_orthonormal_columns_have_the_soft_threshold_as_their_code(solver):
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))[0]
    b = Q @ np.array([3.0, -2.0, 0.3, -0.2, 1.0])
    np.testing.assert_allclose(recover(Q, b, 0.5, solver).z, [2.5, -1.5, 0.0, 0.0, 0.5], atol=1e-6)


def test_agrees_with_an_independent_solver(solver):
    from sklearn.linear_model import Lasso

    A, b, l1 = easy(3, m=12, n=30)
    theirs = Lasso(alpha=l1 / len(b), fit_intercept=False, tol=1e-12, max_iter=100_000).fit(A, b).coef_
    np.testing.assert_allclose(recover(A, b, l1, solver, tol=1e-12).z, theirs, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 14), (7, 35), (14, 14), (40, 21), (1, 9), (7, 1), (1, 1)])
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_exact_solvers_on_every_shape(exact_solver, shape, scale):
    rng = np.random.default_rng(7)
    A, b = rng.random(shape), scale * rng.standard_normal(shape[0])
    result = recover(A, b, L1, exact_solver)
    assert result.converged
    assert kkt_violation(A, b, result.z, L1) <= 1e-6 * L1


def test_first_order_solvers_say_when_they_are_not_done():
    A, b = published(0)
    for solver in ("ista", "fista"):
        with pytest.warns(RecoveryWarning) as caught:
            result = recover(A, b, L1, solver, max_iter=100)
        assert len(caught) == 1
        message = str(caught[0].message)
        assert not result.converged
        assert result.n_iter == 100
        assert f"{result.gap:.3g}" in message
        assert "100 iterations" in message
        assert "1e-09" in message
        assert "\n" not in message


def test_one_warning_for_a_batch_counts_its_nodes():
    problems = [published(seed) for seed in range(3)]
    with pytest.warns(RecoveryWarning, match=r"on 3 of 3 nodes \(0, 1, 2\)") as caught:
        recover_nodes([A for A, _ in problems], [b for _, b in problems], L1, "ista", max_iter=50)
    assert len(caught) == 1


def test_accelerated_steps_converge_faster():
    A, b = published(3, scale=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecoveryWarning)
        plain, fast = (recover(A, b, L1, solver, max_iter=1000) for solver in ("ista", "fista"))
    assert fast.gap < 0.1 * plain.gap


# Edge cases


def test_b_of_zero(solver):
    result = recover(published(0)[0], np.zeros(7), L1, solver)
    assert result.converged
    assert result.gap == 0.0
    assert not result.z.any()


def test_zero_columns_are_never_chosen(solver):
    A, b, l1 = easy(4)
    A[:, [0, 5]] = 0.0
    result = recover(A, b, l1, solver)
    assert result.converged
    assert result.z[[0, 5]].tolist() == [0.0, 0.0]


def test_all_columns_zero(solver):
    result = recover(np.zeros((3, 4)), np.ones(3), L1, solver)
    assert result.converged
    assert not result.z.any()


def test_equal_and_opposite_columns_share_one_minimum(solver):
    A, b, l1 = easy(5)
    alone = recover(A, b, l1, solver)
    doubled = recover(np.hstack([A, A, -A]), b, l1, solver)
    assert doubled.converged
    assert doubled.objective == pytest.approx(alone.objective, rel=1e-8)
    first, second, third = doubled.z.reshape(3, -1)
    np.testing.assert_allclose(first + second - third, alone.z, atol=1e-4)


def test_columns_in_a_plane(exact_solver):
    rng = np.random.default_rng(1)
    A = rng.random((7, 2)) @ rng.random((2, 20))
    result = recover(A, rng.standard_normal(7), L1, exact_solver)
    assert result.converged


@pytest.mark.parametrize("seed", range(5))
def test_ties_of_whole_numbers(exact_solver, seed):
    rng = np.random.default_rng(seed)
    problems = [(rng.integers(0, 2, (7, 21)), rng.integers(-2, 3, 7)) for _ in range(20)]
    results = recover_nodes([A for A, _ in problems], [b for _, b in problems], L1, exact_solver)
    assert all(result.converged for result in results)


def test_one_candidate_has_a_closed_form(solver):
    a, b = np.array([3.0, 4.0]), np.array([1.0, 2.0])
    result = recover(a[:, None], b, 1.0, solver)
    assert result.z[0] == pytest.approx((11.0 - 1.0) / 25.0, rel=1e-6)


def test_nodes_of_unequal_sizes_equal_nodes_alone(solver):
    problems = [easy(seed, m, n) for seed, (m, n) in enumerate([(7, 14), (5, 5), (7, 21), (9, 3)])]
    l1 = 0.1
    together = recover_nodes([A for A, _, _ in problems], [b for _, b, _ in problems], l1, solver)
    for (A, b, _), result in zip(problems, together, strict=True):
        alone = recover(A, b, l1, solver)
        assert result.z.shape == (A.shape[1],)
        assert result.converged
        np.testing.assert_allclose(result.z, alone.z, atol=1e-8)


def test_no_nodes():
    assert recover_nodes([], []) == []


@pytest.mark.parametrize("field", ["A", "b"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_named(solver, field, value):
    problems = [easy(seed)[:2] for seed in range(3)]
    {"A": problems[1][0], "b": problems[1][1]}[field].flat[3] = value
    with pytest.raises(SolverError, match=f"^{field}: an entry of node 1 is {value}"):
        recover_nodes([A for A, _ in problems], [b for _, b in problems], L1, solver)
    with pytest.raises(SolverError, match=f"^{field}: an entry is {value}"):
        recover(*problems[1], L1, solver)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "lars"}, "solver: unknown solver 'lars'; choose from homotopy"),
        ({"l1_weight": 0.0}, "l1_weight: 0.0 is not"),
        ({"l1_weight": -1.0}, "l1_weight: -1.0 is not"),
        ({"l1_weight": float("nan")}, "l1_weight: nan is not"),
        ({"tol": 0.0}, "tol: 0.0 is not positive"),
        ({"max_iter": 0}, "max_iter: 0 is too small"),
        ({"b": np.ones(3)}, r"b: shape \(3,\) does not fit A of shape \(7, 21\)"),
        ({"A": np.ones(7)}, r"A: shape \(7,\)"),
        ({"A": np.ones((7, 0))}, r"A: shape \(7, 0\)"),
        ({"support": [21]}, r"support: \[21\] has an index out of range; choose indices from 0 to 20"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    A, b = published(0)
    with pytest.raises(SolverError, match=message) as caught:
        recover(**{"A": A, "b": b, **arguments})
    assert "\n" not in str(caught.value)


def test_unequal_counts_are_named():
    A, b = published(0)
    with pytest.raises(SolverError, match="bs: 2 entries for 1 matrices"):
        recover_nodes([A], [b, b])
    with pytest.raises(SolverError, match="supports: 2 entries for 1 nodes"):
        recover_nodes([A], [b], supports=[None, None])


# Kinds of numbers


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_in_numpy_out(solver, dtype):
    A, b, l1 = easy(6)
    z = recover(A.astype(dtype), b.astype(dtype), l1, solver).z
    assert isinstance(z, np.ndarray)
    assert z.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_in_torch_out(solver, dtype):
    A, b, l1 = easy(6)
    parameter = torch.nn.Parameter(torch.tensor(b, dtype=dtype))
    result = recover(torch.tensor(A), parameter, l1, solver)
    assert isinstance(result.z, torch.Tensor)
    assert (result.z.dtype, result.z.device) == (dtype, parameter.device)
    assert not result.z.requires_grad
    reference = recover(A, parameter.detach().double().numpy(), l1, solver)
    np.testing.assert_allclose(result.z.double().numpy(), reference.z, atol=1e-6)
    assert result.gap == reference.gap  # The certificate is that of the float64 code.


def test_batches_may_be_stacked_tensors_and_lists():
    A, b = published(1)
    stacked = recover_nodes(torch.tensor(np.stack([A, A])), torch.tensor(np.stack([b, 2 * b])))
    assert stacked[1].z.numpy().tolist() == recover(A, 2 * b).z.tolist()
    assert recover(A.tolist(), b.tolist()).z.tolist() == recover(A, b).z.tolist()


@pytest.mark.gpu
def test_cuda_in_cuda_out(solver):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    A, b, l1 = easy(6)
    z = recover(torch.tensor(A).cuda(), torch.tensor(b).cuda(), l1, solver).z
    assert z.is_cuda
    np.testing.assert_allclose(z.cpu().numpy(), recover(A, b, l1, solver).z, atol=1e-8)


# The exact default


def test_an_earlier_support_is_reused_only_if_still_right():
    A, b = published(2, scale=0.03)
    before = recover(A, b)
    assert not before.support_reused
    near = recover(A, 1.0001 * b, support=before.support)
    assert near.support_reused
    assert near.n_iter == 0
    assert near.z.tolist() == recover(A, 1.0001 * b).z.tolist()
    for support in (before.support[:2], before.support[1:], range(21), []):
        other = recover(A, b, support=support)
        assert not other.support_reused
        assert other.z.tolist() == before.z.tolist()


def test_earlier_supports_of_a_batch():
    problems = [published(seed, n_states) for seed, n_states in enumerate((2, 3, 4))]
    As, bs = [A for A, _ in problems], [b for _, b in problems]
    before = recover_nodes(As, bs)
    again = recover_nodes(As, bs, supports=[before[0].support, None, before[2].support])
    assert [result.support_reused for result in again] == [True, False, True]
    for old, new in zip(before, again, strict=True):
        assert old.z.tolist() == new.z.tolist()


def test_random_nodes_are_exact_to_rounding():
    rng = np.random.default_rng(11)
    As = [rng.random((7, 7 * (2 + i % 4))) for i in range(600)]
    bs = [10.0 ** rng.uniform(-4, 2) * rng.standard_normal(7) for _ in As]
    results = recover_nodes(As, bs)
    assert max(result.gap for result in results) <= 1e-11
    assert max(len(result.support) for result in results) <= 7


def test_a_large_node():
    rng = np.random.default_rng(12)
    A, b = rng.random((60, 300)), rng.standard_normal(60)
    result = recover(A, b)
    assert result.gap <= 1e-11
    assert kkt_violation(A, b, result.z) <= 1e-6 * L1


def test_a_path_cut_short_is_not_called_converged():
    A, b = published(4)
    with pytest.warns(RecoveryWarning, match="homotopy did not converge on 1 of 1 nodes"):
        result = recover(A, b, max_iter=2)
    assert not result.converged


def test_the_active_set_method_alone_finds_the_minimum():
    from istanas.sparse.homotopy import active_set

    A, b = published(6)
    exact = recover(A, b)
    for start in (np.zeros(21), np.ones(21), -exact.z):
        z, _ = active_set(A, b, L1, start, 1000)
        np.testing.assert_allclose(z, exact.z, rtol=1e-9, atol=1e-12)


def test_a_batch_is_fast():
    # The targets are 5 ms and 80 us a node. Ten times as much still distinguishes a batch from a loop over nodes.
    problems = [published(seed, 2 + seed % 4) for seed in range(2000)]
    As, bs = [A for A, _ in problems], [b for _, b in problems]
    recover_nodes(As[:8], bs[:8])

    def seconds(count):
        start = time.perf_counter()
        recover_nodes(As[:count], bs[:count])
        return time.perf_counter() - start

    assert min(seconds(8) for _ in range(5)) <= 0.05
    assert min(seconds(2000) for _ in range(2)) / 2000 <= 8e-4


# MOSEK


def test_mosek_without_a_licence_says_what_to_do():
    if mosek_licence() is not None:
        pytest.skip("MOSEK has a licence here")
    with pytest.raises(SolverError) as caught:
        recover(*published(0), solver="mosek")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("licence", "~/mosek/mosek.lic", "MOSEKLM_LICENSE_FILE", "'homotopy'", "'clarabel'"):
        assert part in message


@pytest.mark.mosek
def test_mosek_with_a_licence_equals_the_exact_path():
    if mosek_licence() is None:
        pytest.skip("MOSEK has no usable licence here")
    A, b = published(0)
    np.testing.assert_allclose(recover(A, b, solver="mosek").z, recover(A, b).z, atol=1e-8)


# Golden problems


@pytest.fixture(scope="module")
def golden(golden_dir):
    data = np.load(golden_dir / "recovery.npz")
    keys = [(seed, node) for seed in range(6) for node in range(4)]
    return [
        (seed, {k: data[f"{seed}/{node}/{k}"] for k in ("A", "b", "z", "objective", "top2")})
        for seed, node in keys
    ]


def test_golden_exact(exact_solver, golden):
    problems = [problem for _, problem in golden]
    results = recover_nodes([p["A"] for p in problems], [p["b"] for p in problems], L1, exact_solver)
    for problem, result in zip(problems, results, strict=True):
        assert result.gap <= 1e-9
        assert result.objective == pytest.approx(float(problem["objective"]), rel=1e-9)
        np.testing.assert_allclose(result.z, problem["z"], rtol=1e-6, atol=1e-9 * np.abs(problem["z"]).max())
        assert top_support(result.z, 2).tolist() == problem["top2"].tolist()


@pytest.mark.parametrize("solver", ["ista", "fista"])
def test_golden_first_order_is_right_or_says_that_it_is_not(solver, golden):
    problems = [problem for _, problem in golden]
    with pytest.warns(RecoveryWarning):
        results = recover_nodes([p["A"] for p in problems], [p["b"] for p in problems], L1, solver)
    for problem, result in zip(problems, results, strict=True):
        assert not result.converged or top_support(result.z, 2).tolist() == problem["top2"].tolist()
    scales = {seed % 3 for (seed, _), result in zip(golden, results, strict=True) if result.converged}
    assert scales == ({0, 1, 2} if solver == "fista" else set())


# Fallback to other solvers


def test_nodes_that_a_solver_fails_on_go_to_the_next_and_only_they():
    problems = [published(seed) for seed in range(6)]
    As, bs = [A for A, _ in problems], [b for _, b in problems]
    with pytest.warns(RecoveryWarning):
        asked = recover_nodes(As, bs, L1, "ista")
    certified = recover_certified(As, bs, L1, "ista")
    exact = recover_nodes(As, bs, L1)
    done = [result.converged for result in asked]
    assert not all(done)
    assert [result.solver for result in certified] == ["ista" if d else "homotopy" for d in done]
    assert all(result.converged and result.gap <= 1e-9 for result in certified)
    for ended, own, path, new in zip(done, asked, exact, certified, strict=True):
        np.testing.assert_array_equal(new.z, own.z if ended else path.z)


def test_a_solver_that_cannot_run_is_replaced():
    if mosek_licence() is not None:
        pytest.skip("MOSEK has a licence here: it would run")
    problems = [published(seed) for seed in range(3)]
    As, bs = [A for A, _ in problems], [b for _, b in problems]
    for new, exact in zip(recover_certified(As, bs, L1, "mosek"), recover_nodes(As, bs, L1), strict=True):
        assert new.solver == "homotopy"
        np.testing.assert_array_equal(new.z, exact.z)


def test_where_all_solvers_fail_nothing_is_returned(monkeypatch):
    """The error names every attempt once."""
    monkeypatch.setattr("istanas.sparse.recovery.FALLBACK_FISTA_ITER", 100)
    A, b = published(0)
    with pytest.raises(SolverError) as caught:
        recover_certified(
            [A, A],
            [b, np.zeros_like(b)],
            L1,
            tol=1e-300,
            supports=[[0, 1], None],
            names=["normal node 0", "reduce node 1"],
        )
    line = str(caught.value)
    assert line.startswith(
        "l1_weight: with 1e-05 no solver recovers normal node 0 to a relative duality gap of 1e-300 "
        "(homotopy from the last support: gap "
    )
    assert line.count("homotopy: gap ") == 1
    assert "; clarabel: gap " in line
    assert "; fista: gap " in line
    assert line.endswith("; raise it, or lower arch_lr")
    assert "\n" not in line


def test_falling_back_does_not_hide_what_makes_no_problem():
    A, b = published(0)
    with pytest.raises(SolverError, match="b: an entry of node 1 is nan; give finite numbers"):
        recover_certified([A, A], [b, np.full_like(b, np.nan)], L1)
    with pytest.raises(SolverError, match="choose from homotopy"):
        recover_certified([A], [b], L1, "lars")
    with pytest.raises(SolverError, match=r"support: \[99\] has an index out of range"):
        recover_certified([A], [b], L1, supports=[[99]])


def test_a_converged_solver_is_asked_once_and_gives_the_same():
    problems = [published(seed) for seed in range(4)]
    As, bs = [A for A, _ in problems], [b for _, b in problems]
    plain = recover_nodes(As, bs, L1)
    supports = [result.support for result in plain]
    for given in (None, supports):
        for new, old in zip(
            recover_certified(As, bs, L1, supports=given),
            recover_nodes(As, bs, L1, supports=given),
            strict=True,
        ):
            np.testing.assert_array_equal(new.z, old.z)
            assert (new.gap, new.n_iter, new.support_reused) == (old.gap, old.n_iter, old.support_reused)


@pytest.mark.parametrize("scale", [1e200, 1e-200])
@pytest.mark.parametrize("supports", [None, [[0, 1]]], ids=["without a support", "from a support"])
def test_a_matrix_of_any_scale_is_certified_or_refused_without_warnings(scale, supports):
    A, b = published(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", RecoveryWarning)
        recover_nodes([scale * A], [b], L1, "homotopy", supports=supports)
        if scale > 1:
            with pytest.raises(SolverError, match=r"^l1_weight: with 1e-05 no solver recovers 0 "):
                recover_certified([scale * A], [b], L1, supports=supports)
        else:
            assert recover_certified([scale * A], [b], L1, supports=supports)[0].converged
