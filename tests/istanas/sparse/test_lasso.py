"""Quantities of the LASSO compared with their definitions, and the support."""

import numpy as np
import pytest
import torch

from istanas.errors import ConfigError, SolverError
from istanas.sparse import (
    critical_l1,
    dual_point,
    duality_gap,
    kkt_holds,
    kkt_violation,
    objective,
    recover,
    support_margin,
    top_support,
    truncation_error,
)


def problem(seed=0, batch=()):
    rng = np.random.default_rng(seed)
    return rng.random((*batch, 7, 21)), rng.standard_normal((*batch, 7)), rng.standard_normal((*batch, 21))


@pytest.mark.parametrize("l1", [1e-5, 0.1, 10.0])
def test_gap_is_primal_minus_dual(l1):
    A, b, z = problem()
    theta = dual_point(A, b, z, l1)
    assert np.abs(A.T @ theta).max() <= l1 * (1 + 1e-12)
    primal = 0.5 * np.sum((A @ z - b) ** 2) + l1 * np.abs(z).sum()
    dual = 0.5 * b @ b - 0.5 * np.sum((b - theta) ** 2)
    assert objective(A, b, z, l1) == pytest.approx(primal, rel=1e-12)
    assert duality_gap(A, b, z, l1, relative=False) == pytest.approx(primal - dual, rel=1e-9)
    assert duality_gap(A, b, z, l1) == pytest.approx((primal - dual) / (0.5 * b @ b), rel=1e-9)


def test_gap_of_a_minimiser_is_never_negative_and_far_below_the_objective():
    # The difference P - D is negative for many of these, because of the rounding of P(0).
    for seed in range(50):
        A, b, _ = problem(seed)
        z = recover(A, b, 1e-5).z
        assert 0.0 <= duality_gap(A, b, z, 1e-5, relative=False) <= 1e-9 * objective(A, b, z, 1e-5)


def test_batches_equal_single_problems():
    A, b, z = problem(1, (3, 2))
    for function in (objective, duality_gap, kkt_violation):
        together = function(A, b, z, 0.1)
        assert together.shape == (3, 2)
        assert together[2, 1] == pytest.approx(float(function(A[2, 1], b[2, 1], z[2, 1], 0.1)), rel=1e-12)


def test_tensors_are_welcome():
    A, b, z = problem(2)
    tensors = torch.tensor(A), torch.nn.Parameter(torch.tensor(b)), torch.tensor(z)
    assert objective(*tensors) == objective(A, b, z)


def test_gap_of_nothing_is_zero():
    assert duality_gap(np.ones((2, 3)), np.zeros(2), np.zeros(3)) == 0.0


def test_critical_l1_is_where_zero_becomes_optimal():
    A, b, _ = problem(4)
    critical, zero = critical_l1(A, b), np.zeros(21)
    assert kkt_violation(A, b, zero, critical) == 0.0
    assert kkt_violation(A, b, zero, 0.9 * critical) == pytest.approx(0.1 * critical)


def test_conditions_hold_at_the_minimum_only():
    A, b, _ = problem(5)
    z = recover(A, b, 1e-2).z
    assert kkt_holds(A, b, z, 1e-2)
    assert not kkt_holds(A, b, z, 1.001e-2)
    assert not kkt_holds(A, b, -z, 1e-2)


def test_support_is_the_largest_entries_in_rising_order():
    z = np.array([0.1, -3.0, 0.0, 2.0, 2.5])
    assert [top_support(z, s).tolist() for s in range(1, 6)] == [
        [1],
        [1, 4],
        [1, 3, 4],
        [0, 1, 3, 4],
        [0, 1, 2, 3, 4],
    ]
    assert top_support(torch.tensor(z, requires_grad=True), 2).tolist() == [1, 4]


def test_ties_go_to_the_lower_index():
    assert top_support([1.0, -1.0, 1.0, 1.0], 2).tolist() == [0, 1]
    assert top_support([0.0, 0.0, 0.0, 5.0], 3).tolist() == [0, 1, 3]
    assert top_support([2.0, 1.0, 1.0, 1.0], 2, groups=[0, 0, 1, 1]).tolist() == [0, 2]


def test_groups_admit_their_best_only():
    z = np.array([5.0, 4.0, 1.0, 2.0, 0.5, 0.1])
    groups = [0, 0, 1, 1, 2, 2]
    assert top_support(z, 2).tolist() == [0, 1]
    assert top_support(z, 2, groups=groups).tolist() == [0, 3]
    assert top_support(z, 3, groups=np.array(groups)).tolist() == [0, 3, 4]


@pytest.mark.parametrize(
    ("sparsity", "groups", "message"),
    [
        (0, None, "sparsity: 0 .*; choose 1 to 4"),
        (5, None, "sparsity: 5 .*; choose 1 to 4"),
        (3, [0, 0, 1, 1], "sparsity: 3 .* edges.*; choose 1 to 2"),
        (1, [0, 1], r"groups: shape \(2,\)"),
    ],
)
def test_impossible_supports_are_named(sparsity, groups, message):
    with pytest.raises(ConfigError, match=message):
        top_support(np.arange(4.0), sparsity, groups=groups)


def test_no_support_of_what_is_no_code():
    with pytest.raises(SolverError, match="NaN"):
        top_support([1.0, float("nan")], 1)
    with pytest.raises(SolverError, match=r"shape \(2, 2\)"):
        top_support(np.ones((2, 2)), 1)


def test_margin_is_between_the_last_kept_and_the_first_left_out():
    z = np.array([5.0, -4.0, 1.0, 2.0, 0.5, 0.125])
    assert [support_margin(z, s) for s in range(1, 7)] == [1.0, 2.0, 1.0, 0.5, 0.375, np.inf]
    assert support_margin(torch.tensor(z, requires_grad=True), 1) == 1.0
    assert support_margin([2.0, -2.0, 2.0], 2) == 0.0
    assert support_margin([0.0, 3.0, 0.0], 2) == 0.0


def test_margin_of_groups_is_of_the_nearest_exchange():
    """It is with a candidate of another group, or with the next one of a kept candidate's own group."""
    z = np.array([5.0, 2.5, 1.0, 2.0, 0.5, 0.125])
    groups = [0, 0, 1, 1, 2, 2]
    assert [support_margin(z, s, groups=groups) for s in (1, 2, 3)] == [2.5, 1.0, 0.375]
    assert support_margin([5.0, 2.0, 0.5], 1, groups=[0, 1, 2]) == 3.0
    assert support_margin([5.0, 2.0], 2, groups=[0, 1]) == np.inf
    with pytest.raises(ConfigError, match=r"sparsity: 4 .*; choose 1 to 3"):
        support_margin(z, 4, groups=groups)


def test_truncation_error_is_the_norm_of_the_rest():
    z = np.array([3.0, -1.0, 4.0, 0.5])
    assert truncation_error(z, [1, 3]) == 5.0
    assert truncation_error(torch.tensor(z), top_support(z, 4)) == 0.0
    assert z[0] == 3.0
