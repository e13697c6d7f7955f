"""Certificates compared with multiprecision arithmetic: they bound the exact gap for all inputs."""

import warnings

import mpmath
import numpy as np
import pytest

from istanas.errors import SolverError
from istanas.sparse import (
    DECISION_TOL,
    SOLVERS,
    RecoveryWarning,
    certificate,
    critical_l1,
    dual_point,
    duality_gap,
    kkt_holds,
    kkt_violation,
    objective,
    recover,
    recover_certified,
    recover_nodes,
    top_support,
)
from istanas.sparse.convex import _problem
from istanas.sparse.lasso import estimated_gap

TOL, L1 = 1e-9, 1e-5
LICENCE_FREE = [solver for solver in SOLVERS if solver != "mosek"]
exactly = np.frompyfunc(mpmath.mpf, 1, 1)  # Converts float64 without rounding.


@pytest.fixture(autouse=True)
def _digits():
    with mpmath.workdps(60):
        yield


def exact(A, b, z, l1):
    """Return the exact (gap, 1/2 ||b||^2, P(z)) of float64 numbers."""
    A, b, z, l1 = exactly(A), exactly(b), exactly(z), mpmath.mpf(l1)
    r = b - A @ z
    correlation = r @ A
    scale = l1 / max(l1, *(abs(c) for c in correlation))
    gap = (1 - scale) ** 2 * (r @ r) / 2
    gap += sum(l1 * abs(x) - scale * x * c for x, c in zip(z, correlation, strict=True))
    return gap, (b @ b) / 2, (r @ r) / 2 + l1 * sum(abs(x) for x in z)


def check(A, b, z, l1):
    """Check that the certificate bounds the exact gap; return whether the plain formula would certify falsely."""
    found, (gap, energy, value) = certificate(A, b, z, l1), exact(A, b, z, l1)
    assert gap <= mpmath.mpf(float(found.gap)) * energy
    assert gap <= mpmath.mpf(float(found.decision_gap)) * value
    assert gap <= mpmath.mpf(float(duality_gap(A, b, z, l1, relative=False)))
    if found.holds(TOL):
        assert gap <= TOL * energy
        assert gap <= DECISION_TOL * value
    return estimated_gap(A, b, z, l1) <= TOL < gap / energy


def cell_sized(rng, i):
    return rng.random((7, 7 * (2 + i % 4)))


def solved(As, bs, l1, solver="homotopy", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecoveryWarning)
        return recover_nodes(As, bs, l1, solver, tol=TOL, **options)


@pytest.mark.parametrize("l1", [1e-6, 1e-5, 1e-3, 1e-1])
def test_no_false_certificate_on_random_problems(l1):
    rng = np.random.default_rng(int(-np.log10(l1)))
    As = [cell_sized(rng, i) for i in range(250)]
    bs = [10.0 ** rng.uniform(-6, 6) * rng.standard_normal(7) for _ in As]
    certified = 0
    for solver, count, steps in (
        ("homotopy", 250, None),
        ("fista", 60, 300),
        ("ista", 30, 50),
        ("clarabel", 12, None),
    ):
        for A, b, result in zip(
            As, bs, solved(As[:count], bs[:count], l1, solver, max_iter=steps), strict=False
        ):
            check(A, b, result.z, l1)
            assert result.converged == (result.gap <= TOL and result.decision_gap <= DECISION_TOL)
            certified += result.converged
    assert certified >= 150


