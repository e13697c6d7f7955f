"""Depthwise convolution that is fast on CPUs when dilated.

On CPUs, torch's backward pass of a dilated depthwise convolution is many times slower than that of a plain one. The two
rewrites below are exact, and call only torch functions, so that autograd computes the gradients. For 64 pictures of
32x32 on one thread, the forward pass and both gradients take the following times (torch -> this module). With 32
channels and stride 2: 37 -> 2.4 ms (3x3) and 68 -> 6.4 ms (5x5). With 16 channels and stride 1, a single convolution
gains little or nothing: 9 -> 11 ms and 17 -> 15 to 18 ms. A two-stage step with 16 channels, 8 layers and 64 pictures
is nevertheless 2 to 8 % faster (`python -m tests.benchmarks.tricks`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from istanas.nets.pixel_phases import pixel_phases


class DepthwiseConv2d(nn.Module):
    """A convolution of each channel with its own k x k kernel, padded so that only the stride changes the size.

    Args:
        channels: C, >= 1.
        kernel: k, odd.
        stride: 1 or 2.
        dilation: 1 or 2.
    """

    def __init__(self, channels: int, kernel: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel, kernel))
        self.stride, self.dilation = stride, dilation
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # As torch initialises convolutions.

    def forward(self, x: Tensor, even: bool = False) -> Tensor:
        """Return the convolution. With `even`, x has only the even pixels; stride and dilation must be 2."""
        if even:
            return depthwise_on_even(x, self.weight)
        return depthwise_conv2d(x, self.weight, self.stride, self.dilation)

    def extra_repr(self) -> str:
        c, _, k, _ = self.weight.shape
        return f"{c}, kernel_size={k}, stride={self.stride}, dilation={self.dilation}"


def depthwise_conv2d(x: Tensor, weight: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    """Return the depthwise convolution with padding dilation * (k - 1) / 2, equal to `F.conv2d(..., groups=C)`.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, k, k), k odd.
        stride, dilation: 1 or 2.

    Returns:
        (B, C, ceil(H / stride), ceil(W / stride)).

    Example:
        >>> depthwise_conv2d(torch.ones(1, 2, 4, 4), torch.ones(2, 1, 3, 3))[0, 0, 1, 1].item()
        9.0
    """
    channels, kernel = weight.shape[0], weight.shape[-1]
    if dilation == 2 and stride == 2:
        (even,) = pixel_phases(x, (0,))
        return depthwise_on_even(even, weight)
    if (
        dilation == 2
        and x.device.type == "cpu"
        and torch.is_grad_enabled()
        and not torch.compiler.is_exporting()
    ):
        return _by_phases(x, weight)
    return F.conv2d(x, weight, None, stride, dilation * (kernel // 2), dilation, channels)


def depthwise_on_even(even: Tensor, weight: Tensor) -> Tensor:
    """Return `depthwise_conv2d` of stride and dilation 2, given the even pixels.

    It reads only even pixels, so it is a convolution of them with stride and dilation 1.

    Args:
        even: x[:, :, ::2, ::2], (B, C, H, W).
        weight: (C, 1, k, k), k odd.

    Returns:
        (B, C, H, W).

    Example:
        >>> depthwise_on_even(torch.ones(1, 2, 2, 2), torch.ones(2, 1, 3, 3))[0, 0, 0, 0].item()
        4.0
    """
    return F.conv2d(even, weight, None, 1, weight.shape[-1] // 2, 1, weight.shape[0])


def _by_phases(x: Tensor, weight: Tensor) -> Tensor:
    """Compute a convolution of dilation 2 as an undilated one on the four pixel phases, stacked in the batch."""
    channels, kernel = weight.shape[0], weight.shape[-1]
    batch, _, height, width = x.shape
    x = F.pad(x, (0, width % 2, 0, height % 2)) if height % 2 or width % 2 else x
    h, w = x.shape[2] // 2, x.shape[3] // 2
    # In channels-last memory, the reshapes below copy whole pixels.
    phases = x.permute(0, 2, 3, 1).reshape(batch, h, 2, w, 2, channels).permute(2, 4, 0, 1, 3, 5)
    stacked = phases.reshape(4 * batch, h, w, channels).permute(0, 3, 1, 2)
    out = F.conv2d(stacked, weight, None, 1, kernel // 2, 1, channels)
    pixels = out.permute(0, 2, 3, 1).reshape(2, 2, batch, h, w, channels).permute(2, 3, 0, 4, 1, 5)
    out = pixels.reshape(batch, 2 * h, 2 * w, channels).permute(0, 3, 1, 2)
    # A slice without effect would still cost a copy in the backward pass.
    return out if (2 * h, 2 * w) == (height, width) else out[:, :, :height, :width]
