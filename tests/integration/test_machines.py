"""A search on three machines, each in a network namespace of its own, as a user launches and watches it."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from istanas.space import Genotype
from tests.integration.test_ray import CONFIG, decided, run_directory
from tests.namespaces import Network, address, refusal
from tests.ray_cluster import ENVIRONMENT, PROGRAM, RayCluster

MACHINES = 3
JOB_SERVER = f"http://{address(1)}:8265"
STORE = f"http://{address(1)}:5000"
SMALL = ("--set", "search.epochs=2", "--set", "search.max_pictures=384")
START_NODE = [
    sys.executable,
    "-m",
    "ray.scripts.scripts",
    "start",
    "--block",
    "--num-cpus=1",
    "--disable-usage-stats",
]
# Asks, without a token: prints the HTTP status. With it: until so many nodes are alive, and MLflow's server answers.
ASK = """
import json, sys, time, urllib.error, urllib.request
nodes, health, token, number = *sys.argv[1:4], int(sys.argv[4])
asked = urllib.request.Request(nodes, headers={"Authorization": "Bearer " + token} if token else {})
end, alive = time.monotonic() + 120, 0
while True:
    try:
        with urllib.request.urlopen(asked, timeout=10) as answer:
            summary = json.load(answer)["data"]["summary"]
        alive = sum(node["raylet"].get("state") == "ALIVE" for node in summary)
        if alive == number:
            urllib.request.urlopen(health, timeout=10).close()
            sys.exit()
    except urllib.error.HTTPError as error:
        if not token:
            sys.exit(f"HTTP {error.code}")
    except OSError:
        pass
    assert time.monotonic() < end, f"{alive} of {number} nodes are alive, or MLflow's server is not"
    time.sleep(0.2)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.skipif(refusal() is not None, reason=str(refusal())),
]


@dataclass
class Machines:
    """A Ray node with one core on each machine, head and MLflow's server on the first; and where the user sits."""

    network: Network
    folder: Path
    environment: dict[str, str]

    def ask(self, token: str) -> str:
        """What the dashboard says to somebody where the user sits: nothing, once all is there."""
        what = [f"{JOB_SERVER}/nodes?view=summary", f"{STORE}/health", token, str(MACHINES)]
        command = [sys.executable, "-S", "-c", ASK, *what]
        process = self.network.start(self.network.user, command, stderr=subprocess.PIPE)
        return str(process.communicate(timeout=150)[1]).strip()

    def user(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """What the user types, far from the cluster."""
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


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    folder = tmp_path_factory.mktemp("machines")
    (folder / "ray.yaml").write_text(CONFIG.replace("tracking: {enabled: false}", ""))
    short = Path(tempfile.mkdtemp(prefix="m-", dir="/tmp"))  # sockets lie in it
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
    running: list[subprocess.Popen[str]] = []
    with Network(MACHINES) as network, open(folder / "nodes.log", "w") as log:

        def start(machine: int, command: Sequence[str]) -> None:
            name = network.machines[machine - 1]
            options = {"env": environment, "cwd": folder, "stdin": subprocess.DEVNULL}
            running.append(network.start(name, command, stdout=log, stderr=log, **options))

        try:
            start(1, [sys.executable, "-m", "mlflow", "server", *store_options(folder)])
            head = ["--head", "--port=6379", f"--dashboard-host={address(1)}", "--include-dashboard=true"]
            start(1, [*START_NODE, *head, *node_options(1, short)])
            wait_for_head(network)
            for machine in range(2, MACHINES + 1):
                start(machine, [*START_NODE, f"--address={address(1)}:6379", *node_options(machine, short)])
            cluster = Machines(network, folder, environment)
            assert cluster.ask(token.read_text()) == "", (folder / "nodes.log").read_text()
            yield cluster
        finally:
            for process in running:
                family = (
                    psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
                )
                process.kill()
                for each in family:
                    if each.is_running():
                        each.kill()
            shutil.rmtree(short, ignore_errors=True)


def node_options(machine: int, short: Path) -> list[str]:
    return [f"--node-ip-address={address(machine)}", f"--temp-dir={short / str(machine)}"]


def store_options(folder: Path) -> list[str]:
    files = [
        f"--backend-store-uri=sqlite:///{folder}/mlflow.db",
        f"--artifacts-destination={folder}/artifacts",
    ]
    return [
        "--workers=1",
        f"--host={address(1)}",
        "--port=5000",
        f"--allowed-hosts={address(1)}:5000",
        *files,
    ]


def wait_for_head(network: Network) -> None:
    """Until the first machine's GCS listens, as a user who starts the next node would."""
    probe = f"import socket; socket.create_connection(('{address(1)}', 6379), 2)"
    end = time.monotonic() + 60
    while network.start(network.user, [sys.executable, "-S", "-c", probe], stderr=subprocess.DEVNULL).wait():
        assert time.monotonic() < end, "the head node does not come up"
        time.sleep(0.2)


def test_three_workers_on_three_machines_find_what_three_on_one_do_and_mlflow_shows_it(
    machines: Machines,
) -> None:
    search = ["search", "--config", "ray.yaml", "--workers", "3", *SMALL]
    assert machines.ask("") == "HTTP 401", "the dashboard talks to strangers"
    submit = ["submit", "--address", JOB_SERVER, "--", *search]
    submit += ["--set", f"runtime.runs_dir={machines.folder}/runs"]
    done = machines.user(submit)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("3 workers (cpu, gloo), each 1 thread") for line in lines), done.stdout
    assert [line.partition(":")[0] for line in lines if line.startswith("epoch ")] == ["epoch 1", "epoch 2"]

    # The same on one machine.
    alone = machines.folder / "alone"
    alone.mkdir()
    shutil.copy(machines.folder / "ray.yaml", alone)
    cluster = RayCluster(3)
    try:
        local = subprocess.run(
            [*PROGRAM, *search, "--address", cluster.address, "--set", "tracking.enabled=false"],
            cwd=alone,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=400,
        )
    finally:
        cluster.close()
    assert local.returncode == 0, local.stderr
    there, here = run_directory(machines.folder), run_directory(alone)
    assert decided(there) == decided(here)
    assert (there / "genotype.json").read_bytes() == (here / "genotype.json").read_bytes()

    listed = machines.user(["results", "--json"])
    assert listed.returncode == 0, listed.stderr
    (row,) = json.loads(listed.stdout)["results"]
    assert (row["kind"], row["status"], row["run_dir"]) == ("search", "FINISHED", str(there))
    assert row["genotype"] == Genotype.from_json((here / "genotype.json").read_text()).digest()
