"""Checks of settings against the pictures that they are for: what can't work, and what makes no sense.

`pipeline.training.pictures.check_fit` refuses what the parts of a data set can't give; this looks at their sizes.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from istanas.data import ImageDataset
from istanas.errors import ConfigError
from istanas.limits import SMALL_SIDE
from pipeline.config.schema import Config, TwoStageConfig
from pipeline.training.pictures import search_indices, search_split, training_indices

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


def doubtful_settings(config: Config, dataset: ImageDataset, jobs: Sequence[str]) -> dict[str, str]:
    """Find settings that work and make no sense.

    Args:
        config: the configuration.
        dataset: its pictures.
        jobs: the jobs to come, "search" or "retrain".

    Returns:
        Setting with its value -> why it makes no sense, and the remedy.
    """
    doubts = {}
    side, space = min(dataset.height, dataset.width), config.space
    size = f"pictures of {dataset.height}x{dataset.width} pixels"
    if "search" in jobs and len(space.ops) <= 1 and space.sparsity > 1:
        doubts["space.ops has one operation"] = (
            f"with space.sparsity = {space.sparsity} only the edges are searched; give more operations"
        )
    if config.data.crop_padding > side // 2:
        doubts[f"data.crop_padding is {config.data.crop_padding}"] = (
            f"of {size}, most crops hold little or nothing of the picture; give at most {side // 2}"
        )
    fitting = "cifar" if max(dataset.height, dataset.width) <= SMALL_SIDE else "imagenet"
    for job in jobs:
        settings = getattr(config, job)
        if settings.stem not in (fitting, "auto"):
            effect = "many times slower" if settings.stem == "cifar" else "of little detail"
            doubts[f"{job}.stem is {settings.stem}"] = (
                f"it makes networks for {size} {effect}; set {job}.stem={fitting}, or leave it out"
            )
        count, what = _trained_on(config, dataset, job)
        if settings.batch_size > count:
            doubts[f"{job}.batch_size is {settings.batch_size}"] = (
                f"above the {count} {what}, so that an epoch is one step; lower it"
            )
    return doubts


def _trained_on(config: Config, dataset: ImageDataset, job: str) -> tuple[int, str]:
    """Return how many pictures the weights of a job's network are trained on, and what they are called."""
    if job == "retrain":
        return len(training_indices(config, dataset)), "training pictures"
    if isinstance(config, TwoStageConfig):
        return len(search_split(config, dataset).weights), "pictures that train the weights"
    return len(search_indices(config, dataset)), "pictures of the search"


def warnings_of(config: Config, dataset: ImageDataset, jobs: Sequence[str]) -> list[str]:
    """Return a line for people about each setting that makes no sense with these pictures."""
    doubts = doubtful_settings(config, dataset, jobs)
    return [f"warning: {setting}: {reason}" for setting, reason in doubts.items()]


def warnings_of_trials(
    trials: Iterable[Config], dataset: ImageDataset, jobs: Sequence[str], swept: Container[str]
) -> list[str]:
    """Return a line for people about each setting of a sweep's trials that makes no sense with these pictures.

    Args:
        trials: configurations of trials, which together have every value that the space names.
        dataset: the sweep's pictures.
        jobs: of a trial, "search" or "retrain".
        swept: keys of the space.
    """
    doubts: dict[str, str] = {}
    for trial in trials:
        for setting, reason in doubtful_settings(trial, dataset, jobs).items():
            doubts.setdefault(setting, reason)
    return [
        f"warning: {'sweep.space: ' if setting.partition(' ')[0] in swept else ''}{setting}: {reason}"
        for setting, reason in doubts.items()
    ]
