"""PC-DARTS against a literal implementation of its partial channels and edge weights; its warm-up."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from istanas.data import Batch
from istanas.errors import ConfigError
from istanas.nets import Supernet, to_channels_last
from istanas.nets.partial import shuffle
from istanas.search.pc_darts import PcDartsSearch
from istanas.settings import PcDartsSettings
from istanas.space import CellSpace, ChoiceSpace, Decision, NetworkSize
from istanas.training import Compute

CPU = Compute(torch.device("cpu"))
SPACE = CellSpace(n_nodes=3)


def alpha_size(decision: Decision) -> int:
    return PcDartsSearch.alpha_size(PcDartsSettings(), decision)


def make_search(net: Any = None, **settings: Any) -> PcDartsSearch:
    torch.manual_seed(0)
    net = net or Supernet(SPACE, 4, 3, 5, in_channels=1, alpha_size=alpha_size, partial=4)
    return PcDartsSearch(
        net.double(), PcDartsSettings(**{"epochs": 3, "warmup_epochs": 1, **settings}), CPU, 0
    )


def spread_alphas(search: PcDartsSearch) -> None:
    """Give the alphas values that differ clearly."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for alphas in search.alphas:
            alphas.copy_(torch.randn(len(alphas), generator=generator, dtype=torch.float64))


def batch(seed: int, side: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 1, side, side, generator=generator, dtype=torch.float64)
    return Batch(images, torch.randint(5, (4,), generator=generator))


def literal_shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


def literal_mixed(x: Tensor, weights: Tensor, ops: Any, k: int) -> Tensor:
    """Return the output of the published `MixedOp`."""
    width = x.shape[1] // k
    part, rest = x[:, :width], x[:, width:]
    mixed = sum(w * op(part) for w, op in zip(weights, ops, strict=True))
    if mixed.shape[2] != x.shape[2]:
        rest = nn.MaxPool2d(2, 2)(rest)
    return literal_shuffle(torch.cat([mixed, rest], dim=1), k)


def literal_logits(net: Supernet, x: Tensor) -> Tensor:
    """Return the logits of the published search network: the mixed operation of every edge, times its weight."""
    n_ops = net.space.n_ops
    s0 = s1 = net.stem.stem(x)
    for cell in net.cells:
        states = [cell.preprocess0(s0), cell.preprocess1(s1)]
        first = 0
        for parameters in net.node_alphas(cell.kind):
            n_edges = len(states)
            alphas = parameters[: n_edges * n_ops].view(n_edges, n_ops).softmax(-1)
            betas = parameters[n_edges * n_ops :].softmax(-1)
            assert len(betas) == n_edges
            node = sum(
                betas[j] * literal_mixed(states[j], alphas[j], cell.ops[first + j], 4) for j in range(n_edges)
            )
            first += n_edges
            states.append(node)
        s0, s1 = s1, torch.cat(states[2:], 1)
    return net.classifier(s1.mean((2, 3)))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", [lambda net: net, to_channels_last])
def test_the_network_has_partial_channels_and_edge_weights(
    layout: Callable[[nn.Module], nn.Module], checkpointing: bool
) -> None:
    search = make_search()
    spread_alphas(search)
    net = layout(search.supernet)
    net.activation_checkpointing = checkpointing
    x, labels, _ = batch(0)
    ours, literal = net(x), literal_logits(net, x)
    torch.testing.assert_close(ours, literal, rtol=1e-10, atol=1e-12)
    parameters = list(net.parameters())
    gradients = [torch.autograd.grad(F.cross_entropy(y, labels), parameters) for y in (ours, literal)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-12)


def test_pictures_of_odd_size_are_rounded_up() -> None:
    search = make_search()
    assert search.supernet(batch(0, side=9).images).shape == (4, 5)


def test_shuffle_is_the_published_one() -> None:
    x = torch.randn(2, 12, 3, 5)
    for k in (1, 2, 3, 4, 12):
        assert torch.equal(shuffle(x, k), literal_shuffle(x, k))
        channels_last = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(shuffle(channels_last, k), literal_shuffle(x, k))
        assert shuffle(channels_last, k).is_contiguous(memory_format=torch.channels_last)


def test_edges_are_chosen_by_the_product_of_both_weights() -> None:
    """An operation that is certain on an edge of little weight loses against others."""
    search = make_search()
    n_ops, node = SPACE.n_ops, 1  # three edges
    with torch.no_grad():
        parameters = search.supernet.node_alphas("normal")[node]
        parameters.zero_()
        parameters[2 * n_ops + 3] = 5.0  # operation 3 on edge 2, the strongest by its alpha
        parameters[0 * n_ops + 1] = parameters[1 * n_ops + 2] = 1.0
        parameters[3 * n_ops :] = torch.tensor([0.0, 0.0, -5.0])
    report = next(n for n in search.finish_epoch().nodes if (n.cell, n.node) == ("normal", node))
    assert report.picks == [f"{SPACE.ops[1]}<-0", f"{SPACE.ops[2]}<-1"]
    alphas = parameters[: 3 * n_ops].view(3, n_ops).softmax(-1)
    product = (alphas * parameters[3 * n_ops :].softmax(-1)[:, None]).flatten()
    assert report.magnitudes == pytest.approx(product.tolist(), rel=1e-12)


def test_alphas_start_after_the_warm_up() -> None:
    search = make_search(warmup_epochs=2)
    values, drawn = [torch.cat([a.detach() for a in search.alphas])], []

    def alpha_batches() -> list[Batch]:
        drawn.append(search.epoch)
        return [batch(7)]

    for _ in range(3):
        search.train_epoch([batch(0), batch(1)], alpha_batches, n_steps=2)
        values.append(torch.cat([a.detach().clone() for a in search.alphas]))
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[1], values[2])
    assert not torch.equal(values[2], values[3])
    assert set(drawn) == {2}, "no picture of the alpha half is read in the warm-up"


def test_channels_that_k_does_not_divide_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"6 channels.*4 equal parts; choose a multiple of 4"):
        Supernet(SPACE, 6, 3, 5, partial=4)


@dataclass(frozen=True)
class Blocks(ChoiceSpace):
    """One choice, by registered operations or by its own builder."""

    name: ClassVar[str] = "blocks"
    has_partial_channels: ClassVar[bool] = True

    own: bool = False
    stride: int = 2

    def make_decisions(self) -> list[Decision]:
        return [Decision("block", 0, (("avg_pool_3x3", 0), ("skip_connect", 0), ("sep_conv_3x3", 0)), 1)]

    def network(self, size: NetworkSize, choose: Any) -> nn.Module:
        c = size.init_channels
        if self.own:
            return choose("block", 0, c, lambda operation, affine: nn.Conv2d(c, c, 1))
        return nn.Sequential(
            choose.operation("block", 0, c, self.stride), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )


@pytest.mark.parametrize("stride", [1, 2])
def test_a_choice_has_partial_channels_too(stride: int) -> None:
    net = Blocks(stride=stride).supernet(NetworkSize(8, 3, 8), alpha_size, partial=4).double()
    search = make_search(net)
    spread_alphas(search)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    weights = net.node_alphas("block")[0][:3].softmax(-1)
    (choice,) = net.places["block", 0]
    expected = literal_mixed(x, weights, choice.operations(), 4).mean((2, 3))
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-12)


def test_a_choice_with_its_own_builder_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"block 0 of the space blocks builds its own candidates"):
        Blocks(own=True).supernet(NetworkSize(8, 3, 8), alpha_size, partial=4)
