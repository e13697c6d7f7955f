"""An MLflow server on 127.0.0.1."""

import contextlib
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.waiting import wait_until


@contextlib.contextmanager
def server(folder: Path, port: int) -> Iterator[None]:
    """Start an MLflow server on 127.0.0.1, and kill it with SIGKILL at the end."""
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "server.log", "a") as log:
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(
            lambda: _answers(port),
            120,
            "MLflow's server",
            alive=lambda: child.poll() is None,
            state=(folder / "server.log").read_text,
            interval=0.1,
        )
        yield
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
    except OSError:
        return False
    return True
