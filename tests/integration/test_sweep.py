"""Sweeps as a user runs them: an undisturbed one, a killed one, and one whose trials have workers."""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from PIL import Image

from istanas.errors import ConfigError
from pipeline.cli.commands import run
from pipeline.config.load import load
from pipeline.report.trials import COLUMNS, read_table, trials_table
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import STUDY_FILE
from pipeline.tracking.store import open_client
from tests.in_process import Done, istanas
from tests.pipeline.report.pages import Page
from tests.ray_cluster import ENVIRONMENT, PROGRAM, RayCluster, title
from tests.waiting import wait_until
from tests.warm import warm_program

TRIALS = 5
TRIAL = "ray::ImplicitFunc"  # title of a trial's process in Ray Tune
CONFIG = f"""
data: {{name: digits, holdout: 0.2}}
space: {{nodes: 1, ops: [skip_connect, sep_conv_3x3]}}
search: {{epochs: 4, batch_size: 64, init_channels: 4, layers: 3, arch_lr: 0.01}}
retrain: {{epochs: 1, batch_size: 64, init_channels: 4, layers: 3, auxiliary_weight: 0, drop_path: 0, cutout: 0}}
runtime: {{threads: 1, device: cpu}}
sweep:
  trials: {TRIALS}
  objective: retrained
  max_concurrent: 1
  max_restarts: 9
  grace_epochs: 2
  reduction_factor: 2
  space:
    search.lr: {{loguniform: [0.002, 0.3]}}
    space.sparsity: {{int: [1, 2]}}
  points: [{{search.lr: 0.002}}, {{search.lr: 0.1}}, {{search.lr: 0.002}}]
"""

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1200)]


