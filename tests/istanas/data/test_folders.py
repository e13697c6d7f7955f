"""Picture folders: the cache, what is left out, small and large pictures, names, folders without splits."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from istanas.data import (
    FilePictures,
    load_dataset,
)
from istanas.errors import ConfigError, DataError
from tests.istanas.data.picture_files import (
    Load,
    grey,
    images,
    pictures_of,
    save,
    shape_in_alpha,
    swap,
    upright,
    write_folder,
)

# ---------- the cache belongs to the files that were decoded


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


# ---------- what is left out


def test_jfif_files_are_read(tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n), ".jpg")
    for file in [*root.glob("*/*/*.jpg")]:
        file.rename(file.with_suffix(".jfif"))
    dataset = load(root)
    assert (len(dataset.train), len(dataset.test)) == (4, 2)


def in_a_sub_folder(folder: Path) -> Path:
    return folder / "more" / "even more" / "1.png"


@pytest.mark.parametrize(
    ("place", "why"),
    [
        (in_a_sub_folder, "in sub-folders"),
        (lambda folder: folder / "1.heic", r"with the suffix \.heic"),
        (lambda folder: folder / "1.AVIF", r"with the suffix \.avif"),
        (lambda folder: folder / "all.zip", r"with the suffix \.zip"),
        (lambda folder: folder / "picture", "without a suffix"),
        (lambda folder: folder.parent / "1.png", "outside the class folders"),
    ],
    ids=["sub-folder", "heic", "avif", "archive", "no suffix", "no class"],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_what_is_left_out_stops_unless_it_is_allowed(
    split: str, place: Callable[[Path], Path], why: str, tmp_path: Path, load: Load
) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n))
    file = place(root / split / "bee")
    save(root / "other.png", grey(1))
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(root / "other.png", file)
    message = rf"1 of \d files of .* would be left out \(1 file {why}, such as {re.escape(str(file))}\)"
    with pytest.raises(DataError, match=message) as caught:
        load(root)
    assert str(caught.value).endswith("--set data.allow_left_out=true")
    dataset = load(root, allow_left_out=True)
    assert (len(dataset.train), len(dataset.test)) == (4, 2)
    (note,) = dataset.notes[1:]
    assert re.match(rf"left out: 1 file {why}, such as ", note)


def test_a_hundredth_of_a_class_may_be_left_out_and_is_told(tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n))
    for i in range(97):
        save(root / "train" / "bee" / f"more{i:02}.png", grey(i))
    (root / "train" / "bee" / "1.heic").touch()
    for name in ("notes.txt", "1.json", "Thumbs.db", ".hidden.heic"):
        (root / "train" / "bee" / name).touch()
    assert load(root).notes[1:] == (
        f"left out: 1 file with the suffix .heic, such as {root}/train/bee/1.heic",
    )
    (root / "train" / "bee" / "2.heic").touch()
    with pytest.raises(
        DataError, match=r"2 of 101 files of .*bee would be left out \(2 files with the suffix"
    ):
        load(root)


@pytest.mark.parametrize(
    ("read", "ignored"), [("test", "val"), ("test", "valid"), ("test", "validation"), ("val", "valid")]
)
def test_a_second_split_for_testing_is_counted_and_does_not_stop_a_job(
    read: str, ignored: str, tmp_path: Path, load: Load
) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n))
    shutil.copytree(root / "train", root / ignored)
    (root / ignored / "labels.csv").touch()
    (root / "test").rename(root / read)
    dataset = load(root)
    assert len(dataset.test) == 2
    assert dataset.notes[1:] == (
        f"left out: 4 files in {ignored}/, which is ignored because {read}/ exists, such as "
        f"{root}/{ignored}/ant/ant0.png",
    )


def test_a_link_to_the_split_that_is_read_is_not_left_out(tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n))
    (root / "val").symlink_to("test")
    assert len(load(root).notes) == 1


def test_only_the_first_frame_is_read_and_that_is_told(tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(10 * n), ".gif")
    frames = [Image.fromarray(grey(value)) for value in (50, 100)]
    save(root / "train" / "ant" / "ant0.gif", frames[0], save_all=True, append_images=frames[1:])
    dataset = load(root)
    assert any("1 picture has several frames" in note for note in dataset.notes)
    assert images(dataset)[0, :, 0, 0].unique().tolist() == [50]


# ---------- small or large


def test_one_large_picture_first_does_not_make_a_folder_large(tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n, 16))
    first = root / "train" / "ant" / "ant0.png"
    save(first, grey(0, 80))
    with pytest.raises(DataError) as caught:
        load(root)
    assert str(caught.value) == (
        f"data.root: {first} has 80x80 pixels, others have 16x16; "
        "scale all to one size with --set data.image_size=16"
    )
    dataset = load(root, image_size=16)
    assert dataset.notes == (
        "folder: 4 training and 2 test pictures of 2 classes, 16x16 to 80x80 pixels, grey, scaled and cropped to "
        "16x16, kept in memory",
    )
    assert images(dataset).shape == (4, 1, 16, 16)


def test_one_small_picture_first_does_not_make_a_folder_small(tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n, 80))
    save(root / "train" / "ant" / "ant0.png", grey(0, 16))
    save(root / "train" / "bee" / "bee0.png", grey(0, 64))
    save(root / "train" / "bee" / "bee2.png", grey(0, 96))
    dataset = load(root)
    assert isinstance(dataset.train, FilePictures)
    assert dataset.notes == (
        "folder: 5 training and 2 test pictures of 2 classes, 16x16 to 96x96 pixels, grey, scaled and cropped to "
        "224x224, read from their files in every epoch",
    )


@pytest.mark.parametrize(("small", "is_large"), [(1, True), (2, False)])
def test_pictures_are_large_if_more_than_half_are(
    small: int, is_large: bool, tmp_path: Path, load: Load
) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n, 120))
    for number in range(small):
        save(root / "train" / "ant" / f"ant{number}.png", grey(0, 16))
    if is_large:
        assert isinstance(load(root).train, FilePictures)
    else:
        with pytest.raises(DataError, match="16x16"):
            load(root)


@pytest.mark.parametrize("side", [16, 80], ids=["small", "large"])
def test_grey_pictures_are_called_grey(side: int, tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n, side))
    save(root / "train" / "ant" / "ant0.png", shape_in_alpha("LA", side))
    assert ", grey, " in load(root).notes[0]
    assert ", colour, " in load(root, background=(200, 0, 0)).notes[0]
    save(root / "train" / "ant" / "ant0.png", upright(side)[:side])
    assert ", colour, " in load(root).notes[0]


def test_every_data_set_is_described_in_one_line() -> None:
    start = "digits: 1,438 training and 359 test pictures of 10 classes, 8x8 pixels, grey"
    assert load_dataset("digits").notes == (f"{start}, kept in memory",)
    assert load_dataset("digits", image_size=32).notes == (f"{start}, scaled to 32x32, kept in memory",)
    assert load_dataset("digits", image_size=8).notes == (f"{start}, kept in memory",)


# ---------- names


def test_a_class_whose_name_is_not_utf8_is_refused(tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n))
    os.rename(os.fsencode(root / "train" / "bee"), os.fsencode(root / "train") + b"/caf\xe9")
    with pytest.raises(DataError) as caught:
        load(root)
    assert str(caught.value) == (
        f"data.root: the name of {root}/train/caf\\udce9 is not UTF-8; rename the folder"
    )
    odd = Path(os.fsdecode(os.fsencode(root) + b"\xe9"))
    root.rename(odd)
    with pytest.raises(DataError, match=r"the name of .*pictures\\udce9 is not UTF-8"):
        load(odd)


def test_pictures_may_have_names_that_are_not_utf8(tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(40 * n, 80))
    odd = root / "train" / "ant" / os.fsdecode(b"ant\xe9.png")
    (root / "train" / "ant" / "ant0.png").rename(odd)
    assert pictures_of(load(root), [1])[0, 0, 0, 0] == 0
    odd.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"ant\\udce9\.png is not a readable picture") as caught:
        load(root)
    str(caught.value).encode()


@pytest.mark.parametrize("split", ["train", "test"])
def test_names_that_only_look_alike_are_told_by_their_code_points(
    split: str, tmp_path: Path, load: Load
) -> None:
    root = write_folder(tmp_path / "pictures", lambda n: grey(n))
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    (root / "train" / "ant").rename(root / "train" / composed)
    (root / "test" / "ant").rename(root / "test" / composed)
    (root / split / "bee").rename(root / split / decomposed)
    with pytest.raises(DataError, match="names of one class with different code points") as caught:
        load(root)
    assert "U+00E9" in str(caught.value)
    assert "U+0065 U+0301" in str(caught.value)


@pytest.mark.parametrize("name", ["123", "2024-01-01", "@eaDir", "[x]", "a b #1", "null"])
def test_any_other_name_is_that_of_a_class(name: str, tmp_path: Path, load: Load) -> None:
    root = write_folder(tmp_path / name, lambda n: grey(n))
    for split in ("train", "test"):
        (root / split / "ant").rename(root / split / name)
    assert set(load(root).class_names) == {name, "bee"}


def test_a_folder_inside_a_folder_of_an_archive_is_named(tmp_path: Path, load: Load) -> None:
    write_folder(tmp_path / "pictures" / "pictures", lambda n: grey(n))
    with pytest.raises(
        DataError, match=rf"train is missing; set data\.root to {tmp_path}/pictures/pictures$"
    ):
        load(tmp_path / "pictures")
    inner = tmp_path / "pictures" / "pictures"
    (inner / "train").rename(inner / "kept")
    (inner / "train").mkdir()
    (inner / "kept").rename(inner / "train" / "train")
    with pytest.raises(
        DataError,
        match=r"has only one class, train; move the folders in .*train/train one level up$",
    ):
        load(inner)


# ---------- class folders without splits


def class_folders(root: Path, counts: dict[str, int]) -> Path:
    """Grey pictures of some classes, each with a value of its own."""
    root.mkdir()
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            save(root / name / f"{i:02}.png", grey(50 * number + i))
    return root


def test_a_fraction_of_each_class_is_the_test_split(tmp_path: Path, load: Load) -> None:
    root = class_folders(tmp_path / "pictures", {"ant": 20, "bee": 10, "cat": 5})
    dataset = load(root, test_fraction=0.2)
    assert dataset.class_names == ("ant", "bee", "cat")
    assert torch.bincount(dataset.test.labels).tolist() == [4, 2, 1]
    assert torch.bincount(dataset.train.labels).tolist() == [16, 8, 4]
    assert dataset.train.labels.tolist() == sorted(dataset.train.labels.tolist())
    for split in ("train", "test"):
        values, labels = images(dataset, split)[:, 0, 0, 0], getattr(dataset, split).labels
        assert torch.equal(values // 50, labels.to(values.dtype)), split
    both = torch.cat([images(dataset, "train"), images(dataset, "test")])
    assert len(both.flatten(1).unique(dim=0)) == 35, "no picture is in both splits"
    again = load(root, test_fraction=0.2)
    assert (again.digest, again.train_digest) == (dataset.digest, dataset.train_digest)
    assert load(root, test_fraction=0.4).train_digest != dataset.train_digest
    large = load(root, test_fraction=0.2, image_size=96)
    assert isinstance(large.test, FilePictures)
    assert torch.equal(large.test.labels, dataset.test.labels)


@pytest.mark.parametrize(
    ("counts", "fraction", "says"),
    [
        (
            {"ant": 9, "bee": 1},
            0.9,
            r"bee contains 1 picture, of which none would be left for training; add some",
        ),
        ({"ant": 2, "bee": 2}, 0.1, r"data\.test_fraction: 0\.1 of 4 pictures is no test picture; raise it"),
        (
            {"ant": 2},
            0.2,
            r"pictures has only one class, ant; two or more are needed, each in its own folder",
        ),
        (
            {"ant": 2},
            0.0,
            r"pictures has only one class, ant; two or more are needed, each in its own folder",
        ),
        *(
            case
            for fraction in (0.0, 0.2)
            for case in (
                (
                    {},
                    fraction,
                    r"pictures has no pictures; put them into CLASS/\*, one folder for each class",
                ),
                ({"ant": 0}, fraction, r"pictures has no pictures; "),
                (
                    {".": 3},
                    fraction,
                    r"pictures has 3 pictures but no class folders; put them into CLASS/\*$",
                ),
            )
        ),
        ({"ant": 0, "bee": 0}, 0.2, r"ant contains no picture; add some"),
        ({"ant": 1, "bee": 0}, 0.2, r"bee contains no picture; add some"),
        (
            {"train": 1, "test": 1},
            0.0,
            r"train has 1 picture but no class folders; put them into train/CLASS/\*$",
        ),
        (
            {"x/ant": 1, "x/bee": 1},
            0.0,
            r"only one folder, x, which has the class folders; set data.root to .*/x$",
        ),
        (
            {"train/ant": 2, "train/bee": 2},
            0.2,
            r"data\.test_fraction: 0\.2 .* which has train/; set it to 0",
        ),
        ({"ant": 2, "bee": 2, "val": 2}, 0.2, r"data\.test_fraction: 0\.2 would divide .* which has val/"),
        (
            {"ant": 2, "bee": 2},
            0.0,
            r"train is missing; put the pictures .*, or let data\.test_fraction choose them",
        ),
    ],
)
def test_a_folder_that_cannot_be_divided_is_refused(
    counts: dict[str, int], fraction: float, says: str, tmp_path: Path, load: Load
) -> None:
    with pytest.raises(DataError, match=says):
        load(class_folders(tmp_path / "pictures", counts), test_fraction=fraction)


def test_other_data_sets_have_a_test_split() -> None:
    with pytest.raises(ConfigError, match=r"data\.test_fraction: 0\.2 has no effect on digits"):
        load_dataset("digits", test_fraction=0.2)
