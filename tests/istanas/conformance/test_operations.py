"""What every operation must fulfil, whether the package or a plugin registers it."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from istanas.draw import cell_svg, colour_of
from istanas.errors import ConfigError, GenotypeError
from istanas.measure import Cost, count_macs, count_params, target_cost
from istanas.nets import NodeCode, NodeState, Supernet, TargetNet, absorb_into_batchnorm
from istanas.nets.operations import check_operation, final_batchnorm, make_operation
from istanas.nets.pixel_phases import SharedReads
from istanas.nets.target import apply_operation, drop_path
from istanas.search.sparse_coding import draw_matrices
from istanas.space import CELLS, OPERATIONS, PRIMITIVES, CellSpace, Genotype, Operation, register_operation
from istanas.space.operations import skip_ratio
from tests.user_operations import (
    SE_CONV,
    SEPARABLE_7X7,
    TWO_KERNELS,
    USER_OPERATIONS,
    registered,
    separable_7x7,
)

# A new operation is tested by adding it here.
CONFORMING = [
    *(OPERATIONS[name] for name in PRIMITIVES),
    SE_CONV,
    SEPARABLE_7X7,
    TWO_KERNELS,
]
SIZES = [(8, 8), (7, 9), (8, 7), (2, 1)]
USUAL = {"affine": True}
ONE_STAGE = {"affine": True, "batchnorm": True, "identity_batchnorm": True}
TWO_STAGE = {"affine": False, "batchnorm": True}


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    with registered(*USER_OPERATIONS):
        yield


@pytest.fixture(params=CONFORMING, ids=lambda operation: operation.name)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param.name)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def built(name: str, stride: int, channels: int = 4, **options: Any) -> nn.Module:
    """Return an operation in float64 in which no batch norm is an identity."""
    torch.manual_seed(0)
    module = make_operation(name, channels, stride, **options).double()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.normal_(norm.running_mean)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    return module


def genotype_of(name: str) -> Genotype:
    """Return cells in which an operation reads cell inputs and nodes, with stride 1 and 2, and twice on one edge."""
    picks = (((name, 0), (name, 1)), ((name, 2), (name, 0)), (("skip_connect", 1), (name, 1)))
    return Genotype(normal=picks, reduce=picks)


def searching(name: str, *, op_batchnorm: bool, state: NodeState = NodeState.ACTIVE) -> Supernet:
    """Return a supernet in float64 whose nodes keep the operation on both of their first edges."""
    space = CellSpace(n_nodes=2, ops=("avg_pool_3x3", name) if name != "avg_pool_3x3" else (name,))
    torch.manual_seed(0)
    net = Supernet(space, 4, 3, 5, op_batchnorm=op_batchnorm).double()
    with torch.no_grad():
        for b in net.alphas():
            b.normal_()
    kept = tuple(space.candidate(1, edge, space.n_ops - 1) for edge in (0, 1))
    codes = {
        cell: [NodeCode(A, rand(A.shape[1], seed=node), kept) for node, A in enumerate(matrices)]
        for cell, matrices in draw_matrices(space, 7, "uniform", 0).items()
    }
    net.install_codes(codes, {cell: [state] * space.n_nodes for cell in CELLS})
    return net


# --- the module ---


def test_an_operation_passes_its_check(name: str) -> None:
    for channels in (2, 8):
        check_operation(OPERATIONS[name], channels)


@pytest.mark.parametrize("options", [USUAL, TWO_STAGE, ONE_STAGE])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [1, 2])
def test_sizes_are_divided_by_the_stride_and_rounded_up(
    name: str, stride: int, size: tuple[int, int], options: dict[str, Any]
) -> None:
    out = make_operation(name, 4, stride, **options).eval()(torch.zeros(2, 4, *size))
    assert out.shape == (2, 4, -(-size[0] // stride), -(-size[1] // stride))


@pytest.mark.parametrize("stride", [1, 2])
def test_batch_norm_at_the_end_where_networks_require_it(name: str, stride: int) -> None:
    assert final_batchnorm(make_operation(name, 4, stride, **ONE_STAGE)) is not None
    searched = make_operation(name, 4, stride, **TWO_STAGE)
    assert isinstance(searched, nn.Identity) or final_batchnorm(searched) is not None
    norms = [m for m in searched.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(norm.affine for norm in norms)


@pytest.mark.parametrize("size", [(6, 6), (7, 5)])
@pytest.mark.parametrize("stride", [1, 2])
def test_every_parameter_and_the_input_get_a_gradient(name: str, stride: int, size: tuple[int, int]) -> None:
    module = built(name, stride, **ONE_STAGE).train()
    x = rand(3, 4, *size).requires_grad_()
    out = module(x)
    (out * rand(*out.shape, seed=1)).sum().backward()
    for gradient in (x.grad, *(p.grad for p in module.parameters())):
        assert gradient is not None
        assert gradient.isfinite().all()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("options", [USUAL, TWO_STAGE, ONE_STAGE])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_edge_weight_scales_the_output(
    name: str, stride: int, training: bool, options: dict[str, Any]
) -> None:
    module = built(name, stride, **options).train(training)
    x, weight = rand(3, 4, 7, 6), torch.tensor(-0.7, dtype=torch.float64)
    states = {0: x}
    plain = module(x)
    scaled = apply_operation(module, states, SharedReads(states), 0, weight)
    torch.testing.assert_close(scaled, weight * plain, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(apply_operation(module, states, SharedReads(states), 0), plain)
    torch.testing.assert_close(x, rand(3, 4, 7, 6), rtol=0, atol=0)


def test_drop_path_leaves_pictures_out_or_keeps_the_identity(name: str) -> None:
    module = built(name, 1, **USUAL)
    out = rand(50, 4, 3, 3)
    torch.manual_seed(0)
    dropped = (drop_path(out, module, 0.5) == 0).all(3).all(2).all(1)
    assert (dropped.sum() == 0) == isinstance(module, nn.Identity)
    assert not dropped.all()


@pytest.mark.parametrize("stride", [1, 2])
def test_copies_and_state_dicts_keep_the_function(name: str, stride: int) -> None:
    module = built(name, stride, **ONE_STAGE).eval()
    x = rand(2, 4, 7, 6)
    other = make_operation(name, 4, stride, **ONE_STAGE).double().eval()
    other.load_state_dict(module.state_dict())
    for copied in (copy.deepcopy(module), other):
        assert torch.equal(copied(x), module(x))
        mine = {value.data_ptr() for value in module.state_dict().values()}
        assert mine.isdisjoint(value.data_ptr() for value in copied.state_dict().values())
    assert final_batchnorm(copy.deepcopy(module)) is not final_batchnorm(module)


# --- networks ---


def test_a_two_stage_search_trains_the_kept_operations_only(name: str) -> None:
    net = searching(name, op_batchnorm=False).train()
    F.cross_entropy(net(rand(6, 3, 9, 8)), torch.arange(6) % 5).backward()
    assert all(b.grad is not None and b.grad.abs().max() > 0 for b in net.active_alphas())
    for cell in net._live_cells():
        active = {(edge, op) for node in net.plan(cell.kind) for _, edge, op in node}
        for edge, operations in enumerate(cell.ops):
            for op, operation in enumerate(operations):
                got = [p.grad is not None for p in operation.parameters()]
                assert all(got) if (edge, op) in active else not any(got)


def test_the_absorbed_network_gives_the_logits_of_the_supernet(name: str) -> None:
    net = searching(name, op_batchnorm=True, state=NodeState.FROZEN)
    optimizer = torch.optim.SGD(net.weights(), 0.05, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net.train()(1 + rand(6, 3, 9, 8, seed=step)), torch.arange(6) % 5).backward()
        optimizer.step()
    absorbed = absorb_into_batchnorm(net)
    x = 1 + rand(4, 3, 9, 8, seed=99)
    with torch.no_grad():
        theirs, ours = net.eval()(x), absorbed(x)
    assert theirs.std(0).min() > 1e-4
    assert float((ours - theirs).norm() / theirs.norm()) <= 1e-9
    weights = net.edge_weights()["normal"].detach()
    assert (weights - 1).abs().min() > 1e-3  # They had an effect.


def test_activation_checkpointing_gives_the_same_numbers(name: str) -> None:
    seen = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = TargetNet(genotype_of(name), 4, 3, 5, op_batchnorm=True).double().train()
        net.activation_checkpointing = checkpointing
        F.cross_entropy(net(rand(6, 3, 9, 8)), torch.arange(6) % 5).backward()
        gradients = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        seen.append({**net.state_dict(), **{f"gradient of {n}": g for n, g in gradients.items()}})
    assert seen[0].keys() == seen[1].keys()
    for key, value in seen[0].items():
        assert torch.equal(value, seen[1][key]), key


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 9, 14)])
@pytest.mark.parametrize("op_batchnorm", [False, True])
def test_the_cost_of_a_genotype_is_that_of_its_network(
    name: str, op_batchnorm: bool, shape: tuple[int, int, int]
) -> None:
    sizes = {"init_channels": 4, "layers": 4, "num_classes": 5, "op_batchnorm": op_batchnorm}
    net = TargetNet(genotype_of(name), in_channels=shape[0], **sizes)
    hooked = by_hooks(net, shape)
    assert target_cost(genotype_of(name), shape=shape, **sizes) == hooked
    assert Cost(count_params(net), count_macs(net, shape)) == hooked


def by_hooks(net: nn.Module, shape: tuple[int, int, int]) -> Cost:
    """Count with hooks on the layers whose weight has more than one dimension, which batch norms have not."""
    macs = 0

    def count(module: nn.Module, _: Any, out: Tensor) -> None:
        nonlocal macs
        macs += out[0].numel() * module.weight[0].numel()

    layers = [m for m in net.modules() if getattr(m, "weight", torch.zeros(1)).dim() > 1]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        net.eval()(torch.zeros(1, *shape))
    for hook in hooks:
        hook.remove()
    return Cost(sum(p.numel() for p in net.parameters()), macs)


def test_costs_by_hand() -> None:
    """A 7x7 kernel has 49 taps, and the layers of the squeeze run once per picture."""

    def cost_of(name: str) -> Cost:
        picks = (((name, 0),),)
        sizes = {"init_channels": 6, "layers": 1, "num_classes": 5, "shape": (3, 8, 8)}
        whole = target_cost(Genotype(normal=picks, reduce=picks), **sizes)
        picks = ((("max_pool_3x3", 0),),)
        rest = target_cost(Genotype(normal=picks, reduce=picks), **sizes)
        return Cost(whole.params - rest.params, whole.macs - rest.macs)

    # The only cell is a reduction of 12 channels, whose operations halve pictures of 8x8 pixels.
    c, pixels = 12, 16
    assert cost_of("sep_conv_7x7") == Cost(49 * c + c * c + 2 * c, (49 * c + c * c) * pixels)
    squeeze = Cost(9 * c * c + 2 * c + 2 * c + 2 + 2 * c + c, 9 * c * c * pixels + 4 * c)
    assert cost_of("se_conv_3x3") == squeeze


def test_drawings_use_the_colour_of_the_operation(name: str) -> None:
    assert colour_of(name) == OPERATIONS[name].colour
    text = cell_svg([[(name, 0), (name, 1)]], [2], label="cell")
    assert text.count(f'stroke="{OPERATIONS[name].colour}"') >= 2
    assert text.count(name) == 2


# --- what is refused ---


class Changing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu_()


class Untrue(nn.Module):
    """Declares a batch norm that a ReLU follows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.final_batchnorm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.final_batchnorm(x))


