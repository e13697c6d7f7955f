"""A search on Ray Train's workers: killed anywhere it ends as if it had not been; it waits, grows and stops as told."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.checkpoint import FolderStore, load_latest
from pipeline.config import load
from pipeline.worker import Silent, open_dataset, search_worker
from tests.ranks import run_ranks
from tests.ray_cluster import ENVIRONMENT, RayCluster, title

CONFIG = """
space: {nodes: 2}
search: {epochs: 6, batch_size: 32, init_channels: 8, layers: 4, arch_lr: 0.05, cutout: 2}
runtime: {threads: 1, device: cpu}
tracking: {enabled: false}
"""
EPOCHS = 6
COMMAND = [sys.executable, "-m", "pipeline.cli", "search", "--config", "ray.yaml"]

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    cluster = RayCluster(4)
    yield cluster
    cluster.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ray.yaml").write_text(CONFIG)
    return tmp_path


class Command:
    """The command line in a folder, followed line by line."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []

    def until(self, pattern: str) -> str:
        """Read on up to the first line that begins with the pattern."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if re.match(pattern, line):
                return line
        raise AssertionError(f"no line like {pattern!r}:\n" + "\n".join(self.lines))

    def end(self) -> int:
        assert self.process.stdout is not None
        self.lines += [line.rstrip() for line in self.process.stdout]
        return self.process.wait(120)

    def kill(self, number: int = signal.SIGKILL) -> int:
        self.process.send_signal(number)
        return self.end()


def run_directory(folder: Path) -> Path:
    (path,) = (folder / "runs").iterdir()
    return path


def decided(path: Path) -> Any:
    """All bits of a run that the clock does not decide: weights, optimisers, codes, figures, genotypes."""
    saved = load_latest(path / "checkpoints")
    assert saved is not None
    for record in saved["history"]:
        del record["timestamp_ms"], record["seconds"], record["metrics"]["images_per_second"]

    def plain(value: Any) -> Any:
        if hasattr(value, "numpy"):
            return value.numpy().tobytes()
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(saved)


def search_without_ray() -> None:
    """What the workers run, on two ranks that Ray did not start; in the folder that the test names."""
    folder = Path(os.environ["ISTANAS_TEST_FOLDER"])
    config = load(folder / "ray.yaml")
    dataset = open_dataset(config, ("search",))
    search_worker(config, dataset, FolderStore(folder / "checkpoints"), Silent())


def listening(process: psutil.Process) -> set[str]:
    """The addresses of a process's open ports; none of one that has just ended."""
    try:
        connections = process.net_connections()
    except psutil.NoSuchProcess:
        return set()
    return {c.laddr.ip.removeprefix("::ffff:") for c in connections if c.status == psutil.CONN_LISTEN}


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


def test_killed_in_every_way_it_ends_bit_for_bit_as_if_it_had_not_been(
    cluster: RayCluster, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = ("--workers", "2", "--address", cluster.address)

    # Ctrl-C: all workers gone within ten seconds, and a run that goes on.
    first = Command(folder, *place)
    first.until("epoch 1:")
    assert len(cluster.workers()) == 2
    start = time.monotonic()
    assert first.kill(signal.SIGINT) == 130
    assert wait_for(lambda: not cluster.workers(), 10 - (time.monotonic() - start))
    assert first.lines[-1] == "interrupted: the same command resumes"
    assert "Traceback" not in "\n".join(first.lines)

    # SIGKILL of the driver in mid-epoch.
    second = Command(folder, *place)
    second.until("resumed after epoch 1")
    second.until("epoch 2:")
    assert second.kill() == -signal.SIGKILL
    path = run_directory(folder)
    assert json.loads((path / "run.json").read_text())["status"] == "RUNNING"
    other = folder.parent / "three"
    shutil.copytree(folder, other)

    # SIGKILL of everything that belongs to the job.
    third = Command(folder, *place)
    third.until("epoch 4:")
    for worker in cluster.workers():
        worker.kill()
    assert third.kill() == -signal.SIGKILL

    # SIGKILL of a worker in mid-epoch: replaced, the epoch starts again.
    fourth = Command(folder, *place)
    fourth.until("epoch 5:")
    cluster.workers()[0].kill()
    assert fourth.end() == 0, "\n".join(fourth.lines)
    assert any(re.match(r"lost worker \d .*: replacing it, the epoch starts again", x) for x in fourth.lines)
    assert "resumed after epoch 5" in fourth.lines

    reference = folder.parent / "reference"
    reference.mkdir()
    shutil.copy(folder / "ray.yaml", reference)
    monkeypatch.setenv("ISTANAS_TEST_FOLDER", str(reference))
    (outcomes,) = run_ranks([search_without_ray], 2)
    assert [outcome.value for outcome in outcomes] == [None, None]
    assert decided(path) == decided(reference)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, EPOCHS + 1))

    # Another number of workers goes on from the last epoch, with the same batches and schedule, and says so.
    third_place = ("--workers", "3", "--address", cluster.address)
    more = Command(other, *third_place)
    assert more.end() == 0, "\n".join(more.lines)
    assert "resumed after epoch 2" in more.lines
    assert any("no longer bit for bit" in line for line in more.lines)
    saved = load_latest(run_directory(other) / "checkpoints")
    assert saved is not None
    assert [record["workers"] for record in saved["history"]] == [2, 2, 3, 3, 3, 3]
    assert saved["search"]["weight_optimizer"]["param_groups"][0]["lr"] == pytest.approx(
        load_latest(path / "checkpoints")["search"]["weight_optimizer"]["param_groups"][0]["lr"]  # type: ignore[index]
    )


