"""A Ray cluster of several nodes on this machine, in a process of its own that reads commands from stdin.

Commands: "add CPUS", "add CPUS FOLDER" (a node with another, empty folder there, as if it had a disk of its own; only
root can create one), "remove" (the node added last, as if its machine had died), "halt" and "wake" (all processes of
that node), "lost" (whether that node has shut itself down), "end". Each is answered with one line.
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
# Ports on 127.0.0.1 only, no telemetry, and a path on which workers find the packages under test.
ENVIRONMENT = {
    **os.environ,
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    # Seconds that a group waits for the resources of a lost node before it starts without them; default 60.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
    # Saves two processes per group of workers: this machine is not preempted, and Ray Train's metrics are not read.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    # Ray must not kill processes because others, such as those of another test, use memory.
    "RAY_memory_monitor_refresh_ms": "0",
    # A node counts as lost after five missed checks, one per second; by default after about 15 s.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "5",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}


class RayCluster:
    """A head node, to which nodes are added and from which they are removed.

    Args:
        cpus: The (logical) cores of the head node.
        environment: Variables of all its processes, in addition to `ENVIRONMENT`.
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
        self._command(f"add {cpus}" if apart is None else f"add {cpus} {apart}")

    def remove(self) -> None:
        self._command("remove")

    def halt(self) -> None:
        self._command("halt")

    def wake(self) -> None:
        self._command("wake")

    def has_lost_a_node(self) -> bool:
        """Return whether the node added last has shut down, as nodes do when they count as lost."""
        return self._ask("lost") == "yes"

    def workers(self) -> list[psutil.Process]:
        """Return Ray Train's workers on all nodes."""
        return self.named("RayTrainWorker")

    def named(self, part: str) -> list[psutil.Process]:
        """Return the processes on all nodes whose title contains a text."""
        return [p for p in self._children() if part in title(p)]

    def kill(self) -> None:
        """Kill all processes of the cluster."""
        for process in (psutil.Process(self._process.pid), *self._children()):
            process.kill()
        self._process.wait()

    def close(self) -> None:
        if self._process.poll() is not None:
            return
        processes = self._children()
        self._command("end")
        self._process.wait(30)
        kill(processes)  # processes that outlive the cluster

    def _children(self) -> list[psutil.Process]:
        return psutil.Process(self._process.pid).children(recursive=True)

    def _command(self, text: str) -> None:
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
        raise AssertionError("the process of the cluster has ended")


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kill the processes that are alive."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def arguments(process: psutil.Process) -> list[str]:
    """Return the command line of a process, or nothing if it has just ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def title(process: psutil.Process) -> str:
    """Return the title of a process: Ray overwrites the command line with it."""
    return " ".join(arguments(process))


def listening(process: psutil.Process) -> set[str]:
    """Return the addresses on which a process listens, or nothing if it has just ended."""
    try:
        connections = process.net_connections()
    except psutil.NoSuchProcess:
        return set()
    return {c.laddr.ip.removeprefix("::ffff:") for c in connections if c.status == psutil.CONN_LISTEN}


class _Apart:
    """While `folder` is set, new processes see an empty folder in its place.

    Each child enters a mount namespace, because a process with several threads could not leave it again.
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

    # Without a process on each node that sends log messages to drivers, which do not show them.
    common = {"include_log_monitor": False}
    head = {"num_cpus": cpus, "include_dashboard": False, **common}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    print(f"ANSWER {cluster.address}", flush=True)
    nodes, apart = [], _Apart()
    for line in sys.stdin:  # until "end", or until the test process is killed
        order, *words = line.split()
        if order == "add":
            apart.folder = words[1] if len(words) > 1 else None
            nodes.append(cluster.add_node(num_cpus=int(words[0]), **common))
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
