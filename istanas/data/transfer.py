"""Copies of decoded batches to a GPU on a stream of their own, beside the training on the default stream.

A copy on the stream of the training would begin only after the step that is already queued there. On a side stream, it
runs during that step, so that the next step finds its pictures on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from istanas.data.augmentation import send


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return a new stream for copies to a GPU; None for a CPU, which needs no copies."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def copy_on_side_stream(
    tensors: Sequence[Tensor], device: torch.device, stream: torch.cuda.Stream | None
) -> tuple[Tensor, ...]:
    """Copy tensors to a device on a side stream, and let the current stream wait for the copies.

    The process itself does not wait.

    Args:
        tensors: Tensors on the CPU, preferably in pinned memory.
        device: The target device.
        stream: See `side_stream`.

    Returns:
        The tensors on the device, for use on its current stream.

    Example:
        >>> here = torch.zeros(2)
        >>> copy_on_side_stream([here], torch.device("cpu"), None)[0] is here
        True
    """
    if stream is None:
        return tuple(send(tensor, device) for tensor in tensors)
    with torch.cuda.stream(stream):
        copies = tuple(send(tensor, device) for tensor in tensors)
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    for copy in copies:
        # Its memory belongs to the side stream, which might otherwise use it again.
        copy.record_stream(current)
    return copies
