"""The guide's page on plugins: its blocks run, and its plugin works in every kind of job, as built-ins do."""

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.plugins import load_plugins
from pipeline.runs.directory import RunDir
from tests import in_process
from tests.ray_cluster import ENVIRONMENT, PROGRAM
from tests.test_docs import ROOT, run_blocks, runnable_blocks
from tests.waiting import poll
from tests.warm import warm_program

GUIDE = "docs/extending.md"
CONFIG = """
data: {name: numpy, root: digits.npz, holdout: 0.1}
space: {name: mobile_chain, blocks: 3}
search: {epochs: 3, batch_size: 64, init_channels: 4, max_pictures: 300}
retrain: {epochs: 2, init_channels: 4, cutout: 0}
runtime: {threads: 1, device: cpu}
"""
ONE_STAGE = """
method: one_stage
data: {name: numpy, root: digits.npz}
space: {name: mobile_chain, blocks: 3}
search: {max_search_epochs: 2, train_epochs: 1, batch_size: 64, init_channels: 4, max_pictures: 300, cutout: 0}
retrain: {op_batchnorm: true, cutout: 0}
runtime: {threads: 1, device: cpu}
"""
SWEEP = """
sweep:
  space: {space.blocks: {choice: [2, 3]}}
  points: [{space.blocks: 2}, {space.blocks: 3}]
  trials: 2
  max_concurrent: 1
"""

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]


def plugin_of_the_guide() -> str:
    page = (ROOT / GUIDE).read_text()
    (text,) = re.findall(r"^cat > mobile\.py <<'PYTHON'\n(.*?)^PYTHON\n", page, re.DOTALL | re.MULTILINE)
    return str(text)


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all blocks of the page have run in one shell: two plugins' searches, and a retraining."""
    folder = tmp_path_factory.mktemp("guide")
    done = run_blocks(runnable_blocks(GUIDE), folder)
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture
def here(tmp_path: Path, blank_database: Path) -> Path:
    """A folder with configurations and pictures. Python cannot import the plugin, whose file is in another folder."""
    import numpy as np
    from sklearn.datasets import load_digits

    shutil.copy(blank_database, tmp_path / "mlflow.db")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mobile.py").write_text(plugin_of_the_guide())
    (tmp_path / "one.yaml").write_text(ONE_STAGE)
    (tmp_path / "sweep.yaml").write_text(CONFIG + SWEEP)
    digits = load_digits()
    x, y = (15 * digits.images).astype(np.uint8), digits.target
    np.savez(tmp_path / "digits.npz", x=x[:600], y=y[:600], x_test=x[1400:], y_test=y[1400:])
    return tmp_path


@pytest.fixture(autouse=True)
def without_plugins() -> Iterator[None]:
    """After each test, this process forgets the plugins of the commands that ran in it."""
    yield
    load_plugins([])


def command(here: Path, *arguments: str) -> list[str]:
    (plugin,) = here.rglob("mobile.py")
    return [*arguments, "--plugin", str(plugin.relative_to(here))]


def istanas(here: Path, *arguments: str) -> Any:
    """Run a command in this process, and return its result."""
    return in_process.istanas(here, [*command(here, *arguments), "--json"]).result


def on_workers(here: Path, *arguments: str) -> Any:
    """Run a command that starts Ray in a process of its own, and return its result."""
    line = [*warm_program(), *command(here, *arguments), "--json"]
    done = subprocess.run(line, cwd=here, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def test_the_plugin_of_the_guide_has_at_most_60_lines() -> None:
    assert len(plugin_of_the_guide().splitlines()) <= 60


def test_the_blocks_of_the_page_leave_finished_runs_and_files(guide: Path) -> None:
    runs = [RunDir(path).read() for path in guide.glob("runs/*")]
    assert {run.status for run in runs} == {"FINISHED"}
    names = ["digits_quickstart-search"] * 2 + ["mobile-retrain", "mobile-search"]
    assert sorted(run.name for run in runs) == names
    assert {"block.svg", "block.png"} <= {file.name for file in (guide / "cells").iterdir()}
    exports = istanas(guide, "export", "mobile-retrain")["exports"]  # It is already done.
    assert {name for name, each in exports.items() if each["difference"] <= 1e-4} == {
        "safetensors",
        "program",
        "onnx",
    }


def test_a_run_that_is_killed_equals_an_undisturbed_one(guide: Path, tmp_path: Path) -> None:
    for name in ("mobile.py", "mobile.yaml", "digits.npz"):
        shutil.copy(guide / name, tmp_path)
    run = ("run", "--config", "mobile.yaml")
    process = subprocess.Popen(
        [*PROGRAM, *command(tmp_path, *run)], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL
    )
    assert poll(lambda: [*tmp_path.glob("runs/mobile-search-*/metrics.jsonl")], seconds=120)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it had ended before the kill"
    (found,) = tmp_path.glob("runs/mobile-search-*")
    assert RunDir(found).read().status == "RUNNING"
    resumed, undisturbed = istanas(tmp_path, *run), istanas(guide, *run)
    same = ("digest", "genotype", "valid_top1", "test_top1", "params", "macs")
    assert {key: resumed[key] for key in same} == {key: undisturbed[key] for key in same}


def test_it_runs_on_workers_one_stage_and_exports(here: Path) -> None:
    found = on_workers(here, "run", "--config", "one.yaml", "--workers", "1")
    assert found["genotype"]["space"] == "mobile_chain"
    assert set(found["exports"]) == {"safetensors", "program", "onnx"}
    record = RunDir(here / found["run_dir"]).read()
    assert record.status == "FINISHED"
    # The number of workers and the process that loads the plugin do not change the hash.
    assert istanas(here, "run", "--config", "one.yaml", "--workers", "0") == found
    assert RunDir(here / found["run_dir"]).read() == record


def test_a_sweep_over_its_own_keys(here: Path) -> None:
    found = on_workers(here, "sweep", "--config", "sweep.yaml")
    assert found["complete"] == 2
    trials = here.glob("runs/sweep-sweep-*/trial-*/genotype.json")
    assert sorted(len(json.loads(file.read_text())["choices"]["block"]) for file in trials) == [2, 3]
    records = [RunDir(file.parent).read() for file in here.glob("runs/sweep-sweep-*/trial-*/run.json")]
    assert [(record.status, record.dataset) for record in records] == [("FINISHED", "numpy")] * 2


def test_its_operation_in_the_darts_space(here: Path) -> None:
    overrides = [
        "space.name=darts",
        "space.ops=[se_conv_3x3, skip_connect]",
        "search.layers=3",
        "search.epochs=1",
    ]
    (here / "darts.yaml").write_text(CONFIG.replace("{name: mobile_chain, blocks: 3}", "{nodes: 2}"))
    found = istanas(here, "search", "--config", "darts.yaml", *(f"--set={text}" for text in overrides))
    assert "se_conv_3x3" in str(found["genotype"])
