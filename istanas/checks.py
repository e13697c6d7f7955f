"""Argument checks that the library and the configuration share.

This module does not import torch, so that a configuration can be checked quickly.
"""

from __future__ import annotations

from istanas.errors import ConfigError
from istanas.limits import SMALL_SIDE

MIN_STEM_CHANNELS = {"cifar": 1, "imagenet": 2}
"""Smallest `init_channels` for each stem. The first layer of the ImageNet stem has half as many channels."""


def check_dataset_arguments(name: str, *, has_root: bool, image_size: int | None) -> None:
    """Check arguments of `istanas.data.load_dataset` that depend on each other.

    Args:
        name: The data set.
        has_root: Whether a root is given.
        image_size: Side in pixels to which the pictures are scaled; None keeps their size.

    Raises:
        ConfigError: If a picture folder has no root, or the size is impossible.

    Example:
        >>> check_dataset_arguments("digits", has_root=False, image_size=96)
        Traceback (most recent call last):
        istanas.errors.ConfigError: data.image_size: 96 is too large for digits, which is kept in memory; use at most 64
    """
    if name == "folder" and not has_root:
        raise ConfigError(
            "missing", field="data.root", remedy="name the picture folder with --set data.root=DIR"
        )
    if image_size is None:
        return
    if image_size < 1:
        raise ConfigError(
            f"{image_size} is too small", field="data.image_size", remedy="use 1 or more pixels"
        )
    if name != "folder" and image_size > SMALL_SIDE:
        raise ConfigError(
            f"{image_size} is too large for {name}, which is kept in memory",
            field="data.image_size",
            remedy=f"use at most {SMALL_SIDE}",
        )


def check_stem(stem: str, init_channels: int) -> None:
    """Check a network's stem and its width.

    Args:
        stem: "cifar" or "imagenet".
        init_channels: Channels of the first cells' nodes.

    Raises:
        ConfigError: If the stem is unknown, or the network is too narrow for it.

    Example:
        >>> check_stem("imagenet", 1)
        Traceback (most recent call last):
        istanas.errors.ConfigError: init_channels: 1 is too small for the imagenet stem; use 2 or more
    """
    if stem not in MIN_STEM_CHANNELS:
        raise ConfigError(
            f"unknown stem {stem!r}", field="stem", remedy=f"choose {' or '.join(MIN_STEM_CHANNELS)}"
        )
    fewest = MIN_STEM_CHANNELS[stem]
    if init_channels < fewest:
        raise ConfigError(
            f"{init_channels} is too small for the {stem} stem",
            field="init_channels",
            remedy=f"use {fewest} or more",
        )
