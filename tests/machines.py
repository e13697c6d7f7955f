"""A Ray cluster of several machines, each one a network namespace, started as a user starts it."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.namespaces import Network, address
from tests.ray_cluster import ENVIRONMENT, PROGRAM, kill
from tests.waiting import wait_until

JOB_SERVER = f"http://{address(1)}:8265"
STORE = f"http://{address(1)}:5000"
START_NODE = [
    sys.executable,
    *("-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--disable-usage-stats"),
    "--include-log-monitor=false",  # one process less on each machine; its messages are not read here
]
START_HEAD = [
    *START_NODE,
    *("--head", "--port=6379", f"--dashboard-host={address(1)}", "--include-dashboard=true"),
]
# Without a token, it exits with the HTTP status. With one, it waits for the nodes and for MLflow's server.
ASK = """
import json, sys, urllib.error, urllib.request
from tests.waiting import wait_until
nodes, health, token, number = *sys.argv[1:4], int(sys.argv[4])
request = urllib.request.Request(nodes, headers={"Authorization": "Bearer " + token} if token else {})

def ready():
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            summary = json.load(answer)["data"]["summary"]
        if sum(node["raylet"].get("state") == "ALIVE" for node in summary) != number:
            return False
        urllib.request.urlopen(health, timeout=10).close()
        return True
    except urllib.error.HTTPError as error:
        if not token:
            sys.exit(f"HTTP {error.code}")
    except OSError:
        pass
    return False

wait_until(ready, 120, f"{number} nodes and MLflow's server", interval=0.2)
"""


@dataclass(frozen=True)
class Machines:
    """Machines with a Ray node of one core each; the first has the head and MLflow's server."""

    network: Network
    folder: Path
    environment: dict[str, str]

    def ask(self, token: str) -> str:
        """Ask the dashboard from the user's machine; return "" once everything runs, or an error."""
        number = len(self.network.machines)
        what = [f"{JOB_SERVER}/nodes?view=summary", f"{STORE}/health", token, str(number)]
        command = [sys.executable, "-S", "-c", ASK, *what]
        process = self.network.start(self.network.user, command, env=self.environment, stderr=subprocess.PIPE)
        return str(process.communicate(timeout=150)[1]).strip()

    def user(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run an `istanas` command on the user's machine, which is outside of the cluster."""
        process = self.network.start(
            self.network.user,
            [*PROGRAM, *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = process.communicate(timeout=400)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextlib.contextmanager
def running(number: int, folder: Path) -> Iterator[Machines]:
    """Start the machines, and stop them at the end.

    Args:
        number: How many machines there are.
        folder: The user's folder on the shared disk, also for MLflow's mlflow.db and artifacts.
    """
    short = Path(tempfile.mkdtemp(prefix="m-", dir="/tmp"))  # short, since it holds sockets
    token = short / "token"
    token.write_text(secrets.token_hex(16))
    token.chmod(0o600)
    environment = {
        **{name: value for name, value in ENVIRONMENT.items() if name != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "MLFLOW_TRACKING_URI": STORE,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # the server starts fewer processes
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    started: list[subprocess.Popen[str]] = []
    with Network(number) as network, open(folder / "nodes.log", "w") as log:

        def start(machine: int, command: Sequence[str]) -> None:
            name = network.machines[machine - 1]
            options = {"env": environment, "cwd": folder, "stdin": subprocess.DEVNULL}
            started.append(network.start(name, command, stdout=log, stderr=log, **options))

        try:
            start(1, [sys.executable, "-m", "mlflow", "server", *_store_options(folder)])
            start(1, [*START_HEAD, *_node_options(1, short)])
            _wait_for_head(network)
            for machine in range(2, number + 1):
                start(machine, [*START_NODE, f"--address={address(1)}:6379", *_node_options(machine, short)])
            machines = Machines(network, folder, environment)
            assert machines.ask(token.read_text()) == "", (folder / "nodes.log").read_text()
            yield machines
        finally:
            for process in started:
                alive = process.poll() is None
                family = psutil.Process(process.pid).children(recursive=True) if alive else []
                process.kill()
                kill(family)
            shutil.rmtree(short, ignore_errors=True)


def _node_options(machine: int, short: Path) -> list[str]:
    return [f"--node-ip-address={address(machine)}", f"--temp-dir={short / str(machine)}"]


def _store_options(folder: Path) -> list[str]:
    files = (
        f"--backend-store-uri=sqlite:///{folder}/mlflow.db",
        f"--artifacts-destination={folder}/artifacts",
    )
    place = (f"--host={address(1)}", "--port=5000", f"--allowed-hosts={address(1)}:5000")
    return ["--workers=1", *place, *files]


def _wait_for_head(network: Network) -> None:
    """Wait for the first machine's GCS, which must listen before another node is started."""
    probe = f"import socket; socket.create_connection(('{address(1)}', 6379), 2)"
    command = [sys.executable, "-S", "-c", probe]

    def listens() -> bool:
        return network.start(network.user, command, stderr=subprocess.DEVNULL).wait() == 0

    wait_until(listens, 60, "the head node", interval=0.2)
