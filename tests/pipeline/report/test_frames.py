"""Tables of runs from a real store."""

import dataclasses
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from istanas.errors import ConfigError
from istanas.space import CellSpace, Genotype, random_genotype
from pipeline.report import (
    epochs_frame,
    genotypes_frame,
    results_frame,
    searches_frame,
    sweeps_frame,
    weights_frame,
)
from pipeline.report.columns import (
    COLUMNS,
    EPOCHS_COLUMNS,
    GENOTYPES_COLUMNS,
    SEARCHES_COLUMNS,
    SWEEPS_COLUMNS,
    WEIGHTS_COLUMNS,
)
from pipeline.report.terminal import results_table, weights_table
from pipeline.runs.directory import RunDir
from pipeline.runs.record import RunRecord
from pipeline.tracking.store import open_client
from pipeline.tracking.tracker import MLflowTracker

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
def store(tmp_path_factory: pytest.TempPathFactory, blank_database: Path) -> str:
    """Two searches, of which the older one was retrained twice after the start of the other, and an unrelated run."""
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
    """Three one-stage searches, one of them running, among other runs; "pair" has two valid retrainings."""
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
        (run.path / "mlflow.json").unlink(missing_ok=True)  # like a run that was started over
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


def types_of(frame: pd.DataFrame) -> dict[str, str]:
    return {column: str(dtype) for column, dtype in frame.dtypes.items()}


# ---------- filters
@pytest.mark.parametrize(
    ("filters", "names"),
    [
        ({"kind": "search"}, ["running", "two-stage", "pair", "alone"]),
        ({"method": "two_stage"}, ["two-stage"]),
        ({"dataset": "cifar10"}, ["other-data"]),
        ({"kind": "retrain", "dataset": "cifar10"}, ["other-data"]),
        ({"where": "metrics.`test/top1` > 0.965 and tags.`istanas.kind` = 'search'"}, ["pair"]),
        ({"where": "attributes.run_name LIKE 'pai%'"}, ["pair", "pair-retrain"]),
        ({"where": "params.seed = '0' and status = 'RUNNING'"}, ["running"]),
        ({"kind": "sweep"}, []),
    ],
)
def test_filters_select_the_runs_that_satisfy_all(
    one_stage_store: str, filters: dict[str, str], names: list[str]
) -> None:
    frame = results_frame(tracking_uri=one_stage_store, **filters)  # type: ignore[arg-type]
    assert list(frame["name"]) == names
    assert types_of(frame) == COLUMNS


def test_an_empty_filter_is_none(one_stage_store: str) -> None:
    everything = results_frame(tracking_uri=one_stage_store)
    assert len(everything) == 11
    empty = results_frame(tracking_uri=one_stage_store, where="  ", kind=None, method=None, dataset=None)
    assert list(empty["run_id"]) == list(everything["run_id"])


def test_a_run_without_its_parent_heads_a_family(one_stage_store: str) -> None:
    frame = results_frame(tracking_uri=one_stage_store, kind="retrain", where="metrics.`test/top1` < 0.98")
    assert list(frame["name"]) == ["again", "pair-retrain", "again"]  # newest first
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(results_table(frame))
    lines = [line for line in console.export_text().splitlines() if "01234567" in line]
    assert len({len(line) - len(line.lstrip()) for line in lines}) == 1


@pytest.mark.parametrize(
    "where",
    [
        "metrics.test/top1 > 0.9",
        "params.seed = 1",
        "params.seed = '1' or params.seed = '2'",
        "accuracy > 0.9",
        "'; drop",
        "metrics.`test/top1` >",
    ],
)
def test_a_condition_that_mlflow_rejects_is_a_one_line_error(store: str, where: str) -> None:
    with pytest.raises(
        ConfigError, match=r"where .*: MLflow refuses it .* write for example: metrics"
    ) as caught:
        results_frame(tracking_uri=store, where=where)
    assert "\n" not in str(caught.value)


