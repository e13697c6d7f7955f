"""A search on Ray Train's workers: it survives kills with the same result, waits for room, grows, and stops."""

import contextlib
import dataclasses
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

from istanas.space import Genotype
from pipeline.cli.commands import run
from pipeline.cli.doctor import check_cluster
from pipeline.config.load import load
from pipeline.training.epoch_record import EpochRecord, FolderStore, load_latest, load_progress, read_records
from pipeline.training.loop import retrain_worker, search_worker
from pipeline.training.observer import Silent
from pipeline.training.pictures import open_dataset
from tests.followed import Followed
from tests.ranks import run_ranks
from tests.ray_cluster import ENVIRONMENT, RayCluster, kill, listening, title

CONFIG = """
space: {nodes: 2}
search: {epochs: 8, batch_size: 32, init_channels: 8, layers: 4, arch_lr: 0.05, cutout: 2}
runtime: {threads: 1, device: cpu}
retrain: {epochs: 6, batch_size: 256, init_channels: 4, layers: 2, auxiliary_weight: 0.4, drop_path: 0.2, cutout: 2}
tracking: {enabled: false}
"""
EPOCHS, RETRAIN_EPOCHS = 8, 6

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A cluster with room for one worker, until a node is added."""
    cluster = RayCluster(1)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the search that all tests share: each start of workers takes half a minute."""
    return new_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the search's elastic copy."""
    return new_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same jobs, undisturbed, on two ranks without Ray."""
    folder = new_folder(tmp_path_factory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISTANAS_TEST_FOLDER", str(folder))
        (outcomes,) = run_ranks([run_without_ray], 2)
    assert [outcome.value for outcome in outcomes] == [None, None]
    return folder


def new_folder(factory: pytest.TempPathFactory) -> Path:
    folder = factory.mktemp("ray")
    (folder / "ray.yaml").write_text(CONFIG)
    return folder


class Command(Followed):
    """A command of the command line, in a folder."""

    def __init__(self, folder: Path, *arguments: str, job: str = "search") -> None:
        environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": "1"}
        command = (job, "--config", "ray.yaml", *arguments)
        super().__init__(*command, environment=environment, cwd=folder, own_group=True)

    def end(self) -> int:
        """Return the exit code, after checking that no message of Ray is on the terminal."""
        code = super().end()
        noise = [line for line in self.lines if "(raylet)" in line or "Traceback" in line]
        assert not noise, "\n".join(self.lines)
        return code

    def kill(self) -> int:
        self.process.kill()
        return self.end()

    def interrupt(self) -> int:
        """Send SIGINT to the command and its children, as a terminal does at Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.end()


def run_directory(folder: Path, job: str = "search") -> Path:
    (path,) = (folder / "runs").glob(f"ray-{job}-*")
    return path


def decided(path: Path) -> Any:
    """Return everything in a run that does not depend on time: weights, optimisers, codes, metrics, genotypes."""
    saved = load_latest(path / "checkpoints")
    assert saved is not None
    records = [dataclasses.asdict(record) for record in all_records(path / "checkpoints")]
    for record in records:
        del record["timestamp_ms"], record["seconds"], record["metrics"]["images_per_second"]

    def plain(value: Any) -> Any:
        if hasattr(value, "numpy"):
            return value.numpy().tobytes()
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain({**saved.state, "progress": records})


def all_records(folder: Path) -> list[EpochRecord]:
    return list(read_records(folder, load_progress(folder)))


def run_without_ray() -> None:
    """Run the workers' functions on ranks without Ray, in the folder that the test sets."""
    folder = Path(os.environ["ISTANAS_TEST_FOLDER"])
    config = load(folder / "ray.yaml")
    dataset = open_dataset(config, ("search", "retrain"))
    stores = {job: FolderStore(folder / job / "checkpoints") for job in ("search", "retrain")}
    done = search_worker(config, dataset, stores["search"], Silent())
    genotype = Genotype.from_json(done.newest.found().genotype)
    retrain_worker(config, dataset, stores["retrain"], Silent(), genotype)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


