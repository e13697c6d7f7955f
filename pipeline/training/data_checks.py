"""Warnings about settings that are valid but make no sense for the given pictures.

Settings that cannot work with the pictures are rejected by `pipeline.training.pictures.check_fit`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from istanas.data import ImageDataset
from istanas.limits import SMALL_SIDE
from pipeline.config.schema import Config
from pipeline.training.latency_tables import table_warnings
from pipeline.training.splits import splits_of


@dataclass(frozen=True)
class Doubt:
    """A setting that makes no sense.

    Args:
        field: The setting.
        value: Its value in words, such as "is 40".
        reason: Why it makes no sense, and what to do.
    """

    field: str
    value: str
    reason: str

    def __str__(self) -> str:
        """Return the line for the user, without a prefix."""
        return f"{self.field} {self.value}: {self.reason}"


def doubtful_settings(config: Config, dataset: ImageDataset, jobs: Sequence[str]) -> list[Doubt]:
    """Find settings that are valid but make no sense for these pictures.

    Args:
        config: The configuration.
        dataset: Its pictures.
        jobs: The jobs to be run: "search", "retrain".
    """
    doubts = []
    side = min(dataset.height, dataset.width)
    size = f"pictures of {dataset.height}x{dataset.width} pixels"
    decisions = config.space.build().all_decisions() if "search" in jobs else []
    n_ops = max((len({op for op, _ in decision.candidates}) for decision in decisions), default=0)
    if n_ops == 1 and (sparsity := decisions[0].sparsity) > 1:
        reason = f"with space.sparsity = {sparsity} only the edges are searched; give more operations"
        doubts.append(Doubt("space.ops", "has one operation", reason))
    if config.data.crop_padding > side // 2:
        reason = f"most crops of {size} contain little or nothing of the picture; give at most {side // 2}"
        doubts.append(Doubt("data.crop_padding", f"is {config.data.crop_padding}", reason))
    fitting = "cifar" if max(dataset.height, dataset.width) <= SMALL_SIDE else "imagenet"
    for job in jobs:
        settings = getattr(config, job)
        if settings.stem not in (fitting, "auto"):
            effect = "is many times slower" if settings.stem == "cifar" else "loses most details"
            reason = f"a network with it {effect} for {size}; set {job}.stem={fitting}, or leave it out"
            doubts.append(Doubt(f"{job}.stem", f"is {settings.stem}", reason))
        count = len(splits_of(config, dataset, job).training)
        if settings.batch_size > count:
            reason = (
                f"above the {count} {_name_of_training(config, job)}, so that an epoch is one step; lower it"
            )
            doubts.append(Doubt(f"{job}.batch_size", f"is {settings.batch_size}", reason))
    return doubts


def _name_of_training(config: Config, job: str) -> str:
    """Return the name of the pictures that train the weights of a job's network."""
    if job == "retrain":
        return "training pictures"
    return (
        "pictures of the search"
        if config.search.alpha_fraction_or_none is None
        else "pictures that train the weights"
    )


def warnings_of(config: Config, dataset: ImageDataset, jobs: Sequence[str]) -> list[str]:
    """Return a line for the user about each setting that makes no sense for these pictures or on this machine."""
    tables = table_warnings(config) if "search" in jobs else []
    return [f"warning: {each}" for each in (*doubtful_settings(config, dataset, jobs), *tables)]


def warnings_of_trials(
    trials: Iterable[Config], dataset: ImageDataset, jobs: Sequence[str], swept: Container[str]
) -> list[str]:
    """Return a line for the user about each setting of a sweep's trials that makes no sense for these pictures.

    Args:
        trials: Configurations of trials that together contain every value of the space.
        dataset: The sweep's pictures.
        jobs: The jobs of a trial: "search", "retrain".
        swept: Keys of the space.
    """
    doubts: dict[tuple[str, str], Doubt] = {}  # one per setting and value
    for trial in trials:
        for doubt in doubtful_settings(trial, dataset, jobs):
            doubts.setdefault((doubt.field, doubt.value), doubt)
    return [f"warning: {'sweep.space: ' if doubt.field in swept else ''}{doubt}" for doubt in doubts.values()]
