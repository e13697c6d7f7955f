"""Settings that `istanas new` proposes for a picture folder: one function for each decision, without side effects.

The rules follow the configurations that the package contains: `digits_quickstart`, `cifar10_small_cpu` and the
published ones. n is a number of training pictures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from istanas.data.survey import DEFAULT_IMAGE_SIZE
from istanas.errors import ConfigError
from istanas.limits import MIN_IMAGE_SIZE, SMALL_SIDE

UNITS = {"m": 60, "h": 3_600, "d": 86_400}
"""Unit of a budget -> seconds."""

MANY_PICTURES = 20_000
"""From this number of training pictures on, larger pictures and networks are proposed."""

MAX_EPOCHS = (50, 600)
"""Largest proposed numbers of epochs of search and retraining: the published ones."""

TEST_FRACTION = 0.2
"""Share of the pictures of a folder without splits that is for testing, as of the digits."""

SMALL_HOLDOUT = 100
"""The smallest useful hold-out: the standard error of an accuracy, sqrt(a (1 - a) / n), is then at most 5 %."""

FEW_PER_CLASS = 20
"""With fewer training pictures of each class on average, `istanas new` warns."""

FEW_FOR_TESTING = 58
"""With fewer test pictures, it warns: at an accuracy of 50 %, Wilson's interval is then wider than 25 points."""

HOLDOUT = 0.1
TEST_INTERVAL = 5  # epochs
GROWTH = 2.0
"""Smallest factor by which the next larger networks or pictures of `istanas new` take longer."""


@dataclass(frozen=True)
class Networks:
    """The sizes of the networks of a search and of its retraining.

    Args:
        name: The size in words.
        search: Number of channels of the first cell and number of cells of the supernet.
        retrain: The same of the target network.
    """

    name: str
    search: tuple[int, int]
    retrain: tuple[int, int]


NETWORKS = (
    Networks("small", (8, 5), (16, 5)),
    Networks("medium", (16, 8), (24, 8)),
    Networks("published", (16, 8), (36, 20)),
)
"""The proposed sizes, smallest first; the last one is published for CIFAR-10."""


def budget_seconds(text: str) -> float:
    """Return the seconds of a budget such as 30m, 2h or 1d.

    Raises:
        ConfigError: If the text is not a positive number with one of the units.

    Example:
        >>> budget_seconds("30m"), budget_seconds("1.5h"), budget_seconds("1d")
        (1800.0, 5400.0, 86400.0)
        >>> budget_seconds("2 hours")
        Traceback (most recent call last):
        istanas.errors.ConfigError: --budget: '2 hours' is not a time; give minutes, hours or days: 30m, 2h or 1d
    """
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)([mhd])", text)
    if found is None or float(found[1]) == 0:
        raise ConfigError(
            f"{text!r:.40} is not a time",
            field="--budget",
            remedy="give minutes, hours or days: 30m, 2h or 1d",
        )
    return float(found[1]) * UNITS[found[2]]


