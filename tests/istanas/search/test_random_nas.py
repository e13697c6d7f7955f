"""Random search with weight sharing, and random architectures: what is drawn, trained, measured and chosen."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from istanas.data import Batch
from istanas.nets import ArchitectureNetwork, Supernet
from istanas.search.base import Search
from istanas.search.random_nas import RandomNasSearch, RandomNasSettings
from istanas.search.random_search import RandomSearch, RandomSettings
from istanas.space import CellSpace, NetworkSize
from istanas.training import BatchLike, Compute, Metrics, Totals, derive_seed

CPU = Compute(torch.device("cpu"))
SPACE = CellSpace(n_nodes=2)
TINY = RandomNasSettings(epochs=1, candidates=6, candidate_pictures=4, finalists=2)


def make_search(settings: RandomNasSettings = TINY) -> RandomNasSearch:
    torch.manual_seed(0)
    net = Supernet(SPACE, 2, 3, 5, in_channels=1, alpha_size=lambda d: 0)
    return RandomNasSearch(net, settings, CPU, seed=0)


def batch(seed: int, n: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 5)


class Half:
    """Some pictures for choosing, which counts how they are used."""

    def __init__(self, search: Search[Any]) -> None:
        self.search, self.asked, self.trained = search, list[int | None](), 0

    def __call__(self) -> Metrics:
        return self.search.validate(self.pictures())

    def pictures(self, count: int | None = None) -> Iterable[BatchLike]:
        self.asked.append(count)
        return [batch(50, 8 if count is None else count), batch(51)][: 2 if count is None else 1]

    def training(self) -> Iterable[BatchLike]:
        self.trained += 1
        return [batch(i) for i in range(4)]


def train(search: RandomNasSearch) -> Half:
    search.train_epoch([batch(i) for i in range(3)], lambda: [batch(9)], n_steps=3)
    return Half(search)


def test_architectures_are_uniform_over_the_space() -> None:
    """Each candidate of a node is kept equally often, and two draws of a step differ by their number alone."""
    counts = np.zeros(SPACE.n_candidates(1))
    for seed in range(3000):
        counts[list(SPACE.random_supports(seed)["normal"][1])] += 1
    expected = 3000 * SPACE.sparsity / len(counts)
    assert abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_every_step_trains_the_architecture_that_its_number_draws() -> None:
    search, seen = make_search(), []
    search.supernet.register_forward_pre_hook(lambda *_: seen.append(search.supernet.genotype()))
    search.train_epoch([batch(i) for i in range(3)], lambda: [batch(9)], n_steps=3)
    drawn = [SPACE.random(derive_seed(0, "random_nas", "weights", 0, step)) for step in range(3)]
    assert seen == drawn
    assert len(set(drawn)) == 3


def test_no_alpha_batch_is_read() -> None:
    def refuse() -> Iterable[BatchLike]:
        raise AssertionError("an alpha batch was read")

    search = make_search()
    assert search.train_epoch([batch(0)], refuse, n_steps=1).count == 8
    assert search.alphas
    assert all(b.numel() == 0 for b in search.alphas)


@pytest.mark.parametrize("statistics", ["batch", "recalibrated", "running"])
def test_the_best_of_the_finalists_of_all_candidates_is_chosen(statistics: Any) -> None:
    search = make_search(dataclasses.replace(TINY, statistics=statistics, calibration_batches=3))
    half = train(search)
    measured = search.validate_epoch(half)
    chosen = search.genotype()
    # Literally: rank all candidates on few pictures, then the best two on all.
    candidates = [SPACE.random_supports(derive_seed(0, "random_nas", "candidate", i)) for i in range(6)]

    def score(number: int, count: int | None) -> tuple[float, float, int]:
        search.install_unweighted(candidates[number])
        found = search._measured(half, count)
        return -found.top1, found.loss, number

    finalists = sorted(range(6), key=lambda i: score(i, 4))[:2]
    best = min(finalists, key=lambda i: score(i, None))
    assert chosen == SPACE.genotype(candidates[best])
    assert measured == search.validate_epoch(half)
    assert half.asked[:9] == [4] * 6 + [None] * 3
    assert (half.trained > 0) == (statistics == "recalibrated")


def test_earlier_epochs_show_one_random_architecture_each() -> None:
    search = make_search(dataclasses.replace(TINY, epochs=3))
    shown = []
    for _ in range(2):
        half = train(search)
        search.validate_epoch(half)
        report = search.finish_epoch()
        shown.append(search.genotype())
        assert half.asked == [None]
        assert [node.changed for node in report.nodes] != [False] * 4
    assert shown == [SPACE.random(derive_seed(0, "random_nas", "shown", epoch)) for epoch in (1, 2)]


def test_recalibration_takes_the_mean_of_the_batch_statistics() -> None:
    search = make_search()
    train(search)
    norm = search.supernet.stem.stem[1]
    inputs: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    momentum = norm.momentum
    search.recalibrate([batch(i) for i in range(4)])
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0))
    assert norm.momentum == momentum


def test_batch_statistics_change_no_running_statistics() -> None:
    search = make_search()
    train(search)
    before = {name: value.clone() for name, value in search.supernet.state_dict().items()}
    with_batch = search.validate([batch(1)], batch_statistics=True)
    assert with_batch.loss != search.validate([batch(1)]).loss
    assert all(torch.equal(value, before[name]) for name, value in search.supernet.state_dict().items())
    assert not any(m.training for m in search.supernet.modules() if isinstance(m, nn.BatchNorm2d))
    search.supernet.train()
    with torch.no_grad():
        logits = search.supernet(batch(1).images)
    torch.testing.assert_close(with_batch.loss, float(nn.functional.cross_entropy(logits, batch(1).labels)))


def test_active_parameters_are_those_with_a_gradient_in_each_step() -> None:
    search = make_search()
    search.supernet.train()
    for step in range(4):
        search.begin_step(step, 4)
        search.weight_step(batch(step), Totals(CPU.device))
        active = {id(p) for p in search.supernet.active_parameters()}
        assert active == {id(p) for p in search.weights if p.grad is not None}


def test_a_random_architecture_is_that_of_its_seed_and_costs_nothing() -> None:
    for seed in (0, 5):
        net = ArchitectureNetwork(SPACE, NetworkSize(16, 8, 10))
        search = RandomSearch(net, RandomSettings(), CPU, seed)
        assert list(net.parameters()) == []
        assert search.train_epoch([], None, 0) is None
        assert [node.picks for node in search.finish_epoch().nodes if node.cell == "normal"] == [
            [f"{op}<-{state}" for op, state in picks] for picks in SPACE.random(seed).normal
        ]
        assert search.genotype() == SPACE.random(seed)
        again = RandomSearch(net, RandomSettings(), CPU, seed)
        again.load_state_dict(search.state_dict())
        assert again.is_done
