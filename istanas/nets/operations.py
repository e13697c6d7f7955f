"""The modules of the published operations, the fixed blocks of the networks, and the checks of any operation.

Every operation maps (B, C, H, W) to (B, C, ceil(H / stride), ceil(W / stride)). The published ones are those of DARTS
(Liu et al., ICLR 2019). Their modules have the same positions in `op` as in the published code, so that the published
weights load by name.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from math import ceil
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from istanas.errors import ConfigError
from istanas.nets.depthwise import DepthwiseConv2d
from istanas.nets.pixel_phases import pixel_phases, to_even_size
from istanas.registry import OWN
from istanas.space.operations import OPERATIONS, Operation


class ScaledBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with a factor `scale` at no cost: w BN(x; g, b) = BN(x; w g, w b).

    This saves a pass over the output in both the forward and the backward pass, and is 3 times faster than a product.
    Together with `dense_gradient`, it makes a two-stage step 4 to 13 % faster with 16 channels, 8 layers and 64
    pictures, and 3 to 5 % faster with 8, 5 and 32 (CPU, one thread).
    """

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if scale is None:
            return super().forward(x)
        weight = scale * self.weight if self.affine else scale.expand(self.num_features).contiguous()
        bias = scale * self.bias if self.affine else None
        assert self.momentum is not None
        assert self.num_batches_tracked is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, weight, bias, self.training, self.momentum, self.eps)


def dense_gradient(x: Tensor) -> Tensor:
    """Return `x`, and make its gradient contiguous in the backward pass.

    The gradient of an input of `torch.cat` is a strided view, for which torch's backward pass of batch norm takes up to
    six times as long.
    """
    if x.requires_grad and not torch.compiler.is_exporting():
        x.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
    return x


class Normalized(nn.Sequential):
    """An operation that does not end in batch norm, followed by one."""

    def __init__(self, operation: nn.Module, norm: ScaledBatchNorm2d) -> None:
        super().__init__(operation, norm)

    @property
    def final_batchnorm(self) -> nn.BatchNorm2d:
        """The batch norm whose output is the block's output."""
        return cast(nn.BatchNorm2d, self[1])

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return the block's output times `scale`."""
        out: Tensor = self[1](self[0](x), scale)
        return out


class Zero(nn.Module):
    """An operation that returns zeros, as if its edge did not exist.

    The zeros depend on the input, so that all parameters before it get gradients, even if the output of a network
    depends on no input. Data-parallel training waits for these gradients.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.0


class RectifiedBlock(nn.Module):
    """A sequence `op` from ReLU to batch norm. Callers whose input is already rectified can skip the ReLU."""

    op: nn.Sequential

    @property
    def final_batchnorm(self) -> nn.BatchNorm2d:
        """The batch norm whose output is the block's output."""
        return cast(nn.BatchNorm2d, self.op[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.after_relu(F.relu(x))

    def after_relu(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return the block's output for a rectified input, times `scale`. Operations can then share one ReLU."""
        for layer in itertools.islice(self.op, 1, len(self.op) - 1):
            x = layer(x)
        out: Tensor = self.op[-1](x, scale)
        return out


class ReLUConvBN(RectifiedBlock):
    """ReLU, 1x1 convolution and batch norm, which bring a state to the cell's width."""

    def __init__(self, c_in: int, c_out: int, affine: bool) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False), ScaledBatchNorm2d(c_out, affine=affine)
        )


class SepConv(RectifiedBlock):
    """Two depthwise-separable convolutions. Only the first one has the stride.

    The ReLU between them works in place, because the backward pass of batch norm needs its input and not its output.
    This saves a tensor of the picture's size, and up to a fifth of the time of both layers.
    """

    def __init__(self, channels: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            DepthwiseConv2d(channels, kernel, stride, 1),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels, affine=affine),
            nn.ReLU(inplace=True),
            DepthwiseConv2d(channels, kernel, 1, 1),
            nn.Conv2d(channels, channels, 1, bias=False),
            ScaledBatchNorm2d(channels, affine=affine),
        )