RESERVE = """
import os, sys, ray
from ray.util import placement_group
ray.init(sys.argv[1], log_to_driver=False, logging_level=50)
for name, bundle in (("", {"CPU": 1}), ("other", {"memory": 1})):
    if name == sys.argv[2]:
        ray.get(placement_group([bundle], name=name, lifetime="detached").ready())
context = ray.get_runtime_context()
print(context.get_session_name(), context.get_job_id())
"""
HOLD = """
import sys, ray
from ray.util import placement_group
ray.init(sys.argv[1], log_to_driver=False, logging_level=50)
ray.get(placement_group([{"CPU": 1}]).ready())
print("held", flush=True)
sys.stdin.read()
"""
POST_WITH_DELAY = """
import asyncio, sys, ray
from pipeline.cluster.launch import _Reporter
from pipeline.cluster.mailbox import Mailbox
from pipeline.training.epoch_record import Progress

class Slow(Mailbox):
    async def post(self, token, kind, payload):
        await asyncio.sleep(0.5 if kind == "note" else 0)
        await super().post(token, kind, payload)

ray.init(sys.argv[1], log_to_driver=False, logging_level=50)
mailbox = ray.remote(Slow).options(num_cpus=0).remote(None)
ray.get(mailbox.begin.remote("token", "places"))
reporter = _Reporter(mailbox, "token", workers=1)
reporter.note("where")
reporter.resumed(Progress(), 1)
reporter.finished(Progress())
print(*(kind for kind, *_ in ray.get(mailbox.take.remote(1))))
"""
INTERRUPTED = """
import sys, threading
from pathlib import Path
from pipeline.cluster.launch import prepare_workers, run_job
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.load import load
from pipeline.training.epoch_record import FolderStore
from pipeline.training.observer import Silent
from pipeline.training.pictures import open_dataset

class Interrupts(Silent):
    def note(self, text):
        raise KeyboardInterrupt

run = Path(sys.argv[3])
config = load(sys.argv[2], [f"runtime.address={sys.argv[1]}", "runtime.workers=1"])
dataset = open_dataset(config, ("search",))
with Runtime(config.runtime) as runtime:
    prepare_workers(config, run, runtime, lambda line: None)
    before = set(threading.enumerate())
    try:
        run_job("search", config, dataset, FolderStore(run / "checkpoints"), Interrupts(), runtime)
    except KeyboardInterrupt:
        print("interrupted", *(t.name for t in threading.enumerate() if t not in before and t.is_alive()))
"""
LEFT = """
import sys, ray
from ray.util import placement_group_table
ray.init(sys.argv[1], log_to_driver=False, logging_level=50)
print(*(g["name"] for g in placement_group_table().values() if g["state"] == "CREATED"))
"""


