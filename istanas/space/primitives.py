"""The seven published operations, in the order of the published code and of every sparse code."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from istanas.space.operations import Operation, register_operation

if TYPE_CHECKING:
    from torch import nn

    Build = Callable[[int, int, bool], nn.Module]

# The colours are dark enough to be read on white. Readers without colour vision can use the labels.
_POOL, _SKIP, _SEPARABLE, _DILATED = "#1b7a3d", "#555555", "#0b5fa5", "#b3400e"


def _max_pool(channels: int, stride: int, affine: bool) -> nn.Module:
    from torch import nn

    return nn.MaxPool2d(3, stride=stride, padding=1)


def _avg_pool(channels: int, stride: int, affine: bool) -> nn.Module:
    from torch import nn

    return nn.AvgPool2d(3, stride=stride, padding=1, count_include_pad=False)


def _skip(channels: int, stride: int, affine: bool) -> nn.Module:
    from torch import nn

    from istanas.nets.operations import FactorizedReduce

    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)


def _separable(kernel: int) -> Build:
    def build(channels: int, stride: int, affine: bool) -> nn.Module:
        from istanas.nets.operations import SepConv

        return SepConv(channels, kernel, stride, affine)

    return build


def _dilated(kernel: int) -> Build:
    def build(channels: int, stride: int, affine: bool) -> nn.Module:
        from istanas.nets.operations import DilConv

        return DilConv(channels, kernel, stride, affine)

    return build


_PUBLISHED = (
    Operation("max_pool_3x3", _max_pool, _POOL),
    Operation("avg_pool_3x3", _avg_pool, _POOL),
    Operation("skip_connect", _skip, _SKIP, is_skip=True),
    Operation("sep_conv_3x3", _separable(3), _SEPARABLE),
    Operation("sep_conv_5x5", _separable(5), _SEPARABLE),
    Operation("dil_conv_3x3", _dilated(3), _DILATED),
    Operation("dil_conv_5x5", _dilated(5), _DILATED),
)
for _operation in _PUBLISHED:
    register_operation(_operation)

PRIMITIVES: tuple[str, ...] = tuple(operation.name for operation in _PUBLISHED)
"""The default of `space.ops`. It stays the same when other operations are registered, so that no run's hash changes."""
