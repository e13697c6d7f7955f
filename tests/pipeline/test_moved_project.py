"""A project folder that was moved: its store and the store's files are found where they are now."""

import json
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pipeline.cli import run
from pipeline.rundir import RunDir
from pipeline.tracking import open_client, read_link

TINY = """
space: {nodes: 2}
retrain: {epochs: 1, batch_size: 256, init_channels: 2, layers: 2, auxiliary_weight: 0, cutout: 0}
runtime: {threads: 1, device: cpu}
"""


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> RunDir:
    """A retraining in the project `new`, which was `old` when it ran."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "tiny.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path / "old")
    assert run(["retrain", "--genotype", "random:0", "--config", "tiny.yaml", *request.param]) == 0
    (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    (path,) = Path("runs").iterdir()
    return RunDir(path)


@pytest.mark.parametrize(
    "moved", [["--set", "tracking.uri=sqlite:///mlflow.db"]], ids=["named"], indirect=True
)
def test_export_after_a_move_delivers_to_the_store_that_moved(moved: RunDir, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "export", str(moved.path)]
    assert subprocess.run(command, timeout=100).returncode == 0  # MLflow remembers folders within a process
    assert not (tmp_path / "old").exists()
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
def test_a_store_that_has_gone_is_said(
    moved: RunDir, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = f"sqlite:///{tmp_path}/elsewhere/mlflow.db"
    file = moved.path / "mlflow.json"
    link = read_link(moved)
    assert link is not None
    assert link.tracking_uri == f"sqlite:///{tmp_path}/new/mlflow.db"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tracking_uri": gone}))
    assert run(["sync", str(moved.path)]) == 1
    assert not (tmp_path / "elsewhere").exists()
    assert f"MLflow store {gone}: the folder has gone; everything stays in {moved.path}" in caplog.text
    assert run(["sync", str(moved.path), "--set", "tracking.uri=sqlite:///mlflow.db"]) == 0
