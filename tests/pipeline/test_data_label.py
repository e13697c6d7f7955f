"""What a registered model is called: own pictures by their folder, no two data sets alike."""

import dataclasses
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.registry import registered_name
from pipeline.rundir import RunDir, RunRecord

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
    assert cli._load(str(path), ())[1] == name
