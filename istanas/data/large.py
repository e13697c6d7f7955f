"""One large picture, from its file to the bytes of a batch: decoded, cropped and augmented.

The augmentation is torchvision's: `RandomResizedCrop`, `RandomHorizontalFlip`, and `RandAugment` or `ColorJitter`. JPEG
files of photographs have many more pixels than a network receives. With `Augmentation.reduced_decoding`, the random
crop is drawn before the file is decoded, and libjpeg computes the picture at 1/2, 1/4 or 1/8 of its size if the crop
still has as many pixels as the network receives. Pillow decodes the pictures: `torchvision.io`, which cannot reduce
them, is deprecated since torchvision 0.29.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from istanas.data.augmentation import Augmentation, evaluation_transform, transform_after_crop
from istanas.data.reading import DEFAULT_DECODING, DecodeSettings, read_picture

if TYPE_CHECKING:
    from PIL import Image
    from torchvision.transforms.v2 import RandomResizedCrop

REDUCTIONS = (8, 4, 2)
"""The factors by which libjpeg can divide the sides of a picture while it decodes."""


def load_large_picture(
    source: str | bytes,
    size: int,
    augmentation: Augmentation | None,
    settings: DecodeSettings = DEFAULT_DECODING,
) -> Tensor:
    """Return a picture as (3, size, size) bytes; torch's global generator determines the augmentation.

    Args:
        source: The path of the file, or its content.
        size: Side of the square that a network receives, in pixels.
        augmentation: The augmentation; None scales and crops as for an evaluation.
        settings: How the pixels are decoded.

    Raises:
        DataError: If the file cannot be decoded.
    """
    if augmentation is None:
        picture, _ = read_picture(source, settings)
        return evaluation_transform(size)(picture)
    return transform_after_crop(augmentation)(
        _random_crop(source, size, settings, augmentation.reduced_decoding)
    )


def prepare_transforms(size: int, augmentation: Augmentation | None) -> None:
    """Build the transforms of `load_large_picture` in this process, so that forked processes share their tables."""
    if augmentation is None:
        evaluation_transform(size)
    else:
        transform_after_crop(augmentation)
        _random_resized_crop(size)


@cache
def _random_resized_crop(size: int) -> RandomResizedCrop:
    from torchvision.transforms.v2 import RandomResizedCrop

    return RandomResizedCrop(size)


def _random_crop(source: str | bytes, size: int, settings: DecodeSettings, may_reduce: bool) -> Image.Image:
    """Return the random resized crop of a picture; if `may_reduce`, it is decoded with as few pixels as it needs.

    A file that is decoded in full has the same crop, bit for bit, as `RandomResizedCrop` returns.
    """
    from PIL import Image
    from torchvision.transforms.v2 import functional as F

    drawn: dict[str, int] = {}

    def draw(width: int, height: int) -> int:
        blank = torch.empty(1, height, width, device="meta")
        drawn.update(_random_resized_crop(size).make_params([blank]), full_width=width)
        return reduction_for(drawn["width"], drawn["height"], size)

    picture, _ = read_picture(source, settings, draw if may_reduce else None)
    if not drawn:  # `read_picture` calls `draw` for JPEG files only, and only if it may reduce them.
        draw(*picture.size)
    factor = round(drawn["full_width"] / picture.width)
    top, left, height, width = (drawn[name] for name in ("top", "left", "height", "width"))
    if factor == 1:
        return cast("Image.Image", F.resized_crop(cast(Any, picture), top, left, height, width, [size, size]))
    box = (left / factor, top / factor, (left + width) / factor, (top + height) / factor)
    return picture.resize((size, size), Image.Resampling.BILINEAR, box=box)


def reduction_for(width: int, height: int, size: int) -> int:
    """Return the largest factor that leaves a crop at least as large as the square that it becomes.

    Example:
        >>> [reduction_for(side, 1000, 224) for side in (300, 448, 900)]
        [1, 2, 4]
    """
    return next((factor for factor in REDUCTIONS if min(width, height) >= factor * size), 1)
