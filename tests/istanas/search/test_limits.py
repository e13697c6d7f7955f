"""Costs and limits in searches by sparse coding: the weight of the costs, and exchanges of candidates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from istanas.candidates import candidate_costs
from istanas.errors import ConfigError
from istanas.measure import Cost
from istanas.nets import Supernet
from istanas.search import OneStageSearch, OneStageSettings, sparse_coding
from istanas.search.limits import cheapest
from istanas.search.two_stage import TwoStageSearch
from istanas.settings import TwoStageSettings
from istanas.space import CellSpace, Genotype, NetworkSize
from istanas.training import Compute

CPU = Compute(torch.device("cpu"))
SPACE = CellSpace(n_nodes=3)
SIZE = NetworkSize(8, 5, 10)
SHAPE = (3, 16, 16)
PLAIN = TwoStageSettings(alphas_scale=0.1)


def cost_of(genotype: Genotype) -> Cost:
    return SPACE.cost(genotype, SIZE, SHAPE)


def costs_in(unit: Any) -> Mapping[str, Any]:
    return candidate_costs(SPACE, SIZE, SHAPE, unit)


def make_search(settings: TwoStageSettings = PLAIN, seed: int = 0) -> TwoStageSearch:
    torch.manual_seed(0)
    net = Supernet(SPACE, 2, 5, 10)
    return TwoStageSearch(net, settings, CPU, seed, None, cost_of, costs_in)


def change(**changes: Any) -> TwoStageSettings:
    return dataclasses.replace(PLAIN, **changes)


def macs(search: Any) -> int:
    return cost_of(search.genotype()).macs


def test_without_costs_nothing_changes() -> None:
    """A search with costs of weight 0 has the codes of one that knows no costs, and does not count any."""
    torch.manual_seed(0)
    plain = TwoStageSearch(Supernet(SPACE, 2, 5, 10), PLAIN, CPU, 0)
    search = make_search()
    for kind, codes in plain.codes.items():
        for ours, theirs in zip(search.codes[kind], codes, strict=True):
            assert torch.equal(ours.sparse_code, theirs.sparse_code)
    assert search.metrics() == plain.metrics() == {"arch/frozen_nodes": 0.0}


def test_a_weight_of_the_costs_makes_architectures_cheaper() -> None:
    found = [
        [macs(make_search(change(cost_weight=mu), seed)) for seed in range(8)] for mu in (0.0, 1.0, 10.0)
    ]
    assert np.mean(found[0]) > np.mean(found[1]) > np.mean(found[2])
    assert make_search(change(cost_weight=1.0)).metrics()["arch/cost_weight"] == 1.0


@pytest.mark.parametrize("limit", ["max_macs", "max_params"])
def test_the_smallest_weight_that_keeps_a_limit_is_used(limit: str) -> None:
    raised = 0
    for seed in range(6):
        free = cost_of(make_search(seed=seed).genotype())
        most = int(0.8 * getattr(free, limit.removeprefix("max_")))
        unit = limit.removeprefix("max_")
        settings = change(**{limit: most, "cost": unit})
        search = make_search(settings, seed)
        assert getattr(cost_of(search.genotype()), unit) <= most
        mu = search.metrics()["arch/cost_weight"]
        if 0 < mu < sparse_coding.LARGEST_WEIGHT / 2:
            raised += 1
            below = dataclasses.replace(settings, **{limit: None, "cost_weight": mu * 0.97})
            assert getattr(cost_of(make_search(below, seed).genotype()), unit) > most
    assert raised >= 3


def test_an_architecture_within_the_limit_stays() -> None:
    free = make_search()
    search = make_search(change(max_macs=macs(free)))
    assert search.genotype() == free.genotype()
    assert search.metrics()["arch/cost_weight"] == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_every_reachable_limit_is_kept(seed: int) -> None:
    """Where no weight keeps it, candidates are exchanged; the cheapest architecture is always reached."""
    least = cost_of(cheapest(SPACE, dict(costs_in("macs")))).macs
    search = make_search(change(max_macs=least), seed)
    assert macs(search) == least
    for kind, codes in search.codes.items():
        for code, decision in zip(codes, SPACE.decisions[kind], strict=True):
            assert len(set(code.support)) == decision.sparsity
    search.recover()
    assert macs(search) == least


def test_exchanges_respect_one_operation_an_edge() -> None:
    space = CellSpace(n_nodes=3, one_op_per_edge=True)
    costs = dict(candidate_costs(space, SIZE, SHAPE, "macs"))
    least = space.cost(cheapest(space, costs), SIZE, SHAPE).macs
    torch.manual_seed(0)
    search = TwoStageSearch(
        Supernet(space, 2, 5, 10),
        change(max_macs=least),
        CPU,
        0,
        None,
        lambda genotype: space.cost(genotype, SIZE, SHAPE),
        lambda unit: candidate_costs(space, SIZE, SHAPE, unit),
    )
    for codes in search.codes.values():
        for code in codes:
            assert len({candidate // space.n_ops for candidate in code.support}) == 2


def test_a_limit_below_the_cheapest_architecture_names_that() -> None:
    least = cost_of(cheapest(SPACE, dict(costs_in("params")))).params
    with pytest.raises(ConfigError) as caught:
        make_search(change(max_params=least - 1))
    assert str(caught.value) == (
        f"max_params: {least - 1:,} is below the cheapest architecture, which has {least:,}; use {least:,} or more, or "
        "a smaller network"
    )


def test_one_stage_reweighs_only_on_request() -> None:
    """With "reject", the published rule, an architecture above the limit is redrawn, otherwise made cheaper."""
    base = OneStageSettings(max_search_epochs=3, train_epochs=1, alphas_scale=0.1, max_params=None)

    def make(**changes: Any) -> OneStageSearch:
        torch.manual_seed(0)
        net = Supernet(SPACE, 2, 5, 10, op_batchnorm=True)
        return OneStageSearch(net, dataclasses.replace(base, **changes), CPU, 0, None, cost_of, costs_in)

    free = make()
    limit = int(0.8 * macs(free))
    search = make(max_macs=limit, over_limit="reweigh")
    assert macs(search) <= limit
    assert search.metrics()["arch/cost_weight"] > 0
    search.recover()
    assert search.n_rejected == 0
    least = cost_of(cheapest(SPACE, dict(costs_in("macs")))).macs
    with pytest.raises(ConfigError, match="100 other random first architectures exceed the limits"):
        make(max_macs=least)
    assert macs(make(max_macs=least, over_limit="reweigh")) == least
