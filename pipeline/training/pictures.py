"""The pictures of a job: loading them, checking the settings against them, recording them, and making batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from istanas.data import (
    Augmentation,
    DecodeSettings,
    ImageDataset,
    Pictures,
    Survey,
    batches,
    load_dataset,
    pictures_digest,
)
from istanas.data.registry import DATASETS, dataset_request
from istanas.data.request import DATA_ROOT, GivenFolder
from istanas.distributed import Ranks
from istanas.errors import CheckpointError, ConfigError, DataError, MissingDataError
from istanas.limits import SMALL_SIDE
from istanas.nets import MIN_IMAGE_SIZE
from istanas.registry import OWN
from istanas.seeds import derive_seed
from istanas.training import Compute
from pipeline.base.addresses import is_remote
from pipeline.config.combinations import check_batch_sizes
from pipeline.config.load import with_stems
from pipeline.config.schema import Config, DataSettings
from pipeline.runs.record import DatasetUse, RunRecord, data_label
from pipeline.training.build import check_networks
from pipeline.training.splits import check_splits, splits_of

DIGEST_LENGTH = 16  # hexadecimal digits; MLflow's pages show all of them, its database column holds 36

Progress = Callable[[int, int], None]
"""Receives (pictures done, pictures in total)."""


def load_pictures(
    data: DataSettings,
    *,
    progress: Progress | None = None,
    checking: Progress | None = None,
    download: bool = True,
) -> ImageDataset:
    """Load the data set that the settings name.

    Args:
        data: The settings.
        progress: Called while a folder is decoded.
        checking: Called while the headers of a folder are read.
        download: Whether missing data may be downloaded, if the settings allow it.

    Raises:
        DataError: If the data is missing or broken.
        ConfigError: If the settings name no data set.
    """
    return load_dataset(
        data.name,
        root=data.root,
        download=data.download and download,
        cache_dir=data.cache_dir,
        image_size=data.image_size,
        background=_rgb(data.background),
        allow_left_out=data.allow_left_out,
        test_fraction=data.test_fraction,
        progress=progress,
        checking=checking,
    )


def open_dataset(config: Config, jobs: Sequence[str]) -> ImageDataset:
    """Load the data set, and check the settings of the given jobs ("search", "retrain") against it.

    Raises:
        DataError: If the data is missing or broken.
        ConfigError: If the settings do not fit the data.
    """
    dataset = load_pictures(config.data)
    check_fit(config, dataset, jobs)
    return dataset


def settle_stems(config: Config, checking: Progress | None = None) -> Config:
    """Return the configuration with each stem `auto` replaced by the one that fits the pictures, see `with_stems`.

    A job does this first, because it hashes and records the stems that its networks have.

    Args:
        config: The configuration. The pictures are inspected, or else loaded, only if the settings do not determine
            their size.
        checking: Called while the headers of the folder are read.

    Raises:
        DataError: If the pictures cannot be used.
        ConfigError: If a network is too narrow for its stem.
    """
    data = config.data
    if "auto" not in (config.search.stem, config.retrain.stem):
        return config
    if data.known_side is not None:
        return with_stems(config, data.known_side)
    survey = survey_of(data, checking)
    if survey is not None:
        return with_stems(config, survey.side(None) or SMALL_SIDE)
    dataset = load_pictures(data)
    return with_stems(config, max(dataset.height, dataset.width))


def possible_stems(config: Config) -> Iterator[Config]:
    """Yield the configuration with each stem that could replace `auto`, depending on the pictures' size.

    One of them identifies a run whose pictures are no longer available.
    """
    for side in (SMALL_SIDE, SMALL_SIDE + 1):
        with contextlib.suppress(ConfigError):  # no run has a network that is too narrow for its stem
            yield with_stems(config, side)


def survey_of(
    data: DataSettings,
    checking: Progress | None = None,
    *,
    keep: bool = True,
    given: GivenFolder = DATA_ROOT,
) -> Survey | None:
    """Return the facts in the headers of the pictures; None if the data set has to be loaded instead.

    Args:
        data: The settings.
        checking: Called while the headers are read.
        keep: Whether the facts are written to the cache.
        given: How error messages name a picture folder.

    Raises:
        DataError: If the folder cannot be used.
    """
    survey = data.entry.survey
    if survey is None:
        return None
    request = dataset_request(
        data.name,
        root=data.root,
        download=False,
        cache_dir=data.cache_dir,
        image_size=data.image_size,
        background=_rgb(data.background),
        allow_left_out=data.allow_left_out,
        test_fraction=data.test_fraction,
        progress=None,
        checking=checking,
        given=given,
    )
    return survey(request, keep)


def decode_settings_of(data: DataSettings, survey: Survey) -> DecodeSettings:
    """Return how the pixels of a picture folder are decoded.

    Raises:
        DataError: If the value ranges of its two splits differ.
    """
    return survey.decode_settings(_rgb(data.background))


def data_are_missing(data: DataSettings, error: DataError) -> bool:
    """Return whether data that failed to load are missing or unreachable, rather than changed.

    Args:
        data: The settings.
        error: The error of loading.
    """
    if not has_own_root(data):
        return True
    if is_remote(str(data.root)):
        return isinstance(error, MissingDataError)
    return not Path(str(data.root)).expanduser().exists()


def has_own_root(data: DataSettings) -> bool:
    """Return whether `data.root` decides which pictures these are."""
    return data.entry.is_named_by_root and data.root is not None


def _rgb(colour: str) -> tuple[int, int, int]:
    """Return the three channels of a colour.

    Example:
        >>> _rgb("#ff8000")
        (255, 128, 0)
    """
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue


def check_fit(config: Config, dataset: ImageDataset, jobs: Sequence[str]) -> None:
    """Check the settings of the given jobs ("search", "retrain") against the pictures.

    Raises:
        ConfigError: If they do not fit.
    """
    check_size(dataset.name, dataset.height, dataset.width)
    side = min(dataset.height, dataset.width)
    for job in jobs:
        cutout = getattr(config, job).cutout
        if cutout > side:
            raise ConfigError(
                f"{cutout} is larger than the pictures' shorter side, {side}",
                field=f"{job}.cutout",
                remedy=f"choose at most {side}",
            )
    check_networks(config, dataset, jobs)
    check_batch_sizes(config, jobs)
    check_splits(config, dataset, jobs)


def check_size(name: str, height: int, width: int) -> None:
    """Check that pictures are large enough for a network.

    Raises:
        ConfigError: If they are too small.
    """
    if min(height, width) < MIN_IMAGE_SIZE:
        raise ConfigError(
            f"pictures of {name} are {height}x{width}, networks need at least {MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE}",
            field="data.image_size",
            remedy=f"set data.image_size to {MIN_IMAGE_SIZE} or more",
        )


def describe_pictures(
    config: Config, dataset: ImageDataset, used: Sequence[DatasetUse], jobs: Sequence[str]
) -> tuple[str, ...]:
    """Return lines for the user about the pictures of a job and their unexpected properties.

    Args:
        config: The configuration.
        dataset: The data set.
        used: The parts of it that the job uses.
        jobs: The jobs whose networks are built: "search", "retrain".
    """
    missing = filter(None, (use.describe_missing() for use in used))
    # The stems for well-known data sets are expected, because their picture sizes are known.
    stems = (f"{job}.stem: {getattr(config, job).stem}" for job in jobs if config.data.entry.side is None)
    return (*dataset.notes, *missing, *stems)


def data_digest(config: Config, dataset: ImageDataset, job: str) -> str:
    """Return the digest of the pictures that a job may read: all, or the training pictures if it never tests.

    Args:
        config: The whole configuration.
        dataset: The data set.
        job: The kind of the run.
    """
    return dataset.digest if _is_ever_tested(config, job) else dataset.train_digest


def check_same_data(saved: dict[str, Any], dataset: ImageDataset) -> None:
    """Check that a checkpoint was made from the same pictures.

    Raises:
        CheckpointError: If the data set's digest differs.
    """
    # A job that never tests records the digest of the training pictures; version 0.1 always recorded that of all.
    if saved.get("data") not in (dataset.digest, dataset.train_digest):
        raise _changed(dataset.name, "the checkpoint of this run was written")


def check_same_pictures(
    record: RunRecord, dataset: ImageDataset, digest: str, used: Sequence[DatasetUse]
) -> None:
    """Check that a run was started with the same pictures.

    Args:
        record: The run's record.
        dataset: The present data set.
        digest: Digest of the part that the run may read, see `data_digest`.
        used: The parts that the run would use now.

    Raises:
        CheckpointError: If the pictures differ.
    """
    now = {use.context: use for use in used}
    if record.data_digest:
        same = record.data_digest == digest
    else:  # a record of version 0.1
        same = all(use.context in now and use.digest == now[use.context].digest for use in record.datasets)
    if not same:
        numbers = [
            f"{use.pictures:,} {use.context} pictures of {use.classes} classes then, "
            f"{now[use.context].pictures:,} of {now[use.context].classes} now"
            for use in record.datasets
            if use.context in now
            and (use.pictures, use.classes) != (now[use.context].pictures, now[use.context].classes)
        ]
        raise _changed(dataset.name, "this run began", numbers)


def _changed(name: str, since: str, numbers: Sequence[str] = ()) -> CheckpointError:
    what = f" ({'; '.join(numbers)})" if numbers else ""
    return CheckpointError(
        f"data set {name} has changed since {since}{what}",
        remedy="restore it, start over with --fresh, or give the new run another name with --set tracking.name=NAME",
    )


def datasets_used(config: Config, dataset: ImageDataset, job: str) -> tuple[DatasetUse, ...]:
    """Return the pictures that a job trains and measures on.

    Args:
        config: The whole configuration.
        dataset: The data set.
        job: "search", "retrain" or "sweep"; for a sweep, the pictures that its trials share.

    Returns:
        One entry per part of the data set.
    """
    splits = splits_of(config, dataset, job)
    parts: dict[str, tuple[Pictures, torch.Tensor]] = {"training": (dataset.train, splits.training)}
    if splits.alphas is not None:  # a two-stage search, which measures on this part only
        parts["alphas"] = dataset.train, splits.alphas
    elif splits.holdout is not None:
        parts["hold-out"] = dataset.train, splits.holdout
    if _is_ever_tested(config, job):
        parts["test"] = dataset.test, torch.arange(len(dataset.test))
    root = config.data.root
    source = (
        f"{dataset.name}, as {_who_ships(dataset.name)} ships it"
        if root is None
        else root
        if is_remote(root)
        else str(Path(root).expanduser().absolute())
    )
    return tuple(
        DatasetUse(
            name=data_label(config.data.name, root),
            context=context,
            digest=pictures_digest(pictures, indices, dataset.class_names)[:DIGEST_LENGTH],
            source=source,
            pictures=len(indices),
            classes=dataset.num_classes,
            shape=(dataset.channels, dataset.height, dataset.width),
            missing=_missing(dataset, pictures.labels[indices]),
        )
        for context, (pictures, indices) in parts.items()
    )


def _who_ships(name: str) -> str:
    """Return who provides the pictures of a data set that has no `data.root`."""
    origin = DATASETS.origin(name)
    return "its library" if origin == OWN else origin


def _missing(dataset: ImageDataset, labels: torch.Tensor) -> tuple[str, ...]:
    """Return the classes without a label."""
    counts = torch.bincount(labels, minlength=dataset.num_classes).tolist()
    return tuple(name for name, n in zip(dataset.class_names, counts, strict=True) if n == 0)


def _is_ever_tested(config: Config, job: str) -> bool:
    """Return whether a job measures the test split; sweeps, benchmarks and searches that train no network never do."""
    if job == "search":
        return config.search.test_interval > 0
    return job in ("retrain", "versus", "rank") and config.retrain.test_every > 0


def search_augmentation(config: Config) -> Augmentation:
    """Return the augmentation of a search."""
    return _augmentation(config.data, config.search.cutout)


def retrain_augmentation(config: Config) -> Augmentation:
    """Return the augmentation of a retraining."""
    r = config.retrain
    return replace(
        _augmentation(config.data, r.cutout),
        color_jitter=r.color_jitter,
        rand_augment=r.rand_augment,
        random_erasing=r.random_erasing,
    )


def _augmentation(data: DataSettings, cutout: int) -> Augmentation:
    return Augmentation(
        data.crop_padding, data.horizontal_flip, cutout, reduced_decoding=data.reduced_decoding
    )


class Batches:
    """This rank's batches of a job. Each pass is determined by (seed, purpose, epoch, rank)."""

    def __init__(
        self,
        config: Config,
        dataset: ImageDataset,
        compute: Compute,
        ranks: Ranks,
        batch_size: int,
        augmentation: Augmentation,
    ) -> None:
        self._dataset, self._compute, self._ranks, self._batch_size = dataset, compute, ranks, batch_size
        self._seed, self._workers = config.seed, config.runtime.data_workers
        self._augmentation = augmentation

    def training(self, purpose: str, indices: torch.Tensor, epoch: int) -> Any:
        """Return the batches of a training epoch, shuffled and augmented."""
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
            # Batch norm needs at least two pictures on each rank.
            drop_last=0 < len(indices) % self._batch_size < 2 * self._ranks.size
            and len(indices) > self._batch_size,
            rank=self._ranks.rank,
            world_size=self._ranks.size,
            workers=self._workers,
        )

    def shuffled(self, purpose: str, indices: torch.Tensor) -> Any:
        """Return batches in an order that is the same in every call, without augmentation.

        Unlike those of `measuring`, the batches of a folder, which is sorted by class, have pictures of all classes. A
        small last batch, which has no useful mean and variance, is left out.
        """
        return batches(
            self._dataset,
            "train",
            indices,
            batch_size=self._batch_size,
            augmentation=None,
            device=self._compute.device,
            seed=derive_seed(self._seed, purpose),
            epoch=0,
            shuffle=True,
            drop_last=0 < len(indices) % self._batch_size < 2 * self._ranks.size
            and len(indices) > self._batch_size,
            rank=self._ranks.rank,
            world_size=self._ranks.size,
            workers=self._workers,
        )

    def measuring(self, split: Any, indices: torch.Tensor | None) -> Any:
        """Return the batches for an evaluation, in order and without augmentation."""
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