def test_an_invalid_filter_is_rejected(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(ConfigError, match="dataset 'cifar': unknown; choose digits, cifar10"):
        results_frame(tracking_uri=uri, dataset="cifar")
    with pytest.raises(ConfigError, match="kind 'trial': unknown; choose sweep, search, retrain"):
        epochs_frame(tracking_uri=uri, kind="trial")
    with pytest.raises(ConfigError, match="method 'dart': unknown; choose two_stage, one_stage"):
        searches_frame(tracking_uri=uri, method="dart")


def test_a_wide_terminal_shows_more(store: str) -> None:
    texts = []
    for width in (80, 119, 120, 200):
        console = Console(width=width, file=io.StringIO(), record=True)
        console.print(results_table(results_frame(tracking_uri=store), width=width))
        texts.append(console.export_text())
        assert max(map(len, texts[-1].splitlines())) <= width
    assert not any("two_stage" in text or "started" in text for text in texts[:2])
    for text in texts[2:]:
        (row,) = [line for line in text.splitlines() if "early" in line]
        started = pd.Timestamp("1970-01-01 00:03:20", tz="UTC").to_pydatetime().astimezone()
        assert row.split()[-4:] == ["digits", "two_stage", *f"{started:%Y-%m-%d %H:%M}".split()]


# ---------- searches and epochs
def test_searches_have_the_results_of_their_retrainings(one_stage_store: str) -> None:
    frame = searches_frame(tracking_uri=one_stage_store, settings=["search.lr"])
    assert types_of(frame) == {**SEARCHES_COLUMNS, "search.lr": "string"}
    assert list(frame["name"]) == ["running", "two-stage", "pair", "alone"]
    by_name = frame.set_index("name")
    pair, alone = by_name.loc["pair"], by_name.loc["alone"]
    assert (pair["retrainings"], pair["retrained_test_top1"], pair["test_top1"]) == (2, 0.96, 0.97)
    assert (pair["seed"], pair["seconds"], pair["params"]) == (0, 100.0, 3_371_806)
    runs = results_frame(tracking_uri=one_stage_store).set_index("run_id")
    assert runs.loc[pair["retrain_run_id"], "name"] == "again"  # the newest
    assert alone["retrainings"] == 0
    assert pd.isna(alone["retrained_test_top1"])
    assert pd.isna(alone["search.lr"])
    few = searches_frame(tracking_uri=one_stage_store, method="two_stage")
    assert list(few["name"]) == ["two-stage"]
    # A condition applies to searches, not to their retrainings.
    (again,) = searches_frame(tracking_uri=one_stage_store, where="attributes.run_name = 'pair'").to_dict(
        "records"
    )
    assert again["retrainings"] == 2


def test_epochs_of_all_runs(store: str, one_stage_store: str) -> None:
    frame = epochs_frame(tracking_uri=store)
    assert types_of(frame) == EPOCHS_COLUMNS
    assert [*zip(frame["name"], frame["epoch"], strict=True)] == [
        ("young", 1),
        ("old", 1),
        ("early", 1),
        ("early", 2),
        ("late", 1),
        ("late", 2),
    ]
    late = frame[frame["name"] == "late"].set_index("epoch")
    assert late.loc[1, "valid/top1"] == 0.5
    assert pd.isna(late.loc[2, "valid/top1"])
    assert pd.isna(late.loc[1, "test/top1"])
    assert late.loc[2, "test/top1"] == 0.9735
    few = epochs_frame(
        tracking_uri=one_stage_store, metrics=["train/loss"], where="attributes.run_name = 'pair'"
    )
    assert list(few.columns) == [*list(EPOCHS_COLUMNS)[:6], "train/loss"]
    assert list(few["epoch"]) == list(range(1, 8))


# ---------- genotypes and sweeps
CELLS = [random_genotype(seed, CellSpace(n_nodes=2)) for seed in range(3)]


@pytest.fixture(scope="module")
def found_store(tmp_path_factory: pytest.TempPathFactory, blank_database: Path) -> str:
    """Cell 0 was found by three searches (one was started over), cell 1 by a trial; cell 2 was only retrained."""
    folder = tmp_path_factory.mktemp("found")
    uri = f"sqlite:///{shutil.copy(blank_database, folder)}"
    minutes = iter(range(1, 100))

    def deliver(name: str, cell: int, figures: dict[str, float], **changes: object) -> None:
        started = 60_000 * next(minutes)
        run = RunDir(folder / name)
        run.path.mkdir(exist_ok=True)
        (run.path / "genotype.json").write_text(CELLS[cell].to_json())
        common = {"name": name, "started_ms": started, "ended_ms": started + 30_000, "key": str(started)}
        tags, artifacts = {"istanas.genotype": CELLS[cell].digest()}, ("genotype.json",)
        given = {**common, "tags": tags, "artifacts": artifacts, **changes}
        run.write(dataclasses.replace(RECORD, **given))  # type: ignore[arg-type]
        run.replace_metrics([])
        run.append_metrics(1, figures, 1)
        (run.path / "mlflow.json").unlink(missing_ok=True)
        assert MLflowTracker(run, tracking_uri=uri, experiment="digits", models=False).deliver()

    deliver("a", 0, {"target/params": 100.0})
    deliver("a", 0, {"target/params": 100.0})
    deliver("b", 0, {"target/params": 100.0})
    deliver("c", 0, {}, dataset="cifar10")
    deliver("stopped", 1, {}, status="KILLED", artifacts=())
    deliver(
        "a-retrain", 0, {"test/top1": 0.9, "target/params": 120.0}, kind="retrain", parent=str(folder / "a")
    )
    deliver(
        "b-retrain", 0, {"test/top1": 0.8, "target/params": 110.0}, kind="retrain", parent=str(folder / "b")
    )
    deliver("random", 2, {"test/top1": 0.95, "valid/top1": 0.7}, kind="retrain")
    params = {
        "sweep.trials": 4,
        "sweep.searcher": "tpe",
        "sweep.scheduler": "asha",
        "sweep.objective": "retrained",
        "sweep.objectives": "top1,macs",
        "sweep.space.search.lr": "loguniform 0.01 .. 0.3",
        "sweep.space.search.arch_lr": "fixed 0.1",
    }
    states = {"sweep/complete": 2.0, "sweep/pruned": 1.0, "sweep/fail": 1.0, "sweep/best_top1": 0.7}
    deliver("many", 1, states, kind="sweep", params=params)
    deliver("young", 1, {}, kind="sweep", params=params, tags={}, status="RUNNING", ended_ms=None)
    deliver("trial-0000", 1, {}, parent=str(folder / "many"))
    return uri


def test_genotypes_have_the_searches_that_found_them(found_store: str) -> None:
    frame = genotypes_frame(tracking_uri=found_store)
    assert types_of(frame) == GENOTYPES_COLUMNS
    digests = [cell.digest() for cell in CELLS]
    keys = [*zip(frame["genotype"], frame["dataset"], frame["searches"], strict=True)]
    assert keys[0] == (digests[0], "digits", 2)
    assert set(keys[1:3]) == {(digests[0], "cifar10", 1), (digests[1], "digits", 1)}
    assert keys[3] == (digests[2], "digits", 0)
    often, never = frame.iloc[0], frame.iloc[3]
    names = results_frame(tracking_uri=found_store).set_index("run_id")["name"]
    assert [names[run_id] for run_id in often["found_by"].split()] == ["a", "b"]
    assert (often["retrainings"], often["best_retrained_test_top1"]) == (2, 0.9)
    assert often["mean_retrained_test_top1"] == pytest.approx(0.85)
    assert often["params"] == 110  # of the newest retraining
    assert pd.isna(often["best_retrained_valid_top1"])
    assert (never["found_by"], never["best_retrained_valid_top1"]) == ("", 0.7)
    for _, row in frame.iterrows():
        assert Genotype.from_json(row["genotype_json"]).digest() == row["genotype"]
    assert set(genotypes_frame(tracking_uri=found_store, dataset="cifar10")["genotype"]) == {digests[0]}


def test_a_genotype_whose_file_is_gone_has_no_text(one_stage_store: str) -> None:
    frame = genotypes_frame(tracking_uri=one_stage_store)
    assert frame["genotype_json"].isna().all()
    by_key = frame.set_index(["genotype", "dataset"])
    assert by_key.loc[("0123456789abcdef", "digits"), "searches"] == 3
    assert by_key.loc[("ffff", "digits"), "best_retrained_test_top1"] == 0.99


def test_sweeps(found_store: str) -> None:
    frame = sweeps_frame(tracking_uri=found_store)
    assert types_of(frame) == SWEEPS_COLUMNS
    assert list(frame["name"]) == ["young", "many"]
    many, young = frame.set_index("name").loc["many"], frame.set_index("name").loc["young"]
    assert (many["trials"], many["complete"], many["pruned"], many["failed"]) == (4, 2, 1, 1)
    assert (many["best_top1"], many["genotype"]) == (0.7, CELLS[1].digest())
    assert (many["searcher"], many["scheduler"], many["objective"]) == ("tpe", "asha", "retrained")
    assert (many["objectives"], many["space"]) == ("top1,macs", "search.arch_lr,search.lr")
    assert (young["status"], young["complete"]) == ("RUNNING", 0)
    assert pd.isna(young["best_top1"])
    assert len(sweeps_frame(tracking_uri=found_store, kind="search")) == 0
    assert "many" not in set(epochs_frame(tracking_uri=found_store)["name"])
    assert "many" not in set(searches_frame(tracking_uri=found_store)["name"])


@pytest.mark.parametrize(
    ("make", "columns"),
    [
        (searches_frame, SEARCHES_COLUMNS),
        (epochs_frame, EPOCHS_COLUMNS),
        (genotypes_frame, GENOTYPES_COLUMNS),
        (sweeps_frame, SWEEPS_COLUMNS),
    ],
)
def test_every_frame_is_typed_when_empty_and_fails_in_one_line(
    make: Callable[..., pd.DataFrame], columns: dict[str, str], store: str, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    frame = make(tracking_uri=uri)
    assert (len(frame), types_of(frame)) == (0, columns)
    assert list(tmp_path.iterdir()) == []
    nothing = make(tracking_uri=store, dataset="svhn")
    assert (len(nothing), types_of(nothing)) == (0, columns)
    with pytest.raises(ConfigError, match="'nope': not in the MLflow store"):
        make(tracking_uri=store, experiment="nope")
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:1: can't be read"):
        make(tracking_uri="http://127.0.0.1:1")
