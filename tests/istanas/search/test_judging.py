"""Measurement of any architecture with shared weights: which statistics count, and that nothing changes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from istanas.data import Batch
from istanas.nets import Supernet
from istanas.search.base import Search
from istanas.search.darts import DartsSearch, DartsSettings
from istanas.search.judging import measure_with_shared_weights
from istanas.search.two_stage import TwoStageSearch
from istanas.settings import TwoStageSettings
from istanas.space import CellSpace
from istanas.training import BatchLike, Compute, Metrics

CPU = Compute(torch.device("cpu"))
SPACE = CellSpace(n_nodes=2)


def make_search(kind: str) -> Search[Any]:
    torch.manual_seed(0)
    search: type[Search[Any]] = {"two_stage": TwoStageSearch, "darts": DartsSearch}[kind]
    settings: Any = {"two_stage": TwoStageSettings(epochs=1), "darts": DartsSettings(epochs=1)}[kind]
    size = lambda decision: search.alpha_size(settings, decision)  # noqa: E731
    net = Supernet(SPACE, 2, 3, 5, in_channels=1, alpha_size=size)
    built = search(net, settings, CPU, seed=0)
    built.train_epoch([batch(i) for i in range(3)], lambda: [batch(9)] * 3, n_steps=3)
    return built


def batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(8, 1, 8, 8, generator=generator) + seed % 3, torch.arange(8) % 5)


class Pictures:
    """Pictures for choosing."""

    def __init__(self, search: Search[Any]) -> None:
        self.search = search

    def __call__(self) -> Metrics:
        return self.search.validate(self.pictures())

    def pictures(self, count: int | None = None) -> Iterable[BatchLike]:
        return [batch(50), batch(51)]

    def training(self) -> Iterable[BatchLike]:
        return [batch(i) for i in range(4)]


@pytest.mark.parametrize("kind", ["two_stage", "darts"])
def test_each_kind_of_statistics_gives_its_own_loss_and_changes_nothing(kind: str) -> None:
    search = make_search(kind)
    before = {name: value.clone() for name, value in search.supernet.state_dict().items()}
    first, second = (SPACE.random_supports(seed) for seed in (1, 2))
    measured = dict(measure_with_shared_weights(search, first, Pictures(search), calibration_batches=3))
    assert list(measured) == ["running", "batch", "recalibrated"]
    assert len({each.loss for each in measured.values()}) == 3
    other = dict(measure_with_shared_weights(search, second, Pictures(search), calibration_batches=3))
    assert other["running"].loss != measured["running"].loss
    after = search.supernet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (
        dict(measure_with_shared_weights(search, first, Pictures(search), calibration_batches=3)) == measured
    )


def test_alphas_have_no_influence() -> None:
    search = make_search("two_stage")
    supports = SPACE.random_supports(3)
    measured = dict(measure_with_shared_weights(search, supports, Pictures(search), calibration_batches=2))
    with torch.no_grad():
        for alpha in search.supernet.alphas():
            alpha.add_(torch.randn_like(alpha))
    assert (
        dict(measure_with_shared_weights(search, supports, Pictures(search), calibration_batches=2))
        == measured
    )
