"""Large pictures: the fast colour jitter against torchvision's, and decoding at a fraction of the size."""

import io
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from istanas.data import Augmentation
from istanas.data.jitter import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation, to_planes
from istanas.data.large import load_large_picture, reduction_for
from istanas.data.reading import read_picture

FULL, REDUCED = (Augmentation(horizontal_flip=True, reduced_decoding=reduced) for reduced in (False, True))


def photograph(width: int = 700, height: int = 500, mode: str = "RGB") -> Image.Image:
    """A smooth picture with detail: coarse noise of two scales."""
    layers = []
    for cell, seed in ((64, 0), (12, 1)):
        rng = np.random.default_rng(seed)
        noise = rng.integers(0, 256, (height // cell + 1, width // cell + 1, 3), dtype=np.uint8)
        layers.append(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
    return Image.blend(*layers, 0.3).convert(mode)


def jpeg(picture: Image.Image, orientation: int = 1) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    picture.save(buffer, "JPEG", quality=92, exif=exif)
    return buffer.getvalue()


def seeded(load: Callable[[], torch.Tensor], seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return load().int()


def colours(step: int) -> Image.Image:
    """Every `step`-th of all 2^24 colours."""
    code = np.arange(0, 1 << 24, step)
    pixels = np.stack([code >> 16, code >> 8 & 255, code & 255], -1).astype(np.uint8)
    return Image.frombuffer("RGB", (len(pixels), 1), pixels.tobytes(), "raw", "RGB", 0, 1)


@pytest.mark.parametrize(
    ("step", "hues", "others"),
    [
        (61, (-0.5, -0.2, 0.0, 0.13, 0.5), (0.0, 0.6, 1.0, 1.39)),
        pytest.param(1, (-0.1,), (0.83, 1.17), marks=pytest.mark.slow),
    ],
)
def test_the_colour_changes_are_those_of_torchvision(
    step: int, hues: tuple[float, ...], others: tuple[float, ...]
) -> None:
    """A step of 1 has every colour; factors above 1 reach values that must be clipped."""
    picture = colours(step)
    planes = to_planes(picture)
    pairs = [(adjust_hue, F.adjust_hue, hues)]
    pairs += [
        (adjust_brightness, F.adjust_brightness, others),
        (adjust_contrast, F.adjust_contrast, others),
        (adjust_saturation, F.adjust_saturation, others),
    ]
    for ours, torchvisions, factors in pairs:
        for factor in factors:
            wanted = to_planes(torchvisions(picture, factor))
            assert np.array_equal(ours(planes, factor), wanted), (ours, factor)


def test_training_pictures_are_those_of_torchvisions_transforms() -> None:
    """The published recipe, written with torchvision alone."""
    wanted = v2.Compose(
        [
            v2.RandomResizedCrop(64),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.4, 0.2),
            v2.PILToTensor(),
        ]
    )
    content = jpeg(photograph(200, 150))
    picture = Image.open(io.BytesIO(content))
    for seed in range(5):
        found = seeded(partial(load_large_picture, content, 64, FULL), seed)
        assert torch.equal(found, seeded(partial(wanted, picture), seed))


@pytest.mark.parametrize(
    "content",
    [
        jpeg(photograph()),
        jpeg(photograph(701, 503)),
        jpeg(photograph(), orientation=6),
        jpeg(photograph(mode="L")),
        jpeg(photograph(mode="CMYK")),
    ],
    ids=["colour", "odd size", "sideways", "grey", "CMYK"],
)
def test_reduced_decoding_gives_nearly_the_same_crops(content: bytes) -> None:
    reduced = 0
    for seed in range(6):
        full, found = (seeded(partial(load_large_picture, content, 64, a), seed) for a in (FULL, REDUCED))
        assert (full - found).abs().float().mean() < 2
        reduced += not torch.equal(full, found)
    assert reduced > 0


def test_pictures_that_cannot_be_reduced_keep_their_bits() -> None:
    buffer = io.BytesIO()
    transparent = photograph(400, 300)
    transparent.putalpha(Image.linear_gradient("L").resize((400, 300)))
    transparent.save(buffer, "PNG")
    for content, size in ((buffer.getvalue(), 64), (jpeg(photograph(400, 300)), 224)):
        for augmentation in (FULL, REDUCED):
            assert load_large_picture(content, size, augmentation).shape == (3, size, size)
        full, found = (seeded(partial(load_large_picture, content, size, a), 0) for a in (FULL, REDUCED))
        assert torch.equal(full, found)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_reduced_picture_has_fewer_pixels_upright(orientation: int) -> None:
    sizes = []

    def choose(width: int, height: int) -> int:
        sizes.append((width, height))
        return 4

    picture, _ = read_picture(jpeg(photograph(701, 500), orientation), reduction=choose)
    wanted = (176, 125) if orientation == 1 else (125, 176)
    assert picture.size == wanted
    assert sizes == [(701, 500) if orientation == 1 else (500, 701)]


def test_a_crop_is_never_smaller_than_what_it_becomes() -> None:
    factors = {side: reduction_for(side, 5000, 100) for side in (50, 199, 200, 399, 400, 800, 5000)}
    assert factors == {50: 1, 199: 1, 200: 2, 399: 2, 400: 4, 800: 8, 5000: 8}
