"""The Ray cluster of a case: a head and a node of one core each, on one machine or on two."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import psutil

from tests.namespaces import Network, address
from tests.ray_cluster import ENVIRONMENT, RayCluster, title
from tests.waiting import poll, wait_until

# A node counts as lost after about three seconds of silence.
IMPATIENT = {"RAY_health_check_timeout_ms": "1000", "RAY_health_check_failure_threshold": "3"}
# For the command, a head counts as lost after five seconds.
IMPATIENT_COMMAND = {"RAY_gcs_rpc_server_reconnect_timeout_s": "20"}
SECONDS_TO_GIVE_UP = 5.0  # Time in which a node that has returned notices that it counts as lost.
COUNT_NODES = """
import sys, ray
from tests.waiting import wait_until
ray.init(sys.argv[1], log_to_driver=False, logging_level=50)
def alive():
    return sum(node["Alive"] for node in ray.nodes())
print(wait_until(lambda: n if (n := alive()) >= int(sys.argv[2]) else 0, 100, "the nodes", interval=0.2))
"""


class OneMachine:
    """Head and node on 127.0.0.1."""

    prefix: tuple[str, ...] = ()  # words before a command that runs next to the head
    environment: Mapping[str, str] = {**ENVIRONMENT, **IMPATIENT_COMMAND}

    def __init__(self, folder: Path) -> None:
        self.start()

    def start(self) -> None:
        """Start the cluster, also again after `kill`."""
        self._cluster = RayCluster(1, IMPATIENT)
        self._cluster.add(1)
        self.address = self._cluster.address

    def named(self, part: str) -> list[psutil.Process]:
        """Return the processes on all nodes whose title contains a text."""
        return self._cluster.named(part)

    def replace_node(self) -> None:
        """Replace the node, as if its machine had died."""
        self._cluster.remove()
        self._cluster.add(1)

    def kill(self) -> None:
        """Kill all processes of the cluster."""
        self._cluster.kill()

    def halt_node(self, seconds: float) -> None:
        """Halt the node for some seconds, and add another one if it counts as lost then."""
        self._cluster.halt()
        time.sleep(seconds)
        self._cluster.wake()
        if poll(self._cluster.has_lost_a_node, SECONDS_TO_GIVE_UP, interval=0.2):
            self._cluster.add(1)

    def close(self) -> None:
        self._cluster.close()


class TwoMachines:
    """Head and node in separate network namespaces, like two machines that share a disk."""

    environment: Mapping[str, str] = {
        **{k: v for k, v in ENVIRONMENT.items() if k != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"},
        "RAY_AUTH_MODE": "disabled",  # Otherwise `ray start` uses a token in the user's home.
    }

    def __init__(self, folder: Path) -> None:
        self._log: IO[str] = open(folder / "nodes.log", "w")  # noqa: SIM115 closed in `close`
        self._short = Path(tempfile.mkdtemp(prefix="c-", dir="/tmp"))  # It contains sockets.
        self._network = Network(2)
        self._network.__enter__()
        self._processes: list[subprocess.Popen[str]] = []
        self._n_nodes = 0
        self.address = f"{address(1)}:6379"
        self.prefix = ("ip", "netns", "exec", self._network.machines[0])
        try:
            self._start(1, "--head", "--port=6379", "--include-dashboard=false")
            self._wait_for_head()
            self._start(2, f"--address={self.address}")
            self._count_nodes(at_least=2)
        except BaseException:
            self.close()
            raise

    def _start(self, machine: int, *options: str) -> None:
        self._n_nodes += 1
        own = [f"--node-ip-address={address(machine)}", f"--temp-dir={self._short / str(self._n_nodes)}"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
        self._processes.append(
            self._network.start(
                self._network.machines[machine - 1],
                [*command, "--disable-usage-stats", *own, *options],
                env={**self.environment, **IMPATIENT},
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
            )
        )

    def _wait_for_head(self) -> None:
        probe = f"import socket; socket.create_connection(('{address(1)}', 6379), 2)"
        command = [sys.executable, "-c", probe]

        def listens() -> bool:
            probing = self._network.start(self._network.user, command, stderr=subprocess.DEVNULL)
            return probing.wait() == 0

        wait_until(listens, 60, "the head node", interval=0.2)

    def _count_nodes(self, at_least: int) -> int:
        """Return the number of nodes that are alive, after waiting for a minimum."""
        command = [sys.executable, "-c", COUNT_NODES, self.address, str(at_least)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        counting = self._network.start(self._network.machines[0], command, env=self.environment, **pipes)
        number, said = counting.communicate(timeout=120)
        assert counting.returncode == 0, said
        return int(number)

    def named(self, part: str) -> list[psutil.Process]:
        return [p for p in self._all() if part in title(p)]

    def _all(self) -> list[psutil.Process]:
        found = []
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                found += [parent, *parent.children(recursive=True)]
        return found

    def cut_off_node(self, seconds: float) -> None:
        """Disconnect the node for some seconds, and start another one next to it if it counts as lost then."""
        self._set_link("down")
        time.sleep(seconds)
        self._set_link("up")
        time.sleep(SECONDS_TO_GIVE_UP)
        if self._count_nodes(at_least=1) < 2:
            self._start(2, f"--address={self.address}")

    def _set_link(self, state: str) -> None:
        command = ["ip", "-n", self._network.user, "link", "set", "port2", state]
        subprocess.run(command, check=True, capture_output=True)

    def close(self) -> None:
        for process in self._all():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for each in self._processes:
            each.wait()
        self._network.__exit__(None, None, None)
        self._log.close()
        shutil.rmtree(self._short, ignore_errors=True)
