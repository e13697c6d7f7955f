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

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Dataset

from istanas.data import Preprocessing
from istanas.errors import CheckpointError
from pipeline.base.interruption import signals_interrupt
from pipeline.runs.directory import RunDir
from pipeline.runs.mlflow_link import read_link
from pipeline.runs.network_files import NetworkCard
from pipeline.runs.record import DatasetUse, RunRecord, new_key
from pipeline.tracking import notices
from pipeline.tracking import tracker as tracking
from pipeline.tracking.notices import Notices
from pipeline.tracking.store import artifact_root, open_client, public_uri, store_uri
from pipeline.tracking.tracker import MLflowTracker, NullTracker, open_tracker
from tests.mlflow_server import server
from tests.ports import unused_port

RECORD = RunRecord(
    name="digits-search",
    kind="search",
    method="two_stage",
    dataset="digits",
    key="",
    params={"seed": 0, "search.lr": 0.1, "data.root": None, "flip": True},
    tags={"istanas.genotype": "0123abcd"},
    description="# Found\n\na cell",
    parent=None,
    status="RUNNING",
    started_ms=1_700_000_000_000,
    ended_ms=None,
    artifacts=("config.yaml", "cells/normal.svg", "never_written.json"),
    result={},
)
EXPERIMENT = "tests"
TRAINING, ALPHAS, HOLDOUT, TEST = (
    DatasetUse("digits", context, 16 * digit, "a place", pictures, classes=10, shape=(1, 8, 8))
    for context, digit, pictures in (
        ("training", "a", 719),
        ("alphas", "b", 719),
        ("hold-out", "c", 144),
        ("test", "d", 359),
    )
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, blank_database: Path) -> str:
    """The store that the tests of this module share."""
    return f"sqlite:///{shutil.copy(blank_database, tmp_path_factory.mktemp('store'))}"


def make_run(path: Path, epochs: int = 2, **changes: object) -> RunDir:
    run = RunDir(path)
    run.write(dataclasses.replace(RECORD, **{"key": new_key(), **changes}))  # type: ignore[arg-type]
    (path / "cells").mkdir()
    (path / "config.yaml").write_text("seed: 0\n")
    (path / "cells" / "normal.svg").write_text("<svg/>")
    add_epochs(run, 1, epochs)
    return run


def add_epochs(run: RunDir, first: int, last: int) -> None:
    for epoch in range(first, last + 1):
        run.append_metrics(epoch, {"train/loss": 1 / epoch, "valid/top1": epoch / 100}, 1000 * epoch)


def end_run(run: RunDir, status: str = "FINISHED", **changes: object) -> None:
    ended = {"status": status, "ended_ms": 1_700_000_060_000, "result": {"seconds": 42.5}, **changes}
    run.write(dataclasses.replace(run.read(), **ended))  # type: ignore[arg-type]


def tracker_of(run: RunDir, store: str) -> MLflowTracker:
    return MLflowTracker(run, tracking_uri=store, experiment=EXPERIMENT, notices=Notices())


def history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, int, float]]:
    return [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, name)]


def runs_of(client: MlflowClient, run: RunDir) -> list[str]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`istanas.key` = '{run.read().key}'")
    return [entity.info.run_id for entity in found]


def picture(run_id: str) -> str:
    """The normal cell as a description shows it."""
    return f"![normal cell](get-artifact?path=cells/normal.svg&run_uuid={run_id})"


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