def image_sides(sizes: Sequence[tuple[int, int]], *, is_large: bool) -> tuple[int | None, ...]:
    """Return the sides to which the pictures of a folder may be scaled, cheapest first; None keeps their size.

    s is the median of the shorter sides. Small pictures of one size are kept. Others are scaled to s, rounded down to a
    multiple of 4. If that is above 32 pixels, 32 is the cheaper choice, because the networks compute at the full
    resolution of small pictures. Large pictures are scaled to s, rounded down to a multiple of 32, at most 224; 128 is
    the cheaper choice. If this is less than 96, they are scaled to 64 and treated as small ones.

    Args:
        sizes: Width and height of each training picture, at least one.
        is_large: Whether the folder counts as one of large pictures, see `istanas.data.Survey`.

    Example:
        >>> image_sides([(32, 32)] * 3, is_large=False), image_sides([(28, 30), (30, 26), (31, 31)], is_large=False)
        ((None,), (28,))
        >>> image_sides([(48, 48)], is_large=False), image_sides([(64, 50), (40, 64)], is_large=False)
        ((32, None), (32, 40))
        >>> image_sides([(200, 150)], is_large=True), image_sides([(640, 480)], is_large=True)
        ((128,), (128, 224))
        >>> image_sides([(90, 70)], is_large=True)
        (32, 64)
    """
    shorter = sorted(min(size) for size in sizes)[(len(sizes) - 1) // 2]
    if is_large:
        side = min(shorter // 32 * 32, DEFAULT_IMAGE_SIZE)
        if side >= 96:
            return (128, side) if side > 128 else (side,)
        return (32, SMALL_SIDE)
    if len(set(sizes)) == 1 and shorter >= MIN_IMAGE_SIZE:
        return (None,) if shorter <= 32 else (32, None)
    side = min(max(shorter // 4 * 4, MIN_IMAGE_SIZE), SMALL_SIDE)
    return (32, side) if side > 32 else (side,)


def holdout(n: int) -> float:
    """Return the fraction that is kept for choosing between networks: 0.1, or 0 if that would be too few pictures.

    Example:
        >>> holdout(999), holdout(1000)
        (0.0, 0.1)
    """
    return HOLDOUT if HOLDOUT * n >= SMALL_HOLDOUT else 0.0


def batch_size(n: int) -> int:
    """Return the largest power of two between 16 and 64 with at least 20 steps in an epoch of n pictures.

    Example:
        >>> batch_size(120), batch_size(700), batch_size(25_000)
        (16, 32, 64)
    """
    return min(max(2 ** int(math.log2(max(n / 20, 1))), 16), 64)


def learning_rate(batch: int) -> float:
    """Return the initial learning rate of the weights: 0.1 for batches of 64, and in proportion for smaller ones.

    Example:
        >>> learning_rate(64), learning_rate(16)
        (0.1, 0.025)

    Source: Goyal et al. 2017, "Accurate, large minibatch SGD", section 2.1.
    """
    return 0.1 * batch / 64


def alphas_learning_rate(steps: int) -> float:
    """Return the learning rate of the alphas for a search of some steps: 0.5 / steps, within [6e-4, 3e-3].

    Adam moves each alpha by at most about the learning rate in a step. The bounds are the published rate and that of
    `digits_quickstart`, whose search has 144 steps.

    Example:
        >>> alphas_learning_rate(144), alphas_learning_rate(500), alphas_learning_rate(4900)
        (0.003, 0.001, 0.0006)
    """
    return min(max(0.5 / steps, 6e-4), 3e-3)


def crop_padding(side: int) -> int:
    """Return the padding of the random crop of small pictures: 4 for 32 pixels, as published, and in proportion.

    Example:
        >>> crop_padding(8), crop_padding(32), crop_padding(224)
        (1, 4, 0)
    """
    return side // 8 if side <= SMALL_SIDE else 0


def flips(side: int, *, is_grey: bool) -> bool:
    """Return whether pictures are mirrored: not small grey ones, which often are characters.

    Example:
        >>> flips(8, is_grey=True), flips(32, is_grey=False), flips(224, is_grey=True)
        (False, True, True)
    """
    return side > SMALL_SIDE or not is_grey


def default_epochs(n: int, batch: int) -> tuple[int, int]:
    """Return the epochs of search and retraining without a budget.

    A search should have about 1,000 steps on its half of the pictures, and a retraining 4,000, which are
    ceil(1000 * 2 batch / n) and ceil(4000 batch / n) epochs. They are limited to [6, 30] and [12, 100].

    Args:
        n: Number of training pictures without the hold-out, >= 1.
        batch: Batch size of both.

    Example:
        >>> default_epochs(240, 16), default_epochs(1800, 32), default_epochs(20_000, 64), default_epochs(50_000, 64)
        ((30, 100), (30, 72), (7, 13), (6, 12))
    """
    search, retrain = math.ceil(2000 * batch / n), math.ceil(4000 * batch / n)
    return min(max(search, 6), 30), min(max(retrain, 12), 100)


def fitted_epochs(
    budget: float, seconds: tuple[float, float], defaults: tuple[int, int]
) -> tuple[int, int] | None:
    """Return the epochs of search and retraining that take as long as a budget, as far as whole epochs allow.

    With t_s and t_r seconds of an epoch and default epochs e_s and e_r, both are multiplied by
    f = budget / (e_s t_s + e_r t_r) and rounded down. The rest goes to the retraining. The limits are `MAX_EPOCHS`.

    Args:
        budget: Seconds of both together, > 0.
        seconds: t_s and t_r, > 0.
        defaults: e_s and e_r, >= 1.

    Returns:
        None if the budget is less than t_s + t_r.

    Example:
        >>> fitted_epochs(150.0, (4.0, 2.0), (30, 100)), fitted_epochs(7.0, (4.0, 2.0), (30, 100))
        ((14, 47), (1, 1))
        >>> fitted_epochs(1e6, (4.0, 2.0), (30, 100)), fitted_epochs(5.0, (4.0, 2.0), (30, 100))
        ((50, 600), None)
    """
    if budget < sum(seconds):
        return None
    factor = budget / total_seconds(defaults, seconds)
    search = min(max(math.floor(factor * defaults[0]), 1), MAX_EPOCHS[0])
    search = min(search, math.floor((budget - seconds[1]) / seconds[0]))
    retrain = math.floor((budget - search * seconds[0]) / seconds[1])
    return search, min(max(retrain, 1), MAX_EPOCHS[1])


def total_seconds(epochs: tuple[int, int], seconds: tuple[float, float]) -> float:
    """Return the seconds of search and retraining: e_s t_s + e_r t_r.

    Example:
        >>> total_seconds((12, 20), (1.5, 2.0))
        58.0
    """
    return epochs[0] * seconds[0] + epochs[1] * seconds[1]
