"""A moved project folder: its store and the store's files are found in the new place."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from mlflow import MlflowClient

from pipeline.cli.commands import run
from pipeline.config.load import load
from pipeline.runs.directory import RunDir
from pipeline.runs.mlflow_link import read_link
from pipeline.tracking.notices import OF_THIS_PROCESS
from pipeline.tracking.references import load_of_run, resolve_origin
from pipeline.tracking.store import open_client

TINY = """
space: {nodes: 2}
retrain: {epochs: 1, batch_size: 256, init_channels: 2, layers: 2, auxiliary_weight: 0, cutout: 0}
runtime: {threads: 1, device: cpu}
"""


NAMED = ["--set", "tracking.uri=sqlite:///mlflow.db"]


@pytest.fixture(scope="module")
def project(
    tmp_path_factory: pytest.TempPathFactory, blank_database: Path
) -> Callable[[Sequence[str]], Path]:
    """Retrains with some settings in a project `old`, once for all tests, and returns the moved project."""
    done: dict[tuple[str, ...], Path] = {}

    def retrained(settings: Sequence[str]) -> Path:
        if tuple(settings) not in done:
            old = tmp_path_factory.mktemp("project") / "old"
            old.mkdir()
            (old / "tiny.yaml").write_text(TINY)
            shutil.copy(blank_database, old / "mlflow.db")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(old)
                assert run(["retrain", "--genotype", "random:0", "--config", "tiny.yaml", *settings]) == 0
            done[tuple(settings)] = old.rename(old.with_name("moved"))
        return done[tuple(settings)]

    return retrained


@pytest.fixture
def moved(
    project: Callable[[Sequence[str]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> RunDir:
    """A retraining in the project `new`, which ran when the project was `old` in another folder."""
    shutil.copytree(project(getattr(request, "param", [])), tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    (path,) = Path("runs").iterdir()
    return RunDir(path)


def old_project(moved: RunDir) -> Path:
    """Return the project's old folder, from the store in the run's configuration."""
    uri = load(moved.path / "config.yaml").tracking.uri
    assert uri is not None
    return Path(uri.removeprefix("sqlite:///")).parent


@pytest.mark.parametrize("moved", [NAMED], ids=["named"], indirect=True)
def test_export_after_a_move_delivers_to_the_moved_store(moved: RunDir, tmp_path: Path) -> None:
    old = old_project(moved)
    command = [sys.executable, "-m", "pipeline.cli", "export", str(moved.path)]
    assert (
        subprocess.run(command, timeout=300).returncode == 0
    )  # a process of its own, since MLflow caches folders
    assert (old.name, old.exists()) == ("old", False)
    link = read_link(moved)
    assert link is not None
    assert link.tracking_uri == f"sqlite:///{tmp_path}/new/mlflow.db"
    client = open_client(link.tracking_uri)
    (stored,) = client.search_runs(["1"])
    assert stored.info.run_id == link.run_id
    files = Path(urlsplit(stored.info.artifact_uri).path)
    assert files.is_relative_to(tmp_path / "new" / "mlartifacts")
    assert (files / "export" / "model.onnx").is_file()
    assert {f.path for f in client.list_artifacts(link.run_id)} >= {"genotype.json", "report.html", "export"}
    (model,) = client.search_logged_models(["1"])
    assert Path(urlsplit(model.artifact_location).path).is_dir()


@pytest.mark.parametrize("moved", [[]], ids=["default"], indirect=True)
def test_a_missing_store_is_reported(moved: RunDir, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = f"sqlite:///{tmp_path}/elsewhere/mlflow.db"
    file = moved.path / "mlflow.json"
    link = read_link(moved)
    assert link is not None
    assert link.tracking_uri == f"sqlite:///{tmp_path}/new/mlflow.db"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tracking_uri": gone}))
    assert run(["sync", str(moved.path)]) == 1
    assert not (tmp_path / "elsewhere").exists()
    assert f"MLflow store {gone}: its folder does not exist; everything stays in {moved.path}" in caplog.text
    assert run(["sync", str(moved.path), "--set", "tracking.uri=sqlite:///mlflow.db"]) == 0


@pytest.mark.parametrize("best", [False, True], ids=["of the run", "of a sweep's best trial"])
@pytest.mark.parametrize("moved", [NAMED], ids=["named"], indirect=True)
def test_a_runs_own_configuration_is_usable_after_a_move(moved: RunDir, best: bool) -> None:
    """It has the old absolute paths of the store and of the runs' folder."""
    file, old = moved.path / "config.yaml", old_project(moved)
    file.write_text(file.read_text().replace("runs_dir: runs", f"runs_dir: {old}/runs"))
    assert f"{old}/mlflow.db" in file.read_text()
    if best:
        (moved.path / "best").mkdir()
        file = file.rename(moved.path / "best" / file.name)
    assert run(["retrain", "--genotype", "random:1", "--config", str(file)]) == 0
    assert not old.exists()
    assert len(list(Path("runs").iterdir())) == 2
    assert len(open_client("sqlite:///mlflow.db").search_runs(["1"])) == 2


