"""A sweep on two nodes that share nothing but a bucket, started by a mere client (`ray://`); then read elsewhere."""

import io
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline import storage
from pipeline.config import load
from pipeline.references import resolve_genotype
from pipeline.searcher import first_settings
from pipeline.sweep_report import COLUMNS
from pipeline.sweep_space import trial_config
from pipeline.tracking import open_client
from tests.namespaces import refusal
from tests.pipeline import test_storage
from tests.pipeline.test_storage import BUCKET, Elsewhere, Server, istanas
from tests.pipeline.test_sweep_storage import search
from tests.ports import unused_port
from tests.ray_cluster import CLIENTS, ENVIRONMENT, PROGRAM, RayCluster

server, elsewhere = test_storage.server, test_storage.elsewhere

TRIALS = 2
PLACE = f"s3://{BUCKET}/runs/nodes"
CONFIG = f"""
data: {{name: digits, holdout: 0.2}}
space: {{nodes: 1, ops: [skip_connect, sep_conv_3x3]}}
search: {{epochs: 2, batch_size: 64, init_channels: 4, layers: 3, arch_lr: 0.01}}
retrain: {{epochs: 1, batch_size: 64, init_channels: 4, layers: 3, auxiliary_weight: 0, drop_path: 0, cutout: 0}}
runtime: {{threads: 1, device: cpu}}
sweep:
  trials: {TRIALS}
  objective: retrained
  searcher: random
  scheduler: none
  space: {{search.lr: {{loguniform: [0.02, 0.3]}}}}
"""
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(400),
    # A node gets a disk of its own.
    pytest.mark.skipif(refusal() is not None, reason=str(refusal())),
]


@pytest.fixture
def cluster(server: Server, tmp_path: Path) -> Iterator[tuple[RayCluster, str]]:
    """Two nodes of one core that want a token, and where they listen for clients."""
    disk, port = tmp_path / "disk", unused_port()
    disk.mkdir()
    of_nodes = {**TOKEN, **CLIENTS, **keys(), "HOME": str(disk), "XDG_CACHE_HOME": str(disk / "cache")}
    cluster = RayCluster(1, port, of_nodes)
    try:
        cluster.add(1, disk)  # where the first one has its disk, this one has another
        yield cluster, f"ray://127.0.0.1:{port}"
    finally:
        cluster.close()


