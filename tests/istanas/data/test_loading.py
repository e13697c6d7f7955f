"""Loaders: the same bits from the same (seed, epoch, rank), every picture exactly once over the ranks."""

import gc
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from istanas.data import ArrayPictures, Augmentation, BatchLoader, ImageDataset, batches, load_dataset
from istanas.data import loading as module
from istanas.data.transfer import copy_on_side_stream, side_stream
from istanas.errors import ConfigError, DataError

CPU = torch.device("cpu")
AUGMENTATION = Augmentation(crop_padding=2, horizontal_flip=True, cutout=3)


def numbered(n: int) -> ImageDataset:
    """A data set whose picture i is labelled i, so that a batch tells what it holds."""
    images = torch.arange(n).view(n, 1, 1, 1).remainder(256).to(torch.uint8).expand(n, 1, 4, 4).contiguous()
    pictures = ArrayPictures(images, torch.arange(n))
    return ImageDataset(
        "numbered", tuple(map(str, range(n))), pictures, pictures, 1, 4, 4, (0.0,), (1.0,), ""
    )


def loader_of(dataset: ImageDataset, **options: object) -> BatchLoader:
    settings: dict[str, object] = {
        "batch_size": 32,
        "augmentation": AUGMENTATION,
        "device": CPU,
        "seed": 0,
        "epoch": 0,
        "shuffle": True,
    }
    return batches(dataset, "train", options.pop("indices", None), **(settings | options))  # type: ignore[arg-type]


def equal(one: BatchLoader, other: BatchLoader) -> bool:
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.weight == b.weight
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_dataset("digits")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    """Twelve training pictures of 90x70 and more, brought to 66x66."""
    root = tmp_path_factory.mktemp("large")
    for split, n in (("train", 6), ("test", 3)):
        for label, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                rng = np.random.default_rng(100 * label + i)
                coarse = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
                picture = Image.fromarray(coarse).resize((90 + 10 * i, 70), Image.Resampling.BILINEAR)
                picture.save(root / split / name / f"{i}.png")
    return load_dataset("folder", root=root, image_size=66, cache_dir=root / "cache")


def test_a_pass_yields_every_picture_once_in_channels_last_floats(digits: ImageDataset) -> None:
    loader = loader_of(digits, batch_size=100)
    passed = list(loader)
    assert len(passed) == len(loader) == 15
    assert [len(labels) for _, labels, _ in passed] == [100] * 14 + [38]
    assert loader.n_pictures == 1438
    images, labels, _ = passed[0]
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(
        torch.cat([labels for _, labels, _ in passed]).bincount(), torch.bincount(digits.train.labels)
    )


def test_evaluation_is_the_normalised_pictures_in_order(digits: ImageDataset) -> None:
    test = digits.test
    assert isinstance(test, ArrayPictures)
    loader = batches(
        digits, "test", None, batch_size=64, augmentation=None, device=CPU, seed=0, epoch=0, shuffle=False,
        dtype=torch.float64,
    )  # fmt: skip
    images = torch.cat([images for images, _, _ in loader])
    wanted = (test.images.double() / 255 - digits.mean[0]) / digits.std[0]
    torch.testing.assert_close(images, wanted, rtol=0, atol=1e-13)
    assert torch.equal(torch.cat([labels for _, labels, _ in loader]), test.labels)


