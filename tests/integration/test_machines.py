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
START_NODE = [
    sys.executable,
    "-m",
    "ray.scripts.scripts",
    "start",
    "--block",
    "--num-cpus=1",
    "--disable-usage-stats",
]
COUNT_NODES = """
import sys, time, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level=50)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
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

    def user(self, arguments: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
        """What the user types, far from the cluster."""
        process = self.network.start(
            self.network.user,
            [*PROGRAM, *arguments],
            cwd=self.folder,
            env={**self.environment, **variables},
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
            for machine in range(2, MACHINES + 1):
                wait_for_head(network)
                start(machine, [*START_NODE, f"--address={address(1)}:6379", *node_options(machine, short)])
            count = [sys.executable, "-c", COUNT_NODES, f"{address(1)}:6379", str(MACHINES)]
            ready = network.start(network.machines[0], count, env=environment)
            assert ready.wait(120) == 0
            yield Machines(network, folder, environment)
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
    while network.start(network.user, [sys.executable, "-c", probe], stderr=subprocess.DEVNULL).wait():
        assert time.monotonic() < end, "the head node does not come up"
        time.sleep(0.2)


def test_three_workers_on_three_machines_find_what_three_on_one_do_and_mlflow_shows_it(
    machines: Machines, tmp_path: Path
) -> None:
    search = ["search", "--config", "ray.yaml", "--workers", "3", "--set", "search.epochs=2"]
    # Nobody gets in without the token.
    stranger = tmp_path / "stranger"
    stranger.write_text("0" * 32)
    runs = ["--set", f"runtime.runs_dir={machines.folder}/runs"]
    submit = ["submit", "--address", JOB_SERVER, "--", *search, *runs]
    refused = machines.user(submit, RAY_AUTH_TOKEN_PATH=str(stranger))
    assert refused.returncode == 1, refused.stdout + refused.stderr
    assert "token" in refused.stderr
    assert not (machines.folder / "runs").exists()

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
    jobs = machines.user(["jobs", "--address", JOB_SERVER, "--json"])
    (job,) = json.loads(jobs.stdout)["jobs"]
    assert (job["status"], job["exit_code"]) == ("SUCCEEDED", 0)
