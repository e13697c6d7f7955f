"""Two nodes that share no disk: passed and failed pre-flight checks, and a sweep that stores its runs in a bucket."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray.tune  # noqa: F401 -- A sweep imports it before it knows whether the cluster is on 127.0.0.1 only.

from istanas.errors import IstanasError
from pipeline.cli.commands import run
from pipeline.cluster.preflight import alive_nodes, check_nodes
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.report.trials import COLUMNS
from pipeline.runs import bucket as storage
from pipeline.runs.layout import OWNER_OBJECT
from pipeline.tracking.references import resolve_genotype
from pipeline.tracking.store import open_client
from tests import namespaces
from tests.integration.test_sweep import CONFIG
from tests.pipeline.runs import test_bucket as test_storage
from tests.pipeline.runs.test_bucket import BUCKET, Elsewhere, Server, istanas, keys_of_the_bucket
from tests.ray_cluster import ENVIRONMENT, RayCluster
from tests.warm import warm_program

server, elsewhere = test_storage.server, test_storage.elsewhere

TRIALS = 2
PLACE = f"s3://{BUCKET}/runs/nodes"
SETTINGS = (
    f"sweep.trials={TRIALS}",
    f"sweep.max_concurrent={TRIALS}",
    "sweep.scheduler=none",
    "search.epochs=2",
    f"runtime.runs_dir={PLACE}",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(400),
    # One node has a disk of its own.
    pytest.mark.skipif(namespaces.refusal() is not None, reason=str(namespaces.refusal())),
]


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the second node does not share: it mounts a disk of its own there."""
    return tmp_path_factory.mktemp("apart")


@pytest.fixture(scope="module")
def cluster(apart: Path, server: Server) -> Iterator[RayCluster]:
    """Two nodes of one core, with the bucket's keys in their environment."""
    before = set(os.environ)
    own = {"HOME": str(apart), "XDG_CACHE_HOME": str(apart / "cache")}
    cluster = RayCluster(1, {**keys_of_the_bucket(), **own})
    try:
        cluster.add(1, apart)
        yield cluster
    finally:
        cluster.close()
        for name in set(os.environ) - before:  # set by Ray when it joined
            del os.environ[name]


