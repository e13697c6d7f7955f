"""Tables of runs from a real store."""

import dataclasses
import io
import shutil
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from istanas.errors import ConfigError
from pipeline.report import (
    COLUMNS,
    WEIGHTS_COLUMNS,
    results_frame,
    results_table,
    weights_frame,
    weights_table,
)
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
def blank_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without runs, to be copied: making one takes seconds."""
    file = tmp_path_factory.mktemp("blank") / "mlflow.db"
    open_client(f"sqlite:///{file}")
    return file


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, blank_database: Path) -> str:
    """Two searches, the older one retrained twice after the younger one had begun, and a stray run."""
    folder = tmp_path_factory.mktemp("report")
    uri = f"sqlite:///{shutil.copy(blank_database, folder)}"

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


@pytest.fixture(scope="module")
def one_stage_store(tmp_path_factory: pytest.TempPathFactory, blank_database: Path) -> str:
    """Three one-stage searches, one of them running, among other runs; "pair" has three retrainings that count."""
    folder = tmp_path_factory.mktemp("one_stage")
    uri = f"sqlite:///{shutil.copy(blank_database, folder)}"
    minutes = iter(range(1, 100))

    def deliver(name: str, top1: float, epochs: int = 1, **changes: object) -> None:
        started = 60_000 * next(minutes)
        times = {"started_ms": started, "ended_ms": started + 30_000, "key": str(started)}
        run = RunDir(folder / name)
        run.write(dataclasses.replace(RECORD, **{"name": name, "method": "one_stage", **times, **changes}))  # type: ignore[arg-type]
        run.replace_metrics([])
        for epoch in range(1, epochs + 1):
            run.append_metrics(epoch, {"train/loss": 1.0, "target/params": 3_371_806.0}, epoch)
        run.append_metrics(epochs, {"test/top1": top1}, epochs)
        (run.path / "mlflow.json").unlink(missing_ok=True)  # as a run that was started over
        assert MLflowTracker(run, tracking_uri=uri, experiment="digits").deliver()

    child = {"kind": "retrain", "parent": str(folder / "pair")}
    deliver("alone", 0.9)
    deliver("pair", 0.97, epochs=7, result={"seconds": 100.0})
    deliver("two-stage", 0.5, method="two_stage")
    deliver("again", 0.1, **child)  # type: ignore[arg-type]
    deliver("pair-retrain", 0.9735, epochs=5, **child)  # type: ignore[arg-type]
    deliver("again", 0.96, **child)  # type: ignore[arg-type]
    deliver("failed", 0.99, status="FAILED", **child)  # type: ignore[arg-type]
    deliver("other-cell", 0.99, tags={"istanas.genotype": "ffff"}, **child)  # type: ignore[arg-type]
    deliver("other-data", 0.99, dataset="cifar10", **child)  # type: ignore[arg-type]
    deliver("orphan", 0.99, kind="retrain")
    deliver("running", 0.6, status="RUNNING")
    return uri


def test_one_stage_searches_are_results_with_a_test_figure(one_stage_store: str) -> None:
    frame = results_frame(tracking_uri=one_stage_store).set_index("name")
    assert frame.loc["pair", "kind"] == "search"
    assert frame.loc["pair", "method"] == "one_stage"
    assert frame.loc["pair", "test_top1"] == 0.97
    assert frame.loc["running", "status"] == "RUNNING"


def test_weights_against_retrained(one_stage_store: str) -> None:
    frame = weights_frame(tracking_uri=one_stage_store)
    assert {column: str(dtype) for column, dtype in frame.dtypes.items()} == WEIGHTS_COLUMNS
    assert list(frame["name"]) == ["pair", "pair", "alone"]
    assert list(frame["retrain_name"].fillna("")) == ["pair-retrain", "again", ""]
    assert list(frame["genotype"]) == ["0123456789abcdef"] * 3
    assert list(frame["one_stage_top1"]) == [0.97, 0.97, 0.9]
    assert list(frame["retrained_top1"].fillna(0)) == [0.9735, 0.96, 0]  # "again" as it was started over
    assert list(frame["difference"].round(6).fillna(0)) == [0.0035, -0.01, 0]
    assert list(frame["one_stage_epochs"]) == [7, 7, 1]
    assert list(frame["retrained_epochs"].fillna(0)) == [5, 1, 0]
    assert list(frame["one_stage_params"]) == [3_371_806] * 3
    assert list(frame["one_stage_seconds"]) == [100.0, 100.0, 30.0]
    assert list(frame["retrained_seconds"].fillna(0)) == [30.0, 30.0, 0]
    runs = results_frame(tracking_uri=one_stage_store).set_index("run_id")
    assert list(runs.loc[frame["run_id"], "name"]) == ["pair", "pair", "alone"]
    assert list(runs.loc[frame["retrain_run_id"].dropna(), "name"]) == ["pair-retrain", "again"]


def test_weights_table(one_stage_store: str) -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(weights_table(weights_frame(tracking_uri=one_stage_store, experiment="digits")))
    text = console.export_text()
    rows = [line.split() for line in text.splitlines() if line.strip() and "─" not in line][2:]
    assert rows == [
        ["pair", "01234567", "97.00%", "3,371,806", "7", "1", "min", "40", "s"],
        ["pair-retrain", "97.35%", "+0.35", "3,371,806", "5", "30.0", "s"],
        ["again", "96.00%", "-1.00", "3,371,806", "1", "30.0", "s"],
        ["alone", "01234567", "90.00%", "3,371,806", "1", "30.0", "s"],
        ["not", "retrained", "yet"],
    ]
    assert max(len(line) for line in text.splitlines()) <= 80


def test_no_one_stage_search_is_an_empty_table(store: str, tmp_path: Path) -> None:
    for uri in (store, f"sqlite:///{tmp_path}/mlflow.db"):
        frame = weights_frame(tracking_uri=uri)
        assert len(frame) == 0
        assert {column: str(dtype) for column, dtype in frame.dtypes.items()} == WEIGHTS_COLUMNS
    assert list(tmp_path.iterdir()) == []
    console = Console(file=io.StringIO(), record=True)
    console.print(weights_table(frame))
    assert "no finished one-stage search yet" in console.export_text()
    with pytest.raises(ConfigError, match="'nope': not in the MLflow store"):
        weights_frame(tracking_uri=store, experiment="nope")


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
