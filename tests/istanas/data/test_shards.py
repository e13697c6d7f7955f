"""Shards: the same batches as from the folder, packing that can be killed, and shards that cannot be used."""

import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from istanas.data import Augmentation, Batch, FilePictures, ImageDataset, batches, load_dataset, shard_files
from istanas.data.packing import PARTS, Packed, PackSettings, pack_folder
from istanas.data.shard_files import FolderShards
from istanas.data.shard_index import INDEX_FILE, read_index
from istanas.data.shard_scan import damaged_shards, index_shards
from istanas.errors import ConfigError, DataError
from tests.waiting import wait_until

SMALL = PackSettings(shard_size=64_000)
TURNED = 6  # EXIF's orientation of a picture whose top is on the right


def textured(number: int, width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(number).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def write_pictures(root: Path, classes: int = 3, train: int = 8, test: int = 3) -> Path:
    """Write JPEG files of about 10 kB and of mixed sizes."""
    number = 0
    for split, n in (("train", train), ("test", test)):
        for label in range(classes):
            folder = root / split / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(n):
                picture = textured(number, 90 + 7 * (number % 5), 80 + 9 * (number % 4))
                picture.save(folder / f"{i}.v{label}.jpg", quality=99)
                number += 1
    return root


def packed_into(root: Path, out: Path, settings: PackSettings = SMALL, **options: object) -> Packed:
    arguments: dict[str, object] = {"cache_dir": out.parent / "cache", "processes": 1, **options}
    return pack_folder(root, out, settings, **arguments)  # type: ignore[arg-type]


def load(root: Path | str, name: str = "webdataset", size: int | None = 66) -> ImageDataset:
    cache = Path(root).parent / "cache"
    return load_dataset(name, root=root, image_size=size, cache_dir=cache)


def bytes_of(out: Path) -> dict[str, bytes]:
    return {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()}


def epoch_of(dataset: ImageDataset, **options: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images, labels) for images, labels, _ in loader_of(dataset, **options)]


def loader_of(dataset: ImageDataset, **options: object) -> Iterable[Batch]:
    """Return the training batches of an epoch."""
    settings: dict[str, object] = {
        "batch_size": 8,
        "augmentation": Augmentation(horizontal_flip=True),
        "device": torch.device("cpu"),
        "seed": 3,
        "epoch": 2,
        "shuffle": True,
        **options,
    }
    return batches(dataset, "train", None, **settings)  # type: ignore[arg-type]


def assert_equal(one: list[tuple[torch.Tensor, ...]], other: list[tuple[torch.Tensor, ...]]) -> None:
    for batch, same in zip(one, other, strict=True):
        assert all(map(torch.equal, batch, same))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "pictures")


