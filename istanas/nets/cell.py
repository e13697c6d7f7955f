"""What supernet and target network share: stems, the layout of cells in depth, and the heads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from istanas.errors import CheckpointError, ConfigError
from istanas.nets.operations import FactorizedReduce, ReLUConvBN

MIN_IMAGE_SIZE = 8
STEM_MULTIPLIER = 3


@dataclass(frozen=True)
class CellPlace:
    """Where a cell stands: its kind, width, and the widths of its two inputs."""

    kind: str  # "normal" or "reduce"
    c_prev_prev: int
    c_prev: int
    channels: int
    reduction_prev: bool

    @property
    def stride(self) -> int:
        """Stride of the edges that leave the cell's two inputs."""
        return 2 if self.kind == "reduce" else 1


def cell_places(init_channels: int, layers: int, stem: str, n_concat: Mapping[str, int]) -> list[CellPlace]:
    """The cells from input to output: reductions at a third and two thirds of the depth double the width.

    Args:
        init_channels: channels of the first cells' nodes, >= 1.
        layers: number of cells, >= 1.
        stem: "cifar" or "imagenet".
        n_concat: for "normal" and "reduce", how many states a cell's output concatenates.

    Example:
        >>> [p.channels for p in cell_places(16, 3, "cifar", {"normal": 4, "reduce": 4})]
        [16, 32, 64]
    """
    if init_channels < 1 or layers < 1:
        raise ConfigError(f"init_channels, layers are {init_channels}, {layers}: both must be at least 1")
    if stem not in ("cifar", "imagenet"):
        raise ConfigError(f"stem is {stem!r}: choose cifar or imagenet")
    if stem == "imagenet" and init_channels < 2:
        raise ConfigError(f"init_channels is {init_channels}: the imagenet stem halves it, choose at least 2")
    width = STEM_MULTIPLIER * init_channels if stem == "cifar" else init_channels
    c_prev_prev = c_prev = width
    channels = init_channels
    reduction_prev = stem == "imagenet"  # its second stem halves the picture once more
    places = []
    for layer in range(layers):
        kind = "reduce" if layer in (layers // 3, 2 * layers // 3) else "normal"
        channels *= 2 if kind == "reduce" else 1
        places.append(CellPlace(kind, c_prev_prev, c_prev, channels, reduction_prev))
        reduction_prev = kind == "reduce"
        c_prev_prev, c_prev = c_prev, n_concat[kind] * channels
    return places


def check_sizes(**sizes: int) -> None:
    """Refuse a size below 1, by its name.

    Raises:
        ConfigError: naming the first such size.

    Example:
        >>> check_sizes(num_classes=10, in_channels=1)
    """
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} is {size}: choose at least 1")


def make_preprocess(place: CellPlace, affine: bool) -> tuple[nn.Module, nn.Module]:
    """The blocks that bring a cell's two inputs to its width and size."""
    first: nn.Module
    if place.reduction_prev:
        first = FactorizedReduce(place.c_prev_prev, place.channels, affine)
    else:
        first = ReLUConvBN(place.c_prev_prev, place.channels, affine)
    return first, ReLUConvBN(place.c_prev, place.channels, affine)