def furthest(z, other, certified):
    """Return the certified code between z and `other` that is furthest from z."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if certified(z + middle * (other - z)) else (low, middle)
    return z + low * (other - z)


def adversarial(kind, rng, i):
    """Return A, b, a code that is hard to certify, and l1.

    For odd i the code is the furthest that is certified; for even i, of a large b, that the plain formula certifies.
    """
    A, l1, scale = cell_sized(rng, i), 10.0 ** rng.uniform(-7, -4), 10.0 ** rng.uniform(4.5, 9)
    if i % 2:
        l1, scale = L1, 10.0 ** rng.uniform(-2, 4)
    b = scale * rng.standard_normal(7)
    if kind == "rank 2":
        A = rng.random((7, 2)) @ rng.random((2, A.shape[1]))
    if kind in ("nearly equal", "huge"):
        A[:, 1] = A[:, 0] * (1 + 1e-10 * rng.random(7))
        A[:, 3] = -A[:, 2]
    z = solved([A], [b], l1)[0].z
    away = np.abs(z).max() * rng.standard_normal(len(z))
    if kind == "ulps":
        return A, b, z * (1 + 2.0**-52 * rng.integers(-4, 5, len(z))), l1
    if kind == "stopped early":
        away = solved([A], [b], l1, "fista", max_iter=100)[0].z
    if kind == "huge":  # In a direction that A maps to almost 0.
        away = z + 1e6 * scale * np.eye(len(z))[:4].T @ [1.0, -1.0, 1.0, 1.0]
    if i % 2:
        return A, b, furthest(z, away, lambda code: certificate(A, b, code, l1).holds(TOL)), l1
    return A, b, furthest(z, away, lambda code: estimated_gap(A, b, code, l1) <= TOL), l1


@pytest.mark.parametrize("kind", ["random", "rank 2", "nearly equal", "huge", "ulps", "stopped early"])
def test_no_false_certificate_on_adversarial_problems(kind):
    rng = np.random.default_rng(len(kind))
    cases = [adversarial(kind, rng, i) for i in range(36)]
    fooled = [check(*case) for case in cases]
    certified = [certificate(*case).holds(TOL) for case in cases]
    assert sum(certified[1::2]) >= 12
    # The formula without the allowance fails, so that this test can fail.
    assert sum(fooled) >= (0 if kind in ("ulps", "stopped early") else 5)


def minimiser(A, b, z, l1):
    """Return the exact minimiser with the support and signs of z, or None if it is not the only one."""
    S = np.flatnonzero(z)
    A, b, l1 = exactly(A), exactly(b), mpmath.mpf(l1)
    right = mpmath.matrix((A[:, S].T @ b - l1 * exactly(np.sign(z[S]))).tolist())
    z_S = np.array(list(mpmath.lu_solve(mpmath.matrix((A[:, S].T @ A[:, S]).tolist()), right)))
    correlation = (b - A[:, S] @ z_S) @ A
    unique = all(abs(c) < l1 for j, c in enumerate(correlation) if j not in S)
    if not unique or any(mpmath.sign(x) != np.sign(y) for x, y in zip(z_S, z[S], strict=True)):
        return None
    full = np.zeros(len(z))
    full[S] = z_S.astype(np.float64)
    return full


@pytest.mark.parametrize(("solver", "mean", "largest"), [("fista", 0.5, 4), ("ista", 0.0, 2)])
def test_certified_codes_keep_what_the_exact_minimiser_keeps(solver, mean, largest):
    rng = np.random.default_rng(8)
    As = [cell_sized(rng, i) - 0.5 + mean for i in range(120)]
    bs = [L1 * 10.0 ** rng.uniform(1, largest) * rng.standard_normal(7) for _ in As]
    compared = 0
    nodes = zip(As, bs, solved(As, bs, L1), solved(As, bs, L1, solver, max_iter=4000), strict=True)
    for A, b, path, found in nodes:
        z = minimiser(A, b, path.z, L1) if found.converged and np.count_nonzero(path.z) > 2 else None
        if z is not None:
            compared += 1
            assert top_support(found.z, 2).tolist() == top_support(z, 2).tolist()
            gap = exact(A, b, found.z, L1)[2] - exact(A, b, z, L1)[2]
            assert gap <= found.gap * 0.5 * b @ b
    assert compared >= 20


def test_a_small_gap_of_a_large_b_does_not_certify_the_decision():
    rng = np.random.default_rng(0)
    As = [cell_sized(rng, i) for i in range(12)]
    bs = [2e4 * b / np.linalg.norm(b) for b in rng.standard_normal((12, 7))]
    exacts = recover_nodes(As, bs)
    assert all(result.converged for result in exacts)
    with pytest.warns(RecoveryWarning, match=r"gap up to \S+ of P\(z\), tolerance 1e-05") as caught:
        results = recover_nodes(As, bs, L1, "fista", max_iter=4000)
    assert "\n" not in str(caught[0].message)
    small = [n for n, result in enumerate(results) if result.gap <= TOL]
    wrong = [
        n for n in small if top_support(results[n].z, 2).tolist() != top_support(exacts[n].z, 2).tolist()
    ]
    assert len(wrong) >= 3
    assert not any(results[n].converged for n in wrong)


def test_the_figure_that_failed_is_named_when_no_solver_is_left(monkeypatch):
    monkeypatch.setattr("istanas.sparse.recovery.FALLBACK_FISTA_ITER", 100)
    A, b = np.random.default_rng(0).random((7, 14)), 1e9 * np.ones(7)
    with pytest.raises(
        SolverError, match=r"homotopy: gap \S+ of P\(z\), above 1e-05; clarabel: gap "
    ) as caught:
        recover_certified([A], [b], L1, tol=1e-6)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2, 1e4])
def test_exact_codes_are_certified_at_every_sensible_scale(scale):
    rng = np.random.default_rng(1)
    As = [cell_sized(rng, i) for i in range(200)]
    results = recover_nodes(As, [scale * rng.standard_normal(7) for _ in As])
    assert all(result.converged for result in results)
    assert max(result.gap for result in results) <= 1e-12


@pytest.mark.parametrize("power", [-900, -400, 400, 900])
def test_certificates_do_not_depend_on_the_unit(power):
    rng = np.random.default_rng(2)
    A, b, z = rng.random((5, 7, 14)), rng.standard_normal((5, 7)), rng.standard_normal((5, 14))
    z[0], unit = 0.0, 2.0**power
    scaled = (A, unit * b, unit * z, unit * 0.1)
    for ours, theirs in zip(certificate(*scaled), certificate(A, b, z, 0.1), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-14)
    absolute = duality_gap(*scaled, relative=False)
    if abs(power) == 900:  # Outside of the range of float64, where it is rounded up.
        assert absolute.tolist() == [5e-324 if power < 0 else np.inf] * 5
    else:
        np.testing.assert_allclose(absolute, unit**2 * duality_gap(A, b, z, 0.1, relative=False), rtol=1e-14)


# Extremes


@pytest.mark.parametrize("solver", LICENCE_FREE)
@pytest.mark.parametrize("scale", [1e-320, 1e-170, 1e-60])
def test_a_tiny_b_has_the_code_zero(solver, scale):
    A, b = cell_sized(np.random.default_rng(3), 1), np.random.default_rng(4).standard_normal(7)
    result = recover(A, scale * b, L1, solver, max_iter=100)
    assert result.converged
    assert result.gap <= 1e-25
    assert not result.z.any()


@pytest.mark.parametrize("solver", LICENCE_FREE)
@pytest.mark.parametrize("scale", [1e80, 1e155, 1e300])
def test_a_huge_b_is_warned_of_and_never_certified(solver, scale):
    A, b = cell_sized(np.random.default_rng(3), 1), np.random.default_rng(4).standard_normal(7)
    with pytest.warns(RecoveryWarning, match="of P"):
        result = recover(A, scale * b, L1, solver, max_iter=100)
    assert not result.converged
    assert np.isfinite(result.z).all()
    assert np.isfinite(result.gap)


@pytest.mark.parametrize("solver", LICENCE_FREE)
@pytest.mark.parametrize("scale", [2.0**-520, 2.0**510])
def test_extreme_units_give_the_code_of_ordinary_ones(solver, scale):
    rng = np.random.default_rng(5)
    A, b = rng.standard_normal((7, 14)), rng.standard_normal(7)
    l1 = 0.2 * float(critical_l1(A, b))
    result = recover(A, scale * b, scale * l1, solver)
    assert result.converged
    np.testing.assert_allclose(result.z / scale, recover(A, b, l1, solver).z, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-170, 1e155])
def test_an_extreme_node_changes_no_bit_of_another(scale):
    rng = np.random.default_rng(5)
    A, b = rng.random((7, 14)), rng.standard_normal(7)
    alone = recover(A, b)
    for supports in (None, [[0], alone.support]):
        extreme, ordinary = solved([A, A], [scale * b, b], L1, supports=supports)
        assert ordinary.z.tolist() == alone.z.tolist()
        assert (ordinary.gap, ordinary.converged) == (alone.gap, True)
        assert ordinary.support_reused == (supports is not None)
        assert extreme.converged == (scale < 1)


def test_quantities_of_extreme_b():
    A, b = cell_sized(np.random.default_rng(6), 0), np.random.default_rng(7).standard_normal(7)
    zero, near = np.zeros(14), np.linalg.lstsq(A, b, rcond=None)[0]
    assert objective(A, 1e155 * b, zero) == np.inf
    assert objective(A, 1e153 * b, zero) == pytest.approx(1e306 * (0.5 * b @ b), rel=1e-12)
    assert 0.0 < objective(A, 1e155 * b, 1e155 * near) < np.inf
    assert objective(A, 1e-170 * b, zero) == 0.0
    for scale in (1e155, 1e300):
        assert not kkt_holds(A, scale * b, zero)
        assert not kkt_holds(A, scale * b, scale * near)
        assert kkt_violation(A, scale * b, zero) == pytest.approx(scale * critical_l1(A, b), rel=1e-9)
        assert np.abs(A.T @ dual_point(A, scale * b, zero)).max() <= L1 * (1 + 1e-9)
    assert kkt_holds(A, 1e-170 * b, zero)
    assert not kkt_holds(A, 1e-170 * b, 1e-170 * near)
    assert kkt_violation(A, 1e-170 * b, zero) == 0.0
    assert critical_l1(A, 1e-170 * b) == pytest.approx(1e-170 * critical_l1(A, b), rel=1e-12)
    # Codes and matrices outside of the range of float64 are not certified, without numpy's warnings.
    assert duality_gap(A, b, 1e300 * near + 1e300) == np.inf
    assert not certificate(1e300 * A, b, 1e10 * near).holds(TOL)
    assert not kkt_holds(1e300 * A, b, 1e10 * near)


def test_a_solver_that_breaks_down_says_so_in_one_line():
    A, b = np.random.default_rng(0).random((7, 14)), np.random.default_rng(1).standard_normal(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SolverError, match="clarabel") as caught:
            recover(1e200 * A, b, L1, "clarabel")
    assert "\n" not in str(caught.value)


def test_a_failed_solver_does_not_affect_later_nodes():
    A, b = np.random.default_rng(0).random((7, 14)), np.random.default_rng(1).standard_normal(7)
    _problem.cache_clear()
    assert recover(A, 1e-60 * b, L1, "clarabel").n_iter == 0  # The solver failed, and the minimiser is 0.
    assert recover(A, b, L1, "clarabel").converged
