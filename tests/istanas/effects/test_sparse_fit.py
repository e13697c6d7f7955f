import numpy as np
import pytest

from istanas.effects import balanced_design, coded, layout, linear_system, sparse_path, sum_to_zero
from istanas.effects.model import System
from istanas.errors import ConfigError
from istanas.sparse import certificate, critical_l1, kkt_holds, recover
from tests.istanas.effects.spaces import SPACES

PLANTED = {3: 2.0, 40: -1.5, 77: 1.8, 150: 1.2}


def planted(n: int, noise: float, seed: int = 0) -> tuple[System, np.ndarray]:
    """Return measurements of the DARTS space, which has 196 unknowns, and the effects of four candidates."""
    space = SPACES["darts"]
    rows = coded(space, balanced_design(space, n, seed))
    truth = np.zeros(layout(space).n_candidates)
    truth[list(PLANTED)] = list(PLANTED.values())
    return linear_system(rows, rows @ truth + np.random.default_rng(seed).normal(scale=noise, size=n)), truth


@pytest.mark.parametrize("criterion", ["bic", "aicc", "cv"])
def test_planted_effects_are_found_with_fewer_measurements_than_unknowns(criterion: str) -> None:
    """120 measurements of 196 unknowns: the four largest entries are those of the planted effects, with their signs."""
    for seed in range(3):
        system, truth = planted(120, 0.1, seed)
        assert len(system.b) < system.A.shape[1]
        code = sparse_path(system, criterion, n=15, ratio=0.03).code
        found = np.argsort(-np.abs(code))[:4]
        assert sorted(found.tolist()) == sorted(PLANTED)
        np.testing.assert_array_equal(np.sign(code[found]), np.sign(truth[found]))


def test_least_squares_of_minimum_norm_does_not_find_them() -> None:
    """The control of the test above: without sparsity the same measurements do not determine the effects."""
    missed = 0
    for seed in range(3):
        system, _ = planted(120, 0.1, seed)
        code = np.linalg.lstsq(system.A, system.b, rcond=None)[0]
        lasso = sparse_path(system, n=15, ratio=0.03).code
        truth = planted(120, 0.1, seed)[1]
        missed += np.linalg.norm(code - truth) > 3 * np.linalg.norm(lasso - truth)
    assert missed == 3


def test_every_code_of_the_path_is_certified_and_optimal() -> None:
    system, _ = planted(60, 0.5)
    path = sparse_path(system)
    assert path.gaps.max() <= 1e-9
    for l1, z in zip(path.l1, path.codes, strict=True):
        assert kkt_holds(system.A, system.b, z, float(l1))
        assert certificate(system.A, system.b, z, float(l1)).holds(1e-9)


def test_codes_are_those_of_single_problems() -> None:
    """Both have the minimal objective; the codes may differ, since the columns of a decision are dependent."""
    system, _ = planted(40, 0.5)
    path = sparse_path(system, n=5, ratio=0.1)
    for l1, z in zip(path.l1, path.codes, strict=True):
        single = recover(system.A, system.b, float(l1))
        np.testing.assert_allclose(system.A @ z, system.A @ single.z, atol=1e-6)


def test_the_path_begins_at_the_critical_l1_with_zero() -> None:
    system, _ = planted(40, 0.5)
    path = sparse_path(system, n=10, ratio=0.01)
    assert path.l1[0] == pytest.approx(critical_l1(system.A, system.b))
    assert not path.codes[0].any()
    assert path.codes[1].any()
    assert path.l1[-1] == pytest.approx(path.l1[0] / 100)


def test_bic_finds_no_effects_in_noise() -> None:
    """An effect of noise alone must lower the misfit by log(59) to be chosen, which few of 10 systems have."""
    empty = 0
    for seed in range(10):
        space = SPACES["nas_bench_201"]
        rows = coded(space, balanced_design(space, 60, seed))
        score = np.random.default_rng(seed).normal(size=60)
        empty += not sparse_path(linear_system(rows, score)).code.any()
    assert empty >= 6


def test_information_criteria_are_literal() -> None:
    """For an orthogonal system the degrees of freedom are the nonzeros; the noise variance is that of the ridge."""
    from istanas.effects import ridge_variances

    system, _ = planted(60, 0.5)
    noise, _ = ridge_variances(system)
    for criterion in ("bic", "aicc"):
        path = sparse_path(system, criterion, n=8, ratio=0.2)
        for z, value in zip(path.codes, path.criteria, strict=True):
            d = np.linalg.matrix_rank(system.A[:, np.flatnonzero(z)]) if z.any() else 0
            misfit = np.sum((system.b - system.A @ z) ** 2) / noise
            extra = d * np.log(59) if criterion == "bic" else 2 * d + 2 * d * (d + 1) / (59 - d - 1)
            assert value == pytest.approx(misfit + extra)
        assert path.chosen == np.argmin(path.criteria)


def test_the_code_has_median_zero_and_becomes_deviations_from_the_mean() -> None:
    """Of all codes with the same predictions the LASSO has the smallest l1 norm, so no shift may reduce it."""
    space = SPACES["nas_bench_201"]
    rows = coded(space, balanced_design(space, 100, seed=0))
    rng = np.random.default_rng(0)
    path = sparse_path(linear_system(rows, rows @ rng.normal(size=30) + 0.1 * rng.normal(size=100)))
    for part in layout(space).parts():
        assert abs(np.median(path.code[part])) < 1e-9
    effects = sum_to_zero(space, path.code)
    assert max(abs(effects[part].sum()) for part in layout(space).parts()) < 1e-9


def test_equal_scores_have_the_code_zero() -> None:
    rows = coded(SPACES["nas_bench_201"], balanced_design(SPACES["nas_bench_201"], 6, seed=0))
    assert not sparse_path(linear_system(rows, np.ones(6))).code.any()
    with pytest.raises(ConfigError, match="too few"):
        sparse_path(linear_system(rows[:1], np.ones(1)))
