"""A search whose measurements are trials of Ray Tune, as a user runs it: killed, resumed, and with a lost trial."""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from istanas.space import Genotype
from pipeline.report import results_frame
from pipeline.runs.directory import RunDir
from pipeline.tracking.store import open_client
from tests.in_process import istanas
from tests.integration.test_sweep import TRIAL
from tests.ray_cluster import ENVIRONMENT, PROGRAM, title
from tests.waiting import wait_until

CONFIG = """
method: measured
data: {name: digits}
space: {nodes: 1, ops: [skip_connect, sep_conv_3x3, max_pool_3x3]}
search:
  {stages: [[6, 2], [2, 3]], batch_size: 32, init_channels: 4, layers: 3, max_pictures: 400, max_concurrent: 2}
runtime: {threads: 1, device: cpu}
"""
N = 8
T = TypeVar("T")

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(CONFIG)
    return subprocess.Popen(
        [*PROGRAM, "search", "--config", "tiny.yaml", "--json", *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=(folder / "err.txt").open("a"),
        text=True,
        start_new_session=True,
    )


def run_directory(folder: Path) -> Path:
    (path,) = (folder / "runs").glob("tiny-search-*")
    return path


def measured(folder: Path) -> list[RunDir]:
    """Return the runs of the finished measurements."""
    return [RunDir(file.parent) for file in sorted(folder.glob("runs/*/measurement-*/run.json"))]


def trials_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [p for p in psutil.Process(process.pid).children(recursive=True) if TRIAL in title(p)]


def test_a_killed_search_with_a_lost_trial_makes_each_measurement_once(
    tmp_path: Path, blank_database: Path
) -> None:
    shutil.copy(blank_database, tmp_path)

    def said() -> str:
        return (tmp_path / "err.txt").read_text()

    def wait(process: subprocess.Popen[str], condition: Callable[[], T], what: str) -> T:
        return wait_until(condition, 400, what, alive=lambda: process.poll() is None, state=said)

    process = start(tmp_path)
    wait(process, lambda: len(measured(tmp_path)) >= 2, "two measurements")
    others = psutil.Process(process.pid).children(recursive=True)
    assert process.poll() is None, "it had ended before it was killed: more measurements are needed"
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs([p for p in others if TRIAL in title(p)], timeout=60)
    assert not alive, "trials outlive their search"
    for each in others:  # Ray's agents, which end later
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    before = {each.path.name: each.read().ended_ms for each in measured(tmp_path)}

    process = start(tmp_path)
    wait(process, lambda: len(measured(tmp_path)) > len(before), "another measurement")
    lost = wait(process, lambda: trials_of(process), "a trial")
    for each in lost:
        each.kill()
    out, _ = process.communicate(timeout=600)
    err = said()
    print(err)  # shown if the test fails
    assert process.returncode == 0
    result = json.loads(out)
    assert "each trial has 1 core; 2 trials fit, at most 2 at once" in err
    assert "resumed after measurement" in err
    assert "the process of a trial was lost, and its measurement is repeated: " in err
    assert f"measurement {N}: loss " in err

    runs = measured(tmp_path)
    assert [each.read().params["number"] for each in runs] == list(range(N))
    # All but the last one of the first process were not made again; that one may lack its checkpoint.
    kept = {each.path.name: each.read().ended_ms for each in runs}
    assert sum(kept[name] != ended for name, ended in before.items()) <= 1
    lines = RunDir(
        result["run_dir"] if Path(result["run_dir"]).is_absolute() else tmp_path / result["run_dir"]
    )
    assert [line.step for line in lines.metrics()] == list(range(1, N + 1))
    assert Genotype.from_dict(result["genotype"]).digest() == result["digest"]
    check_equal_to_one_by_one(tmp_path, runs)
    check_tree_in_mlflow(tmp_path, runs, result)


def check_equal_to_one_by_one(folder: Path, runs: list[RunDir]) -> None:
    """The balanced design is measured with the same losses, bit for bit, one by one in this process."""
    alone = folder / "alone"
    alone.mkdir()
    (alone / "tiny.yaml").write_text(CONFIG)
    arguments = ["search", "--config", "tiny.yaml", "--set", "search.max_concurrent=1"]
    istanas(alone, [*arguments, "--set", "search.stages=[[2, 2]]", "--set", "tracking.enabled=false"])
    whole = [line.metrics for line in RunDir(run_directory(alone)).metrics() if "valid/loss" in line.metrics]
    # Both of them are balanced, since a posterior needs two, and so are the first three of eight (30 %).
    for one_by_one, run in zip(whole[:2], runs, strict=False):
        (line,) = run.metrics()
        assert {name: one_by_one[name] for name in line.metrics} == line.metrics


def check_tree_in_mlflow(folder: Path, runs: list[RunDir], result: Any) -> None:
    client = open_client(f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'istanas'")
    found = client.search_runs([experiment.experiment_id], max_results=100)
    assert {run.info.status for run in found} == {"FINISHED"}
    children = [run for run in found if run.data.tags["istanas.kind"] == "measurement"]
    (parent,) = [run for run in found if run not in children]
    assert parent.info.run_id == result["mlflow_run_id"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    by_number = {int(run.data.params["number"]): run for run in children}
    assert sorted(by_number) == list(range(N))
    for number, run in enumerate(runs):
        child = by_number[number]
        assert child.data.params["epochs"] == ("2" if number < 6 else "3")
        architecture = Genotype.from_json(child.data.params["architecture"])
        assert architecture.digest() == child.data.tags["istanas.genotype"]
        (line,) = run.metrics()
        assert child.data.metrics == line.metrics
    frame = results_frame(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    assert list(frame["kind"]) == ["search"], "measurements are no rows of the results"
