"""Which pictures a job sees, and as what batches: splits, subsets, checks of the settings against the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from istanas.data import (
    Augmentation,
    ImageDataset,
    Pictures,
    batches,
    load_dataset,
    pictures_digest,
    stratified_split,
    stratified_subset,
)
from istanas.distributed import Ranks
from istanas.errors import CheckpointError, ConfigError
from istanas.nets import MIN_IMAGE_SIZE
from istanas.training import Compute, derive_seed
from pipeline.config import check_batch_sizes
from pipeline.rundir import DatasetUse
from pipeline.schema import Config, OneStageConfig, TwoStageConfig

DIGEST_LENGTH = 16  # hexadecimal digits: MLflow's pages show all of them, its column holds 36


@dataclass(frozen=True)
class SearchSplit:
    """Indices into the training pictures: for the weights, for the alphas."""

    weights: torch.Tensor
    alphas: torch.Tensor


def open_dataset(
    config: Config, jobs: Sequence[str], progress: Callable[[int, int], None] | None = None
) -> ImageDataset:
    """Load the data set and check the settings of the jobs to come ("search", "retrain") against it.

    Raises:
        DataError: if the data is missing or broken.
        ConfigError: if the settings do not fit it.
    """
    d = config.data
    dataset = load_dataset(
        d.name,
        root=d.root,
        download=d.download,
        cache_dir=d.cache_dir,
        image_size=d.image_size,
        progress=progress,
    )
    check_fit(config, dataset, jobs)
    return dataset


def check_fit(config: Config, dataset: ImageDataset, jobs: Sequence[str]) -> None:
    """Check the settings of the jobs to come against the pictures.

    Raises:
        ConfigError: if they do not fit.
    """
    side = min(dataset.height, dataset.width)
    if side < MIN_IMAGE_SIZE:
        raise ConfigError(
            f"data.image_size: pictures of {dataset.name} are {dataset.height}x{dataset.width}, networks need at least "
            f"{MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE}: set data.image_size"
        )
    for job in jobs:
        cutout = getattr(config, job).cutout
        if cutout > side:
            raise ConfigError(f"{job}.cutout is {cutout}, above the pictures' side of {side}: lower it")
    check_batch_sizes(config, jobs)
    holdout = holdout_indices(config, dataset)
    if holdout is not None and len(holdout) == 0:
        raise ConfigError(
            f"data.holdout is {config.data.holdout}: of {len(dataset.train)} pictures it keeps none, raise it or set 0"
        )
    if "search" in jobs and isinstance(config, TwoStageConfig):
        search_split(config, dataset)
    elif "search" in jobs:
        search_indices(config, dataset)


def check_same_data(saved: dict[str, Any], dataset: ImageDataset) -> None:
    """Refuse to go on with other pictures than a checkpoint was made from.

    Raises:
        CheckpointError: if the data set's digest differs.
    """
    if saved.get("data") != dataset.digest:
        raise CheckpointError(
            f"data set {dataset.name} has changed since the checkpoint of this run, "
            "restore it or start over with --fresh"
        )


def training_indices(config: Config, dataset: ImageDataset) -> torch.Tensor:
    """The training pictures that may be trained on: all but the hold-out."""
    labels = dataset.train.labels
    if config.data.holdout == 0:
        return torch.arange(len(labels))
    return stratified_split(labels, config.data.holdout, derive_seed(config.seed, "holdout"))[0]


def holdout_indices(config: Config, dataset: ImageDataset) -> torch.Tensor | None:
    """The training pictures kept for choosing, or None."""
    if config.data.holdout == 0:
        return None
    return stratified_split(dataset.train.labels, config.data.holdout, derive_seed(config.seed, "holdout"))[1]


def search_indices(config: Config, dataset: ImageDataset) -> torch.Tensor:
    """The training pictures that a search uses: all that may be trained on, or a stratified part of them.

    Raises:
        ConfigError: if there are fewer than asked for.
    """
    most, usable = config.search.max_pictures, training_indices(config, dataset)
    if most is None:
        return usable
    if most > len(usable):
        raise ConfigError(f"search.max_pictures is {most}, above the {len(usable)} there are: lower it")
    labels = dataset.train.labels[usable]
    return usable[stratified_subset(labels, most, derive_seed(config.seed, "subset"))]


def search_split(config: TwoStageConfig, dataset: ImageDataset) -> SearchSplit:
    """Weight and alpha parts of the training pictures: stratified, seeded, disjoint.

    Raises:
        ConfigError: if a part would be empty.
    """
    usable, fraction = search_indices(config, dataset), config.search.alpha_fraction
    seed = derive_seed(config.seed, "split")
    weights, alphas = stratified_split(dataset.train.labels[usable], fraction, seed)
    if len(weights) == 0 or len(alphas) == 0:
        raise ConfigError(
            f"search.alpha_fraction is {fraction}: of {len(usable)} pictures it leaves {len(weights)} for the "
            f"weights and {len(alphas)} for the alphas, choose another"
        )
    return SearchSplit(usable[weights], usable[alphas])


def datasets_used(config: Config, dataset: ImageDataset, job: str) -> tuple[DatasetUse, ...]:
    """The pictures that a job trains and measures on.

    Args:
        config: the whole configuration.
        dataset: the data set.
        job: "search", "retrain" or "sweep"; of a sweep, what its trials have in common.

    Returns:
        One entry for each part of the data set.
    """
    parts: dict[str, tuple[Pictures, torch.Tensor]] = {}
    if job == "search" and isinstance(config, TwoStageConfig):
        split = search_split(config, dataset)
        parts["training"], parts["alphas"] = (dataset.train, split.weights), (dataset.train, split.alphas)
    else:
        chosen = search_indices(config, dataset) if job == "search" else training_indices(config, dataset)
        parts["training"] = dataset.train, chosen
        holdout = holdout_indices(config, dataset)
        if holdout is not None:
            parts["hold-out"] = dataset.train, holdout
        if job != "sweep" and _is_ever_tested(config, job):
            parts["test"] = dataset.test, torch.arange(len(dataset.test))
    root = config.data.root
    source = (
        f"{dataset.name}, as its library ships it"
        if root is None
        else str(Path(root).expanduser().absolute())
    )
    return tuple(
        DatasetUse(
            name=dataset.name,
            context=context,
            digest=pictures_digest(pictures, indices, dataset.class_names)[:DIGEST_LENGTH],
            source=source,
            pictures=len(indices),
            classes=dataset.num_classes,
            shape=(dataset.channels, dataset.height, dataset.width),
        )
        for context, (pictures, indices) in parts.items()
    )


def _is_ever_tested(config: Config, job: str) -> bool:
    if job == "search":
        assert isinstance(config, OneStageConfig)
        return config.search.test_every > 0
    return config.retrain.test_every > 0


class Batches:
    """Makes this rank's batches of a job: every pass follows from (seed, purpose, epoch, rank)."""

    def __init__(
        self,
        config: Config,
        dataset: ImageDataset,
        compute: Compute,
        ranks: Ranks,
        batch_size: int,
        cutout: int,
    ) -> None:
        self._dataset, self._compute, self._ranks, self._batch_size = dataset, compute, ranks, batch_size
        self._seed, self._workers = config.seed, config.runtime.data_workers
        self._augmentation = Augmentation(config.data.crop_padding, config.data.horizontal_flip, cutout)

    def training(self, purpose: str, indices: torch.Tensor, epoch: int) -> Any:
        """Shuffled and augmented."""
        return batches(
            self._dataset,
            "train",
            indices,
            batch_size=self._batch_size,
            augmentation=self._augmentation,
            device=self._compute.device,
            seed=derive_seed(self._seed, purpose),
            epoch=epoch,
            shuffle=True,
            # A rank's last batch of one picture has no variance for batch norm to divide by.
            drop_last=0 < len(indices) % self._batch_size < 2 * self._ranks.size
            and len(indices) > self._batch_size,
            rank=self._ranks.rank,
            world_size=self._ranks.size,
            workers=self._workers,
        )

    def measuring(self, split: Any, indices: torch.Tensor | None) -> Any:
        """In order, only normalised."""
        return batches(
            self._dataset,
            split,
            indices,
            batch_size=max(self._batch_size, 256),
            augmentation=None,
            device=self._compute.device,
            seed=0,
            epoch=0,
            shuffle=False,
            rank=self._ranks.rank,
            world_size=self._ranks.size,
            workers=self._workers,
        )
