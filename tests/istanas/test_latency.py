"""Predicted latencies: sums over what a network runs, compared with real networks; and tables that are refused."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from istanas.candidates import candidate_costs
from istanas.errors import ConfigError
from istanas.latency import (
    CandidateLatency,
    LatencyPredictor,
    LatencyTable,
    Machine,
    describe_space,
    fit_references,
    latency_predictor,
    network_seeds,
    variants_of,
)
from istanas.measure import count_params
from istanas.space import CellSpace, Genotype, NasBench201Space, NetworkSize, SearchSpace

SHAPE = (3, 16, 16)
SPACE, SIZE = CellSpace(n_nodes=2), NetworkSize(4, 6, 10)
SPACES: list[tuple[SearchSpace, NetworkSize]] = [(SPACE, SIZE), (NasBench201Space(), NetworkSize(4, 8, 10))]


def by_params(space: SearchSpace, size: NetworkSize, fixed_ms: float = 0.0) -> LatencyPredictor:
    """Latencies in which a candidate takes as many milliseconds as it has parameters."""
    measured = {variant: float(variant.params) for variant in variants_of(space, size, SHAPE)}
    return LatencyPredictor(space, size, SHAPE, measured, fixed_ms)


def reading(state: int) -> Genotype:
    """A genotype whose normal cells read only one of their inputs."""
    return Genotype(
        normal=(
            (("sep_conv_3x3", state), ("dil_conv_3x3", state)),
            (("sep_conv_5x5", state), ("skip_connect", 2)),
        ),
        reduce=((("sep_conv_3x3", 0), ("skip_connect", 1)), (("dil_conv_5x5", 1), ("max_pool_3x3", 2))),
    )


@pytest.mark.parametrize("genotype", [*map(SPACE.random, range(3)), reading(0), reading(1)])
def test_a_cells_network_takes_what_the_operations_that_it_runs_take(genotype: Genotype) -> None:
    net = SPACE.target(genotype, SIZE)
    runs = [cell for cell, is_live in zip(net.cells, net._live_in_eval[2:], strict=True) if is_live]
    operations = sum(count_params(op) for cell in runs for op in cell.ops)
    read = sum(len({0, 1} & cell.live) for cell in runs)  # type: ignore[operator]
    assert by_params(SPACE, SIZE, fixed_ms=1000.0).predict(genotype) == pytest.approx(
        operations + 1000 * read / (2 * SIZE.layers)
    )


def test_some_cells_of_a_network_that_reads_one_input_do_not_run() -> None:
    assert SPACE.read_shares(reading(0), SIZE) == (0, 0.5, 0, 0.5, 0, 0.5)
    assert SPACE.read_shares(reading(1), SIZE) == (0.5, 0.5, 1, 0.5, 1, 0.5)  # the reduction cells read both


@pytest.mark.parametrize(("space", "size"), SPACES)
@pytest.mark.parametrize("total", [False, True])
def test_costs_are_averaged_and_summed_as_those_that_are_counted(
    space: SearchSpace, size: NetworkSize, total: bool
) -> None:
    counted = candidate_costs(space, size, SHAPE, "params", total=total)
    for kind, each in by_params(space, size).costs(total=total).items():
        for ours, theirs in zip(each, counted[kind], strict=True):
            np.testing.assert_allclose(ours, theirs)


def test_an_architecture_of_nas_bench_201_takes_the_sum_of_its_candidates() -> None:
    space, size = SPACES[1]
    genotype = space.random(3)
    summed = by_params(space, size).costs(total=True)["cell"]
    expected = sum(summed[edge][support[0]] for edge, support in enumerate(space.supports(genotype)["cell"]))
    assert by_params(space, size, fixed_ms=7.0).predict(genotype) == pytest.approx(7 + expected)


def test_the_fit_finds_constants_that_explain_all_references() -> None:
    rng = np.random.default_rng(0)
    candidates, shares = rng.uniform(1, 9, 10), np.array([0.5, 0.75, *[1.0] * 8])
    references = list(zip(3 * shares + 1.3 * candidates, candidates, shares, strict=True))
    assert fit_references(references) == pytest.approx((3, 1.3), abs=0.1)
    assert fit_references([(5.0, 2.0, 1.0)] * 3) == pytest.approx((3, 1))  # nothing says otherwise
    assert fit_references([(5.0, 0.0, 1.0), (5.0, 0.0, 1.0)]) == pytest.approx((5, 1))
    assert fit_references([(1.0, 2.0, 1.0), (1.5, 3.0, 1.0)])[0] == 0


def test_the_networks_that_are_measured_differ() -> None:
    assert len({SPACE.random(seed).digest() for seed in network_seeds(38)}) == 38


def table_of(space: SearchSpace = SPACE, size: NetworkSize = SIZE, **changes: Any) -> LatencyTable:
    machine = Machine("torch", "cpu", "a processor", 1, "float32", {"torch": "2"})
    candidates = tuple(
        CandidateLatency(1.0, 1.0, 1.0, **variant._asdict()) for variant in variants_of(space, size, SHAPE)
    )
    table = LatencyTable(machine, describe_space(space), size, SHAPE, 1, 30, 1.0, 2.0, candidates)
    return dataclasses.replace(table, **changes)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            table_of(SPACES[1][0], SPACES[1][1]),
            "another space.name, 'nas_bench_201', and the search has 'darts'",
        ),
        (table_of(CellSpace(n_nodes=3)), "another space.n_nodes, 3, and the search has 2"),
        (table_of(size=NetworkSize(8, 6, 10)), "another network.init_channels, 8, and the search has 4"),
        (table_of(size=NetworkSize(4, 6, 10, op_batchnorm=True)), "another network.op_batchnorm, True, and"),
        (table_of(picture=(3, 32, 32)), "another picture, [3, 32, 32], and the search has [3, 16, 16]"),
        (
            table_of(candidates=table_of().candidates[1:]),
            "lacks the candidate max_pool_3x3 from 4x16x16 to 4x16x16 with 0 parameters; measure it again",
        ),
    ],
)
def test_a_table_for_another_search_is_refused(table: LatencyTable, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        latency_predictor(table, SPACE, SIZE, SHAPE)
    assert caught.value.field == "latency_table"
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_for_the_search_is_accepted() -> None:
    latencies = latency_predictor(table_of(), SPACE, SIZE, SHAPE)
    assert latencies.predict(SPACE.random(0)) == 1.0 + 2.0 * (2 * 2 * SIZE.layers)
