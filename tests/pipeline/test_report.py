"""Tables of runs from a real store."""

import dataclasses
import io
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from istanas.errors import ConfigError
from pipeline.report import COLUMNS, results_frame, results_table
from pipeline.rundir import RunDir, RunRecord
from pipeline.tracking import MLflowTracker, open_client

RECORD = RunRecord(
    name="",
    kind="search",
    method="two_stage",
    dataset="digits",
    key="",
    params={"seed": 0},
    tags={"istanas.genotype": "0123456789abcdef"},
    description="",
    parent=None,
    status="FINISHED",
    started_ms=0,
    ended_ms=None,
    artifacts=(),
    result={},
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two searches, the older one retrained twice after the younger one had begun, and a stray run."""
    folder = tmp_path_factory.mktemp("report")
    uri = f"sqlite:///{folder}/mlflow.db"

    def deliver(name: str, experiment: str = "digits", **changes: object) -> str:
        run = RunDir(folder / name)
        run.write(dataclasses.replace(RECORD, name=name, **changes))  # type: ignore[arg-type]
        run.append_metrics(1, {"valid/top1": 0.5, "target/params": 1234.0, "target/macs": 5678.0}, 1)
        if run.read().kind == "retrain":
            run.append_metrics(2, {"test/top1": 0.9735}, 2)
        tracker = MLflowTracker(run, tracking_uri=uri, experiment=experiment)
        assert tracker.deliver()
        return str(tracker.run_id)

    deliver("old", started_ms=1_000, ended_ms=61_000, result={"seconds": 7.5})
    deliver("young", "other", started_ms=100_000, status="RUNNING")
    child = {"kind": "retrain", "parent": str(folder / "old")}
    deliver("late", started_ms=300_000, ended_ms=4_000_000, **child)  # type: ignore[arg-type]
    deliver("early", started_ms=200_000, ended_ms=260_500, **child)  # type: ignore[arg-type]
    client = open_client(uri)
    client.create_run(client.create_experiment("somebody else's"))
    return uri


def test_rows_follow_their_search(store: str) -> None:
    frame = results_frame(tracking_uri=store)
    assert list(frame["name"]) == ["young", "old", "early", "late"]
    old = frame.set_index("name").loc["old", "run_id"]
    assert list(frame["parent_run_id"].fillna("")) == ["", "", old, old]
    assert list(results_frame(tracking_uri=store, experiment="digits")["name"]) == ["old", "early", "late"]


def test_values_and_types(store: str) -> None:
    frame = results_frame(tracking_uri=store)
    assert {column: str(dtype) for column, dtype in frame.dtypes.items()} == COLUMNS
    row = frame.set_index("name").loc["early"]
    assert row["kind"] == "retrain"
    assert row["status"] == "FINISHED"
    assert row["genotype"] == "0123456789abcdef"
    assert (row["test_top1"], row["valid_top1"], row["params"], row["macs"]) == (0.9735, 0.5, 1234, 5678)
    assert row["started"] == pd.Timestamp("1970-01-01 00:03:20", tz="UTC")
    assert Path(row["run_dir"]).name == "early"
    by_name = frame.set_index("name")
    assert by_name.loc["early", "seconds"] == 60.5  # from start to end
    assert by_name.loc["old", "seconds"] == 7.5  # as the job reported
    assert pd.isna(by_name.loc["young", "seconds"])
    assert pd.isna(by_name.loc["old", "test_top1"])


def test_frame_survives_csv(store: str) -> None:
    frame = results_frame(tracking_uri=store)
    again = pd.read_csv(io.StringIO(frame.to_csv(index=False)))
    assert list(again.columns) == list(COLUMNS)
    assert list(again["params"]) == [1234] * 4


def test_table(store: str) -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(results_table(results_frame(tracking_uri=store)))
    lines = [line for line in console.export_text().splitlines() if "01234567" in line]
    assert len(lines) == 4
    assert "97.35%" in lines[2]
    assert "1 min 0 s" in lines[2]
    assert "01234567 " in lines[2]
    assert lines[1].index("old") + 2 == lines[2].index("early")


def test_no_store_is_an_empty_frame_and_stays_no_store(tmp_path: Path) -> None:
    frame = results_frame(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert len(frame) == 0
    assert {column: str(dtype) for column, dtype in frame.dtypes.items()} == COLUMNS
    assert list(tmp_path.iterdir()) == []
    console = Console(file=io.StringIO(), record=True)
    console.print(results_table(frame))
    assert "no runs yet" in console.export_text()


def test_unknown_experiment_and_dead_server(store: str) -> None:
    with pytest.raises(ConfigError, match="'nope': not in the MLflow store"):
        results_frame(tracking_uri=store, experiment="nope")
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:1: can't be read"):
        results_frame(tracking_uri="http://127.0.0.1:1")
