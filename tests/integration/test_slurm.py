"""`sbatch clusters/slurm.sbatch`, on Slurm's own daemons: a search with a worker on each of two nodes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ray_cluster import ENVIRONMENT, ROOT
from tests.slurm import NODES, Slurm, lacking, running

CONFIG = """
space: {nodes: 2}
search: {epochs: 1, batch_size: 32, init_channels: 4, layers: 3, max_pictures: 256}
runtime: {threads: 1, device: cpu}
tracking: {enabled: false}
"""
SECONDS = 240

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.skipif(lacking() is not None, reason=str(lacking())),
]


def wait_for_end(slurm: Slurm, job: str, log: Path) -> None:
    end = time.monotonic() + SECONDS
    while slurm.ask("squeue", "--noheader", "--format=%i"):
        assert time.monotonic() < end, f"job {job} does not end:\n{log.read_text()}\n{slurm.logs()}"
        time.sleep(0.5)


def test_a_search_runs_on_the_allocated_nodes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    istanas = Path(sys.executable).with_name("istanas")
    if not istanas.exists():
        pytest.skip(f"istanas is not installed: no {istanas}, which the script calls")
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    environment = {**ENVIRONMENT, "VENV": str(istanas.parent.parent), "HOME": str(tmp_path)}
    del environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]  # The nodes have a real network.
    options = ["--parsable", f"--nodes={len(NODES)}", "--gpus-per-node=0", "--cpus-per-task=1"]
    command = ["search", "--config", "tiny.yaml", "--set", f"runtime.runs_dir={tmp_path}/runs", "--json"]
    script = str(ROOT / "clusters" / "slurm.sbatch")
    with running() as slurm:
        job = slurm.ask("sbatch", *options, script, *command, cwd=tmp_path, env=environment).strip()
        log = tmp_path / f"istanas-{job}.log"
        wait_for_end(slurm, job, log)
        facts = slurm.ask("scontrol", "show", "job", job)
    said = log.read_text()
    assert "JobState=COMPLETED" in facts, said + (tmp_path / f"istanas-{job}-ray.log").read_text()
    # Each node has one core for Ray, so each has one of the two workers.
    assert f"Ray on {len(NODES)} nodes (n[1-2]), head {NODES['n1']}:" in said
    assert "2 nodes and this process share" in said
    assert "2 workers (cpu, gloo), each 1 thread" in said
    (line,) = [line for line in said.splitlines() if line.startswith("{")]
    assert (Path(json.loads(line)["run_dir"]) / "genotype.json").exists()

    token = tmp_path / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert not list(Path("/tmp").glob(f"ray-{job}-*")), "Ray's folders were left behind"


def test_a_missing_command_is_an_error(tmp_path: Path) -> None:
    """The script runs as in Slurm, but without an allocation, which it does not reach."""
    script = ROOT / "clusters" / "slurm.sbatch"
    done = subprocess.run(
        ["bash", str(script)], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert (
        done.stderr == "error: no command; give one: sbatch clusters/slurm.sbatch search --config FILE ...\n"
    )
