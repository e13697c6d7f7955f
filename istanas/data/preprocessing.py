"""The preprocessing of a picture, from its file to the input of a network, for predictions after the training.

Training applies the same functions to whole data sets: `read_picture` and `fit_picture` when a folder of small pictures
is decoded, `load_large_picture` when large pictures are read for a batch, `stretch_images` for data sets that are
arrays, and `normalize` for every batch.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from istanas.data.augmentation import evaluation_transform, normalize
from istanas.data.reading import (
    DEFAULT_DECODING,
    DecodeSettings,
    fit_picture,
    read_picture,
)
from istanas.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

Resize = Literal["none", "fit", "resize_and_crop", "stretch"]
"""How pictures get the size that a network requires.

"none": not at all; all pictures have that size. "fit": the largest central square is scaled. "resize_and_crop": the
shorter side is scaled to 256/224 of the target, and the centre is cropped, as for ImageNet. "stretch": each side is
scaled independently. Scaling is bilinear and antialiased.
"""

_CHANNEL_ORDERS = {1: "grey", 3: "RGB"}


@dataclass(frozen=True)
class Preprocessing:
    """Everything that turns a picture into the input of one network.

    Args:
        shape: (C, H, W) of the input; C is 1 (grey) or 3 (red, green, blue), and H = W unless `resize` is "none".
        mean: Mean of each channel, in [0, 1].
        std: Standard deviation of each channel, > 0.
        resize: How pictures get the height H and the width W.
        background: (red, green, blue) in 0..255, over which transparent pictures are composited.
        bits: Bits of grey pictures that are stored with more than 8 bits, see `DecodeSettings`.

    Example:
        >>> grey = Preprocessing(shape=(1, 2, 2), mean=(0.5,), std=(0.25,))
        >>> picture = grey.from_array(np.full((2, 2), 255, np.uint8))
        >>> grey.normalized(picture[None]).flatten().tolist()
        [2.0, 2.0, 2.0, 2.0]
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = "none"
    background: tuple[int, int, int] = DEFAULT_DECODING.background
    bits: int = DEFAULT_DECODING.bits

    def to_dict(self) -> dict[str, Any]:
        """Return all steps for JSON, including those that are the same for every network.

        Example:
            >>> Preprocessing((3, 8, 8), (0.5,) * 3, (0.25,) * 3).to_dict()["channel_order"]
            'RGB'
        """
        return {
            **asdict(self),
            "channel_order": _CHANNEL_ORDERS.get(self.shape[0], f"{self.shape[0]} channels"),
            "value_range": [0.0, 1.0],  # bytes are divided by 255 before mean and std are applied
        }

    @property
    def decode_settings(self) -> DecodeSettings:
        """Return how the pixels of a file are decoded."""
        return DecodeSettings(self.background, self.bits)

    def read(self, source: str | os.PathLike[str] | bytes) -> Tensor:
        """Read a picture file, or the content of one.

        Args:
            source: The path, or the encoded picture (PNG, JPEG, ...).

        Returns:
            (C, H, W) uint8.

        Raises:
            DataError: If it cannot be decoded, or has another size and pictures are not scaled.
        """
        source = source if isinstance(source, bytes) else os.fspath(source)
        picture, _ = read_picture(source, self.decode_settings)
        return self._resized(picture, source if isinstance(source, str) else "the picture")

    def from_array(self, array: NDArray[np.uint8]) -> Tensor:
        """Convert the pixels of one picture.

        Args:
            array: (H', W'), (H', W', 1) or (H', W', 3) uint8.

        Returns:
            (C, H, W) uint8.

        Raises:
            DataError: If it has another shape or type, or another size and pictures are not scaled.
        """
        from PIL import Image

        if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,)):
            raise DataError(
                f"an array of the shape {array.shape} and dtype {array.dtype} is not a picture",
                field="picture",
                remedy="give (H, W) or (H, W, 3) with dtype uint8",
            )
        if 0 in array.shape:
            raise DataError(f"the shape {array.shape} has no pixels", field="picture", remedy="give some")
        pixels = array[..., 0] if array.shape[2:] == (1,) else array
        return self._resized(Image.fromarray(pixels).convert("RGB"), "the picture")

    def normalized(self, images: Tensor) -> Tensor:
        """Return the input of the network, (B, C, H, W) float32, from (B, C, H, W) uint8."""
        return normalize(images, self.mean, self.std)

    def _resized(self, picture: Image.Image, name: str) -> Tensor:
        """Return the bytes (C, H, W) of an RGB picture."""
        channels, height, width = self.shape
        if self.resize == "fit":
            picture = fit_picture(picture, width)
        elif self.resize == "none" and picture.size != (width, height):
            raise DataError(
                f"{name} has {picture.width}x{picture.height} pixels, the network was trained on {width}x{height} "
                "without scaling",
                field="picture",
                remedy=f"scale it to {width}x{height} pixels first",
            )
        if self.resize == "resize_and_crop":
            image = evaluation_transform(width)(picture)
        else:
            pixels = np.frombuffer(picture.tobytes(), np.uint8).reshape(picture.height, picture.width, 3)
            image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        if self.resize == "stretch":
            image = stretch_images(image[None], width)[0]
        return image if channels == 3 else _grey(image)


def stretch_images(images: Tensor, size: int) -> Tensor:
    """Scale (N, C, H, W) bytes to (N, C, size, size) with antialiasing.

    Example:
        >>> stretch_images(torch.zeros(1, 3, 4, 8, dtype=torch.uint8), 2).shape
        torch.Size([1, 3, 2, 2])
    """
    if images.shape[2:] == (size, size):
        return images
    resized = [
        F.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=True)
        .round_()
        .clamp_(0, 255)
        .byte()
        for chunk in torch.split(images, 1000)
    ]
    return torch.cat(resized)


def _grey(image: Tensor) -> Tensor:
    """Return the luminance (1, H, W) of an RGB picture (3, H, W).

    Training keeps the red channel of pictures that are all grey, which is their luminance. The weights of ITU-R
    BT.601 add up to 2^16, so that the luminance of a grey pixel is exact.
    """
    weights = torch.tensor([19595, 38470, 7471]).view(3, 1, 1)
    return ((image.int() * weights).sum(0, keepdim=True) + 0x8000 >> 16).byte()
