"""Data sets: pictures in memory or in files, the properties that a network depends on, and digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from istanas.data.preprocessing import Preprocessing, Resize
from istanas.data.reading import DEFAULT_DECODING, DecodeSettings
from istanas.data.shard_files import MemberNames, Members
from istanas.errors import DataError

FILES_VERSION = 3
"""Version of the code that reads large pictures. Their digests contain it, because other versions give other pixels."""

_CHUNK = 16_384  # pictures whose names are in memory at a time


@dataclass(frozen=True, eq=False)
class ArrayPictures:
    """Small, decoded pictures in memory.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64 in [0, number of classes).
        paths: Paths of the N files from which they were decoded, see `FilePictures`; empty if there are none.
        prefix: The beginning of the paths that `name` leaves out.
    """

    images: Tensor
    labels: Tensor
    paths: Sequence[str] = ()
    prefix: str = ""

    def __len__(self) -> int:
        """Return the number of pictures."""
        return self.labels.numel()

    def name(self, index: int) -> str | None:
        """Return the path of a picture relative to the root of the data set; None if it has no file of its own."""
        return self.paths[index].removeprefix(self.prefix) if self.paths else None


@dataclass(frozen=True, eq=False)
class FilePictures:
    """Large pictures, decoded from their files for each batch.

    Args:
        paths: Paths of the N files, or names that end with class and file if the pictures lie in shards.
        labels: (N,) int64 in [0, number of classes).
        image_size: Side in pixels of the square that a network receives.
        fingerprints: Digests of each file's size and of samples of its content, 8 bytes per file.
        decode_settings: How the pixels are decoded.
        members: The contents of the pictures if they lie in shards; None if they lie in files of their own.
        prefix: The beginning of the paths that `name` leaves out, such as the root of the data set and a slash.
    """

    paths: Sequence[str]
    labels: Tensor
    image_size: int
    fingerprints: bytes
    decode_settings: DecodeSettings = DEFAULT_DECODING
    members: Members | None = None
    prefix: str = ""

    def __len__(self) -> int:
        """Return the number of pictures."""
        return self.labels.numel()

    def name(self, index: int) -> str:
        """Return the path of a picture relative to the root of the data set; for shards "SHARD/CLASS/FILE"."""
        return self.paths[index].removeprefix(self.prefix)

    def source(self, index: int) -> str | bytes:
        """Return the path of a picture, or its content if it lies in a shard.

        Raises:
            DataError: If a shard cannot be read, or has changed.
        """
        return self.paths[index] if self.members is None else self.members[index]

    def sources(self, indices: torch.Tensor) -> Sequence[str | bytes]:
        """Return paths or contents of pictures, see `source`. Contents in a bucket are requested at the same time."""
        if self.members is not None and self.members.is_remote:
            ((_, contents),) = self.members.batches([indices])
            return contents
        return [self.source(index) for index in indices.tolist()]

    def short_names(self, indices: Sequence[int]) -> list[str]:
        """Return class and file of pictures, such as "cat/1.jpg"."""
        if isinstance(self.paths, MemberNames):
            return self.paths.short(indices)
        return ["/".join(Path(self.paths[index]).parts[-2:]) for index in indices]


Pictures = ArrayPictures | FilePictures


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A data set: two splits, and the properties of its pictures that a network depends on.

    Args:
        name: Name in the registry.
        class_names: Name of each label, in the order of the labels.
        train: Pictures to train on.
        test: Pictures to measure the accuracy on. No choice depends on them.
        channels: 1 or 3.
        height: Height in pixels of the pictures that a network receives.
        width: Width in pixels of the pictures that a network receives.
        mean: Mean of each channel, in [0, 1], over the training split; for large pictures, that of ImageNet.
        std: Standard deviation of each channel, in [1/255, 1], so that dividing by it is safe.
        digest: SHA-256 of the content (arrays), or of the files' names, sizes and samples of their content (large
            pictures). It is equal on every machine that has the same pictures.
        train_digest: Digest of the training pictures alone; "" for a data set that is not from the registry.
        resize: How pictures in memory got their size; large pictures are always resized and cropped.
        decode_settings: How the pixels of picture files are decoded.
        notes: Lines for the user: the data set's content, its preprocessing, and unusual properties of its pictures.
    """

    name: str
    class_names: tuple[str, ...]
    train: Pictures
    test: Pictures
    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    train_digest: str = ""
    resize: Resize = "none"
    decode_settings: DecodeSettings = DEFAULT_DECODING
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return len(self.class_names)

    @property
    def preprocessing(self) -> Preprocessing:
        """Return how any picture becomes the input of a network that was trained on this data set."""
        return Preprocessing(
            shape=(self.channels, self.height, self.width),
            mean=tuple(self.mean),
            std=tuple(self.std),
            resize="resize_and_crop" if isinstance(self.train, FilePictures) else self.resize,
            background=self.decode_settings.background,
            bits=self.decode_settings.bits,
        )


