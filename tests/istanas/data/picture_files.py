"""Picture files and folders of classes, for the tests of picture folders."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from istanas.data import (
    ArrayPictures,
    ImageDataset,
    batches,
)

Load = Callable[..., ImageDataset]


def save(path: Path, picture: np.ndarray | Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(path, **options)
    return path


def grey(value: int, side: int = 8) -> np.ndarray:
    return np.full((side, side), value, np.uint8)


def write_folder(root: Path, make: Callable[[int], np.ndarray | Image.Image], suffix: str = ".png") -> Path:
    """Two classes of two training pictures and one test picture each: `make` gets 0..5."""
    number = 0
    for split, count in (("train", 2), ("test", 1)):
        for name in ("ant", "bee"):
            for i in range(count):
                save(root / split / name / f"{name}{i}{suffix}", make(number))
                number += 1
    return root


def images(dataset: ImageDataset, split: str = "train") -> torch.Tensor:
    pictures = getattr(dataset, split)
    assert isinstance(pictures, ArrayPictures)
    return pictures.images


def swap(first: Path, second: Path) -> None:
    first.rename(first.with_name("kept"))
    second.rename(first)
    first.with_name("kept").rename(second)


def upright(side: int) -> np.ndarray:
    """A picture, twice as high as wide, whose quarters differ."""
    quarters = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 250]]], np.uint8)
    return quarters.repeat(side, axis=0).repeat(side // 2, axis=1)


def pictures_of(dataset: ImageDataset, indices: list[int], split: str = "train") -> torch.Tensor:
    """Bytes of some pictures, as they are measured."""
    loader = batches(
        dataset, split, torch.tensor(indices), batch_size=8, augmentation=None, device=torch.device("cpu"),
        seed=0, epoch=0, shuffle=False, dtype=torch.float64,
    )  # fmt: skip
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (dataset.mean, dataset.std))
    return torch.cat([(255 * (b.images * std + mean)).round() for b in loader]).byte()


def shape_in_alpha(mode: str, side: int) -> Image.Image:
    """Black all over, opaque in its left half."""
    alpha = np.zeros((side, side), np.uint8)
    alpha[:, : side // 2] = 255
    colour = {"RGBA": "RGB", "LA": "L"}.get(mode, "P")
    picture = Image.new(colour, (side, side), 0)
    if colour == "P":
        picture.putpalette([0, 0, 0, 9, 9, 9])
        picture.putdata((alpha == 0).astype(np.uint8).ravel().tolist())
        picture.info["transparency"] = 1
    else:
        picture.putalpha(Image.fromarray(alpha))
    return picture


def png(header: bytes, rows: bytes, transparent: bytes = b"", level: int = -1) -> bytes:
    """A PNG of the given header and rows, each of which begins with its filter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    chunks = chunk(b"IHDR", header) + (chunk(b"tRNS", transparent) if transparent else b"")
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IDAT", zlib.compress(rows, level)) + chunk(b"IEND", b"")
