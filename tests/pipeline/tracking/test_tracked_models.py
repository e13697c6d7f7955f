"""Tracked models: the inputs and the network of a run, and its versions in the model registry."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Dataset

from pipeline.runs.record import DatasetUse
from pipeline.tracking import notices
from pipeline.tracking.store import open_client
from pipeline.tracking.tracker import MLflowTracker, open_tracker
from tests.pipeline.tracking.delivered_runs import (
    EXPERIMENT,
    candidate,
    delivered,
    end_run,
    history,
    make_run,
    picture,
    registering,
    runs_of,
    save_small_network,
    small_network,
    tracker_of,
    trained_run,
)

TRAINING, ALPHAS, HOLDOUT, TEST = (
    DatasetUse("digits", context, 16 * digit, "a place", pictures, classes=10, shape=(1, 8, 8))
    for context, digit, pictures in (
        ("training", "a", 719),
        ("alphas", "b", 719),
        ("hold-out", "c", 144),
        ("test", "d", 359),
    )
)


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


def versions_of(client: MlflowClient, name: str) -> dict[int, str]:
    """Return the run ids by version."""
    found = client.search_model_versions(f"name = '{name}'")
    return {int(version.version): version.run_id for version in found}


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
