"""A cluster of `clusters/local.sh` with its own folder, ports and token, and helpers that halt a job on it."""

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.followed import Followed, has_signal
from tests.ports import free_ports
from tests.ray_cluster import ENVIRONMENT, ROOT, arguments
from tests.waiting import poll, wait_until

SCRIPT = str(ROOT / "clusters" / "local.sh")


class LocalCluster:
    """The script with its environment: call it with the script's arguments. Nothing runs before "up".

    Args:
        cpus: The (logical) cores of each node.
        prefix: Words before the command, such as a command that drops privileges.
    """

    def __init__(self, cpus: int, prefix: Sequence[str] = ()) -> None:
        self.prefix = prefix
        self.folder = Path(tempfile.mkdtemp(prefix="loc-", dir="/tmp"))  # short: it contains sockets
        self.state, self.token_file = self.folder / "s", self.folder / "keys" / "auth_token"
        self.port, dashboard = free_ports(2)
        self.gcs, self.address = f"127.0.0.1:{self.port}", f"http://127.0.0.1:{dashboard}"
        self.environment = {
            **ENVIRONMENT,
            "LOCAL_STATE": str(self.state),
            "LOCAL_PORT": str(self.port),
            "LOCAL_DASHBOARD_PORT": str(dashboard),
            "LOCAL_CPUS": str(cpus),
            "PYTHON": sys.executable,
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_AUTH_MODE": "token",
        }
        self.environment.pop("RAY_AUTH_TOKEN", None)

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """Return the exit code and output of a call, without waiting for background processes."""
        done = subprocess.run(
            [*self.prefix, "bash", SCRIPT, *arguments],
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
        """Return all processes of the cluster."""
        holder = psutil.Process(int((self.state / "pid").read_text()))
        return [holder, *holder.children(recursive=True)]

    def close(self) -> None:
        """Stop the cluster, if it runs, and delete its files."""
        self("down")
        shutil.rmtree(self.folder, ignore_errors=True)


def halt_after_an_epoch(local: LocalCluster, job: str, client: Followed) -> psutil.Process:
    """Halt a job's command after its first epoch, so that it is certainly still running."""
    end = time.monotonic() + 240  # of all waits together
    logs = local.state / "1" / "session_latest" / "logs"

    def wait_for(words: str) -> None:
        wait_until(
            lambda: any(words in file.read_text() for file in logs.glob(f"job-driver-{job}.log")),
            end - time.monotonic(),
            f"{words!r} in the job's log",
            alive=lambda: client.process.poll() is None,
            interval=0.01,
        )

    wait_for("search: ")  # The process is found first, because the epochs that follow take a second.
    (command,) = [process for process in local.processes() if "search" in arguments(process)]
    wait_for("\nepoch 1:")
    command.suspend()
    return command


def resume_when_terminated(process: psutil.Process) -> None:
    """Resume a halted process when it has received SIGTERM, which it then handles first."""
    poll(lambda: has_signal(process.pid, "ShdPnd", signal.SIGTERM), 60, interval=0.01)
    process.resume()
