"""What every search method has to do, in three kinds of spaces. A new method is tested by one line in `CASES`."""

import dataclasses
import functools
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import pytest
import torch
from torch import Tensor, nn

from istanas.data import Batch
from istanas.distributed import Ranks
from istanas.measure import Cost
from istanas.methods import METHODS
from istanas.nets import ArchitectureNetwork, SearchNetwork
from istanas.search import RecoveryReport, Search
from istanas.settings import (
    DartsSettings,
    GdasSettings,
    MeasuredSettings,
    OneStageSettings,
    PcDartsSettings,
    RandomNasSettings,
    RandomSettings,
    SearchSettings,
    TwoStageSettings,
)
from istanas.space import CellSpace, ChoiceSpace, Decision, NasBench201Space, NetworkSize, SearchSpace
from istanas.training import Compute, Metrics
from tests.ranks import run_ranks

# The alphas move fast, so that an epoch of a few steps changes the architecture.
CASES: dict[str, tuple[str, SearchSettings]] = {
    "two_stage": ("two_stage", TwoStageSettings(epochs=3, arch_lr=0.02, alphas_scale=0.1)),
    "one_stage": ("one_stage", OneStageSettings(max_search_epochs=2, train_epochs=1, arch_lr=0.02)),
    "darts": ("darts", DartsSettings(epochs=3, arch_lr=0.1)),
    "darts, second order": ("darts", DartsSettings(epochs=3, arch_lr=0.1, second_order=True)),
    "pc_darts": ("pc_darts", PcDartsSettings(epochs=3, arch_lr=0.1, warmup_epochs=1)),
    "gdas": ("gdas", GdasSettings(epochs=3, arch_lr=0.1)),
    "random_nas": (
        "random_nas",
        RandomNasSettings(epochs=3, candidates=4, candidate_pictures=None, finalists=2),
    ),
    # The first architecture takes two epochs.
    "measured": ("measured", MeasuredSettings(stages=((2, 2), (1, 1)))),
    "random": ("random", RandomSettings()),
}
Net = TypeVar("Net", bound=nn.Module)
CPU, N_STEPS, CLASSES = Compute(torch.device("cpu")), 3, 5


@dataclass(frozen=True)
class Chain(ChoiceSpace):
    """Two choices in a chain, the second with stride 2."""

    name: ClassVar[str] = "chain"
    has_partial_channels: ClassVar[bool] = True

    ops: tuple[str, ...] = ("avg_pool_3x3", "skip_connect", "sep_conv_3x3")

    def make_decisions(self) -> list[Decision]:
        return [Decision("block", i, tuple((op, i) for op in self.ops), 1, edges=(0, 0, 0)) for i in range(2)]

    def network(self, size: NetworkSize, choose: Any) -> nn.Module:
        c = 2 * size.init_channels
        return nn.Sequential(
            nn.Conv2d(size.in_channels, c, 3, padding=1, bias=False),
            choose.operation("block", 0, c),
            choose.operation("block", 1, c, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(c, size.num_classes),
        )


SPACES: dict[str, SearchSpace] = {
    "cells": CellSpace(n_nodes=2),
    "chain": Chain(),
    "nas_bench_201": NasBench201Space(),
}


def size_of(settings: SearchSettings, space: SearchSpace) -> NetworkSize:
    layers = 5 if isinstance(space, NasBench201Space) else 3  # the smallest number that the space has
    return NetworkSize(4, layers, CLASSES, in_channels=1, op_batchnorm=settings.trains_target)


def is_supported(case: str, space: SearchSpace) -> bool:
    name, settings = CASES[case]
    return space.has_partial_channels or METHODS[name].search_class.partial_channels(settings) == 1


def exact(net: Net) -> Net:
    """Make the output of a network independent of the other pictures of a batch, and of rounding."""
    net.double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign,misc]
    return net


