"""Mixing of the pictures of a batch and of their labels: mixup and CutMix, from torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps pictures (B, C, H, W) and labels (B,) to mixed pictures and the shares of the classes, (B, classes)."""


def mixing(mixup: float, cutmix: float, num_classes: int) -> Mix | None:
    """Return the mixing of training batches; None if both are 0. With both, each batch is mixed by one of them.

    Each picture is mixed with its neighbour in the batch. The share of a picture is drawn from Beta(alpha, alpha), once
    for a batch, with torch's global generator.

    Args:
        mixup: The alpha of mixup, which adds the pictures; >= 0.
        cutmix: The alpha of CutMix, which replaces a rectangle; >= 0.
        num_classes: Number of classes.

    Example:
        >>> mix = mixing(0.2, 1.0, num_classes=3)
        >>> images, shares = mix(torch.zeros(2, 3, 4, 4), torch.tensor([0, 2]))
        >>> images.shape, shares.shape, shares.sum(1).tolist()
        (torch.Size([2, 3, 4, 4]), torch.Size([2, 3]), [1.0, 1.0])

    Source: Zhang et al. 2018, "mixup: Beyond empirical risk minimization"; Yun et al. 2019, "CutMix: Regularization
        strategy to train strong classifiers with localizable features".
    """
    from torchvision.transforms import v2

    kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
    choices = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]
    if not choices:
        return None
    chosen = cast(Mix, v2.RandomChoice(choices))

    def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        mixed, shares = chosen(images, labels)
        return mixed.contiguous(memory_format=torch.channels_last), shares

    return mix
