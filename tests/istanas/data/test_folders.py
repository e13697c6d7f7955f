"""Picture folders as people have them: what is read of them, and how; what is left out, refused or told."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from istanas.data import ArrayPictures, ImageDataset, load_dataset

Load = Callable[..., ImageDataset]


def save(path: Path, picture: np.ndarray | Image.Image, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(path, **options)


def grey(value: int, side: int = 8) -> np.ndarray:
    return np.full((side, side), value, np.uint8)


def write_folder(root: Path, make: Callable[[int], np.ndarray], suffix: str = ".png") -> Path:
    """Two classes of two training pictures and one test picture each: `make` gets 0..5."""
    number = 0
    for split, count in (("train", 2), ("test", 1)):
        for name in ("ant", "bee"):
            for i in range(count):
                save(root / split / name / f"{name}{i}{suffix}", make(number))
                number += 1
    return root


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load_from(root: Path, **options: object) -> ImageDataset:
        return load_dataset("folder", root=root, cache_dir=tmp_path / "cache", **options)  # type: ignore[arg-type]

    return load_from


def images(dataset: ImageDataset, split: str = "train") -> torch.Tensor:
    pictures = getattr(dataset, split)
    assert isinstance(pictures, ArrayPictures)
    return pictures.images


# ---------- the cache belongs to the files that were decoded


def swap(first: Path, second: Path) -> None:
    first.rename(first.with_name("kept"))
    second.rename(first)
    first.with_name("kept").rename(second)


def overwrite(first: Path, second: Path) -> None:
    """As an archive does that is unpacked once more, the files of which have changed places."""
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])


@pytest.mark.parametrize("correct", [swap, overwrite])
def test_corrected_labels_are_not_those_of_the_cache(
    correct: Callable[[Path, Path], None], tmp_path: Path, load: Load
) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(40 * n), ".bmp")  # all of one size

    def equal_times() -> None:
        for file in root.rglob("*.bmp"):
            os.utime(file, ns=(10**18, 10**18))

    equal_times()
    before = load(root)
    assert images(before)[:, 0, 0, 0].tolist() == [0, 40, 80, 120]
    correct(root / "train" / "ant" / "ant0.bmp", root / "train" / "bee" / "bee0.bmp")
    equal_times()
    after = load(root)
    assert images(after)[:, 0, 0, 0].tolist() == [80, 40, 0, 120]
    assert after.digest != before.digest
    shutil.rmtree(tmp_path / "cache")
    assert load(root).digest == after.digest