def on_cluster(cluster: RayCluster, code: str, *arguments: str) -> list[str]:
    """Return the words that a separate driver prints."""
    command = [sys.executable, "-c", code, cluster.address, *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.splitlines()[-1].split()


@contextlib.contextmanager
def core_of_another_job(cluster: RayCluster) -> Iterator[None]:
    """Inside, another job, without Ray Train, holds a core."""
    command = [sys.executable, "-c", HOLD, cluster.address]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=ENVIRONMENT, text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        assert process.stdin is not None
        process.stdin.close()  # The process exits.


def leave_behind(cluster: RayCluster, run: Path) -> None:
    """Leave a reservation of a core that outlives its job, as if the run had made it, and one of another job."""
    on_cluster(cluster, RESERVE, "other")
    (run / "ray" / "jobs.json").write_text(json.dumps([on_cluster(cluster, RESERVE, "")]))


def left_on(cluster: RayCluster) -> list[str]:
    return on_cluster(cluster, LEFT)


# ---------- one search, in the order of the tests, because each start of workers takes half a minute
def test_a_ray_that_a_command_starts_is_quiet_and_dies_with_its_driver(
    cluster: RayCluster, folder: Path
) -> None:
    command = Command(folder, "--workers", "1:2")  # Without other jobs, Ray Train counts the workers.
    # Meanwhile, a job that does not fit on the cluster waits and gives up.
    refused_folder = folder / "refused"
    refused_folder.mkdir()
    shutil.copy(folder / "ray.yaml", refused_folder)
    short = ("--set", "runtime.wait_minutes=0.1")
    refused = Command(refused_folder, "--workers", "5", "--address", cluster.address, *short)
    command.until("epoch 1:")
    family = psutil.Process(command.process.pid).children(recursive=True)
    assert any("raylet" in title(p) for p in family)
    assert sum("RayTrainWorker" in title(p) for p in family) == 2
    # Neither Ray nor torch, whose store is in a worker, listens on another address.
    assert {a for p in [*family, psutil.Process(command.process.pid)] for a in listening(p)} == {"127.0.0.1"}
    assert any(listening(p) for p in family if "RayTrainWorker" in title(p)), "no worker listens"
    assert command.kill() == -signal.SIGKILL
    agents = [p for p in family if "Agent" in title(p)]  # Ray's agents notice the end after a minute.
    assert wait_for(lambda: not any(alive(p) for p in family if p not in agents), 30), (
        "a process outlives the driver"
    )
    kill(agents)
    pictures, first, place, epoch, *more = [line for line in command.lines if line]
    assert pictures.startswith("pictures: digits: 1,438 training and 359 test pictures")
    assert first.startswith("search: runs/ray-search-")
    assert re.match(r"2 workers \(cpu, gloo\), each 1 thread, \d+ cores? on this machine", place)
    assert epoch.startswith("epoch 1: ")
    assert all(line.startswith("epoch ") for line in more)
    assert json.loads((run_directory(folder) / "run.json").read_text())["status"] == "RUNNING"

    assert refused.end() == 1
    versions, storage, waiting, given_up = refused.lines
    assert versions.startswith("pre-flight: versions: the same on 1 node (Python 3.")
    assert storage == f"pre-flight: storage: 1 node and this process share {refused_folder}/runs"
    assert waiting.startswith("waiting for 5 workers of 1 core; free now: 1 core, 0 GPUs")
    assert given_up.startswith(
        "error: runtime.wait_minutes: no room within 0.1 minutes for 5 workers of 1 core"
    )
    assert not list((refused_folder / "runs").iterdir()), "a rejected command left something behind"


def test_an_elastic_job_grows_and_shrinks_with_the_same_schedule(
    cluster: RayCluster, folder: Path, copy: Path, reference: Path
) -> None:
    """The copy of a run that was killed with two workers runs on one, two and one workers, and then without Ray."""
    shutil.copytree(folder / "runs", copy / "runs", symlinks=True)
    (run_directory(copy) / "ray" / "session").unlink()  # The other run collects these logs.
    cluster.add(1)
    with core_of_another_job(cluster):
        command = Command(copy, "--workers", "1:3", "--address", cluster.address)
        assert wait_for(lambda: len(cluster.workers()) == 1, 150)  # as many as there was room for
        cluster.add(1)
        command.until(r"1 worker \(")
        command.until(r"1 worker instead of 2: .* no longer identical")
        command.until("epoch ")
        assert command.until(r"\d workers? \(").startswith("2 "), "it was stopped although it could not grow"
        command.until(r"2 workers instead of 1")
        command.until("epoch ")
        cluster.remove()
        command.until("lost worker")
        command.until(r"1 worker \(")
        command.until(r"1 worker instead of 2")

    # On a cluster, Ctrl-C ends the workers, although they are not children of the command.
    workers = cluster.workers()
    assert workers
    start = time.monotonic()
    assert command.interrupt() == 130, command.lines
    assert wait_for(lambda: not any(map(alive, workers)), 10 - (time.monotonic() - start))
    assert command.lines[-1] == "interrupted: run the same command again to resume"
    path = run_directory(copy)
    assert json.loads((path / "run.json").read_text())["status"] == "FAILED"
    assert (path / "ray" / "driver.log").exists()

    last = Command(copy)
    assert last.end() == 0, "\n".join(last.lines)
    saved, unharmed = (load_latest(each / "checkpoints") for each in (path, reference / "search"))
    assert saved is not None
    assert unharmed is not None
    numbers = [record.workers for record in all_records(path / "checkpoints")]
    assert re.fullmatch("2+1+2+1*", "".join(map(str, numbers))), numbers
    rate, expected = (
        s.state["search"]["weight_optimizer"]["param_groups"][0]["lr"] for s in (saved, unharmed)
    )
    assert rate == expected


def test_a_run_whose_processes_are_killed_has_the_same_result(
    cluster: RayCluster, folder: Path, reference: Path
) -> None:
    """The driver was killed in the first test; here a worker and Ray Train's controller are, in the same command."""
    path = run_directory(folder)

    # Reservations that a killed command leaves on a cluster do not block the next one.
    leave_behind(cluster, path)

    # After SIGKILL within an epoch, a worker is replaced, and the epoch starts again.
    command = Command(folder, "--workers", "2", "--address", cluster.address, job="run")
    assert int(command.until("resumed after epoch").split()[-1]) >= 1
    assert list((path / "ray").glob("session_*/raylet.out")), "the killed Ray's logs are lost"
    assert not (path / "ray" / "session").is_symlink()
    cluster.workers()[0].kill()
    command.until(r"lost worker \d .*: replacing it and repeating the epoch")
    command.until("resumed after epoch")

    # In the retraining, Ray Train's controller is killed. The workers of the next controller need all cores, so that
    # those of the first must be released.
    command.until(f"epoch {EPOCHS}:")
    seen = len(command.lines)
    command.until("2 workers")
    controller = max(
        cluster.named("TrainController"), key=psutil.Process.create_time
    )  # the search's may still end
    command.until("epoch 1:")
    controller.kill()
    command.until("lost Ray Train's controller .*: starting a new one and repeating the epoch")
    command.until("resumed after epoch")
    assert command.end() == 0, "\n".join(command.lines)
    # Ray may release the search's reservations late.
    after = [line for line in command.lines[seen:] if not line.startswith("waiting for ")]
    pictures, retrain, workers, *_ = after
    assert pictures.startswith("pictures: digits: ")
    assert retrain.startswith("retrain: runs/ray-retrain-")
    assert workers.startswith("2 workers (cpu, gloo)")
    epochs = [number for number, line in enumerate(after) if line.startswith("epoch ")]
    assert [after[n].partition(":")[0] for n in epochs] == [
        f"epoch {e}" for e in range(1, RETRAIN_EPOCHS + 1)
    ]
    assert after[epochs[-1] + 1].startswith("┏"), "lines between the epochs and the table"
    kinds = ("RayTrainWorker", "TrainController", "ray::Mailbox")
    assert wait_for(lambda: not any(map(cluster.named, kinds)), 30), (
        "a process of the job is left on the cluster"
    )

    assert "other" in left_on(cluster), "the reservation of another job is gone"
    assert decided(path) == decided(reference / "search")
    assert decided(run_directory(folder, "retrain")) == decided(reference / "retrain")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, EPOCHS + 1))


