"""Stratified splits: subsets in which every class keeps its share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from istanas.errors import ConfigError


def stratified_split(labels: Tensor | Sequence[int], fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split the indices in two so that each class is split in the same proportion.

    The second part has round(fraction N) pictures. Class c gives floor(q_c) or floor(q_c) + 1 of its pictures, where
    q_c = fraction n_c. The classes with the largest remainders give one more.

    Args:
        labels: (N,) integers.
        fraction: Share of the second part, in [0, 1].
        seed: Seed of the draw within each class.

    Returns:
        (rest, part): sorted int64 indices, disjoint, together 0..N-1.

    Raises:
        ConfigError: If the fraction is outside [0, 1].

    Example:
        >>> rest, part = stratified_split([0, 0, 0, 0, 1, 1], 0.5, seed=0)
        >>> len(rest), sorted([0, 0, 0, 0, 1, 1][i] for i in part)
        (3, [0, 0, 1])
    """
    if not 0 <= fraction <= 1:
        raise ConfigError(
            f"{fraction} is not a share of a data set", field="fraction", remedy="use a number in [0, 1]"
        )
    labels = torch.as_tensor(labels, dtype=torch.int64)
    part = _stratified_part(labels, fraction, round(fraction * labels.numel()), seed)
    return part.logical_not().nonzero()[:, 0], part.nonzero()[:, 0]


def stratified_subset(labels: Tensor | Sequence[int], count: int, seed: int) -> Tensor:
    """Choose `count` pictures so that each class keeps its share.

    Args:
        labels: (N,) integers.
        count: Number of pictures, >= 1; N or more selects all.
        seed: Seed of the draw within each class.

    Returns:
        (min(count, N),) sorted int64 indices.

    Raises:
        ConfigError: If the count is below 1.

    Example:
        >>> stratified_subset([0] * 6 + [1] * 4, 5, seed=0).lt(6).sum().item()
        3
    """
    if count < 1:
        raise ConfigError(f"{count} pictures are too few", field="count", remedy="use 1 or more")
    labels = torch.as_tensor(labels, dtype=torch.int64)
    count = min(count, labels.numel())
    return _stratified_part(labels, count / max(labels.numel(), 1), count, seed).nonzero()[:, 0]


def _stratified_part(labels: Tensor, fraction: float, total: int, seed: int) -> Tensor:
    """Return a mask (N,) of `total` indices that has the share `fraction` of each class to within one picture."""
    sizes = torch.bincount(labels)
    generator = torch.Generator().manual_seed(seed)
    quota = sizes.double() * fraction
    taken = torch.floor(quota + 1e-9).long()  # 0.29 * 100 is 28.999999999999996
    # Random numbers break ties between equal remainders, so that no class is always at a disadvantage.
    tie_break = torch.rand(sizes.numel(), generator=generator, dtype=torch.float64)
    missing = total - int(taken.sum())
    taken[torch.argsort(quota - taken + 1e-9 * tie_break, descending=True)[:missing]] += 1
    # After a random permutation and a stable sort by class, the first `taken` of each class are a random draw.
    order = torch.randperm(labels.numel(), generator=generator)
    order = order[torch.argsort(labels[order], stable=True)]
    rank = torch.arange(labels.numel()) - (sizes.cumsum(0) - sizes)[labels[order]]
    part = torch.zeros(labels.numel(), dtype=torch.bool)
    part[order[rank < taken[labels[order]]]] = True
    return part