def pictures_digest(pictures: Pictures, indices: Tensor, class_names: Sequence[str]) -> str:
    """Return the BLAKE2 digest of selected pictures in the given order, with their labels and the class names.

    Args:
        pictures: The split.
        indices: (n,) int64, the selected pictures.
        class_names: Name of each label.

    Returns:
        64 hexadecimal digits, equal on every machine that has the same pictures. Decoded pictures are digested by
        their content; files by their names (class and file), sizes and samples of their content.

    Example:
        >>> import torch
        >>> from istanas.data import load_dataset
        >>> digits = load_dataset("digits")
        >>> first = torch.arange(10)
        >>> digest = pictures_digest(digits.train, first, digits.class_names)
        >>> len(digest), digest == pictures_digest(digits.test, first, digits.class_names)
        (64, False)
    """
    if isinstance(pictures, FilePictures):
        return _files_digest(pictures, indices, class_names)
    head = [list(class_names), pictures.labels[indices].tolist()]
    # BLAKE2 is the fastest secure hash in the standard library: the 50,000 pictures of CIFAR-10 have 150 MB.
    digest = hashlib.blake2b(json.dumps([*head, list(pictures.images.shape[1:])]).encode(), digest_size=32)
    for chunk in indices.split(4096):  # in chunks, because a copy of all pictures could take many GB
        digest.update(pictures.images[chunk].contiguous().numpy().reshape(-1).data)
    return digest.hexdigest()


def _files_digest(pictures: FilePictures, indices: Tensor, class_names: Sequence[str]) -> str:
    """Return the digest of a JSON list: classes, labels, version and settings, names, and fingerprints as hexadecimals.

    The text is digested in pieces, because that of a million pictures, as one object, would take hundreds of MB.
    """
    digest = hashlib.blake2b(digest_size=32)
    settings = pictures.decode_settings
    how = [FILES_VERSION, pictures.image_size, settings.background, settings.bits]
    prints = np.frombuffer(pictures.fingerprints, np.uint8).reshape(len(pictures), -1)

    def add(text: str) -> None:
        digest.update(text.encode())

    def add_list(items: Callable[[Tensor], list[Any]]) -> None:
        for number, chunk in enumerate(indices.split(_CHUNK)):
            if chunk.numel():
                add((", " if number else "") + json.dumps(items(chunk))[1:-1])

    add(f"[{json.dumps(list(class_names))}, [")
    add_list(lambda chunk: pictures.labels[chunk].tolist())
    add(f"], {json.dumps(how)[1:-1]}, [")
    add_list(lambda chunk: pictures.short_names(chunk.tolist()))
    add('], "')
    for chunk in indices.split(_CHUNK):
        add(prints[chunk.numpy()].tobytes().hex())
    add('"]')
    return digest.hexdigest()


def checked_dataset(name: str, dataset: Any) -> ImageDataset:
    """Check what the function of a user's data set has returned, and fill in the name and missing digests.

    Args:
        name: The name under which the data set is registered.
        dataset: What the function has returned.

    Raises:
        DataError: If networks cannot be trained on it.
    """
    remedy = "correct the function; dataset_from_arrays builds the data set from arrays"
    if not isinstance(dataset, ImageDataset):
        raise DataError(
            f"the function of {name} returned {type(dataset).__name__}, not an ImageDataset",
            field="data.name",
            remedy=remedy,
        )
    for split, pictures in (("train", dataset.train), ("test", dataset.test)):
        problem = _problem_of(pictures, dataset)
        if problem is not None:
            raise DataError(f"the {split} split of {name} {problem}", field="data.name", remedy=remedy)
    if dataset.digest and dataset.train_digest:
        return replace(dataset, name=name)
    train, test = (
        pictures_digest(part, torch.arange(len(part)), dataset.class_names)
        for part in (dataset.train, dataset.test)
    )
    digest = hashlib.sha256(json.dumps([train, test]).encode()).hexdigest()
    return replace(dataset, name=name, digest=digest, train_digest=train)


def _problem_of(pictures: Any, dataset: ImageDataset) -> str | None:
    """Return what is wrong with a split of a user's data set, or None."""
    if not isinstance(pictures, ArrayPictures | FilePictures):
        return f"is {type(pictures).__name__}, not ArrayPictures or FilePictures"
    labels = pictures.labels
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
        return "has labels that are not a tensor of the shape (N,) with dtype int64"
    if len(labels) == 0:
        return "is empty"
    if int(labels.min()) < 0 or int(labels.max()) >= dataset.num_classes:
        return f"has labels {int(labels.min())}..{int(labels.max())} for {dataset.num_classes} classes"
    if isinstance(pictures, FilePictures):
        return None
    images = pictures.images
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        return "has pictures that are not a tensor with dtype uint8"
    expected = (len(labels), dataset.channels, dataset.height, dataset.width)
    if tuple(images.shape) != expected:
        return f"has pictures of the shape {tuple(images.shape)}, not {expected} (N, C, H, W)"
    return None
