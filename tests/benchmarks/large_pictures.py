"""Reading of large pictures: pictures per second against torchvision's own pipeline, and the memory of a worker.

The JPEG files, of about 500x375 pixels as in ImageNet, are made from smooth noise and textures.
"""

import gc
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from istanas.data import Augmentation, ImageDataset, batches, load_dataset
from tests.benchmarks.harness import Row, compare, cpu_seconds

SIZE, MIB = 224, 2**20
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PUBLISHED = Augmentation(horizontal_flip=True)


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Return smooth noise with a finer texture."""
    rng, layers = np.random.default_rng(seed), []
    for cell in (60, 9):
        noise = rng.integers(0, 256, (height // cell + 2, width // cell + 2, 3), dtype=np.uint8)
        layers.append(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
    return Image.blend(*layers, 0.35)


def write_folder(root: Path, n_pictures: int, scale: float = 1.0) -> None:
    """Write a picture folder of two classes, with half as many test pictures.

    Args:
        root: The folder.
        n_pictures: Number of training pictures.
        scale: Factor of the sides, which are about 500x375 pixels.
    """
    for split, count in (("train", n_pictures), ("test", n_pictures // 2)):
        for i in range(count):
            file = root / split / ("ant", "bee")[i % 2] / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            width, height = (round(scale * side) for side in (500 + 8 * (i % 5 - 2), 375 + 6 * (i % 7 - 3)))
            picture(i, width, height).save(file, quality=90)


@contextmanager
def folder(n_pictures: int, scale: float = 1.0) -> Iterator[Path]:
    """Provide a temporary picture folder, see `write_folder`."""
    with tempfile.TemporaryDirectory() as root:
        write_folder(Path(root), n_pictures, scale)
        yield Path(root)


def open_folder(root: Path) -> ImageDataset:
    """Return the picture folder as a data set of this package."""
    return load_dataset("folder", root=root, cache_dir=root / "cache")


def our_batches(
    dataset: ImageDataset, batch: int, workers: int, *, epoch: int = 0, augmentation: Augmentation = PUBLISHED
) -> Iterable[Any]:
    """Return an epoch of normalised training batches."""
    return batches(
        dataset,
        "train",
        None,
        batch_size=batch,
        augmentation=augmentation,
        device=torch.device("cpu"),
        seed=0,
        epoch=epoch,
        shuffle=True,
        workers=workers,
    )


def torchvision_batches(root: Path, batch: int, workers: int) -> Iterable[Any]:
    """Return an epoch of the same transforms, as torchvision's documentation combines them."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.4, 0.2),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return DataLoader(ImageFolder(root / "train", transform), batch, shuffle=True, num_workers=workers)


def drained(make: Callable[[], Iterable[Any]]) -> Callable[[], None]:
    """Return a call that reads an epoch, with each value of its batches, as a training does, and keeps nothing."""

    def drain() -> None:
        for images, *_ in make():
            images.sum()

    return drain


def decoding(n_pictures: int, bound: float, rounds: int, workers: int = 2) -> list[Row]:
    """Compare a picture's CPU seconds with those of torchvision, for files of ImageNet's size and of photographs.

    Processes that decode wait for nothing else, so that the CPU time determines the pictures per second and core.
    """
    rows = []
    for scale, name, limit, reduced in (
        (1.0, "about 500x375", bound, False),
        (4.0, "about 2000x1500, data.reduced_decoding", None, True),
    ):
        n = n_pictures if scale == 1 else n_pictures // 8
        with folder(n, scale) as root:
            dataset = open_folder(root)
            augmentation = Augmentation(horizontal_flip=True, reduced_decoding=reduced)
            row = compare(
                f"decoding and augmentation of a JPEG file of {name}, {workers} data workers",
                drained(lambda d=dataset, a=augmentation: our_batches(d, 32, workers, augmentation=a)),
                drained(lambda r=root: torchvision_batches(r, 32, workers)),
                limit,
                rounds=rounds,
                per=n,
                clock=cpu_seconds,
            )
        rate = f"CPU time; {1 / row.ours:.0f} pictures/s per core"
        rows.append(replace(row, counted=rate))
    return rows


def memory(n_pictures: int, epochs: int = 3) -> Row:
    """Compare the resident memory of a process after each epoch of reading with that after the first one.

    The process reads by itself, since a data worker lives for one epoch only. A first epoch, which is not counted,
    imports modules and fills malloc's pools.
    """
    process, found = psutil.Process(), []
    with folder(n_pictures) as root:
        dataset = open_folder(root)
        for epoch in range(epochs + 1):
            drained(lambda e=epoch: our_batches(dataset, 16, 0, epoch=e))()
            gc.collect()
            found.append(process.memory_info().rss / MIB)
    _, first, *others = found
    ratios = [rss / first for rss in others]
    return Row(
        f"resident memory while reading large pictures, after {epochs} epochs against after 1",
        max(ratios),
        (min(ratios), max(ratios)),
        1.05,
        statistics.median(others),
        first,
        "MiB",
        "at most",
    )
