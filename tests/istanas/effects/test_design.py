import numpy as np
import pytest

from istanas.effects import architecture, balanced_design, incidence, layout, supports_of
from istanas.errors import ConfigError
from istanas.space import SearchSpace
from tests.istanas.effects.spaces import NAS_BENCH_201, SPACES, Blocks


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_every_prefix_is_balanced(space: SearchSpace) -> None:
    for seed in range(3):
        rows = incidence(space, balanced_design(space, 60, seed))
        for part in layout(space).parts():
            counts = np.cumsum(rows[:, part], axis=0)
            assert np.ptp(counts, axis=1).max() <= 1


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_rows_are_architectures_of_the_space(space: SearchSpace) -> None:
    for kept in balanced_design(space, 40, seed=1):
        supports = supports_of(space, kept)
        space.supports(space.genotype(supports))
        assert architecture(space, supports) == kept


@pytest.mark.parametrize("name", sorted(set(SPACES) - {"blocks"}))
def test_architectures_are_distinct(name: str) -> None:
    assert len(set(balanced_design(SPACES[name], 100, seed=0))) == 100


def test_a_small_space_repeats_architectures_instead_of_losing_balance() -> None:
    space = Blocks((4,), (1,))
    assert sorted(balanced_design(space, 8, seed=0)) == [(0,), (0,), (1,), (1,), (2,), (2,), (3,), (3,)]


def test_seeds_and_prefixes() -> None:
    design = balanced_design(NAS_BENCH_201, 30, seed=4)
    assert balanced_design(NAS_BENCH_201, 12, seed=4) == design[:12]
    assert balanced_design(NAS_BENCH_201, 30, seed=5) != design


@pytest.mark.parametrize(
    ("name", "share"), [("nas_bench_201", 0.6), ("darts", 0.9), ("darts, one per edge", 0.9)]
)
def test_pairs_are_more_even_than_those_of_random_architectures(name: str, share: float) -> None:
    """At 50 rows, the deviation of the counts of pairs is at most a share of that in random designs."""
    space = SPACES[name]
    flat = layout(space)
    apart = flat.decision[:, None] != flat.decision

    def unevenness(rows: np.ndarray) -> float:
        return float((rows.T @ rows)[apart].std())

    random = [
        unevenness(
            incidence(space, [architecture(space, space.random_supports(100 * k + i)) for i in range(50)])
        )
        for k in range(5)
    ]
    balanced = [unevenness(incidence(space, balanced_design(space, 50, seed))) for seed in range(5)]
    assert max(balanced) < share * min(random)


def test_edges_of_different_sizes_are_as_even_as_they_can_be() -> None:
    """Of edges with 1 and 3 candidates both are kept, so the first candidate occurs in every row."""
    from istanas.space import Decision

    class Uneven(Blocks):
        def make_decisions(self) -> list[Decision]:
            return [Decision("node", 0, (("a", 0), ("a", 1), ("b", 1), ("c", 1)), 2, one_per_edge=True)]

    counts = incidence(Uneven(), balanced_design(Uneven(), 9, seed=0)).sum(0)
    assert counts.tolist() == [9, 3, 3, 3]


def test_an_empty_design_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 architectures are no design"):
        balanced_design(NAS_BENCH_201, 0, seed=0)
