"""Digits, torchvision's files, picture folders and their cache: real data, real files."""

import hashlib
import os
import pickle
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, SVHN

from istanas.data import (
    DATASETS,
    ArrayPictures,
    FilePictures,
    ImageDataset,
    load_dataset,
    pictures_digest,
    survey_folder,
)
from istanas.data.pool import Pool
from istanas.data.reading import decode_pictures
from istanas.errors import ConfigError, DataError

CLASSES = ("ant", "bee", "cat")


def arrays(dataset: ImageDataset) -> tuple[ArrayPictures, ArrayPictures]:
    assert isinstance(dataset.train, ArrayPictures)
    assert isinstance(dataset.test, ArrayPictures)
    return dataset.train, dataset.test


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of 3 classes, 4 + 2 pictures of 12x10 each, with files beside them that are none."""
    root = tmp_path / "pictures"
    for label, name in enumerate(CLASSES):
        for split, n in (("train", 4), ("test", 2)):
            for i in range(n):
                save(
                    root / split / name / f"{i}.png",
                    pixels(10, 12, 3, seed=100 * label + i + 50 * (split == "test")),
                )
            (root / split / name / "notes.txt").write_text("no picture")
            (root / split / name / ".hidden.png").write_text("no picture")
    return root


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., ImageDataset]:
    def load_from(root: Path, **options: object) -> ImageDataset:
        return load_dataset("folder", root=root, cache_dir=tmp_path / "cache", **options)  # type: ignore[arg-type]

    return load_from


# ---------- digits


def test_digits_are_scikit_learns_with_a_fixed_stratified_fifth() -> None:
    dataset = load_dataset("digits")
    train, test = arrays(dataset)
    assert (len(train), len(test), dataset.num_classes) == (1438, 359, 10)
    assert (dataset.channels, dataset.height, dataset.width) == (1, 8, 8)
    assert train.images.dtype == torch.uint8
    assert train.labels.dtype == torch.int64
    bunch = load_digits()
    # Together the splits are the 1,797 digits: 0..16 as 0..255.
    ours = torch.cat([train.images, test.images]).view(-1, 64).double() * 16 / 255
    assert sorted(ours.round().int().tolist()) == sorted(bunch.data.astype(int).tolist())
    share = torch.bincount(test.labels) / torch.as_tensor(np.bincount(bunch.target))
    assert (share - 0.2).abs().max() < 1 / 170
    assert dataset.digest == load_dataset("digits").digest
    np.testing.assert_allclose(dataset.mean, [train.images.double().mean() / 255], rtol=1e-12)
    np.testing.assert_allclose(dataset.std, [train.images.double().std(unbiased=False) / 255], rtol=1e-12)


def test_digits_can_be_made_larger_but_not_large() -> None:
    dataset = load_dataset("digits", image_size=16)
    train, _ = arrays(dataset)
    assert (dataset.height, dataset.width) == (16, 16)
    small, _ = arrays(load_dataset("digits"))
    halved = torch.nn.functional.avg_pool2d(train.images.float(), 2)
    assert (halved - small.images.float()).abs().mean() < 20
    with pytest.raises(ConfigError, match=r"data\.image_size: 65 .* use at most 64"):
        load_dataset("digits", image_size=65)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar", r"data\.name: 'cifar' .*did you mean cifar10\?"),
        ("folder", r"data\.root: missing; name"),
    ],
)
def test_arguments_that_name_no_data_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_dataset(name)


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.image_size: 0 is too small; use 1 or more"):
        load_dataset("digits", image_size=0)


# ---------- torchvision


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def write_mnist(raw: Path, n_train: int = 30, n_test: int = 10) -> dict[str, np.ndarray]:
    files = {
        "train-images-idx3-ubyte": pixels(n_train, 28, 28),
        "train-labels-idx1-ubyte": pixels(n_train, seed=1) % 10,
        "t10k-images-idx3-ubyte": pixels(n_test, 28, 28, seed=2),
        "t10k-labels-idx1-ubyte": pixels(n_test, seed=3) % 10,
    }
    for name, array in files.items():
        write_idx(raw / name, array)
    return files


@pytest.mark.parametrize(
    ("name", "directory"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_the_mnist_family_is_read_through_torchvision(name: str, directory: str, tmp_path: Path) -> None:
    files = write_mnist(tmp_path / directory / "raw")
    dataset = load_dataset(name, root=tmp_path)
    train, test = arrays(dataset)
    assert (dataset.channels, dataset.height, dataset.num_classes) == (1, 28, 10)
    np.testing.assert_array_equal(train.images[:, 0], files["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(test.images[:, 0], files["t10k-images-idx3-ubyte"])
    np.testing.assert_array_equal(test.labels, files["t10k-labels-idx1-ubyte"])


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_cifar_pictures_have_their_channels_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    images = {name: pixels(4, 3, 32, 32, seed=i) for i, name in enumerate(("data_batch_1", "test_batch"))}
    for name, array in images.items():
        (folder / name).write_bytes(pickle.dumps({"data": array.reshape(4, -1), "labels": [3, 1, 9, 0]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    # The checksums of these files in place of those of the real ones; the rest is torchvision's own reading.
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", md5(folder / "data_batch_1")]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(folder / "test_batch")]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(folder / "batches.meta")})
    dataset = load_dataset("cifar10", root=tmp_path)
    train, test = arrays(dataset)
    assert (dataset.class_names, dataset.channels) == (tuple("abcdefghij"), 3)
    np.testing.assert_array_equal(train.images, images["data_batch_1"])
    np.testing.assert_array_equal(test.images, images["test_batch"])
    assert train.labels.tolist() == [3, 1, 9, 0]


def test_svhn_pictures_have_their_channels_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = {split: pixels(5, 3, 32, 32, seed=len(split)) for split in ("train", "test")}
    for split, array in images.items():
        file = tmp_path / f"{split}_32x32.mat"
        savemat(file, {"X": array.transpose(2, 3, 1, 0), "y": np.array([[1], [10], [3], [9], [2]], np.uint8)})
        monkeypatch.setitem(SVHN.split_list, split, ["", file.name, md5(file)])
    train, test = arrays(load_dataset("svhn", root=tmp_path))
    np.testing.assert_array_equal(train.images, images["train"])
    np.testing.assert_array_equal(test.images, images["test"])
    assert train.labels.tolist() == [1, 0, 3, 9, 2]


def test_without_a_root_torchvisions_files_lie_in_the_cache(tmp_path: Path) -> None:
    write_mnist(tmp_path / "downloads" / "MNIST" / "raw")
    assert len(load_dataset("mnist", cache_dir=tmp_path).train) == 30


@pytest.mark.parametrize("name", sorted(name for name in DATASETS if DATASETS[name].downloads))
def test_absent_data_name_the_root_and_the_remedy(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(name, root=tmp_path)
    text = str(caught.value)
    assert text.startswith(f"data.root: {tmp_path} does not contain a complete {name};")
    assert "--set data.download=true" in text
    assert "\n" not in text
    assert list(tmp_path.iterdir()) == []


def test_truncated_data_are_an_error_of_one_line(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST" / "raw")
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"data\.root: .* does not contain a complete mnist") as caught:
        load_dataset("mnist", root=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_download_into_a_place_that_is_none_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(
        DataError, match=r"data\.download: mnist could not be downloaded to .*; check the network"
    ) as caught:
        load_dataset("mnist", root=tmp_path / "file", download=True)
    assert "\n" not in str(caught.value)


def test_labels_that_no_class_has_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST" / "raw")
    write_idx(tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte", np.full(30, 11, np.uint8))
    with pytest.raises(DataError, match=r"train split of mnist has labels 11\.\.11 for 10 classes"):
        load_dataset("mnist", root=tmp_path)


# ---------- picture folders


def test_a_folder_is_decoded_in_the_order_of_class_and_name(
    folder: Path, load: Callable[..., ImageDataset]
) -> None:
    seen: list[tuple[int, int]] = []
    dataset = load(folder, progress=lambda done, total: seen.append((done, total)))
    train, test = arrays(dataset)
    assert dataset.class_names == CLASSES
    assert (dataset.channels, dataset.height, dataset.width) == (3, 10, 12)
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(train.images[5], pixels(10, 12, 3, seed=101).transpose(2, 0, 1))
    np.testing.assert_array_equal(test.images[4], pixels(10, 12, 3, seed=250).transpose(2, 0, 1))
    np.testing.assert_allclose(dataset.mean, train.images.double().mean((0, 2, 3)) / 255, rtol=1e-12)
    np.testing.assert_allclose(
        dataset.std, train.images.double().std((0, 2, 3), unbiased=False) / 255, rtol=1e-12
    )
    assert seen == [(18, 18)]


def test_val_serves_as_test(folder: Path, load: Callable[..., ImageDataset]) -> None:
    wanted = load(folder).digest
    (folder / "test").rename(folder / "val")
    assert load(folder).digest == wanted


def test_equal_folders_have_equal_digests_and_others_do_not(
    folder: Path, load: Callable[..., ImageDataset]
) -> None:
    wanted = load(folder).digest
    copy = folder.rename(folder.with_name("elsewhere"))
    os.utime(copy / "train" / "ant" / "0.png", (1, 1))
    assert load(copy).digest == wanted
    save(copy / "train" / "ant" / "0.png", pixels(10, 12, 3, seed=999))
    assert load(copy).digest != wanted


def test_a_part_has_a_digest_of_its_own_pictures(folder: Path, load: Callable[..., ImageDataset]) -> None:
    def digests(size: int | None) -> list[str]:
        dataset = load(folder, image_size=size)
        first, rest, everything = (
            torch.arange(3),
            torch.arange(3, len(dataset.train)),
            torch.arange(len(dataset.test)),
        )
        return [
            pictures_digest(pictures, indices, dataset.class_names)
            for pictures, indices in (
                (dataset.train, first),
                (dataset.train, first.flip(0)),
                (dataset.train, rest),
                (dataset.test, everything),
            )
        ]

    for size in (8, 96):  # decoded, and from the files
        before = digests(size)
        assert len(set(before)) == 4
        assert digests(size) == before
        save(folder / "test" / "ant" / "0.png", pixels(12, 12 + size, 3, seed=998))
        after = digests(size)
        assert after[:3] == before[:3], "other test pictures do not touch the training pictures"
        assert after[3] != before[3]
    labels = load(folder, image_size=8)
    swapped = pictures_digest(labels.train, torch.arange(3), labels.class_names[::-1])
    assert swapped != digests(8)[0], "what the labels mean counts too"


def test_one_colour_picture_gives_a_grey_folder_three_channels(
    folder: Path, load: Callable[..., ImageDataset]
) -> None:
    for i, path in enumerate(sorted(folder.glob("*/*/[0-9].png"))):
        save(path, pixels(10, 12, seed=i))
    dataset = load(folder)
    assert (dataset.channels, arrays(dataset)[0].images.shape[1]) == (1, 1)
    np.testing.assert_array_equal(arrays(dataset)[1].images[0, 0], pixels(10, 12, seed=0))
    save(folder / "test" / "cat" / "1.png", pixels(10, 12, 3))
    dataset = load(folder)
    assert dataset.channels == 3
    np.testing.assert_array_equal(arrays(dataset)[1].images[0], np.stack([pixels(10, 12, seed=0)] * 3))


def test_unequal_small_pictures_want_a_size_and_get_it(
    folder: Path, load: Callable[..., ImageDataset]
) -> None:
    odd = folder / "train" / "bee" / "2.png"
    save(odd, np.full((20, 14, 3), 9, np.uint8))
    with pytest.raises(DataError) as caught:
        load(folder)
    assert str(caught.value) == (
        f"data.root: {odd} has 14x20 pixels, others have 12x10; "
        "scale all to one size with --set data.image_size=12"
    )
    dataset = load(folder, image_size=12)
    train, _ = arrays(dataset)
    assert (dataset.height, dataset.width) == (12, 12)
    assert train.images[6].unique().tolist() == [9]


def test_large_pictures_stay_in_their_files(
    folder: Path, load: Callable[..., ImageDataset], tmp_path: Path
) -> None:
    for i, path in enumerate(sorted(folder.glob("train/*/?.png"))):
        save(path, pixels(10, 65, 3, seed=i))
    dataset = load(folder)
    assert isinstance(dataset.train, FilePictures)
    assert isinstance(dataset.test, FilePictures)
    assert dataset.train.paths[4] == str(folder / "train" / "bee" / "0.png")
    assert dataset.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (dataset.channels, dataset.height, dataset.width, len(dataset.test)) == (3, 224, 224, 6)
    assert dataset.mean == (0.485, 0.456, 0.406)
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".facts"]
    assert isinstance(load(folder, image_size=32).train, ArrayPictures)
    assert load(folder, image_size=96).height == 96
    save(folder / "train" / "bee" / "1.png", pixels(11, 12, 3))
    assert load(folder).digest != dataset.digest


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no picture",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 10\n",
        b"\x89PNG\r\n\x1a\n" + bytes(30),
        "truncated",
    ],
    ids=["empty", "text", "postscript", "png header only", "truncated"],
)
def test_a_broken_picture_is_named_in_one_line(
    content: bytes | str, folder: Path, load: Callable[..., ImageDataset], tmp_path: Path
) -> None:
    broken = folder / "train" / "bee" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200] if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        load(folder)
    text = str(caught.value)
    assert text.startswith(f"data.root: {broken} is not a readable picture (")
    assert text.endswith("); replace or delete it")
    assert "\n" not in text
    assert not (tmp_path / "cache").exists()


def test_a_decompression_bomb_is_named_in_one_line(folder: Path, load: Callable[..., ImageDataset]) -> None:
    bomb = folder / "train" / "ant" / "0.png"
    Image.new("1", (20_000, 20_000)).save(bomb)
    with pytest.raises(DataError, match=r"0\.png is not a readable picture \(.*decompression bomb"):
        load(folder, image_size=32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"no such folder: .*pictures; set data.root to a folder with train/CLASS"),
        (lambda f: shutil.rmtree(f / "train"), r"train is missing"),
        (lambda f: shutil.rmtree(f / "test"), r"test is missing"),
        (
            lambda f: list(map(shutil.rmtree, [f / "train" / c for c in CLASSES[1:]])),
            r"train has only one class, \w+; two or more are needed, each in its own folder",
        ),
        (
            lambda f: (f / "test" / "dog").mkdir(),
            r"dog is a class without a folder in .*train; add one, or remove this one",
        ),
        (
            lambda f: [p.unlink() for p in (f / "train" / "bee").glob("?.png")],
            r"bee contains no picture; add some \(\.bmp",
        ),
        (lambda f: [p.unlink() for p in f.glob("test/*/?.png")], r"test contains no picture"),
        (
            lambda f: os.mkfifo(f / "train" / "ant" / "9.png"),
            r"9\.png is not a readable picture \(not a regular file\)",
        ),
    ],
)
def test_a_folder_that_is_none_says_what_lacks(
    damage: Callable[[Path], object], message: str, folder: Path, load: Callable[..., ImageDataset]
) -> None:
    damage(folder)
    with pytest.raises(DataError, match=r"^data\.root: .*" + message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_links_may_lead_around_in_the_folder_but_not_out_of_it(
    folder: Path, load: Callable[..., ImageDataset], tmp_path: Path
) -> None:
    inside = folder / "train" / "ant" / "linked.png"
    inside.symlink_to(folder / "train" / "ant" / "0.png")
    (tmp_path / "entrance").symlink_to(folder)
    assert len(load(tmp_path / "entrance").train) == 13
    save(tmp_path / "outside" / "secret.png", pixels(10, 12, 3))
    for link, target in (
        (folder / "train" / "ant" / "file.png", tmp_path / "outside" / "secret.png"),
        (folder / "train" / "dir", tmp_path / "outside"),
        (folder / "train" / "ant" / "dangling.png", tmp_path / "nowhere.png"),
    ):
        link.symlink_to(target)
        with pytest.raises(
            DataError, match=rf"{link.name} is a link that leads out of the folder, to .*{target.name};"
        ):
            load(folder)
        link.unlink()
    (folder / "test").rename(tmp_path / "test")
    (folder / "test").symlink_to(tmp_path / "test")
    with pytest.raises(DataError, match="test is a link that leads out of the folder"):
        load(folder)


def test_a_pool_of_processes_decodes_pictures_as_one_process_does(
    folder: Path, load: Callable[..., ImageDataset], tmp_path: Path
) -> None:
    pool = Pool(chunk=5, threshold=10, processes=2)
    surveyed: list[int] = []
    decoded: list[int] = []

    def decode() -> np.ndarray:
        survey = survey_folder(
            folder,
            cache_dir=tmp_path / "cache",
            allow_left_out=False,
            progress=lambda done, _: surveyed.append(done),
            keep=False,
            pool=pool,
        )
        settings = survey.decode_settings((255, 255, 255))
        return decode_pictures(
            survey.listing.files, None, settings, lambda done, _: decoded.append(done), pool=pool
        )

    together = decode()
    train, test = arrays(load(folder))
    np.testing.assert_array_equal(together, torch.cat([train.images, test.images]))
    assert surveyed == decoded == [5, 10, 15, 18]
    (folder / "train" / "cat" / "1.png").write_text("no picture")
    with pytest.raises(DataError, match=r"1\.png is not a readable picture") as caught:
        decode()
    assert "\n" not in str(caught.value)
    save(folder / "train" / "cat" / "1.png", pixels(9, 12, 3))
    with pytest.raises(DataError, match=r"1\.png has 12x9 pixels, others have 12x10"):
        decode()


def test_real_jpeg_pictures(shared_dir: Path, tmp_path: Path, load: Callable[..., ImageDataset]) -> None:
    archive = shared_dir / "data" / "cifar10_jpeg.zip"
    if not archive.is_file():
        pytest.skip(f"no {archive}")
    with zipfile.ZipFile(archive) as source:
        source.extractall(
            tmp_path / "cifar", [name for name in source.namelist() if name.endswith(("000.jpg", "001.jpg"))]
        )
    dataset = load(tmp_path / "cifar")
    train, _ = arrays(dataset)
    assert (dataset.num_classes, dataset.channels, dataset.height, dataset.width) == (10, 3, 32, 32)
    assert torch.bincount(train.labels).tolist() == [10] * 10
    # The known statistics of all 50,000, within what a hundred of them can differ.
    np.testing.assert_allclose(dataset.mean, (0.4913, 0.4821, 0.4465), atol=0.06)
    np.testing.assert_allclose(dataset.std, (0.2452, 0.2428, 0.2606), atol=0.04)


# ---------- the cache


def one_cache(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache").glob("*.pictures")
    return file


def test_the_second_time_nothing_is_decoded(folder: Path, load: Callable[..., ImageDataset]) -> None:
    decoded: list[int] = []
    first = load(folder, progress=lambda done, _: decoded.append(done))
    again = load(folder, progress=lambda done, _: decoded.append(done))
    assert decoded == [18]
    assert first.digest == again.digest
    assert torch.equal(arrays(first)[0].images, arrays(again)[0].images)
    arrays(again)[0].images[0, 0, 0, 0] = 1  # writable, as torch wants its memory


@pytest.mark.parametrize(
    "change",
    [
        lambda f: save(f / "train" / "ant" / "0.png", pixels(10, 12, 3, seed=77)),
        lambda f: os.utime(f / "train" / "ant" / "0.png", ns=(0, 0)),
        lambda f: (f / "train" / "ant" / "0.png").rename(f / "train" / "ant" / "9.png"),
        lambda f: (f / "test" / "bee" / "1.png").unlink(),
        lambda f: save(f / "test" / "bee" / "2.png", pixels(10, 12, 3)),
    ],
    ids=["content", "time", "name", "less", "more"],
)
def test_a_changed_folder_is_decoded_anew_without_a_word(
    change: Callable[[Path], object], folder: Path, load: Callable[..., ImageDataset], tmp_path: Path
) -> None:
    load(folder)
    change(folder)
    decoded: list[int] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = load(folder, progress=lambda done, _: decoded.append(done))
    assert decoded == [len(dataset.train) + len(dataset.test)]
    one_cache(tmp_path)  # in the place of the old one


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:50],
        lambda data: b"",
        lambda data: bytes(100),
        lambda data: b"[1]\n" + data,
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data.replace(b"10, 12]", b"12, 10]"),
        lambda data: data + b"\0",
    ],
    ids=["short", "header cut", "empty", "zeros", "list", "bit", "shape", "long"],
)
def test_a_broken_cache_is_made_anew_with_a_warning(
    damage: Callable[[bytes], bytes], folder: Path, load: Callable[..., ImageDataset], tmp_path: Path
) -> None:
    first = load(folder)
    file = one_cache(tmp_path)
    whole = file.read_bytes()
    assert damage(whole) != whole
    file.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match=r"damaged cache \(.*\); it will be recreated"):
        again = load(folder)
    assert again.digest == first.digest
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_only_a_warning(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match=r"cache cannot be written \(.*data\.cache_dir"):
        dataset = load_dataset("folder", root=folder, cache_dir=tmp_path / "file" / "cache")
    assert len(dataset.train) == 12


def test_the_cache_lies_where_the_system_wants_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_dataset("folder", root=folder)
    assert len(list((tmp_path / "xdg" / "istanas").iterdir())) == 2
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load_dataset("folder", root=folder)
    assert len(list((tmp_path / "home" / ".cache" / "istanas").iterdir())) == 2