def test_messages_of_a_worker_arrive_in_order(cluster: RayCluster) -> None:
    """Ray lets an asynchronous actor execute calls in any order. Here, the first call takes longest."""
    assert on_cluster(cluster, POST_WITH_DELAY) == ["started", "note", "resumed", "finished"]


def test_no_thread_uses_ray_while_an_interrupted_job_shuts_it_down(
    cluster: RayCluster, folder: Path, tmp_path: Path
) -> None:
    """Such a thread made Ray end the process, with exit code 1 or by SIGSEGV."""
    arguments = (str(folder / "ray.yaml"), str(tmp_path))
    assert on_cluster(cluster, INTERRUPTED, *arguments) == ["interrupted"]


def test_doctor_recognises_ray_at_an_address(cluster: RayCluster) -> None:
    assert check_cluster(cluster.address).state == "ok"


# ---------- rejected before any process is started
def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run(["search", "--config", "ray.yaml", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert not any(Path("runs").iterdir())
    (line,) = err.splitlines()
    return line


def test_too_many_workers_and_wrong_addresses_fail_immediately(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ray.yaml").write_text(CONFIG)
    line = refusal(["--workers", "500", "--set", "search.batch_size=1000"], capsys)
    assert re.match(
        r"error: runtime.workers: this machine is too small for 500 workers of 1 core: it has \d+ core", line
    )
    start = time.monotonic()
    line = refusal(["--workers", "2", "--address", "127.0.0.1:1"], capsys)
    assert time.monotonic() - start < 10
    assert line.startswith("error: runtime.address: no process listens at '127.0.0.1:1' (")
