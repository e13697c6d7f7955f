"""`clusters/local.sh`, and jobs on its cluster at every kind of address; on three machines they end the same way.

What runs on one node of it, three workers, is what three machines are compared with.
"""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from istanas.space import Genotype
from pipeline.cli import run
from tests import machines as several
from tests.integration.test_ray import CONFIG, decided, run_directory
from tests.local_cluster import LocalCluster
from tests.machines import JOB_SERVER
from tests.namespaces import refusal
from tests.ray_cluster import PROGRAM, client_of, title

NODES, CORES = 2, 3
JOIN = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level=50)
print("joined", len(ray.nodes()))
"""
SEARCH = ("search", "--config", "ray.yaml", "--workers", "3")
SMALL = ("--set", "search.epochs=2", "--set", "search.max_pictures=384")
# By a command that joins a cluster, in its own environment; here it is the tests'.
SET_ON_THE_WAY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]


def join(local: LocalCluster, **token: str) -> "subprocess.Popen[str]":
    """A driver that comes by the address of the control service."""
    environment = {**local.environment, "RAY_NUM_REDIS_GET_RETRIES": "3", **token}
    return subprocess.Popen(
        [sys.executable, "-c", JOIN, local.gcs],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def status_of(local: LocalCluster, path: str, token: str | None) -> int:
    """The HTTP status of a request to dashboard and job server."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(local.address + path, headers=headers), timeout=20
        ) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module")
def local() -> Iterator[LocalCluster]:
    local = LocalCluster(CORES)
    try:
        code, said = local("up", str(NODES))
        assert code == 0, said
        assert said.startswith(f"{NODES} nodes of {CORES} cores: {local.gcs}, {local.address}")
        yield local
    finally:
        local.close()


def test_it_listens_on_this_machine_only_and_its_token_is_nobody_elses(local: LocalCluster) -> None:
    connections = [
        c for p in local.processes() for c in p.net_connections() if c.status == psutil.CONN_LISTEN
    ]
    assert len(connections) > 5
    assert {c.laddr.ip.removeprefix("::ffff:") for c in connections} == {"127.0.0.1"}
    assert local.token_file.stat().st_mode & 0o777 == 0o600
    assert len(local.token_file.read_text()) == 64


def test_who_has_no_token_or_a_wrong_one_is_refused(local: LocalCluster) -> None:
    drivers = {
        "right": join(local),
        "none": join(local, RAY_AUTH_MODE="disabled"),
        "wrong": join(local, RAY_AUTH_TOKEN="0" * 64),
    }
    said = {name: driver.communicate(timeout=120)[0] for name, driver in drivers.items()}
    assert drivers["right"].returncode == 0, said["right"]
    assert f"joined {NODES}" in said["right"]
    for name in ("none", "wrong"):
        assert drivers[name].returncode == 1, said[name]
        assert (
            "ConnectionError: Failed to connect to Ray cluster" in said[name]
            or "AuthenticationError" in said[name]
        )
        assert "joined" not in said[name]
    token = local.token_file.read_text()
    for path in ("/api/version", "/api/jobs/", "/nodes?view=summary"):
        assert status_of(local, path, token) == 200
        assert status_of(local, path, None) == 401
        assert status_of(local, path, "0" * 64) in (401, 403)


def test_a_second_up_starts_nothing(local: LocalCluster) -> None:
    before = {p.pid for p in local.processes()}
    code, said = local("up", "3")
    assert code == 0
    assert said.startswith(
        f"runs already, process {(local.state / 'pid').read_text().strip()}: {NODES} nodes"
    )
    assert before <= {p.pid for p in local.processes()}
    assert local("status")[0] == 0


# ---------- jobs on it
@dataclass(frozen=True)
class OnOneNode:
    """A search of three workers, started by a mere client (ray://): what it printed, and where they worked."""

    folder: Path
    lines: list[str]
    raylets: set[int]


