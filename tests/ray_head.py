"""A Ray head node with dashboard and job server on 127.0.0.1, which asks everybody for its token."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

from tests.ports import free_ports
from tests.ray_cluster import ENVIRONMENT

PORTS = (
    *("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"),
    *("runtime-env-agent-port", "metrics-export-port", "node-manager-port", "object-manager-port"),
    "ray-client-server-port",
)


class RayHead:
    """`ray start --head`, with so many (logical) cores; jobs find `python` as these tests do."""

    def __init__(self, cpus: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="head-", dir="/tmp"))  # short: sockets lie in it
        self.token_file = self.folder / "token"
        self.token_file.write_text(secrets.token_hex(16))
        self.token_file.chmod(0o600)
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.gcs, self.address = f"127.0.0.1:{ports['port']}", f"http://127.0.0.1:{ports['dashboard-port']}"
        self.environment = {
            **ENVIRONMENT,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        options = [f"--{name}={port}" for name, port in ports.items()]
        options += [f"--num-cpus={cpus}", f"--temp-dir={self.folder}", "--include-dashboard=true"]
        options += ["--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
        with (self.folder / "head.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *options],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait_for_job_agent()

    def _wait_for_job_agent(self) -> None:
        """The dashboard answers before it takes jobs: that needs the node's agent."""
        headers = {"Authorization": f"Bearer {self.token_file.read_text()}"}
        request = urllib.request.Request(f"{self.address}/api/jobs/", headers=headers)
        end = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(request, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                said = (self.folder / "head.log").read_text()
                assert self._process.poll() is None, said
                assert time.monotonic() < end, said
                time.sleep(0.2)

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self._process.pid).children(recursive=True)

    def close(self) -> None:
        processes = self.processes() if self._process.poll() is None else []
        self._process.kill()  # told politely, it takes 20 s
        self._process.wait()
        for process in processes:
            if process.is_running():
                process.kill()
        psutil.wait_procs(processes, timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)