def test_what_the_cluster_cannot_hold_is_waited_for_and_given_up(cluster: RayCluster, folder: Path) -> None:
    command = Command(
        folder, "--workers", "5", "--address", cluster.address, "--set", "runtime.wait_minutes=0.1"
    )
    assert command.end() == 1
    waiting, given_up = command.lines
    assert waiting.startswith("waiting for 5 workers of 1 core; free now: 4 cores, 0 GPUs")
    assert given_up.startswith(
        "error: gave up after 0.1 minutes (runtime.wait_minutes) of waiting for 5 workers"
    )
    assert not list((folder / "runs").iterdir()), "a refusal left something behind"


def test_more_than_this_machine_can_ever_hold_is_refused_at_once(folder: Path) -> None:
    command = Command(folder, "--workers", "500", "--set", "search.batch_size=1000")
    assert command.end() == 1
    (line,) = command.lines
    assert re.match(
        r"error: waiting is of no use: 500 workers of 1 core are asked for, this machine has", line
    )


def test_an_address_where_nobody_answers_is_refused_at_once(folder: Path) -> None:
    start = time.monotonic()
    command = Command(folder, "--workers", "2", "--address", "127.0.0.1:1")
    assert command.end() == 1
    assert time.monotonic() - start < 30
    (line,) = command.lines
    assert line.startswith("error: runtime.address is '127.0.0.1:1': nobody answers there")


def test_a_ray_of_its_own_is_quiet_leaves_its_logs_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "t"
    scratch.mkdir()
    command = Command(folder, "--workers", "1", "--set", "search.epochs=1")
    me = psutil.Process(command.process.pid)
    command.until("epoch 1:")
    family = me.children(recursive=True)
    assert any("raylet" in title(p) for p in family)
    # torch's meeting point for the workers listens everywhere; everything of Ray does not.
    addresses = {a for p in family if "RayTrainWorker" not in title(p) for a in listening(p)}
    assert addresses == {"127.0.0.1"}
    assert command.end() == 0
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family)
    assert command.lines[0].startswith("search: runs/ray-search-")
    assert re.match(r"1 worker \(cpu, gloo\), each 1 thread, \d+ cores? on this machine", command.lines[1])
    assert command.lines[2].startswith("epoch 1: ")
    assert command.lines[3].startswith("┏"), "something between the epochs and the table"
    logs = run_directory(folder) / "ray"
    assert (logs / "driver.log").exists()
    assert list(logs.glob("session_*/raylet.out"))
    assert not (logs / "session").is_symlink()


def test_an_elastic_search_starts_small_grows_between_epochs_and_shrinks(folder: Path) -> None:
    cluster = RayCluster(1)
    try:
        command = Command(
            folder, "--workers", "1:2", "--address", cluster.address, "--set", "search.epochs=30"
        )
        command.until(r"1 worker \(")
        command.until("epoch 1:")
        cluster.add(1)
        command.until(r"2 workers \(")
        grown = command.until("resumed after epoch")
        assert int(grown.split()[-1]) >= 1
        command.until(r"2 workers instead of 1: the same global batch and schedule")
        command.until("epoch ")
        cluster.remove()
        command.until("lost worker")
        command.until(r"1 worker \(")
        command.until(r"1 worker instead of 2")
        command.until("epoch ")
        command.kill(signal.SIGINT)
    finally:
        cluster.close()
