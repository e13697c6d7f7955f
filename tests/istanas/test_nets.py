"""Networks: operations compared with torch, picture sizes, strict loading, drop path, no cost of inactive parts."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from istanas.errors import CheckpointError, ConfigError
from istanas.nets import NodeCode, Supernet, TargetNet, to_channels_last
from istanas.nets.depthwise import depthwise_conv2d
from istanas.nets.operations import FactorizedReduce, SepConv, make_operation
from istanas.nets.skeleton import AuxiliaryHead, auxiliary_position, cell_places, live_places, live_states
from istanas.nets.target import drop_path
from istanas.search.sparse_coding import draw_matrices
from istanas.space import CELLS, PRIMITIVES, PUBLISHED, CellSpace, Genotype, Picks
from istanas.sparse import top_support

TWO_STAGE = PUBLISHED["ISTA_twostage"]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def supernet(
    supports: dict[str, list[tuple[int, ...]]] | None = None,
    *,
    space: CellSpace | None = None,
    channels: int = 2,
    layers: int = 3,
    seed: int = 0,
    **options: Any,
) -> Supernet:
    """Return a seeded supernet in float64 with random codes, or codes with the given supports."""
    space = space or CellSpace()
    torch.manual_seed(seed)
    net = Supernet(space, channels, layers, 5, **options).double()
    with torch.no_grad():
        for b in net.alphas():
            b.normal_()
    install(net, supports, seed)
    return net


def install(net: Supernet, supports: dict[str, list[tuple[int, ...]]] | None, seed: int = 0) -> None:
    """Install random codes, or codes with the given supports."""
    codes: dict[str, list[NodeCode]] = {}
    for cell, matrices in draw_matrices(net.space, net.alphas()[0].numel(), "uniform", seed).items():
        codes[cell] = []
        for node, A in enumerate(matrices):
            z = rand(A.shape[1], seed=100 * seed + node)
            support = supports[cell][node] if supports else tuple(top_support(z, net.space.sparsity).tolist())
            codes[cell].append(NodeCode(A, z, support))
    net.install_codes(codes)


# --- depthwise convolution ---


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (6, 5), (1, 1), (2, 3)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_depthwise_equals_the_library(
    size: tuple[int, int], kernel: int, stride: int, dilation: int, channels_last: bool
) -> None:
    """Values and both gradients agree in float64, with and without a graph."""
    memory = torch.channels_last if channels_last else torch.contiguous_format
    x = rand(2, 3, *size).contiguous(memory_format=memory)
    weight = rand(3, 1, kernel, kernel, seed=1)
    theirs_in = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    ours_in = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = F.conv2d(*theirs_in, None, stride, dilation * (kernel // 2), dilation, groups=3)
    ours = depthwise_conv2d(*ours_in, stride, dilation)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    direction = rand(*theirs.shape, seed=2)
    (theirs * direction).sum().backward()
    (ours * direction).sum().backward()
    for mine, its in zip(ours_in, theirs_in, strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(
            depthwise_conv2d(x, weight, stride, dilation), theirs, rtol=1e-12, atol=1e-12
        )


def test_depthwise_gradients_by_finite_differences() -> None:
    x, weight = rand(1, 2, 5, 4).requires_grad_(), rand(2, 1, 3, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: depthwise_conv2d(x, w, 1, 2), (x, weight))


# --- candidate operations ---


@pytest.mark.parametrize("name", PRIMITIVES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1)])
@pytest.mark.parametrize("batchnorm", [False, True])
def test_operation_maps_to_the_ceiling(
    name: str, stride: int, size: tuple[int, int], batchnorm: bool
) -> None:
    op = make_operation(name, 4, stride, affine=True, batchnorm=batchnorm, identity_batchnorm=batchnorm)
    out = op.eval()(rand(2, 4, *size, dtype=torch.float32))
    assert out.shape == (2, 4, -(-size[0] // stride), -(-size[1] // stride))


@pytest.mark.parametrize("name", PRIMITIVES)
def test_batch_norms_at_the_end_of_an_operation(name: str) -> None:
    """Pooling and identity have batch norm, and batch norms an affine part, only if requested."""

    def batchnorms(**options: Any) -> list[nn.BatchNorm2d]:
        return [m for m in make_operation(name, 4, 1, **options).modules() if isinstance(m, nn.BatchNorm2d)]

    bare = {"max_pool_3x3": 0, "avg_pool_3x3": 0, "skip_connect": 0, "sep_conv_3x3": 2, "sep_conv_5x5": 2}
    assert len(batchnorms(affine=True)) == bare.get(name, 1)
    assert len(batchnorms(affine=True, batchnorm=True, identity_batchnorm=True)) == max(1, bare.get(name, 1))
    assert all(bn.affine for bn in batchnorms(affine=True))
    assert not any(bn.affine for bn in batchnorms(affine=False))


def test_unknown_operation() -> None:
    with pytest.raises(KeyError):
        make_operation("none", 4, 1, affine=True)


@pytest.mark.parametrize("size", [(8, 8), (7, 8), (8, 7), (7, 9), (1, 1)])
@pytest.mark.parametrize("channels", [4, 5])
def test_factorized_reduce_is_two_strided_convolutions(size: tuple[int, int], channels: int) -> None:
    """It is conv_1(relu x), conv_2(relu x shifted by one pixel) of a picture padded to an even size."""
    reduce = FactorizedReduce(3, channels, affine=True).double().eval()
    x = rand(2, 3, *size)
    padded = F.relu(F.pad(x, (0, size[1] % 2, 0, size[0] % 2)))
    halves = [
        F.conv2d(padded, reduce.conv_1.weight, stride=2),
        F.conv2d(padded[:, :, 1:, 1:], reduce.conv_2.weight, stride=2),
    ]
    torch.testing.assert_close(reduce(x), reduce.bn(torch.cat(halves, 1)), rtol=1e-12, atol=1e-12)


# --- sequence of cells ---


def test_reductions_at_a_third_and_two_thirds() -> None:
    places = cell_places(16, 20, "cifar", {"normal": 4, "reduce": 4})
    assert [i for i, p in enumerate(places) if p.kind == "reduce"] == [6, 13]
    assert {p.channels for p in places[:6]} == {16}
    assert {p.channels for p in places[6:13]} == {32}
    assert {p.channels for p in places[13:]} == {64}
    assert [i for i, p in enumerate(places) if p.reduction_prev] == [7, 14]
    assert cell_places(16, 14, "imagenet", {"normal": 4, "reduce": 4})[0].reduction_prev


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
def test_any_depth(layers: int) -> None:
    net = TargetNet(TWO_STAGE, 2, layers, 10, auxiliary=True)
    logits, auxiliary = net.forward_with_auxiliary(torch.randn(2, 3, 16, 16))
    assert auxiliary is not None
    assert logits.shape == auxiliary.shape == (2, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_channels": 0}, "init_channels: 0 is too small"),
        ({"layers": 0}, "layers: 0 is too small"),
        ({"num_classes": 0}, "num_classes: 0 is too small"),
        ({"in_channels": 0}, "in_channels: 0 is too small"),
        ({"stem": "mnist"}, "stem: unknown stem 'mnist'; choose cifar or imagenet"),
        ({"stem": "imagenet", "init_channels": 1}, "init_channels: 1 is too small for the imagenet stem"),
    ],
)
def test_networks_refuse(change: dict[str, Any], message: str) -> None:
    settings = {"init_channels": 2, "layers": 3, "num_classes": 10} | change
    for build, what in ((TargetNet, TWO_STAGE), (Supernet, CellSpace())):
        with pytest.raises(ConfigError, match=message):
            build(what, **settings)  # type: ignore[operator]


def test_supernet_refuses_measurements_codes_and_forward_out_of_place() -> None:
    with pytest.raises(ConfigError, match="n_measurements: 0 is too small"):
        Supernet(CellSpace(), 2, 2, 10, n_measurements=0)
    net = Supernet(CellSpace(), 2, 2, 10)
    with pytest.raises(ConfigError, match="install_codes"):
        net(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ConfigError, match="codes: 0 codes for the 4 nodes of the normal cell"):
        net.install_codes({"normal": [], "reduce": []})


# --- pictures ---

PICTURES = [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 32, 32), (3, 33, 40), (2, 9, 64)]


@pytest.mark.parametrize("shape", PICTURES)
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("training", [True, False])
def test_pictures_of_any_size_from_8x8(shape: tuple[int, int, int], stem: str, training: bool) -> None:
    """Both networks run, and in training every parameter gets a finite gradient."""
    target = TargetNet(TWO_STAGE, 4, 3, 10, stem=stem, auxiliary=True, in_channels=shape[0]).train(training)
    search = supernet(stem=stem, in_channels=shape[0]).float().train(training)
    x = rand(3, *shape, dtype=torch.float32)
    assert search(x).shape == (3, 5)
    logits, auxiliary = target.forward_with_auxiliary(x)
    assert logits.shape == (3, 10)
    assert (auxiliary is not None) == training
    if auxiliary is not None:
        assert auxiliary.shape == (3, 10)
        (logits.logsumexp(1).sum() + auxiliary.logsumexp(1).sum()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in target.parameters())


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (1, 1)])
def test_smaller_pictures_are_refused(size: tuple[int, int]) -> None:
    x = torch.zeros(2, 3, *size)
    for net in (TargetNet(TWO_STAGE, 2, 2, 10), supernet().float()):
        with pytest.raises(ConfigError, match=f"pictures of {size[0]}x{size[1]} .*8x8; .*data.image_size"):
            net(x)


@pytest.mark.parametrize("size", [64, 224])
def test_imagenet_stem_and_head(size: int) -> None:
    net = TargetNet(PUBLISHED["ISTA_ImageNet"], 8, 3, 1000, stem="imagenet", auxiliary=True)
    s0, s1 = net.stem(torch.randn(2, 3, size, size))
    assert s0.shape == (2, 8, size // 4, size // 4)
    assert s1.shape == (2, 8, size // 8, size // 8)
    logits, auxiliary = net.forward_with_auxiliary(torch.randn(2, 3, size, size))
    assert auxiliary is not None
    assert logits.shape == auxiliary.shape == (2, 1000)
    # The published CIFAR head has batch norm after its last convolution, the ImageNet head has none.
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.auxiliary_head.modules()) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(("stem", "size", "n_batchnorms"), [("cifar", 8, 2), ("imagenet", 7, 1)])
def test_auxiliary_head_at_its_published_size(stem: str, size: int, n_batchnorms: int) -> None:
    """Pooling gives 2x2 and the 2x2 convolution 1x1, as in the published sequence."""
    head = AuxiliaryHead(stem, 6, 10).double().eval()
    x = rand(2, 6, size, size)
    assert head.features[:2](x).shape == (2, 6, 2, 2)
    features = head.features(x)
    assert features.shape == (2, 768, 1, 1)
    torch.testing.assert_close(head(x), head.classifier(features.flatten(1)))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in head.modules()) == n_batchnorms


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_auxiliary_head_trains_on_a_last_batch_of_one_picture(stem: str) -> None:
    head = AuxiliaryHead(stem, 6, 10).train()
    head(torch.randn(1, 6, 8, 8)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_auxiliary_head_stands_at_two_thirds_and_only_in_training() -> None:
    assert auxiliary_position(20) == 13  # The second reduction.
    net = TargetNet(TWO_STAGE, 2, 3, 10, auxiliary=True)
    widths: list[int] = []
    assert net.auxiliary_head is not None
    net.auxiliary_head.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    net(torch.randn(2, 3, 16, 16))
    assert widths == [4 * 8]
    assert net.eval().forward_with_auxiliary(torch.randn(2, 3, 16, 16))[1] is None
    assert len(widths) == 1
    assert TargetNet(TWO_STAGE, 2, 3, 10).forward_with_auxiliary(torch.randn(2, 3, 16, 16))[1] is None


def test_auxiliary_head_takes_the_width_of_its_own_cell() -> None:
    """Cells may concatenate different numbers of states, so that the head's input need not be as wide as the last."""
    genotype = Genotype(TWO_STAGE.normal, TWO_STAGE.reduce, (2, 3, 4, 5), (4, 5))
    net = TargetNet(genotype, 2, 4, 10, auxiliary=True)
    assert net.forward_with_auxiliary(torch.randn(2, 3, 16, 16))[1] is not None