class DilConv(RectifiedBlock):
    """Dilated (by two) depthwise-separable convolution."""

    def __init__(self, channels: int, kernel: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.stride = stride
        self.op = nn.Sequential(
            nn.ReLU(),
            DepthwiseConv2d(channels, kernel, stride, 2),
            nn.Conv2d(channels, channels, 1, bias=False),
            ScaledBatchNorm2d(channels, affine=affine),
        )

    def on_even(self, even: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return the output of the block of stride 2, given the even pixels of its rectified input, times `scale`."""
        out: Tensor = self.op[3](self.op[2](self.op[1](even, even=True)), scale)
        return out


class FactorizedReduce(nn.Module):
    """Two 1x1 convolutions of stride 2 that halve the picture, the second on the picture shifted by a pixel.

    Each convolution reads one of the four pixel phases. Only these two are rectified, which halves the work of the
    ReLU (1.1 to 2 times faster, slicing included) and gives the same numbers. Odd sizes are padded by a row and a
    column of zeros, so that sizes are rounded up.

    Raises:
        ConfigError: If there is only one output channel.
    """

    def __init__(self, c_in: int, c_out: int, affine: bool) -> None:
        super().__init__()
        if c_out < 2:
            raise ConfigError(
                "an identity of stride 2 with a single channel cannot be built from two convolutions",
                field="init_channels",
                remedy="choose more channels",
            )
        half = c_out // 2
        self.conv_1 = nn.Conv2d(c_in, half, 1, bias=False)
        self.conv_2 = nn.Conv2d(c_in, c_out - half, 1, bias=False)
        self.bn = ScaledBatchNorm2d(c_out, affine=affine)

    @property
    def final_batchnorm(self) -> nn.BatchNorm2d:
        """The batch norm whose output is the block's output."""
        return self.bn

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return the block's output times `scale`."""
        return self.on_phases([F.relu(phase) for phase in pixel_phases(to_even_size(x), (0, 1))], scale)

    def after_relu(self, x: Tensor) -> Tensor:
        """Return the block's output for a rectified input."""
        return self.on_phases(pixel_phases(to_even_size(x), (0, 1)), None)

    def on_phases(self, phases: Sequence[Tensor], scale: Tensor | None) -> Tensor:
        """Return the block's output, given the two phases of its rectified input that it reads, times `scale`."""
        even, odd = phases
        out: Tensor = self.bn(torch.cat([self.conv_1(even), self.conv_2(odd)], dim=1), scale)
        return out


def make_operation(
    name: str,
    channels: int,
    stride: int,
    *,
    affine: bool,
    batchnorm: bool = False,
    identity_batchnorm: bool = False,
) -> nn.Module:
    """Build the module of a candidate operation, with batch norm at its end where the network requires it.

    Args:
        name: Name of a registered operation.
        channels: C, >= 1.
        stride: 1 or 2.
        affine: Whether batch norms learn scale and shift. They do not in the two-stage supernet, where the edge weight
            is the scale.
        batchnorm: Whether an operation that does not end in batch norm, such as pooling, gets one, as in both supernets
            and in one-stage networks. `identity_batchnorm` decides about an `nn.Identity`.
        identity_batchnorm: Whether an `nn.Identity` gets a batch norm, as in one-stage networks.

    Raises:
        KeyError: If the name is not registered. Genotypes are checked earlier.
        ConfigError: If the operation of a plugin fails `check_operation`.

    Example:
        >>> make_operation("sep_conv_3x3", 4, 2, affine=True)(torch.zeros(1, 4, 8, 8)).shape
        torch.Size([1, 4, 4, 4])
    """
    check_plugin_operations([name], channels)
    module = _build(OPERATIONS[name], channels, stride, affine)
    required = identity_batchnorm if isinstance(module, nn.Identity) else batchnorm
    if required and final_batchnorm(module) is None:
        return Normalized(module, ScaledBatchNorm2d(channels, affine=affine))
    return module


def final_batchnorm(operation: nn.Module) -> nn.BatchNorm2d | None:
    """Return the batch norm at the end of an operation, whose affine part can absorb a factor, or `None`.

    A sequence ends in batch norm if its last layer does. Other modules declare theirs in an attribute or property
    `final_batchnorm`; `check_operation` compares the declaration with what the module computes.

    Example:
        >>> final_batchnorm(make_operation("skip_connect", 4, 1, affine=True)) is None
        True
        >>> final_batchnorm(make_operation("sep_conv_3x3", 4, 2, affine=True)).num_features
        4
    """
    if isinstance(operation, nn.BatchNorm2d):
        return operation
    declared = getattr(operation, "final_batchnorm", None)
    if isinstance(declared, nn.BatchNorm2d):
        return declared
    # A subclass with its own forward pass may use its layers in another way.
    sequence = isinstance(operation, nn.Sequential) and type(operation).forward is nn.Sequential.forward
    layers = list(operation.children()) if sequence else []
    return final_batchnorm(layers[-1]) if layers else None


def train_affine(operations: nn.Module, *, is_trained: bool) -> None:
    """Set whether the scale and shift of all batch norms in some operations are trained.

    Args:
        operations: A module that contains the operations.
        is_trained: Whether they get gradients.
    """
    for norm in operations.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.affine:
            norm.weight.requires_grad_(is_trained)
            norm.bias.requires_grad_(is_trained)


def check_plugin_operations(names: Iterable[str], channels: int) -> None:
    """Apply `check_operation` to those of the named operations that plugins have registered.

    The package's own operations are left out, because its tests check them. So are names that are not registered,
    which are the candidates of a space with modules of its own.

    Args:
        names: Names of operations.
        channels: C, >= 1.

    Raises:
        ConfigError: If an operation violates what `check_operation` requires.

    Example:
        >>> check_plugin_operations(["skip_connect"], 16)
    """
    for name in names:
        if name in OPERATIONS and OPERATIONS.origin(name) != OWN:
            check_operation(OPERATIONS[name], channels)


def check_operation(operation: Operation, channels: int = 8) -> None:
    """Check an operation on small tensors on the CPU, once per process and number of channels.

    For both strides, a batch of two pictures of odd height and even width must keep its channels, and its sizes must be
    divided by the stride and rounded up. The input must not be changed. A batch norm at the end must be that of the
    output: scaling its affine part must scale the output. The random numbers of the caller do not change.

    Args:
        operation: The operation, registered or not.
        channels: C, >= 1.

    Raises:
        ConfigError: If the operation violates this. The error names the operation and what it did.

    Example:
        >>> check_operation(Operation("smaller", lambda channels, stride, affine: nn.AvgPool2d(3, stride)))
        Traceback (most recent call last):
        istanas.errors.ConfigError: operation smaller: returns (2, 8, 7, 6) for (2, 8, 9, 8) and stride 1; keep the \
channels, divide the sizes by the stride and round them up: (2, 8, 9, 8)
    """
    _check_once(operation, channels)


@functools.lru_cache(maxsize=1024)
def _check_once(operation: Operation, channels: int) -> None:
    seen: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        for stride, affine in itertools.product((1, 2), (True, False)):
            module = _build(operation, channels, stride, affine).eval()
            if any(module is other for other in seen):
                raise _refusal(
                    operation,
                    "build returns the same module twice, which would share weights between edges",
                    "build a new module in each call",
                )
            seen.append(module)
            _check_module(operation, module, channels, stride, affine)


def _build(operation: Operation, channels: int, stride: int, affine: bool) -> nn.Module:
    if operation.name in OPERATIONS and OPERATIONS.origin(operation.name) == OWN:
        return operation.build(
            channels, stride, affine
        )  # An error, such as one of memory, is not the operation's.
    arguments = f"({channels}, {stride}, {affine})"
    try:
        module = operation.build(channels, stride, affine)
    except Exception as error:  # any error of the user's function
        raise _refusal(
            operation,
            f"build raises {_in_words(error)} for (channels, stride, affine) = {arguments}",
            "build a module for any number of channels and both strides",
        ) from error
    if not isinstance(module, nn.Module):
        raise _refusal(
            operation,
            f"build returns a {type(module).__name__} for (channels, stride, affine) = {arguments}",
            "return a torch.nn.Module",
        )
    return module


def _check_module(operation: Operation, module: nn.Module, channels: int, stride: int, affine: bool) -> None:
    shape = (2, channels, 9, 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    given = x.clone()
    case = f"for {shape} and stride {stride}"
    try:
        out = module(given)
    except Exception as error:  # any error of the user's module
        raise _refusal(
            operation, f"raises {_in_words(error)} {case}", "accept pictures of any size"
        ) from error
    expected = (*shape[:2], ceil(shape[2] / stride), ceil(shape[3] / stride))
    if not isinstance(out, Tensor) or tuple(out.shape) != expected:
        returned = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise _refusal(
            operation,
            f"returns {returned} {case}",
            f"keep the channels, divide the sizes by the stride and round them up: {expected}",
        )
    if not torch.equal(given, x):
        raise _refusal(
            operation,
            "changes its input, which other operations read, too",
            "do not begin with an operation in place",
        )
    norm = final_batchnorm(module)
    if norm is not None and affine:
        _check_final_batchnorm(operation, module, norm, x)


def _check_final_batchnorm(operation: Operation, module: nn.Module, norm: nn.BatchNorm2d, x: Tensor) -> None:
    if not norm.affine:
        raise _refusal(
            operation,
            "its last batch norm has no scale and shift",
            "pass affine to it: nn.BatchNorm2d(C, affine=affine)",
        )
    nn.init.normal_(norm.bias)
    before = module(x)
    factor = -1.5  # A ReLU after the batch norm would let a positive factor pass.
    norm.weight.mul_(factor)
    norm.bias.mul_(factor)
    expected, after = factor * before, module(x)
    if not torch.allclose(after, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
        raise _refusal(
            operation,
            "does not end in the batch norm that it declares as its last",
            "remove the attribute final_batchnorm, or let it be the last layer",
        )


def _refusal(operation: Operation, problem: str, remedy: str) -> ConfigError:
    return ConfigError(problem, field=f"operation {operation.name}", remedy=remedy)


def _in_words(error: Exception) -> str:
    """Return an error's type and the first line of its text."""
    text = f"{error}".strip().partition("\n")[0]
    return f"{type(error).__name__}: {text:.160}" if text else type(error).__name__
