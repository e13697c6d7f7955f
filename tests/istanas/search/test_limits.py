"""Costs and limits in searches by sparse coding: the weight of the costs, and exchanges of candidates."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from istanas.candidates import candidate_costs
from istanas.data import Batch
from istanas.errors import ConfigError
from istanas.latency import LatencyPredictor, variants_of
from istanas.measure import Cost
from istanas.nets import ArchitectureNetwork, Supernet
from istanas.search import OneStageSearch, OneStageSettings, sparse_coding
from istanas.search.darts import DartsSearch, DartsSettings
from istanas.search.gdas import GdasSearch, GdasSettings
from istanas.search.limits import cheapest, exchanges
from istanas.search.pc_darts import PcDartsSearch, PcDartsSettings
from istanas.search.random_nas import RandomNasSearch, RandomNasSettings
from istanas.search.random_search import RandomSearch, RandomSettings
from istanas.search.softmax import CostPenalty
from istanas.search.two_stage import TwoStageSearch
from istanas.settings import TwoStageSettings
from istanas.space import CellSpace, Decision, Genotype, NetworkSize
from istanas.training import Compute, Metrics, Totals

CPU = Compute(torch.device("cpu"))
SPACE = CellSpace(n_nodes=3)
SIZE = NetworkSize(8, 5, 10)
SHAPE = (3, 16, 16)
PLAIN = TwoStageSettings(alphas_scale=0.1)


def cost_of(genotype: Genotype) -> Cost:
    return SPACE.cost(genotype, SIZE, SHAPE)


def costs_in(unit: Any, total: bool = True) -> Mapping[str, Any]:
    return candidate_costs(SPACE, SIZE, SHAPE, unit, total=total)


def least(unit: str) -> int:
    """The smallest cost: with the cheapest operations, and with both inputs or one, so that some cells do not run."""
    found = []
    for reads in itertools.product((None, 0, 1), repeat=2):
        supports = {
            kind: [
                tuple(
                    sorted(
                        range(d.n_candidates),
                        key=lambda c: (
                            state is not None and d.candidates[c][1] != state,
                            costs_in(unit)[kind][d.index][c],
                            c,
                        ),
                    )[:2]
                )
                for d in SPACE.decisions[kind]
            ]
            for kind, state in zip(SPACE.kinds, reads, strict=True)
        }
        found.append(getattr(cost_of(SPACE.genotype(supports)), unit))
    return min(found)


def least_macs() -> int:
    return least("macs")


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
    search = make_search(change(max_macs=least_macs()), seed)
    assert macs(search) == least_macs()
    for kind, codes in search.codes.items():
        for code, decision in zip(codes, SPACE.decisions[kind], strict=True):
            assert len(set(code.support)) == decision.sparsity
    search.recover()
    assert macs(search) == least_macs()


def test_both_limits_are_kept_together() -> None:
    """Operations whose order by multiply-adds differs from that by parameters do not exchange each other for ever."""
    space = CellSpace(n_nodes=2, ops=("sep_conv_3x3", "dil_conv_5x5"))
    size = NetworkSize(3, 5, 10)

    def cost(genotype: Genotype) -> Cost:
        return space.cost(genotype, size, SHAPE)

    found = [cost(space.random(seed)) for seed in range(50)]
    middle = sorted(each.macs for each in found)[25], sorted(each.params for each in found)[25]
    for seed in range(4):
        torch.manual_seed(0)
        search = TwoStageSearch(
            Supernet(space, 2, 5, 10),
            change(max_macs=middle[0], max_params=middle[1]),
            CPU,
            seed,
            None,
            cost,
            lambda unit, total: candidate_costs(space, size, SHAPE, unit, total=total),
        )
        assert cost(search.genotype()).macs <= middle[0]
        assert cost(search.genotype()).params <= middle[1]


def test_frozen_decisions_are_not_exchanged() -> None:
    limits = make_search(change(max_macs=10**9)).limits
    supports = {kind: [(3, 5)] * 3 for kind in SPACE.kinds}  # convolutions
    zero = {kind: [np.zeros(d.n_candidates) for d in each] for kind, each in SPACE.decisions.items()}
    most = cost_of(SPACE.genotype(supports)).macs
    tight = make_search(change(max_macs=int(0.9 * most))).limits
    assert limits.within(supports, zero) == supports
    free = ("normal", 1)
    changed = tight.within(supports, zero, [free])
    assert changed["normal"][1] != (3, 5)
    assert [each for kind in changed for i, each in enumerate(changed[kind]) if (kind, i) != free] == [
        (3, 5)
    ] * 5


def test_exchanges_respect_one_operation_an_edge() -> None:
    space = CellSpace(n_nodes=3, one_op_per_edge=True)
    costs = candidate_costs(space, SIZE, SHAPE, "macs")
    few = space.cost(space.genotype(cheapest(space, costs)), SIZE, SHAPE).macs
    torch.manual_seed(0)
    search = TwoStageSearch(
        Supernet(space, 2, 5, 10),
        change(max_macs=few),
        CPU,
        0,
        None,
        lambda genotype: space.cost(genotype, SIZE, SHAPE),
        lambda unit, total: candidate_costs(space, SIZE, SHAPE, unit, total=total),
    )
    for codes in search.codes.values():
        for code in codes:
            assert len({candidate // space.n_ops for candidate in code.support}) == 2


def test_a_limit_below_the_cheapest_architecture_names_that() -> None:
    fewest = least("params")
    with pytest.raises(ConfigError) as caught:
        make_search(change(max_params=fewest - 1))
    assert str(caught.value) == (
        f"max_params: {fewest - 1:,} is below the cheapest architecture, which has {fewest:,}; use {fewest:,} or more, "
        "or a smaller network"
    )


# ---------- the other methods
SCORED: dict[str, tuple[type[Any], Any]] = {
    "darts": (DartsSearch, DartsSettings(epochs=1)),
    "darts, second order": (DartsSearch, DartsSettings(epochs=1, second_order=True)),
    "pc_darts": (PcDartsSearch, PcDartsSettings(epochs=1, warmup_epochs=0, partial=2)),
    "gdas": (GdasSearch, GdasSettings(epochs=1)),
}


def make_scored(name: str, **changes: Any) -> Any:
    method, base = SCORED[name]
    settings = dataclasses.replace(base, **changes)
    torch.manual_seed(0)
    net = Supernet(
        SPACE,
        2,
        5,
        10,
        alpha_size=lambda decision: method.alpha_size(settings, decision),
        partial=method.partial_channels(settings),
    )
    return method(net, settings, CPU, 0, None, cost_of, costs_in)


def batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(4, 3, 16, 16, generator=generator), torch.arange(4))


@pytest.mark.parametrize("name", SCORED)
def test_a_method_with_scores_stays_within_its_limits(name: str) -> None:
    free = make_scored(name)
    limit = int(0.7 * macs(free))
    search = make_scored(name, max_macs=limit)
    assert macs(search) <= limit
    search.train_epoch([batch(0)], lambda: [batch(1)], n_steps=1)
    search.finish_epoch()
    assert macs(search) <= limit
    assert macs(make_scored(name, max_macs=least_macs())) == least_macs()
    with pytest.raises(ConfigError, match=r"max_macs: 10 is below the cheapest architecture"):
        make_scored(name, max_macs=10)


@pytest.mark.parametrize("name", SCORED)
def test_the_expected_cost_is_a_penalty_of_the_alphas(name: str) -> None:
    """The gradient of the alphas changes by that of the penalty, and a large weight lowers the expected cost."""
    gradients = []
    for weight in (0.0, 2.0):
        search = make_scored(name, cost_weight=weight)
        search.alpha_optimizer.step = lambda: None
        search.step(batch(0), batch(1), Totals(torch.device("cpu")))
        gradients.append([b.grad.clone() for b in search.alphas])
    penalty = CostPenalty(SPACE.decisions, costs_in("macs"), 2.0, torch.device("cpu"))
    alphas = {kind: search.supernet.node_alphas(kind) for kind in SPACE.kinds}
    expected = torch.autograd.grad(2.0 * penalty.expected(alphas), search.alphas)
    for without, with_costs, change_of in zip(*gradients, expected, strict=True):
        torch.testing.assert_close(with_costs - without, change_of, atol=1e-6, rtol=1e-4)

    search = make_scored(name, cost_weight=5.0, arch_lr=0.3)
    before = search.metrics()["arch/expected_cost"]
    for _ in range(2):
        search.train_epoch([batch(0)], lambda: [batch(1)], n_steps=1)
    assert before == pytest.approx(1.0, abs=0.01)
    assert search.metrics()["arch/expected_cost"] < 0.9
    assert "arch/expected_cost" not in make_scored(name).metrics()


def test_the_expected_cost_is_that_of_sampled_operations() -> None:
    """Against the definition: the mean over operations that are drawn on each edge with their probabilities."""
    rng = np.random.default_rng(0)
    costs = costs_in("params")
    alphas = {
        kind: [torch.tensor(rng.normal(size=d.n_candidates)) for d in each]
        for kind, each in SPACE.decisions.items()
    }
    drawn, equal = 0.0, 0.0
    for kind, each in SPACE.decisions.items():
        for decision in each:
            for edge in set(decision.edges):
                own = [c for c in range(decision.n_candidates) if decision.edges[c] == edge]
                cost = costs[kind][decision.index][own]
                p = torch.softmax(alphas[kind][decision.index][own], 0).numpy()
                drawn += rng.choice(cost, size=20_000, p=p).mean()
                equal += cost.mean()
    penalty = CostPenalty(SPACE.decisions, costs, 1.0, torch.device("cpu"))
    assert float(penalty.expected(alphas)) == pytest.approx(drawn / equal, rel=0.01)


@pytest.mark.parametrize("name", ["two_stage", *SCORED])
def test_a_limit_of_the_latency_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The milliseconds of a candidate are made up, and their order is not that of its multiply-adds or parameters."""
    milliseconds = {v: len(v.operation) + v.params / 100 for v in variants_of(SPACE, SIZE, SHAPE)}
    latencies = LatencyPredictor(SPACE, SIZE, SHAPE, milliseconds, 50.0)
    module = sys.modules[__name__]
    of_cost = cost_of
    monkeypatch.setattr(
        module, "cost_of", lambda g: dataclasses.replace(of_cost(g), latency=latencies.predict(g))
    )
    monkeypatch.setattr(module, "costs_in", lambda unit, total=True: latencies.costs(total=total))

    def search(**changes: Any) -> Any:
        changes["cost"] = "latency"
        return make_search(change(**changes)) if name == "two_stage" else make_scored(name, **changes)

    most = 0.8 * latencies.predict(search().genotype())
    limited = search(max_latency_ms=most)
    assert latencies.predict(limited.genotype()) <= most
    search(cost_weight=1.0)
    with pytest.raises(
        ConfigError, match=r"^max_latency_ms: 5.0 is below the cheapest .*, which has ([\d.]+); use \1 or"
    ) as caught:
        search(max_latency_ms=5.0)
    cheapest_ms = float(str(caught.value).split("has ")[1].split(";")[0])
    assert latencies.predict(search(max_latency_ms=cheapest_ms).genotype()) <= cheapest_ms


