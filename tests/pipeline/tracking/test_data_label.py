"""Labels of data sets and names of registered models: every picture folder has its own."""

import dataclasses
from pathlib import Path

import pytest

from pipeline.jobs.settings import load_config
from pipeline.report import genotypes_frame, results_frame
from pipeline.runs.directory import RunDir
from pipeline.runs.record import DatasetUse, RunRecord, data_label
from pipeline.tracking.model_registry import registered_name
from pipeline.tracking.store import open_client
from pipeline.tracking.tracker import MLflowTracker

RECORD = RunRecord(
    name="x",
    kind="retrain",
    method="two_stage",
    dataset="folder",
    key="",
    params={"data.root": "/data/Pets/my cats"},
    tags={},
    description="",
    parent=None,
    status="FINISHED",
    started_ms=1000,
    ended_ms=2000,
    artifacts=(),
    result={},
)


def named(**changes: object) -> str:
    return registered_name(None, dataclasses.replace(RECORD, **changes))  # type: ignore[arg-type]


def test_own_pictures_are_named_by_the_last_parts_of_their_folder() -> None:
    assert named().startswith("istanas-pets-my-cats-")
    assert named(params={"data.root": "/other/Pets/my cats"}).startswith("istanas-pets-my-cats-")
    assert named(params={"data.root": "/other/Pets/my cats"}) != named()
    assert named(params={"data.root": "/data/Pets/dogs"}) != named()


def test_names_of_built_in_data_sets_and_given_names_stay() -> None:
    assert named(dataset="cifar10") == "istanas-cifar10"
    assert named(params={}) == "istanas-folder"
    assert registered_name("mine", RECORD) == "mine"


def delivered(folder: Path, root: str) -> str:
    """Deliver a finished retraining of the pictures in a folder; returns its MLflow run id."""
    name = Path(root).name
    run = RunDir(folder / name)
    source = f"/data/{root}"
    use = DatasetUse(data_label("folder", source), "test", 16 * "a", source, 10, 2, (1, 8, 8))
    record = dataclasses.replace(
        RECORD,
        **{"name": name, "key": root, "datasets": (use,), "params": {"data.root": source}},
        tags={"istanas.genotype": 64 * "a"},
    )
    run.write(record)
    tracker = MLflowTracker(run, tracking_uri=f"sqlite:///{folder}/mlflow.db", experiment="x", models=False)
    assert tracker.deliver()
    return str(tracker.run_id)


def test_mlflow_and_the_frames_name_own_pictures_by_their_folder(tmp_path: Path) -> None:
    uri, ids = f"sqlite:///{tmp_path}/mlflow.db", [delivered(tmp_path, root) for root in ("cats", "dogs")]
    names = [data_label("folder", f"/data/{root}") for root in ("cats", "dogs")]
    inputs = [open_client(uri).get_run(run_id).inputs.dataset_inputs for run_id in ids]
    assert [each[0].dataset.name for each in inputs] == names
    for frame in (results_frame(tracking_uri=uri), genotypes_frame(tracking_uri=uri)):
        assert sorted(frame["dataset"]) == names
    (one,) = results_frame(tracking_uri=uri, dataset=names[0])["name"]
    assert one == "cats"
    assert len(results_frame(tracking_uri=uri, dataset="folder")) == 2


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("sweep-1/best/config.yaml", "x-best"),
        ("sweep-1/config.yaml", "x"),
        ("mine/config.yaml", "config"),
        ("sweep-1/other.yaml", "other"),
        ("best/config.yaml", "config"),
    ],
)
def test_a_runs_own_configuration_is_named_for_the_run(file: str, name: str, tmp_path: Path) -> None:
    RunDir(tmp_path / "sweep-1").write(RECORD)
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("seed: 1\n")
    assert load_config(str(path), ())[1] == name
