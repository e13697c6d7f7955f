"""Measurement of any architecture with the shared weights of a search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from istanas.search.base import Choosing, Search
from istanas.search.sampled import Supports
from istanas.training import Metrics

Statistics = Literal["running", "batch", "recalibrated"]
STATISTICS: tuple[Statistics, ...] = get_args(Statistics)


def measure_with_shared_weights(
    search: Search[Any], supports: Supports, choosing: Choosing, *, calibration_batches: int
) -> Iterator[tuple[Statistics, Metrics]]:
    """Yield loss and accuracies of an architecture in a search's network, with each kind of batch-norm statistics.

    All edges have the weight 1, and the alphas have no influence. The weights do not change.

    Args:
        search: A search with a network that all architectures share. Afterwards, its network computes this
            architecture.
        supports: The candidates of the architecture.
        choosing: The pictures.
        calibration_batches: Number of training batches for "recalibrated", >= 1.

    Yields:
        running: With the running statistics, which belong to all architectures that were trained.
        batch: With the mean and variance of each batch.
        recalibrated: With the statistics of this architecture over training batches.

    Source:
        Bender et al., Understanding and Simplifying One-Shot Architecture Search, ICML 2018 (batch statistics); Guo et
        al., Single Path One-Shot Neural Architecture Search, ECCV 2020 (recalibration).
    """

    def unit_weights(kind: str, alphas: Sequence[Tensor]) -> list[Tensor]:
        like = next(p for p in search.supernet.parameters() if p.is_floating_point())
        return [torch.ones(len(support), device=like.device, dtype=like.dtype) for support in supports[kind]]

    search.supernet.install(supports, unit_weights)
    saved = {name: buffer.clone() for name, buffer in search.supernet.named_buffers()}
    try:
        yield "running", search.validate(choosing.pictures(None))
        yield "batch", search.validate(choosing.pictures(None), batch_statistics=True)
        search.recalibrate(islice(choosing.training(), calibration_batches))
        yield "recalibrated", search.validate(choosing.pictures(None))
    finally:
        for name, buffer in search.supernet.named_buffers():
            buffer.copy_(saved[name])