def small_network(path: Path) -> tuple[torch.nn.Module, torch.Tensor]:
    """A network with batch norm, of weights that a test has saved in the run directory."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 10),
    )
    network.load_state_dict(torch.load(path / "weights.pt", weights_only=True))
    return network.eval(), torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def save_small_network(path: Path) -> None:
    torch.manual_seed(0)
    blank = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 10),
    )
    blank(torch.rand(32, 1, 8, 8))  # running statistics that differ from the initial ones
    torch.save(blank.state_dict(), path / "weights.pt")
    steps = Preprocessing(shape=(1, 8, 8), mean=(0.0,), std=(1.0,))
    card = NetworkCard("{}", 4, 1, 10, "cifar", False, steps, tuple("0123456789"))
    (path / "network.json").write_text(card.to_json())


def test_retraining_is_a_child_with_a_model(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    search = make_run(tmp_path / "search")
    end_run(search)
    retrain = make_run(tmp_path / "retrain", kind="retrain", name="digits-retrain", parent=str(search.path))
    save_small_network(retrain.path)
    end_run(retrain)
    tracker = MLflowTracker(retrain, tracking_uri=store, experiment=EXPERIMENT, load_network=small_network)
    assert tracker.deliver()
    assert tracker.last_delivery is not None
    assert tracker.last_delivery.model
    assert capfd.readouterr() == ("", "")

    client = open_client(store)
    entity = client.get_run(str(tracker.run_id))
    parent = tracker_of(search, store)
    assert entity.data.tags["mlflow.parentRunId"] == parent.run_id
    assert client.get_run(str(parent.run_id)).info.status == "FINISHED"  # its search was delivered first
    assert parent.deliver()
    assert [output.step for output in entity.outputs.model_outputs] == [2]

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    network, pictures = small_network(retrain.path)
    expected = network(pictures)
    loaded = mlflow.pytorch.load_model(f"runs:/{tracker.run_id}/model")
    torch.testing.assert_close(loaded(pictures), expected)
    for batch in (1, 5):
        assert loaded(torch.rand(batch, 1, 8, 8)).shape == (batch, 10)
    model = mlflow.pyfunc.load_model(f"models:/{entity.outputs.model_outputs[0].model_id}")
    assert model.metadata.signature is not None
    white = np.full((8, 8), 255, np.uint8)
    answer = model.predict(pd.DataFrame({"picture": [white]}))
    probabilities = network(torch.ones(1, 1, 8, 8)).softmax(1)[0].tolist()
    assert list(answer["probabilities"][0].values()) == pytest.approx(probabilities, abs=1e-6)

    again = MLflowTracker(retrain, tracking_uri=store, experiment=EXPERIMENT, load_network=small_network)
    assert again.deliver()
    assert again.last_delivery is not None
    assert not again.last_delivery.model
    assert len(client.search_logged_models([entity.info.experiment_id])) == 1


def test_a_network_that_cannot_be_loaded_costs_only_the_model(
    tmp_path: Path, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run", kind="retrain")  # without weights
    end_run(run)
    tracker = MLflowTracker(run, tracking_uri=store, experiment=EXPERIMENT, load_network=small_network)
    assert tracker.deliver()
    assert "weights.pt" in caplog.text
    assert f"istanas sync {run.path}" in caplog.text
    client = open_client(store)
    assert client.get_run(str(tracker.run_id)).info.status == "FINISHED"
    save_small_network(run.path)
    assert tracker.deliver()
    assert tracker.last_delivery is not None
    assert tracker.last_delivery.model


def trained_run(path: Path, **changes: object) -> RunDir:
    """A finished one-stage search with a network."""
    run = make_run(path, **{"method": "one_stage", "name": path.name, **changes})  # type: ignore[arg-type]
    save_small_network(run.path)
    end_run(run)
    return run


def registering(run: RunDir, store: str, name: str | None) -> MLflowTracker:
    return MLflowTracker(
        run, tracking_uri=store, experiment=EXPERIMENT, registered_model=name, load_network=small_network
    )


def delivered(tracker: MLflowTracker) -> tracking.Delivery:
    assert tracker.deliver()
    assert tracker.last_delivery is not None
    return tracker.last_delivery


def versions_of(client: MlflowClient, name: str) -> dict[int, str]:
    """Return the run ids by version."""
    found = client.search_model_versions(f"name = '{name}'")
    return {int(version.version): version.run_id for version in found}


def candidate(client: MlflowClient, name: str) -> int:
    return int(client.get_model_version_by_alias(name, "candidate").version)


def test_one_stage_search_is_a_version_in_the_registry(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    ambient = tmp_path / "ambient"
    ambient.mkdir()
    monkeypatch.chdir(ambient)  # where a client that was not told its store would make one
    run = trained_run(tmp_path / "one", dataset="fashion")
    opened = open_tracker(run, enabled=True, tracking_uri=store, experiment=EXPERIMENT)
    assert isinstance(opened, MLflowTracker)
    assert opened.registered_model is None
    sent = delivered(registering(run, store, None))
    assert sent.model
    assert sent.registered == ("istanas-fashion", 1)
    assert capfd.readouterr() == ("", "")
    assert list(ambient.iterdir()) == []

    client = open_client(store)
    version = client.get_model_version_by_alias("istanas-fashion", "candidate")
    assert (int(version.version), version.run_id, version.status) == (1, sent.run_id, "READY")
    page = f"#/experiments/{client.get_run(sent.run_id).info.experiment_id}/runs/{sent.run_id}"
    assert version.description == f"# Found\n\nOf [search one]({page}).\n\na cell\n\n{picture(sent.run_id)}"
    assert version.tags == {
        "istanas.kind": "search",
        "istanas.method": "one_stage",
        "istanas.dataset": "fashion",
        "istanas.genotype": "0123abcd",
        "istanas.search_run": sent.run_id,
    }
    (output,) = client.get_run(sent.run_id).outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert version.source == model.artifact_location
    assert json.loads(model.tags["mlflow.modelVersions"]) == [
        {"name": "istanas-fashion", "version": version.version}
    ]

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    network, pictures = small_network(run.path)
    loaded = mlflow.pytorch.load_model("models:/istanas-fashion@candidate")
    torch.testing.assert_close(loaded(pictures), network(pictures))
    info = mlflow.models.get_model_info("models:/istanas-fashion@candidate")
    assert info.signature is not None
    assert info.saved_input_example_info is not None
    monkeypatch.delenv("MLFLOW_TRACKING_URI")

    again = delivered(registering(run, store, None))
    assert (again.model, again.registered) == (False, None)
    assert versions_of(client, "istanas-fashion") == {1: sent.run_id}
    model = client.get_logged_model(output.model_id)
    assert len(json.loads(model.tags["mlflow.modelVersions"])) == 1


def inputs_of(client: MlflowClient, run_id: str) -> dict[str, Dataset]:
    """Return the data sets of a run's inputs by context."""
    entries = client.get_run(run_id).inputs.dataset_inputs
    found = {tag.value: entry.dataset for entry in entries for tag in entry.tags}
    assert len(found) == len(entries)
    return found