@pytest.fixture(scope="module")
def packed(folder: Path) -> Path:
    out = folder.parent / "shards"
    assert packed_into(folder, out).shards == 6
    return out


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A copy of the shards that a test may damage."""
    return Path(shutil.copytree(packed, tmp_path / "shards"))


# ---------- batches
def test_shards_give_the_data_set_of_their_folder(folder: Path, packed: Path) -> None:
    files, shards = load(folder, "folder"), load(packed)
    assert shards.digest == files.digest
    assert shards.train_digest == files.train_digest
    assert shards.class_names == files.class_names
    assert shards.preprocessing == files.preprocessing
    assert load(packed, "shards").digest == files.digest
    assert shards.notes[0].startswith("webdataset: 24 training and 9 test pictures of 3 classes, 90x80 to ")
    assert shards.notes[0].endswith("read from 6 shards in every epoch")


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (5, 0)])
def test_shards_give_the_batches_of_their_folder(
    folder: Path, packed: Path, world_size: int, workers: int
) -> None:
    """The five ranks do not divide the four training shards."""
    files, shards = load(folder, "folder"), load(packed)
    labels = []
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "workers": workers}
        found = epoch_of(shards, **options)
        assert_equal(found, epoch_of(files, **options))
        labels += [label for _, part in found for label in part.tolist()]
    assert sorted(labels) == sorted(files.train.labels.tolist())


def test_small_pictures_in_shards_are_kept_in_memory(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in range(2):
            (tmp_path / "pictures" / split / str(label)).mkdir(parents=True)
            for n in range(4):
                textured(10 * label + n, 12, 12).save(tmp_path / "pictures" / split / str(label) / f"{n}.png")
    packed_into(tmp_path / "pictures", tmp_path / "shards")
    files, shards = load(tmp_path / "pictures", "folder", None), load(tmp_path / "shards", size=None)
    assert torch.equal(files.train.images, shards.train.images)  # type: ignore[union-attr]
    assert shards.digest == files.digest


def test_each_shard_is_opened_once(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original = os.open

    def count(path: object, *arguments: object, **options: object) -> int:
        opened.append(os.fspath(path))  # type: ignore[arg-type]
        return original(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(shard_files.os, "open", count)
    dataset = load(packed)
    for epoch in range(3):
        epoch_of(dataset, epoch=epoch)
    assert sorted(path for path in opened if path.endswith(".tar")) == sorted(
        map(str, packed.glob("*/*.tar"))
    )


def test_more_shards_than_open_files_are_read_too(
    folder: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_files, "_most_open_files", lambda: 2)
    before = len(os.listdir("/proc/self/fd"))
    dataset = load(packed)
    assert_equal(epoch_of(dataset), epoch_of(load(folder, "folder")))
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    del dataset
    assert len(os.listdir("/proc/self/fd")) <= before


# ---------- packing
def test_shards_have_the_layout_of_webdataset(folder: Path, packed: Path) -> None:
    with tarfile.open(packed / "train" / "shard-000001.tar") as tar:
        members = tar.getmembers()
        stem = members[0].name.partition(".")[0]
        assert [member.name for member in members[:3]] == [f"{stem}.{end}" for end in ("jpg", "cls", "json")]
        assert {(member.mtime, member.uid, member.gname) for member in members} == {(0, 0, "")}
        picture, label, said = (tar.extractfile(member).read() for member in members[:3])  # type: ignore[union-attr]
    facts = json.loads(said)
    assert facts["label"] == int(label) == int(facts["class"][-1])
    assert picture == (folder / "train" / facts["class"] / facts["file"]).read_bytes()
    assert (
        len({int(json.loads(text)["label"]) for text in said_in(packed / "train" / "shard-000001.tar")}) > 1
    )


def said_in(shard: Path) -> list[bytes]:
    with tarfile.open(shard) as tar:
        return [
            tar.extractfile(member).read()  # type: ignore[union-attr]
            for member in tar
            if member.name.endswith(".json")
        ]


def test_the_bytes_do_not_depend_on_processes_or_a_kill(folder: Path, packed: Path, tmp_path: Path) -> None:
    packed_into(folder, tmp_path / "two", processes=2)
    assert bytes_of(tmp_path / "two") == bytes_of(packed)

    def kill(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        packed_into(folder, out, progress=kill)
    assert not (out / INDEX_FILE).exists()
    (out / "train" / ".shard-000003.tar.1.tmp").write_bytes(
        b"half"
    )  # as a process killed by SIGKILL leaves it
    before = {path: path.stat().st_ino for path in out.glob("*/*.tar")}
    lost = min(before)
    (out / PARTS / lost.relative_to(out)).with_suffix(
        ".parquet"
    ).unlink()  # killed between the shard and its rows
    del before[lost]
    again = packed_into(folder, out)
    assert again.written == 6 - len(before)
    assert 0 < len(before) < 6
    assert all(path.stat().st_ino == number for path, number in before.items())
    assert bytes_of(out) == bytes_of(packed)
    assert packed_into(folder, out).written == 0
    assert not (out / PARTS).exists()


def test_a_kill_of_the_parent_ends_its_processes_and_frees_the_folder(
    folder: Path, packed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    arguments = (folder, out), {"processes": 2, "progress": wait_for_a_kill}
    parent = multiprocessing.get_context("fork").Process(
        target=packed_into, args=arguments[0], kwargs=arguments[1]
    )
    parent.start()
    wait_until(lambda: any(out.glob("train/*.tar")), 60, "the first shard", alive=parent.is_alive)
    assert parent.pid is not None
    pool = psutil.Process(parent.pid).children()
    assert len(pool) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    assert psutil.wait_procs(pool, timeout=20)[1] == [], "processes outlive the command"
    assert packed_into(folder, out, processes=2).written < 6
    assert bytes_of(out) == bytes_of(packed)


def wait_for_a_kill(done: int, total: int) -> None:
    if done > 0:
        signal.pause()


def test_another_packing_is_not_mixed_in(folder: Path, copy: Path) -> None:
    before = bytes_of(copy)
    with pytest.raises(
        ConfigError, match=r"--out: .* contains shards of other pictures or settings; name another"
    ):
        packed_into(folder, copy, PackSettings(shard_size=64_000, resize=70))
    with pytest.raises(ConfigError, match="lies in the folder that is packed"):
        packed_into(folder, folder / "shards")
    assert bytes_of(copy).items() >= before.items()


def test_pictures_are_reduced_and_stay_upright(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "pictures", train=1, test=1)
    where = root / "train" / "class 0"
    exif = Image.Exif()
    exif[0x0112] = TURNED
    textured(1, 200, 120).save(where / "turned.jpg", exif=exif, quality=95)
    textured(2, 200, 120).convert("L").save(where / "grey.png")
    clear = Image.new("RGBA", (200, 120), (255, 0, 0, 0))
    clear.save(where / "clear.png")
    textured(4, 90, 60).save(where / "small.jpg")
    found = packed_into(root, tmp_path / "shards", PackSettings(resize=64))
    assert "1 pictures with transparency, several frames or more than 8 bits" in found.notes[-1]
    dataset = load(tmp_path / "shards")
    assert isinstance(dataset.train, FilePictures)
    assert dataset.train.members is not None
    contents = zip(dataset.train.paths, dataset.train.members, strict=True)
    shown = {name.rpartition("/")[2]: content for name, content in contents}
    pictures = {name: Image.open(io.BytesIO(content)) for name, content in shown.items()}
    assert pictures["turned.jpg"].size == (64, 107)
    upright = (
        textured(1, 200, 120)
        .transpose(Image.Transpose.ROTATE_270)
        .resize((64, 107), Image.Resampling.LANCZOS)
    )
    difference = np.asarray(pictures["turned.jpg"], float) - np.asarray(upright, float)
    assert np.abs(difference).mean() < 3
    assert (pictures["grey.png"].size, pictures["grey.png"].mode) == ((107, 64), "L")
    assert shown["clear.png"] == (where / "clear.png").read_bytes()
    assert shown["small.jpg"] == (where / "small.jpg").read_bytes()


def test_files_that_would_be_left_out_stop_the_packing(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "pictures", train=2, test=1)
    (root / "train" / "class 0" / "1.heic").write_bytes(b"heic")
    with pytest.raises(DataError, match=r"1 of 3 files .* would be left out"):
        packed_into(root, tmp_path / "shards")
    found = packed_into(root, tmp_path / "shards", allow_left_out=True)
    assert found.notes == (f"left out: 1 file with the suffix .heic, such as {root}/train/class 0/1.heic",)
    (root / "train" / "class 0" / "2.jpg").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"2\.jpg is not a readable picture"):
        packed_into(root, tmp_path / "others", allow_left_out=True)


# ---------- the index
def test_an_index_from_the_shards_alone_is_the_same(packed: Path, copy: Path) -> None:
    (copy / INDEX_FILE).unlink()
    with pytest.raises(
        DataError, match=r"has no index\.parquet; complete it with istanas pack, or write one"
    ):
        load(copy)
    index_shards(copy, processes=1)
    assert load(copy).digest == load(packed).digest
    one, other = (pq.read_table(root / INDEX_FILE) for root in (packed, copy))
    assert one.equals(other)


def test_shards_of_other_programs_are_indexed(tmp_path: Path) -> None:
    """Labels may be numbers or names, in .cls or .json; names of classes may be missing."""
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    write_tar(tmp_path / "train" / "a-00.tar", [("n/1.jpg", jpeg()), ("n/1.cls", b"10\n")])
    write_tar(tmp_path / "train" / "a-01.tar", [("2.png", jpeg()), ("2.json", b'{"label": 9, "extra": [1]}')])
    write_tar(tmp_path / "val" / "b.tar", [("3.jpg", jpeg()), ("3.txt", b"a caption"), ("3.cls", b"9")])
    index_shards(tmp_path, processes=1)
    dataset = load(tmp_path)
    assert dataset.class_names == ("9", "10")
    assert dataset.train.labels.tolist() == [0, 1]
    assert dataset.test.paths[0] == f"{tmp_path}/val/b.tar/9/3.jpg"  # type: ignore[union-attr]


def test_classes_with_numbers_as_names_keep_the_order_of_their_folder(tmp_path: Path) -> None:
    """A folder sorts "10" before "2"."""
    for split in ("train", "test"):
        for label in range(11):
            (tmp_path / "pictures" / split / str(label)).mkdir(parents=True)
            textured(label, 12, 12).save(tmp_path / "pictures" / split / str(label) / "a.png")
    out = tmp_path / "shards"
    packed_into(tmp_path / "pictures", out)
    files, shards = load(tmp_path / "pictures", "folder", None), load(out, size=None)
    assert shards.class_names == files.class_names == ("0", "1", "10", *map(str, range(2, 10)))
    assert shards.digest == files.digest
    before = pq.read_table(out / INDEX_FILE)
    index_shards(out, processes=1)
    assert pq.read_table(out / INDEX_FILE).equals(before)


def test_a_number_gets_its_name_from_any_sample(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    write_tar(
        tmp_path / "train" / "a.tar",
        [("1.jpg", jpeg()), ("1.cls", b"3"), ("2.jpg", jpeg()), ("2.json", b'{"label": 1, "class": "dog"}')],
    )
    write_tar(tmp_path / "test" / "b.tar", [("3.jpg", jpeg()), ("3.json", b'{"label": 3, "class": "cat"}')])
    index_shards(tmp_path, processes=1)
    dataset = load(tmp_path)
    assert dataset.class_names == ("cat", "dog"), "the order of the names, as in a folder, not of the numbers"
    assert [Path(name).parts[-2:] for name in dataset.train.paths] == [("cat", "1.jpg"), ("dog", "2.jpg")]  # type: ignore[union-attr]


def test_two_test_splits_are_not_indexed(tmp_path: Path) -> None:
    for split in ("train", "test", "val"):
        (tmp_path / split).mkdir()
        write_tar(tmp_path / split / "a.tar", GOOD)
    with pytest.raises(
        DataError, match=r"^--index: .* has test/ and val/, of which one is read; move the other one out"
    ):
        index_shards(tmp_path, processes=1)
    assert not (tmp_path / INDEX_FILE).exists()


def jpeg(number: int = 0) -> bytes:
    stream = io.BytesIO()
    textured(number, 80, 70).save(stream, "JPEG")
    return stream.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], links: dict[str, str] | None = None) -> None:
    with tarfile.open(path, "w") as tar:
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def named(*said: str) -> list[tuple[str, bytes]]:
    """Return samples with these JSON labels."""
    return [
        member
        for place, text in enumerate(said)
        for member in ((f"n{place}.jpg", jpeg()), (f"n{place}.json", text.encode()))
    ]


GOOD = [("0.jpg", jpeg()), ("0.cls", b"1")]
BAD_SHARDS: dict[str, tuple[list[tuple[str, bytes]], dict[str, str], str]] = {
    "leads out": ([*GOOD, ("../1.jpg", jpeg()), ("../1.cls", b"1")], {}, "its member ../1.jpg leads out"),
    "absolute": ([("/1.jpg", jpeg()), ("/1.cls", b"1")], {}, "its member /1.jpg leads out of the archive"),
    "link": (GOOD, {"1.jpg": "/etc/passwd"}, "its member 1.jpg is a link"),
    "no label": ([*GOOD, ("1.jpg", jpeg())], {}, "the sample 1 has no label; add a member .cls"),
    "two labels": ([("1.jpg", jpeg()), ("1.cls", b"1"), ("1.cls", b"2")], {}, "the sample 1 has two labels"),
    "labels differ": (
        [("1.jpg", jpeg()), ("1.cls", b"1"), ("1.json", b'{"label": 2}')],
        {},
        "the sample 1 has two labels, 1 and 2",
    ),
    "no picture": ([*GOOD, ("1.cls", b"1")], {}, "the sample 1 has no picture"),
    "two pictures": ([("1.jpg", jpeg()), ("1.png", jpeg()), ("1.cls", b"1")], {}, "has two pictures"),
    "broken picture": ([("1.jpg", jpeg()[:300]), ("1.cls", b"1")], {}, "1.jpg is not a readable picture"),
    "twice": ([*GOOD, ("1.jpg", jpeg()), ("1.cls", b"1"), *GOOD], {}, "the sample 0 occurs twice"),
    "broken label": ([("1.jpg", jpeg()), ("1.json", b"{")], {}, "the label of the sample 1 cannot be read"),
    "no sample": ([], {}, "it contains no sample; delete it"),
    "two names": (
        named('{"label": 3, "class": "cat"}', '{"label": 3, "class": "dog"}'),
        {},
        "the label 3 stands for the classes cat and dog",
    ),
    "two numbers": (
        named('{"label": 3, "class": "cat"}', '{"label": 4, "class": "cat"}'),
        {},
        "the class cat has the labels 3 and 4",
    ),
    "digits": ([("1.jpg", jpeg()), ("1.cls", b"1" * 5000)], {}, "cannot be read (a number of 5,000 digits)"),
    "no text": (named(r'{"class": "\ud800"}'), {}, "the label of the sample n0 cannot be read ("),
    "name": ([("\udce9.jpg", jpeg())], {}, r"the name of its member \udce9.jpg is not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_a_shard_that_cannot_be_used_is_named(case: str, tmp_path: Path) -> None:
    members, links, message = BAD_SHARDS[case]
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write_tar(tmp_path / split / "good.tar", GOOD)
    write_tar(tmp_path / "train" / "odd.tar", members, links)
    with pytest.raises(DataError) as caught:
        index_shards(tmp_path, processes=1)
    text = str(caught.value)
    assert text.startswith(f"--index: {tmp_path}/train/odd.tar")
    assert message in text
    assert "\n" not in text
    assert not (tmp_path / INDEX_FILE).exists()


def test_an_archive_behind_the_first_is_noticed(copy: Path) -> None:
    path = copy / "train" / "shard-000000.tar"
    with open(path, "ab") as file:
        file.write(bytes(1 << 20))
        file.write((copy / "train" / "shard-000001.tar").read_bytes())
    with pytest.raises(DataError, match=r"shard-000000\.tar: data follow the end of the archive; write each"):
        index_shards(copy, processes=1)


@pytest.mark.parametrize("cut", [100, 1500, 9_000, "member"])
def test_a_truncated_shard_is_not_indexed(cut: int | str, copy: Path) -> None:
    path = copy / "train" / "shard-000000.tar"
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-3].offset  # the last sample is missing as a whole
    os.truncate(path, end if cut == "member" else int(cut))
    (copy / INDEX_FILE).unlink()
    with pytest.raises(DataError, match=r"shard-000000\.tar: it is truncated or damaged .*; copy it again$"):
        index_shards(copy, processes=1)


def truncate(root: Path) -> None:
    os.truncate(root / "train" / "shard-000001.tar", 9_000)


def remove(root: Path) -> None:
    (root / "train" / "shard-000001.tar").unlink()


def add(root: Path) -> None:
    shutil.copy(root / "train" / "shard-000001.tar", root / "train" / "shard-000009.tar")


def exchange(root: Path) -> None:
    path = root / "train" / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[::-1])


def link(root: Path) -> None:
    path = root / "train" / "shard-000001.tar"
    outside = root.parent / "outside.tar"
    path.rename(outside)
    path.symlink_to(outside)


def damage_index(root: Path) -> None:
    content = bytearray((root / INDEX_FILE).read_bytes())
    content[len(content) // 3] ^= 255
    (root / INDEX_FILE).write_bytes(content)


def empty_index(root: Path) -> None:
    (root / INDEX_FILE).write_bytes(b"")


def edited(field: str, value: int) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        table = pq.read_table(root / INDEX_FILE)
        column = table[field].to_numpy().copy()
        column[1] = value
        place = table.schema.get_field_index(field)
        table = table.set_column(place, table.schema.field(field), [column])
        pq.write_table(table, root / INDEX_FILE)

    return edit


def described(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return a function that changes the description in an index."""

    def edit(root: Path) -> None:
        table = pq.read_table(root / INDEX_FILE)
        meta = json.loads(table.schema.metadata[b"istanas"])
        change(meta)
        pq.write_table(
            table.replace_schema_metadata({b"istanas": json.dumps(meta).encode()}), root / INDEX_FILE
        )

    return edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            truncate,
            r"train/shard-000001\.tar is truncated: it has 9,000 bytes, and its index says \d\d,\d\d\d",
        ),
        (remove, r"train/shard-000001\.tar is missing; restore it, or run the istanas pack command"),
        (add, r"train/shard-000009\.tar is not in the index; run the istanas pack command"),
        (exchange, r"train/shard-000001\.tar has changed since its index was written"),
        (link, r"train/shard-000001\.tar is a link that leads out of the folder"),
        (damage_index, r"index\.parquet is not an index of shards \("),
        (empty_index, r"index\.parquet is not an index of shards \("),
        (edited("offset", 1 << 40), "has 1 pictures outside of their shards"),
        (edited("label", 7), "has labels above its 3 classes"),
        (edited("shard", -1), "has pictures of more than its 6 shards"),
        (described(lambda meta: meta.update(classes=["cat"])), "has 1 class, at least two are needed"),
        (described(lambda meta: meta["shards"][0].update(size="9")), r"\(a shard has no size\)"),
        (described(lambda meta: meta["shards"][0].update(name=[])), r"\(a shard has no name or digest\)"),
        (
            described(lambda meta: [each.update(size=512) for each in meta["shards"]]),
            "do not fit into its shards",
        ),
        (described(lambda meta: meta.pop("plan")), "is not an index of shards"),
    ],
    ids=[
        *("truncated", "missing", "added", "changed", "link", "damaged", "empty", "offset", "label", "shard"),
        *("one class", "size", "name", "rows", "plan"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    change: Callable[[Path], None], message: str, copy: Path
) -> None:
    change(copy)
    with pytest.raises(DataError, match=message) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_a_changed_sample_is_noticed_when_it_is_read(copy: Path) -> None:
    """The size and the excerpt of the shard are unchanged. The checksum includes names and labels."""
    with open(copy / "train" / "shard-000000.tar", "r+b") as file:
        file.seek(20_000)
        (byte,) = file.read(1)
        file.seek(20_000)
        file.write(bytes([byte ^ 1]))
    dataset = load(copy)
    with pytest.raises(
        DataError, match=r"shard-000000\.tar has changed since its index was written: the picture"
    ):
        epoch_of(dataset)
    shards = read_index(FolderShards(str(copy))).shards
    assert damaged_shards(copy, shards, processes=1) == ["train/shard-000000.tar"]


def test_a_shard_truncated_in_mid_epoch_ends_it_with_a_line(copy: Path) -> None:
    dataset = load(copy)
    loader = loader_of(dataset, batch_size=4, augmentation=None)
    passing = iter(loader)
    first = next(passing)
    whole = {path: path.read_bytes() for path in copy.glob("train/*.tar")}
    for path in whole:
        os.truncate(path, 5_000)
    with pytest.raises(
        DataError, match=r"shard-00000\d\.tar is truncated: the picture .* differs; restore the shard"
    ):
        list(passing)
    for path, content in whole.items():
        path.write_bytes(content)
    again = list(loader)
    assert torch.equal(again[0].images, first.images)
    assert len(again) == 6


@pytest.mark.parametrize("size", [32, 66], ids=["in memory", "in files"])
def test_pictures_are_named_relative_to_the_root(
    size: int, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, shards = load(packed.parent / "pictures", "folder", size), load(packed, size=size)
    assert pictures.test.name(4) == "test/class 1/1.v1.jpg"
    assert pictures.train.name(0) == "train/class 0/0.v0.jpg"
    assert re.fullmatch(r"test/shard-\d{6}\.tar/class 1/1\.v1\.jpg", str(shards.test.name(4)))
    monkeypatch.chdir(packed.parent)
    assert load(Path("pictures"), "folder", size).test.name(4) == pictures.test.name(4)
    assert load(Path(packed.name), size=size).test.name(4) == shards.test.name(4)


def test_pictures_that_are_no_files_have_no_names() -> None:
    assert load_dataset("digits").test.name(0) is None
