"""Checks of settings against the pictures that they are for: what can't work, and what makes no sense.

`pipeline.pictures.check_fit` refuses what the parts of a data set can't give; this looks at their sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

from istanas.data import ImageDataset
from istanas.errors import ConfigError
from pipeline.pictures import training_indices
from pipeline.schema import Config

FEWEST = 2  # pictures of a batch, which batch norm needs, and of a search's two halves


def check_left_for_training(config: Config, dataset: ImageDataset, jobs: Sequence[str]) -> None:
    """Refuse a hold-out that leaves too few pictures to train on.

    Raises:
        ConfigError: it names the hold-out, which is the reason, and not what divides the rest.
    """
    left = len(training_indices(config, dataset))
    if jobs and config.data.holdout > 0 and left < FEWEST:
        raise ConfigError(
            f"data.holdout is {config.data.holdout}: of {len(dataset.train)} pictures it leaves {left} for training, "
            "lower it"
        )


def doubtful_settings(config: Config, dataset: ImageDataset, jobs: Sequence[str]) -> list[str]:
    """Return what makes no sense though it works: setting, value, remedy of each."""
    said = []
    left, side = len(training_indices(config, dataset)), min(dataset.height, dataset.width)
    space = config.space
    if "search" in jobs and len(space.ops) <= 1 and space.sparsity > 1:
        said.append(
            f"space.ops has one operation and space.sparsity is {space.sparsity}: only the edges are searched, "
            "give more operations"
        )
    if config.data.crop_padding > side // 2:
        said.append(
            f"data.crop_padding is {config.data.crop_padding} with pictures of {dataset.height}x{dataset.width}: "
            f"most crops hold little or nothing of the picture, give at most {side // 2}"
        )
    for job in jobs:
        batch = getattr(config, job).batch_size
        if batch > left:
            said.append(
                f"{job}.batch_size is {batch}, above the {left} training pictures: an epoch is one step, lower it"
            )
    return said
