"""`clusters/local.sh`, and jobs on its cluster: submitted, detached, stopped and resumed, or started by HOST:PORT.

A job of two workers on one node is compared with the same job on two machines.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from istanas.space import Genotype
from pipeline.cli.commands import run
from pipeline.cluster.address import find_address
from pipeline.runs.directory import RunDir
from pipeline.tracking.store import open_client
from pipeline.training.epoch_record import load_progress
from tests import machines as several
from tests.followed import Followed
from tests.integration.test_ray import CONFIG, decided, run_directory
from tests.local_cluster import LocalCluster, halt_after_an_epoch, resume_when_terminated
from tests.machines import JOB_SERVER, STORE
from tests.namespaces import refusal
from tests.ray_cluster import PROGRAM, ROOT, listening, title

NODES, CORES = 2, 2
JOIN = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level=50)
print("joined", len(ray.nodes()))
"""
EPOCHS = 6
SUBMITTED = f"""
space: {{nodes: 1, ops: [skip_connect, sep_conv_3x3]}}
search: {{epochs: {EPOCHS}, batch_size: 32, max_pictures: 320, init_channels: 4, layers: 3, arch_lr: 0.01}}
runtime: {{threads: 1, device: cpu}}
"""
SEARCH = ("search", "--config", "ray.yaml", "--workers", "2")
SMALL = ("--set", "search.epochs=2", "--set", "search.max_pictures=384")
# Variables that a command sets when it joins a cluster; in these tests, the process is pytest's.
SET_ON_THE_WAY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]


def join(local: LocalCluster, **token: str) -> "subprocess.Popen[str]":
    """Start a driver that joins by the address of the control service (GCS)."""
    environment = {**local.environment, "RAY_NUM_REDIS_GET_RETRIES": "3", **token}
    return subprocess.Popen(
        [sys.executable, "-c", JOIN, local.gcs],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def status_of(local: LocalCluster, path: str, token: str | None) -> int:
    """Return the HTTP status of a request to the dashboard, which contains the job server."""
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


def test_it_listens_on_this_machine_only_and_its_token_is_private(local: LocalCluster) -> None:
    addresses = [found for process in local.processes() if (found := listening(process))]
    assert len(addresses) > 5
    assert set().union(*addresses) == {"127.0.0.1"}
    assert local.token_file.stat().st_mode & 0o777 == 0o600
    assert len(local.token_file.read_text()) == 64


def test_a_missing_or_wrong_token_is_rejected(local: LocalCluster) -> None:
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
        f"already running, process {(local.state / 'pid').read_text().strip()}: {NODES} nodes"
    )
    assert before <= {p.pid for p in local.processes()}
    assert local("status")[0] == 0