def test_pictures_are_inputs_of_the_run_once(tmp_path: Path, store: str) -> None:
    run = make_run(tmp_path / "run", datasets=(TRAINING, ALPHAS))
    assert [delivered(tracker_of(run, store)).datasets for _ in range(2)] == [2, 0]
    run.write(dataclasses.replace(run.read(), datasets=(TRAINING, ALPHAS, TEST)))  # of a later process
    end_run(run)
    sent = delivered(tracker_of(run, store))
    assert sent.datasets == 1
    client = open_client(store)
    inputs = inputs_of(client, sent.run_id)
    assert {context: (data.name, data.digest) for context, data in inputs.items()} == {
        "training": ("digits", 16 * "a"),
        "alphas": ("digits", 16 * "b"),
        "test": ("digits", 16 * "d"),
    }
    assert json.loads(inputs["test"].profile) == {"num_rows": 359, "classes": 10, "shape": "1x8x8"}
    assert json.loads(inputs["test"].source) == {"uri": "a place"}
    # Another run on the same pictures shares them.
    other = delivered(tracker_of(make_run(tmp_path / "other", datasets=(TEST,)), store))
    assert inputs_of(client, other.run_id).keys() == {"test"}
    experiment = client.get_run(sent.run_id).info.experiment_id
    found = client.search_runs([experiment], f"dataset.digest = '{16 * 'd'}'")
    assert {entity.info.run_id for entity in found} == {sent.run_id, other.run_id}


def test_a_record_from_before_there_were_inputs_is_delivered(tmp_path: Path, store: str) -> None:
    run = make_run(tmp_path / "run")
    data = json.loads((run.path / "run.json").read_text())
    del data["datasets"]
    (run.path / "run.json").write_text(json.dumps(data))
    sent = delivered(tracker_of(run, store))
    assert sent.datasets == 0
    assert open_client(store).get_run(sent.run_id).inputs.dataset_inputs == []


