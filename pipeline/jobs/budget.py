"""The lengths of searches and retrainings that cost as many seconds as another search with its retraining."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

from pipeline.config.schema import Config

TOLERANCE = 0.02
"""Costs whose ratio differs from 1 by at most this count as equal."""

PROBE_EPOCHS = 5
"""Length of the search that measures the seconds of an epoch: a first and a last one, and three between them."""


def search_epochs(seconds: Sequence[float], target: float) -> int:
    """Return the number of epochs whose search takes a given time, as far as whole epochs allow.

    The first epoch of a search prepares the machine, and in the last one some methods also choose their result. With
    the seconds t_1, ..., t_n of the epochs of another search of the same method, a search of e epochs takes about

        t_1 + (e - 2) median(t_2, ..., t_(n-1)) + t_n,

    which is solved for e. A search that has stopped after fewer than 3 epochs counts with the mean of its epochs.

    Args:
        seconds: Seconds of each epoch of a search of the method, n >= 1, > 0.
        target: Seconds that the search should take.

    Returns:
        The nearest whole number, at least 1.

    Example:
        >>> search_epochs([3.0, 2.0, 2.0, 7.0], target=30.0)
        12
        >>> search_epochs([3.0, 2.0, 7.0], target=1.0)
        1
    """
    if len(seconds) < 3:
        return max(1, round(target / fmean(seconds)))
    return max(1, round(2 + (target - seconds[0] - seconds[-1]) / median(seconds[1:-1])))


def retraining_epochs(cost: float, spent: float, epoch_seconds: float, full: int) -> int:
    """Return the number of epochs of the next retraining of a method that retrains several cells.

    It is the largest number that does not exceed the cost by more than `TOLERANCE`.

    Args:
        cost: Seconds that the method may spend, > 0.
        spent: Seconds that it has spent.
        epoch_seconds: Expected seconds of an epoch, > 0.
        full: Number of epochs of a whole retraining, >= 1.

    Returns:
        At most `full`; 0 if the cost is reached within `TOLERANCE`, or if no whole epoch fits.

    Example:
        >>> [retraining_epochs(100.0, spent, epoch_seconds=2.0, full=20) for spent in (40.0, 78.0, 98.5, 103.0)]
        [20, 12, 0, 0]
    """
    if spent >= (1 - TOLERANCE) * cost:
        return 0
    return min(full, math.floor(((1 + TOLERANCE) * cost - spent) / epoch_seconds))


def with_retrain_epochs(config: Config, epochs: int) -> Config:
    """Return the configuration with a shorter retraining, whose schedule and warm-up are shorter in proportion.

    Args:
        config: The configuration.
        epochs: Number of epochs of the retraining, >= 1.
    """
    if epochs == config.retrain.epochs:
        return config
    warmup = config.retrain.warmup_epochs * epochs / config.retrain.epochs
    retrain = config.retrain.model_copy(update={"epochs": epochs, "warmup_epochs": warmup})
    return config.model_copy(update={"retrain": retrain})
