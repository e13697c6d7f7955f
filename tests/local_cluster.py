"""The cluster of `clusters/local.sh`, with a folder, ports and a token of its own."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from tests.ports import free_ports
from tests.ray_cluster import CLIENTS, ENVIRONMENT, ROOT

SCRIPT = str(ROOT / "clusters" / "local.sh")


class LocalCluster:
    """Call it as one calls the script; nothing runs before "up".

    Args:
        cpus: (logical) cores of each node.
    """

    def __init__(self, cpus: int) -> None:
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
            ["bash", SCRIPT, *arguments],
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