def test_a_pass_is_determined_by_seed_and_epoch(digits: ImageDataset) -> None:
    loader = loader_of(digits)
    assert equal(loader, loader)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert equal(loader, loader_of(digits))
    assert torch.equal(state, torch.get_rng_state())
    assert not equal(loader, loader_of(digits, seed=1))
    assert not equal(loader, loader_of(digits, epoch=1))
    # Seed 1, epoch 0 is not epoch 1 of seed 0, and the order differs, not only the augmentation.
    first = [
        next(iter(loader_of(digits, seed=s, epoch=e))).labels.tolist()
        for s, e in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert len({tuple(labels) for labels in first}) == 4


def digest_of_a_pass() -> str:
    images = torch.arange(20 * 3 * 8 * 8).view(20, 3, 8, 8).remainder(251).to(torch.uint8)
    pictures = ArrayPictures(images, torch.arange(20))
    dataset = ImageDataset("", tuple("abc"), pictures, pictures, 3, 8, 8, (0.5,) * 3, (0.2,) * 3, "")
    parts = [
        part.contiguous().numpy().tobytes()
        for batch in loader_of(dataset)
        for part in (batch.images, batch.labels)
    ]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_another_process_makes_the_same_batches() -> None:
    program = f"import runpy; print(runpy.run_path({__file__!r})['digest_of_a_pass']())"
    command = [sys.executable, "-c", program]
    root = Path(__file__).parents[3]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert found.stdout.strip() == digest_of_a_pass()


@given(
    st.integers(1, 80),
    st.integers(1, 30),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_ranks_share_every_global_batch_and_no_picture_twice(
    n: int, batch_size: int, world_size: int, shuffle: bool, drop_last: bool, seed: int
) -> None:
    dataset = numbered(n)
    options = {
        "batch_size": batch_size,
        "shuffle": shuffle,
        "drop_last": drop_last,
        "seed": seed,
        "augmentation": None,
    }
    kept = n - n % batch_size if drop_last else n
    if batch_size < world_size or kept < world_size:
        with pytest.raises(ConfigError, match="batch_size: "):
            loader_of(dataset, **options, rank=0, world_size=world_size)
        return
    ranks = [loader_of(dataset, **options, rank=r, world_size=world_size) for r in range(world_size)]
    alone = loader_of(dataset, **options)
    assert len({len(loader) for loader in ranks}) == 1
    steps = [[labels for _, labels, _ in loader] for loader in ranks]
    for loader, step in zip(ranks, steps, strict=True):
        assert len(loader) == len(step)
        assert loader.n_pictures == sum(map(len, step))
    together = [torch.cat(parts).sort().values for parts in zip(*steps, strict=True)]
    everything = torch.cat(together).tolist()
    assert len(everything) == len(set(everything)) == kept == alone.n_pictures
    for parts in zip(*steps, strict=True):
        sizes = [len(part) for part in parts]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1
    # The global batches are those of a single process, but for a remainder smaller than the ranks.
    whole = [labels.sort().values for _, labels, _ in alone]
    if kept % batch_size >= world_size or kept % batch_size == 0 or kept < batch_size:
        assert all(torch.equal(a, b) for a, b in zip(together, whole, strict=True))
    else:
        assert all(torch.equal(a, b) for a, b in zip(together[:-1], whole[:-2], strict=True))


def test_alone_every_batch_weighs_1_also_a_smaller_last_one(
    digits: ImageDataset, large: ImageDataset
) -> None:
    for dataset in (digits, large):
        loader = loader_of(dataset, batch_size=5)
        assert len(next(iter(loader)).labels) != len(list(loader)[-1].labels)
        assert [batch.weight for batch in loader] == [1.0] * len(loader)


@given(st.integers(3, 60), st.integers(3, 20), st.sampled_from([2, 3]), st.booleans(), st.integers(0, 99))
def test_weighted_means_of_the_ranks_average_to_the_mean_over_all_pictures(
    n: int, batch_size: int, world_size: int, drop_last: bool, seed: int
) -> None:
    """Also where the ranks get unequal shares of a batch."""
    assume(not drop_last or n >= batch_size)
    values = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options = {"batch_size": batch_size, "drop_last": drop_last, "seed": seed, "augmentation": None}
    ranks = [loader_of(numbered(n), **options, rank=r, world_size=world_size) for r in range(world_size)]
    for shares in zip(*ranks, strict=True):
        found = sum(share.weight * values[share.labels].mean() for share in shares) / world_size
        together = torch.cat([share.labels for share in shares])
        torch.testing.assert_close(found, values[together].mean(), rtol=1e-13, atol=0)
        assert sum(share.weight for share in shares) == pytest.approx(world_size, rel=1e-13)


def test_weights_of_an_uneven_last_batch_by_hand() -> None:
    """Seven pictures in batches of four for two ranks: two and two, then two and one."""
    one, other = (loader_of(numbered(7), batch_size=4, rank=r, world_size=2) for r in range(2))
    assert [(len(b.labels), b.weight) for b in one] == [(2, 1.0), (2, 4 / 3)]
    assert [(len(b.labels), b.weight) for b in other] == [(2, 1.0), (1, 2 / 3)]


def test_one_of_one_is_no_sharding_and_ranks_draw_for_themselves(digits: ImageDataset) -> None:
    assert equal(loader_of(digits), loader_of(digits, rank=0, world_size=1))
    images = ArrayPictures(digits.train.images[:1].expand(64, 1, 8, 8), torch.zeros(64).long())  # type: ignore[union-attr]
    same = ImageDataset("same", ("0", "1"), images, images, 1, 8, 8, (0.0,), (1.0,), "")
    one, other = (loader_of(same, rank=r, world_size=2) for r in range(2))
    assert not equal(one, other)


def test_indices_choose_the_pictures(digits: ImageDataset) -> None:
    indices = torch.tensor([5, 3, 900, 3])
    loader = loader_of(digits, indices=indices, shuffle=False)
    assert loader.n_pictures == 4
    assert torch.equal(next(iter(loader)).labels, digits.train.labels[indices])


@pytest.mark.parametrize("indices", [[0, 1438], [-1, 0]])
def test_indices_outside_the_split_are_refused(digits: ImageDataset, indices: list[int]) -> None:
    with pytest.raises(DataError, match=r"indices: .* do not fit the 1438 pictures of the train split"):
        loader_of(digits, indices=torch.tensor(indices))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank: 2 is not the rank of one of 2 workers; use 0 to 1"),
        ({"batch_size": 0}, "batch_size: 0 is too small for 1 workers; use 1 or more"),
        ({"batch_size": 3, "world_size": 4}, "batch_size: 3 is too small for 4 workers"),
        (
            {"batch_size": 2000, "drop_last": True},
            "batch_size: 2000 makes no batch of 1438 .* smaller batch_size",
        ),
        ({"indices": torch.tensor([], dtype=torch.int64)}, "makes no batch of 0 pictures"),
    ],
)
def test_numbers_that_leave_a_rank_without_pictures_are_refused(
    digits: ImageDataset, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        loader_of(digits, **options)


# ---------- large pictures


@pytest.mark.parametrize(
    "augmentation",
    [
        None,
        Augmentation(horizontal_flip=True, cutout=16),
        Augmentation(color_jitter=False, rand_augment=9, random_erasing=0.5),
    ],
)
def test_workers_do_not_change_a_bit(large: ImageDataset, augmentation: Augmentation | None) -> None:
    options = {"batch_size": 5, "augmentation": augmentation}
    alone = loader_of(large, **options)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert equal(alone, alone)
    assert equal(alone, loader_of(large, **options, workers=2))
    assert torch.equal(state, torch.get_rng_state())
    images, labels, _ = next(iter(alone))
    assert (images.shape, labels.shape, images.dtype) == ((5, 3, 66, 66), (5,), torch.float32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert not equal(alone, loader_of(large, **options, epoch=1))


def test_large_pictures_are_evaluated_as_on_imagenet(large: ImageDataset) -> None:
    loader = batches(
        large, "test", None, batch_size=4, augmentation=None, device=CPU, seed=0, epoch=0, shuffle=False
    )
    found = torch.cat([images for images, _, _ in loader])
    for image, path in zip(found, large.test.paths, strict=True):  # type: ignore[union-attr]
        with Image.open(path) as picture:
            # The shorter side to 66 * 256 / 224 = 75 pixels, then the middle 66 x 66.
            side = round(picture.width * 75 / picture.height)
            resized = picture.convert("RGB").resize((int(picture.width * 75 / picture.height), 75), 2)
            assert abs(side - resized.width) <= 1
            left, top = round((resized.width - 66) / 2), round((75 - 66) / 2)
            crop = np.asarray(resized.crop((left, top, left + 66, top + 66))) / 255
        wanted = (crop - np.array(large.mean)) / np.array(large.std)
        np.testing.assert_allclose(image.permute(1, 2, 0), wanted, atol=1e-5)


def test_the_ranks_share_large_pictures_with_the_same_augmentation_each(large: ImageDataset) -> None:
    options = {"batch_size": 4, "augmentation": Augmentation(horizontal_flip=True), "shuffle": False}
    alone = torch.cat([images for images, _, _ in loader_of(large, **options)])
    ranks = [
        torch.cat([images for images, _, _ in loader_of(large, **options, rank=r, world_size=2)])
        for r in range(2)
    ]
    assert torch.equal(alone[0::2], ranks[0])
    assert torch.equal(alone[1::2], ranks[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_large_picture_that_breaks_later_is_named_in_one_line(tmp_path: Path, workers: int) -> None:
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (80, 80)).save(tmp_path / split / name / "0.png")
    dataset = load_dataset("folder", root=tmp_path, image_size=72, cache_dir=tmp_path / "cache")
    broken = tmp_path / "train" / "ant" / "0.png"
    broken.write_text("no picture")
    with pytest.raises(DataError) as caught:
        list(loader_of(dataset, batch_size=2, workers=workers))
    assert str(caught.value).startswith(f"data.root: {broken} is not a readable picture (")
    assert "\n" not in str(caught.value)


# ---------- devices


def test_pictures_are_moved_once_and_forgotten_with_the_data_set() -> None:
    dataset = numbered(8)
    pictures = dataset.train
    assert isinstance(pictures, ArrayPictures)
    assert module._moved(pictures, CPU) is pictures
    elsewhere = torch.device("meta")
    assert module._moved(pictures, elsewhere) is module._moved(pictures, elsewhere)
    before = len(module._on_device)
    del pictures, dataset
    gc.collect()
    assert len(module._on_device) == before - 1


@pytest.mark.gpu
def test_a_gpu_gets_the_same_batches(digits: ImageDataset, large: ImageDataset) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for dataset in (digits, large):
        one, other = (loader_of(dataset, device=torch.device(device)) for device in ("cpu", "cuda"))
        for (a, b, _), (c, d, _) in zip(one, other, strict=True):
            assert c.device.type == d.device.type == "cuda"
            torch.testing.assert_close(a, c.cpu(), atol=1e-6, rtol=0)
            assert torch.equal(b, d.cpu())


@pytest.mark.gpu
def test_a_copy_beside_a_step_is_done_before_the_step() -> None:
    """The copy of the next batch does not wait for the work that is queued on the stream of the training."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    picture = torch.ones(64, 3, 224, 224).pin_memory()
    weight = torch.rand(8192, 8192, device=device)
    stream = side_stream(device)
    copy_on_side_stream([picture], device, stream)  # allocates memory
    torch.cuda.synchronize(device)
    step = torch.cuda.Event()
    for _ in range(50):
        weight = weight @ weight / 8192
    step.record()
    copied = torch.cuda.Event()
    assert stream is not None
    (copy,) = copy_on_side_stream([picture], device, stream)
    copied.record(stream)
    copied.synchronize()
    assert not step.query(), "the step ended before the copy"
    assert torch.equal(copy.cpu(), picture)
