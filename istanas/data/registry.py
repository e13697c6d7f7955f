"""The registry of data sets: scikit-learn's digits (no download), torchvision's data sets, picture folders, and shards.

This module does not import torch, so that a configuration can be checked quickly.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from istanas.buckets import is_address
from istanas.checks import check_dataset_arguments
from istanas.data.pool import Progress
from istanas.data.request import DatasetRequest
from istanas.errors import ConfigError, DataError, IstanasError
from istanas.limits import SMALL_SIDE
from istanas.registry import OWN, Registry

if TYPE_CHECKING:
    from istanas.data.image_dataset import ImageDataset
    from istanas.data.survey import Survey

Load = Callable[[DatasetRequest], "ImageDataset"]
"""Loads a data set. The request holds the settings, see `load_dataset`."""


@dataclass(frozen=True)
class DatasetEntry:
    """A registered data set: how it is loaded, and what is known about it before it is loaded.

    Args:
        load: Returns the data set.
        needs_root: Whether `data.root` must be given.
        resizable: Whether `data.image_size` has an effect.
        side: Largest side of its pictures in pixels. None if it is known only from the pictures, which are then loaded
            or inspected before a stem is chosen.
        max_image_size: Largest `data.image_size`; None for any.
        parts: The files and folders in `data.root` that hold the data. A job compares them between the nodes of a
            cluster. "" is all of `data.root`; without parts, nothing is compared.
        downloads: Whether the data lie in the cache's folder of downloads if there is no `data.root`.
        is_named_by_root: Whether `data.root` decides which pictures these are. Results are then listed under the name
            of that folder.
        can_split: Whether it takes `data.test_fraction`, because its pictures may have no test split.
        reads_buckets: Whether `data.root` may be the address of a bucket, such as `s3://BUCKET/PREFIX`.
        survey: Returns what the headers of its files say about the pictures, without decoding any; the second argument
            says whether the result is cached. None if the data set has to be loaded to know it.
    """

    load: Load
    needs_root: bool = False
    resizable: bool = False
    side: int | None = None
    max_image_size: int | None = None
    parts: tuple[str, ...] = ("",)
    downloads: bool = False
    is_named_by_root: bool = True
    can_split: bool = False
    reads_buckets: bool = False
    survey: Callable[[DatasetRequest, bool], Survey] | None = None


DATASETS: Registry[DatasetEntry] = Registry("data set", "data.name")
"""The registered data sets, by name."""


def register_dataset(
    name: str, load: Load, *, needs_root: bool = False, resizable: bool = False, side: int | None = None
) -> None:
    """Register a data set, which `data.name` can then name.

    Args:
        name: Its name: a letter followed by at most 63 letters, digits and underscores.
        load: Returns the data set; `istanas.data.dataset_from_arrays` builds it from NumPy arrays.
        needs_root: Whether `data.root`, a file or a folder, must be given. The function receives it as
            `request.root`.
        resizable: Whether the function scales the pictures to `request.image_size`, as `dataset_from_arrays` does.
            Otherwise, `data.image_size` is refused.
        side: Largest side of its pictures in pixels, if it is always the same. Otherwise, the pictures are loaded
            before `stem: auto` chooses the stem that fits them.

    Raises:
        ConfigError: If the name is taken or invalid, or `load` is not a function.

    Example:
        >>> import numpy as np
        >>> from istanas.data import dataset_from_arrays
        >>> from istanas.registry import registering_for, unregister
        >>> def noise(request):
        ...     pictures = np.random.default_rng(0).integers(256, size=(20, 8, 8), dtype=np.uint8)
        ...     labels = np.arange(20) % 2
        ...     return dataset_from_arrays(request, pictures, labels, pictures, labels)
        >>> with registering_for("example") as registered:
        ...     register_dataset("noise", noise)
        >>> load_dataset("noise").num_classes
        2
        >>> unregister(registered)
    """
    if not callable(load):
        raise ConfigError(
            f"{name!r:.80} has no function that loads it, but {load!r:.60}",
            field=DATASETS.field,
            remedy="call register_dataset(name, function)",
        )
    if side is not None and (not isinstance(side, int) or side < 1):
        raise ConfigError(
            f"{side!r:.60} is not the side of the pictures of {name!r:.80}",
            field=DATASETS.field,
            remedy="give the largest side in pixels",
        )
    DATASETS.register(name, DatasetEntry(load, needs_root=needs_root, resizable=resizable, side=side))


def load_dataset(
    name: str,
    *,
    root: str | Path | None = None,
    download: bool = False,
    cache_dir: str | Path | None = None,
    image_size: int | None = None,
    background: tuple[int, int, int] = (255, 255, 255),
    allow_left_out: bool = False,
    test_fraction: float = 0.0,
    progress: Progress | None = None,
    checking: Progress | None = None,
) -> ImageDataset:
    """Load a data set by its name.

    Args:
        name: A key of `DATASETS`.
        root: The picture folder, the folder or the bucket's address of shards, or the folder with torchvision's files
            (by default `cache_dir`/downloads).
        download: Whether to download torchvision's files if they are missing.
        cache_dir: Cache folder; by default `$XDG_CACHE_HOME/istanas` or `~/.cache/istanas`.
        image_size: Side in pixels to which the pictures are scaled. Pictures of up to 64 pixels are kept in memory;
            larger ones (folders only) are decoded for each batch. By default, small pictures keep their size and large
            ones are scaled to 224.
        background: (red, green, blue) in 0..255, over which transparent pictures of a folder are composited.
        allow_left_out: Whether more than 1 % of the files of a class of a folder may be ignored, because they lie in
            sub-folders or have an unsupported suffix.
        test_fraction: Share of each class of a folder `CLASS/*` that becomes its test split, in [0, 1); 0 for a folder
            `train/CLASS/*`, `test/CLASS/*`.
        progress: Called with (pictures decoded, pictures in total) while a folder is decoded.
        checking: Called with (pictures checked, pictures in total) while the headers of a folder are read.

    Returns:
        The data set, with the pictures on the CPU.

    Raises:
        ConfigError: If the name is unknown or the size is impossible.
        DataError: If pictures are missing or broken, or the function of a registered data set fails.

    Example:
        >>> digits = load_dataset("digits")
        >>> len(digits.train), len(digits.test), digits.num_classes
        (1438, 359, 10)
    """
    entry = DATASETS.find(name)
    check_dataset_arguments(
        name,
        entry,
        root=None if root is None else str(root),
        image_size=image_size,
        test_fraction=test_fraction,
    )
    request = dataset_request(
        name,
        root=root,
        download=download,
        cache_dir=cache_dir,
        image_size=image_size,
        background=background,
        allow_left_out=allow_left_out,
        test_fraction=test_fraction,
        progress=progress,
        checking=checking,
    )
    if DATASETS.origin(name) == OWN:
        return entry.load(request)
    return _loaded_by_user(entry, request)


def dataset_request(
    name: str, *, root: str | Path | None, cache_dir: str | Path | None, **settings: Any
) -> DatasetRequest:
    """Return the request that a data set's function receives, with the default cache folder filled in.

    Args:
        name, root, cache_dir, settings: As for `load_dataset`.
    """
    from istanas.data.cache import default_cache_dir

    address = str(root) if root is not None and is_address(str(root)) else None
    return DatasetRequest(
        name=name,
        root=None if root is None or address is not None else Path(root).expanduser(),
        address=address,
        cache_dir=default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser(),
        **settings,
    )


def _loaded_by_user(entry: DatasetEntry, request: DatasetRequest) -> ImageDataset:
    """Call the function of a user's data set, and check what it returns.

    Raises:
        DataError: If the function fails or returns something that the networks cannot be trained on.
    """
    from istanas.data.cache import reason
    from istanas.data.image_dataset import checked_dataset

    name = request.name
    try:
        dataset = entry.load(request)
    except (IstanasError, MemoryError):
        raise
    except Exception as error:
        raise DataError(
            f"the function of {name} failed ({type(error).__name__}: {reason(error)})",
            field=DATASETS.field,
            remedy=f"correct {DATASETS.origin(name)}, or the data that it reads",
        ) from error
    dataset = checked_dataset(name, dataset)
    size = request.image_size
    if size is not None and (dataset.height, dataset.width) != (size, size):
        raise DataError(
            f"{size} has no effect: the function of {name} returned pictures of {dataset.height}x{dataset.width}",
            field="data.image_size",
            remedy="leave it out, or let the function scale the pictures to request.image_size",
        )
    if size is None and entry.side is not None and max(dataset.height, dataset.width) > entry.side:
        raise DataError(
            f"{name} is registered with side={entry.side}, and its pictures have {dataset.height}x{dataset.width}",
            field=DATASETS.field,
            remedy="correct the side, or leave it out",
        )
    return dataset


# ---------- the package's own data sets
def _own(module: str, function: str) -> Callable[..., Any]:
    """Return a function of a module that is imported when it is called, because the module imports torch."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"istanas.data.{module}"), function)(*arguments)

    return call


