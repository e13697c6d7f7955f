"""The doctor on a working and on a broken environment."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from istanas.errors import IstanasError
from istanas.sparse import mosek_licence
from pipeline.base.text import count
from pipeline.cli import doctor
from pipeline.cli.doctor import (
    Check,
    check_data,
    check_disk,
    check_mosek,
    check_packages,
    check_store,
    run_checks,
)
from pipeline.config.load import load
from pipeline.config.schema import DataSettings
from pipeline.config.threads import usable_cores
from pipeline.training.pictures import datasets_used, describe_pictures, load_pictures, open_dataset

DIGITS = DataSettings()


def test_a_healthy_machine(tmp_path: Path) -> None:
    checks = run_checks(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", data=DIGITS)
    assert [check.name for check in checks] == ["packages", "gpu", "cores", "mlflow", "mosek", "data", "disk"]
    assert [check for check in checks if check.state == "fail"] == []
    for check in checks:
        assert check.message
        assert "\n" not in check.message + check.remedy
        assert (check.remedy == "") == (check.state == "ok")
    assert list(tmp_path.iterdir()) == []  # checks create nothing


def test_the_run_to_come_is_what_is_looked_at(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    checks = run_checks(tracking_uri=store, data=DIGITS, workers=f"1:{usable_cores() + 1}", threads=1)
    (cores,) = [check for check in checks if check.name == "cores"]
    assert cores == doctor.check_threads(f"1:{usable_cores() + 1}", 1)
    assert cores.state == "warn"


def test_packages_missing_or_of_another_version() -> None:
    asked = [
        "torch>=1",
        "numpy>=999,<1000",
        "no-such-package>=2",
        'colorama; sys_platform == "no-such-system"',
    ]
    check = check_packages(asked)
    assert check.state == "fail"
    assert "no-such-package is missing" in check.message
    assert "numpy 2" in check.message
    assert "torch" not in check.message
    assert check.remedy == "pip install 'numpy<1000,>=999' 'no-such-package>=2'"


def test_the_installed_extras_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_packages(["numpy>=1"]).message.endswith("1 packages as required; extras: clusters, export")
    monkeypatch.setitem(sys.modules, "onnx", None)  # the import system treats it as not installed
    assert check_packages(["numpy>=1"]).message.endswith("; extras: clusters")


def test_what_pyproject_asks_for_is_known(repo_root: Path) -> None:
    asked = doctor._requirements()
    assert any(text.startswith("mlflow") for text in asked)
    assert not any(text.startswith("pytest") for text in asked)


@pytest.mark.parametrize(
    ("workers", "threads", "says"),
    [
        (0, None, "{cores} usable; in one process, {all_threads} each"),
        (0, 1, "{cores} usable; in one process, 1 thread each"),
        (1, 1, "{cores} usable; 1 worker, 1 thread each"),
        (1, None, "{cores} usable; 1 worker, {all_threads} each"),
        ("1:1", 1, "{cores} usable; 1 worker, 1 thread each"),
    ],
)
def test_cores_and_the_threads_of_each_worker(
    monkeypatch: pytest.MonkeyPatch, workers: int | str, threads: int | None, says: str
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    check = doctor.check_threads(workers, threads)
    cores = usable_cores()
    assert check.message == says.format(cores=count(cores, "core"), all_threads=count(cores, "thread"))
    assert (check.state, check.remedy) == ("ok", "")


def test_more_threads_than_cores_are_warned_of() -> None:
    cores = usable_cores()
    for workers, threads in ((0, cores + 1), (cores + 1, None), (f"1:{cores + 1}", None), (2, cores)):
        check = doctor.check_threads(workers, threads)
        assert check.state == "warn"
        assert check.remedy == f"workers x threads should not exceed {cores}"
    # The default number of threads leaves a core for each worker.
    assert doctor.check_threads(cores, None).state == "ok"


def test_stores(tmp_path: Path) -> None:
    dead = check_store("http://me:secret@127.0.0.1:1")
    assert (dead.state, "Connection refused" in dead.message) == ("fail", True)
    assert "secret" not in dead.message
    (tmp_path / "mlflow.db").write_text("this is no database, and never was one")
    broken = check_store(f"sqlite:///{tmp_path}/mlflow.db")
    assert broken.state == "fail"
    assert "MLFLOW_TRACKING_URI" in broken.remedy
    nowhere = check_store(f"sqlite:///{tmp_path}/no/such/folder/mlflow.db")
    assert nowhere.state == "fail"


def test_mosek() -> None:
    check = check_mosek()
    if mosek_licence() is None:
        assert check.state == "warn"
        assert "mosek.lic" in check.remedy
        assert "homotopy" in check.remedy
    else:
        assert check.state == "ok"


def settings(*overrides: str) -> DataSettings:
    return load(None, [f"data.{override}" for override in overrides]).data


def folder(root: Path, *overrides: str) -> Check:
    return check_data(settings("name=folder", f"root={root}", *overrides))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A valid picture folder of two classes."""
    root = tmp_path / "pictures"
    for split, n in (("train", 3), ("test", 1)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                Image.new("L", (8, 8), i).save(root / split / name / f"{i}.png")
    return root


def test_data(tmp_path: Path, pictures: Path) -> None:
    for chosen in (settings(), settings("image_size=32")):
        assert check_data(chosen).message == "; ".join(load_pictures(chosen).notes)
    absent = check_data(settings("name=cifar10", f"root={tmp_path}", "download=true"))
    assert absent.state == "fail"
    assert "data.download=true" in absent.message + absent.remedy
    cache = tmp_path / "cache"
    good = folder(pictures, f"cache_dir={cache}")
    assert not cache.exists(), "looking changes nothing"
    line = (
        "folder: 6 training and 2 test pictures of 2 classes, 8x8 pixels, grey, as they are, kept in memory"
    )
    assert good == Check("data", "ok", line)
    (pictures / "test").rename(pictures / "val")
    assert folder(pictures) == good


def link(pictures: Path) -> None:
    (pictures / "train" / "cat" / "9.png").symlink_to(pictures.parent / "elsewhere.png")


def nested(pictures: Path) -> None:
    pictures.rename(pictures.with_name("inner"))
    pictures.mkdir()
    pictures.with_name("inner").rename(pictures / "pictures")


def doubly_nested(pictures: Path) -> None:
    for split in ("train", "test"):
        (pictures / split).rename(pictures / "kept")
        (pictures / split).mkdir()
        (pictures / "kept").rename(pictures / split / split)


def other_size(pictures: Path) -> None:
    Image.new("L", (9, 9)).save(pictures / "test" / "dog" / "0.png")


def too_small(pictures: Path) -> None:
    for file in pictures.glob("*/*/*.png"):
        Image.new("L", (7, 7)).save(file)


@pytest.mark.parametrize(
    "damage",
    [
        link,
        nested,
        doubly_nested,
        other_size,
        too_small,
        lambda root: shutil.rmtree(root / "train" / "cat"),
        lambda root: [file.unlink() for file in root.glob("train/cat/*")],
        lambda root: shutil.rmtree(root / "test"),
        lambda root: (root / "test" / "owl").mkdir(),
        lambda root: (root / "train" / "cat" / "more.zip").touch(),
        lambda root: (root / "train" / "cat" / "1.png").write_text("no picture"),
        lambda root: Image.new("F", (8, 8)).save(root / "test" / "cat" / "9.tif"),
        lambda root: Image.new("I;16", (8, 8), 4000).save(root / "test" / "cat" / "9.png"),
        lambda root: (root / "train" / "cat" / "1.png").write_bytes(b""),
        lambda root: os.rename(root / "train" / "cat", os.fsencode(root) + b"/train/caf\xe9"),
        shutil.rmtree,
    ],
)
def test_a_folder_that_a_job_refuses_is_no_good(damage: Callable[[Path], object], pictures: Path) -> None:
    damage(pictures)
    check = folder(pictures)
    assert check.state == "fail"
    assert check.remedy
    config = load(
        None, ["data.name=folder", f"data.root={pictures}", f"data.cache_dir={pictures.parent / 'cache'}"]
    )
    with pytest.raises(IstanasError) as refusal:
        open_dataset(config, ())
    assert str(refusal.value).startswith(check.message)
    assert check.remedy == (refusal.value.remedy or "set data.name and data.root")


def test_what_a_job_would_only_tell_is_a_warning(pictures: Path) -> None:
    (pictures / "test" / "dog" / "0.png").unlink()
    (pictures / "train" / "cat" / "1.heic").touch()
    Image.new("I;16", (8, 8), 4000).save(pictures / "train" / "cat" / "1.png")
    Image.new("LA", (8, 8)).save(pictures / "train" / "cat" / "2.png")
    cache = f"cache_dir={pictures.parent / 'cache'}"
    check = folder(pictures, "allow_left_out=true", cache)
    assert check.state == "warn"
    config = load(
        None, ["data.name=folder", f"data.root={pictures}", "data.allow_left_out=true", f"data.{cache}"]
    )
    dataset = open_dataset(config, ())
    used = datasets_used(config, dataset, "retrain")
    assert check.message == "; ".join(describe_pictures(config, dataset, used, ()))
    for words in (
        "left out: 1 file with the suffix .heic",
        "the upper 8 of the 12 bits",
        "1 picture has transparency",
    ):
        assert words in check.message
    assert check.message.endswith(
        "; the test split has no picture of dog; accuracies on it cover 1 of 2 classes"
    )
    assert check.remedy == (
        "add test pictures of every class; move or convert the files that are left out, if they belong to the data"
    )


def test_a_folder_val_beside_test_is_a_warning(pictures: Path) -> None:
    shutil.copytree(pictures / "test", pictures / "val")
    check = folder(pictures)
    assert check.state == "warn"
    assert "left out: 2 files in val/, which is ignored because test/ exists, such as " in check.message


def test_disk(tmp_path: Path) -> None:
    assert check_disk(tmp_path, enough_gb=1e12).state == "warn"
    assert check_disk(tmp_path, enough_gb=0.0).state == "ok"


@pytest.mark.gpu
def test_gpus_are_named() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert torch.cuda.get_device_name(0) in doctor.check_gpus().message
