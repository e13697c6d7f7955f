"""`clusters/local.sh`: its nodes listen on 127.0.0.1 only, refuse who has no token, and all end with it."""

import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.ports import free_ports
from tests.ray_cluster import ENVIRONMENT, ROOT

SCRIPT = str(ROOT / "clusters" / "local.sh")
NODES = 2
JOIN = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level=50)
print("joined", len(ray.nodes()))
"""

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(400)]


class Local:
    """The script, with a folder, ports and a token of its own."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="loc-", dir="/tmp"))  # short: sockets lie in it
        self.state, self.token_file = self.folder / "s", self.folder / "ray" / "auth_token"
        self.port, dashboard, client = free_ports(3)
        self.gcs, self.address = f"127.0.0.1:{self.port}", f"http://127.0.0.1:{dashboard}"
        self.environment = {
            **ENVIRONMENT,
            "LOCAL_STATE": str(self.state),
            "LOCAL_PORT": str(self.port),
            "LOCAL_DASHBOARD_PORT": str(dashboard),
            "LOCAL_CLIENT_PORT": str(client),
            "LOCAL_CPUS": "1",
            "PYTHON": sys.executable,
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_AUTH_MODE": "token",
        }
        self.environment.pop("RAY_AUTH_TOKEN", None)

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """Exit code and output of a call. It does not wait for what goes on in the background."""
        done = subprocess.run(
            ["bash", SCRIPT, *arguments],
            env=self.environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=390,
            check=False,
        )
        return done.returncode, done.stdout

    def processes(self) -> list[psutil.Process]:
        holder = psutil.Process(int((self.state / "pid").read_text()))
        return [holder, *holder.children(recursive=True)]

    def join(self, **token: str) -> "subprocess.Popen[str]":
        """A driver that comes by the address of the control service."""
        environment = {**self.environment, "RAY_NUM_REDIS_GET_RETRIES": "3", **token}
        return subprocess.Popen(
            [sys.executable, "-c", JOIN, self.gcs],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def status_of(self, path: str, token: str | None) -> int:
        """The HTTP status of a request to dashboard and job server."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.address + path, headers=headers), timeout=20
            ) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code


@pytest.fixture(scope="module")
def local() -> Iterator[Local]:
    local = Local()
    try:
        code, said = local("up", str(NODES))
        assert code == 0, said
        assert said.startswith(f"{NODES} nodes of 1 cores: {local.gcs}, {local.address}")
        yield local
    finally:
        local("down")
        subprocess.run(["rm", "-rf", str(local.folder)], check=True)


def test_it_listens_on_this_machine_only_and_its_token_is_nobody_elses(local: Local) -> None:
    connections = [
        c for p in local.processes() for c in p.net_connections() if c.status == psutil.CONN_LISTEN
    ]
    assert len(connections) > 5
    assert {c.laddr.ip.removeprefix("::ffff:") for c in connections} == {"127.0.0.1"}
    assert local.token_file.stat().st_mode & 0o777 == 0o600
    assert len(local.token_file.read_text()) == 64


def test_who_has_no_token_or_a_wrong_one_is_refused(local: Local) -> None:
    drivers = {
        "right": local.join(),
        "none": local.join(RAY_AUTH_MODE="disabled"),
        "wrong": local.join(RAY_AUTH_TOKEN="0" * 64),
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
        assert local.status_of(path, token) == 200
        assert local.status_of(path, None) == 401
        assert local.status_of(path, "0" * 64) in (401, 403)


def test_a_second_up_starts_nothing(local: Local) -> None:
    before = {p.pid for p in local.processes()}
    code, said = local("up", "3")
    assert code == 0
    assert said.startswith(
        f"runs already, process {(local.state / 'pid').read_text().strip()}: {NODES} nodes"
    )
    assert before <= {p.pid for p in local.processes()}
    assert local("status")[0] == 0


def test_down_ends_all_of_it(local: Local) -> None:
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
    local = Local()
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
        subprocess.run(["rm", "-rf", str(local.folder)], check=True)


def test_a_port_that_is_taken_is_named() -> None:
    import socket

    local = Local()
    try:
        with socket.create_server(("127.0.0.1", local.port)):
            code, said = local("up")
        assert code == 1
        assert said.startswith(f"error: port {local.port} of 127.0.0.1 is taken")
        assert not local.state.exists()
    finally:
        os.rmdir(local.folder)
