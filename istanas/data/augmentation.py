"""Augmentation: crop, flip, normalisation and cutout of batches of small pictures, and the transforms of picture files.

`data.loading` applies `augment` to batches of pictures in memory. Every random number comes from the generator that is
passed in, so that a batch is determined by its seed. Numbers are drawn on the generator's device and then moved: with a
CPU generator, all devices give the same augmentation. `large.load_large_picture` applies `evaluation_transform`, or
`transform_after_crop`, which draws from torch's global generator, to a picture that it reads from a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from istanas.errors import ConfigError

_CHUNK = 2**17  # values that `normalize` converts at a time on a CPU: the copy (512 KiB) stays in its cache
MAX_MAGNITUDE = 30
"""Largest magnitude of torchvision's RandAugment."""


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training pictures; the defaults leave them unchanged.

    Args:
        crop_padding: Zero pixels added on each side before a crop of the original size, >= 0.
        horizontal_flip: Whether each picture is mirrored left to right with probability 1/2.
        cutout: Side in pixels of the square that is set to the mean, >= 0 (0: none).
        reduced_decoding: Whether large JPEG files are decoded at 1/2, 1/4 or 1/8 of their size if that is enough.
        color_jitter: Whether brightness, contrast, saturation and hue of large pictures are changed.
        rand_augment: Magnitude of RandAugment's two operations on each picture, in 0..30 (0: none).
        random_erasing: Probability that a rectangle of a picture is set to the mean, in [0, 1].

    Raises:
        ConfigError: If a number is outside its range.

    Example:
        >>> Augmentation(crop_padding=4, horizontal_flip=True, cutout=16).cutout
        16
    """

    crop_padding: int = 0
    horizontal_flip: bool = False
    cutout: int = 0
    reduced_decoding: bool = False
    color_jitter: bool = True
    rand_augment: int = 0
    random_erasing: float = 0.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        largest = {
            "crop_padding": math.inf,
            "cutout": math.inf,
            "rand_augment": MAX_MAGNITUDE,
            "random_erasing": 1,
        }
        for field, maximum in largest.items():
            value = getattr(self, field)
            if not value >= 0:  # also true for NaN
                raise ConfigError(
                    f"{value} is not 0 or more", field=f"augmentation.{field}", remedy="use 0 to leave it out"
                )
            if value > maximum:
                raise ConfigError(
                    f"{value} is too large", field=f"augmentation.{field}", remedy=f"use {maximum} or less"
                )


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Pad with zeros, and crop each picture to the original size at a random place.

    out[i, :, y, x] = padded[i, :, y + dy_i, x + dx_i],  dy_i, dx_i uniform on {0, ..., 2 padding}

    Args:
        images: (B, C, H, W), any dtype.
        padding: Pixels on each side, >= 0; 0 returns `images` and draws nothing.
        generator: Source of the offsets.

    Returns:
        (B, C, H, W), the dtype of `images`.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> random_crop(torch.ones(2, 3, 8, 8, dtype=torch.uint8), 1, g).shape
        torch.Size([2, 3, 8, 8])

    Source: He et al. 2016, "Deep residual learning for image recognition", section 4.2.
    """
    if padding == 0:
        return images
    n, _, height, width = images.shape
    offsets = _integers((2, n), 2 * padding + 1, generator, images.device)
    # All crops are views of one padded batch: window (dy, dx) of picture i is windows[i, :, dy, dx].
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(n, device=images.device), :, offsets[0], offsets[1]]


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each picture left to right with probability 1/2.

    Args:
        images: (B, C, H, W), any dtype.
        generator: Source of the random decisions.

    Returns:
        (B, C, H, W), the dtype of `images`.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> random_flip(torch.arange(8).view(4, 1, 1, 2), g).flatten().tolist()
        [0, 1, 3, 2, 5, 4, 6, 7]
    """
    heads = _integers((images.shape[0], 1, 1, 1), 2, generator, images.device).bool()
    return torch.where(heads, images.flip(3), images)


def cutout(images: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Set a square, clipped at the border, to 0, which is the mean of normalised pictures.

    Its centre (cy, cx) is uniform over the picture. It covers the rows from cy - length // 2 up to, but not including,
    cy - length // 2 + length, and the columns likewise.

    Args:
        images: (B, C, H, W) floats.
        length: Side in pixels, >= 0; 0 returns `images` and draws nothing.
        generator: Source of the centres.

    Returns:
        (B, C, H, W), a new tensor with the dtype and memory format of `images`.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> int((cutout(torch.ones(1, 1, 9, 9), 1, g) == 0).sum())
        1

    Source: DeVries and Taylor 2017, "Improved regularization of convolutional neural networks with cutout".
    """
    if length == 0:
        return images
    n, _, height, width = images.shape
    inside = [
        _within(size, length, _integers((n, 1), size, generator, images.device)) for size in (height, width)
    ]
    kept = ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])
    return images * kept


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Convert bytes to standardised floats in channels_last memory format: (x / 255 - mean) / std.

    Args:
        images: (B, C, H, W) uint8.
        mean: C means in [0, 1].
        std: C standard deviations, > 0.
        dtype: Type of the result; half precisions are computed in float32 and rounded once.

    Returns:
        (B, C, H, W) of `dtype`.

    Example:
        >>> normalize(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), [0.5], [0.25]).item()
        2.0
    """
    precise = dtype if dtype == torch.float64 else torch.float32
    shape = (1, len(mean), 1, 1)
    scale, shift = (
        send(torch.tensor(values, dtype=precise).view(shape), images.device)
        for values in ([1 / (255 * s) for s in std], [m / s for m, s in zip(mean, std, strict=True)])
    )
    # A batch of one channel has both memory formats, and keeps its strides.
    is_channels_last = images.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.preserve_format if is_channels_last else torch.channels_last
    out = torch.empty_like(images, dtype=dtype, memory_format=memory_format)
    for source, target in zip(_chunks(images), _chunks(out), strict=True):
        target.copy_((source.to(precise) * scale).sub_(shift))
    return out


def _chunks(images: Tensor) -> Sequence[Tensor]:
    """Split a batch on a CPU into parts that fit into its cache; on other devices, a batch is one part."""
    if images.device.type != "cpu":
        return (images,)
    n_pictures = max(1, _CHUNK // max(1, images[:1].numel()))
    return torch.split(images, n_pictures)


def augment(
    images: Tensor,
    augmentation: Augmentation,
    mean: Sequence[float],
    std: Sequence[float],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Crop, flip, normalise and cut out, in the published order. Padding is black; cut-out squares have the mean.

    Args:
        images: (B, C, H, W) uint8.
        augmentation: The augmentation.
        mean: C means in [0, 1].
        std: C standard deviations, > 0.
        generator: Source of all draws (crop, flip, RandAugment, cutout, random erasing).
        dtype: Type of the result.

    Returns:
        (B, C, H, W) of `dtype`, channels_last.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> batch = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        >>> augment(batch, Augmentation(crop_padding=1), [0.5], [0.5], g).unique().tolist()
        [-1.0]

    Source: Liu et al. 2019 (DARTS), appendix A.1, which ISTA-NAS follows.
    """
    images = random_crop(images, augmentation.crop_padding, generator)
    if augmentation.horizontal_flip:
        images = random_flip(images, generator)
    images = rand_augment(images, augmentation.rand_augment, generator)
    return mask(normalize(images, mean, std, dtype), augmentation, generator)


