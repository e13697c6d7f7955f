"""The doctor on real and on broken surroundings."""

from pathlib import Path

import pytest
import torch

from istanas.sparse import mosek_licence
from pipeline import doctor
from pipeline.doctor import check_data, check_disk, check_mosek, check_packages, check_store, run_checks
from pipeline.resources import count, usable_cores


def test_a_healthy_machine(tmp_path: Path) -> None:
    checks = run_checks(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", data_name="digits", data_root=None)
    assert [check.name for check in checks] == ["packages", "gpu", "cores", "mlflow", "mosek", "data", "disk"]
    assert [check for check in checks if check.state == "fail"] == []
    for check in checks:
        assert check.message
        assert "\n" not in check.message + check.remedy
        assert (check.remedy == "") == (check.state == "ok")
    assert list(tmp_path.iterdir()) == []  # looking creates nothing


def test_the_run_to_come_is_what_is_looked_at(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    checks = run_checks(
        tracking_uri=store, data_name="digits", data_root=None, workers=f"1:{usable_cores() + 1}", threads=1
    )
    (cores,) = [check for check in checks if check.name == "cores"]
    assert cores == doctor.check_threads(f"1:{usable_cores() + 1}", 1)
    assert cores.state == "warn"


def test_packages_missing_or_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        "torch>=1",
        "numpy>=999,<1000",
        "no-such-package>=2",
        'colorama; sys_platform == "no-such-system"',
    ]
    monkeypatch.setattr(doctor, "_requirements", lambda: asked)
    check = check_packages()
    assert check.state == "fail"
    assert "no-such-package is missing" in check.message
    assert "numpy 2" in check.message
    assert "torch" not in check.message
    assert check.remedy == "pip install 'numpy<1000,>=999' 'no-such-package>=2'"


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
def test_cores_and_the_threads_of_each_worker(workers: int | str, threads: int | None, says: str) -> None:
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
    # Unless they are set, threads are chosen so that all workers find a core.
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


def test_data(tmp_path: Path) -> None:
    assert "10 classes" in check_data("digits", None).message
    for name, root in [("cifar10", tmp_path), ("folder", tmp_path), ("folder", None), ("cifr10", None)]:
        check = check_data(name, root)
        assert check.state == "fail"
        assert check.remedy
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
    assert check_data("folder", tmp_path).message == f"folder {tmp_path}: 2 classes"
    (tmp_path / "test").rename(tmp_path / "val")
    assert check_data("folder", str(tmp_path)).state == "ok"


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SCARCE_DISK_GB", 1e12)
    assert check_disk(tmp_path).state == "warn"
    monkeypatch.setattr(doctor, "SCARCE_DISK_GB", 0.0)
    assert check_disk(tmp_path).state == "ok"


@pytest.mark.gpu
def test_gpus_are_named() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert torch.cuda.get_device_name(0) in doctor.check_gpus().message