# ---------- submitted jobs
@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: LocalCluster) -> Path:
    """The working directory of a user whose home contains the cluster's token."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "own.py").write_text("")
    (tmp_path / "tiny.yaml").write_text(SUBMITTED)
    (tmp_path / "nowhere.yaml").write_text(SUBMITTED + "data: {name: folder, root: /nowhere/at/all}\n")
    keys = tmp_path / "home" / ".ray"
    keys.mkdir(parents=True)
    (keys / "auth_token").write_text(local.token_file.read_text())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # another cluster, which only other commands use
    monkeypatch.chdir(folder)
    return folder


def follow(*arguments: str) -> Followed:
    """Start a command in the folder `here`."""
    return Followed(*arguments, environment={**os.environ, "PYTHONPATH": str(ROOT)})


def command(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, list[str]]:
    """Run a command in this process, and return its exit code, stdout and the lines of stderr."""
    capsys.readouterr()
    code = run(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def test_jobs_are_followed_detached_stopped_and_resumed(
    local: LocalCluster,
    here: Path,
    tmp_path: Path,
    blank_database: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs, store = tmp_path / "shared", f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}"
    (tmp_path / "store").mkdir()
    shutil.copy(blank_database, tmp_path / "store")
    (here / "runs").mkdir()
    (here / "runs" / "large").write_bytes(b"not shipped")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    at = ("--address", local.address)
    search = ("search", "--config", "../tiny.yaml", "--set", f"runtime.runs_dir={runs}", "--workers", "0")

    assert command("jobs", *at, capsys=capsys)[1] == "no jobs yet\n"
    first = follow("submit", *at, "--name", "digits", "--", *search)
    driver = halt_after_an_epoch(local, "digits", first)
    first.until("epoch 1:")
    attached = follow("jobs", *at, "digits", "--follow")
    first.process.send_signal(signal.SIGINT)
    assert first.end() == 130
    log = "\n".join(first.lines)
    assert f"shipping {here}: 2 files" in log  # own.py, and the configuration
    assert "\x1b" not in log
    assert "\r" not in log
    assert "Attach again: " in log
    assert f"jobs digits --follow --address {local.address}" in log

    code, out, _ = command("jobs", *at, "--json", capsys=capsys)
    (listed,) = json.loads(out)["jobs"]
    assert (code, listed["id"], listed["status"], listed["exit_code"]) == (0, "digits", "RUNNING", None)
    assert listed["command"] == f"istanas {' '.join(search)}".replace("../", ".submitted/0/")

    attached.until("epoch 1:")  # from the beginning
    threading.Thread(target=resume_when_terminated, args=(driver,), daemon=True).start()
    code, out, _ = command("stop", *at, "digits", capsys=capsys)
    assert code == 0
    assert out.splitlines()[-1] == "digits: stopped; submit the same command again to resume"
    assert attached.end() == 143
    log = "\n".join(attached.lines)
    assert "terminated (SIGTERM): run the same command again to resume" in log
    assert "Traceback" not in log
    (path,) = runs.iterdir()
    stopped = RunDir(path)
    assert stopped.read().status == "FAILED"
    done = load_progress(path / "checkpoints").epochs
    assert 1 <= done < EPOCHS, "the job ended before it was stopped: the test needs more epochs"
    code, out, _ = command("stop", *at, "digits", capsys=capsys)
    assert (code, out) == (0, "digits: had already ended, STOPPED with exit code 143\n")

    taken = command("submit", *at, "--name", "digits", "--", *search, capsys=capsys)
    assert taken[0] == 2
    assert taken[2][-1].startswith(
        f"error: --name: an earlier job at {local.address} has the name digits; choose"
    )
    nowhere = (word.replace("tiny", "nowhere") for word in search)
    failing = command("submit", *at, "--json", "--", *nowhere, capsys=capsys)
    second = command("submit", *at, "--json", "--", *search, capsys=capsys)
    assert second[0] == 0
    job: dict[str, Any] = json.loads(second[1])
    assert (job["status"], job["exit_code"]) == ("SUCCEEDED", 0)
    assert job["id"].startswith("search-tiny-")
    assert f"resumed after epoch {done}" in "\n".join(second[2])
    assert not [line for line in second[2] if line.startswith("epoch 1:")]
    assert [m.step for m in stopped.metrics()] == list(range(1, EPOCHS + 1))

    assert failing[0] == 1
    failed: dict[str, Any] = json.loads(failing[1])
    assert failed["id"].startswith("search-nowhere-")
    assert "error: data.root: no such folder: /nowhere/at/all; set data.root to a folder" in "\n".join(
        failing[2]
    )

    _, out, _ = command("jobs", *at, "--json", capsys=capsys)
    ends = {each["id"]: (each["status"], each["exit_code"]) for each in json.loads(out)["jobs"]}
    assert ends == {job["id"]: ("SUCCEEDED", 0), failed["id"]: ("FAILED", 1), "digits": ("STOPPED", 143)}
    assert list(ends)[-1] == "digits", "the newest first"
    assert "STOPPED (143)" in command("jobs", *at, "digits", capsys=capsys)[1]
    assert "FAILED (1)" in command("jobs", *at, failed["id"], capsys=capsys)[1]

    client = open_client(store)
    (experiment,) = client.search_experiments(filter_string="name = 'istanas'")
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED"
    assert len(client.get_metric_history(tracked.info.run_id, "train/loss")) == EPOCHS

    monkeypatch.delenv("RAY_ADDRESS")
    quiet = ("--set", "tracking.enabled=false", "--json")
    code, out, _ = command("search", "--config", "../tiny.yaml", *quiet, capsys=capsys)
    undisturbed = json.loads(out)
    found = Genotype.from_json((path / "genotype.json").read_text())
    assert undisturbed["genotype"] == found.to_dict()
    clock = "images_per_second"
    here_and_there = [RunDir(p).metrics() for p in (undisturbed["run_dir"], path)]
    figures = [[{k: v for k, v in m.metrics.items() if k != clock} for m in ms] for ms in here_and_there]
    assert figures[0] == figures[1]


def test_a_wrong_token_or_address_of_the_job_server_is_a_one_line_error(
    local: LocalCluster, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(address: str, *more: str) -> tuple[int, str]:
        code, out, err = command("jobs", "--address", address, *more, capsys=capsys)
        assert out == ""
        (only,) = err
        return code, only

    assert command("jobs", "--address", local.address, capsys=capsys)[0] == 0
    code, said = line(local.address, "unknown")
    assert (code, said) == (
        2,
        f"error: ID: no job 'unknown' at {local.address}; list the jobs: istanas jobs --address {local.address}",
    )
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 32)
    code, said = line(local.address)
    rejected = (
        f"error: RAY_AUTH_TOKEN: the cluster at {local.address} rejects this token; give the cluster's own"
    )
    assert (code, said[: len(rejected)]) == (1, rejected)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (Path.home() / ".ray" / "auth_token").unlink()
    code, said = line(local.address)
    missing = f"error: --address: the cluster at {local.address} requires its token; give the token by RAY_AUTH_TOKEN"
    assert (code, said[: len(missing)]) == (1, missing)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(local.token_file))
    assert command("jobs", "--address", local.address, capsys=capsys)[0] == 0

    code, said = line(local.gcs)
    assert code == 1
    assert said.startswith(
        f"error: --address: no Ray job server answers at http://{local.gcs} (the process that listens there does not "
        "speak HTTP); give the address of the head's dashboard, such as http://127.0.0.1:8265"
    )
    code, said = line("127.0.0.1:1")
    assert code == 1
    assert (
        "no Ray job server answers at http://127.0.0.1:1 (ConnectionRefusedError: Connection refused)" in said
    )
    for address in (f"ray://{local.gcs}", "auto", "http://", "127.0.0.1:port"):
        code, said = line(address)
        assert code == 2
        assert (
            "is not the address of a dashboard, which contains the job server; give http://HOST:8265" in said
        )


# ---------- a job at HOST:PORT, and the same on two machines
@dataclass(frozen=True)
class OnOneNode:
    """A search of two workers, started by HOST:PORT: its output, and the nodes of its workers."""

    folder: Path
    lines: list[str]
    raylets: set[int]


@pytest.fixture(scope="module")
def on_one_node(local: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> OnOneNode:
    folder = tmp_path_factory.mktemp("one")
    (folder / "ray.yaml").write_text(CONFIG)
    process = subprocess.Popen(
        [*PROGRAM, *SEARCH, *SMALL, "--address", local.gcs],
        cwd=folder,
        env=local.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    workers: dict[int, int] = {}
    while process.poll() is None:
        for each in local.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "RayTrainWorker" in title(each):
                    workers[each.pid] = each.ppid()
        time.sleep(0.5)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert len(workers) == 2
    return OnOneNode(folder, out.splitlines(), set(workers.values()))


def test_a_job_at_an_address_prints_its_checks_and_logs_what_ray_says(on_one_node: OnOneNode) -> None:
    """Sweeps, and "auto" up to the pre-flight checks, are in test_nodes_apart.py."""
    lines = [line for line in on_one_node.lines if not line.startswith("waiting for ")]  # Ray may be slow.
    versions, storage, pictures, begun, workers, first, second, table, *_ = lines
    assert versions.startswith(f"pre-flight: versions: the same on {NODES} nodes (")
    assert storage == f"pre-flight: storage: {NODES} nodes and this process share {on_one_node.folder}/runs"
    assert pictures.startswith("pictures: digits: 1,438 training and 359 test pictures")
    assert begun.startswith("search: runs/ray-search-")
    assert workers.startswith("2 workers (cpu, gloo), each 1 thread")
    assert first.startswith("epoch 1: ")
    assert second.startswith("epoch 2: ")
    assert table.startswith("┏")
    log = (run_directory(on_one_node.folder) / "ray" / "driver.log").read_text()
    assert "Connected to Ray cluster" in log


@pytest.mark.skipif(refusal() is not None, reason=str(refusal()))
def test_two_workers_on_two_machines_equal_two_on_one(
    on_one_node: OnOneNode, blank_database: Path, tmp_path: Path
) -> None:
    (tmp_path / "ray.yaml").write_text(CONFIG.replace("tracking: {enabled: false}", ""))
    (tmp_path / "mlflow.db").write_bytes(blank_database.read_bytes())
    with several.running(2, tmp_path) as machines:
        assert machines.ask("") == "HTTP 401", "the dashboard answers without a token"
        runs = f"runtime.runs_dir={tmp_path}/runs"
        done = machines.user("submit", "--address", JOB_SERVER, "--", *SEARCH, *SMALL, "--set", runs)
        assert done.returncode == 0, done.stdout + done.stderr
        listed = machines.user("results", "--json")
    lines = done.stdout.splitlines()
    assert any(line.startswith("2 workers (cpu, gloo), each 1 thread") for line in lines), done.stdout
    assert f"pre-flight: tracking: {STORE} is reachable from here and 2 nodes" in lines
    assert [line.partition(":")[0] for line in lines if line.startswith("epoch ")] == ["epoch 1", "epoch 2"]

    assert len(on_one_node.raylets) == 1, "on both nodes"
    there, here = run_directory(tmp_path), run_directory(on_one_node.folder)
    assert decided(there) == decided(here)
    assert (there / "genotype.json").read_bytes() == (here / "genotype.json").read_bytes()

    assert listed.returncode == 0, listed.stderr
    (row,) = json.loads(listed.stdout)["results"]
    assert (row["kind"], row["status"], row["run_dir"]) == ("search", "FINISHED", str(there))
    assert row["genotype"] == Genotype.from_json((here / "genotype.json").read_text()).digest()


def test_a_job_without_the_token_is_rejected(
    local: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs in this process, which therefore does not join the cluster."""
    stranger = {**SET_ON_THE_WAY, "RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}
    for name, value in stranger.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert run(["search", "--workers", "1", "--address", local.gcs]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: runtime.address: the process at {local.gcs} ")
    assert "token" in line
    assert not list((tmp_path / "runs").iterdir())


# ---------- shutdown
def test_down_stops_all_processes(local: LocalCluster) -> None:
    family = local.processes()
    assert any("raylet" in title(p) for p in family)
    assert local("down") == (0, "stopped\n")
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert not local.state.exists()
    assert local("status") == (1, "not running\n")
    assert local("down") == (0, "not running\n")


# ---------- without a running cluster
def test_down_leaves_foreign_processes_and_folders_alone() -> None:
    local = LocalCluster(CORES)
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        local.state.mkdir()
        # A killed cluster leaves the file, and its number now belongs to another process.
        (local.state / "pid").write_text(str(bystander.pid))
        assert local("down") == (0, "not running\n")
        assert bystander.poll() is None
        assert (local.state / "pid").exists()
        code, said = local("up")
        assert code == 1
        assert said == f"error: LOCAL_STATE: {local.state} exists already; name a new folder\n"
    finally:
        bystander.kill()
        bystander.wait()
        local.close()


@pytest.mark.parametrize("locked", ["folder", "file"])
def test_a_cluster_starts_if_rays_folder_belongs_to_another_user(
    locked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.getuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root writes everywhere, and there is no setpriv to take that right away")
    local = LocalCluster(CORES, ["setpriv", "--bounding-set=-dac_override"] if os.getuid() == 0 else [])
    default = local.folder / "tmp" / "ray"
    default.mkdir(parents=True)
    if locked == "file":
        (default / "ray_current_cluster").write_text("127.0.0.1:1")  # the Ray of another user
    (default if locked == "folder" else default / "ray_current_cluster").chmod(0o555)
    local.environment |= {"RAY_TMPDIR": str(default.parent)}
    try:
        code, said = local("up", "1")
        assert code == 0, said
        assert said.startswith(f"{default} can't be written (it may belong to another user): ")
        assert f"next: export RAY_AUTH_MODE=token RAY_TMPDIR={local.state}, and " in said
        monkeypatch.setenv("RAY_TMPDIR", str(local.state))
        assert find_address("auto") == local.gcs
    finally:
        default.chmod(0o755)
        local.close()


def test_a_port_in_use_is_reported() -> None:
    import socket

    local = LocalCluster(CORES)
    try:
        with socket.create_server(("127.0.0.1", local.port)):
            code, said = local("up")
        assert code == 1
        assert said.startswith(f"error: port {local.port} of 127.0.0.1 is in use; set")
        assert not local.state.exists()
    finally:
        os.rmdir(local.folder)


def test_a_wrong_address_is_an_error_with_the_right_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    said = "RAY_ADDRESS is 127.0.0.1:1: the workers run there; unset it to start Ray here"
    for address, words in (
        (
            "http://127.0.0.1:8265",
            "runtime.address: 'http://127.0.0.1:8265' is the job server, for istanas submit; give HOST:PORT",
        ),
        (
            "auto",
            "RAY_ADDRESS: no process listens at '127.0.0.1:1' (",
        ),
    ):
        sweep = ["sweep", "--config", str(ROOT / "tune_configs" / "sweep_digits.yaml"), "--address", address]
        for command in (["search", "--workers", "1", "--address", address], sweep, [*sweep, "--dry-run"]):
            assert run(command) == 1
            out, err = capsys.readouterr()
            (line,) = err.splitlines()
            assert (said in out.splitlines()) == (address == "auto"), command
            assert line.startswith(f"error: {words}")
            assert not any(Path("runs").glob("*/*"))
