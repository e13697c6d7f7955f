"""A user's first commands: the quickstart on the digits, its MLflow store and tables; and a folder of pictures."""

import csv
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from istanas.data import ArrayPictures, load_dataset, normalize
from istanas.space import Genotype
from pipeline.config.load import load
from pipeline.runs.directory import RunDir
from pipeline.runs.network_files import load_network
from pipeline.tracking.store import open_client
from tests.in_process import istanas

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FIGURES = [f"cells/{cell}.{form}" for cell in ("normal", "reduce") for form in ("png", "svg")]
SEARCH_METRICS = {
    "train/loss",
    "train/top1",
    "valid/loss",
    "valid/top1",
    "recovery/gap",
    "recovery/truncation",
    "recovery/margin",
    "recovery/distance",
    "recovery/support_changes",
    "arch/skip_ratio",
    "arch/frozen_nodes",
    "target/params",
    "target/macs",
    "images_per_second",
}
RETRAIN_METRICS = {
    "train/loss",
    "train/top1",
    "test/loss",
    "test/top1",
    "target/params",
    "target/macs",
    "images_per_second",
}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> dict[str, Any]:
    """The quickstart's folder, configuration, output, seconds and result, from a process of its own."""
    folder = tmp_path_factory.mktemp("quickstart")
    file = repo_root / "tune_configs" / "digits_quickstart.yaml"
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "run", "--config", str(file), "--json"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=290,
    )
    seconds = time.monotonic() - begun
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    result = json.loads(done.stdout)
    return {
        "folder": folder,
        "config": load(file),
        "shown": done.stderr,
        "seconds": seconds,
        "result": result,
    }


@pytest.fixture(scope="module")
def client(quickstart: dict[str, Any]) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{quickstart['folder'] / 'mlflow.db'}")


def test_it_is_fast_and_accurate(quickstart: dict[str, Any]) -> None:
    assert quickstart["seconds"] < 180
    assert quickstart["result"]["test_top1"] >= 0.96
    assert quickstart["config"].search.epochs >= 10


def test_it_shows_progress_figures_and_where_things_are(quickstart: dict[str, Any]) -> None:
    shown, config, result = (quickstart[key] for key in ("shown", "config", "result"))
    epochs = re.findall(r"^epoch (\d+): loss [\d.]+, top-1 [\d.]+ %", shown, flags=re.MULTILINE)
    assert [int(n) for n in epochs] == [
        *range(1, config.search.epochs + 1),
        *range(1, config.retrain.epochs + 1),
    ]
    for label, value in (
        ("test top-1", f"{100 * result['test_top1']:.2f} %"),
        ("parameters", f"{result['params']:,}"),
        ("multiply-adds", f"{result['macs']:,}"),
        ("seconds of both jobs", f"{result['seconds']:.1f}"),
    ):
        assert re.search(rf"{label}\W+{re.escape(value)}", shown), label
    for label in ("genotype", "cell pictures", "network"):
        path = re.search(rf"^{label}: (.+)$", shown, flags=re.MULTILINE)
        assert path is not None
        assert (quickstart["folder"] / path[1]).exists()
    assert f"MLflow store: sqlite:///{quickstart['folder']}/mlflow.db" in shown
    assert re.search(r" ui\b", shown), "the command that opens the store"


