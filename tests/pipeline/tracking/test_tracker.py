"""The tracker, on a SQLite store and a server: deliveries are complete, without duplicates, and never stop a run."""

import dataclasses
import json
import logging
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from istanas.errors import CheckpointError
from pipeline.base.interruption import signals_interrupt
from pipeline.runs.mlflow_link import read_link
from pipeline.tracking import tracker as tracking
from pipeline.tracking.store import artifact_root, open_client, public_uri, store_uri
from pipeline.tracking.tracker import MLflowTracker, NullTracker, open_tracker
from tests.mlflow_server import server
from tests.pipeline.tracking.delivered_runs import (
    EXPERIMENT,
    add_epochs,
    delivered,
    end_run,
    history,
    make_run,
    picture,
    registering,
    runs_of,
    tracker_of,
    trained_run,
)
from tests.ports import unused_port


def test_store_uri_prefers_the_argument(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert store_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    assert store_uri(None, known="http://known") == "http://known"
    assert artifact_root(store_uri(None)) == (tmp_path / "mlartifacts").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env")
    assert store_uri(None, known="http://known") == "http://env"
    assert store_uri("http://given") == "http://given"


def test_passwords_stay_out_of_files_and_messages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert public_uri("http://me:secret@host:1/path@x") == "http://host:1/path@x"
    assert public_uri("sqlite:////a@b/mlflow.db") == "sqlite:////a@b/mlflow.db"
    run = make_run(tmp_path / "run")
    assert not MLflowTracker(run, tracking_uri="http://me:secret@127.0.0.1:1", experiment="x").deliver()
    assert "127.0.0.1:1" in caplog.text
    assert "secret" not in caplog.text


def test_switched_off(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    off = open_tracker(run, enabled=False, tracking_uri=None, experiment=EXPERIMENT)
    assert isinstance(off, NullTracker)
    assert off.deliver()
    assert read_link(run) is None


def test_a_run_from_its_first_epoch_to_its_end(
    tmp_path: Path, store: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", epochs=1)
    tracker = open_tracker(run, enabled=True, tracking_uri=store, experiment=EXPERIMENT)
    assert isinstance(tracker, MLflowTracker)
    assert tracker.run_id is None
    assert tracker.deliver()
    run_id = tracker.run_id
    assert run_id is not None
    client = open_client(store)
    assert client.get_run(run_id).info.status == "RUNNING"
    for epoch in (2, 3):
        add_epochs(run, epoch, epoch)
        assert tracker.deliver()
        assert tracker.last_delivery is not None
        assert tracker.last_delivery.metrics == 2
    end_run(run)
    assert tracker.deliver()
    assert tracker.last_delivery is not None
    assert tracker.last_delivery.artifacts == ("config.yaml", "cells/normal.svg")
    assert tracker.last_delivery.missing == ("never_written.json",)

    entity = client.get_run(run_id)
    assert entity.info.run_name == "digits-search"
    assert (entity.info.status, entity.info.start_time) == ("FINISHED", 1_700_000_000_000)
    assert entity.info.end_time == 1_700_000_060_000
    assert entity.data.params == {"seed": "0", "search.lr": "0.1", "data.root": "None", "flip": "True"}
    wanted = {
        "istanas.kind": "search",
        "istanas.method": "two_stage",
        "istanas.dataset": "digits",
        "istanas.key": run.read().key,
        "istanas.run_dir": str(run.path),
        "istanas.genotype": "0123abcd",
        "mlflow.note.content": f"# Found\n\na cell\n\n{picture(run_id)}",
    }
    assert wanted.items() <= entity.data.tags.items()
    assert history(client, run_id, "train/loss") == [(1, 1000, 1.0), (2, 2000, 0.5), (3, 3000, 1 / 3)]
    assert {file.path for file in client.list_artifacts(run_id)} == {"config.yaml", "cells"}
    fetched = client.download_artifacts(run_id, "cells/normal.svg", str(tmp_path))
    assert Path(fetched).read_text() == "<svg/>"
    artifacts = Path(store.removeprefix("sqlite:///")).parent / "mlartifacts"
    assert list(artifacts.rglob("normal.svg"))
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""


def test_delivering_again_sends_nothing(tmp_path: Path, store: str) -> None:
    run = make_run(tmp_path / "run")
    end_run(run)
    assert tracker_of(run, store).deliver()
    again = tracker_of(run, store)  # as another process would
    assert again.deliver()
    sent = again.last_delivery
    assert sent is not None
    assert (sent.created, sent.metrics, sent.params, sent.tags, sent.artifacts) == (False, 0, 0, 0, ())
    (run.path / "config.yaml").write_text("seed: 1\n")
    assert again.deliver()
    assert again.last_delivery is not None
    assert again.last_delivery.artifacts == ("config.yaml",)


def test_an_interrupt_in_mid_delivery_leaves_no_database_locked(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a transaction it would lock the database for the process's own last delivery."""
    run = make_run(tmp_path / "run", epochs=2)
    tracker = tracker_of(run, store)
    send = tracking._send_params

    def send_interrupted(*arguments: Any) -> int:
        signal.raise_signal(signal.SIGINT)
        return send(*arguments)

    with signals_interrupt():
        monkeypatch.setattr(tracking, "_send_params", send_interrupted)
        with pytest.raises(KeyboardInterrupt):
            tracker.deliver()
        monkeypatch.setattr(tracking, "_send_params", send)
        assert tracker.last_delivery is not None
        assert tracker.last_delivery.metrics == 4
        end_run(run, "FAILED")
        assert tracker.deliver()
    (run_id,) = runs_of(open_client(store), run)
    assert open_client(store).get_run(run_id).info.status == "FAILED"


def test_rewritten_metrics_are_not_duplicated(tmp_path: Path, store: str) -> None:
    run = make_run(tmp_path / "run", epochs=3)
    first = tracker_of(run, store)
    assert first.deliver()
    # The process is killed; the resumed one goes back to epoch 2 and measures epoch 3 again.
    run.replace_metrics([line for line in run.metrics() if line.step <= 2])
    resumed = tracker_of(run, store)
    assert resumed.deliver()
    run.append_metrics(3, {"train/loss": 0.123, "valid/top1": 0.03}, 9999)
    add_epochs(run, 4, 4)
    assert resumed.deliver()
    assert first.deliver()
    client = open_client(store)
    assert resumed.run_id is not None
    assert [step for step, _, _ in history(client, resumed.run_id, "train/loss")] == [1, 2, 3, 4]
    assert [step for step, _, _ in history(client, resumed.run_id, "valid/top1")] == [1, 2, 3, 4]


def test_more_metrics_than_one_request_holds(tmp_path: Path, store: str) -> None:
    run = make_run(tmp_path / "run", epochs=0)
    for step in range(3):
        run.append_metrics(step, {f"m{number}": float(step) for number in range(700)}, 1000 + step)
    tracker = tracker_of(run, store)
    assert tracker.deliver()
    assert tracker.last_delivery is not None
    assert tracker.last_delivery.metrics == 2100
    assert tracker.run_id is not None
    assert len(open_client(store).get_run(tracker.run_id).data.metrics) == 700


def test_lost_link_finds_the_run_by_its_key(tmp_path: Path, store: str) -> None:
    run = make_run(tmp_path / "run")
    tracker = tracker_of(run, store)
    assert tracker.deliver()
    (run.path / "mlflow.json").unlink()  # killed between creating the run and noting its id
    again = tracker_of(run, store)
    assert again.run_id is None
    assert again.deliver()
    assert again.run_id == tracker.run_id
    assert runs_of(open_client(store), run) == [tracker.run_id]


def test_a_broken_link_and_a_deleted_run_are_replaced(tmp_path: Path, store: str) -> None:
    run = make_run(tmp_path / "run")
    tracker = tracker_of(run, store)
    assert tracker.deliver()
    (run.path / "mlflow.json").write_text("{")
    assert tracker_of(run, store).deliver()
    link = read_link(run)
    assert link is not None
    assert link.run_id == tracker.run_id
    client = open_client(store)
    client.delete_run(link.run_id)
    again = tracker_of(run, store)
    assert again.deliver()
    assert again.run_id != link.run_id
    assert runs_of(client, run) == [again.run_id]
    assert len(history(client, str(again.run_id), "train/loss")) == 2


def test_another_store_gets_a_run_of_its_own(tmp_path: Path, store: str, blank_database: Path) -> None:
    run = make_run(tmp_path / "run")
    end_run(run)
    assert tracker_of(run, store).deliver()
    other = f"sqlite:///{shutil.copy(blank_database, tmp_path / 'other.db')}"
    moved = tracker_of(run, other)
    assert moved.run_id is None
    assert moved.deliver()
    assert moved.last_delivery is not None
    assert moved.last_delivery.artifacts == ("config.yaml", "cells/normal.svg")
    follows = MLflowTracker(run, tracking_uri=None, experiment=EXPERIMENT)
    assert (follows.tracking_uri, follows.run_id) == (other, moved.run_id)


def test_failed_run_and_its_resumption(tmp_path: Path, store: str) -> None:
    run = make_run(tmp_path / "run")
    end_run(run, "FAILED")
    tracker = tracker_of(run, store)
    assert tracker.deliver()
    client = open_client(store)
    assert client.get_run(str(tracker.run_id)).info.status == "FAILED"
    # The resumed run may have other parameters, which MLflow refuses to change.
    run.write(dataclasses.replace(run.read(), status="RUNNING", ended_ms=None, params={"seed": 7, "new": 1}))
    assert tracker.deliver()
    entity = client.get_run(str(tracker.run_id))
    assert (entity.info.status, entity.data.params["seed"], entity.data.params["new"]) == (
        "RUNNING",
        "0",
        "1",
    )
    end_run(run, ended_ms=1_700_000_099_000)
    assert tracker.deliver()
    info = client.get_run(str(tracker.run_id)).info
    assert (info.status, info.end_time) == ("FINISHED", 1_700_000_099_000)


def test_moved_run_directories_keep_their_lineage(tmp_path: Path, store: str) -> None:
    search = make_run(tmp_path / "moved" / "search")
    retrain = make_run(tmp_path / "moved" / "retrain", kind="retrain", parent="/elsewhere/search")
    tracker = tracker_of(retrain, store)
    assert tracker.deliver()
    tags = open_client(store).get_run(str(tracker.run_id)).data.tags
    assert tags["mlflow.parentRunId"] == tracker_of(search, store).run_id


def test_a_permanently_deleted_search_does_not_stop_its_retraining(tmp_path: Path, store: str) -> None:
    retrain = make_run(tmp_path / "retrain", kind="retrain")
    tracker = tracker_of(retrain, store)
    assert tracker.deliver()
    client = open_client(store)
    client.set_tag(str(tracker.run_id), "mlflow.parentRunId", 32 * "0")
    end_run(retrain)
    assert tracker.deliver()
    assert client.get_run(str(tracker.run_id)).info.status == "FINISHED"


def test_damaged_search_does_not_stop_its_retraining(
    tmp_path: Path, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    search = make_run(tmp_path / "search")
    (search.path / "run.json").write_text("{")
    retrain = make_run(tmp_path / "retrain", kind="retrain", parent=str(search.path))
    tracker = tracker_of(retrain, store)
    assert tracker.deliver()
    assert "mlflow.parentRunId" not in open_client(store).get_run(str(tracker.run_id)).data.tags
    assert str(search.path) in caplog.text


def test_an_unusable_store_is_reported_once_and_tried_once_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, blank_database: Path
) -> None:
    folder = tmp_path / "folder"
    folder.write_text("in the way")
    run = make_run(tmp_path / "run")
    tracker = tracker_of(run, f"sqlite:///{folder}/mlflow.db")
    with caplog.at_level(logging.WARNING):
        assert not tracker.deliver()
        folder.unlink()
        folder.mkdir()
        shutil.copy(blank_database, folder)
        assert not tracker.deliver()  # too soon to try again
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"istanas sync {run.path}" in message
    assert "\n" not in message
    end_run(run)  # the end is always tried
    assert tracker.deliver()
    assert runs_of(open_client(f"sqlite:///{folder}/mlflow.db"), run) == [tracker.run_id]


def test_a_broken_run_directory_is_an_error(tmp_path: Path, store: str) -> None:
    run = make_run(tmp_path / "run")
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write("nonsense\n")
    with pytest.raises(CheckpointError, match="line 3"):
        tracker_of(run, store).deliver()


def test_absent_mlflow_does_not_stop_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    script = f"""
        import sys
        sys.modules["mlflow"] = None  # as if it were not installed
        from pipeline.runs.directory import RunDir
        from pipeline.tracking.tracker import MLflowTracker
        tracker = MLflowTracker(RunDir({str(run.path)!r}), tracking_uri=None, experiment="x")
        sys.exit(0 if [tracker.deliver(), tracker.deliver()] == [False, False] else 3)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert "install mlflow" in line
    assert f"istanas sync {run.path}" in line


def test_two_processes_deliver_one_run(tmp_path: Path) -> None:
    """`istanas sync` during a training, with a store that neither has opened yet."""
    run = make_run(tmp_path / "run", epochs=5)
    uri = f"sqlite:///{tmp_path}/fresh.db"
    script = f"""
        from pipeline.runs.directory import RunDir
        from pipeline.tracking.tracker import MLflowTracker
        assert MLflowTracker(RunDir({str(run.path)!r}), tracking_uri={uri!r}, experiment="x").deliver()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    children = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for child in children:
        _, error = child.communicate(timeout=120)
        assert (child.returncode, error) == (0, "")
    client = open_client(uri)
    (run_id,) = runs_of(client, run)
    assert len(history(client, run_id, "train/loss")) == 5


def test_a_server_that_restarts(
    tmp_path: Path, blank_database: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(blank_database, tmp_path)
    port = unused_port()
    uri = f"http://127.0.0.1:{port}"
    run = make_run(tmp_path / "run", epochs=2)
    tracker = tracker_of(run, uri)
    with server(tmp_path, port):
        assert tracker.deliver()
    add_epochs(run, 3, 4)
    begun = time.monotonic()
    assert not tracker.deliver()
    assert not tracker.deliver()
    assert time.monotonic() - begun < 30  # training is not held up for long
    (said,) = [entry.getMessage() for entry in caplog.records]
    assert "ConnectionRefusedError: Connection refused" in said
    end_run(run)
    with server(tmp_path, port):
        late = tracker_of(run, uri)  # `istanas sync`, from another process
        assert late.deliver()
        assert late.last_delivery is not None
        assert late.last_delivery.metrics == 4
        assert tracker.deliver()
        client = open_client(uri)
        assert runs_of(client, run) == [tracker.run_id]
        for name in ("train/loss", "valid/top1"):
            stored = history(client, str(tracker.run_id), name)
            assert [(step, time_ms) for step, time_ms, _ in stored] == [(n, 1000 * n) for n in range(1, 5)]
        entity = client.get_run(str(tracker.run_id))
        assert (entity.info.status, entity.info.end_time) == ("FINISHED", 1_700_000_060_000)
        fetched = client.download_artifacts(str(tracker.run_id), "cells/normal.svg", str(tmp_path))
        assert Path(fetched).read_text() == "<svg/>"
        one_stage = trained_run(tmp_path / "one")
        for registered in (("served", 1), None):
            assert delivered(registering(one_stage, uri, "served")).registered == registered
        version = client.get_model_version_by_alias("served", "candidate")
        (model,) = client.search_logged_models(
            [entity.info.experiment_id], f"source_run_id = '{version.run_id}'"
        )
        assert version.source == model.artifact_location
        assert len(json.loads(model.tags["mlflow.modelVersions"])) == 1
    assert capfd.readouterr().out == ""
    assert json.loads((run.path / "mlflow.json").read_text())["run_id"] == tracker.run_id
