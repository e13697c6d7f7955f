"""Sweeps on `s3://`: what their process and their trials' do there, and a whole one on nodes that share nothing else."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from pipeline.config import load
from pipeline.searcher import first_settings
from pipeline.sweep_report import COLUMNS
from pipeline.tracking import open_client
from tests.pipeline.test_storage import BUCKET, Server, elsewhere, prefix, server  # noqa: F401
from tests.ray_cluster import ENVIRONMENT, PROGRAM, RayCluster, title

TRIALS = 4
CONFIG = f"""
data: {{name: digits, holdout: 0.2}}
space: {{nodes: 1, ops: [skip_connect, sep_conv_3x3]}}
search: {{epochs: 2, batch_size: 128, init_channels: 4, layers: 3, arch_lr: 0.01, max_pictures: 512}}
retrain: {{epochs: 1, batch_size: 128, init_channels: 4, layers: 3, auxiliary_weight: 0, drop_path: 0, cutout: 0}}
runtime: {{threads: 1, device: cpu}}
sweep:
  trials: {TRIALS}
  objective: retrained
  searcher: random
  scheduler: none
  max_restarts: 9
  space: {{search.lr: {{loguniform: [0.002, 0.3]}}, space.sparsity: {{int: [1, 2]}}}}
"""


def table(server: Server, prefix: str) -> pd.DataFrame:  # noqa: F811
    """The sweep's table in the bucket; empty before there is one."""
    found = server.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/").get("Contents", [])
    keys = [entry["Key"] for entry in found if entry["Key"].endswith("/trials.csv")]
    if not keys:
        return pd.DataFrame({"state": []})
    return pd.read_csv(server.client.get_object(Bucket=BUCKET, Key=keys[0])["Body"], dtype=COLUMNS)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come to pass"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a node another disk")
def test_two_nodes_and_a_killed_command_share_nothing_but_the_bucket(
    server: Server,  # noqa: F811
    prefix: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    disk, shared = tmp_path / "disk", tmp_path / "shared"
    disk.mkdir()
    shared.mkdir()
    place = f"s3://{BUCKET}/{prefix}"
    store = f"sqlite:///{shared}/mlflow.db"
    began = time.monotonic()
    mine = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    mine |= {"HOME": str(disk), "XDG_CACHE_HOME": str(disk / "cache")}
    cluster = RayCluster(1, environment=mine)
    print(f"head {time.monotonic() - began:.1f}")

    def start() -> subprocess.Popen[str]:
        (disk / "tiny.yaml").write_text(CONFIG)
        return subprocess.Popen(
            [
                *PROGRAM,
                *("sweep", "--config", "tiny.yaml", "--json", "--address", cluster.address),
                *("--set", f"runtime.runs_dir={place}", "--set", f"tracking.uri={store}"),
            ],
            cwd=disk,
            env={**ENVIRONMENT, **mine},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    try:
        cluster.add(1, disk)
        print(f"node {time.monotonic() - began:.1f}")
        killed = start()
        try:
            wait_for(lambda: killed.poll() is not None or "COMPLETE" in set(table(server, prefix)["state"]), 100)
        except AssertionError:
            killed.terminate()
            print(killed.communicate())
            there = server.objects(prefix)
            print(sorted(there), table(server, prefix).to_string())
            for k, v in there.items():
                if k.endswith((".log", "owner.json")):
                    print(k, v.decode())
            raise
        print(f"one {time.monotonic() - began:.1f}")
        killed.kill()
        print(killed.communicate())
        family = psutil.Process(cluster._process.pid).children(recursive=True)
        _, alive = psutil.wait_procs([p for p in family if "ray::ImplicitFunc" in title(p)], timeout=20)
        assert not alive, "trials outlive their command"
        shutil.rmtree(disk / "cache")
        print(f"again {time.monotonic() - began:.1f}")
        again = start()
        out, err = again.communicate(timeout=120)
        print(err)
        print(f"end {time.monotonic() - began:.1f}")
    finally:
        cluster.close()
    print(out)
    print(table(server, prefix).to_string())
    print(sorted(server.objects(prefix)))
    assert again.returncode == 0
    print(f"closed {time.monotonic() - began:.1f}")
