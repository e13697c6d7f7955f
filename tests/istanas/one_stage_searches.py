"""Small one-stage searches, their pictures and their steps, for the tests of one-stage search."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from istanas.data import Batch
from istanas.measure import Cost
from istanas.nets import NodeState, Supernet
from istanas.search import OneStageSearch, OneStageSettings, RecoveryReport
from istanas.search.sparse_coding import Place
from istanas.space import CellSpace, Genotype
from istanas.training import Compute, Totals

CPU = Compute(torch.device("cpu"))

ACTIVE, FROZEN = NodeState.ACTIVE, NodeState.FROZEN


# The alphas move fast, so that the architecture changes within an epoch of a few steps, and no node freezes by itself.
FAST = OneStageSettings(
    max_search_epochs=3, train_epochs=3, arch_lr=0.02, alphas_scale=0.1, termination_tol=0.0, max_params=10
)

SMALL = CellSpace(n_nodes=2)

FIRST, SECOND = ("normal", 0), ("reduce", 1)


class Size:
    """A cost function whose result a test sets, and which records its arguments."""

    def __init__(self, *costs: Cost) -> None:
        self.now = Cost(10, 10)  # The limit of FAST.
        self.first = list(costs)  # The results of the first calls.
        self.asked: list[Genotype] = []

    def __call__(self, genotype: Genotype) -> Cost:
        self.asked.append(genotype)
        return self.first.pop(0) if self.first else self.now


TOO_MANY = Cost(11, 10)


def make_search(
    settings: OneStageSettings = FAST,
    *,
    size: Callable[[Genotype], Cost] | None = None,
    space: CellSpace = SMALL,
    seed: int = 0,
    weights_seed: int = 0,
    dtype: torch.dtype = torch.float32,
    auxiliary: bool = False,
) -> OneStageSearch:
    torch.manual_seed(weights_seed)
    net = Supernet(space, 2, 3, 5, in_channels=1, op_batchnorm=True, auxiliary=auxiliary).to(dtype)
    return OneStageSearch(net, settings, CPU, seed, cost=size or Size())


def change(**values: Any) -> OneStageSettings:
    return dataclasses.replace(FAST, **values)


def batch(seed: int, n: int = 4, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return Batch(images, torch.randint(5, (n,), generator=generator))


def epoch_without_batches(search: OneStageSearch) -> RecoveryReport:
    search.train_epoch([], None, 0)
    return search.recover()


def b_of(search: OneStageSearch, place: Place) -> nn.Parameter:
    return search.supernet.node_alphas(place[0])[place[1]]


def move(search: OneStageSearch, places: list[Place], scale: float = 1.0) -> None:
    """Move the b, and thereby the codes, of these nodes, in another direction in every epoch."""
    generator = torch.Generator().manual_seed(search.epoch)
    with torch.no_grad():
        for place in places:
            b = b_of(search, place)
            b += scale * torch.randn(b.shape, generator=generator, dtype=b.dtype)


def freeze(search: OneStageSearch, places: list[Place]) -> RecoveryReport:
    """Move the codes of all nodes except these."""
    tolerance = dataclasses.replace(search.settings, termination_tol=1e-6)
    search.settings, before = tolerance, search.settings
    move(search, [place for place in search.active_places() if place not in places])
    report = epoch_without_batches(search)
    search.settings = before
    assert [n.state for n in report.nodes if (n.cell, n.node) in places] == ["FROZEN"] * len(places)
    return report


def totals() -> Totals:
    return Totals(torch.device("cpu"))