def mask(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Set parts of normalised pictures to 0, which is the mean: cutout, then random erasing.

    Args:
        images: (B, C, H, W) floats.
        augmentation: The augmentation.
        generator: Source of all draws.

    Returns:
        (B, C, H, W), with the dtype and memory format of `images`.
    """
    images = cutout(images, augmentation.cutout, generator)
    return random_erasing(images, augmentation.random_erasing, generator)


def rand_augment(images: Tensor, magnitude: int, generator: torch.Generator) -> Tensor:
    """Apply two random operations of torchvision's RandAugment to each picture, such as a rotation or more contrast.

    Args:
        images: (B, C, H, W) uint8.
        magnitude: Strength in 0..30; 0 returns `images` and draws nothing.
        generator: Source of the seed of torch's global generator, from which torchvision draws.

    Returns:
        (B, C, H, W) uint8.

    Source: Cubuk et al. 2020, "RandAugment: Practical automated data augmentation with a reduced search space".
    """
    if magnitude == 0:
        return images
    return _one_by_one(images, _rand_augment(magnitude), generator)


def random_erasing(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Set a random rectangle of some pictures to 0.

    Args:
        images: (B, C, H, W) floats.
        probability: Probability for each picture, in [0, 1]; 0 returns `images` and draws nothing.
        generator: Source of the seed of torch's global generator, from which torchvision draws.

    Returns:
        (B, C, H, W), a new tensor with the memory format of `images`.

    Source: Zhong et al. 2020, "Random erasing data augmentation".
    """
    if probability == 0:
        return images
    from torchvision.transforms import v2

    return _one_by_one(images, v2.RandomErasing(probability), generator)


@contextmanager
def global_generator_at(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator, from which torchvision draws, and restore its state on exit.

    `torch.manual_seed` would also seed the GPUs, whose generators drop path uses in training.
    """
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def _one_by_one(images: Tensor, transform: Callable[[Tensor], Tensor], generator: torch.Generator) -> Tensor:
    """Transform each picture by itself: torchvision would draw only once for a batch."""
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    out = torch.empty_like(images)
    with global_generator_at(seed):
        for picture, changed in zip(images, out, strict=True):
            changed.copy_(transform(picture))
    return out


@cache
def _rand_augment(magnitude: int) -> Callable[[Any], Any]:
    """Return RandAugment as torchvision's training reference configures it."""
    from torchvision.transforms import v2

    return cast(
        Callable[[Any], Any],
        v2.RandAugment(magnitude=magnitude, interpolation=v2.InterpolationMode.BILINEAR),
    )


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting for the device.

    A copy from pageable memory to a GPU would block this process until the GPU has finished all its work. Pinned memory
    is not freed before the copy is complete.

    Args:
        tensor: A tensor on the CPU or on `device`.
        device: The target device.

    Returns:
        The tensor on the device; the same object if it is there already.

    Example:
        >>> here = torch.zeros(2)
        >>> send(here, torch.device("cpu")) is here
        True
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _integers(shape: tuple[int, ...], high: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return uniform integers in {0, ..., high - 1}, drawn on the generator's device and sent to `device`."""
    return send(torch.randint(high, shape, generator=generator, device=generator.device), device)


def _within(size: int, length: int, centre: Tensor) -> Tensor:
    """Return which positions are in the interval of `length` around each centre: (B, 1) -> (B, size) bools."""
    start = centre - length // 2
    position = torch.arange(size, device=centre.device)
    return (position >= start) & (position < start + length)


@cache
def evaluation_transform(size: int) -> Callable[[object], Tensor]:
    """Return the standard preprocessing of ImageNet in an evaluation: it maps a picture to (3, size, size) bytes."""
    from torchvision.transforms import v2

    steps = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), v2.PILToTensor()]
    return cast(Callable[[object], Tensor], v2.Compose(steps))


@cache
def transform_after_crop(augmentation: Augmentation) -> Callable[[object], Tensor]:
    """Return the standard augmentation of ImageNet after the random resized crop: it maps a crop to bytes.

    Source: Liu et al. 2019 (DARTS), appendix A.2; the colour jitter is that of its published code.
    """
    from torchvision.transforms import v2

    from istanas.data.jitter import FastColorJitter

    steps: list[Callable[[Any], Any]] = [
        v2.RandomHorizontalFlip(0.5 if augmentation.horizontal_flip else 0.0)
    ]
    if augmentation.rand_augment > 0:
        steps.append(_rand_augment(augmentation.rand_augment))
    if augmentation.color_jitter:
        # It returns a tensor, and must therefore be the last step.
        steps.append(FastColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2))
    else:
        steps.append(v2.PILToTensor())
    return cast(Callable[[object], Tensor], v2.Compose(steps))
