"""Batches on a device; their order and augmentation are determined by (seed, epoch, rank).

Small pictures are stored on the device and indexed. Large ones are decoded to bytes by a torch DataLoader, and
normalised on the device. In both cases, iterating over a loader again gives the same batches, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from istanas.data.augmentation import (
    Augmentation,
    augment,
    global_generator_at,
    mask,
    normalize,
    send,
)
from istanas.data.image_dataset import ArrayPictures, FilePictures, ImageDataset, Pictures
from istanas.data.large import load_large_picture, prepare_transforms
from istanas.data.transfer import copy_on_side_stream, side_stream
from istanas.errors import ConfigError, DataError
from istanas.seeds import seed_from_text

_on_device: WeakKeyDictionary[ArrayPictures, dict[torch.device, ArrayPictures]] = WeakKeyDictionary()


class Batch(NamedTuple):
    """The pictures of one step on one rank.

    Args:
        images: (B, C, H, W) floats.
        labels: (B,) int64.
        weight: Number of ranks times this rank's share of the pictures of the global batch. The mean over ranks of
            `weight` times the rank's mean loss is the mean over all pictures, even if the shares differ.
    """

    images: Tensor
    labels: Tensor
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class BatchLoader:
    """The batches of one epoch on one rank; created by `batches`.

    Args:
        pictures: The split.
        parts: Indices into the pictures, one tensor per batch.
        weights: Weight of each batch, see `Batch`.
        mean: Mean of each channel, in [0, 1].
        std: Standard deviation of each channel, > 0.
        augmentation: The augmentation; None only normalises.
        device: The device of the batches.
        dtype: Type of the images.
        seed: Seed for each picture's augmentation in this epoch (large pictures are augmented one by one).
        rank_seed: Seed for the augmentation in this epoch on this rank (small pictures are augmented batch by batch).
        workers: Number of processes that decode large pictures; with 0, this process decodes them.
    """

    pictures: Pictures
    parts: tuple[Tensor, ...]
    weights: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation | None
    device: torch.device
    dtype: torch.dtype
    seed: int
    rank_seed: int
    workers: int

    def __len__(self) -> int:
        """Return the number of batches on this rank, the same on every rank."""
        return len(self.parts)

    @property
    def n_pictures(self) -> int:
        """Return the number of pictures in one pass on this rank."""
        return sum(part.numel() for part in self.parts)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches on the device, with pictures in channels_last."""
        generator = torch.Generator().manual_seed(self.rank_seed)
        if isinstance(self.pictures, FilePictures):
            pairs = self._from_files(self.pictures, generator)
        else:
            pairs = self._from_arrays(self.pictures, generator)
        return (
            Batch(images, labels, weight)
            for (images, labels), weight in zip(pairs, self.weights, strict=True)
        )

    def _from_arrays(
        self, pictures: ArrayPictures, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        pictures = _moved(pictures, self.device)
        sizes = [part.numel() for part in self.parts]
        for index in torch.split(send(torch.cat(self.parts), self.device), sizes):
            images, labels = pictures.images[index], pictures.labels[index]
            if self.augmentation is None:
                yield normalize(images, self.mean, self.std, self.dtype), labels
            else:
                yield (
                    augment(images, self.augmentation, self.mean, self.std, generator, self.dtype),
                    labels,
                )

    def _from_files(
        self, pictures: FilePictures, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader: DataLoader[tuple[Tensor, Tensor] | DataError] = DataLoader(
            _DecodedBatches(pictures, self.parts, self.augmentation, self.seed),
            batch_size=None,
            sampler=_fetched(pictures, self.parts),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # without one, each pass would draw a number from the global generator
        )
        prepare_transforms(pictures.image_size, self.augmentation)
        stream = side_stream(self.device)
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            images, labels = copy_on_side_stream(batch, self.device, stream)
            images = normalize(images, self.mean, self.std, self.dtype)
            yield (
                (images if self.augmentation is None else mask(images, self.augmentation, generator)),
                labels,
            )


def batches(
    dataset: ImageDataset,
    split: Literal["train", "test"],
    indices: Tensor | None,
    *,
    batch_size: int,
    augmentation: Augmentation | None,
    device: torch.device,
    seed: int,
    epoch: int,
    shuffle: bool,
    drop_last: bool = False,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    dtype: torch.dtype = torch.float32,
) -> BatchLoader:
    """Return the batches of one epoch on one rank.

    The pictures are shuffled by (seed, epoch) and cut into global batches. Rank r of w takes every w-th picture of each
    global batch, starting at the r-th. All ranks have the same number of batches, and none is empty: a last global
    batch with fewer pictures than ranks is merged with the previous one.

    Args:
        dataset: The data set.
        split: "train" or "test".
        indices: (N,) int64 indices of the pictures to use, None for all.
        batch_size: Number of pictures in a global batch, over all ranks, >= world_size.
        augmentation: The augmentation; None only normalises (evaluation). For large pictures, a random resized crop
            and colour jitter replace `crop_padding`.
        device: The device of the batches. An array of small pictures is moved there once and stays there.
        seed: Seed of order and augmentation.
        epoch: Epoch, which changes order and augmentation.
        shuffle: False keeps the order of `indices`.
        drop_last: Whether a last global batch that is not full is left out.
        rank: Rank of this process, in [0, world_size).
        world_size: Number of processes.
        workers: Number of processes that decode large pictures; it affects the speed, but not the batches.
        dtype: Type of the images.

    Returns:
        The batches, which can be iterated over any number of times.

    Raises:
        ConfigError: If a rank would have no pictures.
        DataError: If an index is outside the split; while iterating, if a picture is broken.

    Example:
        >>> from istanas.data import load_dataset
        >>> loader = batches(load_dataset("digits"), "test", None, batch_size=100, augmentation=None,
        ...                  device=torch.device("cpu"), seed=0, epoch=0, shuffle=False)
        >>> len(loader), loader.n_pictures, next(iter(loader)).images.shape
        (4, 359, torch.Size([100, 1, 8, 8]))
    """
    pictures = dataset.train if split == "train" else dataset.test
    order = torch.arange(len(pictures)) if indices is None else indices.cpu()
    if order.numel() and not 0 <= int(order.min()) <= int(order.max()) < len(pictures):
        raise DataError(
            f"{int(order.min())}..{int(order.max())} do not fit the {len(pictures)} pictures of the {split} split",
            field="indices",
            remedy="use the indices of the same data set",
        )
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"{rank} is not the rank of one of {world_size} workers",
            field="rank",
            remedy=f"use 0 to {world_size - 1}",
        )
    if batch_size < world_size:
        raise ConfigError(
            f"{batch_size} is too small for {world_size} workers",
            field="batch_size",
            remedy=f"use {world_size} or more",
        )
    if shuffle:
        generator = torch.Generator().manual_seed(_batch_seed("order", seed, epoch))
        order = order[torch.randperm(order.numel(), generator=generator)]
    wholes = _global_batches(order, batch_size, world_size, drop_last)
    parts = tuple(whole[rank::world_size] for whole in wholes)
    return BatchLoader(
        pictures=pictures,
        parts=parts,
        weights=tuple(
            world_size * part.numel() / whole.numel() for part, whole in zip(parts, wholes, strict=True)
        ),
        mean=dataset.mean,
        std=dataset.std,
        augmentation=augmentation,
        device=device,
        dtype=dtype,
        seed=_batch_seed("picture", seed, epoch),
        rank_seed=_batch_seed("augment", seed, epoch, rank),
        workers=workers,
    )


def _global_batches(order: Tensor, batch_size: int, world_size: int, drop_last: bool) -> list[Tensor]:
    """Cut the order into batches, each with a picture for every rank."""
    n = order.numel()
    if drop_last:
        n -= n % batch_size
    starts = list(range(0, n, batch_size))
    if len(starts) > 1 and n - starts[-1] < world_size:
        starts.pop()
    if n < world_size:
        raise ConfigError(
            f"{batch_size} makes no batch of {order.numel()} pictures for {world_size} workers",
            field="batch_size",
            remedy="use a smaller batch_size" if drop_last else "use fewer workers or more pictures",
        )
    return [order[start:end] for start, end in zip(starts, [*starts[1:], n], strict=True)]


def _batch_seed(*parts: object) -> int:
    """Return a seed for a part of a batch's randomness.

    `derive_seed` converts the parts to another text. Using it here would change the batches of every run.
    """
    return seed_from_text(repr(parts))


def _moved(pictures: ArrayPictures, device: torch.device) -> ArrayPictures:
    """Return the pictures on the device, and remember the copy for the next call."""
    if pictures.images.device == device:
        return pictures
    copies = _on_device.setdefault(pictures, {})
    if device not in copies:
        copies[device] = ArrayPictures(pictures.images.to(device), pictures.labels.to(device))
    return copies[device]


# ---------- large pictures
Fetched = tuple[int, Sequence[bytes]]
"""Number of a batch, and the contents of its pictures."""


def _fetched(pictures: FilePictures, parts: Sequence[Tensor]) -> Iterable[int | Fetched]:
    """Return what a DataLoader passes to its processes for each batch: its number, or also the pictures' contents.

    The training process reads pictures in a bucket, by several threads, because they wait for a network, and because
    the client of a bucket cannot be used in a forked process.
    """
    if pictures.members is None:
        return range(len(parts))
    if pictures.members.is_remote:
        return pictures.members.batches(parts)
    pictures.members.open_all()
    return range(len(parts))


class _DecodedBatches(Dataset[tuple[Tensor, Tensor] | DataError]):
    """Batches of decoded files: item i is (bytes (B, 3, S, S), labels (B,)), or an error if a file is broken.

    The error is returned, not raised, because a DataLoader would wrap it in the traceback of a worker process.
    """

    def __init__(
        self, pictures: FilePictures, parts: tuple[Tensor, ...], augmentation: Augmentation | None, seed: int
    ) -> None:
        self.pictures, self.parts, self.augmentation, self.seed = pictures, parts, augmentation, seed

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, item: int | Fetched) -> tuple[Tensor, Tensor] | DataError:
        i, contents = item if isinstance(item, tuple) else (item, None)
        pictures, images = self.pictures, list[Tensor]()
        for place, index in enumerate(self.parts[i].tolist()):
            # A picture's augmentation depends on its index, and not on the worker or rank that decodes it.
            with global_generator_at(_batch_seed(self.seed, index)):
                try:
                    images.append(
                        load_large_picture(
                            pictures.source(index) if contents is None else contents[place],
                            pictures.image_size,
                            self.augmentation,
                            pictures.decode_settings,
                        )
                    )
                except DataError as error:
                    return error
        return torch.stack(images), self.pictures.labels[self.parts[i]]