def test_random_architectures_are_drawn_within_the_limits() -> None:
    costs = sorted(cost_of(SPACE.random(seed)).macs for seed in range(100))
    for limit, tries in ((costs[30], 5), (least_macs(), 1)):
        for seed in range(tries):
            net = ArchitectureNetwork(SPACE, NetworkSize(2, 5, 10))
            settings = RandomSettings(max_macs=limit)
            search = RandomSearch(net, settings, CPU, seed, None, cost_of, costs_in)
            assert macs(search) <= limit
    plain = RandomSearch(ArchitectureNetwork(SPACE, NetworkSize(2, 5, 10)), RandomSettings(), CPU, 3)
    assert plain.genotype() == SPACE.random(3)


def test_random_nas_chooses_among_candidates_within_the_limits() -> None:
    costs = sorted(cost_of(SPACE.random(seed)).macs for seed in range(100))
    settings = RandomNasSettings(epochs=1, candidates=4, candidate_pictures=None, max_macs=costs[20])
    torch.manual_seed(0)
    net = Supernet(SPACE, 2, 5, 10, alpha_size=lambda d: 0)
    search = RandomNasSearch(net, settings, CPU, 0, None, cost_of, costs_in)
    search.train_epoch([batch(0)], lambda: [batch(1)], n_steps=1)

    class Pictures:
        def __call__(self) -> Metrics:
            return search.validate([batch(2)])

        def pictures(self, count: int | None = None) -> Any:
            return [batch(2)]

        def training(self) -> Any:
            return [batch(0)]

    search.validate_epoch(Pictures())
    search.finish_epoch()
    assert macs(search) <= costs[20]


def test_no_exchange_chooses_none() -> None:
    decision = Decision("edge", 0, (("none", 0), ("skip", 0), ("conv", 0)), sparsity=1)
    found = list(exchanges(decision, (2,), [9.0, 1.0, 5.0], np.array([0.0, 1.0, 4.0])))
    assert found == [(4.0, 3.0, (1,))]


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
    few = least_macs()
    with pytest.raises(ConfigError, match="100 other random first architectures exceed the limits"):
        make(max_macs=few)
    assert macs(make(max_macs=few, over_limit="reweigh")) == few
