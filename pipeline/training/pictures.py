"""Which pictures a job sees, and as what batches: splits, subsets, checks of the settings against the data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from istanas.data import (
    Augmentation,
    ImageDataset,
    Pictures,
    Reading,
    Survey,
    batches,
    load_dataset,
    pictures_digest,
    stratified_split,
    stratified_subset,
    survey_folder,
)
from istanas.data.cache import default_cache_dir
from istanas.distributed import Ranks
from istanas.errors import CheckpointError, ConfigError
from istanas.limits import SMALL_SIDE
from istanas.nets import MIN_IMAGE_SIZE
from istanas.training import Compute, derive_seed
from pipeline.config.combinations import check_batch_sizes
from pipeline.config.load import with_stems
from pipeline.config.schema import Config, DataSettings, OneStageConfig, TwoStageConfig
from pipeline.runs.record import OWN_PICTURES, DatasetUse, RunRecord, data_label

DIGEST_LENGTH = 16  # hexadecimal digits: MLflow's pages show all of them, its column holds 36


@dataclass(frozen=True)
class SearchSplit:
    """Indices into the training pictures: for the weights, for the alphas."""

    weights: torch.Tensor
    alphas: torch.Tensor


Progress = Callable[[int, int], None]


def load_pictures(
    data: DataSettings,
    *,
    progress: Progress | None = None,
    checking: Progress | None = None,
    download: bool = True,
) -> ImageDataset:
    """Load the data set that the settings name.

    Args:
        data: the settings.
        progress: told of the decoding of a folder.
        checking: told of the reading of a folder's headers.
        download: whether what is absent may be downloaded, if the settings allow it.

    Raises:
        DataError: if the data is missing or broken.
        ConfigError: if there is no such data.
    """
    return load_dataset(
        data.name,
        root=data.root,
        download=data.download and download,
        cache_dir=data.cache_dir,
        image_size=data.image_size,
        background=_rgb(data.background),
        allow_left_out=data.allow_left_out,
        progress=progress,
        checking=checking,
    )


def open_dataset(config: Config, jobs: Sequence[str]) -> ImageDataset:
    """Load the data set and check the settings of the jobs to come ("search", "retrain") against it.

    Raises:
        DataError: if the data is missing or broken.
        ConfigError: if the settings do not fit it.
    """
    dataset = load_pictures(config.data)
    check_fit(config, dataset, jobs)
    return dataset


def settle_stems(config: Config, checking: Progress | None = None) -> Config:
    """The configuration with the stems that fit the pictures in the place of `auto`, see `config.with_stems`.

    A job does so before anything else: what it hashes and records are the stems that its networks have.

    Args:
        config: the configuration; only that of a picture folder without a size may need a look at the pictures.
        checking: told of the reading of the folder's headers.

    Raises:
        DataError: if the folder cannot be used.
        ConfigError: if a network is too narrow for its stem.
    """
    data = config.data
    if "auto" not in (config.search.stem, config.retrain.stem):
        return config
    if data.known_side is not None:
        return with_stems(config, data.known_side)
    return with_stems(config, survey_of(data, checking).side(None) or SMALL_SIDE)


def possible_stems(config: Config) -> Iterator[Config]:
    """Yield the configuration with each stem that pictures of some size would put in the place of `auto`.

    A run is found by one of them when its pictures can no longer be looked at.
    """
    for side in (SMALL_SIDE, SMALL_SIDE + 1):
        with contextlib.suppress(ConfigError):  # a network that is too narrow for this stem has no run
            yield with_stems(config, side)


def survey_of(data: DataSettings, checking: Progress | None = None, *, keep: bool = True) -> Survey:
    """What the headers of a picture folder tell.

    Args:
        data: the settings, of a folder.
        checking: told of the reading of the headers.
        keep: False writes nothing into the cache.

    Raises:
        DataError: if the folder cannot be used.
    """
    assert data.root is not None, "which the configuration checks"
    return survey_folder(
        Path(data.root).expanduser(),
        cache_dir=default_cache_dir() if data.cache_dir is None else Path(data.cache_dir).expanduser(),
        allow_left_out=data.allow_left_out,
        progress=checking,
        keep=keep,
    )


def reading_of(data: DataSettings, survey: Survey) -> Reading:
    """How the pixels of a picture folder are read.

    Raises:
        DataError: if the values of its two splits do not fit each other.
    """
    return survey.reading(_rgb(data.background))


def data_folder_is_missing(data: DataSettings) -> bool:
    """Whether data that could not be loaded are no longer there, as opposed to changed."""
    return data.name != "folder" or data.root is None or not Path(data.root).expanduser().exists()


def _rgb(colour: str) -> tuple[int, int, int]:
    """The three channels of a colour.

    Example:
        >>> _rgb("#ff8000")
        (255, 128, 0)
    """
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue


def check_fit(config: Config, dataset: ImageDataset, jobs: Sequence[str]) -> None:
    """Check the settings of the jobs to come against the pictures.

    Raises:
        ConfigError: if they do not fit.
    """
    check_size(dataset.name, dataset.height, dataset.width)
    side = min(dataset.height, dataset.width)
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


def check_size(name: str, height: int, width: int) -> None:
    """Check that pictures are large enough for a network.

    Raises:
        ConfigError: if they are not.
    """
    if min(height, width) < MIN_IMAGE_SIZE:
        raise ConfigError(
            f"data.image_size: pictures of {name} are {height}x{width}, networks need at least "
            f"{MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE}; set data.image_size"
        )


def describe_pictures(
    config: Config, dataset: ImageDataset, used: Sequence[DatasetUse], jobs: Sequence[str]
) -> tuple[str, ...]:
    """Return lines for people about the pictures of a job: what there is, and what its owner may not know.

    Args:
        config: the configuration.
        dataset: the data set.
        used: the parts of it that the job uses.
        jobs: whose networks are built, "search" or "retrain".
    """
    missing = filter(None, (use.describe_missing() for use in used))
    # Of data sets with a name, everybody knows the size.
    stems = (f"{job}.stem: {getattr(config, job).stem}" for job in jobs if config.data.name == OWN_PICTURES)
    return (*dataset.notes, *missing, *stems)


def data_digest(config: Config, dataset: ImageDataset, job: str) -> str:
    """The digest of the pictures that a job may read: all, or the training pictures if it never reads the others.

    Args:
        config: the whole configuration.
        dataset: the data set.
        job: "search", "retrain" or "sweep".
    """
    return dataset.digest if _is_ever_tested(config, job) else dataset.train_digest


def check_same_data(saved: dict[str, Any], dataset: ImageDataset) -> None:
    """Refuse to go on with other pictures than a checkpoint was made from.

    Raises:
        CheckpointError: if the data set's digest differs.
    """
    # A job that never tests has written down the digest of the training pictures; version 0.1 always that of all.
    if saved.get("data") not in (dataset.digest, dataset.train_digest):
        raise CheckpointError(_changed(dataset.name, "the checkpoint of this run"))


def check_same_pictures(
    record: RunRecord, dataset: ImageDataset, digest: str, used: Sequence[DatasetUse]
) -> None:
    """Refuse a run that was made of other pictures than those that are there now.

    Args:
        record: of the run.
        dataset: that is there now.
        digest: of what the run may read of it, see `data_digest`.
        used: the parts of it that the run would use now.

    Raises:
        CheckpointError: if they differ.
    """
    now = {use.context: use for use in used}
    if record.data_digest:
        same = record.data_digest == digest
    else:  # of version 0.1
        same = all(use.context in now and use.digest == now[use.context].digest for use in record.datasets)
    if not same:
        numbers = [
            f"{use.pictures:,} {use.context} pictures of {use.classes} classes then, "
            f"{now[use.context].pictures:,} of {now[use.context].classes} now"
            for use in record.datasets
            if use.context in now
            and (use.pictures, use.classes) != (now[use.context].pictures, now[use.context].classes)
        ]
        raise CheckpointError(_changed(dataset.name, "this run began", numbers))


def _changed(name: str, since: str, numbers: Sequence[str] = ()) -> str:
    what = f" ({'; '.join(numbers)})" if numbers else ""
    return (
        f"data set {name} has changed since {since}{what}: restore it, start over with --fresh, or give the new run "
        "another name with --set tracking.name=NAME"
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
        if _is_ever_tested(config, job):
            parts["test"] = dataset.test, torch.arange(len(dataset.test))
    root = config.data.root
    source = (
        f"{dataset.name}, as its library ships it"
        if root is None
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


def _missing(dataset: ImageDataset, labels: torch.Tensor) -> tuple[str, ...]:
    """The classes that no label is of."""
    counts = torch.bincount(labels, minlength=dataset.num_classes).tolist()
    return tuple(name for name, n in zip(dataset.class_names, counts, strict=True) if n == 0)


def _is_ever_tested(config: Config, job: str) -> bool:
    """Whether a job measures the test split: two-stage searches and sweeps never do."""
    if job == "search":
        return isinstance(config, OneStageConfig) and config.search.test_every > 0
    return job == "retrain" and config.retrain.test_every > 0


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
