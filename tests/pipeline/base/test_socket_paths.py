"""A TMPDIR that is too long for the paths of Unix sockets, as on macOS and in the scratch folders of schedulers."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from istanas.errors import IstanasError
from pipeline.base.socket_paths import (
    DATA_WORKER_SOCKET_PATH,
    LONGEST_PATH,
    RAY_SOCKET_PATH,
    short_temporary_folder,
)

BATCHES = """
import torch
from torch.utils.data import DataLoader
from pipeline.training.data_workers import report_lost_workers

with report_lost_workers(1):
    print(sum(batch.numel() for batch in DataLoader(torch.zeros(4, 3), batch_size=2, num_workers=1)))
"""
SESSION = """
import sys
from pathlib import Path
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.load import load

with Runtime(load(None, ["runtime.workers=1"]).runtime) as runtime:
    runtime.start(Path("run"))
    import ray
    print(ray.get(ray.put("sent")))
"""


@pytest.fixture
def long_folder(tmp_path: Path) -> Path:
    """A folder whose path is too long for a socket."""
    folder = tmp_path / ("x" * LONGEST_PATH)
    folder.mkdir()
    return folder


@pytest.mark.parametrize("below", [RAY_SOCKET_PATH, DATA_WORKER_SOCKET_PATH], ids=["ray", "data workers"])
@pytest.mark.parametrize("more", [0, 1], ids=["just fits", "too long"])
def test_sockets_lie_where_their_paths_are_short_enough(
    below: str, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as short:
        folder = Path(short, "x" * (LONGEST_PATH - len(below) - len(short) - 1 + more))
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        found = short_temporary_folder(below)
        assert (found == folder) == (more == 0)
        path = f"{found}{f'/{os.getpid()}'.ljust(len(below), 'x')}"
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path)
        os.unlink(path)


def test_no_short_folder_is_one_line(long_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(long_folder))
    with pytest.raises(IstanasError, match=r"^TMPDIR: .* is too long .*; .* at most 2 characters$"):
        short_temporary_folder(RAY_SOCKET_PATH, longest=len(RAY_SOCKET_PATH) + 2)


def run(code: str, folder: Path, temporary: Path) -> "subprocess.CompletedProcess[str]":
    """Run code with a TMPDIR."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=150,
    )


def test_data_workers_send_batches_under_a_long_tmpdir(tmp_path: Path, long_folder: Path) -> None:
    done = run(BATCHES, tmp_path, long_folder)
    assert (done.stdout.strip(), done.returncode) == ("12", 0), done.stderr


@pytest.mark.ray
def test_ray_starts_under_a_long_tmpdir(tmp_path: Path, long_folder: Path) -> None:
    done = run(SESSION, tmp_path, long_folder)
    assert (done.stdout.strip(), done.returncode) == ("sent", 0), done.stderr
