"""Names of the candidate operations, in the order of the published code and of every sparse code."""

from typing import Literal, get_args

Primitive = Literal[
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
]

PRIMITIVES: tuple[Primitive, ...] = get_args(Primitive)

SKIP = "skip_connect"

NONE = "none"
"""The operation without output, where a space has it. The DARTS space does not."""
