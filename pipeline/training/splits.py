"""The splits of the training pictures among the purposes of a job."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from istanas.data import ImageDataset, stratified_split, stratified_subset
from istanas.errors import ConfigError
from istanas.seeds import derive_seed
from pipeline.config.schema import Config

MIN_TRAINING = 2  # batch norm needs two pictures, and so do the two halves of a search
_REMEMBERED = 4  # cached splits per data set; a sweep checks many configurations


@dataclass(frozen=True, eq=False)
class Splits:
    """Sorted, disjoint indices into the training pictures.

    Args:
        training: Pictures that train the network's weights.
        alphas: Pictures that train the alphas of a search; None for other jobs, and for methods that train weights and
            alphas on the same pictures.
        holdout: Pictures for validation; None without `data.holdout`.
    """

    training: Tensor
    alphas: Tensor | None
    holdout: Tensor | None

    def alpha_half(self) -> Tensor:
        """Return `alphas` of a search that has them."""
        assert self.alphas is not None, "the method does not divide the pictures"
        return self.alphas


_known: WeakKeyDictionary[ImageDataset, dict[Hashable, Splits]] = WeakKeyDictionary()


def splits_of(config: Config, dataset: ImageDataset, job: str) -> Splits:
    """Return the splits of a job, computed once per process for the same data set and settings.

    Args:
        config: The whole configuration.
        dataset: The data set.
        job: "search", "retrain" or "sweep"; for a sweep, the splits that its trials share.

    Raises:
        ConfigError: If a part would be too small.
    """
    key = _key(config, job)
    known = _known.setdefault(dataset, {})
    if key not in known:
        if len(known) >= _REMEMBERED:
            known.pop(next(iter(known)))
        known[key] = _compute(config, dataset, job)
    return known[key]


def check_splits(config: Config, dataset: ImageDataset, jobs: Sequence[str]) -> None:
    """Check that no part of the training pictures is too small for one of the jobs.

    Args:
        config: The whole configuration.
        dataset: The data set.
        jobs: See `splits_of`.

    Raises:
        ConfigError: If a part is too small.
    """
    for job in jobs or ("sweep",):
        splits_of(config, dataset, job)


def _key(config: Config, job: str) -> Hashable:
    """Return the settings that determine the splits."""
    if job != "search":
        return config.seed, config.data.holdout
    s = config.search
    return config.seed, config.data.holdout, s.max_pictures, s.alpha_fraction_or_none


def _compute(config: Config, dataset: ImageDataset, job: str) -> Splits:
    usable, holdout = _without_holdout(config, dataset)
    if job != "search":
        return Splits(usable, None, holdout)
    usable = _searched(config, dataset, usable)
    fraction = config.search.alpha_fraction_or_none
    if fraction is None:
        return Splits(usable, None, holdout)
    weights, alphas = stratified_split(
        dataset.train.labels[usable], fraction, derive_seed(config.seed, "split")
    )
    if len(weights) == 0 or len(alphas) == 0:
        raise ConfigError(
            f"{fraction} leaves {len(weights)} of {len(usable)} pictures for the weights and {len(alphas)} for the "
            "alphas",
            field="search.alpha_fraction",
            remedy="choose another fraction",
        )
    return Splits(usable[weights], usable[alphas], holdout)


def _without_holdout(config: Config, dataset: ImageDataset) -> tuple[Tensor, Tensor | None]:
    """Return the pictures that may be trained on, and the hold-out."""
    labels, share = dataset.train.labels, config.data.holdout
    if share == 0:
        return torch.arange(len(labels)), None
    usable, holdout = stratified_split(labels, share, derive_seed(config.seed, "holdout"))
    if len(holdout) == 0:
        raise ConfigError(
            f"{share} keeps none of {len(labels)} pictures", field="data.holdout", remedy="raise it or set 0"
        )
    if len(usable) < MIN_TRAINING:
        raise ConfigError(
            f"{share} leaves {len(usable)} of {len(labels)} pictures for training",
            field="data.holdout",
            remedy="lower it",
        )
    return usable, holdout


def _searched(config: Config, dataset: ImageDataset, usable: Tensor) -> Tensor:
    """Return the part of the usable pictures that a search uses."""
    most = config.search.max_pictures
    if most is None:
        return usable
    if most > len(usable):
        raise ConfigError(
            f"{most} is above the {len(usable)} available pictures",
            field="search.max_pictures",
            remedy="lower it",
        )
    return usable[stratified_subset(dataset.train.labels[usable], most, derive_seed(config.seed, "subset"))]