def keys() -> dict[str, str]:
    """Of the bucket, and where it is."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def expected(folder: Path) -> list[tuple[dict[str, Any], str, float]]:
    """Settings, genotype and top-1 of the trials, each searched in this process, without sweep, Ray and bucket."""
    config = load(folder / "tiny.yaml", ["tracking.enabled=false", f"runtime.runs_dir={folder}/alone"])
    found = []
    for settings in first_settings(config, TRIALS):
        result = search(trial_config(config, settings))
        found.append((settings, result["digest"], result["valid_top1"]))
    return found


def test_trials_spread_their_tree_is_whole_and_all_of_it_is_read_on_a_machine_that_never_saw_it(
    cluster: tuple[RayCluster, str],
    server: Server,
    elsewhere: Elsewhere,
    tmp_path: Path,
    blank_database: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    client_disk, database = tmp_path / "client", tmp_path / "mlflow.db"
    client_disk.mkdir()
    (client_disk / "tiny.yaml").write_text(CONFIG)
    database.write_bytes(blank_database.read_bytes())
    store = f"sqlite:///{database}"  # stands for a server: it is not on the disk of anybody
    settings = [f"--set=runtime.runs_dir={PLACE}", f"--set=tracking.uri={store}"]
    command = [*PROGRAM, "sweep", "--config", "tiny.yaml", "--address", cluster[1], "--json", *settings]
    process = subprocess.Popen(
        command,
        cwd=client_disk,
        env={**ENVIRONMENT, **TOKEN, **keys(), "XDG_CACHE_HOME": str(client_disk / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    alone = expected(client_disk)  # meanwhile
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    # Through Ray's client, word for word as without: what Ray says to a client goes to the log.
    versions, shared, begun, plan, *done = err.splitlines()[: 4 + TRIALS]
    assert versions.startswith("pre-flight: versions: the same on 2 nodes (")
    assert shared == f"pre-flight: storage: 2 nodes and this process share {PLACE} and {tmp_path}"
    assert begun.startswith(f"sweep: {PLACE}/tiny-sweep-")
    assert plan == "a trial has 1 core; 2 fit, 2 at once"
    assert sorted(line[: len("trial 0 done")] for line in done) == ["trial 0 done", "trial 1 done"]
    result, there = json.loads(out), server.objects(begun.removeprefix(f"sweep: s3://{BUCKET}/"))
    assert result["run_dir"] == begun.removeprefix("sweep: ")
    assert (result["complete"], result["failed"]) == (TRIALS, 0)
    frame = pd.read_csv(io.BytesIO(there["trials.csv"]), dtype=COLUMNS)
    rows = frame.to_dict("records")
    assert [({"search.lr": row["search.lr"]}, row["digest"], row["valid_top1"]) for row in rows] == alone
    best = int(frame["retrained_top1"].astype(float).argmax())
    assert (result["best_trial"], result["digest"]) == (best, frame["digest"][best])
    left = {"optuna.db", "trials.csv", "sweep.html", "report.html", "best/genotype.json", "metrics.jsonl"}
    assert left <= there.keys()
    assert not [name for name in there if name.endswith(storage.OWNER_OBJECT)]

    client = open_client(store)
    (experiment,) = client.search_experiments(filter_string="name = 'istanas'")
    runs = list(client.search_runs([experiment.experiment_id]))
    kinds = ("sweep", "search", "retrain")
    (parent,), trials, cells = ([r for r in runs if r.data.tags["istanas.kind"] == kind] for kind in kinds)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len(runs) == 1 + TRIALS + len(cells)
    assert len(cells) == frame["digest"].nunique()
    assert [run.data.tags["mlflow.parentRunId"] for run in trials] == TRIALS * [parent.info.run_id]
    assert {run.data.tags["mlflow.parentRunId"] for run in cells} <= {run.info.run_id for run in trials}
    assert {run.data.tags["istanas.run_dir"] for run in trials} == set(frame["run_dir"])
    assert {run.info.run_id for run in trials} == set(frame["mlflow_run_id"])
    assert len({run.data.tags["istanas.node"] for run in trials}) == 2, "both on one node"
    started, ended = [r.info.start_time for r in trials], [r.info.end_time for r in trials]
    assert max(started) < min(ended), "one after the other, though both have room"
    assert all(len(run.data.metrics) > 5 for run in trials + cells)
    names = {run.info.run_id: {file.path for file in client.list_artifacts(run.info.run_id)} for run in runs}
    assert all({"config.yaml", "genotype.json", "report.html"} <= names[run.info.run_id] for run in runs)
    assert {"trials.csv", "sweep.html", "best"} <= names[parent.info.run_id]

    # From a machine that has never seen it.
    elsewhere()
    common = [f"--set=tracking.uri={store}", f"--set=runtime.runs_dir={PLACE}"]
    assert istanas("results", "--sweep", result["run_dir"], *common, "--json", capsys=capsys)[0] == 0
    trial_dir = frame["run_dir"][best]
    for reference in (result["run_dir"], f"{result['run_dir']}/best/genotype.json", trial_dir):
        code, lines, err_lines = istanas(
            "draw", reference, *common, "--out", str(tmp_path / "cells"), "--json", capsys=capsys
        )
        assert code == 0, err_lines
        assert json.loads(lines[-1])["digest"] == result["digest"]
    code, _, lines = istanas(
        "compare", *frame["run_dir"], *common, "--out", str(tmp_path / "page"), capsys=capsys
    )
    assert code == 0, lines
    _, parent_dir = resolve_genotype(
        result["run_dir"],
        space=load(None).space.cell_space(),
        runs_dir=storage.local(PLACE),
        tracking_uri=store,
    )
    assert parent_dir == trial_dir  # of a retraining of the sweep's best