def test_the_architecture_changed_in_the_search(quickstart: dict[str, Any]) -> None:
    with (quickstart["folder"] / quickstart["result"]["run_dir"] / "trajectory.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert any(row["changed"] == "True" for row in rows)
    assert len({row["epoch"] for row in rows}) == quickstart["config"].search.epochs + 1


def test_mlflow_has_both_runs_parent_and_child(quickstart: dict[str, Any], client: Any) -> None:
    result = quickstart["result"]
    search, retrain = (client.get_run(result[key]) for key in ("mlflow_run_id", "retrain_run_id"))
    runs = client.search_runs([search.info.experiment_id])
    assert {run.info.run_id for run in runs} == {search.info.run_id, retrain.info.run_id}
    assert retrain.data.tags["mlflow.parentRunId"] == search.info.run_id
    assert "mlflow.parentRunId" not in search.data.tags
    for run, kind in ((search, "search"), (retrain, "retrain")):
        assert run.info.status == "FINISHED"
        assert run.data.tags["istanas.kind"] == kind
        assert run.data.tags["istanas.method"] == "two_stage"
        assert run.data.tags["istanas.dataset"] == "digits"
        assert run.data.tags["istanas.genotype"] == result["digest"]
        assert run.data.params["seed"] == "0"
    assert search.data.params["search.epochs"] == str(quickstart["config"].search.epochs)
    for run, numbers in (
        (search, {"training": 719, "alphas": 719}),
        (retrain, {"training": 1438, "test": 359}),
    ):
        inputs = {tag.value: entry.dataset for entry in run.inputs.dataset_inputs for tag in entry.tags}
        assert {context: json.loads(data.profile)["num_rows"] for context, data in inputs.items()} == numbers
        assert {data.name for data in inputs.values()} == {"digits"}
    (output,) = retrain.outputs.model_outputs
    figures = {metric.key: metric.value for metric in client.get_logged_model(output.model_id).metrics}
    assert figures["test/top1"] == result["test_top1"]
    version = client.get_model_version_by_alias("istanas-digits", "candidate")
    assert version.tags["istanas.search_run"] == search.info.run_id
    assert retrain.data.metrics["test/top1"] == result["test_top1"]


@pytest.mark.parametrize(
    ("key", "section", "names"),
    [("mlflow_run_id", "search", SEARCH_METRICS), ("retrain_run_id", "retrain", RETRAIN_METRICS)],
)
def test_mlflow_has_every_metric_of_every_epoch_as_the_run_directory_has(
    quickstart: dict[str, Any], client: Any, key: str, section: str, names: set[str]
) -> None:
    run_id = quickstart["result"][key]
    assert set(client.get_run(run_id).data.metrics) == names
    path = quickstart["result"]["run_dir" if section == "search" else "retrain_run_dir"]
    lines = RunDir(quickstart["folder"] / path).metrics()
    assert [line.step for line in lines] == list(range(1, getattr(quickstart["config"], section).epochs + 1))
    for name in names:
        history = client.get_metric_history(run_id, name)
        assert [(m.step, m.value) for m in history] == [(line.step, line.metrics[name]) for line in lines]


def artifact_names(client: Any, run_id: str, folder: str | None = None) -> list[str]:
    found = []
    for entry in client.list_artifacts(run_id, folder):
        found += artifact_names(client, run_id, entry.path) if entry.is_dir else [entry.path]
    return found


def test_mlflow_has_the_artifacts(quickstart: dict[str, Any], client: Any, tmp_path: Path) -> None:
    result = quickstart["result"]
    always = {"config.yaml", "genotype.json", *FIGURES}
    assert always | {"trajectory.csv"} <= set(artifact_names(client, result["mlflow_run_id"]))
    assert always <= set(artifact_names(client, result["retrain_run_id"]))
    file = client.download_artifacts(result["mlflow_run_id"], "genotype.json", str(tmp_path))
    assert Genotype.from_json(Path(file).read_text()).digest() == result["digest"]


def test_the_model_of_mlflow_is_the_network_of_the_run_directory(
    quickstart: dict[str, Any], client: Any
) -> None:
    import mlflow

    result = quickstart["result"]
    retrain = client.get_run(result["retrain_run_id"])
    (output,) = retrain.outputs.model_outputs
    mlflow.set_tracking_uri(client.tracking_uri)
    try:
        model = mlflow.pytorch.load_model(f"models:/{output.model_id}")
    finally:
        mlflow.set_tracking_uri(None)
    network, _ = load_network(quickstart["folder"] / result["retrain_run_dir"])
    digits = load_dataset("digits")
    assert isinstance(digits.test, ArrayPictures)
    pictures = normalize(digits.test.images, digits.mean, digits.std)
    with torch.no_grad():
        logits, expected = model(pictures), network(pictures)
    assert (logits - expected).abs().max() <= 1e-5
    top1 = (logits.argmax(1) == digits.test.labels).double().mean().item()
    assert top1 == pytest.approx(result["test_top1"], abs=1e-12)


def test_results_has_both_rows_and_sync_is_safe_to_repeat(quickstart: dict[str, Any], client: Any) -> None:
    folder, result = quickstart["folder"], quickstart["result"]
    istanas(folder, ["sync", result["run_dir"]])
    istanas(folder, ["sync", result["retrain_run_dir"]])
    epochs = quickstart["config"].retrain.epochs
    assert len(client.get_metric_history(result["retrain_run_id"], "test/top1")) == epochs
    assert (
        len(client.search_logged_models([client.get_run(result["retrain_run_id"]).info.experiment_id])) == 1
    )
    istanas(folder, ["results", "--csv", "table.csv"])
    with (folder / "table.csv").open() as stream:
        rows = {row["kind"]: row for row in csv.DictReader(stream)}
    assert rows.keys() == {"search", "retrain"}
    assert rows["search"]["run_id"] == rows["retrain"]["parent_run_id"] == result["mlflow_run_id"]
    assert rows["retrain"]["run_id"] == result["retrain_run_id"]
    assert float(rows["retrain"]["test_top1"]) == result["test_top1"]
    assert int(rows["retrain"]["params"]) == result["params"]
    assert {row["genotype"] for row in rows.values()} == {result["digest"]}


def test_a_folder_of_pictures_from_end_to_end(tmp_path: Path) -> None:
    """Three digits as PNG files in one folder per class are searched and retrained."""
    from PIL import Image

    digits = load_dataset("digits")
    classes = {0: "null", 1: "one", 4: "four"}
    for split, pictures in (("train", digits.train), ("test", digits.test)):
        assert isinstance(pictures, ArrayPictures)
        for number, (image, label) in enumerate(zip(pictures.images, pictures.labels.tolist(), strict=True)):
            if label in classes:
                file = tmp_path / "pictures" / split / classes[label] / f"{number:04d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.asarray(image[0])).save(file)
    (tmp_path / "pictures.yaml").write_text(
        "data: {name: folder, root: pictures, cache_dir: cache}\n"
        "space: {nodes: 2}\n"
        "search: {epochs: 1, batch_size: 32, init_channels: 4, layers: 3, arch_lr: 0.01}\n"
        "retrain: {epochs: 4, batch_size: 32, init_channels: 4, layers: 3, lr: 0.1, auxiliary_weight: 0.0, "
        "drop_path: 0.0, cutout: 0}\n"
        "runtime: {threads: 1}\n"
        "tracking: {enabled: false}\n"
    )
    done = istanas(tmp_path, ["run", "--config", "pictures.yaml", "--json"])
    result = done.result
    assert result["test_top1"] >= 0.9
    assert "decoding pictures" in done.stderr
    card = json.loads((tmp_path / result["retrain_run_dir"] / "network.json").read_text())
    assert card["class_names"] == ["four", "null", "one"]
    assert card["preprocessing"]["shape"] == [1, 8, 8]
    # The second job decodes nothing, and another baseline uses the same cached pictures.
    baseline = ["retrain", "--genotype", "random:0", "--config", "pictures.yaml", "--set", "retrain.epochs=1"]
    done = istanas(tmp_path, [*baseline, "--json"])
    assert "decoding pictures" not in done.stderr
    assert done.result["digest"] != result["digest"]


def test_one_stage_digits_search_train_export_and_register_in_one_run(
    tmp_path: Path, repo_root: Path, blank_database: Path
) -> None:
    shutil.copy(blank_database, tmp_path / "mlflow.db")
    command = ["run", "--config", str(repo_root / "tune_configs" / "one_stage_digits.yaml"), "--json"]
    # A quarter of the configured epochs reaches the accuracy, too.
    command += ["--set", "search.max_search_epochs=3", "--set", "search.train_epochs=6"]
    result = istanas(tmp_path, command).result
    assert result["test_top1"] >= 0.96
    assert set(result["exports"]) == {"safetensors", "program", "onnx"}
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [Path(result["run_dir"]).name], (
        "no retraining"
    )
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = open_client(store)
    run = client.get_run(result["mlflow_run_id"])
    assert run.data.metrics["test/top1"] == result["test_top1"]
    assert run.data.metrics["export/onnx_difference"] < 1e-3
    version = client.get_model_version_by_alias("istanas-digits", "candidate")
    assert version.run_id == result["mlflow_run_id"]

    # The same command again repeats nothing.
    assert istanas(tmp_path, command).result == result
    assert len(client.search_model_versions("name = 'istanas-digits'")) == 1
    table = istanas(tmp_path, ["results", "--one-stage", "--json"]).result["results"]
    (row,) = table
    assert (row["genotype"], row["retrained_top1"]) == (result["digest"], None)
    assert row["one_stage_top1"] == pytest.approx(result["test_top1"])


def test_a_run_that_is_not_tracked_is_exported_without_a_store(tmp_path: Path, repo_root: Path) -> None:
    """Also if --set names its folder, since everything else comes from the run's own configuration."""
    tiny = [
        "search={max_search_epochs: 1, train_epochs: 0, batch_size: 256, init_channels: 2, layers: 3, cutout: 0}",
        "method=one_stage",
        "tracking={enabled: false, name: tiny}",
        "runtime={runs_dir: deep/runs, threads: 1}",
    ]
    istanas(tmp_path, ["search", *(f"--set={setting}" for setting in tiny)])
    istanas(tmp_path, ["export", "tiny-search", "--set", "runtime.runs_dir=deep/runs"])
    (run,) = (tmp_path / "deep" / "runs").iterdir()
    assert (run / "export" / "model.onnx").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}, "a store was created"
