"""Counts on a network equal those of the formula for any genotype, size and stem; latency."""

import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from istanas.measure import Cost, count_macs, count_params, measure_latency, target_cost
from istanas.nets import Supernet, TargetNet
from istanas.nets.depthwise import DepthwiseConv2d
from istanas.space import PUBLISHED, CellSpace, Genotype, random_genotype


def counted(genotype: Genotype, shape: tuple[int, int, int], **options: Any) -> tuple[Cost, Cost]:
    """Return (cost counted on the network with its auxiliary head, cost by the formula)."""
    net = TargetNet(genotype, auxiliary=True, in_channels=shape[0], **options)
    return Cost(count_params(net), count_macs(net, shape)), target_cost(genotype, shape=shape, **options)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    space=st.builds(CellSpace, n_nodes=st.integers(1, 4), sparsity=st.integers(1, 3)),
    shape=st.tuples(st.integers(1, 3), st.integers(8, 41), st.integers(8, 41)),
    init_channels=st.integers(2, 5),
    layers=st.integers(1, 6),
    stem=st.sampled_from(["cifar", "imagenet"]),
    op_batchnorm=st.booleans(),
)
def test_formula_equals_the_built_network(
    seed: int, space: CellSpace, shape: tuple[int, int, int], init_channels: int, **options: Any
) -> None:
    genotype = random_genotype(seed, space)
    built, formula = counted(genotype, shape, init_channels=init_channels, num_classes=7, **options)
    assert formula == built


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 33, 40), (3, 64, 64)])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("op_batchnorm", [False, True])
def test_formula_on_published_cells(
    name: str, shape: tuple[int, int, int], stem: str, op_batchnorm: bool
) -> None:
    built, formula = counted(
        PUBLISHED[name],
        shape,
        init_channels=4,
        layers=5,
        num_classes=10,
        stem=stem,
        op_batchnorm=op_batchnorm,
    )
    assert formula == built


def test_formula_with_part_of_the_states_concatenated() -> None:
    picks = PUBLISHED["ISTA_twostage"].normal
    built, formula = counted(
        Genotype(picks, picks, (2, 5), (4,)), (3, 16, 16), init_channels=4, layers=4, num_classes=3
    )
    assert formula == built


def test_macs_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, stride=2),  # 4 maps of 4x5 pixels, 27 weights each.
        DepthwiseConv2d(4, 5, 1, 2),  # 25 weights a pixel.
        nn.BatchNorm2d(4),  # Not counted.
        nn.Flatten(),
        nn.Linear(80, 10),
    )
    assert count_macs(net, (3, 8, 9)) == 4 * 20 * 27 + 4 * 20 * 25 + 800
    assert count_params(net) == (4 * 27 + 4) + 4 * 25 + 8 + (800 + 10)


def test_macs_of_other_layers_and_of_functions_by_hand() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
            self.row = nn.Conv1d(6, 2, 5, padding=2)
            self.mix = nn.Parameter(torch.zeros(3, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.up(x)  # each of 4 x 30 inputs meets 3 kernels of 3x3
            x = self.row(x.flatten(2))  # 2 maps of 11x13 pixels, 6 x 5 weights each
            x = self.mix @ x  # 3 maps, 2 weights a pixel
            return nn.functional.conv1d(input=x, weight=torch.zeros(1, 3, 1))  # 3 weights a pixel

    expected = 4 * 30 * 3 * 9 + 2 * 143 * 30 + 3 * 143 * 2 + 143 * 3
    assert count_macs(Mixed(), (4, 5, 6)) == expected


def test_counting_leaves_the_network_as_it_was() -> None:
    net = TargetNet(PUBLISHED["ISTA_twostage"], 2, 3, 10, auxiliary=True).double().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    count_macs(net, (3, 16, 16))
    assert net.training
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(RuntimeError):
        count_macs(net, (1, 16, 16))  # A picture with the wrong number of channels.
    assert net.training
    assert not any(module._forward_hooks for module in net.modules())


def test_params_of_a_supernet_include_inactive_operations_and_alphas() -> None:
    net = Supernet(CellSpace(), 2, 3, 10)
    assert count_params(net) == sum(p.numel() for p in net.parameters())


def test_latency_is_the_time_of_a_pass_and_leaves_the_network_as_it_was() -> None:
    class Sleeper(nn.Module):
        """Takes a known time, and records its inputs."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
            self.norm = nn.BatchNorm2d(3, dtype=torch.float64)
            self.seen: list[tuple[tuple[int, ...], torch.dtype, bool]] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append((tuple(x.shape), x.dtype, self.training))
            time.sleep(0.02)
            return self.norm(x)

    net = Sleeper().train()
    seconds = measure_latency(net, (3, 4, 5), batch_size=2, repeats=3, warm_up=1)
    assert 0.02 <= seconds < 2
    assert net.seen == [((2, 3, 4, 5), torch.float64, False)] * 4
    assert net.training
    assert net.norm.num_batches_tracked == 0