def test_a_model_has_the_last_figures_of_its_run_and_their_pictures(tmp_path: Path, store: str) -> None:
    run = make_run(tmp_path / "run", method="one_stage", datasets=(TRAINING, HOLDOUT, TEST))
    figures = {"test/top1": 0.875, "test/loss": 0.5, "target/params": 1234.0, "images_per_second": 9.0}
    figures["test/top5"] = 0.9375
    run.append_metrics(3, {"train/loss": 0.25, "valid/top1": 0.75, **figures}, 3000)
    save_small_network(run.path)
    assert delivered(tracker_of(run, store)).metrics == 11  # while it runs
    end_run(run)
    sent = delivered(registering(run, store, "figures"))
    client = open_client(store)
    (output,) = client.get_run(sent.run_id).outputs.model_outputs

    def of_the_model() -> dict[str, tuple[float, int, str | None]]:
        metrics = client.get_logged_model(output.model_id).metrics
        assert metrics is not None
        found = {metric.key: (metric.value, metric.step, metric.dataset_digest) for metric in metrics}
        assert len(found) == len(metrics)
        return found

    expected = {
        "train/loss": (0.25, 3, 16 * "a"),
        "valid/top1": (0.75, 3, 16 * "c"),
        "test/top1": (0.875, 3, 16 * "d"),
        "test/top5": (0.9375, 3, 16 * "d"),
        "test/loss": (0.5, 3, 16 * "d"),
        "target/params": (1234.0, 3, None),
    }
    assert of_the_model() == expected
    assert delivered(registering(run, store, "figures")).model is False
    assert of_the_model() == expected
    assert history(client, sent.run_id, "train/loss") == [(1, 1000, 1.0), (2, 2000, 0.5), (3, 3000, 0.25)]
    assert history(client, sent.run_id, "test/top1") == [(3, 3000, 0.875)]
    (model,) = client.search_logged_models(
        [client.get_run(sent.run_id).info.experiment_id],
        "metrics.`test/top1` > 0.8",
        datasets=[{"dataset_name": "digits", "dataset_digest": 16 * "d"}],
    )
    assert model.model_id == output.model_id


def test_one_clicks_from_a_version_to_its_retraining_search_and_sweep(tmp_path: Path, store: str) -> None:
    sweep = make_run(tmp_path / "sweep", kind="sweep", name="the_sweep")
    search = make_run(tmp_path / "search", name="the [search]", parent=str(sweep.path))
    pictures = ("cells/normal.png", "cells/normal.svg")
    retrain = trained_run(
        tmp_path / "retrain", kind="retrain", parent=str(search.path), artifacts=pictures, description="Text."
    )
    (retrain.path / "cells" / "normal.png").write_bytes(b"a picture")
    sent = delivered(registering(retrain, store, "clicks"))
    client = open_client(store)
    ids = {run: str(tracker_of(run, store).run_id) for run in (sweep, search)}
    experiment = client.get_run(sent.run_id).info.experiment_id
    to_retrain, to_search, to_sweep = (
        f"[{text}](#/experiments/{experiment}/runs/{run_id})"
        for text, run_id in (
            ("retraining retrain", sent.run_id),
            ("search the \\[search\\]", ids[search]),
            ("sweep the\\_sweep", ids[sweep]),
        )
    )
    tags = client.get_run(sent.run_id).data.tags
    assert tags["mlflow.note.content"] == f"Text.\n\nOf {to_search}, {to_sweep}.\n\n{picture(sent.run_id)}"
    above = {"istanas.search_run": ids[search], "istanas.sweep_run": ids[sweep]}
    assert above.items() <= tags.items()

    page = f"Text.\n\nOf {to_retrain}, {to_search}, {to_sweep}.\n\n{picture(sent.run_id)}"
    version = client.get_model_version("clicks", "1")
    assert version.description == page
    assert {"istanas.retrain_run": sent.run_id, **above}.items() <= version.tags.items()
    (output,) = client.get_run(sent.run_id).outputs.model_outputs
    model_tags = client.get_logged_model(output.model_id).tags
    assert {
        "mlflow.note.content": page,
        "istanas.retrain_run": sent.run_id,
        **above,
    }.items() <= model_tags.items()
    under = client.search_runs([experiment], f"tags.`istanas.sweep_run` = '{ids[sweep]}'")
    assert {entity.info.run_id for entity in under} == {ids[search], sent.run_id}


