"""Candidate operations: their registry, and what an operation must fulfil.

Importing this module does not import torch, so that the command line starts quickly. The build functions of the
package's own operations import it when they are called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from istanas.errors import ConfigError
from istanas.registry import Registry

if TYPE_CHECKING:
    from torch import nn

OTHER_COLOUR = "#8a1c7c"  # dark enough to be read on white


@dataclass(frozen=True, eq=False)
class Operation:
    """A candidate operation of an edge.

    The module that `build` returns maps (B, C, H, W) to (B, C, ceil(H / stride), ceil(W / stride)) and does not change
    its input, because other operations read the same tensor. The input is not rectified.
    `istanas.nets.operations.check_operation` checks this on small tensors before the operation is first used.

    **Batch norm.** Networks add a batch norm to every operation that does not end in one, where they require it. An
    `nn.Sequential` ends in batch norm if its last layer does. Any other module can say so with an attribute or property
    `final_batchnorm` that is the `nn.BatchNorm2d` whose output is the module's output. The batch norms of an operation
    should take its `affine`, because in a two-stage search the edge weight is the scale.

    Args:
        name: Its name in `space.ops` and in genotypes: a letter followed by at most 63 letters, digits and underscores.
        build: Function (channels, stride, affine) -> module, with channels C >= 1, stride 1 or 2, and whether batch
            norms learn scale and shift.
        colour: Colour in drawings, as #rrggbb. Labels have the same colour, so it should be readable on white.
        is_skip: Whether the operation passes its input on, so that it counts in the ratio of skip connections.

    Raises:
        ConfigError: If the colour is not #rrggbb, or `build` is not a function.

    Example:
        >>> def average(channels, stride, affine):
        ...     from torch import nn
        ...     return nn.AvgPool2d(5, stride=stride, padding=2)
        >>> Operation("avg_pool_5x5", average).build(8, 2, True)
        AvgPool2d(kernel_size=5, stride=2, padding=2)
    """

    name: str
    build: Callable[[int, int, bool], nn.Module]
    colour: str = OTHER_COLOUR
    is_skip: bool = False

    def __post_init__(self) -> None:
        if not callable(self.build):
            raise ConfigError(
                f"{self.build!r:.60} is not a function",
                field=f"operation {self.name!r:.80}: build",
                remedy="give a function of channels, stride and affine that returns a module",
            )
        if not isinstance(self.colour, str) or re.fullmatch(r"#[0-9a-fA-F]{6}", self.colour) is None:
            raise ConfigError(
                f"{self.colour!r:.60} is not a colour",
                field=f"operation {self.name!r:.80}: colour",
                remedy="give one as #rrggbb",
            )


NONE = "none"
"""The operation without output, where a space has it. The DARTS space does not."""

OPERATIONS: Registry[Operation] = Registry("operation", "space.ops")
"""All operations that cells may name."""


def register_operation(operation: Operation) -> None:
    """Add an operation, so that `space.ops` and genotypes can name it.

    Args:
        operation: The operation.

    Raises:
        ConfigError: If its name is taken or invalid.
    """
    OPERATIONS.register(operation.name, operation)


def skip_ratio(names: Iterable[str]) -> float:
    """Return the fraction of skip connections among the names of at least one operation, in [0, 1].

    Names that are not registered count as other operations, because runs are read without their plugins, too.

    Example:
        >>> skip_ratio(["skip_connect", "sep_conv_3x3"])
        0.5
    """
    skips = [name in OPERATIONS and OPERATIONS[name].is_skip for name in names]
    return sum(skips) / len(skips)
