"""Searches with an architecture per step: reports, single edges, several ranks, and the cost of installing."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from istanas.data import Batch
from istanas.distributed import Ranks
from istanas.methods import METHODS
from istanas.nets import Supernet
from istanas.search.base import Search
from istanas.search.gdas import GdasSearch
from istanas.space import CellSpace, Decision, NetworkSize
from istanas.space.base import SearchSpace
from istanas.space.choice import ChoiceSpace, Choose
from istanas.training import Compute
from tests.ranks import run_ranks

CPU = Compute(torch.device("cpu"))
NAMES = ("gdas", "random_nas")


@dataclass(frozen=True)
class Chain(ChoiceSpace):
    """Two blocks, each with one of three operations."""

    name: ClassVar[str] = "chain_of_two"

    def make_decisions(self) -> list[Decision]:
        ops = ("sep_conv_3x3", "max_pool_3x3", "skip_connect")
        return [Decision("block", i, tuple((op, 0) for op in ops), sparsity=1) for i in range(2)]

    def network(self, size: NetworkSize, choose: Choose) -> nn.Module:
        c = size.init_channels
        blocks = [choose.operation("block", i, c) for i in range(2)]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, size.num_classes)]
        return nn.Sequential(nn.Conv2d(size.in_channels, c, 3, padding=1), *blocks, *head)


SPACES = (CellSpace(n_nodes=2), Chain())


def make_search(name: str, space: SearchSpace, ranks: Ranks | None = None, **settings: Any) -> Search[Any]:
    torch.manual_seed(0)
    method = METHODS[name]
    chosen = method.settings_class(**{"epochs": 4, "arch_lr": 0.1, **settings})
    size = NetworkSize(4, 3, 5, in_channels=1)
    net = space.supernet(
        size, lambda d: method.search_class.alpha_size(chosen, d), auxiliary=False, partial=1
    ).double()
    return method.search_class(net, chosen, CPU, 0, ranks)


def batch(seed: int, ranks: Ranks | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(8, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (8,), generator=generator)
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    return Batch(images[rank::size], labels[rank::size])


def run_epoch(search: Search[Any], ranks: Ranks | None = None) -> Any:
    epoch = search.epoch
    train = search.train_epoch(
        [batch(10 * epoch + i, ranks) for i in range(3)], lambda: [batch(99, ranks)], n_steps=3
    )
    valid = search.validate([batch(98, ranks)])
    return train, valid, search.finish_epoch().nodes


@pytest.mark.parametrize("space", SPACES, ids=lambda s: s.name)
@pytest.mark.parametrize("name", NAMES)
def test_reports_have_one_node_per_decision_of_the_space(name: str, space: SearchSpace) -> None:
    search = make_search(name, space)
    _, _, nodes = run_epoch(search)
    assert [(node.cell, node.node) for node in nodes] == search.places
    for node, decision in zip(nodes, space.all_decisions(), strict=True):
        assert len(node.picks) == len(node.edge_weights) == decision.sparsity
        assert all(0 < weight <= 1 for weight in node.edge_weights)
    space.check(search.genotype())


def test_in_a_space_of_single_edges_gdas_finds_the_planted_operation() -> None:
    """Only one operation passes the picture on, so that its loss falls and its alpha grows."""

    class Zero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x

    search = make_search("gdas", Chain(), epochs=1, arch_weight_decay=0.0)
    for choices in search.supernet.places.values():
        for choice in choices:
            choice.candidates["1"], choice.candidates["2"] = Zero(), Zero()
    images = torch.cat([torch.full((1, 1, 8, 8), float(i)) for i in range(5)]).double()
    one = Batch(images, torch.arange(5))
    search.train_epoch([one] * 60, lambda: [one], n_steps=60)
    assert [picks[0][0] for picks in search.genotype().picks("block")] == ["sep_conv_3x3"] * 2


# ---------- several ranks
def train_on_a_share() -> dict[str, Any]:
    """Train both searches on this rank's share, with batch norm in eval mode; return gradients and genotypes."""
    ranks = Ranks.current(torch.device("cpu"))
    found: dict[str, Any] = {}
    for name in NAMES:
        search = make_search(name, SPACES[0], ranks)
        for module in search.supernet.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                module.train = lambda mode=True, module=module: module  # type: ignore[method-assign,misc]
        _, valid, nodes = run_epoch(search, ranks)
        gradients = [p.grad.clone() for p in search.weights if p.grad is not None]
        found[name] = gradients, [b.detach().clone() for b in search.alphas], valid, nodes
    return found


def averaged_in_both_ways() -> list[list[Tensor]]:
    """Return gradients that DistributedDataParallel and that `average_gradients` average, bit for bit."""
    ranks = Ranks.current(torch.device("cpu"))
    results = []
    for way in ("data_parallel", "average_gradients"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
        parameters = list(net.parameters())
        forward: Callable[[Tensor], Tensor] = net
        if way == "data_parallel":
            forward = ranks.data_parallel(net, parameters)
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(ranks.rank))
        forward(x).square().sum().backward()
        if way == "average_gradients":
            ranks.average_gradients([*parameters, nn.Parameter(torch.zeros(2))])  # one without a gradient
        results.append([p.grad.clone() for p in parameters if p.grad is not None])
    return results


@pytest.mark.slow
def test_two_ranks_equal_one_process_and_data_parallel() -> None:
    alone = train_on_a_share()
    shares, averages = run_ranks([train_on_a_share, averaged_in_both_ways], 2)
    for outcome in shares:
        for name in NAMES:
            torch.testing.assert_close(outcome.value[name][:2], alone[name][:2], rtol=0, atol=1e-9)
            assert outcome.value[name][2].count == alone[name][2].count
            assert [n.picks for n in outcome.value[name][3]] == [n.picks for n in alone[name][3]]
    for outcome in averages:
        data_parallel, plain = outcome.value
        assert all(torch.equal(a, b) for a, b in zip(data_parallel, plain, strict=True))


def test_installing_an_architecture_costs_little_of_a_step() -> None:
    """On the published size; a step of it takes seconds on this machine, and tens of milliseconds on a GPU."""
    net = Supernet(CellSpace(), 16, 8, 10, alpha_size=lambda d: d.n_candidates)
    search = GdasSearch(net, METHODS["gdas"].settings_class(), CPU, 0)  # type: ignore[arg-type]
    search._install(0)
    seconds = []
    for seed in range(10):
        start = time.perf_counter()
        search._install(seed)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01