@pytest.mark.parametrize("n_picks", [1, 3])
def test_target_net_with_any_number_of_inputs_and_part_of_the_states(n_picks: int) -> None:
    """A node is the sum of its picks, and a cell the concatenation of the named states."""
    picks: Picks = ((("skip_connect", 1),) * n_picks, (("skip_connect", 2),))
    genotype = Genotype(picks, picks, normal_concat=(3, 0), reduce_concat=(3,))
    net = TargetNet(genotype, 2, 3, 10).double().eval()
    cell = net.cells[0]
    s0, s1 = rand(2, 6, 8, 8), rand(2, 6, 8, 8, seed=1)
    first, second = cell.preprocess0(s0), cell.preprocess1(s1)
    torch.testing.assert_close(cell(F.relu(s0), F.relu(s1), 0.0), torch.cat([n_picks * second, first], 1))
    assert net(rand(2, 3, 16, 16)).shape == (2, 10)


def test_channels_last_changes_the_memory_and_no_value() -> None:
    net = TargetNet(TWO_STAGE, 4, 3, 10).double().eval()
    x = rand(2, 3, 16, 16)
    before = net(x)
    to_channels_last(net)
    assert net.cells[0].preprocess0.op[1].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)


# --- weights in the published layout ---


def published_layout(net: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with the published names, without `num_batches_tracked`."""
    state = {}
    for key, value in net.state_dict().items():
        key = key.removeprefix("stem.").replace(".ops.", "._ops.")
        if not key.endswith("num_batches_tracked"):
            state[key] = value.clone()
    return state


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_published_layout_loads(stem: str) -> None:
    torch.manual_seed(0)
    source = TargetNet(TWO_STAGE, 4, 3, 10, stem=stem, auxiliary=True)
    source(torch.randn(2, 3, 32, 32))  # Changes the running statistics.
    net = TargetNet(TWO_STAGE, 4, 3, 10, stem=stem, auxiliary=True)
    state = published_layout(source)
    assert not any("num_batches_tracked" in key for key in state)
    net.load_darts_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(net.eval()(x), source.eval()(x))
    with_counters = state | {
        "stem.1.num_batches_tracked" if stem == "cifar" else "stem0.1.num_batches_tracked": torch.tensor(7)
    }
    net.load_darts_state_dict(with_counters)  # They are optional.
    assert (
        net.state_dict()[
            "stem.stem.1.num_batches_tracked" if stem == "cifar" else "stem.stem0.1.num_batches_tracked"
        ]
        == 7
    )


def test_loading_is_strict_and_all_or_nothing() -> None:
    net = TargetNet(TWO_STAGE, 4, 2, 10)
    state = published_layout(TargetNet(TWO_STAGE, 4, 2, 10))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    wrong = {
        r"classifier.bias is missing \(1 such": {k: v for k, v in state.items() if k != "classifier.bias"},
        r"cells.9.x is unexpected \(1 such": state | {"cells.9.x": torch.zeros(1)},
        r"classifier.weight is of another shape \(1 such": state | {"classifier.weight": torch.zeros(10, 7)},
        "stem.stem.0.weight is missing": {},
    }
    for message, bad in wrong.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            net.load_darts_state_dict(bad)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# --- drop path ---


def test_drop_path_statistics() -> None:
    """Whole pictures are zeroed with the given probability, and the others are scaled, so that the mean stays."""
    torch.manual_seed(0)
    out = drop_path(torch.ones(20_000, 2, 1, 2), nn.ReLU(), 0.2)
    per_picture = out.flatten(1)
    assert torch.equal(per_picture.min(1).values, per_picture.max(1).values)
    assert sorted(set(per_picture[:, 0].tolist())) == [0.0, 1.25]
    dropped = (per_picture[:, 0] == 0).float().mean().item()
    assert abs(dropped - 0.2) < 5 * (0.2 * 0.8 / 20_000) ** 0.5


def test_drop_path_in_training_only_and_never_on_identities() -> None:
    torch.manual_seed(0)
    skips: Picks = ((("skip_connect", 0), ("skip_connect", 1)),)
    pools: Picks = ((("avg_pool_3x3", 0),),)
    net = TargetNet(Genotype(skips, pools), 2, 1, 10).double().eval()  # A single reduction cell.
    x = rand(4, 3, 8, 8)
    expected = net(x)
    net.drop_path_prob = 1.0 - 1e-9
    assert torch.equal(net(x), expected)  # In eval mode.
    # In training mode with almost everything dropped, cells of pools are zero and cells of identities unchanged.
    for picks, remains in ((pools, False), (skips, True)):
        cell = TargetNet(Genotype(picks, pools), 2, 4, 10).double().cells[0]
        s0 = rand(2, 6, 8, 8)
        assert bool(cell(s0, s0, 1.0 - 1e-9).abs().sum() > 0) == remains


# --- op_batchnorm ---


def test_op_batchnorm_ends_every_operation_of_both_networks() -> None:
    for net in (
        TargetNet(PUBLISHED["ISTA_onestage"], 2, 3, 10, op_batchnorm=True),
        supernet(op_batchnorm=True),
    ):
        for cell in net.cells:
            ops = [
                op for entry in cell.ops for op in (entry if isinstance(entry, nn.ModuleList) else [entry])
            ]
            last = [[m for m in op.modules() if not list(m.children())][-1] for op in ops]
            assert all(isinstance(m, nn.BatchNorm2d) and m.affine for m in last)


def test_two_stage_supernet_has_no_affine_parts_in_its_cells() -> None:
    """The edge weight is the scale, so that a trained one would be redundant."""
    bns = [m for m in supernet().cells.modules() if isinstance(m, nn.BatchNorm2d)]
    assert bns
    assert not any(bn.affine for bn in bns)


# --- invariant 3: an inactive operation costs nothing ---


@contextmanager
def counted(net: nn.Module) -> Iterator[dict[str, int]]:
    """Count the forward calls of every module without children, by name."""
    calls: dict[str, int] = {}
    handles = []
    for name, module in net.named_modules():
        if not list(module.children()):
            calls[name] = 0

            def count(*_: Any, name: str = name) -> None:
                calls[name] += 1

            handles.append(module.register_forward_hook(count))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def active_prefixes(net: Supernet, supports: dict[str, list[tuple[int, ...]]]) -> list[str]:
    """Return the names of the active operations, derived from the supports alone."""
    names = []
    for i, cell in enumerate(net.cells):
        for node, support in enumerate(supports[cell.kind]):
            first_edge = sum(range(2, node + 2))
            for candidate in support:
                state, op = divmod(candidate, net.space.n_ops)
                names.append(f"cells.{i}.ops.{first_edge + state}.{op}.")
    return names


SUPPORTS: dict[str, list[tuple[int, ...]]] = {
    "normal": [(2, 10), (3, 19), (0, 27), (26, 33)],
    "reduce": [(1, 11), (6, 18), (12, 13), (20, 34)],
}


def test_forward_runs_exactly_the_active_modules() -> None:
    net = supernet(SUPPORTS)
    active = active_prefixes(net, SUPPORTS)
    assert len(active) == 3 * 8
    with counted(net) as calls:
        net(rand(2, 3, 16, 16))
    # The ReLU at the beginning of a block never runs, because the rectified state is shared.
    ops = {n: c for n, c in calls.items() if ".ops." in n and not n.endswith(".op.0")}
    for name, n_calls in ops.items():
        assert n_calls == any(f"{name}.".startswith(prefix) for prefix in active), name
    fixed = {n for n in calls if n.startswith(("stem.", "cells.", "classifier")) and ".ops." not in n}
    assert {calls[n] for n in fixed if not n.endswith(".op.0")} == {1}


def test_profiler_counts_only_the_active_convolutions() -> None:
    """torch's profiler counts the convolutions and pools that ran, forward and backward."""
    net = supernet(SUPPORTS)
    convolutions = {"sep_conv_3x3": 4, "sep_conv_5x5": 4, "dil_conv_3x3": 2, "dil_conv_5x5": 2}
    expected_convs, expected_pools = 1, 0  # The stem.
    for cell in net.cells:
        expected_convs += 3 if cell.preprocess0.__class__ is FactorizedReduce else 2
        for support in SUPPORTS[cell.kind]:
            for candidate in support:
                state, op = divmod(candidate, 7)
                name = PRIMITIVES[op]
                expected_pools += name.endswith("pool_3x3")
                expected_convs += convolutions.get(name, 0)
                if name == "skip_connect" and cell.kind == "reduce" and state < 2:
                    expected_convs += 2
    x = rand(2, 3, 16, 16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        net(x).sum().backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::convolution"] == expected_convs
    assert counts["aten::convolution_backward"] == expected_convs
    pools = sum(counts.get(key, 0) for key in ("aten::max_pool2d", "aten::avg_pool2d"))
    assert pools == expected_pools


def test_supernet_is_the_weighted_sum_of_its_active_operations() -> None:
    """state_j is the sum over its picks of alpha_e op_e(state_i)."""
    net = supernet(SUPPORTS).eval()
    cell, weights = net.cells[0], net.edge_weights()["normal"]
    s = rand(2, 6, 8, 8)
    states = [cell.preprocess0(s), cell.preprocess1(s)]
    for node, support in enumerate(SUPPORTS["normal"]):
        total = torch.zeros_like(states[0])
        for alpha, candidate in zip(weights[node], support, strict=True):
            state, op = divmod(candidate, 7)
            total = total + alpha * cell.ops[sum(range(2, node + 2)) + state][op](states[state])
        states.append(total)
    ours = cell(F.relu(s), F.relu(s), range(6), net._plans["normal"], weights, 0.0)
    torch.testing.assert_close(ours, torch.cat(states[2:], 1), rtol=1e-12, atol=1e-12)


def test_supernet_genotype_follows_the_codes() -> None:
    g = supernet(SUPPORTS).genotype()
    assert g.normal[0] == (("skip_connect", 0), ("sep_conv_3x3", 1))
    assert g.normal[3] == (("dil_conv_3x3", 3), ("dil_conv_3x3", 4))
    assert g.reduce[2] == (("dil_conv_3x3", 1), ("dil_conv_5x5", 1))  # Two picks on one edge.


def test_gradient_of_compressed_alphas_by_finite_differences() -> None:
    """Compute d loss / d b in float64 in training mode. The code z is a constant, as published."""
    net = supernet(SUPPORTS).train()
    x, target = rand(3, 3, 8, 8), torch.tensor([0, 1, 4])

    def loss() -> Tensor:
        return F.cross_entropy(net(x), target)

    loss().backward()
    step = 1e-6
    for b in net.alphas():
        assert b.grad is not None
        numeric = torch.zeros_like(b)
        with torch.no_grad():
            for i in range(b.numel()):
                original = b.view(-1)[i].item()
                values = []
                for sign in (1, -1):
                    b.view(-1)[i] = original + sign * step
                    values.append(loss().item())
                b.view(-1)[i] = original
                numeric.view(-1)[i] = (values[0] - values[1]) / (2 * step)
        assert float((numeric - b.grad).norm() / b.grad.norm()) < 1e-6


# --- dead parts, on which the output does not depend ---


@pytest.mark.parametrize(
    ("reads", "concat", "live"),
    [
        ([[0, 1]], [2], {0, 1, 2}),
        ([[1, 1], [2, 2]], [2, 3], {1, 2, 3}),  # No operation reads input 0.
        ([[0], [1], [2]], [4], {0, 2, 4}),  # Node 1 is dead, and therefore input 1.
        ([[0], [2], [3]], [2], {0, 2}),  # A chain of dead nodes.
        ([[0], [2], [3]], [4], {0, 2, 3, 4}),
        ([[0]], [2, 1], {0, 1, 2}),  # An input that is concatenated.
        ([[0]], [1], {1}),
    ],
)
def test_live_states_of_a_cell(reads: list[list[int]], concat: list[int], live: set[int]) -> None:
    assert live_states(reads, concat) == live


BOTH, FIRST, SECOND = {0, 1, 2}, {0, 2}, {1, 2}


@pytest.mark.parametrize(
    ("normal", "reduce", "auxiliary", "live"),
    [
        (BOTH, BOTH, None, "11111111"),
        (SECOND, BOTH, None, "01111111"),
        (FIRST, BOTH, None, "01010101"),  # Every other cell, and no reduction.
        (FIRST, FIRST, 4, "11111111"),  # The cells before the head and before the last cell.
        (FIRST, SECOND, 4, "01010111"),
        (SECOND, SECOND, None, "01111111"),
        (SECOND, FIRST, None, "01101011"),
    ],
)
def test_live_places_in_depth(normal: set[int], reduce: set[int], auxiliary: int | None, live: str) -> None:
    """Six cells with reductions at 2 and 4, computed by hand from the last cell backwards."""
    kinds = ["normal", "normal", "reduce", "normal", "reduce", "normal"]
    found = live_places(kinds, {"normal": normal, "reduce": reduce}, auxiliary)
    assert "".join(str(int(place)) for place in found) == live


def test_a_network_of_one_cell() -> None:
    assert live_places(["reduce"], {"reduce": FIRST}) == (True, False, True)
    assert live_places(["reduce"], {"reduce": SECOND}, auxiliary=0) == (False, True, True)


CellForward = Callable[[nn.Module], list[list[tuple[int, nn.Module, Any]]]]


def everything(net: Any, x: Tensor, terms: CellForward) -> tuple[Tensor, Tensor | None]:
    """Compute the network with its dead parts. `terms` has a cell's (state, operation, factor) for each node."""
    if net.stem.kind == "cifar":
        s0 = s1 = net.stem.stem(x)
    else:
        s0 = net.stem.stem0(x)
        s1 = net.stem.stem1(s0)
    auxiliary = None
    for i, cell in enumerate(net.cells):
        states = [cell.preprocess0(s0), cell.preprocess1(s1)]
        for node in terms(cell):
            first, *others = [factor * op(states[state]) for state, op, factor in node]
            states.append(sum(others, start=first))
        concat = getattr(cell, "concat", range(2, len(states)))
        s0, s1 = s1, torch.cat([states[state] for state in concat], 1)
        if net.auxiliary_head is not None and net.training and i == 2 * len(net.cells) // 3:
            auxiliary = net.auxiliary_head(s1)
    return net.classifier(s1.mean((2, 3))), auxiliary


def target_terms(genotype: Genotype) -> CellForward:
    def terms(cell: Any) -> list[list[tuple[int, nn.Module, Any]]]:
        ops = iter(cell.ops)
        return [[(state, next(ops), 1.0) for _, state in node] for node in genotype.picks(cell.kind)]

    return terms


def supernet_terms(net: Supernet, supports: dict[str, list[tuple[int, ...]]]) -> CellForward:
    def terms(cell: Any) -> list[list[tuple[int, nn.Module, Any]]]:
        nodes = []
        for node, (support, alphas) in enumerate(
            zip(supports[cell.kind], net.edge_weights()[cell.kind], strict=True)
        ):
            picks = [divmod(candidate, net.space.n_ops) for candidate in support]
            ops = [cell.ops[sum(range(2, node + 2)) + state][op] for state, op in picks]
            nodes.append([(s, op, a) for (s, _), op, a in zip(picks, ops, alphas, strict=True)])
        return nodes

    return terms


def names_of(net: nn.Module, tensors: list[Any]) -> set[str]:
    """Return the names of parameters or buffers, each of which must occur once and belong to the network."""
    names = {id(t): name for name, t in [*net.named_parameters(), *net.named_buffers()]}
    assert len({id(t) for t in tensors}) == len(tensors)
    return {names[id(t)] for t in tensors}


def with_gradient(net: nn.Module) -> set[str]:
    return {name for name, p in net.named_parameters() if p.grad is not None}


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Compare up to the rounding of an edge weight inside or outside of the batch norm's factor."""
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def check_live_parts(net: Any, terms_of: Callable[[Any], CellForward]) -> None:
    """Values are those of the whole computation, and exactly the active parts get gradients or change."""
    x = rand(3, 3, 8, 8)
    with torch.no_grad():
        for buffer in net.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(
                    0.5, 2.0, generator=torch.Generator().manual_seed(0)
                )  # Any batch changes them.
    whole = copy.deepcopy(net)
    with torch.no_grad():
        expected = everything(whole.eval(), x, terms_of(whole))[0]
        assert_same(net.eval()(x), expected)

    before = {name: value.clone() for name, value in net.named_buffers()}
    is_target = isinstance(net.train(), TargetNet)
    ours = net.forward_with_auxiliary(x) if is_target else (net(x), None)
    theirs = everything(whole.train(), x, terms_of(whole))
    for outputs in (ours, theirs):
        sum(out.logsumexp(1).sum() for out in outputs if out is not None).backward()
    assert_same(ours[0], theirs[0])
    if theirs[1] is not None:
        assert_same(ours[1], theirs[1])
    alphas = [] if is_target else net.active_alphas()
    assert with_gradient(net) == with_gradient(whole) == names_of(net, [*net.active_parameters(), *alphas])

    moved = {name for name, value in net.named_buffers() if not torch.equal(value, before[name])}
    counters = {name for name in moved if name.endswith("num_batches_tracked")}
    assert moved - counters == names_of(net, net.active_buffers())
    assert {name.rpartition(".")[0] for name in counters} == {n.rpartition(".")[0] for n in moved - counters}


def check_target(genotype: Genotype, layers: int, **options: Any) -> TargetNet:
    torch.manual_seed(0)
    net = TargetNet(genotype, 2, layers, 5, **options).double()
    check_live_parts(net, lambda _: target_terms(genotype))
    return net


FEW_OPS = ("skip_connect", "max_pool_3x3", "dil_conv_3x3")


def check_supernet(supports: dict[str, list[tuple[int, ...]]], layers: int, **options: Any) -> Supernet:
    space = CellSpace(len(supports["normal"]), FEW_OPS, len(supports["normal"][0]))
    net = supernet(supports, space=space, layers=layers, **options)
    check_live_parts(net, lambda network: supernet_terms(network, supports))
    return net


@st.composite
def cells(draw: st.DrawFn, n_nodes: int, n_picks: int) -> list[tuple[int, ...]]:
    """Draw, for each node, distinct candidates of FEW_OPS in rising order."""
    return [
        tuple(
            sorted(
                draw(
                    st.sets(st.integers(0, (node + 2) * len(FEW_OPS) - 1), min_size=n_picks, max_size=n_picks)
                )
            )
        )
        for node in range(n_nodes)
    ]


NETWORKS = {
    "n_nodes": st.integers(1, 3),
    "n_picks": st.integers(1, 2),
    "layers": st.integers(3, 8),
    "stem": st.sampled_from(["cifar", "imagenet"]),
    "op_batchnorm": st.booleans(),
    "data": st.data(),
}


@given(auxiliary=st.booleans(), **NETWORKS)
@settings(max_examples=40, deadline=None)
def test_any_target_net_runs_and_trains_exactly_its_live_parts(
    n_nodes: int,
    n_picks: int,
    layers: int,
    stem: str,
    op_batchnorm: bool,
    auxiliary: bool,
    data: st.DataObject,
) -> None:
    def picks() -> Picks:
        supports = data.draw(cells(n_nodes, n_picks))
        return tuple(
            tuple((FEW_OPS[c % len(FEW_OPS)], c // len(FEW_OPS)) for c in support) for support in supports
        )

    def concat(first: int) -> tuple[int, ...]:
        return tuple(data.draw(st.lists(st.integers(first, n_nodes + 1), min_size=1, unique=True)))

    genotype = Genotype(picks(), picks(), concat(0), concat(2))
    check_target(genotype, layers, stem=stem, auxiliary=auxiliary, op_batchnorm=op_batchnorm)


@given(**NETWORKS)
@settings(max_examples=40, deadline=None)
def test_any_supernet_runs_and_trains_exactly_its_live_parts(
    n_nodes: int, n_picks: int, layers: int, stem: str, op_batchnorm: bool, data: st.DataObject
) -> None:
    supports = {cell: data.draw(cells(n_nodes, n_picks)) for cell in CELLS}
    check_supernet(supports, layers, stem=stem, op_batchnorm=op_batchnorm)


CONVOLUTION = 2  # In FEW_OPS; the candidates 2, 5, 8 read the states 0, 1, 2.
ON_FIRST, ON_SECOND, ON_BOTH = [(CONVOLUTION,), (8,)], [(5,), (8,)], [(CONVOLUTION,), (5,)]


def executed(net: Any) -> set[str]:
    """Return the parts that run in a forward pass: stems, and the preprocessing and operations of cells."""
    with counted(net) as calls:
        net(rand(2, 3, 8, 8))
    return {".".join(name.split(".")[:3]) for name, n_calls in calls.items() if n_calls}


def test_a_normal_cell_that_never_reads_its_first_input() -> None:
    net = check_supernet({"normal": ON_SECOND, "reduce": ON_BOTH}, 4)
    kinds = [cell.kind for cell in net.cells]
    ran = executed(net)
    assert kinds == ["normal", "reduce", "reduce", "normal"]
    assert [f"cells.{i}.preprocess0" in ran for i in range(4)] == [False, True, True, False]
    assert all(f"cells.{i}.preprocess1" in ran for i in range(4))
    assert net.active_alphas() == net.alphas()


def test_normal_cells_without_second_input_kill_every_reduction() -> None:
    """Six cells: the last reads cell 3, which reads cell 1, which reads the second stem."""
    for stem in ("cifar", "imagenet"):
        net = check_supernet({"normal": ON_FIRST, "reduce": ON_BOTH}, 6, stem=stem)
        assert [cell.kind for cell in net.cells] == [
            "normal",
            "normal",
            "reduce",
            "normal",
            "reduce",
            "normal",
        ]
        ran = executed(net)
        assert {int(name.split(".")[1]) for name in ran if name.startswith("cells.")} == {1, 3, 5}
        assert net.active_alphas() == net.node_alphas("normal")
        assert all(b.grad is None for b in net.node_alphas("reduce"))


def test_a_dead_second_stem_does_not_run() -> None:
    """Five cells: the last reads cell 2, which reads cell 0, which reads the first stem."""
    net = check_supernet({"normal": ON_FIRST, "reduce": ON_BOTH}, 5, stem="imagenet")
    assert {name.split(".")[1] for name in executed(net) if name.startswith("stem.")} == {"stem0"}
    assert not any(name.startswith("stem.stem1") for name in names_of(net, net.active_parameters()))
    # The reductions are live again, and therefore the stem.
    install(net, {"normal": ON_BOTH, "reduce": ON_BOTH})
    assert {name.split(".")[1] for name in executed(net) if name.startswith("stem.")} == {"stem0", "stem1"}
    assert net.active_alphas() == net.alphas()


def test_a_dead_node_does_not_run() -> None:
    """Node 1 (state 3) is neither concatenated nor read. Drop path draws only for operations that run."""
    picks: Picks = (
        (("sep_conv_3x3", 0),),
        (("sep_conv_5x5", 1), ("dil_conv_3x3", 2)),
        (("dil_conv_5x5", 2), ("avg_pool_3x3", 1)),
    )
    genotype = Genotype(picks, picks, (2, 4), (4,))
    net = check_target(genotype, 3)
    assert {name.split(".")[3] for name in names_of(net, net.active_parameters()) if ".ops." in name} == {
        "0",
        "3",
    }
    with counted(net) as calls:
        net.train()(rand(2, 3, 8, 8))
    assert {name.split(".")[3] for name, n in calls.items() if n and ".ops." in name} == {"0", "3", "4"}
    net.drop_path_prob = 0.5
    torch.manual_seed(1)
    net(rand(4, 3, 8, 8))
    after = torch.rand(1)
    torch.manual_seed(1)
    for _ in range(3 * 3):  # Three cells with three live operations.
        torch.empty(4, 1, 1, 1, dtype=torch.float64).bernoulli_(0.5)
    assert torch.equal(torch.rand(1), after)


def test_the_auxiliary_head_keeps_its_cell_alive_in_training() -> None:
    first: Picks = ((("dil_conv_3x3", 0),),)
    genotype = Genotype(first, first)
    with_head = check_target(genotype, 6, auxiliary=True)
    without = check_target(genotype, 6)

    def parts(net: TargetNet) -> set[int]:
        return {int(name.split(".")[1]) for name in names_of(net, net.active_parameters()) if "cells" in name}

    assert parts(with_head) == {0, 1, 2, 3, 4, 5}
    assert parts(without) == {1, 3, 5}
    assert any("auxiliary_head" in name for name in names_of(with_head, with_head.active_parameters()))
    assert executed(with_head.eval()) == executed(without.eval())


@pytest.mark.parametrize("sparsity", [1, 2, 3])
def test_of_the_whole_space_only_the_active_part_is_trained(sparsity: int) -> None:
    net = supernet(space=CellSpace(sparsity=sparsity))
    net(rand(2, 3, 16, 16)).logsumexp(1).sum().backward()
    assert with_gradient(net) == names_of(net, [*net.active_parameters(), *net.active_alphas()])
    assert len(net.active_parameters()) < len(net.weights())


def test_active_parts_are_the_networks_own_after_copy_or_change_of_type() -> None:
    for net in (TargetNet(TWO_STAGE, 2, 3, 10, auxiliary=True), supernet(SUPPORTS)):
        n_parameters, n_buffers = len(net.active_parameters()), len(net.active_buffers())
        for other in (copy.deepcopy(net), net.float(), to_channels_last(net)):
            assert len(names_of(other, other.active_parameters())) == n_parameters > 0  # type: ignore[operator]
            assert len(names_of(other, other.active_buffers())) == n_buffers > 0  # type: ignore[operator]


def test_no_batch_norm_inside_the_operations_is_trained_at_first() -> None:
    """At the published size of the one-stage search; 96,768 values are in the middle of separable convolutions."""
    net = Supernet(CellSpace(), 36, 20, 10, op_batchnorm=True)
    codes = {
        cell: [NodeCode(A, torch.zeros(A.shape[1]).double(), (0, 3)) for A in matrices]
        for cell, matrices in draw_matrices(CellSpace(), 7, "uniform", 0).items()
    }
    net.install_codes(codes)
    operations = [op for cell in net.cells for op in cell.ops.modules()]
    norms = [op for op in operations if isinstance(op, nn.BatchNorm2d)]
    middle = [op.op[3] for op in operations if isinstance(op, SepConv)]
    assert not any(p.requires_grad for norm in norms for p in norm.parameters())
    assert sum(p.numel() for norm in middle for p in norm.parameters()) == 96_768
