"""Data sets that are arrays in memory: scikit-learn's digits and torchvision's data sets."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from istanas.data.cache import reason, sha256
from istanas.data.image_dataset import ArrayPictures, ImageDataset, pictures_digest
from istanas.data.preprocessing import stretch_images
from istanas.data.registry import TORCHVISION
from istanas.data.request import DatasetRequest
from istanas.data.splits import stratified_split
from istanas.data.survey import describe
from istanas.errors import DataError


def load_digits(request: DatasetRequest) -> ImageDataset:
    """Load scikit-learn's 1,797 handwritten digits. The test split is the same 20 % for every seed."""
    # Only the data file is read, because importing scikit-learn takes a second in every worker and trial.
    file = importlib.metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = np.loadtxt(str(file), delimiter=",")  # 64 grey values in 0..16, then the digit
    images = np.rint(rows[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = torch.as_tensor(rows[:, -1], dtype=torch.int64)
    rest, part = stratified_split(labels, 0.2, seed=0)
    pictures = torch.from_numpy(images)
    return array_dataset(
        request.name,
        [str(digit) for digit in range(10)],
        ArrayPictures(pictures[rest], labels[rest]),
        ArrayPictures(pictures[part], labels[part]),
        size=request.image_size,
    )


def load_torchvision(request: DatasetRequest) -> ImageDataset:
    """Load one of torchvision's data sets from its files."""
    root = request.cache_dir / "downloads" if request.root is None else request.root
    splits: list[ArrayPictures] = []
    for train in (True, False):
        source = _open_torchvision(request, root, train)
        images = torch.as_tensor(source.data)
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[-1] == 3:  # CIFAR comes as (N, H, W, C), SVHN as (N, C, H, W)
            images = images.permute(0, 3, 1, 2)
        labels = torch.as_tensor(source.labels if request.name == "svhn" else source.targets)
        splits.append(ArrayPictures(images.contiguous(), labels.long()))
    class_names = getattr(source, "classes", None) or [str(digit) for digit in range(10)]
    return array_dataset(request.name, class_names, *splits, size=request.image_size)


def _open_torchvision(request: DatasetRequest, root: Path, train: bool) -> Any:
    """Construct torchvision's data set, and convert any exception to a DataError."""
    import torchvision.datasets

    class_name, _ = TORCHVISION[request.name]
    split = {"split": "train" if train else "test"} if request.name == "svhn" else {"train": train}
    try:
        return getattr(torchvision.datasets, class_name)(root, download=request.download, **split)
    except (
        Exception
    ) as error:  # missing or truncated files, network and permission errors, wrong checksums ...
        if request.download:
            raise DataError(
                f"{request.name} could not be downloaded to {root} ({reason(error)})",
                field="data.download",
                remedy="check the network and the disk, or set data.root to a copy of it",
            ) from error
        raise DataError(
            f"{root} does not contain a complete {request.name}",
            field="data.root",
            remedy="set data.root to its folder, or download it with --set data.download=true",
        ) from error


def dataset_from_arrays(
    request: DatasetRequest,
    train_images: ArrayLike,
    train_labels: ArrayLike,
    test_images: ArrayLike,
    test_labels: ArrayLike,
    class_names: Sequence[str] | None = None,
) -> ImageDataset:
    """Build a data set from arrays; the function of a registered data set returns the result.

    The pictures are scaled to `request.image_size` if it is given.

    Args:
        request: The request that the function has received.
        train_images: (N, H, W) or (N, H, W, C) uint8 with C = 1 or 3, the pictures to train on.
        train_labels: (N,) integers from 0.
        test_images: (M, H, W) or (M, H, W, C) uint8, the pictures to measure the accuracy on.
        test_labels: (M,) integers from 0.
        class_names: Name of each label; by default the labels themselves.

    Raises:
        DataError: If the arrays have other types or shapes, or do not fit each other.

    Example:
        >>> from istanas.data.registry import dataset_request
        >>> request = dataset_request("stripes", root=None, cache_dir=None, download=False, image_size=16,
        ...     background=(0, 0, 0), allow_left_out=False, progress=None, checking=None)
        >>> pictures, labels = np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 0, 1]
        >>> dataset = dataset_from_arrays(request, pictures, labels, pictures, labels, ["across", "down"])
        >>> dataset.height, dataset.channels, dataset.class_names
        (16, 3, ('across', 'down'))
    """
    name = request.name
    splits = [
        ArrayPictures(
            _as_images(f"{split} split of {name}", images), _as_labels(f"{split} split of {name}", labels)
        )
        for split, images, labels in (
            ("train", train_images, train_labels),
            ("test", test_images, test_labels),
        )
    ]
    train, test = splits
    if train.images.shape[1:] != test.images.shape[1:]:
        shapes = " and ".join(str(tuple(part.images.shape[1:])) for part in splits)
        raise DataError(
            f"the pictures of the two splits of {name} have different shapes, {shapes} (C, H, W)",
            field="data.name",
            remedy=_GIVE_ARRAYS,
        )
    n_classes = max((int(part.labels.max()) + 1 for part in splits if len(part) > 0), default=0)
    names = list(map(str, range(n_classes))) if class_names is None else list(map(str, class_names))
    return array_dataset(
        name, names, train, test, size=request.image_size, field="data.name", remedy=_GIVE_ARRAYS
    )


_GIVE_ARRAYS = (
    "give pictures of the shape (N, H, W) or (N, H, W, C) with dtype uint8, "
    "and an integer label from 0 for each"
)


def _as_images(what: str, images: ArrayLike) -> Tensor:
    """Return (N, C, H, W) uint8 from the pictures of a user."""
    array = np.asarray(images)
    if array.ndim == 3:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or 0 in array.shape[1:]:
        raise DataError(
            f"the pictures of the {what} have the shape {np.shape(images)} and dtype {array.dtype}",
            field="data.name",
            remedy=_GIVE_ARRAYS,
        )
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def _as_labels(what: str, labels: ArrayLike) -> Tensor:
    """Return (N,) int64 from the labels of a user."""
    array = np.asarray(labels)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise DataError(
            f"the labels of the {what} have the shape {array.shape} and dtype {array.dtype}",
            field="data.name",
            remedy=_GIVE_ARRAYS,
        )
    return torch.from_numpy(array.astype(np.int64))


def array_dataset(
    name: str,
    class_names: Sequence[str],
    train: ArrayPictures,
    test: ArrayPictures,
    *,
    size: int | None = None,
    field: str = "data.root",
    remedy: str = "download the data set again",
) -> ImageDataset:
    """Check two splits, scale them, and return the data set with its statistics and digests.

    Args:
        name: The data set.
        class_names: Name of each label.
        train: The training split.
        test: The test split.
        size: Side in pixels to which the pictures are scaled; None keeps their size.
        field, remedy: The setting that wrong pictures come from, and what to do about them.

    Raises:
        DataError: If a split is empty, or its labels do not match its pictures or the classes.
    """
    for split, pictures in (("train", train), ("test", test)):
        _check_split(f"{split} split of {name}", pictures, len(class_names), field, remedy)
    found = f"{train.images.shape[3]}x{train.images.shape[2]}"
    how = "kept in memory"
    if size is not None:
        train, test = (
            ArrayPictures(stretch_images(pictures.images, size), pictures.labels)
            for pictures in (train, test)
        )
        if found != f"{size}x{size}":
            how = f"scaled to {size}x{size}, {how}"
    mean, std = _channel_statistics(train.images)
    content = sha256(
        json.dumps([list(class_names), list(train.images.shape), list(test.images.shape)]).encode(),
        *(part.contiguous().numpy().data for split in (train, test) for part in (split.images, split.labels)),
    )
    _, channels, height, width = train.images.shape
    line = describe(name, len(train), len(test), len(class_names), found, is_grey=channels == 1, how=how)
    return ImageDataset(
        name=name,
        class_names=tuple(class_names),
        train=train,
        test=test,
        channels=channels,
        height=height,
        width=width,
        mean=mean,
        std=std,
        digest=content,
        resize="none" if size is None else "stretch",
        train_digest=pictures_digest(train, torch.arange(len(train)), class_names),
        notes=(line,),
    )


def _check_split(what: str, pictures: ArrayPictures, n_classes: int, field: str, remedy: str) -> None:
    n, n_images, labels = len(pictures), pictures.images.shape[0], pictures.labels
    problem = None
    if n == 0 or n_images != n:
        problem = f"the {what} has {n_images} pictures and {n} labels"
    elif int(labels.min()) < 0 or int(labels.max()) >= n_classes:
        problem = f"the {what} has labels {int(labels.min())}..{int(labels.max())} for {n_classes} classes"
    if problem is not None:
        raise DataError(problem, field=field, remedy=remedy)


def _channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the exact mean and standard deviation of each channel in [0, 1], from a histogram of the bytes."""
    counts = np.zeros((images.shape[1], 256))
    for chunk in torch.split(images, 1000):
        for channel in range(images.shape[1]):
            counts[channel] += np.bincount(chunk[:, channel].numpy().ravel(), minlength=256)
    share = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256) / 255
    mean = share @ values
    std = np.sqrt(((values - mean[:, None]) ** 2 * share).sum(axis=1))
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())
