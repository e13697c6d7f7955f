"""A grid of pictures that a network did not recognise, as a PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 5
_SIDE, _GAP, _LINE = 128, 12, 18  # pixels of a picture, between pictures, and of a line of text
_INK, _SOFT = "#1d2129", "#b3400e"


def draw_mistakes(pictures: Sequence[NDArray[np.uint8]], mistakes: Sequence[tuple[str, str, float]]) -> bytes:
    """Draw pictures in rows of five, each above its true class and, in orange, its predicted class.

    Args:
        pictures: (C, H, W) each, at least one; small ones are enlarged without smoothing.
        mistakes: True class, predicted class and the probability of the latter, for each picture. Longer names are cut.

    Returns:
        The PNG.

    Example:
        >>> png = draw_mistakes([np.zeros((1, 8, 8), np.uint8)] * 6, [("3", "5", 0.98)] * 6)
        >>> Image.open(io.BytesIO(png)).size
        (712, 364)
    """
    columns, rows = min(COLUMNS, len(pictures)), -(-len(pictures) // COLUMNS)
    cell = _SIDE + 2 * _LINE + _GAP
    page = Image.new("RGB", (columns * (_SIDE + _GAP) + _GAP, rows * cell + _GAP), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for place, (pixels, (true, predicted, probability)) in enumerate(zip(pictures, mistakes, strict=True)):
        left, top = _GAP + place % COLUMNS * (_SIDE + _GAP), _GAP + place // COLUMNS * cell
        page.paste(_enlarged(pixels), (left, top))
        below = top + _SIDE + 2
        draw.text((left, below), _fitted(true, "", font), _INK, font)
        draw.text((left, below + _LINE), _fitted(predicted, f" {probability:.2f}", font), _SOFT, font)
    content = io.BytesIO()
    page.save(content, "PNG")
    return content.getvalue()


def _enlarged(pixels: NDArray[np.uint8]) -> Image.Image:
    """Return a picture whose longer side fills the cell."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).convert("RGB")
    factor = _SIDE / max(image.size)
    size = [max(1, round(factor * side)) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BOX)


def _fitted(name: str, end: str, font: Any) -> str:
    """Return a name, cut off if necessary, and the end of its line, which together are no wider than a picture."""
    if font.getlength(name + end) <= _SIDE:
        return name + end
    while name and font.getlength(f"{name}...{end}") > _SIDE:
        name = name[:-1]
    return f"{name}...{end}"