def make(case: str, space: SearchSpace, *, seed: int = 0, ranks: Ranks | None = None) -> Search[Any]:
    if not is_supported(case, space):
        pytest.skip("the space does not support the method")
    name, settings = CASES[case]
    method = METHODS[name].search_class
    torch.manual_seed(seed)
    net: SearchNetwork = ArchitectureNetwork(space, size_of(settings, space))
    if method.has_supernet:
        net = space.supernet(
            size_of(settings, space),
            lambda decision: method.alpha_size(settings, decision),
            auxiliary=False,
            partial=method.partial_channels(settings),
        )
    if ranks is not None:
        exact(net)
        if isinstance(net, ArchitectureNetwork):
            replace = net.replace_network
            net.replace_network = lambda network: replace(exact(network))  # type: ignore[method-assign]
    return method(net, settings, CPU, 0, ranks, lambda genotype: Cost(0, 0))


def batch(seed: int, ranks: Ranks | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.float64)
    target = torch.randint(CLASSES, (4,), generator=generator)
    if ranks is None:
        return Batch(images.float(), target)
    return Batch(images[ranks.rank :: ranks.size], target[ranks.rank :: ranks.size])


@dataclass(frozen=True)
class Pictures:
    """The pictures for choosing, see `istanas.search.base.Choosing`."""

    search: Search[Any]
    ranks: Ranks | None

    def __call__(self) -> Metrics:
        return self.search.validate(self.pictures())

    def pictures(self, count: int | None = None) -> list[Batch]:
        return batches(900, self.ranks)

    def training(self) -> list[Batch]:
        return batches(950, self.ranks)


def batches(first: int, ranks: Ranks | None) -> list[Batch]:
    return [batch(first + step, ranks) for step in range(N_STEPS)]


def run_epoch(search: Search[Any], ranks: Ranks | None = None) -> tuple[Any, RecoveryReport]:
    start = 100 * search.epoch
    divides = hasattr(search.settings, "alpha_fraction")
    metrics = search.train_epoch(
        batches(start, ranks), (lambda: batches(start + 50, ranks)) if divides else None, N_STEPS
    )
    if divides:
        search.validate_epoch(Pictures(search, ranks))
    return metrics, search.finish_epoch()


def values(state: Any) -> Iterator[Any]:
    """Yield the leaves of a state, tensors as lists."""
    if isinstance(state, Tensor):
        yield state.tolist()
    elif isinstance(state, dict):
        for key in state:
            yield key
            yield from values(state[key])
    elif isinstance(state, list | tuple):
        for each in state:
            yield from values(each)
    else:
        yield state


@pytest.fixture(params=SPACES)
def space(request: pytest.FixtureRequest) -> SearchSpace:
    return SPACES[request.param]


def test_every_registered_method_is_tested() -> None:
    assert set(METHODS) == {name for name, _ in CASES.values()}
    assert {name: method.search_class.kind for name, method in METHODS.items()} == {
        name: name for name in METHODS
    }


@pytest.mark.parametrize("case", CASES)
def test_an_epoch_trains_the_weights_that_are_active(case: str, space: SearchSpace) -> None:
    search = make(case, space)
    before = [w.detach().clone() for w in search.supernet.weights()]
    metrics, _ = run_epoch(search)
    moved = [not torch.equal(w, old) for w, old in zip(search.supernet.weights(), before, strict=True)]
    assert search.epoch == 1
    assert any(moved) == (metrics is not None)
    if metrics is not None:
        assert math.isfinite(metrics.loss)
        assert metrics.count == N_STEPS * 4


@pytest.mark.parametrize("case", CASES)
def test_gradients_exist_for_the_active_parameters_and_no_others(case: str, space: SearchSpace) -> None:
    search = make(case, space)
    for _ in range(2):  # The second epoch is after the warm-up.
        metrics, _ = run_epoch(search)
        if metrics is None:
            pytest.skip("the method trains nothing")
        for parameter in search.supernet.parameters():
            parameter.grad = None
        search.train_step(batch(0), batch(1) if hasattr(search.settings, "alpha_fraction") else None)
    alphas = [p for p in search.supernet.active_alphas() if p.numel() > 0]  # `random_nas` has none
    active = {id(p) for p in (*search.supernet.active_parameters(), *alphas)}
    assert {id(p) for p in search.supernet.parameters() if p.grad is not None} == active


