"""A user's data set on Ray Train's workers and in the trials of a sweep, which lack the plugin's file."""

import subprocess
from pathlib import Path

import pytest

from pipeline.runs.directory import RunDir
from tests.pipeline.cli.test_plugin_commands import PLUGIN, TINY, write_pictures
from tests.ray_cluster import ENVIRONMENT, PROGRAM

SWEEP = """
sweep:
  space: {search.lr: {uniform: [0.05, 0.1]}}
  trials: 2
  max_concurrent: 1
"""

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "sweep.yaml").write_text(TINY + SWEEP)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "stripes.py").write_text(PLUGIN)
    write_pictures(tmp_path / "stripes.npz")
    return tmp_path


def istanas(here: Path, *arguments: str) -> None:
    command = [*PROGRAM, *arguments, "--plugin", "elsewhere/stripes.py"]
    done = subprocess.run(command, cwd=here, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_workers_load_the_plugin_and_the_run_is_the_same(here: Path) -> None:
    istanas(here, "search", "--config", "tiny.yaml", "--workers", "2")
    (run,) = here.glob("runs/tiny-search-*")
    first = RunDir(run).read()
    assert first.status == "FINISHED"
    istanas(here, "search", "--config", "tiny.yaml", "--workers", "0")
    assert RunDir(run).read() == first, (
        "the number of workers and the plugin's process do not change the hash"
    )


def test_trials_load_the_plugin(here: Path) -> None:
    istanas(here, "sweep", "--config", "sweep.yaml")
    trials = [RunDir(file.parent).read() for file in here.glob("runs/sweep-sweep-*/trial-*/run.json")]
    assert [trial.status for trial in trials] == ["FINISHED", "FINISHED"]
    assert {trial.dataset for trial in trials} == {"stripes"}
