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