@pytest.fixture(scope="module")
def on_one_node(local: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> OnOneNode:
    folder = tmp_path_factory.mktemp("one")
    (folder / "ray.yaml").write_text(CONFIG)
    with client_of(lambda: [p for p in local.processes() if "specific-server" in title(p)]):
        process = subprocess.Popen(
            [*PROGRAM, *SEARCH, *SMALL, "--address", local.client],
            cwd=folder,
            env=local.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    workers: dict[int, int] = {}
    while process.poll() is None:
        workers |= {p.pid: p.ppid() for p in local.processes() if "RayTrainWorker" in title(p)}
        time.sleep(0.5)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert len(workers) == 3
    return OnOneNode(folder, out.splitlines(), set(workers.values()))


def test_a_job_runs_through_rays_client_word_for_word_as_without(on_one_node: OnOneNode) -> None:
    """What Ray says to a client goes to the log. A sweep of a client, and auto: test_nodes_apart."""
    versions, storage, begun, workers, first, second, table, *_ = on_one_node.lines
    assert versions.startswith(f"pre-flight: versions: the same on {NODES} nodes (")
    assert storage == f"pre-flight: storage: {NODES} nodes and this process share {on_one_node.folder}/runs"
    assert begun.startswith("search: runs/ray-search-")
    assert workers.startswith("3 workers (cpu, gloo), each 1 thread")
    assert first.startswith("epoch 1: ")
    assert second.startswith("epoch 2: ")
    assert table.startswith("┏")
    log = (run_directory(on_one_node.folder) / "ray" / "driver.log").read_text()
    assert "Connected to Ray cluster" in log


@pytest.mark.skipif(refusal() is not None, reason=str(refusal()))
def test_three_workers_on_three_machines_find_what_three_on_one_do_and_mlflow_shows_it(
    on_one_node: OnOneNode, blank_database: Path, tmp_path: Path
) -> None:
    (tmp_path / "ray.yaml").write_text(CONFIG.replace("tracking: {enabled: false}", ""))
    (tmp_path / "mlflow.db").write_bytes(blank_database.read_bytes())
    with several.running(3, tmp_path) as machines:
        assert machines.ask("") == "HTTP 401", "the dashboard talks to strangers"
        runs = f"runtime.runs_dir={tmp_path}/runs"
        done = machines.user("submit", "--address", JOB_SERVER, "--", *SEARCH, *SMALL, "--set", runs)
        assert done.returncode == 0, done.stdout + done.stderr
        listed = machines.user("results", "--json")
    lines = done.stdout.splitlines()
    assert any(line.startswith("3 workers (cpu, gloo), each 1 thread") for line in lines), done.stdout
    assert [line.partition(":")[0] for line in lines if line.startswith("epoch ")] == ["epoch 1", "epoch 2"]

    assert len(on_one_node.raylets) == 1, "on both nodes"
    there, here = run_directory(tmp_path), run_directory(on_one_node.folder)
    assert decided(there) == decided(here)
    assert (there / "genotype.json").read_bytes() == (here / "genotype.json").read_bytes()

    assert listed.returncode == 0, listed.stderr
    (row,) = json.loads(listed.stdout)["results"]
    assert (row["kind"], row["status"], row["run_dir"]) == ("search", "FINISHED", str(there))
    assert row["genotype"] == Genotype.from_json((here / "genotype.json").read_text()).digest()


def test_a_stranger_starts_no_job(
    local: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which does not get as far as to join."""
    stranger = {**SET_ON_THE_WAY, "RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}
    for name, value in stranger.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert run(["search", "--workers", "1", "--address", local.gcs]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: runtime.address is {local.gcs}: ")
    assert "token" in line
    assert not list((tmp_path / "runs").iterdir())


# ---------- and its end
def test_down_ends_all_of_it(local: LocalCluster) -> None:
    family = local.processes()
    assert any("raylet" in p.name() for p in family)
    assert local("down") == (0, "ended\n")
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert not local.state.exists()
    assert local("status") == (1, "nothing runs\n")
    assert local("down") == (0, "nothing runs\n")


# ---------- without a cluster
def test_down_ends_no_process_that_is_not_its_own_and_removes_no_folder_that_it_did_not_make() -> None:
    local = LocalCluster(CORES)
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        local.state.mkdir()
        (local.state / "pid").write_text(
            str(bystander.pid)
        )  # as one that was killed leaves it, the number now somebody else's
        assert local("down") == (0, "nothing runs\n")
        assert bystander.poll() is None
        assert (local.state / "pid").exists()
        code, said = local("up")
        assert code == 1
        assert (
            said
            == f"error: LOCAL_STATE is {local.state}, which is there already: name a folder that is not\n"
        )
    finally:
        bystander.kill()
        bystander.wait()
        local.close()


def test_a_port_that_is_taken_is_named() -> None:
    import socket

    local = LocalCluster(CORES)
    try:
        with socket.create_server(("127.0.0.1", local.port)):
            code, said = local("up")
        assert code == 1
        assert said.startswith(f"error: port {local.port} of 127.0.0.1 is taken")
        assert not local.state.exists()
    finally:
        os.rmdir(local.folder)


def test_an_address_that_is_none_says_which_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    for address, words in (
        (
            "http://127.0.0.1:8265",
            "'http://127.0.0.1:8265': that is the job server, for istanas submit; give HOST",
        ),
        ("auto", "'127.0.0.1:1': nobody answers there"),
    ):
        assert run(["search", "--workers", "1", "--address", address]) == 1
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert out == ""
        assert line.startswith(f"error: runtime.address is {words}")
        assert not any(Path("runs").iterdir())
