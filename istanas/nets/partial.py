"""Operations on a part of the channels: the other channels bypass them, and the channels are shuffled afterwards.

An edge computes the mixed operation on the first C / k of its C input channels. The remaining channels are passed on
unchanged, or max-pooled where the edge has stride 2. The following edges read other channels because of the shuffle.

Source:
    Xu et al., PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search, ICLR 2020.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from istanas.errors import ConfigError


def partial_width(channels: int, k: int) -> int:
    """Return the number of channels on which operations run, channels / k.

    Args:
        channels: Channels of an edge, >= 1.
        k: The operations run on 1 / k of them, >= 1.

    Raises:
        ConfigError: If k does not divide the number of channels.

    Example:
        >>> partial_width(16, 4)
        4
    """
    if channels % k != 0:
        raise ConfigError(
            f"an operation has {channels} channels, which cannot be divided into {k} equal parts",
            field="init_channels",
            remedy=f"choose a multiple of {k}",
        )
    return channels // k


def split(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the first C / k channels of x, (B, C, H, W), as a new tensor, and the others.

    The first part is contiguous, because all operations of an edge read it.
    """
    width = x.shape[1] // k
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    memory = torch.channels_last if is_last else torch.contiguous_format
    return x[:, :width].contiguous(memory_format=memory), x[:, width:]


def bypass(rest: Tensor, stride: int) -> Tensor:
    """Return the channels that no operation reads, in the size of the operations' output.

    Args:
        rest: (B, C - C / k, H, W).
        stride: 1, or 2 for 2x2 max pooling. Odd sizes are rounded up, as in the operations.
    """
    return rest if stride == 1 else F.max_pool2d(rest, 2, ceil_mode=True)


def join(mixed: Tensor, passed: Tensor, k: int) -> Tensor:
    """Concatenate the operations' output with the channels that bypassed them, and shuffle the channels."""
    return shuffle(torch.cat([mixed, passed], dim=1), k)


def shuffle(x: Tensor, k: int) -> Tensor:
    """Return the channels of k equal groups in turn: the first of each group, then the second of each, and so on.

    Args:
        x: (B, C, H, W), where k divides C.
        k: Number of groups, >= 1.

    Example:
        >>> shuffle(torch.arange(6.0).view(1, 6, 1, 1), 2).flatten().tolist()
        [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    """
    batch, channels, height, width = x.shape
    # With the channels last, because torch.channel_shuffle would convert the layout of the networks' tensors.
    groups = x.permute(0, 2, 3, 1).reshape(batch, height, width, k, channels // k)
    return groups.transpose(3, 4).reshape(batch, height, width, channels).permute(0, 3, 1, 2)


class PartialStates:
    """The states of a cell, divided into the channels that operations read and those that bypass them.

    A node is the sum of its edges. The shuffle is the same on every edge, so that it is done once for each node.

    Args:
        states: The inputs of the cell. Other states are added with `add`.
        k: The operations run on 1 / k of the channels, >= 1.
        input_stride: The stride of the edges from these inputs, 1 or 2.
    """

    def __init__(self, states: Mapping[int, Tensor], k: int, input_stride: int) -> None:
        self._k = k
        self.first: dict[int, Tensor] = {}
        self._passed: dict[int, Tensor] = {}
        for state, x in states.items():
            self.add(state, x, input_stride)

    def add(self, state: int, x: Tensor, stride: int = 1) -> None:
        """Add a state, given the stride of the edges that read it."""
        self.first[state], rest = split(x, self._k)
        self._passed[state] = bypass(rest, stride)

    def join(self, mixed: Tensor, edges: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Return a node: the sum of its operations' outputs beside the sum of what bypassed them.

        Args:
            mixed: Sum of the weighted outputs of the node's operations, (B, C / k, H, W).
            edges: For each operation the state that it reads, and its edge weight. What bypasses an edge is multiplied
                by the sum of the weights of its operations, which is the weight of the edge.
        """
        totals: dict[int, Tensor] = {}
        for state, weight in edges:
            totals[state] = totals[state] + weight if state in totals else weight
        passed = [weight * self._passed[state] for state, weight in totals.items()]
        return join(mixed, functools.reduce(operator.add, passed), self._k)
