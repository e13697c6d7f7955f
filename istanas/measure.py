"""The cost of a network: parameters and multiply-adds, counted or computed from its genotype, and latency.

The auxiliary head is left out, as in the literature, because it is used only in training.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from istanas.nets.operations import make_operation
from istanas.nets.skeleton import STEM_MULTIPLIER, cell_places, live_places, live_states
from istanas.space import (
    CELLS,
    N_CELL_INPUTS,
    OPERATIONS,
    Genotype,
    NetworkSize,
    Operation,
    SearchSpace,
)

_AUXILIARY = "auxiliary_head"


@dataclass(frozen=True)
class Cost:
    """The cost of a network.

    Args:
        params: Number of parameters, >= 0.
        macs: Multiply-adds of the forward pass of one picture, >= 0.
        latency: Predicted milliseconds of a forward pass, see `istanas.latency`; `None` without a table.

    Example:
        >>> Cost(1, 2) + Cost(3, 4)
        Cost(params=4, macs=6, latency=None)
    """

    params: int
    macs: int
    latency: float | None = None

    def __add__(self, other: Cost) -> Cost:
        """Return the sum of what is counted. It has no latency, because the fixed parts of a network count once."""
        return Cost(self.params + other.params, self.macs + other.macs)


def count_params(net: nn.Module) -> int:
    """Return the number of parameters of a network, without the auxiliary head.

    Args:
        net: Any network.

    Example:
        >>> count_params(nn.Linear(3, 2))
        8
    """
    return sum(p.numel() for name, p in net.named_parameters() if not name.startswith(_AUXILIARY))


def count_macs(net: nn.Module, shape: tuple[int, int, int]) -> int:
    """Count the multiply-adds of one forward pass in eval mode, in which the auxiliary head does not run.

    Convolutions, linear layers and matrix products are counted, whether they are modules such as `nn.Conv2d` or calls
    of torch's functions.

    Args:
        net: Any network or operation that takes (B, C, H, W). It is not changed.
        shape: (C, H, W) of its input.

    Example:
        >>> count_macs(nn.Conv2d(3, 4, 3, padding=1), (3, 8, 8))
        6912
    """
    products = _Products()
    was_training = net.training
    like = next(net.parameters(), torch.empty(0))  # such as pooling, which has no parameters
    try:
        with products, torch.no_grad():
            net.eval()(torch.zeros(1, *shape, dtype=like.dtype, device=like.device))
    finally:
        net.train(was_training)
    return products.macs


_F, _T = torch.nn.functional, torch.Tensor
_CONVOLUTIONS: frozenset[Any] = frozenset({_F.conv1d, _F.conv2d, _F.conv3d})
_TRANSPOSED: frozenset[Any] = frozenset({_F.conv_transpose1d, _F.conv_transpose2d, _F.conv_transpose3d})
_MATRIX_PRODUCTS: frozenset[Any] = frozenset(
    {torch.matmul, torch.mm, torch.bmm, _T.matmul, _T.mm, _T.bmm, _T.__matmul__}
)


class _Products(TorchFunctionMode):
    """A context that counts the multiply-adds of torch's convolutions, linear layers and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _CONVOLUTIONS or func in _TRANSPOSED:
            x = args[0] if args else kwargs["input"]
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            # Each pixel of the output (of the input, if the convolution is transposed) takes this many products.
            self.macs += (x if func in _TRANSPOSED else out).numel() * prod(weight.shape[1:])
        elif func is _F.linear or func in _MATRIX_PRODUCTS:
            self.macs += out.numel() * (args[0] if args else kwargs["input"]).shape[-1]
        return out


def measure_latency(
    net: nn.Module, shape: tuple[int, int, int], *, batch_size: int = 1, repeats: int = 30, warm_up: int = 5
) -> float:
    """Measure the time of a forward pass in eval mode on the CPU, with torch's current number of threads.

    Args:
        net: Any network that maps (B, C, H, W) to logits. It is not changed.
        shape: (C, H, W) of a picture.
        batch_size: Pictures in a batch, >= 1.
        repeats: Number of measured passes, >= 1.
        warm_up: Number of passes before the measured ones, >= 0.

    Returns:
        The median time in seconds.

    Example:
        >>> 0 < measure_latency(nn.Conv2d(3, 4, 3), (3, 8, 8), repeats=3, warm_up=1) < 60
        True
    """
    was_training = net.training
    pictures = torch.zeros(batch_size, *shape, dtype=next(net.parameters()).dtype)
    seconds = []
    try:
        net.eval()
        with torch.inference_mode():
            for _ in range(warm_up):
                net(pictures)
            for _ in range(repeats):
                start = time.perf_counter()
                net(pictures)
                seconds.append(time.perf_counter() - start)
    finally:
        net.train(was_training)
    return statistics.median(seconds)