class Stem(nn.Module):
    """From a picture to the two inputs of the first cell: one convolution (cifar), or three of stride 2 (imagenet)."""

    def __init__(self, kind: str, in_channels: int, init_channels: int) -> None:
        super().__init__()
        self.kind = kind
        c = init_channels
        if kind == "cifar":
            self.stem = nn.Sequential(
                nn.Conv2d(in_channels, STEM_MULTIPLIER * c, 3, padding=1, bias=False),
                nn.BatchNorm2d(STEM_MULTIPLIER * c),
            )
        else:
            self.stem0 = nn.Sequential(
                nn.Conv2d(in_channels, c // 2, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(c // 2),
                nn.ReLU(),
                nn.Conv2d(c // 2, c, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(c),
            )
            self.stem1 = nn.Sequential(
                nn.ReLU(), nn.Conv2d(c, c, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(c)
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "cifar":
            x = self.stem(x)
            return x, x
        x = self.stem0(x)
        return x, self.stem1(x)


class AuxiliaryHead(nn.Module):
    """A second classifier at two thirds of the depth (DARTS); its loss is added with a small weight in training.

    Published for feature maps of 8x8 (cifar) and 7x7 (imagenet), where its pooling gives 2x2. Smaller maps are
    pooled to 2x2 adaptively, and larger ones averaged after the convolutions, so that any picture from
    8x8 upwards works.
    """

    def __init__(self, stem: str, channels: int, num_classes: int) -> None:
        super().__init__()
        self.pool_stride = 3 if stem == "cifar" else 2
        layers: list[nn.Module] = [
            nn.ReLU(),
            nn.AvgPool2d(5, stride=self.pool_stride, count_include_pad=False),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
        ]
        # The published ImageNet head lacks the last batch norm; weights are only comparable without it.
        layers += [nn.BatchNorm2d(768), nn.ReLU()] if stem == "cifar" else [nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        smallest = 5 + self.pool_stride  # gives 2 pixels after pooling, what the 2x2 convolution needs
        for i, layer in enumerate(self.features):
            if i == 1 and min(x.shape[2:]) < smallest:
                x = F.adaptive_avg_pool2d(x, 2)
            elif isinstance(layer, nn.BatchNorm2d) and layer.training and x.numel() == x.shape[1]:
                # A last batch of one picture has no variance over its one pixel.
                x = F.batch_norm(
                    x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps
                )
            else:
                x = layer(x)
        out: Tensor = self.classifier(x.mean((2, 3)))
        return out


class CellNetwork(nn.Module):
    """Stem, cells and classifier: the part of forward that both networks have in common."""

    stem: Stem
    cells: nn.ModuleList
    classifier: nn.Linear
    auxiliary_head: AuxiliaryHead | None

    def _logits(
        self, x: Tensor, cell_arguments: Mapping[str, tuple[Any, ...]]
    ) -> tuple[Tensor, Tensor | None]:
        if min(x.shape[2:]) < MIN_IMAGE_SIZE:
            raise ConfigError(
                f"pictures are {x.shape[2]}x{x.shape[3]}: the networks need {MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE} or more, "
                "enlarge them with data.image_size"
            )
        s0, s1 = self.stem(x)
        auxiliary = None
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, *cell_arguments[str(cell.kind)])
            if self.training and self.auxiliary_head is not None and i == auxiliary_position(len(self.cells)):
                auxiliary = self.auxiliary_head(s1)
        return self.classifier(s1.mean((2, 3))), auxiliary

    def load_darts_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load weights in the key layout of the published DARTS-family code.

        Strict: every tensor must have its place and shape, but `num_batches_tracked` may be absent.

        Args:
            state: name -> tensor, as `torch.load(FILE, weights_only=True)` gives it.

        Raises:
            CheckpointError: naming what is missing, unexpected, or of another shape.
        """
        own = self.state_dict()
        renamed = {_own_key(key, self.stem.kind): value for key, value in state.items()}
        missing = [k for k in own if k not in renamed and not k.endswith("num_batches_tracked")]
        unexpected = [k for k in renamed if k not in own]
        shapes = [k for k in renamed if k in own and renamed[k].shape != own[k].shape]
        for what, keys in (
            ("lacks", missing),
            ("has the unexpected", unexpected),
            ("has another shape for", shapes),
        ):
            if keys:
                raise CheckpointError(
                    f"state dict {what} {keys[0]} ({len(keys)} such keys): build the network with the settings "
                    "the weights were trained with"
                )
        self.load_state_dict(renamed, strict=False)


def auxiliary_position(layers: int) -> int:
    """Index of the cell whose output feeds the auxiliary head."""
    return 2 * layers // 3


def _own_key(key: str, stem: str) -> str:
    key = re.sub(r"\._ops\.(\d+)\._ops\.", r".ops.\1.", key).replace("._ops.", ".ops.")
    key = re.sub(r"^alphas_(normal|reduce)_$", r"compressed_alphas.\1", key)
    return re.sub(r"^(stem[01]?)\.", r"stem.\1.", key)


def to_channels_last(module: nn.Module) -> nn.Module:
    """The module with 4-d parameters in channels-last memory: 1.6 to 1.8 times faster training steps on CPUs."""
    return module.to(memory_format=torch.channels_last)
