import numpy as np
import pytest

from istanas.effects import architecture, coded, incidence, layout, sum_to_zero, supports_of
from istanas.errors import ConfigError
from istanas.space import SearchSpace
from tests.istanas.effects.spaces import NAS_BENCH_201, SPACES

each_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)


@each_space
def test_supports_are_restored_from_the_kept_candidates(space: SearchSpace) -> None:
    for seed in range(20):
        supports = space.random_supports(seed)
        kept = architecture(space, supports)
        assert supports_of(space, kept) == supports
        assert len(kept) == sum(decision.sparsity for decision in space.all_decisions())


@each_space
def test_rows_sum_to_zero_in_each_decision(space: SearchSpace) -> None:
    rows = coded(space, [architecture(space, space.random_supports(seed)) for seed in range(20)])
    for part in layout(space).parts():
        np.testing.assert_allclose(rows[:, part].sum(1), 0.0, atol=1e-12)


@each_space
def test_sum_to_zero_changes_no_prediction(space: SearchSpace) -> None:
    flat, rng = layout(space), np.random.default_rng(0)
    effects = rng.normal(size=flat.n_candidates) + 3.0
    rows = coded(space, [architecture(space, space.random_supports(seed)) for seed in range(20)])
    centred = sum_to_zero(space, effects)
    np.testing.assert_allclose(rows @ centred, rows @ effects, atol=1e-9)
    assert max(abs(centred[part].sum()) for part in flat.parts()) < 1e-9


def test_the_mean_of_all_rows_is_zero_so_the_offset_is_the_mean_score() -> None:
    space = SPACES["blocks"]
    everything = {architecture(space, space.random_supports(seed)) for seed in range(1000)}
    assert len(everything) == 3 * 4 * 4
    np.testing.assert_allclose(coded(space, sorted(everything)).mean(0), 0.0, atol=1e-12)


def test_incidence_is_literal() -> None:
    rows = incidence(SPACES["blocks"], [(0, 2, 4, 10)])
    assert rows.tolist() == [[1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("space", "change", "problem"),
    [
        ("nas_bench_201", {"cell": [[0]] * 5}, "5 decisions"),
        ("nas_bench_201", {"cell": [[0]] * 5 + [[5]]}, r"\[5\] are not candidates that cell 5"),
        ("nas_bench_201", {"cell": [[0]] * 5 + [[0, 1]]}, r"\[0, 1\] are not"),
        ("darts", {"normal": [[3, 3]] * 4}, r"\[3, 3\] are not candidates that normal 0 can keep"),
        ("darts, one per edge", {"normal": [[0, 1]] * 4}, "on different edges"),
    ],
)
def test_supports_that_are_no_architecture(
    space: str, change: dict[str, list[list[int]]], problem: str
) -> None:
    supports = {**SPACES[space].random_supports(0), **change}
    with pytest.raises(ConfigError, match=problem):
        architecture(SPACES[space], supports)


def test_a_genotype_has_the_row_of_its_operations() -> None:
    genotype = NAS_BENCH_201.parse("|none~0|+|avg_pool_3x3~0|none~1|+|none~0|none~1|skip_connect~2|")
    assert genotype is not None
    assert architecture(NAS_BENCH_201, NAS_BENCH_201.supports(genotype)) == (0, 9, 10, 15, 20, 26)
