"""Every second pixel of a picture, with a backward pass that writes each gradient once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
