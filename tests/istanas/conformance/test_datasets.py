"""One suite for every data set that needs no download: a new one is tested by one line in `DATA`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from istanas.data import (
    ArrayPictures,
    Augmentation,
    DatasetRequest,
    ImageDataset,
    batches,
    dataset_from_arrays,
    load_dataset,
    pictures_digest,
    register_dataset,
)
from istanas.data.packing import PackSettings, pack_folder
from istanas.data.registry import DATASETS
from istanas.registry import registering_for, unregister


def nothing(folder: Path) -> None:
    """A data set without files."""


def picture_folder(folder: Path) -> None:
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for n in range(3):
                picture = np.full((8, 8, 3), 100 * number + 20 * n + (split == "test"), np.uint8)
                Image.fromarray(picture).save(folder / split / name / f"{n}.png")


def packed_folder(folder: Path) -> None:
    unpacked = folder.with_name("unpacked")
    picture_folder(unpacked)
    pack_folder(unpacked, folder, PackSettings(), cache_dir=folder.with_name("cache"), processes=1)


def numpy_file(folder: Path) -> None:
    pictures = np.random.default_rng(0).integers(256, size=(12, 10, 9, 3), dtype=np.uint8)
    np.savez(folder / "pictures.npz", pictures=pictures, labels=np.arange(12) % 3)


def load_numpy(request: DatasetRequest) -> ImageDataset:
    assert request.root is not None
    with np.load(request.root / "pictures.npz") as file:
        pictures, labels = file["pictures"], file["labels"]
    return dataset_from_arrays(request, pictures[:9], labels[:9], pictures[9:], labels[9:], "abc")


def load_grey(request: DatasetRequest) -> ImageDataset:
    pictures = np.random.default_rng(1).integers(256, size=(8, 8, 8), dtype=np.uint8)
    return dataset_from_arrays(request, pictures, np.arange(8) % 2, pictures[:4], [0, 1, 1, 0])


@dataclass(frozen=True)
class Data:
    """A data set under test.

    Args:
        name: Its name.
        write: Writes its files to a folder.
        has_root: Whether that folder is its `data.root`.
    """

    name: str
    write: Callable[[Path], None] = nothing
    has_root: bool = False


DATA = [
    Data("digits"),
    Data("folder", picture_folder, has_root=True),
    Data("webdataset", packed_folder, has_root=True),
    Data("numpy_pictures", numpy_file, has_root=True),
    Data("grey_pictures"),
]


@pytest.fixture(autouse=True, scope="module")
def users_own() -> Iterator[None]:
    """The data sets of a user's plugin."""
    with registering_for("conformance.py") as registered:
        register_dataset("numpy_pictures", load_numpy, needs_root=True, resizable=True)
        register_dataset("grey_pictures", load_grey, resizable=True, side=8)
    yield
    unregister(registered)


@pytest.fixture(params=DATA, ids=lambda data: data.name)
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Data:
    (tmp_path / "data").mkdir()
    request.param.write(tmp_path / "data")
    return request.param


@pytest.fixture
def load(data: Data, tmp_path: Path) -> Callable[..., ImageDataset]:
    root = tmp_path / "data" if data.has_root else None
    return lambda **settings: load_dataset(data.name, root=root, cache_dir=tmp_path / "cache", **settings)


def test_both_splits_have_bytes_and_a_label_of_a_class_for_each(load: Callable[..., ImageDataset]) -> None:
    dataset = load()
    for pictures in (dataset.train, dataset.test):
        assert isinstance(pictures, ArrayPictures)
        assert pictures.images.dtype == torch.uint8
        assert pictures.images.shape == (len(pictures), dataset.channels, dataset.height, dataset.width)
        assert pictures.labels.dtype == torch.int64
        assert set(pictures.labels.tolist()) <= set(range(dataset.num_classes))
    assert dataset.channels in (1, 3)
    assert len(dataset.mean) == len(dataset.std) == dataset.channels
    assert dataset.notes


def test_loading_again_gives_the_same_pictures_and_digests(load: Callable[..., ImageDataset]) -> None:
    first, second = load(), load()
    assert (first.digest, first.train_digest) == (second.digest, second.train_digest)
    assert len(first.digest) == len(first.train_digest) == 64
    everything = torch.arange(len(first.train))
    assert first.train_digest == pictures_digest(first.train, everything, first.class_names)


def test_a_size_scales_the_pictures_and_changes_the_digest(load: Callable[..., ImageDataset]) -> None:
    scaled = load(image_size=16)
    assert (scaled.height, scaled.width) == (16, 16)
    assert scaled.digest != load().digest


def test_the_side_that_the_entry_promises_is_not_exceeded(
    data: Data, load: Callable[..., ImageDataset]
) -> None:
    side, dataset = DATASETS[data.name].side, load()
    assert side is None or max(dataset.height, dataset.width) <= side


def test_a_data_set_that_needs_a_root_says_so(data: Data) -> None:
    assert DATASETS[data.name].needs_root == data.has_root


def test_batches_of_it_are_normalised_floats(load: Callable[..., ImageDataset]) -> None:
    loader = batches(
        load(),
        "train",
        None,
        batch_size=4,
        augmentation=Augmentation(1, True, 2),
        device=torch.device("cpu"),
        seed=0,
        epoch=0,
        shuffle=True,
    )
    images, labels, _ = next(iter(loader))
    assert images.dtype == torch.float32
    assert len(images) == len(labels) == 4
    assert bool(torch.isfinite(images).all())
