"""The colour jitter of torchvision, faster, with the same bits.

torchvision changes a Pillow image up to four times, and each change makes a new image. Here, a picture is an array of
three planes, (3, H * W) bytes, from the first change to the last one. On a CPU, the hue takes most of torchvision's
time, since Pillow converts each pixel to HSV and back by divisions. A channel has only 256 values, so that tables hold
the results of all divisions. The results equal those of Pillow's `Blend.c` and `Convert.c`, bit for bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Bytes = NDArray[np.uint8]
_FACTOR_BITS = 24  # after the point, in `_Tables`: 255 * 2^24 + 2^23 fits into 32 bits
_RED, _GREEN, _BLUE = 19595, 38470, 7471  # Pillow's weights of a grey value, in units of 1 / 65536


class _Tables(NamedTuple):
    """Pillow's conversions, by the largest value V of a pixel's channels, the middle one M, and the range C = V - min.

    Args:
        hue: Hue at [order, V - M, C]; the order, 0 to 5, tells which channels have the largest and smallest value.
        smallest_and_saturation: At [V, C], 256 * (the smallest channel after the conversion back to RGB) + saturation.
        sector_and_factor: At [hue, saturation], sector * 2^25 + round(factor * 2^24). The factor is the middle channel
            after the conversion back, divided by V, in [0, 1]; the sector is a sixth of the colour circle, 0 to 5.
    """

    hue: Bytes
    smallest_and_saturation: NDArray[np.uint16]
    sector_and_factor: NDArray[np.uint32]


# For the channels red, green and blue: the sectors of the colour circle in which the channel has the largest value,
# the middle one, and the smallest one.
_SECTORS = (((0, 5), (1, 4), (2, 3)), ((1, 2), (0, 3), (4, 5)), ((3, 4), (2, 5), (0, 1)))


class FastColorJitter:
    """torchvision's `ColorJitter`, followed by `PILToTensor`, for RGB pictures of Pillow.

    It draws the same numbers from torch's global generator, and returns the same bytes, (3, H, W).

    Args:
        brightness, contrast, saturation, hue: See torchvision's class.

    Example:
        >>> jitter = FastColorJitter(brightness=0, contrast=0, saturation=0, hue=0.5)
        >>> jitter(Image.new("RGB", (1, 1))).tolist()
        [[[0]], [[0]], [[0]]]
    """

    def __init__(self, brightness: float, contrast: float, saturation: float, hue: float) -> None:
        from torchvision.transforms import v2

        self._torchvision_jitter = v2.ColorJitter(brightness, contrast, saturation, hue)
        _tables()  # before data workers are forked, so that they share them

    def __call__(self, picture: Image.Image) -> Tensor:
        """Draw the order and the factors of the changes, apply them, and return (3, H, W) bytes."""
        drawn = self._torchvision_jitter.make_params([])
        changes = (
            (adjust_brightness, drawn["brightness_factor"]),
            (adjust_contrast, drawn["contrast_factor"]),
            (adjust_saturation, drawn["saturation_factor"]),
            (adjust_hue, drawn["hue_factor"]),
        )
        planes = to_planes(picture)
        for number in drawn["fn_idx"].tolist():
            change, factor = changes[number]
            if factor is not None:
                planes = change(planes, factor)
        return torch.from_numpy(planes.reshape(3, picture.height, picture.width))


def to_planes(picture: Image.Image) -> Bytes:
    """Return the channels of an RGB picture as (3, H * W) bytes."""
    return np.stack([np.frombuffer(channel.tobytes(), np.uint8) for channel in picture.split()])


def adjust_brightness(planes: Bytes, factor: float) -> Bytes:
    """Return factor * planes, clipped to 0..255: the bytes of torchvision's `adjust_brightness`.

    Args:
        planes: (3, N) bytes, the channels of N pixels.
        factor: The factor, >= 0; 1 changes nothing.

    Example:
        >>> adjust_brightness(np.array([[2], [4], [200]], np.uint8), 1.5).ravel().tolist()
        [3, 6, 255]
    """
    return _blended(planes, 0, factor)


def adjust_contrast(planes: Bytes, factor: float) -> Bytes:
    """Return mean + factor * (planes - mean), with the mean grey value: the bytes of torchvision's `adjust_contrast`.

    Args:
        planes: (3, N) bytes, the channels of N pixels.
        factor: The factor, >= 0; 1 changes nothing.

    Example:
        >>> adjust_contrast(np.array([[10, 30]] * 3, np.uint8), 0.5)[0].tolist()
        [15, 25]
    """
    grey = _grey(planes.astype(np.float32))
    return _blended(planes, int(grey.sum(dtype=np.float64) / grey.size + 0.5), factor)


def adjust_saturation(planes: Bytes, factor: float) -> Bytes:
    """Return grey + factor * (planes - grey) with each pixel's grey value: the bytes of `adjust_saturation`.

    Args:
        planes: (3, N) bytes, the channels of N pixels.
        factor: The factor, >= 0; 1 changes nothing.

    Example:
        >>> adjust_saturation(np.array([[10], [30], [20]], np.uint8), 0.0).ravel().tolist()
        [23, 23, 23]
    """
    values = planes.astype(np.float32)
    grey = _grey(values)
    values -= grey
    values *= np.float32(factor)
    values += grey
    return np.clip(values, 0, 255, out=values).astype(np.uint8)


def adjust_hue(planes: Bytes, factor: float) -> Bytes:
    """Rotate the hue by a share of the colour circle: the bytes of torchvision's `adjust_hue`.

    Args:
        planes: (3, N) bytes, the channels of N pixels.
        factor: The share, in [-0.5, 0.5].

    Example:
        >>> adjust_hue(np.array([[255], [0], [0]], np.uint8), 0.5).ravel().tolist()
        [0, 255, 252]
    """
    tables = _tables()
    red, green, blue = planes
    low, high = np.minimum(red, green), np.maximum(red, green)
    largest, smallest = np.maximum(high, blue), np.minimum(low, blue)
    middle = np.maximum(low, np.minimum(high, blue))
    range_ = largest - smallest

    place = _order(red, green, blue, largest, smallest).astype(np.uint32)
    place <<= 16
    place |= _pair(largest - middle, range_)
    hue = tables.hue.take(place)
    hue += np.int32(factor * 255).astype(np.uint8)  # it wraps around
    found = tables.smallest_and_saturation.take(_pair(largest, range_))
    saturation, new_smallest = found.astype(np.uint8), (found >> 8).astype(np.uint8)
    product = tables.sector_and_factor.take(_pair(hue, saturation))
    sector = (product >> (_FACTOR_BITS + 1)).astype(np.uint8)
    product &= (1 << (_FACTOR_BITS + 1)) - 1
    product *= largest
    product += 1 << (_FACTOR_BITS - 1)  # rounds to the nearest number
    product >>= _FACTOR_BITS
    new_middle = product.astype(np.uint8)

    is_in = [-(sector == i).view(np.uint8) for i in range(6)]  # masks of 255 and 0
    shifted = np.empty_like(planes)
    for channel, sectors in zip(shifted, _SECTORS, strict=True):
        is_largest, is_middle, is_smallest = (is_in[one] | is_in[other] for one, other in sectors)
        channel[:] = largest & is_largest | new_middle & is_middle | new_smallest & is_smallest
    return shifted


def _blended(planes: Bytes, value: int, factor: float) -> Bytes:
    """Return value + factor * (planes - value), with the rounding of Pillow's `blend`."""
    table = Image.blend(Image.new("L", (256, 1), value), _ramp(), factor)
    # `translate` needs no array of indices, as `take` does. A bytearray is writable, which torch requires.
    return np.frombuffer(bytearray(planes).translate(table.tobytes()), np.uint8).reshape(planes.shape)


