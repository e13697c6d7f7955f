"""Batches on a device, in an order and with augmentation that follow from (seed, epoch, rank) only.

Small pictures live on the device and are indexed; large ones come decoded from a torch DataLoader, as bytes,
and are normalised on the device. Either way a loader can be iterated over again, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from istanas.data.augment import Augmentation, augment, cutout, normalize, send
from istanas.data.image_dataset import ArrayPictures, FilePictures, ImageDataset, Pictures
from istanas.data.reading import read_picture
from istanas.errors import ConfigError, DataError
from istanas.seeds import seed_from_text

_on_device: WeakKeyDictionary[ArrayPictures, dict[torch.device, ArrayPictures]] = WeakKeyDictionary()


class Batch(NamedTuple):
    """The pictures of one step on one rank.

    Args:
        images: (B, C, H, W) floats.
        labels: (B,) int64.
        weight: ranks times this rank's share of the global batch's pictures. The mean over ranks of
            `weight` times the rank's mean loss is the mean over all pictures, however unevenly they are shared.
    """

    images: Tensor
    labels: Tensor
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class BatchLoader:
    """The batches of one epoch on one rank; made by `batches`.

    Args:
        pictures: where the batches come from.
        parts: indices into the pictures, one tensor a batch.
        weights: see `Batch`, one a batch.
        mean: per channel, in [0, 1].
        std: per channel, > 0.
        augmentation: None only normalises.
        device: where the batches are wanted.
        dtype: of the pictures.
        seed: of this epoch's pictures (large pictures are augmented one by one).
        rank_seed: of this epoch's draws on this rank (small pictures are augmented batch by batch).
        workers: processes that decode large pictures; 0 decodes in this one.
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
        """Return how many pictures one pass yields on this rank."""
        return sum(part.numel() for part in self.parts)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches on the device, the pictures in channels_last."""
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
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own, or each pass would draw a number from the global one
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            images, labels = (send(part, self.device) for part in batch)
            images = normalize(images, self.mean, self.std, self.dtype)
            length = 0 if self.augmentation is None else self.augmentation.cutout
            yield cutout(images, length, generator), labels


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
    """Make the batches of one epoch on one rank.

    The pictures are put in order by (seed, epoch) and cut into global batches; rank r of w takes every w-th
    picture of each, from the r-th on. Every rank makes the same number of steps and none is empty: a
    last batch of fewer pictures than ranks joins the one before.

    Args:
        dataset: as loaded.
        split: "train" or "test".
        indices: (N,) int64 of the pictures to take, None for all.
        batch_size: pictures in a global batch, over all ranks, >= world_size.
        augmentation: None only normalises (evaluation). Small pictures: crop, flip, cutout as it says.
            Large ones: random resized crop and colour jitter in any case, flip and cutout as it says.
        device: where the batches are wanted; an array of small pictures is moved there once and stays.
        seed: of order and augmentation.
        epoch: of order and augmentation.
        shuffle: False keeps the order of `indices`.
        drop_last: leave out a last global batch that is not full.
        rank: of this process, in [0, world_size).
        world_size: number of processes.
        workers: processes that decode large pictures; changes the speed, not a bit of the batches.
        dtype: of the pictures.

    Returns:
        The batches, to be iterated over as often as wanted.

    Raises:
        ConfigError: numbers that leave a rank without pictures.
        DataError: an index outside the split; while iterating, a broken picture.

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
            f"indices: {int(order.min())}..{int(order.max())} do not fit the {len(pictures)} pictures of the "
            f"{split} split; split the data set that is loaded"
        )
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank: {rank} is none of {world_size} workers; count them from 0")
    if batch_size < world_size:
        raise ConfigError(
            f"batch_size: {batch_size} is too small for {world_size} workers; use {world_size} or more"
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
        remedy = "use a smaller batch_size" if drop_last else "use fewer workers or more pictures"
        raise ConfigError(
            f"batch_size: {batch_size} makes no batch of {order.numel()} pictures for {world_size} workers; "
            + remedy
        )
    return [order[start:end] for start, end in zip(starts, [*starts[1:], n], strict=True)]


def _batch_seed(*parts: object) -> int:
    """Return a seed for a part of a batch's randomness.

    It differs from `derive_seed` in how the parts become a text. With the latter, every run would have other batches.
    """
    return seed_from_text(repr(parts))


def _moved(pictures: ArrayPictures, device: torch.device) -> ArrayPictures:
    """Return the pictures on the device, moved there the first time only."""
    if pictures.images.device == device:
        return pictures
    copies = _on_device.setdefault(pictures, {})
    if device not in copies:
        copies[device] = ArrayPictures(pictures.images.to(device), pictures.labels.to(device))
    return copies[device]


# ---------- large pictures
class _DecodedBatches(Dataset[tuple[Tensor, Tensor] | DataError]):
    """Batch i of some files as (bytes (B, 3, S, S), labels (B,)), or the error that a broken one gave.

    The error is returned, not raised: a DataLoader would wrap it in the traceback of a worker process.
    """

    def __init__(
        self, pictures: FilePictures, parts: tuple[Tensor, ...], augmentation: Augmentation | None, seed: int
    ) -> None:
        self.pictures, self.parts, self.augmentation, self.seed = pictures, parts, augmentation, seed

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor] | DataError:
        transform = _transform(self.pictures.image_size, self.augmentation)
        images: list[Tensor] = []
        for index in self.parts[i].tolist():
            try:
                picture, _ = read_picture(self.pictures.paths[index], self.pictures.decode_settings)
            except DataError as error:
                return error
            # A picture's draws follow from its index, not from its place among the workers or ranks.
            with _global_generator_at(_batch_seed(self.seed, index)):
                images.append(transform(picture))
        return torch.stack(images), self.pictures.labels[self.parts[i]]


def _transform(size: int, augmentation: Augmentation | None) -> Callable[[object], Tensor]:
    """Return the ImageNet standard from a picture to (3, size, size) bytes.

    Source: Liu et al. 2019 (DARTS), appendix A.2; the colour jitter as in its published code.
    """
    from torchvision.transforms import v2

    if augmentation is None:
        steps = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
    else:
        steps = [
            v2.RandomResizedCrop(size),
            v2.RandomHorizontalFlip(0.5 if augmentation.horizontal_flip else 0.0),
            v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2),
        ]
    transform: Callable[[object], Tensor] = v2.Compose([*steps, v2.PILToTensor()])
    return transform


@contextmanager
def _global_generator_at(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator, from which torchvision draws, and put it back as it was afterwards.

    `torch.manual_seed` would also seed the GPUs, where a training run draws its drop path.
    """
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