TORCHVISION = {
    "cifar10": ("CIFAR10", ("cifar-10-batches-py",)),
    "cifar100": ("CIFAR100", ("cifar-100-python",)),
    "mnist": ("MNIST", ("MNIST/raw",)),
    "fashion_mnist": ("FashionMNIST", ("FashionMNIST/raw",)),
    "kmnist": ("KMNIST", ("KMNIST/raw",)),
    "svhn": ("SVHN", ("train_32x32.mat", "test_32x32.mat")),
}
"""Name of the torchvision class of each data set, and its files in the root folder."""

DATASETS.register(
    "digits",
    DatasetEntry(
        _own("arrays", "load_digits"),
        resizable=True,
        side=SMALL_SIDE,
        max_image_size=SMALL_SIDE,
        parts=(),
        is_named_by_root=False,
    ),
)
for _name, (_, _files) in TORCHVISION.items():
    DATASETS.register(
        _name,
        DatasetEntry(
            _own("arrays", "load_torchvision"),
            resizable=True,
            side=SMALL_SIDE,
            max_image_size=SMALL_SIDE,
            parts=_files,
            downloads=True,
            is_named_by_root=False,
        ),
    )
DATASETS.register(
    "folder",
    DatasetEntry(
        _own("folder_dataset", "load_folder"),
        needs_root=True,
        resizable=True,
        parts=("train", "test", "val"),
        can_split=True,
        survey=_own("folder_dataset", "survey"),
    ),
)
DATASET_ALIASES = {"shards": "webdataset"}
"""Data sets with two names: a configuration uses the second one, so that both names are the same run."""

for _name in ("webdataset", "shards"):
    DATASETS.register(
        _name,
        DatasetEntry(
            _own("shard_dataset", "load_shards"),
            needs_root=True,
            resizable=True,
            parts=("train", "test", "val", "index.parquet"),
            reads_buckets=True,
            survey=_own("shard_dataset", "survey"),
        ),
    )
