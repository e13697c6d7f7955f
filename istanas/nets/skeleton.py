"""The parts that supernet and target network share: stems, the sequence of cells, liveness, and the heads."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from istanas.checks import check_stem
from istanas.errors import CheckpointError, ConfigError
from istanas.limits import MIN_IMAGE_SIZE
from istanas.nets.operations import FactorizedReduce, ReLUConvBN
from istanas.space import N_CELL_INPUTS

STEM_MULTIPLIER = 3

Preprocess: TypeAlias = ReLUConvBN | FactorizedReduce


@dataclass(frozen=True)
class CellPlace:
    """The position of a cell in the network: its kind, its width, and the widths of its two inputs."""

    kind: str  # "normal" or "reduce".
    c_prev_prev: int
    c_prev: int
    channels: int
    reduction_prev: bool

    @property
    def stride(self) -> int:
        """The stride of the edges from the cell's two inputs."""
        return 2 if self.kind == "reduce" else 1


def cell_places(init_channels: int, layers: int, stem: str, n_concat: Mapping[str, int]) -> list[CellPlace]:
    """Return the cells from input to output. Reductions at a third and two thirds of the depth double the width.

    Args:
        init_channels: Channels of the first cells' nodes, >= 1.
        layers: Number of cells, >= 1.
        stem: "cifar" or "imagenet".
        n_concat: For "normal" and "reduce", the number of states that a cell's output concatenates.

    Raises:
        ConfigError: If a size is too small or the stem is unknown.

    Example:
        >>> [p.channels for p in cell_places(16, 3, "cifar", {"normal": 4, "reduce": 4})]
        [16, 32, 64]
    """
    check_sizes(init_channels=init_channels, layers=layers)
    check_stem(stem, init_channels)
    width = STEM_MULTIPLIER * init_channels if stem == "cifar" else init_channels
    c_prev_prev = c_prev = width
    channels = init_channels
    reduction_prev = stem == "imagenet"  # The second output of this stem is half as large as the first.
    places = []
    for layer in range(layers):
        kind = "reduce" if layer in (layers // 3, 2 * layers // 3) else "normal"
        channels *= 2 if kind == "reduce" else 1
        places.append(CellPlace(kind, c_prev_prev, c_prev, channels, reduction_prev))
        reduction_prev = kind == "reduce"
        c_prev_prev, c_prev = c_prev, n_concat[kind] * channels
    return places


def live_states(reads: Sequence[Iterable[int]], concat: Iterable[int]) -> frozenset[int]:
    """Return the live states of a cell: those on which its output depends. The others are not computed.

    Args:
        reads: For each node, the states that its operations read; 0 and 1 are the cell's inputs, and 2 + i is node i.
        concat: The states that the output concatenates.

    Example:
        >>> sorted(live_states([[0], [1], [2, 2]], concat=[4]))  # no operation reads node 1 (state 3)
        [0, 2, 4]
    """
    live = set(concat)
    for node in reversed(range(len(reads))):
        if N_CELL_INPUTS + node in live:
            live.update(reads[node])
    return frozenset(live)


def live_places(
    kinds: Sequence[str], states: Mapping[str, Collection[int]], auxiliary: int | None = None
) -> tuple[bool, ...]:
    """Return on which outputs of the stem and on which cells the network's output depends.

    Cell i reads the places i and i + 1 of [stem s0, stem s1, cell 0, ..., cell L - 1], if its inputs 0 and 1 are live.

    Args:
        kinds: The kinds of the L >= 1 cells, from input to output.
        states: For each kind, the live states of its cells, see `live_states`.
        auxiliary: Index of the cell whose output the auxiliary head reads, or `None`.

    Returns:
        L + 2 booleans, one per place.

    Example:
        >>> live_places(["normal", "reduce", "normal"], {"normal": [0, 2], "reduce": [0, 1, 2]})
        (True, False, True, False, True)
    """
    live = [False] * (len(kinds) + N_CELL_INPUTS)
    live[-1] = True
    if auxiliary is not None:
        live[N_CELL_INPUTS + auxiliary] = True
    for cell in reversed(range(len(kinds))):
        if live[N_CELL_INPUTS + cell]:
            for state in range(N_CELL_INPUTS):
                live[cell + state] |= state in states[kinds[cell]]
    return tuple(live)


def check_sizes(**sizes: int) -> None:
    """Check that sizes are at least 1.

    Raises:
        ConfigError: If a size is below 1. Its field is the first such name.

    Example:
        >>> check_sizes(num_classes=10, in_channels=1)
    """
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{size} is too small", field=name, remedy="choose at least 1")


def make_preprocess(place: CellPlace, affine: bool) -> tuple[Preprocess, Preprocess]:
    """Return the blocks that bring a cell's two inputs to its width and size."""
    first: Preprocess
    if place.reduction_prev:
        first = FactorizedReduce(place.c_prev_prev, place.channels, affine)
    else:
        first = ReLUConvBN(place.c_prev_prev, place.channels, affine)
    return first, ReLUConvBN(place.c_prev, place.channels, affine)


def live_inputs(
    preprocess: Sequence[Preprocess], inputs: Sequence[Tensor | None], live: Collection[int]
) -> dict[int, Tensor]:
    """Return the live inputs of a cell, converted to its width and size. The given `inputs` are rectified."""
    return {i: preprocess[i].after_relu(s) for i, s in enumerate(inputs) if s is not None and i in live}


class Stem(nn.Module):
    """First layers, which map a picture to the two inputs of the first cell. The inputs of all cells are rectified.

    The stem has one convolution (cifar), or three of stride 2 (imagenet).
    """

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

    def forward(self, x: Tensor, second: bool = True) -> tuple[Tensor, Tensor | None]:
        """Return the inputs (s0, s1). Without `second`, s1 is not needed and may be `None`."""
        if self.kind == "cifar":
            x = F.relu_(self.stem(x))
            return x, x
        x = F.relu_(self.stem0(x))
        return x, F.relu_(self.stem1(x)) if second else None

    def live_parts(self, second: bool) -> list[nn.Module]:
        """Return the modules that `forward` runs."""
        if self.kind == "cifar":
            return [self.stem]
        return [self.stem0, self.stem1] if second else [self.stem0]


class AuxiliaryHead(nn.Module):
    """A second classifier at two thirds of the depth (DARTS), whose loss is added with a small weight in training.

    It was published for feature maps of 8x8 (cifar) and 7x7 (imagenet), which its pooling reduces to 2x2. Smaller maps
    are pooled to 2x2 adaptively, and larger ones are averaged after the convolutions, so that all pictures of at least
    8x8 pixels work.
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
        # The published ImageNet head has no last batch norm, and published weights must load.
        layers += [nn.BatchNorm2d(768), nn.ReLU()] if stem == "cifar" else [nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        smallest = 5 + self.pool_stride  # Pooling leaves 2 pixels, which the 2x2 convolution requires.
        for i, layer in enumerate(self.features):
            if i == 1 and min(x.shape[2:]) < smallest:
                x = F.adaptive_avg_pool2d(x, 2)
            elif isinstance(layer, nn.BatchNorm2d) and layer.training and x.numel() == x.shape[1]:
                # One picture of one pixel has no variance.
                x = F.batch_norm(
                    x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps
                )
            else:
                x = layer(x)
        out: Tensor = self.classifier(x.mean((2, 3)))
        return out


class CellNetwork(nn.Module):
    """Stem, cells and classifier: the forward pass that both networks share.

    Only live parts run: those on which the outputs depend. The others get no gradient, so data-parallel training must
    not wait for one. The auxiliary head is an output only in training.

    The outputs of the stem and of all cells but the last are rectified in place: both cells that read such an output,
    and the auxiliary head, begin with ReLU.

    With `activation_checkpointing` a training step stores only the inputs of each cell, and computes the cell again in
    the backward pass. This takes less memory and more time, and gives the same numbers.
    """

    stem: Stem
    cells: nn.ModuleList
    classifier: nn.Linear
    auxiliary_head: AuxiliaryHead | None
    activation_checkpointing: bool = False
    _live_in_training: tuple[bool, ...] = ()  # See `live_places`.
    _live_in_eval: tuple[bool, ...] = ()
    _live_parts: Sequence[nn.Module] = ()
    _live_norms: dict[nn.Module, Sequence[_BatchNorm]]  # The batch norms of each live cell.
    _active_parameters: Sequence[nn.Parameter] = ()
    _contents: dict[nn.Module, tuple[Sequence[nn.Parameter], Sequence[_BatchNorm]]]

    def active_parameters(self) -> list[nn.Parameter]:
        """Return the weights that get a gradient in a training step."""
        return list(self._active_parameters)

    def active_buffers(self) -> list[Tensor]:
        """Return the running statistics that a training step changes: the live parts' floating-point buffers."""
        # Not stored, because moving a network to another device or type replaces its buffers.
        return [b for part in self._live_parts for b in part.buffers() if b.is_floating_point()]

    def _set_live(self, states: Mapping[str, Collection[int]]) -> None:
        """Set the live parts from each kind's live states."""
        kinds = [str(cell.kind) for cell in self.cells]
        self._live_in_training = self._live_in_eval = live_places(kinds, states)
        if self.auxiliary_head is not None:
            self._live_in_training = live_places(kinds, states, auxiliary_position(len(kinds)))
        parts = [*self.stem.live_parts(second=self._live_in_training[1]), self.classifier]
        if self.auxiliary_head is not None:
            parts.append(self.auxiliary_head)
        self._live_norms = {}
        for cell in self._live_cells():
            preprocess: list[Any] = [cell.preprocess0, cell.preprocess1]
            inside = [part for i, part in enumerate(preprocess) if i in states[str(cell.kind)]]
            inside += self._live_operations(cell)
            self._live_norms[cell] = [norm for part in inside for norm in self._inside(part)[1]]
            parts += inside
        self._live_parts = parts
        self._active_parameters = [p for part in parts for p in self._inside(part)[0] if p.requires_grad]

    def _inside(self, part: nn.Module) -> tuple[Sequence[nn.Parameter], Sequence[_BatchNorm]]:
        """Return the parameters and the batch norms of a part.

        They are remembered, because some searches choose other parts in every step, and torch's traversal of the
        modules would take milliseconds.
        """
        known = self.__dict__.setdefault("_contents", {})
        if part not in known:
            # Operations of plugins may have batch norms of any dimension, with or without running statistics.
            norms = [m for m in part.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
            known[part] = list(part.parameters()), norms
        found: tuple[Sequence[nn.Parameter], Sequence[_BatchNorm]] = known[part]
        return found

    def _live_cells(self) -> list[nn.Module]:
        live = self._live_in_training[N_CELL_INPUTS:]
        return [cell for cell, is_live in zip(self.cells, live, strict=True) if is_live]

    def _live_operations(self, cell: nn.Module) -> list[nn.Module]:
        """Return the operations that a live cell runs."""
        raise NotImplementedError

    def _logits(
        self, x: Tensor, cell_arguments: Mapping[str, tuple[Any, ...]]
    ) -> tuple[Tensor, Tensor | None]:
        if min(x.shape[2:]) < MIN_IMAGE_SIZE:
            raise ConfigError(
                f"pictures of {x.shape[2]}x{x.shape[3]} pixels are smaller than {MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE}",
                field="x",
                remedy="enlarge them with data.image_size",
            )
        live = self._live_in_training if self.training else self._live_in_eval
        s0, s1 = self.stem(x, second=live[1])
        auxiliary = None
        for i, cell in enumerate(self.cells):
            is_live = live[N_CELL_INPUTS + i]
            s0, s1 = s1, self._run(cell, s0, s1, *cell_arguments[str(cell.kind)]) if is_live else None
            if s1 is not None and i + 1 < len(self.cells):
                s1 = F.relu_(s1)
            if self.training and self.auxiliary_head is not None and i == auxiliary_position(len(self.cells)):
                auxiliary = self.auxiliary_head(s1)
        return self.classifier(s1.mean((2, 3))), auxiliary

    def _run(self, cell: nn.Module, *arguments: Any) -> Tensor:
        """Run a cell, with checkpointing if it is enabled."""
        out: Tensor
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            out = checkpointed(cell, self._live_norms[cell], *arguments)
        else:
            out = cell(*arguments)
        return out

    def load_darts_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load weights in the key layout of the published DARTS-family code.

        Every tensor must exist and have the right shape, except that `num_batches_tracked` may be missing.

        Args:
            state: Name -> tensor, as `torch.load(FILE, weights_only=True)` returns it.

        Raises:
            CheckpointError: If a tensor is missing, unexpected, or of another shape. The network is then unchanged.
        """
        own = self.state_dict()
        renamed: dict[str, Tensor] = {}
        for key, value in state.items():
            alphas = re.fullmatch(r"alphas_(normal|reduce)_", key)
            if alphas:  # One tensor (nodes, m) in the published code, one parameter per node here.
                renamed.update({f"compressed_alphas.{alphas[1]}.{i}": b for i, b in enumerate(value)})
            else:
                renamed[_own_key(key, self.stem.kind)] = value
        missing = [k for k in own if k not in renamed and not k.endswith("num_batches_tracked")]
        unexpected = [k for k in renamed if k not in own]
        shapes = [k for k in renamed if k in own and renamed[k].shape != own[k].shape]
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
            if keys:
                raise CheckpointError(
                    f"{keys[0]} is {what} ({len(keys)} such keys)",
                    field="state",
                    remedy="build the network with the settings that the weights were trained with",
                )
        self.load_state_dict(renamed, strict=False)


def checkpointed(function: Callable[..., Any], norms: Sequence[_BatchNorm], *arguments: Any) -> Any:
    """Call a function that is called again in the backward pass, instead of storing its activations.

    Args:
        function: The function, such as a module.
        norms: The batch norms that it runs, whose running statistics change only in the first call.
        arguments: Its arguments.
    """
    contexts = nullcontext(), UnchangedStatistics(norms)
    return checkpoint(function, *arguments, use_reentrant=False, context_fn=lambda: contexts)


class UnchangedStatistics:
    """A context in which batch norms in training mode do not change their running statistics and batch counts.

    It is used when a forward pass is repeated, or measures with the statistics of the batch. The running statistics are
    still passed to torch, because its graph must store the same tensors as in the first pass. With momentum 0, torch
    writes the same values back.
    """

    def __init__(self, norms: Sequence[_BatchNorm]) -> None:
        self._norms = norms

    def __enter__(self) -> None:
        self._before = [(norm.momentum, norm.num_batches_tracked) for norm in self._norms]
        for norm in self._norms:
            norm.momentum = 0.0
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked = torch.zeros_like(norm.num_batches_tracked)  # Discarded.

    def __exit__(self, *error: object) -> None:
        for norm, (momentum, n_batches) in zip(self._norms, self._before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, n_batches


def auxiliary_position(layers: int) -> int:
    """Return the index of the cell whose output the auxiliary head reads."""
    return 2 * layers // 3


def _own_key(key: str, stem: str) -> str:
    key = re.sub(r"\._ops\.(\d+)\._ops\.", r".ops.\1.", key).replace("._ops.", ".ops.")
    return re.sub(r"^(stem[01]?)\.", r"stem.\1.", key)


def to_channels_last(module: nn.Module) -> nn.Module:
    """Move 4-d parameters to channels-last memory, which makes training steps on CPUs 1.6 to 1.8 times faster.

    Args:
        module: Any module. It is changed in place.

    Returns:
        The module.

    Example:
        >>> to_channels_last(nn.Conv2d(4, 4, 3)).weight.is_contiguous(memory_format=torch.channels_last)
        True
    """
    return module.to(memory_format=torch.channels_last)