class Tuple(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def raising(channels: int, stride: int, affine: bool) -> nn.Module:
    raise RuntimeError("no weights\nhere")


SHARED = nn.Conv2d(8, 8, 1)
REFUSED: dict[str, tuple[Any, str]] = {
    "size": (
        lambda c, s, a: nn.Conv2d(c, c, 3, s),
        r"returns \(2, 8, 7, 6\) for \(2, 8, 9, 8\) and stride 1",
    ),
    "stride": (lambda c, s, a: nn.Identity(), r"returns \(2, 8, 9, 8\) for \(2, 8, 9, 8\) and stride 2"),
    "rounded_down": (lambda c, s, a: nn.AvgPool2d(s), r"returns \(2, 8, 4, 4\) .* and stride 2; .*8, 5, 4\)"),
    "channels": (lambda c, s, a: nn.Conv2d(c, 3, 1, s), r"returns \(2, 3, 9, 8\)"),
    "tuple": (lambda c, s, a: Tuple(), "returns a tuple for"),
    "raising": (raising, r"build raises RuntimeError: no weights for .* = \(8, 1, True\)"),
    "no_module": (lambda c, s, a: torch.relu, "build returns a builtin_function_or_method for"),
    "nothing": (lambda c, s, a: None, "build returns a NoneType"),
    "other_input": (lambda c, s, a: nn.Conv2d(c + 1, c, 1, s), "raises RuntimeError: .* for .* and stride 1"),
    "in_place": (lambda c, s, a: Changing(), "changes its input"),
    "same_module": (lambda c, s, a: SHARED, "build returns the same module twice"),
    "untrue": (lambda c, s, a: Untrue(c), "does not end in the batch norm that it declares"),
    "without_scale": (
        lambda c, s, a: nn.Sequential(nn.MaxPool2d(3, s, 1), nn.BatchNorm2d(c, affine=False)),
        r"its last batch norm has no scale and shift; pass affine to it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_operation_that_violates_the_rules_is_named_in_one_line(name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(ConfigError, match=f"^operation {name}: {message}") as caught:
        check_operation(Operation(name, build))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["size", "raising"])
def test_networks_refuse_such_an_operation_before_any_work(name: str) -> None:
    genotype = Genotype(normal=((("skip_connect", 0),),), reduce=((("skip_connect", 0),),))
    with registered(Operation(name, REFUSED[name][0])):
        genotype = Genotype(normal=(((name, 0),),), reduce=genotype.reduce)
        for build in (
            lambda: Supernet(CellSpace(ops=(name,), n_nodes=1), 8, 3, 5),
            lambda: TargetNet(genotype, 8, 3, 5),
            lambda: target_cost(genotype, init_channels=8, layers=3, num_classes=5, shape=(3, 8, 8)),
        ):
            with pytest.raises(ConfigError, match=f"operation {name}: "):
                build()


def test_a_check_is_made_once_and_draws_no_random_numbers() -> None:
    calls = []

    def build(channels: int, stride: int, affine: bool) -> nn.Module:
        calls.append((channels, stride, affine))
        return separable_7x7(channels, stride, affine)

    operation = Operation("counted", build)
    before = torch.get_rng_state()
    check_operation(operation, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(calls) == [(4, 1, False), (4, 1, True), (4, 2, False), (4, 2, True)]
    check_operation(operation, 4)
    assert len(calls) == 4
    check_operation(operation, 6)
    assert len(calls) == 8


def test_the_batch_norm_of_a_sequence_with_its_own_forward_is_unknown() -> None:
    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    norm = nn.BatchNorm2d(4)
    assert final_batchnorm(nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU(), norm))) is norm
    assert final_batchnorm(Residual(nn.ReLU(), norm)) is None
    assert final_batchnorm(nn.Sequential(norm, nn.ReLU())) is None
    assert final_batchnorm(nn.Sequential()) is None


def test_an_operation_with_a_wrong_field_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="operation 'a': colour: 'red' is not a colour; give one as #rrggbb"
    ):
        Operation("a", separable_7x7, "red")
    with pytest.raises(ConfigError, match="operation 'a': build: 3 is not a function"):
        Operation("a", 3)  # type: ignore[arg-type]


def test_a_registered_operation_changes_no_default() -> None:
    assert SE_CONV.name in OPERATIONS
    assert CellSpace().ops == PRIMITIVES
    with pytest.raises(
        ConfigError, match=r"the operation 'se_conv_3x3' is already registered, by my_ops\.py"
    ):
        register_operation(SE_CONV)
    with pytest.raises(
        ConfigError, match=r"'se_conv_3' is not a registered operation \(did you mean se_conv_3x3\?"
    ):
        CellSpace(ops=("se_conv_3",))
    picks = ((("sep_conv_7x8", 0),),)
    with pytest.raises(
        GenotypeError, match=r"genotype.normal: node 0: 'sep_conv_7x8' .* mean sep_conv_7x7\?"
    ):
        Genotype(normal=picks, reduce=picks)


def test_skip_ratio_counts_operations_that_pass_their_input_on() -> None:
    with registered(Operation("pass_on", OPERATIONS["skip_connect"].build, is_skip=True)):
        cell = ((("pass_on", 0), ("se_conv_3x3", 1)),)
        assert Genotype(normal=cell, reduce=cell).skip_ratio() == 0.5
    assert skip_ratio(["pass_on", "skip_connect"]) == 0.5  # A run whose plugin is missing.