# ---------- a sweep, in a process of its own
def test_a_sweep_on_both_nodes_is_complete_and_readable_on_another_machine(
    cluster: RayCluster,
    server: Server,
    elsewhere: Elsewhere,
    tmp_path: Path,
    blank_database: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own_disk, database = tmp_path / "own", tmp_path / "mlflow.db"
    own_disk.mkdir()
    (own_disk / "tiny.yaml").write_text(CONFIG)
    database.write_bytes(blank_database.read_bytes())
    store = f"sqlite:///{database}"  # in place of a server: no node has it on its own disk
    at = ("--address", cluster.address)
    settings = [f"--set={each}" for each in (*SETTINGS, f"tracking.uri={store}")]
    command = [*warm_program(), "sweep", "--config", "tiny.yaml", "--json", *at, *settings]
    done = subprocess.run(
        command,
        cwd=own_disk,
        env={**ENVIRONMENT, **keys_of_the_bucket(), "XDG_CACHE_HOME": str(own_disk / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    out, err = done.stdout, done.stderr
    assert done.returncode == 0, err
    versions, shared, pictures, begun, plan, *ended = err.splitlines()[: 5 + TRIALS]
    assert versions.startswith("pre-flight: versions: the same on 2 nodes (")
    assert shared == f"pre-flight: storage: 2 nodes and this process share {PLACE} and {tmp_path}"
    assert pictures.startswith("pictures: digits: 1,438 training and 359 test pictures")
    assert begun.startswith(f"sweep: {PLACE}/tiny-sweep-")
    assert plan == "each trial has 1 core; 2 trials fit, at most 2 at once"
    assert sorted(line[: len("trial 0 done")] for line in ended) == ["trial 0 done", "trial 1 done"]
    result, there = json.loads(out), server.objects(begun.removeprefix(f"sweep: s3://{BUCKET}/"))
    assert result["run_dir"] == begun.removeprefix("sweep: ")
    assert (result["complete"], result["failed"]) == (TRIALS, 0)
    frame = pd.read_csv(io.BytesIO(there["trials.csv"]), dtype=COLUMNS)
    best = int(frame["retrained_top1"].astype(float).argmax())
    assert (result["best_trial"], result["digest"]) == (best, frame["digest"][best])
    left = {"optuna.db", "trials.csv", "sweep.html", "report.html", "best/genotype.json", "metrics.jsonl"}
    assert left <= there.keys()
    assert not [name for name in there if name.endswith(OWNER_OBJECT)]

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
    assert len({run.data.tags["istanas.node"] for run in trials}) == 2, "both trials ran on one node"
    assert all(len(run.data.metrics) > 5 for run in trials + cells)
    names = {run.info.run_id: {file.path for file in client.list_artifacts(run.info.run_id)} for run in runs}
    assert all({"config.yaml", "genotype.json", "report.html"} <= names[run.info.run_id] for run in runs)
    assert {"trials.csv", "sweep.html", "best"} <= names[parent.info.run_id]

    # On a machine without any of the files.
    elsewhere()
    common = [f"--set=tracking.uri={store}", f"--set=runtime.runs_dir={PLACE}"]
    assert istanas("results", "--sweep", result["run_dir"], *common, "--json", capsys=capsys)[0] == 0
    trial_dir = frame["run_dir"][best]
    for reference in (f"{result['run_dir']}/best/genotype.json", trial_dir):
        code, lines, err_lines = istanas(
            "draw", reference, *common, "--out", str(tmp_path / "cells"), "--json", capsys=capsys
        )
        assert code == 0, err_lines
        assert json.loads(lines[-1])["digest"] == result["digest"]
    _, parent_dir = resolve_genotype(
        result["run_dir"],
        space=load(None).space.build(),
        runs_dir=storage.local(PLACE),
        tracking_uri=store,
    )
    assert parent_dir == trial_dir  # the parent run of a retraining of the sweep's best cell


# ---------- the pre-flight checks
@pytest.fixture(scope="module")
def joined(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process has joined the cluster."""
    folder = tmp_path_factory.mktemp("joined")
    config = config_of(folder, f"runtime.address={cluster.address}", "runtime.workers=1")
    with Runtime(config.runtime) as runtime:
        runtime.start(folder)
        assert runtime.joined
        yield


def config_of(runs: Path, *overrides: str) -> Config:
    return load(None, (f"runtime.runs_dir={runs}", "tracking.enabled=false", *overrides))


def lines_of(config: Config, **options: Any) -> list[str]:
    lines: list[str] = []
    check_nodes(config, lines.append, **{"trials": False, "known": set(), **options})
    return lines


def refusal(config: Config, **options: Any) -> str:
    with pytest.raises(IstanasError) as caught:
        lines_of(config, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


def blind_node() -> str:
    import ray

    (id_,) = [n["NodeID"] for n in ray.nodes() if "node:__internal_head__" not in n["Resources"]]
    (name,) = [node.name for node in alive_nodes() if node.id == id_]
    return name


def picture_folder(folder: Path) -> None:
    for name in ("train/a/1.png", "train/b/1.png", "test/a/2.png", "test/b/2.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"never decoded")


def test_a_command_is_rejected_before_it_queues_and_leaves_nothing(
    cluster: RayCluster,
    apart: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The address is "auto", from a file of Ray. The test writes its own file, because of other clusters."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(cluster.address)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(apart)
    assert run(["search", "--workers", "1", "--address", "auto", "--set", "tracking.enabled=false"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert re.match(
        rf"error: pre-flight: runtime.runs_dir: {apart}/runs is not shared with node 127.0.0.1 \(\w{{8}}\) "
        r"\(No such file or directory\); .* choose a folder that all nodes share",
        line,
    )
    assert not list((apart / "runs").iterdir())


def test_passed_checks_print_a_line_each_and_a_node_is_checked_once(joined: None, tmp_path: Path) -> None:
    picture_folder(tmp_path / "pictures")
    known: set[str] = set()
    config = config_of(tmp_path / "runs", "data.name=folder", f"data.root={tmp_path}/pictures")
    versions, storage, data = lines_of(config, known=known)
    assert versions.startswith("pre-flight: versions: the same on 2 nodes (Python 3.")
    assert storage == f"pre-flight: storage: 2 nodes and this process share {tmp_path}/runs"
    assert data == f"pre-flight: data: 2 nodes and this process have the same files in {tmp_path}/pictures"
    assert len(known) == 2
    assert lines_of(config, known=known) == []
    assert not list((tmp_path / "runs").iterdir()), "marks were left behind"


def test_storage_with_an_address_is_checked_across_nodes(
    joined: None, tmp_path: Path, apart: Path, server: Server
) -> None:
    config = config_of(Path("unused"), f"runtime.runs_dir=file://{tmp_path}")
    assert lines_of(config)[1] == f"pre-flight: storage: 2 nodes and this process share {tmp_path}"
    assert not list(tmp_path.iterdir())
    assert f"{apart} is not shared with node {blind_node()}" in refusal(
        config_of(Path("unused"), f"runtime.runs_dir=file://{apart}")
    )
    assert not list(apart.glob(".pre*"))
    # A bucket whose server is in the address.
    query = f"scheme=http&endpoint_override=127.0.0.1%3A{server.port}&region=us-east-1&allow_bucket_creation=false"
    bucket = config_of(Path("unused"), f"runtime.runs_dir=s3://{BUCKET}/marks?{query}")
    assert lines_of(bucket)[1] == (
        f"pre-flight: storage: 2 nodes and this process share s3://{BUCKET}/marks?{query}"
    )
    assert not server.objects("marks"), "marks were left behind"
    nowhere = config_of(Path("unused"), f"runtime.runs_dir=s3://nowhere/runs?{query}")
    assert "cannot be written from this machine" in refusal(nowhere)


def test_missing_data_on_a_node_are_reported(joined: None, tmp_path: Path, apart: Path) -> None:
    picture_folder(apart / "pictures")
    config = config_of(tmp_path, "data.name=folder", f"data.root={apart}/pictures")
    assert f"{apart}/pictures does not contain the data set on node {blind_node()}" in refusal(config)


def test_trials_must_reach_the_store_from_every_node(joined: None, tmp_path: Path, apart: Path) -> None:
    local = config_of(tmp_path, "tracking.enabled=true", f"tracking.uri=sqlite:///{apart}/mlflow.db")
    assert lines_of(local)  # Only this process writes to the store.
    line = refusal(local, trials=True)
    assert f"tracking.uri: the folder {apart} is not shared with node {blind_node()}" in line
    nowhere = config_of(tmp_path, "tracking.enabled=true", "tracking.uri=http://me:secret@127.0.0.1:1")
    line = refusal(nowhere)
    assert "tracking.uri: http://127.0.0.1:1 is not reachable from this machine (Connection refused)" in line
    assert "secret" not in line


def test_a_node_that_hangs_is_reported(cluster: RayCluster, joined: None, tmp_path: Path) -> None:
    name = blind_node()
    cluster.halt()
    try:
        # The other node may not answer within this time, either.
        line = refusal(config_of(tmp_path), seconds=2)
    finally:
        cluster.wake()
    assert re.match(rf"pre-flight: nodes? .*{re.escape(name)}.*: no answer within 2 s", line)
    assert not list(tmp_path.iterdir())


WITHOUT_THIS_PROJECT = """
import sys
sys.path = [p for p in sys.path if not p.endswith(sys.argv[1])]
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f)]
from ray import cloudpickle
examine = cloudpickle.loads(sys.stdin.buffer.read())
answer = examine({"packages": ("numpy", "no-such-package")}, "")
assert "pipeline" not in sys.modules and "istanas" not in sys.modules
print(answer["code"], answer["versions"]["no-such-package"])
"""


def test_a_node_without_this_project_can_be_checked(tmp_path: Path, repo_root: Path) -> None:
    from ray import cloudpickle

    from pipeline.cluster.preflight import SENT_AS_CODE
    from pipeline.cluster.probe import examine

    for module in SENT_AS_CODE:
        cloudpickle.register_pickle_by_value(module)
    try:
        code = cloudpickle.dumps(examine)
    finally:
        for module in SENT_AS_CODE:
            cloudpickle.unregister_pickle_by_value(module)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THIS_PROJECT, str(repo_root)],
        input=code,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        timeout=60,
    )
    assert done.stdout.decode().split() == ["None", "none"], done.stderr.decode()
