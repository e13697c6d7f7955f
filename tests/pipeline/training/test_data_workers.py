"""Lost data workers (`runtime.data_workers`): killed ones, and ones that can't send their batches."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from istanas.errors import IstanasError
from pipeline.base.interruption import signals_interrupt
from pipeline.runs.directory import RunDir
from pipeline.training.data_workers import report_lost_workers

BIG = """
data: {name: folder, root: pictures}
space: {nodes: 2}
search: {epochs: 1, batch_size: 8, init_channels: 2, layers: 3}
runtime: {threads: 1, device: cpu, data_workers: 2}
tracking: {enabled: false}
"""
SMALL_SHARED_MEMORY = "mount -t tmpfs -o size=1m none /dev/shm"


class Unsendable:
    """A batch for which there is no room."""

    def __reduce__(self) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Items(Dataset[Any]):
    """Batches that a worker does not survive."""

    def __init__(self, killed: bool) -> None:
        self.killed = killed

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        if self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return Unsendable()


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "can't send"])
def test_a_lost_data_worker_is_one_line_with_the_remedy(killed: bool) -> None:
    with pytest.raises(IstanasError) as caught, report_lost_workers(1):
        next(iter(DataLoader(Items(killed), batch_size=None, num_workers=1)))
    text = str(caught.value)
    assert text.startswith("runtime.data_workers: a process that decodes pictures was lost (DataLoader ")
    assert "set runtime.data_workers=0" in text
    assert "\n" not in text


def test_other_errors_beside_data_workers_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2$"), report_lost_workers(1):
        raise RuntimeError("mat1 and mat2")


def test_what_dies_with_the_command_does_not_disturb_its_closing() -> None:
    """A signal reaches data workers, too; torch raises in a handler of SIGCHLD when one of them has died."""

    def lost(*_: object) -> NoReturn:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    before = signal.signal(signal.SIGCHLD, lost)
    try:
        with signals_interrupt():
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
            subprocess.run(["true"], check=True)
        assert signal.getsignal(signal.SIGCHLD) is lost
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_small_dev_shm_ends_the_job_with_one_line(tmp_path: Path) -> None:
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-m", "sh", "-c", SMALL_SHARED_MEMORY], capture_output=True).returncode
    ):
        pytest.skip("a small /dev/shm needs util-linux and the right to mount")
    (tmp_path / "big.yaml").write_text(BIG)
    for split in ("train", "test"):
        for label in "ab":
            folder = tmp_path / "pictures" / split / label
            folder.mkdir(parents=True)
            for i in range(8):
                Image.fromarray(np.full((240, 240, 3), 16 * i, np.uint8)).save(folder / f"{i}.png")
    command = f'{SMALL_SHARED_MEMORY} && exec "$0" -m pipeline.cli search --config big.yaml'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command, sys.executable],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1, done.stderr
    # Torch 2.9 has a handler of the signal, which prints a line of its own, and a zero byte.
    *others, line = done.stderr.replace("\0", "").splitlines()
    assert all(other.startswith("ERROR: Unexpected bus error") for other in others), done.stderr
    assert line.startswith("error: runtime.data_workers: a process that decodes pictures was lost ")
    assert "/dev/shm has 1 MB" in line
    (path,) = (tmp_path / "runs").iterdir()
    assert RunDir(path).read().status == "FAILED"
