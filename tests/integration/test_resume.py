"""Invariant 1: a run that is killed at any moment and resumed equals an undisturbed run bit for bit."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.in_process import istanas
from tests.ray_cluster import PROGRAM

CONFIG = """
space: {nodes: 2}
data: {crop_padding: 1}
search: {epochs: 6, batch_size: 32, init_channels: 4, layers: 3, max_pictures: 400, arch_lr: 0.05, cutout: 2}
retrain: {epochs: 6, batch_size: 64, init_channels: 4, layers: 3, auxiliary_weight: 0.4, drop_path: 0.2, cutout: 2}
runtime: {threads: 1, device: cpu}
tracking: {models: false}
"""
EPOCHS = 6
EPOCHS_BEFORE_KILL = (0, 1, 2)  # few enough that the kill comes before the phase's end
RUN = ["run", "--config", "killed.yaml"]
ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "1"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run_to_the_end(folder: Path) -> dict[str, Any]:
    """Run to the end in this process, which saves the start of another one, and return the result."""
    result: dict[str, Any] = istanas(folder, [*RUN, "--json"]).result
    return result


def run_and_kill(folder: Path, phase: str, new_epochs: int, epoch_fraction: float) -> int:
    """Start the run, wait for some epochs of a phase and a part of the next one, and kill it.

    Returns:
        Number of the phase's epochs in metrics.jsonl after the kill.
    """
    process = subprocess.Popen(
        [*PROGRAM, *RUN], cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    in_phase, seen, seconds = False, 0, 1.0  # assumed for the time before the first epoch
    try:
        for line in process.stdout:
            in_phase = in_phase or line.startswith(f"{phase}: runs")
            found = re.match(r"epoch (\d+): .* ([\d.]+) s(?: \(|$)", line)
            if in_phase and found:
                seen, seconds = seen + 1, float(found[2])
            if in_phase and seen == new_epochs:
                time.sleep(epoch_fraction * seconds)  # the random moment
                break
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert process.returncode == -signal.SIGKILL, "the run was over before the kill"
    (path,) = (folder / "runs").glob(f"*-{phase}-*")
    assert json.loads((path / "run.json").read_text())["status"] == "RUNNING"
    metrics = path / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def decided_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["timestamp_ms"], line["metrics"]["images_per_second"]
    return lines


def test_a_run_killed_at_random_moments_equals_an_undisturbed_one(
    tmp_path: Path, blank_database: Path
) -> None:
    """It is killed once in each phase; `make chaos` kills a search and a retraining at three moments each."""
    seed = int(os.environ.get("ISTANAS_KILL_SEED", random.SystemRandom().randrange(10**6)))
    print(f"moments of the kills: ISTANAS_KILL_SEED={seed}")
    moments = random.Random(seed)
    folders = {name: tmp_path / name for name in ("whole", "killed")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "killed.yaml").write_text(CONFIG)
        shutil.copy(blank_database, folder)
    whole = run_to_the_end(folders["whole"])

    for phase in ("search", "retrain"):
        lines = run_and_kill(folders["killed"], phase, moments.choice(EPOCHS_BEFORE_KILL), moments.random())
        print(f"killed in {phase} after {lines} epochs")
    killed = run_to_the_end(folders["killed"])

    assert killed["digest"] == whole["digest"]
    assert killed["genotype"] == whole["genotype"]
    assert killed["test_top1"] == whole["test_top1"]
    for key in ("run_dir", "retrain_run_dir"):
        assert killed[key] == whole[key]
        ends = [folder / whole[key] for folder in folders.values()]
        one, other = map(decided_metrics, ends)
        assert one == other
        assert [line["step"] for line in other] == list(range(1, EPOCHS + 1)), "a line is duplicated or lost"
        for name in ("genotype.json", "trajectory.csv", "codes.csv", "model.safetensors", "config.yaml"):
            contents = [(end / name).read_bytes() if (end / name).exists() else None for end in ends]
            assert contents[0] == contents[1], name
    assert (folders["killed"] / killed["retrain_run_dir"] / "model.safetensors").stat().st_size > 0
    assert (folders["killed"] / killed["run_dir"] / "trajectory.csv").stat().st_size > 0
    search = decided_metrics(folders["whole"] / whole["run_dir"])
    changes = [line["metrics"]["recovery/support_changes"] for line in search]
    assert sum(changes) > 0, "the architecture never changes, so that the test could not notice a loss"
    check_mlflow(folders["killed"], killed)


def check_mlflow(folder: Path, result: dict[str, Any]) -> None:
    """Check that every run exists once and is FINISHED, with the metrics of metrics.jsonl, each once per epoch."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("istanas")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.run_id for run in runs} == {result["mlflow_run_id"], result["retrain_run_id"]}
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run_id, key in ((result["mlflow_run_id"], "run_dir"), (result["retrain_run_id"], "retrain_run_dir")):
        lines = [
            json.loads(line) for line in (folder / result[key] / "metrics.jsonl").read_text().splitlines()
        ]
        for name in lines[-1]["metrics"]:
            found = [(m.step, m.value) for m in client.get_metric_history(run_id, name)]
            assert found == [(line["step"], line["metrics"][name]) for line in lines], name
