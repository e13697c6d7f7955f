"""The colour jitter of torchvision, faster, with the same bits.

On a CPU, the hue takes half of the time in which a picture is decoded and augmented: Pillow converts each pixel to HSV
and back by divisions. A channel has only 256 values, so that tables hold the results of all divisions. Brightness and
contrast are tables of 256 entries, which Pillow itself computes.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageStat

Bytes = NDArray[np.uint8]


class _Tables(NamedTuple):
    """Pillow's conversions, by the largest value V of a pixel's channels, the middle one M, and the range C = V - min.

    Args:
        hue: Hue at [order, V - M, C]; the order, 0 to 5, tells which channels have the largest and smallest value.
        saturation: Saturation at [V, C].
        smallest: Smallest channel after the conversion back to RGB, at [V, C].
        factor: Middle channel after the conversion back, divided by V, at [hue, saturation].
        sector: Which sixth of the colour circle a hue is in, 0 to 5.
    """

    hue: Bytes
    saturation: Bytes
    smallest: Bytes
    factor: NDArray[np.float64]
    sector: Bytes


# For the channels red, green and blue: the sectors of the colour circle in which the channel has the largest value,
# the middle one, and the smallest one.
_SECTORS = (((0, 5), (1, 4), (2, 3)), ((1, 2), (0, 3), (4, 5)), ((3, 4), (2, 5), (0, 1)))


class FastColorJitter:
    """torchvision's `ColorJitter` for RGB pictures of Pillow. It draws the same numbers and returns the same pictures.

    Args:
        brightness, contrast, saturation, hue: See torchvision's class.

    Example:
        >>> jitter = FastColorJitter(brightness=0, contrast=0, saturation=0, hue=0.5)
        >>> jitter(Image.new("RGB", (1, 1))).getpixel((0, 0))
        (0, 0, 0)
    """

    def __init__(self, brightness: float, contrast: float, saturation: float, hue: float) -> None:
        from torchvision.transforms import v2

        self._original = v2.ColorJitter(brightness, contrast, saturation, hue)
        _tables()  # before data workers are forked, so that they share them

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Draw the order and the factors of the changes, and apply them."""
        from torchvision.transforms.v2.functional import adjust_saturation

        drawn = self._original.make_params([])
        changes = (
            (_adjust_brightness, drawn["brightness_factor"]),
            (_adjust_contrast, drawn["contrast_factor"]),
            (adjust_saturation, drawn["saturation_factor"]),
            (shift_hue, drawn["hue_factor"]),
        )
        for number in drawn["fn_idx"].tolist():
            change, factor = changes[number]
            if factor is not None:
                picture = change(picture, factor)
        return picture


def _adjust_brightness(picture: Image.Image, factor: float) -> Image.Image:
    return _blended(picture, 0, factor)


def _adjust_contrast(picture: Image.Image, factor: float) -> Image.Image:
    mean = int(ImageStat.Stat(picture.convert("L")).mean[0] + 0.5)
    return _blended(picture, mean, factor)


def _blended(picture: Image.Image, value: int, factor: float) -> Image.Image:
    """Return value + factor * (picture - value), with the rounding of Pillow's `blend`."""
    table = Image.blend(Image.new("L", (256, 1), value), _ramp(), factor)
    # Pillow's `point` would round each entry of the table in Python.
    return Image.frombytes(picture.mode, picture.size, picture.tobytes().translate(table.tobytes()))


@cache
def _ramp() -> Image.Image:
    """Return a picture of the values 0 to 255."""
    return Image.frombytes("L", (256, 1), bytes(range(256)))


