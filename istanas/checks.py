"""Argument checks that the library and the configuration share.

This module does not import torch, so that a configuration can be checked quickly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from istanas.buckets import is_address
from istanas.errors import ConfigError

if TYPE_CHECKING:
    from istanas.data.registry import DatasetEntry

MIN_STEM_CHANNELS = {"cifar": 1, "imagenet": 2}
"""Smallest `init_channels` for each stem. The first layer of the ImageNet stem has half as many channels."""


def check_dataset_arguments(
    name: str, entry: DatasetEntry, *, root: str | None, image_size: int | None, test_fraction: float = 0.0
) -> None:
    """Check arguments of `istanas.data.load_dataset` that depend on each other.

    Args:
        name: The data set.
        entry: What is registered under that name.
        root: The root, None if none is given.
        image_size: Side in pixels to which the pictures are scaled; None keeps their size.
        test_fraction: Share of a folder's pictures that becomes its test split; 0 if it has one.

    Raises:
        ConfigError: If the data set needs a root and has none, or has its own test split, or the root or the size is
            impossible.

    Example:
        >>> from istanas.data.registry import DATASETS
        >>> check_dataset_arguments("digits", DATASETS["digits"], root=None, image_size=96)
        Traceback (most recent call last):
        istanas.errors.ConfigError: data.image_size: 96 is too large for digits, which is kept in memory; use at most 64
    """
    if entry.needs_root and root is None:
        if entry.reads_buckets:
            what, example = "the folder or bucket of the shards", "PATH"
        elif entry.survey is not None:
            what, example = "the picture folder", "DIR"
        else:
            what, example = f"the data of {name}", "PATH"
        raise ConfigError("missing", field="data.root", remedy=f"name {what} with --set data.root={example}")
    if not 0 <= test_fraction < 1:
        raise ConfigError(
            f"{test_fraction} is not a share of a class",
            field="data.test_fraction",
            remedy="use a number in [0, 1)",
        )
    if test_fraction > 0 and not entry.can_split:
        raise ConfigError(
            f"{test_fraction} has no effect on {name}, which has a test split",
            field="data.test_fraction",
            remedy="leave it out",
        )
    if root is not None and "://" in root and not (entry.reads_buckets and is_address(root)):
        raise ConfigError(
            f"{root!r:.60} is not a folder, and {name} "
            + (
                "is read from folders, s3:// and gs://"
                if entry.reads_buckets
                else "is read from folders only"
            ),
            field="data.root",
            remedy="give a path"
            if entry.reads_buckets
            else "give a path, or pack the pictures (istanas pack) and set data.name=webdataset",
        )
    if image_size is None:
        return
    if image_size < 1:
        raise ConfigError(
            f"{image_size} is too small", field="data.image_size", remedy="use 1 or more pixels"
        )
    if not entry.resizable:
        raise ConfigError(
            f"{image_size} has no effect on {name}, whose pictures keep their size",
            field="data.image_size",
            remedy="leave it out",
        )
    if entry.max_image_size is not None and image_size > entry.max_image_size:
        raise ConfigError(
            f"{image_size} is too large for {name}, which is kept in memory",
            field="data.image_size",
            remedy=f"use at most {entry.max_image_size}",
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