@pytest.mark.parametrize("case", CASES)
def test_a_restored_search_continues_bit_for_bit(case: str, space: SearchSpace) -> None:
    search, other = make(case, space), make(case, space, seed=1)
    run_epoch(search)
    file = io.BytesIO()
    torch.save(search.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.genotype() == search.genotype()
    whole, resumed = run_epoch(search), run_epoch(other)
    assert whole == resumed
    assert list(values(search.state_dict())) == list(values(other.state_dict()))
    assert other.metrics() == search.metrics()


@pytest.mark.parametrize("case", CASES)
def test_reports_have_one_node_per_decision(case: str, space: SearchSpace) -> None:
    search = make(case, space)
    decisions = space.all_decisions()
    for report in (search.first_recovery, run_epoch(search)[1]):
        assert [(node.cell, node.node) for node in report.nodes] == [(d.kind, d.index) for d in decisions]
        for node, decision in zip(report.nodes, decisions, strict=True):
            assert len(node.picks) == len(node.edge_weights) == decision.sparsity
            assert len(node.magnitudes) in (0, decision.n_candidates)
            figures = [*node.edge_weights, *node.magnitudes, node.distance, node.gap, node.truncation]
            assert all(map(math.isfinite, figures))
        assert all(map(math.isfinite, report.metrics().values()))
    assert all(node.distance == 0 for node in search.first_recovery.nodes)
    assert all(map(math.isfinite, search.metrics().values()))


@pytest.mark.parametrize("case", CASES)
def test_the_final_genotype_is_one_of_the_space(case: str, space: SearchSpace) -> None:
    search = make(case, space)
    assert not search.is_done or not search.has_supernet
    while not search.is_done:
        run_epoch(search)
    genotype = search.genotype()
    supports = space.supports(genotype)
    assert space.genotype(supports) == genotype
    for kind, decisions in space.decisions.items():
        assert [len(support) for support in supports[kind]] == [d.sparsity for d in decisions]
    net = space.target(genotype, size_of(search.settings, space))
    assert net(batch(0).images).shape == (4, CLASSES)


@pytest.mark.parametrize("case", CASES)
def test_a_state_of_another_method_is_refused(case: str) -> None:
    search = make(case, SPACES["chain"])
    with pytest.raises(Exception, match="is not"):
        search.load_state_dict({**search.state_dict(), "kind": "another"})


# ---------- several ranks


def search_for_two_epochs(case: str, space: str) -> tuple[list[str], list[Any]]:
    """Search on this process's share; return the genotypes, and the metrics, edge weights and alphas."""
    ranks = Ranks.current(torch.device("cpu"))
    search = make(case, SPACES[space], ranks=ranks)
    genotypes: list[str] = []
    figures: list[Any] = []
    for _ in range(2):
        metrics, report = run_epoch(search, ranks)
        genotypes.append(search.genotype().digest())
        figures += [node.edge_weights for node in report.nodes]
        figures += [] if metrics is None else [dataclasses.astuple(metrics)[:3]]
    return genotypes, [*figures, *(alphas.tolist() for alphas in search.alphas)]


@pytest.mark.slow
def test_two_ranks_equal_one_process() -> None:
    cases = [(case, name) for case in CASES for name, space in SPACES.items() if is_supported(case, space)]
    found = run_ranks([functools.partial(search_for_two_epochs, *case) for case in cases], 2)
    for case, outcomes in zip(cases, found, strict=True):
        alone = search_for_two_epochs(*case)
        for outcome in outcomes:
            assert outcome.value[0] == alone[0], case
            torch.testing.assert_close(outcome.value[1], alone[1], rtol=0, atol=1e-7)
