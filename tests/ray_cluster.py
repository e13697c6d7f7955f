"""A Ray cluster of several nodes on this machine, in a process of its own that takes orders on stdin.

Orders: "add CPUS", "add CPUS FOLDER" (a node that sees another, empty folder there, as if it lay on a disk of its own;
only root can make one), "remove" (the node added last, as if its machine had died), "halt" and "wake" (all processes
of that node), "lost" (whether that node has given itself up), "end". Each is answered by a line.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = [sys.executable, "-m", "pipeline.cli"]
# Ports on 127.0.0.1 only; no telemetry; workers of the tests find the packages under test.
ENVIRONMENT = {
    **os.environ,
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    # How long a group waits for a place that has gone with its node, before it starts without; else 60.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
    # Two processes for every group of workers less: nobody takes this machine away, or reads Ray Train's figures.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Nor are processes ended here because somebody else's, such as another test's, take memory.
    "RAY_memory_monitor_refresh_ms": "0",
    # A node is given up after five missed checks, one a second; else after some 15 s.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}


class RayCluster:
    """A head node with so many (logical) cores; more nodes come and go.

    Args:
        cpus: of the head node.
        environment: of all its processes, beside `ENVIRONMENT`.
    """

    def __init__(self, cpus: int, environment: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(cpus)],
            env={**ENVIRONMENT, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.address = self._answer()

    def add(self, cpus: int, apart: Path | None = None) -> None:
        self._order(f"add {cpus}" if apart is None else f"add {cpus} {apart}")

    def remove(self) -> None:
        self._order("remove")

    def halt(self) -> None:
        self._order("halt")

    def wake(self) -> None:
        self._order("wake")

    def has_lost_a_node(self) -> bool:
        """Whether the node added last has ended, as it does when it hears that it was given up."""
        return self._ask("lost") == "yes"

    def workers(self) -> list[psutil.Process]:
        """Ray Train's workers, on all nodes."""
        return self.named("RayTrainWorker")

    def named(self, part: str) -> list[psutil.Process]:
        """The processes whose title has a part like that, on all nodes."""
        return [p for p in self._children() if part in title(p)]

    def kill(self) -> None:
        """All of it at once."""
        for process in (psutil.Process(self._process.pid), *self._children()):
            process.kill()
        self._process.wait()

    def close(self) -> None:
        if self._process.poll() is not None:
            return
        processes = self._children()
        self._order("end")
        self._process.wait(30)
        kill(processes)  # what outlives its cluster

    def _children(self) -> list[psutil.Process]:
        return psutil.Process(self._process.pid).children(recursive=True)

    def _order(self, text: str) -> None:
        assert self._ask(text) == "done"

    def _ask(self, text: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return line.removeprefix("ANSWER ").strip()
        raise AssertionError("the cluster's process has ended")


def kill(processes: Iterable[psutil.Process]) -> None:
    """Those of them that live."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def arguments(process: psutil.Process) -> list[str]:
    """Its command line; none of one that has just ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def title(process: psutil.Process) -> str:
    """Ray writes what a process does over its command line."""
    return " ".join(arguments(process))


def listening(process: psutil.Process) -> set[str]:
    """The addresses of a process's open ports; none of one that has just ended."""
    try:
        connections = process.net_connections()
    except psutil.NoSuchProcess:
        return set()
    return {c.laddr.ip.removeprefix("::ffff:") for c in connections if c.status == psutil.CONN_LISTEN}


class _Apart:
    """While it names a folder, processes that are started see an empty one of their own in its place.

    In a mount namespace, which a process of several threads can enter but not leave: so each child enters it.
    """

    def __init__(self) -> None:
        self.folder: str | None = None
        self._libc = ctypes.CDLL(None, use_errno=True)
        os.register_at_fork(after_in_child=self._enter)

    def _enter(self) -> None:
        if self.folder is None:
            return
        new_mounts, recursive, private = 0x20000, 0x4000, 0x40000
        done = self._libc.unshare(new_mounts)
        done |= self._libc.mount(b"none", b"/", None, recursive | private, None)
        done |= self._libc.mount(b"none", self.folder.encode(), b"tmpfs", 0, None)
        if done != 0:
            os._exit(1)


def _serve(cpus: int) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False})
    print(f"ANSWER {cluster.address}", flush=True)
    nodes, apart = [], _Apart()
    for line in sys.stdin:  # up to "end", or the end of a test process that was killed
        order, *words = line.split()
        if order == "add":
            apart.folder = words[1] if len(words) > 1 else None
            nodes.append(cluster.add_node(num_cpus=int(words[0])))
            apart.folder = None
        elif order == "remove":
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        elif order in ("halt", "wake"):
            raylet = psutil.Process(_raylet(nodes[-1]).pid)
            for process in (raylet, *raylet.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGSTOP if order == "halt" else signal.SIGCONT)
        elif order == "lost":
            print(f"ANSWER {'no' if _raylet(nodes[-1]).poll() is None else 'yes'}", flush=True)
            continue
        elif order == "end":
            break
        print("ANSWER done", flush=True)
    cluster.shutdown()
    print("ANSWER done", flush=True)


def _raylet(node: Any) -> Any:
    (raylet,) = node.all_processes["raylet"]
    return raylet.process


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