def start(
    folder: Path, *arguments: str, program: Sequence[str] = PROGRAM, stderr: Any = subprocess.PIPE
) -> subprocess.Popen[str]:
    (folder / "tiny.yaml").write_text(CONFIG)
    return subprocess.Popen(
        [*program, "sweep", "--config", "tiny.yaml", "--json", *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


def run_to_the_end(folder: Path) -> Any:
    """Run a sweep whose processes are not looked at."""
    return finish(start(folder, program=warm_program()))


def finish(process: subprocess.Popen[str]) -> Any:
    """Wait for the command, and return the JSON object on its stdout."""
    out, err = process.communicate(timeout=800)
    assert process.returncode == 0, err
    print(err)  # shown if the test fails
    (line,) = out.splitlines()
    return json.loads(line)


def again(folder: Path, *arguments: str, code: int = 0) -> Done:
    """Run the command in this process, if it finds the sweep finished or rejects it, and so does not start Ray."""
    return istanas(folder, ["sweep", "--config", "tiny.yaml", "--json", *arguments], code)


def sweep_directory(folder: Path) -> Path:
    # Runs of the best trial's configuration also have the sweep's name.
    (path,) = (path for path in (folder / "runs").glob("tiny-sweep-*") if "-best-" not in path.name)
    return path


def table(folder: Path) -> pd.DataFrame:
    try:
        return read_table(sweep_directory(folder))
    except (ValueError, ConfigError):  # nothing there yet
        return pd.DataFrame({"state": []})


def decided(folder: Path) -> list[dict[str, Any]]:
    """Return the trials' table without times, folders and MLflow's run ids."""
    clocks = ["seconds", "retrain_seconds", "run_dir", "retrain_dir", "mlflow_run_id"]
    frame = table(folder).drop(columns=clocks)
    rows: list[dict[str, Any]] = json.loads(frame.to_json(orient="records"))
    return rows


def n_ended(folder: Path) -> int:
    """Return the number of trials that have ended; -1 before the first one has begun."""
    states = list(table(folder)["state"])
    return len([state for state in states if state != "RUNNING"]) if states else -1


def log_of(folder: Path, trial: int) -> str:
    """Return what a trial has written, which is nothing before it begins."""
    files = folder.glob(f"runs/tiny-sweep-*/trial-{trial:04d}-*/trial.log")
    return "".join(file.read_text() for file in files)


def kill_driver(process: subprocess.Popen[str], ready: Callable[[], bool], seconds: float) -> None:
    """Kill the command some seconds after a condition; its trials must end by themselves and release their locks."""
    wait_until(ready, 300, "the trials that end before the kill")
    time.sleep(seconds)  # the random moment
    others = psutil.Process(process.pid).children(recursive=True)
    assert process.poll() is None, "it had ended before it was killed: more trials are needed"
    process.kill()
    process.communicate()
    trials = [p for p in others if TRIAL in title(p)]
    _, alive = psutil.wait_procs(trials, timeout=60)
    assert not alive, "trials outlive their driver"
    for each in others:  # Ray's agents, which end later
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


def running_trials(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [p for p in psutil.Process(process.pid).children(recursive=True) if TRIAL in title(p)]


@pytest.fixture
def project(tmp_path: Path, blank_database: Path) -> Path:
    """A folder with an MLflow database without runs."""
    shutil.copy(blank_database, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, blank_database: Path) -> tuple[Path, Any]:
    """An undisturbed sweep: its folder and its result."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copy(blank_database, folder)
    return folder, run_to_the_end(folder)


def runs_of(folder: Path) -> list[Any]:
    client = open_client(f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'istanas'")
    return list(client.search_runs([experiment.experiment_id], max_results=1000))


def test_sweep_pages_link_to_runs_on_disk_and_to_no_file_in_mlflow(
    whole: tuple[Path, Any], tmp_path: Path
) -> None:
    """MLflow's copies of the pages are read without the run directory, where links to files would be broken."""
    folder, _ = whole
    sweep, frame = sweep_directory(folder), table(folder)
    done = frame[frame["state"] == "COMPLETE"]
    reports = {f"{Path(run).name}/report.html" for run in [*done["run_dir"], *done["retrain_dir"]]}
    for name, other in (("report.html", "sweep.html"), ("sweep.html", "report.html")):
        page = Page(sweep / name)
        assert len(page.trials) == TRIALS
        assert set(page.files) == reports | {other, "trials.csv"}
        assert all((sweep / file).is_file() for file in page.files)
    client = open_client(f"sqlite:///{folder / 'mlflow.db'}")
    seen = set()
    for each in runs_of(folder):
        names = {file.path for file in client.list_artifacts(each.info.run_id)}
        for name in names & {"report.html", "trajectory.html", "sweep.html"}:
            page = Page(Path(client.download_artifacts(each.info.run_id, name, str(tmp_path))))
            assert page.files == [], (name, each.info.run_name)
            seen.add((each.data.tags["istanas.kind"], name))
    assert seen == {
        *((kind, "report.html") for kind in ("sweep", "search", "retrain")),
        *(("sweep", "sweep.html"), ("search", "trajectory.html")),
    }


def test_a_sweep_is_one_tree_in_mlflow_without_a_test_metric(whole: tuple[Path, Any]) -> None:
    folder, result = whole
    frame = table(folder)
    assert list(frame["trial"]) == list(range(TRIALS))
    assert (result["complete"], result["pruned"], result["failed"]) == (
        (frame["state"] == "COMPLETE").sum(),
        (frame["state"] == "PRUNED").sum(),
        0,
    )
    assert result["pruned"] >= 1
    assert result["complete"] >= 2

    runs = runs_of(folder)
    by_id = {run.info.run_id: run for run in runs}
    (parent,) = [run for run in runs if run.data.tags["istanas.kind"] == "sweep"]
    trials = [run for run in runs if run.data.tags["istanas.kind"] == "search"]
    cells = [run for run in runs if run.data.tags["istanas.kind"] == "retrain"]
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {parent.info.run_id}
    assert sorted(int(run.data.tags["istanas.trial"]) for run in trials) == list(range(TRIALS))
    finished = {run.info.run_id for run in trials if run.info.status == "FINISHED"}
    assert len(finished) == result["complete"]
    assert sum(run.info.status == "KILLED" for run in trials) == result["pruned"]
    assert sum(run.data.tags["istanas.outcome"] == "PRUNED" for run in trials) == result["pruned"]
    directories = {run.info.run_id: Path(run.data.tags["istanas.run_dir"]) for run in trials}
    for cell in cells:  # they name the trial whose genotype they retrain
        trial = directories[cell.data.tags["mlflow.parentRunId"]]
        origin = f"{trial.parent.name}/{trial.name}"
        assert cell.data.tags["istanas.genotype_from"] == origin
        assert f"- genotype from: `{origin}`" in cell.data.tags["mlflow.note.content"]
        report = Page(Path(cell.data.tags["istanas.run_dir"]) / "report.html").text
        assert f"Retraining on digits, genotype from {origin}, ended" in report
    assert {run.data.tags["mlflow.parentRunId"] for run in cells} <= finished
    assert len(cells) == frame.loc[frame["state"] == "COMPLETE", "digest"].nunique()
    assert frame["reused"].fillna(False).sum() == result["complete"] - len(cells)
    for trial in trials:
        row = frame.set_index("trial").loc[int(trial.data.tags["istanas.trial"])]
        assert trial.data.tags["istanas.trial_state"] == row["state"]
        assert float(trial.data.params["search.lr"]) == row["search.lr"]
        assert trial.data.metrics["valid/top1"] == row["valid_top1"]
        assert by_id[row["mlflow_run_id"]] is trial
    assert not any(name.startswith("test/") for run in runs for name in run.data.metrics)
    assert parent.data.metrics["sweep/best_top1"] == result["objective_top1"] == frame["retrained_top1"].max()

    client = open_client(f"sqlite:///{folder / 'mlflow.db'}")
    names = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert names >= {"config.yaml", "trials.csv", "sweep.html", "report.html", "plots", "best"}
    assert not client.search_registered_models(), "networks of a sweep are not registered as candidates"


def test_the_best_trial_can_be_retrained_and_the_table_exported(
    whole: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, result = whole
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "150")
    best = Path(result["run_dir"]) / "best"
    config = load(best / "config.yaml")
    assert (config.data.holdout, config.retrain.test_every, config.sweep) == (0, 1, None)
    assert config.search.lr == result["settings"]["search.lr"]
    arguments = [
        "retrain",
        "--genotype",
        f"{best}/genotype.json",
        "--config",
        f"{best}/config.yaml",
        "--json",
    ]
    assert run([*arguments, "--set", "retrain.epochs=1", "--set", "tracking.enabled=false"]) == 0
    retrained = json.loads(capsys.readouterr().out)
    assert retrained["digest"] == result["digest"]
    assert 0 <= retrained["test_top1"] <= 1

    assert run(["results", "--sweep", "tiny-sweep", "--csv", "out.csv"]) == 0
    columns = list(pd.read_csv("out.csv").columns)
    assert columns == ["trial", "state", "search.lr", "space.sparsity", *list(COLUMNS)[2:]]
    assert run(["results", "--sweep", Path(result["run_dir"]).name]) == 0
    assert "pruned" in capsys.readouterr().out
    # The same command again is done at once.
    assert run(["sweep", "--config", "tiny.yaml", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == result
    assert "already finished" in err


def test_a_finished_sweep_restores_damaged_metrics(whole: tuple[Path, Any]) -> None:
    folder, result = whole
    metrics = sweep_directory(folder) / "metrics.jsonl"
    before = metrics.read_bytes()
    metrics.write_bytes(b"\x00" + before)
    record = (metrics.parent / "run.json").read_bytes()
    study = folder / "runs" / STUDY_FILE
    study.rename(folder / "elsewhere")
    assert re.fullmatch(
        r"error: \S+/metrics.jsonl: line 1 is not a line of metrics, .*: no such file\); restore it, .*",
        again(folder, code=1).stderr.strip(),
    )
    assert not study.exists()
    (folder / "elsewhere").rename(study)
    assert again(folder).result == result
    assert metrics.read_bytes() == before
    assert (metrics.parent / "run.json").read_bytes() == record


def test_a_sweep_killed_at_random_moments_gives_the_undisturbed_trials(
    whole: tuple[Path, Any], project: Path
) -> None:
    seed = random.randrange(10**6)
    print(f"moments drawn with seed {seed}")
    moments = random.Random(seed)
    # A trial's own process is killed, which is replaced. Then the command is killed.
    process = start(project, stderr=subprocess.DEVNULL)
    killed = wait_until(lambda: running_trials(process), 300, "a trial's process")
    time.sleep(moments.uniform(0, 2))
    killed += running_trials(process)
    for each in set(killed):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    wait_until(lambda: set(running_trials(process)) - set(killed), 300, "another process of a trial")
    kill_driver(process, lambda: n_ended(project) >= 1, moments.uniform(0, 2))
    # Ctrl-C, as a terminal sends it, in the last trial.
    process = start(project)
    wait_until(lambda: "epoch 1:" in log_of(project, TRIALS - 1), 600, "the last trial's first epoch")
    others = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines()[-1]) == (
        130,
        "interrupted: run the same command again to resume",
    )
    assert not psutil.wait_procs(others, timeout=10)[1]
    frame = table(project)
    assert list(frame["state"])[-1] == "INTERRUPTED"
    assert trials_table(frame).rows[-1][1] == "interrupted, resumable"
    (parent,) = [r for r in runs_of(project) if r.data.tags["istanas.kind"] == "sweep"]
    assert {r.info.status for r in runs_of(project)} <= {"FINISHED", "KILLED", "FAILED"}
    assert (parent.info.status, parent.data.tags["istanas.outcome"]) == ("FAILED", "INTERRUPTED")
    (trial,) = [r for r in runs_of(project) if r.data.tags.get("istanas.trial") == str(TRIALS - 1)]
    assert trial.data.tags["istanas.outcome"] in ("INTERRUPTED", "FINISHED")  # FINISHED in its retraining
    result = run_to_the_end(project)

    folder, undisturbed = whole
    assert decided(project) == decided(folder)
    for key in ("best_trial", "settings", "digest", "objective_top1", "kendall_tau", "epochs", "params"):
        assert result[key] == undisturbed[key]
    runs = runs_of(project)
    assert len(runs) == len(runs_of(folder)), "runs were duplicated or lost"
    assert {run.info.status for run in runs} == {"FINISHED", "KILLED"}
    for path in sweep_directory(project).glob("*/metrics.jsonl"):
        steps = [line.step for line in RunDir(path.parent).metrics()]
        assert steps == list(range(1, len(steps) + 1))


def test_trials_of_two_workers_on_two_cores_run_one_after_another(project: Path) -> None:
    """The first loses a worker, and the second is stopped early. Both release their cores for the next one."""
    process = start(
        project,
        *("--workers", "2", "--max-concurrent", "2"),
        *("--set", "sweep.trials=3", "--set", "sweep.objective=valid"),
        *("--set", "sweep.space={search.lr: {uniform: [0.001, 0.3]}}"),
        *("--set", "sweep.points=[{search.lr: 0.2}, {search.lr: 0.002}, {search.lr: 0.1}]"),
    )
    other = RayCluster(1)  # the sweep must not use another Ray cluster of this machine
    try:
        # The worker is looked up before the first epoch ends, since two epochs take half a second.
        wait_until(lambda: "2 workers (cpu" in log_of(project, 0), 300, "the first trial's workers")
        family = psutil.Process(process.pid).children(recursive=True)
        worker = next(p for p in family if "RayTrainWorker" in title(p))
        wait_until(lambda: "epoch 1:" in log_of(project, 0), 300, "the first trial's first epoch")
        worker.kill()
        result = finish(process)
    finally:
        other.close()
    assert re.search(r"lost worker \d .*: replacing it and repeating the epoch", log_of(project, 0))
    frame = table(project)
    assert list(frame["state"]) == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert (result["complete"], result["pruned"], result["failed"]) == (2, 1, 0)
    statuses = [run.info.status for run in runs_of(project)]
    assert sorted(statuses) == ["FINISHED", "FINISHED", "FINISHED", "KILLED"]
    logs = [file.read_text() for file in sweep_directory(project).glob("trial-*/trial.log")]
    assert sum("2 workers (cpu, gloo), each 1 thread" in log for log in logs) == 3


def test_trials_fail_alone_and_changed_training_pictures_are_refused(project: Path) -> None:
    """The first trial loses its process, the second one is complete, and the third one's loss becomes too large.

    Training pictures must stay the same even if the trials share no split, because the seed is swept. The test split,
    which a sweep does not read, may change.
    """
    for split in ("train", "test"):
        for shade, name in enumerate(("ant", "bee")):
            for number in range(16):
                file = project / "pictures" / split / name / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 200 * shade + number).save(file)
    arguments = [
        *("--set", f"data.root={project / 'pictures'}", "--set", "data.name=folder"),
        *("--set", f"data.cache_dir={project / 'cache'}"),
        *("--set", "search={epochs: 30, batch_size: 8, init_channels: 2, layers: 3, grad_clip: null}"),
        *("--set", "sweep.space={seed: {choice: [1, 2]}, search.lr: {uniform: [0.1, 1000]}}"),
        *("--set", "sweep.points=[{search.lr: 0.1}, {search.lr: 0.1}, {search.lr: 1000}]"),
        *("--set", "sweep.trials=3", "--set", "sweep.scheduler=none", "--set", "sweep.objective=valid"),
        *("--set", "sweep.max_restarts=0", "--set", "runtime.max_loss=100"),
    ]
    process = start(project, *arguments)
    # A process that is only warmed up has no trial to lose.
    wait_until(lambda: log_of(project, 0), 300, "the first trial's log")
    for each in running_trials(process):
        each.kill()
    result = finish(process)
    frame = table(project)
    assert list(frame["state"]) == ["FAIL", "COMPLETE", "FAIL"]
    assert re.match(
        r"its process was lost more than 0 times \(sweep.max_restarts\): .*(worker process|actor) .*died",
        frame["reason"][0],
    )
    assert re.match(r"DivergedError: training loss is .*, above max_loss = 100: ", frame["reason"][2])
    found = [(run.data.tags["istanas.kind"], run.info.status) for run in runs_of(project)]
    assert sorted(found) == [*[("search", "FAILED")] * 2, ("search", "FINISHED"), ("sweep", "FINISHED")]

    record = RunDir(sweep_directory(project)).read()
    assert record.datasets == ()
    assert record.pictures[0].startswith(
        "folder: 32 training and 32 test pictures of 2 classes, 8x8 pixels, grey"
    )
    trial = RunDir(Path(project / result["best_run_dir"])).read()
    assert trial.data_digest == record.data_digest
    (project / "pictures" / "test" / "ant" / "0.png").unlink()
    assert again(project, *arguments).result["digest"] == result["digest"]
    file = project / "pictures" / "train" / "ant" / "0.png"
    file.rename(project / "pictures" / "train" / "bee" / "16.png")
    for status in ("FINISHED", "RUNNING"):
        RunDir(sweep_directory(project)).write(dataclasses.replace(record, status=status))
        assert (
            "error: data set folder has changed since this run began; restore it, start over with --fresh"
            in again(project, *arguments, code=1).stderr
        )
