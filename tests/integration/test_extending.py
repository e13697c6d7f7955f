"""The plugin of the guide, from end to end: its operation, its data set and its search space, as for built-ins."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.runs.directory import RunDir
from tests.ray_cluster import ENVIRONMENT, PROGRAM
from tests.waiting import poll

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
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
    (text,) = re.findall(
        r"^cat > mobile\.py <<'PYTHON'\n(.*?)^PYTHON\n", GUIDE.read_text(), re.DOTALL | re.MULTILINE
    )
    return str(text)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    import numpy as np
    from sklearn.datasets import load_digits

    (tmp_path / "mobile.py").write_text(plugin_of_the_guide())
    (tmp_path / "mobile.yaml").write_text(CONFIG)
    (tmp_path / "one.yaml").write_text(ONE_STAGE)
    (tmp_path / "sweep.yaml").write_text(CONFIG + SWEEP)
    digits = load_digits()
    x, y = (15 * digits.images).astype(np.uint8), digits.target
    np.savez(tmp_path / "digits.npz", x=x[:600], y=y[:600], x_test=x[1400:], y_test=y[1400:])
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [*PROGRAM, *arguments, "--plugin", "mobile.py"]


def istanas(here: Path, *arguments: str) -> Any:
    done = subprocess.run(
        [*command(*arguments), "--json"],
        cwd=here,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_plugin_of_the_guide_has_at_most_60_lines() -> None:
    assert len(plugin_of_the_guide().splitlines()) <= 60


def test_a_run_that_is_killed_equals_an_undisturbed_one(here: Path) -> None:
    process = subprocess.Popen(
        command("run", "--config", "mobile.yaml"), cwd=here, env=ENVIRONMENT, stdout=subprocess.DEVNULL
    )
    poll(lambda: [*here.glob("runs/mobile-search-*/metrics.jsonl")], seconds=120)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (found,) = here.glob("runs/mobile-search-*")
    assert RunDir(found).read().status == "RUNNING"
    resumed = istanas(here, "run", "--config", "mobile.yaml")
    again = istanas(here, "run", "--config", "mobile.yaml", "--set", "runtime.runs_dir=undisturbed")
    same = ("digest", "genotype", "valid_top1", "test_top1", "params", "macs")
    assert {key: resumed[key] for key in same} == {key: again[key] for key in same}
    drawn = istanas(here, "draw", resumed["run_dir"], "--out", "drawn")
    assert [Path(file).name for file in drawn["files"]] == ["block.svg", "block.png"]
    exports = istanas(here, "export", resumed["retrain_run_dir"])["exports"]
    assert {name for name, each in exports.items() if each["difference"] <= 1e-4} == {
        "safetensors",
        "program",
        "onnx",
    }


def test_it_runs_on_workers_one_stage_and_exports(here: Path) -> None:
    found = istanas(here, "run", "--config", "one.yaml", "--workers", "2")
    assert found["genotype"]["space"] == "mobile_chain"
    assert RunDir(here / found["run_dir"]).read().status == "FINISHED"
    assert istanas(here, "export", found["run_dir"])["digest"] == found["digest"]


def test_a_sweep_over_its_own_keys(here: Path) -> None:
    found = istanas(here, "sweep", "--config", "sweep.yaml")
    assert found["complete"] == 2
    trials = here.glob("runs/sweep-sweep-*/trial-*/genotype.json")
    assert sorted(len(json.loads(file.read_text())["choices"]["block"]) for file in trials) == [2, 3]


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
