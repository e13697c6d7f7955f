"""`istanas latency`, and searches with the table that it writes: limits, weights, and what is refused."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from istanas.errors import ConfigError
from pipeline.cli.commands import run
from pipeline.config.load import load, run_hash
from pipeline.jobs.latency import LatencyResult, print_latency
from pipeline.runs.directory import RunDir
from tests.pipeline.jobs.tiny_search import SETTINGS, search

RETRAIN = "retrain={init_channels: 8, layers: 5}"
COMMON = (RETRAIN, "search.epochs=2")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table that the command has written."""
    file = tmp_path_factory.mktemp("latency") / "table.json"
    settings = [f"--set={each}" for each in (*SETTINGS, *COMMON)]
    options = ["--threads", "1", "--device", "cpu", "--batch-size", "2", "--runs", "10"]
    assert run(["latency", *settings, *options, "--out", str(file)]) == 0
    return file


def test_the_command_writes_the_table_of_the_retraining(table: Path) -> None:
    found = json.loads(table.read_text())
    assert (found["network"]["init_channels"], found["network"]["layers"]) == (8, 5)
    assert found["picture"] == [1, 8, 8]
    assert (found["machine"]["device"], found["machine"]["threads"]) == ("cpu", 1)
    assert (found["batch_size"], found["runs"]) == (2, 10)
    assert len(found["candidates"]) == 35


def test_a_search_ends_within_a_limit_of_the_latency(table: Path, tmp_path: Path) -> None:
    with_table = (*COMMON, f"search.latency_table={table}")
    free, lines = search(tmp_path, *with_table)
    assert "latencies of another machine" not in lines
    limit = 0.8 * free["latency_ms"]
    found, lines = search(tmp_path, *with_table, f"search.max_latency_ms={limit}")
    assert found["latency_ms"] <= limit
    records = RunDir(Path(found["run_dir"])).metrics()
    assert [record.metrics["target/latency_ms"] <= limit for record in records] == [True, True]
    assert "cost weight" in lines
    weighted, _ = search(tmp_path, *with_table, "search.cost=latency", "search.cost_weight=100")
    assert weighted["latency_ms"] < free["latency_ms"]


def changed(table: Path, folder: Path, **changes: Any) -> Path:
    file = folder / "changed.json"
    file.write_text(json.dumps({**json.loads(table.read_text()), **changes}))
    return file


def test_a_changed_table_is_another_run_wherever_it_is(table: Path, tmp_path: Path) -> None:
    def digits(file: Path) -> str:
        return run_hash(load(None, [*COMMON, f"search.latency_table={file}"]), "search")

    assert digits(changed(table, tmp_path, fixed_ms=1.0)) != digits(table)
    copy = tmp_path / "copy.json"
    copy.write_bytes(table.read_bytes())
    assert digits(copy) == digits(table)


def test_a_search_warns_of_another_machine(table: Path, tmp_path: Path) -> None:
    machine = json.loads(table.read_text())["machine"] | {"device_name": "phone"}
    file = changed(table, tmp_path, machine=machine)
    _, lines = search(tmp_path / "runs", *COMMON, "search.epochs=1", f"search.latency_table={file}")
    assert "warning: search.latency_table: latencies of another machine: device phone (here " in lines


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["search.max_latency_ms=5"],
            "search.max_latency_ms: 5.0 requires a table of latencies, and search.latency_table is null",
        ),
        (["search.cost=latency"], "search.cost: latency requires a table of latencies"),
        (["search.latency_table=TABLE", "search.max_latency_ms=-1"], "search.max_latency_ms: -1 is invalid"),
        (
            ["search.latency_table=TABLE", "search.max_latency_ms=0.001"],
            "search.max_latency_ms: 0.001 is below the cheapest architecture, which has",
        ),
        (
            ["search.latency_table=TABLE", "retrain.layers=6"],
            "was measured for another network.layers, 5, and the search has 6; measure one with istanas latency",
        ),
        (["search.latency_table=TABLE", "space.nodes=3"], "another space.n_nodes, 2, and the search has 3"),
        (
            ["search.latency_table=TABLE", "space.ops=[skip_connect]", "space.sparsity=1"],
            "another space.ops, ['max_pool_3x3', 'avg_pool_3x3'",
        ),
        (
            ["search.latency_table=absent.json"],
            "search.latency_table: absent.json cannot be read (No such file",
        ),
        (["search.latency_table=README.md"], "search.latency_table: README.md is not a table of latencies"),
    ],
)
def test_a_wrong_table_or_limit_is_refused_before_any_work(
    overrides: list[str], message: str, table: Path, tmp_path: Path
) -> None:
    settings = [each.replace("TABLE", str(table)) for each in overrides]
    with pytest.raises(ConfigError) as caught:
        search(tmp_path / "runs", *COMMON, *settings)
    assert message in str(caught.value).replace(f"{table} ", "")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=absent/table.json"], "--out: absent/table.json cannot be written; name a regular file"),
        (["--out=table.json", "--set=space.name=nas_bench_201"], "retrain.layers: 4 is not 3 N + 2"),
        (["--out=table.json", "--device=cuda"], "runtime.device: cuda requires a GPU"),
        (["--out=table.json", "--runs=1"], "Invalid value for '--runs': 1 is not in the range x>=2."),
        ([], "Missing option '--out'."),
    ],
)
def test_a_table_that_cannot_be_measured_or_written_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if torch.cuda.is_available() and "--device=cuda" in arguments:
        pytest.skip("GPU: there is one")
    monkeypatch.chdir(tmp_path)
    assert run(["latency", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def printed(errors: list[float]) -> str:
    out = io.StringIO()
    candidate = {"operation": "a", "input": [4, 8, 8], "output": [4, 8, 8], "params": 0}
    latency = {"median_ms": 0.5, "lower_ms": 0.25, "upper_ms": 1.0}
    result: LatencyResult = {
        "table": "t.json",
        "candidates": [candidate | latency],
        "networks": [latency],
        "fixed_ms": 0.1,
        "scale": 1.0,
        "errors": errors,
        "spread": 0.3,
        "seconds": 2.0,
    }
    print_latency(result, Console(file=out, width=120))
    return out.getvalue()


def test_the_command_warns_of_poor_predictions() -> None:
    shown = printed([0.01, 0.02, 0.3])
    assert "check: 3 other networks are predicted with a median error of 2.0%, at most 30.0%" in shown
    assert "0.2500 to 1.0000" in shown
    assert "warning" not in shown
    assert "warning: the predictions are poor; measure again with more --runs" in printed([0.01, 0.11, 0.3])
