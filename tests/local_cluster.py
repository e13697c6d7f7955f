"""The cluster of `clusters/local.sh`, with a folder, ports and a token of its own; and a job on it that is halted."""

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
from tests.ray_cluster import CLIENTS, ENVIRONMENT, ROOT, arguments
from tests.waiting import poll, wait_until

SCRIPT = str(ROOT / "clusters" / "local.sh")


class LocalCluster:
    """Call it as one calls the script; nothing runs before "up".

    Args:
        cpus: (logical) cores of each node.
        prefix: of the command, such as one that takes rights away.
    """

    def __init__(self, cpus: int, prefix: Sequence[str] = ()) -> None:
        self.prefix = prefix
        self.folder = Path(tempfile.mkdtemp(prefix="loc-", dir="/tmp"))  # short: sockets lie in it
        self.state, self.token_file = self.folder / "s", self.folder / "keys" / "auth_token"
        self.port, dashboard, client = free_ports(3)
        self.gcs, self.address = f"127.0.0.1:{self.port}", f"http://127.0.0.1:{dashboard}"
        self.client = f"ray://127.0.0.1:{client}"
        self.environment = {
            **ENVIRONMENT,
            **CLIENTS,
            "LOCAL_STATE": str(self.state),
            "LOCAL_PORT": str(self.port),
            "LOCAL_DASHBOARD_PORT": str(dashboard),
            "LOCAL_CLIENT_PORT": str(client),
            "LOCAL_CPUS": str(cpus),
            "PYTHON": sys.executable,
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_AUTH_MODE": "token",
        }
        self.environment.pop("RAY_AUTH_TOKEN", None)

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """Exit code and output of a call. It does not wait for what goes on in the background."""
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
        """All that runs of it."""
        holder = psutil.Process(int((self.state / "pid").read_text()))
        return [holder, *holder.children(recursive=True)]

    def close(self) -> None:
        """End it, if it runs, and leave nothing."""
        self("down")
        shutil.rmtree(self.folder, ignore_errors=True)


def halt_after_an_epoch(local: LocalCluster, job: str, client: Followed) -> psutil.Process:
    """Halt a job's command once it has told of an epoch: however long the rest takes, it is in its middle."""
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

    wait_for("search: ")  # it is looked up before the moment, the epochs that follow take a second
    (command,) = [process for process in local.processes() if "search" in arguments(process)]
    wait_for("\nepoch 1:")
    command.suspend()
    return command


def wake_when_told_to_end(process: psutil.Process) -> None:
    """Before it does anything else, it then hears of it."""
    poll(lambda: has_signal(process.pid, "ShdPnd", signal.SIGTERM), 60, interval=0.01)
    process.resume()