@pytest.mark.parametrize("moved", [NAMED], ids=["named"], indirect=True)
def test_a_genotype_of_a_moved_run_is_retrained_into_the_moved_store(moved: RunDir, tmp_path: Path) -> None:
    """Without --config, the tracking settings are those of the genotype's run."""
    record = dataclasses.replace(moved.read(), kind="search", name="tiny-search")
    moved.write(record)
    origin = resolve_origin(str(moved.path), runs_dir=Path("runs"), tracking_uri=None)
    assert origin is not None
    assert origin.config.tracking.uri == f"sqlite:///{tmp_path}/new/mlflow.db"


@pytest.mark.parametrize("moved", [NAMED], ids=["named"], indirect=True)
def test_a_users_setting_overrides_the_moved_store(moved: RunDir) -> None:
    config = load_of_run(moved.path / "config.yaml", moved, ["tracking.uri=sqlite:////other/mlflow.db"])
    assert config.tracking.uri == "sqlite:////other/mlflow.db"


# ---------- folders of artifacts
def make_store(folder: Path, location: str, blank_database: Path) -> MlflowClient:
    """Create a store in a folder, with one run of the experiment `mine` that has a file."""
    folder.mkdir(parents=True)
    shutil.copy(blank_database, folder / "mlflow.db")
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    run_id = client.create_run(client.create_experiment("mine", artifact_location=location)).info.run_id
    client.log_text(run_id, "kept", "file.txt")
    return client


@pytest.mark.parametrize("name", ["mlartifacts", "my files/deep", "runs"])
@pytest.mark.parametrize("as_uri", [True, False], ids=["URI", "path"])
def test_a_folder_of_artifacts_may_have_any_name(
    tmp_path: Path, name: str, as_uri: bool, blank_database: Path
) -> None:
    old = tmp_path / "old"
    make_store(old, (old / name).as_uri() if as_uri else str(old / name), blank_database)
    old.rename(tmp_path / "new")
    client = open_client(f"sqlite:///{tmp_path}/new/mlflow.db")
    (stored,) = client.search_runs(["1"])
    new = tmp_path / "new" / name
    assert unquote(urlsplit(stored.info.artifact_uri).path) == f"{new}/{stored.info.run_id}/artifacts"
    assert stored.info.artifact_uri.startswith("file://") == as_uri
    assert unquote(urlsplit(client.get_experiment("1").artifact_location).path) == str(new)
    assert (new / stored.info.run_id / "artifacts" / "file.txt").read_text() == "kept"


def test_a_copied_store_keeps_the_files_of_the_original(tmp_path: Path, blank_database: Path) -> None:
    make_store(tmp_path / "old", f"{tmp_path}/old/files", blank_database)
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    client = open_client(f"sqlite:///{tmp_path}/new/mlflow.db")
    assert client.get_experiment("1").artifact_location == f"{tmp_path}/old/files"


def test_no_files_are_written_to_a_missing_folder_of_artifacts(
    moved: RunDir, tmp_path: Path, caplog: pytest.LogCaptureFixture, blank_database: Path
) -> None:
    """The folder was neither in the project nor moved with it."""
    client = make_store(tmp_path / "store", f"{tmp_path}/disk/files", blank_database)
    shutil.rmtree(tmp_path / "disk")
    settings = [f"tracking.uri=sqlite:///{tmp_path}/store/mlflow.db", "tracking.experiment=mine"]
    assert run(["sync", str(moved.path), *(part for s in settings for part in ("--set", s))]) == 1
    assert not (tmp_path / "disk").exists()
    said = "the folder for files of experiment 'mine' has gone, move it beside the store: "
    assert f"{said}{tmp_path}/disk/files)" in caplog.text
    assert len(client.search_runs(["1"])) == 2


# ---------- a folder that does not exist
@pytest.mark.parametrize("moved", [[]], ids=["default"], indirect=True)
def test_no_command_creates_the_folder_of_a_store(
    moved: RunDir, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    gone = f"sqlite:///{tmp_path}/gone/mlflow.db"
    setting, name = ["--set", f"tracking.uri={gone}"], str(moved.path)
    commands = {
        ("sync", name): (1, "its folder does not exist"),
        ("export", name): (0, "its folder does not exist"),
        ("retrain", "--genotype", "random:1", "--config", "tiny.yaml"): (0, "its folder does not exist"),
        ("promote", name): (2, "no version of a registered model; deliver it first: istanas sync"),
        ("results",): (0, f"MLflow store {gone}: does not exist"),
        ("ui",): (2, f"MLflow store {gone}: FileNotFoundError: no such folder: {tmp_path}/gone"),
        ("doctor",): (1, f"{tmp_path}/gone does not exist"),
        ("draw", "0" * 32): (2, f"the MLflow store {gone} does not exist"),
    }
    for command, (code, said) in commands.items():
        OF_THIS_PROCESS.clear()
        caplog.clear()
        assert run([*command, *setting]) == code, command
        out, err = capfd.readouterr()
        assert said in f"{out}{err}{caplog.text}", command
        assert not (tmp_path / "gone").exists(), command
