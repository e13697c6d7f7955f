"""The costs of candidates: counted on modules, and equal to what a network gains when it keeps them."""

import copy
import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from istanas.candidates import PlacedCandidate, candidate_costs
from istanas.errors import ConfigError
from istanas.nets.operations import make_operation
from istanas.space import CellSpace, NasBench201Space, NetworkSize
from istanas.space.base import SearchSpace

SHAPE = (3, 32, 32)


@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("op_batchnorm", [False, True])
def test_a_cells_network_gains_what_its_candidates_cost(unit: str, op_batchnorm: bool) -> None:
    """Two genotypes differ by the mean costs of their candidates, times the number of cells of that kind."""
    space, size = CellSpace(n_nodes=3), NetworkSize(6, 8, 10, op_batchnorm=op_batchnorm)
    costs = candidate_costs(space, size, SHAPE, unit)
    cells, compared = {"normal": 6, "reduce": 2}, 0
    for seed in range(12):
        differences = []
        for supports in (space.random_supports(seed), space.random_supports(100 + seed)):
            predicted = sum(
                cells[kind] * costs[kind][node][list(support)].sum()
                for kind, each in supports.items()
                for node, support in enumerate(each)
            )
            # Every cell must read both inputs, or the network skips parts that belong to no candidate.
            read = {s for each in space.genotype(supports).picks("normal") for _, s in each}
            read_reduce = {s for each in space.genotype(supports).picks("reduce") for _, s in each}
            if not {0, 1} <= read & read_reduce:
                break
            differences.append(getattr(space.cost(space.genotype(supports), size, SHAPE), unit) - predicted)
        if len(differences) == 2:
            assert differences[0] == pytest.approx(differences[1], abs=1e-6)
            compared += 1
    assert compared > 0


@pytest.mark.parametrize("unit", ["macs", "params"])
def test_a_network_of_nas_bench_201_gains_what_its_candidates_cost(unit: str) -> None:
    space, size = NasBench201Space(), NetworkSize(4, 8, 10)
    costs = candidate_costs(space, size, SHAPE, unit)["cell"]
    base = space.genotype({"cell": [(0,)] * 6})  # "none" everywhere
    for seed in range(5):
        supports = space.random_supports(seed)
        gained = [getattr(space.cost(g, size, SHAPE), unit) for g in (space.genotype(supports), base)]
        predicted = 6 * sum(costs[edge][support[0]] for edge, support in enumerate(supports["cell"]))
        assert gained[0] - gained[1] == pytest.approx(predicted, abs=1e-6)


def test_the_cost_is_the_mean_over_the_cells() -> None:
    """A separable convolution of a normal cell, by hand: 16, 32 and 64 channels on 32, 16 and 8 pixels a side."""
    size = NetworkSize(16, 5, 10)
    costs = candidate_costs(CellSpace(), size, SHAPE, "macs")
    op = CellSpace().ops.index("sep_conv_3x3")
    normal = [(16, 32), (32, 16), (64, 8)]
    expected = np.mean([2 * (9 * c + c * c) * side * side for c, side in normal])
    assert costs["normal"][0][op] == pytest.approx(expected)


def test_the_caller_keeps_its_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    candidate_costs.cache_clear()
    candidate_costs(CellSpace(n_nodes=1), NetworkSize(4, 3, 10), SHAPE, "macs")
    candidate_costs(NasBench201Space(), NetworkSize(4, 5, 10), SHAPE, "macs")
    assert torch.equal(torch.rand(3), expected)


def test_a_space_without_places_says_what_to_define() -> None:
    with pytest.raises(
        ConfigError, match=r"space\.name: the space darts does not say where .* define placed_candidates"
    ):
        SearchSpace.placed_candidates(CellSpace(), NetworkSize(4, 3, 10), SHAPE)


def test_an_operation_of_a_target_network_has_affine_batch_norms() -> None:
    module = make_operation("sep_conv_3x3", 8, 1, affine=True)
    size = NetworkSize(8, 3, 10)
    costs = candidate_costs(CellSpace(n_nodes=1), size, SHAPE, "params")
    own = CellSpace(n_nodes=1).ops.index("sep_conv_3x3")
    assert costs["normal"][0][own] == sum(p.numel() for p in module.parameters())


def test_new_modules_at_every_place_are_counted_each() -> None:
    """An object's id may be used again after its end."""

    class Fresh(CellSpace):
        def placed_candidates(
            self, size: NetworkSize, shape: tuple[int, int, int]
        ) -> Iterator[PlacedCandidate]:
            for place in super().placed_candidates(size, shape):
                yield dataclasses.replace(place, module=copy.deepcopy(place.module))

    size = NetworkSize(4, 5, 10)
    fresh, plain = (
        candidate_costs(space, size, SHAPE, "params") for space in (Fresh(n_nodes=2), CellSpace(n_nodes=2))
    )
    for kind in plain:
        for ours, theirs in zip(fresh[kind], plain[kind], strict=True):
            np.testing.assert_array_equal(ours, theirs)
