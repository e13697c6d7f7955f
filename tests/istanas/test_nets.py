"""Networks: operations compared with torch, picture sizes, strict loading, drop path."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from istanas.errors import CheckpointError, ConfigError
from istanas.nets import Supernet, TargetNet, to_channels_last
from istanas.nets.depthwise import depthwise_conv2d
from istanas.nets.operations import FactorizedReduce, make_operation
from istanas.nets.skeleton import AuxiliaryHead, auxiliary_position, cell_places
from istanas.nets.target import drop_path
from istanas.space import PRIMITIVES, PUBLISHED, CellSpace, Genotype, Picks
from tests.istanas.supernets import TWO_STAGE, rand, supernet

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
