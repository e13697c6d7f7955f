"""The environment file of a run: its contents, and secrets that it must not have."""

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import istanas
from pipeline.base.redaction import without_secrets
from pipeline.runs.directory import RunDir
from pipeline.runs.environment import git_state, reproducing_command, write_environment
from pipeline.runs.record import RunRecord
from pipeline.tracking.store import open_client
from pipeline.tracking.tracker import MLflowTracker


def read(run: RunDir) -> dict:
    return json.loads((run.path / "environment.json").read_text())


def test_versions_hardware_and_command_are_written_down(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    write_environment(run, "search")
    found = read(run)
    assert found["istanas"] == istanas.__version__
    assert found["python"] == platform.python_version()
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert {"numpy", "ray", "mlflow", "optuna"} <= set(found["packages"])
    assert found["cores"] >= 1
    assert found["memory_gib"] > 0
    assert found["cpu"]
    assert len(found["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert found["command"] == f"istanas search --config {run.path}/config.yaml"
    assert found["earlier"] == []
    assert run.environment() == found


def test_no_environment_variable_and_no_password_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hidden-in-a-variable")
    typed = [
        "/usr/bin/istanas",
        "search",
        *("--set", "tracking.uri=http://me:secret@x@host:5000/a?token=secret&b=1"),
        *("--set", "sweep.storage=postgresql://me:secret@host/db?user=me&password=secret"),
    ]
    monkeypatch.setattr(sys, "argv", typed)
    run = RunDir(tmp_path / "run")
    write_environment(run, "search")
    text = (run.path / "environment.json").read_text()
    assert "secret" not in text
    assert "hidden-in-a-variable" not in text
    assert read(run)["command"] == (
        "istanas search --set 'tracking.uri=http://host:5000/a?token=...&b=1' "
        "--set 'sweep.storage=postgresql://host/db?user=me&password=...'"
    )


@pytest.mark.parametrize("program", ["/opt/env/bin/istanas", "/src/pipeline/cli/__main__.py"])
def test_the_command_is_the_one_that_was_typed(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [program, "run", "--config", "my file.yaml", "--set", "seed=1"])
    assert reproducing_command(Path("r"), "search") == "istanas run --config 'my file.yaml' --set seed=1"
    monkeypatch.setattr(
        sys, "argv", [program, "search", "--config", "caf\udce9.yaml"]
    )  # a name that is no UTF-8
    assert reproducing_command(Path("r"), "search").encode() == b"istanas search --config 'caf\\udce9.yaml'"


def test_without_a_command_line_the_run_directory_repeats_the_run() -> None:
    folder = Path("runs/a b")
    assert reproducing_command(folder, "sweep") == "istanas sweep --config 'runs/a b/config.yaml'"
    assert reproducing_command(folder, "retrain") == (
        "istanas retrain --genotype 'runs/a b/genotype.json' --config 'runs/a b/config.yaml'"
    )


def test_a_run_that_is_resumed_elsewhere_keeps_both_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    write_environment(run, "search")
    first = read(run)
    write_environment(run, "search")
    assert read(run) == first  # in the same one nothing is added
    monkeypatch.setattr(sys, "argv", ["istanas", "search"])
    write_environment(run, "search")
    second = read(run)
    assert second["command"] == "istanas search"
    assert second["earlier"] == [{name: value for name, value in first.items() if name != "earlier"}]
    write_environment(run, "search")
    assert read(run) == second


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("a@b", "a@b"),
        ("https://token@host/x", "https://host/x"),
        ("data.root=/a/b=c", "data.root=/a/b=c"),
        ("https://host/?api_key=abc;x=1", "https://host/?api_key=...;x=1"),
    ],
)
def test_only_secrets_are_left_out(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with one commit, as if istanas ran from it."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed: there is no commit to find")
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "file").write_text("1")
    settings = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
    for command in (["init", "-q"], ["add", "file"], [*settings, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True, capture_output=True)
    return folder


def test_the_commit_of_a_checkout_and_whether_it_was_changed(checkout: Path) -> None:
    head = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert git_state(checkout) == {"commit": head, "dirty": False}
    (checkout / "untracked").write_text("")
    git_state.cache_clear()
    assert git_state(checkout) == {"commit": head, "dirty": False}
    (checkout / "file").write_text("2")
    git_state.cache_clear()
    assert git_state(checkout) == {"commit": head, "dirty": True}


def test_a_checkout_around_an_installation_does_not_count(
    checkout: Path,
) -> None:
    (checkout / "site-packages").mkdir()
    assert git_state(checkout / "site-packages") is None


def test_without_git_nothing_fails(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    assert git_state(checkout) is None


def test_the_commit_is_mlflows_own_tag(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.write(
        RunRecord(
            **{"name": "run", "kind": "search", "method": "two_stage", "dataset": "digits", "key": ""},
            **{"params": {}, "tags": {}, "description": "", "parent": None, "status": "RUNNING"},
            **{"started_ms": 1, "ended_ms": None, "artifacts": (), "result": {}},
        )
    )
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = MLflowTracker(run, tracking_uri=uri, experiment="digits")
    assert tracker.deliver()  # announced: where it will be computed is not known yet

    def commit() -> str | None:
        found: str | None = (
            open_client(uri).get_run(str(tracker.run_id)).data.tags.get("mlflow.source.git.commit")
        )
        return found

    assert commit() is None
    for git in (None, {"commit": "ab" * 20, "dirty": True}):
        (run.path / "environment.json").write_text(json.dumps({"git": git}))
        assert tracker.deliver()
        assert commit() == (None if git is None else "ab" * 20)
