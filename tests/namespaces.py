"""A private network of machines on this one: network namespaces on a bridge that nothing outside can reach.

The machines share this machine's disk, as nodes share NFS; each one has its own 127.0.0.1. Only root can create them.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from types import TracebackType
from typing import Any

NETWORK = "10.77.0"


def refusal() -> str | None:
    """Return why namespaces cannot be created here, or None; one is created, since not every root may do so."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "network namespaces need iproute2 and util-linux"
    name = f"ist{os.getpid()}-try"
    for command in (
        ["ip", "netns", "add", name],
        ["ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth1"],
        ["ip", "netns", "delete", name],
        ["unshare", "--mount", "--uts", "true"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
            return f"namespaces can't be made here ({done.stderr.strip() or command[0]})"
    return None


class Network:
    """A number of machines, from 10.77.0.1 on, and the user's machine, 10.77.0.254."""

    def __init__(self, machines: int) -> None:
        self._prefix = f"ist{os.getpid()}"
        self.user = f"{self._prefix}-user"
        self.machines = [f"{self._prefix}-{n}" for n in range(1, machines + 1)]

    def __enter__(self) -> "Network":
        for name in (self.user, *self.machines):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", self.user, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.user, "addr", "add", f"{NETWORK}.254/24", "dev", "bridge")
        _ip("-n", self.user, "link", "set", "bridge", "up")
        for n, name in enumerate(self.machines, start=1):
            _ip(
                "-n",
                name,
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                "name",
                f"port{n}",
                "netns",
                self.user,
            )
            _ip("-n", self.user, "link", "set", f"port{n}", "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"{address(n)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in (*self.machines, self.user):
            subprocess.run(["ip", "netns", "delete", name], check=False)

    def start(self, name: str, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a process on a machine or on the user's machine."""
        return subprocess.Popen(
            ["ip", "netns", "exec", name, *command], text=True, start_new_session=True, **options
        )


def address(machine: int) -> str:
    """Return the address of a machine; the first is 1."""
    return f"{NETWORK}.{machine}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
