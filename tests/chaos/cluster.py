"""The Ray cluster that a case runs on: head and node of one core each, on one machine or on two."""

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
from tests.ports import unused_port
from tests.ray_cluster import CLIENTS, ENVIRONMENT, RayCluster, title
from tests.waiting import poll, wait_until

# A node is given up after some three seconds of silence.
IMPATIENT = {"RAY_health_check_timeout_ms": "1000", "RAY_health_check_failure_threshold": "3"}
# And a head that is gone, by the command, after five.
IMPATIENT_COMMAND = {"RAY_gcs_rpc_server_reconnect_timeout_s": "20"}
SECONDS_TO_GIVE_UP = 5.0  # that a node has, when it is back, to notice that it was
COUNT_NODES = """
import sys, ray
from tests.waiting import wait_until
ray.init(sys.argv[1], log_to_driver=False, logging_level=50)
def alive():
    return sum(node["Alive"] for node in ray.nodes())
print(wait_until(lambda: n if (n := alive()) >= int(sys.argv[2]) else 0, 100, "the nodes", interval=0.2))
"""


class OneMachine:
    """All on 127.0.0.1."""

    prefix: tuple[str, ...] = ()  # of a command that runs beside the head
    environment: Mapping[str, str] = {**ENVIRONMENT, **IMPATIENT_COMMAND}

    def __init__(self, folder: Path) -> None:
        self.start()

    def start(self) -> None:
        """Again, after `kill`."""
        self._cluster = self._make()
        self._cluster.add(1)

    def _make(self) -> RayCluster:
        cluster = RayCluster(1, environment=IMPATIENT)
        self.address = cluster.address
        return cluster

    def named(self, part: str) -> list[psutil.Process]:
        """The processes whose title has a part like that, on all nodes."""
        return self._cluster.named(part)

    def replace_node(self) -> None:
        """The node's machine dies, another one comes."""
        self._cluster.remove()
        self._cluster.add(1)

    def kill(self) -> None:
        """All machines die."""
        self._cluster.kill()

    def halt_node(self, seconds: float) -> None:
        """The node stands still for so long; if it was given up, another one comes."""
        self._cluster.halt()
        time.sleep(seconds)
        self._cluster.wake()
        if poll(self._cluster.has_lost_a_node, SECONDS_TO_GIVE_UP, interval=0.2):
            self._cluster.add(1)

    def close(self) -> None:
        self._cluster.close()


class ForClients(OneMachine):
    """All on 127.0.0.1, and commands are mere clients of it."""

    def _make(self) -> RayCluster:
        port = unused_port()
        self.address = f"ray://127.0.0.1:{port}"
        return RayCluster(1, port, {**IMPATIENT, **CLIENTS})


class TwoMachines:
    """Head and node in network namespaces of their own, as on two machines that share a disk."""

    environment: Mapping[str, str] = {
        **{k: v for k, v in ENVIRONMENT.items() if k != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"},
        "RAY_AUTH_MODE": "disabled",  # else `ray start` takes the token of the user's home, if there is one
    }

    def __init__(self, folder: Path) -> None:
        self._log: IO[str] = open(folder / "nodes.log", "w")  # noqa: SIM115 closed in `close`
        self._short = Path(tempfile.mkdtemp(prefix="c-", dir="/tmp"))  # sockets lie in it
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
        """How many are alive, once there are so many."""
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
        """The node's cable is out for so long; if it was given up, another one comes, beside what it still does."""
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