def shift_hue(picture: Image.Image, factor: float) -> Image.Image:
    """Rotate the hue of a picture, with exactly the result of torchvision's `adjust_hue`.

    Args:
        picture: An RGB picture.
        factor: Share of the colour circle, in [-0.5, 0.5].

    Example:
        >>> shift_hue(Image.new("RGB", (1, 1), "red"), 0.5).getpixel((0, 0))
        (0, 255, 252)
    """
    tables = _tables()
    red, green, blue = (np.asarray(channel).ravel() for channel in picture.split())
    low, high = np.minimum(red, green), np.maximum(red, green)
    largest, smallest = np.maximum(high, blue), np.minimum(low, blue)
    middle = np.maximum(low, np.minimum(high, blue))
    range_ = largest - smallest

    hue = tables.hue.take(_index(_order(red, green, blue, largest, smallest), largest - middle, range_))
    hue += np.int32(factor * 255).astype(np.uint8)  # it wraps around
    place = _index(largest, range_)
    saturation, smallest = tables.saturation.take(place), tables.smallest.take(place)
    product = tables.factor.take(_index(hue, saturation))
    product *= largest
    product += 0.5  # rounds to the nearest number
    middle = product.astype(np.uint8)

    sector = tables.sector.take(hue)
    is_in = [-(sector == i).view(np.uint8) for i in range(6)]  # masks of 255 and 0
    channels = []
    for (a, b), (c, d), (e, f) in _SECTORS:
        channel = (
            largest & (is_in[a] | is_in[b])
            | middle & (is_in[c] | is_in[d])
            | smallest & (is_in[e] | is_in[f])
        )
        channels.append(Image.frombuffer("L", picture.size, channel, "raw", "L", 0, 1))
    return Image.merge("RGB", channels)


def _order(red: Bytes, green: Bytes, blue: Bytes, largest: Bytes, smallest: Bytes) -> Bytes:
    """Return the order of each pixel's channels, see `_Tables`.

    It is 0, 2 or 4 if red, green or blue is the largest. If another one than blue (for blue: than red) is the smallest,
    it is one more.
    """
    not_red = red != largest
    blue_is_largest = not_red & (green != largest)
    second = (~blue_is_largest & (blue != smallest)) | (blue_is_largest & (red != smallest))
    order: Bytes = 2 * (not_red.view(np.uint8) + blue_is_largest.view(np.uint8)) + second.view(np.uint8)
    return order


def _index(*parts: Bytes) -> NDArray[np.intp]:
    """Return the place in a flattened table whose dimensions after the first one have 256 entries."""
    first, *others = parts
    index = first.astype(np.intp)
    for part in others:
        index <<= 8
        index |= part
    return index


@cache
def _tables() -> _Tables:
    """Compute the tables with the operations and precisions of Pillow's `Convert.c` (rgb2hsv and hsv2rgb)."""
    value = np.arange(256, dtype=np.float32)
    exact = value.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # for pairs (V, C) that cannot occur
        share = (value[:, None] / value).astype(
            np.float64
        )  # (V - M) / C; it is 0 for V and 1 for the smallest channel
        saturation = value / value[:, None]
        hue = np.stack([1 - share, share - 1, 2 + share - 1, 3 - share, 4 + share - 1, 5 - share])
        hue = np.fmod(hue.astype(np.float32).astype(np.float64) / 6 + 1, 1).astype(np.float32)
    hue[:, :, 0] = 0  # grey pixels

    sixths = exact * 6 / 255
    within = (sixths - np.floor(sixths)).astype(np.float32)[:, None]
    saturations = (exact / 255).astype(np.float32)
    falling = 1 - (saturations * within).astype(np.float64)
    rising = 1 - saturations.astype(np.float64) * (1 - within.astype(np.float64))
    sector = (np.floor(sixths) % 6).astype(np.uint8)

    bytes_of_saturation = _to_bytes(saturation)
    remaining = 1 - saturations[bytes_of_saturation].astype(np.float64)
    return _Tables(
        hue=_to_bytes(hue).ravel(),
        saturation=bytes_of_saturation.ravel(),
        smallest=(exact[:, None] * remaining + 0.5).astype(np.uint8).ravel(),
        factor=np.where(sector[:, None] % 2 == 0, rising, falling).ravel(),
        sector=sector,
    )


def _to_bytes(values: NDArray[np.floating[Any]]) -> Bytes:
    """Convert values in [0, 1] to 0 to 255, without rounding; others occur only at places that no pixel has."""
    return np.clip(np.nan_to_num(values.astype(np.float64) * 255), 0, 255).astype(np.uint8)
