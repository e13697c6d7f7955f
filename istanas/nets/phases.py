"""Every second pixel of a picture, with a backward pass that writes each gradient once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def pixel_phases(x: Tensor, offsets: Sequence[int]) -> tuple[Tensor, ...]:
    """x[:, :, o::2, o::2] for each offset o, as tensors of their own.

    Autograd of the slices alone fills and copies a tensor for each step of each slice; here the gradient is filled
    with zeros once and each phase copied into it. Both phases of 64 pictures of 32x32 with 16 channels, forward and
    backward: 2 to 3 times faster (`python -m tests.benchmarks.tricks`, which measured the figures of this package).

    Args:
        x: (B, C, H, W).
        offsets: each 0 or 1, all different.

    Returns:
        One (B, C, ceil((H - o) / 2), ceil((W - o) / 2)) an offset o, in channels-last memory if x is.

    Example:
        >>> [phase.flatten().tolist() for phase in pixel_phases(torch.arange(4.0).view(1, 1, 2, 2), [0, 1])]
        [[0.0], [3.0]]
    """
    if torch.compiler.is_exporting():
        return tuple(x[:, :, o::2, o::2] for o in offsets)
    phases: tuple[Tensor, ...] = _Phases.apply(x, tuple(offsets))
    return phases


class SharedReads:
    """What operations read of a cell's states, made once a state: its rectified copy, and the pixel phases of that.

    In a reduction cell most operations read one of two large states. A gradient of its size is then filled once for
    all that read phases of it, and not once an operation.

    Args:
        states: of the cell; may grow meanwhile.

    Example:
        >>> reads = SharedReads({0: torch.tensor([[[[-1.0, 2.0], [3.0, 4.0]]]])})
        >>> reads.phases(0, (0, 1))[1].item(), reads.rectified(0) is reads.rectified(0)
        (4.0, True)
    """

    def __init__(self, states: Mapping[int, Tensor]) -> None:
        self._states = states
        self._rectified: dict[int, Tensor] = {}
        self._phases: dict[tuple[int, int], Tensor] = {}

    def rectified(self, state: int) -> Tensor:
        """max(0, x) of a state x."""
        if state not in self._rectified:
            self._rectified[state] = F.relu(self._states[state])
        return self._rectified[state]

    def phases(self, state: int, offsets: Sequence[int]) -> list[Tensor]:
        """`pixel_phases` of a rectified state; odd sizes get a zero row and column first, as 'ceil' asks.

        Where nobody has asked for the whole rectified state, the phases alone are rectified: less work.
        """
        new = [o for o in offsets if (state, o) not in self._phases]
        if new:
            whole = state in self._rectified
            x = self._rectified[state] if whole else self._states[state]
            for o, phase in zip(new, pixel_phases(to_even_size(x), new), strict=True):
                self._phases[state, o] = phase if whole else F.relu(phase)
        return [self._phases[state, o] for o in offsets]


def to_even_size(x: Tensor) -> Tensor:
    """(B, C, H, W) with a zero row and column more where H and W are odd."""
    odd = x.shape[2] % 2, x.shape[3] % 2
    return F.pad(x, (0, odd[1], 0, odd[0])) if any(odd) else x


class _Phases(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.offsets = x.shape, offsets
        ctx.memory = (
            torch.channels_last
            if x.is_contiguous(memory_format=torch.channels_last)
            else torch.contiguous_format
        )
        return tuple(x[:, :, o::2, o::2].clone(memory_format=ctx.memory) for o in offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        whole = torch.empty(
            ctx.shape, dtype=gradients[0].dtype, device=gradients[0].device, memory_format=ctx.memory
        ).zero_()
        for o, gradient in zip(ctx.offsets, gradients, strict=True):
            whole[:, :, o::2, o::2] = gradient
        return whole, None
