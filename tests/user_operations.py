"""Operations as a user's plugin defines them, and their registration for the time of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from istanas.registry import registering_for, unregister
from istanas.space import Operation, register_operation

ORIGIN = "my_ops.py"


class SqueezeAndExcitation(nn.Module):
    """A 3x3 convolution whose channels are weighted by a function of their means. It does not end in batch norm."""

    def __init__(self, channels: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels, affine=affine)
        self.squeeze = nn.Linear(channels, 2)
        self.excite = nn.Linear(2, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(torch.relu(x)))
        weights = self.excite(torch.relu(self.squeeze(x.mean((2, 3)))))
        return x * torch.sigmoid(weights)[:, :, None, None]


def separable_7x7(channels: int, stride: int, affine: bool) -> nn.Module:
    """Return a sequence that ends in batch norm."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(channels, channels, 7, stride, padding=3, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    )


class TwoKernels(nn.Module):
    """The sum of two convolutions and of the input, if it has the same size. It declares its last batch norm."""

    def __init__(self, channels: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.residual = stride == 1
        self.small = nn.Conv2d(channels, channels, 1, stride)
        self.large = nn.Conv2d(channels, channels, 3, stride, padding=1)
        self.norm = nn.BatchNorm2d(channels, affine=affine)

    @property
    def final_batchnorm(self) -> nn.BatchNorm2d:
        return self.norm

    def forward(self, x: Tensor) -> Tensor:
        out = self.small(x) + self.large(x)
        normalized: Tensor = self.norm(out + x if self.residual else out)
        return normalized


SE_CONV = Operation("se_conv_3x3", SqueezeAndExcitation, "#7a4b00")
SEPARABLE_7X7 = Operation("sep_conv_7x7", separable_7x7)
TWO_KERNELS = Operation("two_kernels", TwoKernels)
USER_OPERATIONS = (SE_CONV, SEPARABLE_7X7, TWO_KERNELS)


@contextmanager
def registered(*operations: Operation) -> Iterator[None]:
    """Return a context in which operations are registered as those of a plugin."""
    with registering_for(ORIGIN) as found:
        for operation in operations:
            register_operation(operation)
    try:
        yield
    finally:
        unregister(found)