def test_only_a_finished_run_with_a_network_has_a_model(
    tmp_path: Path, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    two_stage = trained_run(tmp_path / "two", method="two_stage")
    failed = trained_run(tmp_path / "failed")
    end_run(failed, "FAILED")
    for run in (two_stage, failed):
        sent = delivered(registering(run, store, "nothing"))
        assert (sent.model, sent.registered) == (False, None)
    assert versions_of(open_client(store), "nothing") == {}
    assert caplog.text == ""


def test_killed_anywhere_a_run_is_registered_once(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained_run(tmp_path / "one", datasets=(TRAINING, TEST))
    steps = (  # in the order in which they are taken
        "log_inputs",
        "finalize_logged_model",
        "log_outputs",
        "create_registered_model",
        "create_model_version",
        "set_logged_model_tags",
        "set_registered_model_alias",
        "set_terminated",
    )

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for step in steps:
        tracker = registering(run, store, "killed")
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, step, killed)
            with pytest.raises(KeyboardInterrupt):
                tracker.deliver()
    assert delivered(registering(run, store, "killed")).registered is None  # an earlier delivery did it

    client = open_client(store)
    (run_id,) = runs_of(client, run)
    assert versions_of(client, "killed") == {1: run_id}
    assert candidate(client, "killed") == 1
    entity = client.get_run(run_id)
    assert entity.info.status == "FINISHED"
    (output,) = entity.outputs.model_outputs
    (model,) = client.search_logged_models(
        [entity.info.experiment_id], f"source_run_id = '{run_id}' AND name = 'model'"
    )
    assert model.model_id == output.model_id
    assert sorted(metric.key for metric in model.metrics) == ["train/loss", "valid/top1"]
    assert len(entity.inputs.dataset_inputs) == 2
    assert [note["name"] for note in json.loads(model.tags["mlflow.modelVersions"])] == ["killed"]


def test_the_candidate_is_the_newest_version(tmp_path: Path, store: str) -> None:
    old, young = (trained_run(tmp_path / name) for name in ("old", "young"))
    ids = []
    for number, run in enumerate((old, young), start=1):
        sent = delivered(registering(run, store, "line"))
        assert sent.registered == ("line", number)
        ids.append(sent.run_id)
    client = open_client(store)
    assert candidate(client, "line") == 2
    assert delivered(registering(old, store, "line")).registered is None  # `istanas sync` of the older run
    assert candidate(client, "line") == 2
    assert versions_of(client, "line") == dict(enumerate(ids, start=1))
    client.set_registered_model_alias(
        "line", "candidate", "1"
    )  # as another run's slower delivery may leave it
    assert delivered(registering(young, store, "line")).registered is None
    assert candidate(client, "line") == 2


def test_a_search_is_not_registered_under_its_retrainings_name(tmp_path: Path, store: str) -> None:
    search = trained_run(tmp_path / "search")
    retrain = trained_run(tmp_path / "retrain", kind="retrain", parent=str(search.path))
    sent = delivered(registering(retrain, store, "retrained"))
    assert sent.registered == ("retrained", 1)
    assert delivered(registering(search, store, "searched")).registered == ("searched", 1)
    assert versions_of(open_client(store), "retrained") == {1: sent.run_id}


def test_a_registry_that_refuses_costs_only_the_version(
    tmp_path: Path, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = trained_run(tmp_path / "one")
    sent = delivered(registering(run, store, "no/such:name"))
    if sent.registered is not None:
        pytest.skip("this release of MLflow refuses no name")
    assert sent.model
    assert delivered(registering(run, store, "no/such:name")).registered is None
    (said,) = [entry.getMessage() for entry in caplog.records if entry.name == notices.__name__]
    assert "'no/such:name'" in said
    assert f"istanas sync {run.path}" in said
    assert "\n" not in said
    assert open_client(store).get_run(sent.run_id).info.status == "FINISHED"
    late = delivered(registering(run, store, "allowed"))
    assert (late.model, late.registered) == (False, ("allowed", 1))


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