def target_cost(
    genotype: Genotype,
    *,
    init_channels: int,
    layers: int,
    num_classes: int,
    shape: tuple[int, int, int],
    stem: str = "cifar",
    op_batchnorm: bool = False,
) -> Cost:
    """Return the cost of a genotype's target network without building it, because a search does this in every epoch.

    Args:
        genotype: As in `TargetNet`.
        init_channels: As in `TargetNet`.
        layers: As in `TargetNet`.
        num_classes: As in `TargetNet`.
        shape: (C, H, W) of the picture.
        stem: As in `TargetNet`.
        op_batchnorm: As in `TargetNet`.

    Returns:
        The results of `count_params` and `count_macs` for that network.

    Example:
        >>> from istanas.space import PUBLISHED
        >>> cell = PUBLISHED["ISTA_twostage"]
        >>> target_cost(cell, init_channels=36, layers=20, num_classes=10, shape=(3, 32, 32)).params
        3316726
    """
    n_concat = {"normal": len(genotype.normal_concat), "reduce": len(genotype.reduce_concat)}
    places = cell_places(init_channels, layers, stem, n_concat)
    states = {
        kind: live_states([[s for _, s in node] for node in genotype.picks(kind)], genotype.concat(kind))
        for kind in CELLS
    }
    live = live_places([place.kind for place in places], states)
    in_channels, h, w = shape
    if stem == "cifar":
        total = _convolution(in_channels, STEM_MULTIPLIER * init_channels, 9, h * w)
    else:
        c = init_channels
        total = Cost(0, 0)
        for c_in, c_out, runs in ((in_channels, c // 2, True), (c // 2, c, True), (c, c, live[1])):
            h, w = ceil(h / 2), ceil(w / 2)
            total += _convolution(c_in, c_out, 9, h * w if runs else 0)
    width = 0
    for place, is_live in zip(places, live[N_CELL_INPUTS:], strict=True):
        c = place.channels
        # Parts that are not live have parameters, but do not run.
        alive = states[place.kind] if is_live else frozenset[int]()
        inputs = h, w
        for state, c_in in enumerate((place.c_prev_prev, place.c_prev)):
            total += _convolution(c_in, c, 1, h * w if state in alive else 0)
        if place.stride == 2:
            h, w = ceil(h / 2), ceil(w / 2)
        for node, picks in enumerate(genotype.picks(place.kind), N_CELL_INPUTS):
            for op, state in picks:
                stride, size = (place.stride, inputs) if state < N_CELL_INPUTS else (1, (h, w))
                cost = _operation_cost(OPERATIONS[op], c, stride, size, op_batchnorm)
                total += cost if node in alive else Cost(cost.params, 0)
        width = n_concat[place.kind] * c
    return total + Cost((width + 1) * num_classes, width * num_classes)


@lru_cache(maxsize=512)
def network_cost(
    space: SearchSpace, genotype: Genotype, size: NetworkSize, shape: tuple[int, int, int]
) -> Cost:
    """Build the target network of a genotype without memory for its weights, and count its cost.

    Args:
        space: The search space of the genotype.
        genotype: The genotype.
        size: The size of the network.
        shape: (C, H, W) of the picture.
    """
    with torch.device("meta"):
        net = space.target(genotype, size)
        return Cost(count_params(net), count_macs(net, shape))


def _convolution(c_in: int, c_out: int, taps: int, pixels: int) -> Cost:
    """Return the cost of a convolution without bias and its batch norm, for an output of `pixels` pixels."""
    weights = c_in * c_out * taps
    return Cost(weights + 2 * c_out, weights * pixels)


@lru_cache(maxsize=4096)
def _operation_cost(
    operation: Operation, channels: int, stride: int, size: tuple[int, int], op_batchnorm: bool
) -> Cost:
    """Measure an operation of a target network on an input of (height, width) = `size`.

    The result is cached, because a search needs the costs of its operations in every epoch. The operation runs on the
    CPU: operations of plugins might not support the device "meta", whose first use also takes seconds.
    """
    options = {"batchnorm": op_batchnorm, "identity_batchnorm": op_batchnorm}
    products = _Products()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        module = make_operation(operation.name, channels, stride, affine=True, **options).eval()
        with products, torch.no_grad():
            module(torch.zeros(1, channels, *size))
    return Cost(sum(p.numel() for p in module.parameters()), products.macs)
