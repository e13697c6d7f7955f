"""`istanas pack`: what it prints, its result for programs, and its refusals."""

import os
import shutil
from pathlib import Path

import pytest

from istanas.data import load_dataset
from tests.in_process import istanas
from tests.istanas.data.test_shards import write_pictures

PACK = ("pack", "pictures", "--out", "shards", "--shard-size", "64kB", "--processes", "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pack")
    write_pictures(place / "pictures", classes=2, train=5, test=2)
    for name, file in (("odd", "a.heic"), ("coded", "caf\udce9.jpg")):
        write_pictures(place / name, classes=2, train=1, test=1)
        shutil.copy(
            place / name / "train" / "class 0" / "0.v0.jpg", place / name / "train" / "class 0" / file
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        yield place


def test_a_folder_is_packed_checked_and_used(place: Path) -> None:
    done = istanas(place, [*PACK, "--json"])
    assert done.result == {
        "out": "shards",
        "shards": 3,
        "written": 3,
        "bytes": sum(path.stat().st_size for path in place.glob("shards/*/*.tar")),
        "pictures": 14,
        "training_pictures": 10,
        "classes": 2,
    }
    again = istanas(place, PACK).stdout.splitlines()
    assert again[-2].startswith("shards: 3 shards, 0.")
    assert again[-2].endswith(" with 10 training and 4 test pictures of 2 classes, complete already")
    assert again[-1] == "use them with --set data.name=webdataset --set data.root=shards"
    checked = istanas(place, ["pack", "--check", "shards", "--processes", "1"]).stdout.splitlines()
    assert checked[-1] == "shards: 3 shards with 10 training and 4 test pictures of 2 classes, intact"
    indexed = istanas(place, ["pack", "--index", "shards", "--json", "--processes", "1"])
    assert indexed.result["pictures"] == 14
    data = ["--set", "data.name=webdataset", "--set", "data.root=shards"]
    doctor = istanas(place, ["doctor", *data, "--set", "tracking.enabled=false", "--json"])
    (check,) = [check for check in doctor.result["checks"] if check["name"] == "data"]
    assert check["state"] == "ok"
    assert check["message"].startswith("webdataset: 10 training and 4 test pictures of 2 classes, 90x80 to ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "DIR, --index or --check: none is given, give one of them"),
        (["pictures"], "--out: it belongs to the picture folder DIR, name a folder for the shards"),
        (["--check", "shards", "--out", "x"], "--out: it belongs to the picture folder DIR, leave it out"),
        (["pictures", "--out", "s3://bucket/x"], "--out: an address; pack into a folder, and copy it"),
        (["--check", "s3://bucket/x"], "--check: an address; pack into a folder, and copy it"),
        (["pictures", "--index", "shards", "--out", "x"], "DIR and --index are given, give one of them"),
        (
            ["pictures", "--out", "x", "--quality", "80"],
            "--quality: it has an effect on reduced pictures only; add",
        ),
        (
            ["pictures", "--out", "x", "--shard-size", "1kB"],
            "--shard-size: '1kB' is not a size of 64kB or more",
        ),
        (
            ["pictures", "--out", "pictures/x"],
            "--out: pictures/x lies in the folder that is packed; name another",
        ),
        (
            ["missing", "--out", "x"],
            "DIR: no such folder: missing; name a folder with train/CLASS/* and test/CLASS/*",
        ),
        (
            ["pictures/train", "--out", "x"],
            "test/CLASS/*, or let --test-fraction choose them from CLASS/*",
        ),
        (
            ["pictures", "--out", "x", "--test-fraction", "0.2"],
            "--test-fraction: 0.2 would divide the class folders of pictures, which has test/; set it to 0 to use the "
            "splits of the folder, or name one of them",
        ),
        (["odd", "--out", "x"], "or ignore them with --allow-left-out"),
        (
            ["coded", "--out", "x"],
            r"DIR: the name of coded/train/class 0/caf\udce9.jpg is not UTF-8; rename the file",
        ),
    ],
)
def test_wrong_arguments_are_one_line(place: Path, arguments: list[str], message: str) -> None:
    code = 1 if message.startswith(("DIR: the name", "or ignore")) else 2
    done = istanas(place, ["pack", *arguments], code=code)
    assert message in done.stderr
    assert not (place / "x").exists()


def test_a_folder_without_splits_is_packed(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "pictures" / "train", tmp_path / "photos")
    arguments = ["pack", "photos", "--out", "shards", "--test-fraction", "0.4", "--processes", "1", "--json"]
    done = istanas(tmp_path, arguments)
    assert (done.result["pictures"], done.result["training_pictures"]) == (10, 6)
    options = {"image_size": 66, "cache_dir": tmp_path / "cache"}
    shards = load_dataset("webdataset", root=tmp_path / "shards", **options)  # type: ignore[arg-type]
    files = load_dataset("folder", root=tmp_path / "photos", test_fraction=0.4, **options)  # type: ignore[arg-type]
    assert shards.digest == files.digest


def test_a_damaged_shard_is_named_by_the_check(place: Path, tmp_path: Path) -> None:
    istanas(place, ["pack", "pictures", "--out", str(tmp_path / "shards"), "--processes", "1"])
    path = tmp_path / "shards" / "train" / "shard-000000.tar"
    with open(path, "r+b") as file:
        file.seek(20_000)
        file.write(os.urandom(16))
    done = istanas(tmp_path, ["pack", "--check", "shards", "--processes", "1"], code=1)
    assert done.stderr.splitlines()[-1].startswith(
        "error: --check: shards/train/shard-000000.tar differs from its checksum in index.parquet; copy it again"
    )
