"""One picture by itself is preprocessed as training preprocesses the whole data set, bit for bit."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from istanas.data import ImageDataset, Preprocessing, batches, dataset_from_arrays, load_dataset
from istanas.data.image_dataset import ArrayPictures
from istanas.data.registry import dataset_request
from istanas.errors import DataError


def write_folder(root: Path, *, side: int, kind: str) -> list[Path]:
    """Write a folder of random pictures, and return the test pictures in the order of the data set.

    Each split has one unusual picture: transparent, or grey with 16 bits.
    """
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 3)):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                shape = (side, side) if kind == "grey" else (side, side + 7, 3 + (kind == "alpha"))
                if kind == "deep":
                    pixels = rng.integers(0, 1 << 12, (side, side + 7), dtype=np.uint16)
                else:
                    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return sorted(root.glob("test/*/*.png"))


def inputs_of_test(dataset: ImageDataset) -> torch.Tensor:
    """Return the test pictures as the evaluation in training gives them to a network."""
    loader = batches(
        dataset,
        "test",
        None,
        batch_size=100,
        augmentation=None,
        device=torch.device("cpu"),
        seed=0,
        epoch=0,
        shuffle=False,
    )
    return torch.cat([batch.images for batch in loader])


@pytest.mark.parametrize(
    ("kind", "side", "image_size", "rule"),
    [
        ("grey", 12, None, "none"),
        ("colour", 20, 12, "fit"),
        ("alpha", 20, 12, "fit"),
        ("deep", 20, 12, "fit"),
        ("colour", 90, None, "resize_and_crop"),
    ],
)
def test_a_file_gives_the_input_of_training(
    kind: str, side: int, image_size: int | None, rule: str, tmp_path: Path
) -> None:
    files = write_folder(tmp_path / "pictures", side=side, kind=kind)
    dataset = load_dataset(
        "folder",
        root=tmp_path / "pictures",
        cache_dir=tmp_path,
        image_size=image_size,
        background=(16, 32, 48),
    )
    steps = dataset.preprocessing
    assert (steps.resize, steps.shape[0]) == (rule, 1 if kind in ("grey", "deep") else 3)
    expected = inputs_of_test(dataset)
    assert torch.equal(steps.normalized(torch.stack([steps.read(str(file)) for file in files])), expected)
    contents = [steps.read(file.read_bytes()) for file in files]
    assert torch.equal(steps.normalized(torch.stack(contents)), expected)
    if kind in ("grey", "colour"):
        arrays = [steps.from_array(np.asarray(Image.open(file))) for file in files]
        assert torch.equal(steps.normalized(torch.stack(arrays)), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_are_stretched_as_in_training(channels: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 14, channels), dtype=np.uint8)
    request = dataset_request(
        "arrays",
        root=None,
        cache_dir=tmp_path,
        download=False,
        image_size=12,
        background=(0, 0, 0),
        allow_left_out=False,
        progress=None,
        checking=None,
    )
    dataset = dataset_from_arrays(request, pixels, [0, 1] * 3, pixels, [0, 1] * 3)
    assert isinstance(dataset.test, ArrayPictures)
    steps = dataset.preprocessing
    assert steps.resize == "stretch"
    assert torch.equal(torch.stack([steps.from_array(each) for each in pixels]), dataset.test.images)


def test_colour_becomes_luminance_for_a_grey_network() -> None:
    grey = Preprocessing((1, 1, 3), (0.0,), (1.0,))
    colours = np.array([[[255, 0, 0], [0, 255, 0], [7, 7, 7]]], np.uint8)
    assert grey.from_array(colours).flatten().tolist() == [76, 150, 7]


def test_what_is_not_a_picture_is_refused(tmp_path: Path) -> None:
    steps = Preprocessing((3, 8, 8), (0.0,) * 3, (1.0,) * 3)
    for array in (np.zeros((8, 8)), np.zeros((8, 8, 2), np.uint8), np.zeros(8, np.uint8)):
        with pytest.raises(DataError, match="is not a picture; give"):
            steps.from_array(array)
    with pytest.raises(DataError, match="has 9x8 pixels, the network was trained on 8x8 without scaling"):
        steps.from_array(np.zeros((8, 9), np.uint8))
    with pytest.raises(DataError, match="the content is not a readable picture"):
        steps.read(b"text")
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    assert steps.read(content.getvalue()).shape == (3, 8, 8)