@cache
def _ramp() -> Image.Image:
    """Return a picture of the values 0 to 255."""
    return Image.frombytes("L", (256, 1), bytes(range(256)))


def _grey(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the grey values of planes, (H * W,). All sums are whole numbers below 2^24, which float32 represents."""
    red, green, blue = values
    grey: NDArray[np.float32] = red * _RED
    part = green * _GREEN
    grey += part
    grey += np.multiply(blue, _BLUE, out=part)
    grey += 0x8000
    grey *= 1 / 65536
    return np.floor(grey, out=grey)


def _order(red: Bytes, green: Bytes, blue: Bytes, largest: Bytes, smallest: Bytes) -> Bytes:
    """Return the order of each pixel's channels, see `_Tables`.

    It is 2 c + s: c is 0, 1 or 2 if red, green or blue is the largest channel; s is 1 if blue (for c = 2: red) is not
    the smallest one.
    """
    not_red = red != largest
    blue_is_largest = not_red & (green != largest)
    second = (~blue_is_largest & (blue != smallest)) | (blue_is_largest & (red != smallest))
    order: Bytes = 2 * (not_red.view(np.uint8) + blue_is_largest.view(np.uint8)) + second.view(np.uint8)
    return order


def _pair(first: Bytes, second: Bytes) -> NDArray[np.uint16]:
    """Return 256 * first + second, which is also the place in a flattened table of 256 columns."""
    pair = first.astype(np.uint16)
    pair <<= 8
    pair |= second
    return pair


@cache
def _tables() -> _Tables:
    """Compute the tables with the operations and precisions of Pillow's `Convert.c` (rgb2hsv and hsv2rgb)."""
    value = np.arange(256, dtype=np.float32)
    exact = value.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # for pairs (V, C) that cannot occur
        # (V - M) / C, which would be 0 for M = V and 1 for the smallest channel
        share = (value[:, None] / value).astype(np.float64)
        saturation = value / value[:, None]
        hue = np.stack([1 - share, share - 1, 2 + share - 1, 3 - share, 4 + share - 1, 5 - share])
        hue = np.fmod(hue.astype(np.float32).astype(np.float64) / 6 + 1, 1).astype(np.float32)
    hue[:, :, 0] = 0  # grey pixels

    sixths = exact * 6 / 255
    within = (sixths - np.floor(sixths)).astype(np.float32)[:, None]
    saturations = (exact / 255).astype(np.float32)
    falling = 1 - (saturations * within).astype(np.float64)
    rising = 1 - saturations.astype(np.float64) * (1 - within.astype(np.float64))
    sector = (np.floor(sixths) % 6).astype(np.uint32)[:, None]
    factor = np.where(sector % 2 == 0, rising, falling)

    bytes_of_saturation = _to_bytes(saturation)
    remaining = 1 - saturations[bytes_of_saturation].astype(np.float64)
    smallest = (exact[:, None] * remaining + 0.5).astype(np.uint8)
    return _Tables(
        hue=_to_bytes(hue).ravel(),
        smallest_and_saturation=_pair(smallest, bytes_of_saturation).ravel(),
        sector_and_factor=(
            np.rint(factor * (1 << _FACTOR_BITS)).astype(np.uint32) | sector << (_FACTOR_BITS + 1)
        ).ravel(),
    )


def _to_bytes(values: NDArray[np.floating[Any]]) -> Bytes:
    """Convert values in [0, 1] to 0 to 255, without rounding; others occur only at places that no pixel has."""
    return np.clip(np.nan_to_num(values.astype(np.float64) * 255), 0, 255).astype(np.uint8)
