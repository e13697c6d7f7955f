"""The network of NAS-Bench-201 (Dong and Yang, ICLR 2020): stages of equal cells, and residual blocks between them.

The network is written once for the search and for training, with a `Choice` on each edge of each cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from istanas.nets.operations import RectifiedBlock, ScaledBatchNorm2d, Zero
from istanas.nets.skeleton import check_sizes
from istanas.nets.target import sum_terms
from istanas.space.base import NetworkSize
from istanas.space.choice import Choose
from istanas.space.nas_bench_201 import EDGES, KIND, N_NODES, N_STAGES, cells_per_stage


class ConvBlock(RectifiedBlock):
    """ReLU, convolution and batch norm.

    Args:
        c_in: Channels of the input.
        c_out: Channels of the output.
        kernel: Side of the convolution, an odd number.
        stride: 1 or 2.
        affine: Whether the batch norm learns scale and shift.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, *, affine: bool = True) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2, bias=False),
            ScaledBatchNorm2d(c_out, affine=affine),
        )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, which double the width and halve the picture, beside a shortcut.

    The shortcut is an average pooling of stride 2, then a 1x1 convolution without batch norm. Odd sizes are rounded up
    by both paths.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(ConvBlock(c_in, c_out, 3, 2), ConvBlock(c_out, c_out, 3))
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(2, stride=2, ceil_mode=True), nn.Conv2d(c_in, c_out, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shortcut(x) + self.convolutions(x)
        return out


class NasBench201Cell(nn.Module):
    """A cell: every node but the input is the sum of its incoming edges."""

    def __init__(self, channels: int, choose: Choose) -> None:
        super().__init__()
        self.edges = nn.ModuleList(
            choose.operation(KIND, index, channels, make=make_operation) for index in range(len(EDGES))
        )

    def forward(self, x: Tensor) -> Tensor:
        states = [x]
        for node in range(1, N_NODES):
            terms = [
                edge(states[source])
                for edge, (source, end) in zip(self.edges, EDGES, strict=True)
                if end == node
            ]
            states.append(sum_terms(terms))
        return states[-1]


class NasBench201Network(nn.Module):
    """Stem, three stages of N cells with residual blocks of stride 2 between them, and classifier.

    Args:
        size: The size of the network, of 3 N + 2 layers.
        choose: Creates the module of an edge, see `istanas.space.choice.Choose`.

    Raises:
        ConfigError: If a size is too small.
    """

    def __init__(self, size: NetworkSize, choose: Choose) -> None:
        super().__init__()
        check_sizes(
            init_channels=size.init_channels, num_classes=size.num_classes, in_channels=size.in_channels
        )
        n_cells = cells_per_stage(size.layers)
        assert n_cells is not None, "checked by the space"
        channels = size.init_channels
        self.stem = nn.Sequential(
            nn.Conv2d(size.in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        )
        layers: list[nn.Module] = []
        for stage in range(N_STAGES):
            if stage > 0:
                layers.append(ResidualBlock(channels, 2 * channels))
                channels *= 2
            layers += [NasBench201Cell(channels, choose) for _ in range(n_cells)]
        self.layers = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, size.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.layers(self.stem(x))))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


def make_operation(name: str, channels: int, stride: int = 1, affine: bool = True) -> nn.Module:
    """Return an operation of the benchmark, of stride 1 and without a change of width.

    Args:
        name: A name in `istanas.space.nas_bench_201.OPERATIONS`.
        channels: Channels of the input and of the output.
        stride: 1.
        affine: Whether batch norms learn scale and shift.

    Raises:
        KeyError: If the name is unknown. The space checks it earlier.

    Example:
        >>> import torch
        >>> make_operation("nor_conv_3x3", 4, affine=True)(torch.zeros(1, 4, 8, 8)).shape
        torch.Size([1, 4, 8, 8])
    """
    if name in _KERNELS:
        return ConvBlock(channels, channels, _KERNELS[name], affine=affine)
    return _WITHOUT_WEIGHTS[name]()


_KERNELS = {"nor_conv_1x1": 1, "nor_conv_3x3": 3}
_WITHOUT_WEIGHTS: Mapping[str, Callable[[], nn.Module]] = {
    "none": Zero,
    "skip_connect": nn.Identity,
    "avg_pool_3x3": lambda: nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
}
