"""The connection between workers and the user's process, without Ray (with Ray: tests/integration/test_ray.py)."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from istanas.errors import ConfigError, IstanasError
from pipeline.base.interruption import signals_interrupt, uninterrupted
from pipeline.base.text import last_line
from pipeline.cli.commands import run
from pipeline.cli.doctor import check_cluster
from pipeline.cluster import lost_cluster
from pipeline.cluster.address import ask_ray, check_address
from pipeline.cluster.allotment import allotment, check_machine
from pipeline.cluster.launch import _on_workers, _RayJob
from pipeline.cluster.lost_cluster import watch_cluster
from pipeline.cluster.mailbox import Mailbox
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.keys import value_at
from pipeline.config.load import load
from pipeline.config.threads import usable_cores
from pipeline.config.workers import Node
from pipeline.training.epoch_record import FolderStore
from pipeline.training.observer import Silent
from tests.ports import unused_port
from tests.waiting import wait_until

SWEEP = Path(__file__).resolve().parents[3] / "tune_configs" / "sweep_digits.yaml"


# ---------- the mailbox
def test_a_checkpoint_is_kept_after_the_users_process_has_confirmed_it() -> None:
    async def talk() -> None:
        box = Mailbox(b"old")
        assert await box.begin("a", "places") == b"old"
        keeping = asyncio.ensure_future(box.keep("a", 1, b"new", b"line", 7, 2))
        await asyncio.sleep(0)
        assert not keeping.done()
        assert await box.take(1) == [("started", "places"), ("checkpoint", 1, b"new", b"line", 7, 2)]
        await box.kept(1, True)
        assert await keeping
        assert await box.begin("b", "places") == b"new", "the next group starts from the newest"

    asyncio.run(talk())


def test_messages_of_a_dead_group_are_ignored() -> None:
    async def talk() -> None:
        box = Mailbox(None)
        await box.begin("dead", "places")
        await box.begin("new", "places")
        await box.take(1)
        await box.post("dead", "epoch", b"")
        assert await box.keep("dead", 7, b"late", b"line", 7, 2) is False
        assert await box.begin("third", "places") is None
        await box.post(None, "lost", b"worker 0")  # The controller belongs to no group.
        assert await box.take(1) == [("started", "places"), ("lost", b"worker 0")]

    asyncio.run(talk())


def test_only_the_last_step_is_kept_and_waiting_has_a_time_limit() -> None:
    async def talk() -> None:
        box = Mailbox(None)
        await box.begin("a", "places")
        for step in range(5):
            await box.post("a", "step", b"%d" % step)
        await box.post("a", "epoch", b"1")
        assert await box.take(1) == [("started", "places"), ("step", b"4"), ("epoch", b"1")]
        assert await box.take(0.01) == []

    asyncio.run(talk())


# ---------- resources and addresses
def test_device_backend_and_threads_are_chosen_once_for_all_workers() -> None:
    auto = load(None, ["runtime.workers=4"]).runtime
    cpu = allotment(auto, [Node(8), Node(8)])
    assert (cpu.threads, cpu.compute.backend, cpu.bundle) == (4, "gloo", {"CPU": 4})
    gpu = allotment(auto, [Node(16, 2), Node(16, 2)])
    assert (gpu.threads, gpu.compute.backend, gpu.bundle) == (8, "nccl", {"CPU": 8, "GPU": 1})
    assert gpu.compute.autocast_dtype is torch.bfloat16
    with pytest.raises(ConfigError, match=r"runtime\.device: cuda requires a GPU"):
        allotment(load(None, ["runtime.workers=4", "runtime.device=cuda"]).runtime, [Node(8)])


def test_workers_receive_the_chosen_resources_and_absolute_paths() -> None:
    config = load(None, ["runtime.workers=2", "data.root=pictures", "search.latency_table=table.json"])
    sent = _on_workers(config, allotment(config.runtime, [Node(2)]))
    assert (sent.runtime.device, sent.runtime.threads) == ("cpu", 1)
    assert sent.data.root == str(Path("pictures").resolve())
    assert value_at(sent, "search.latency_table") == str(Path("table.json").resolve())
    bucket = load(None, ["runtime.workers=2", "data.name=webdataset", "data.root=s3://bucket/shards"])
    assert _on_workers(bucket, allotment(bucket.runtime, [Node(2)])).data.root == "s3://bucket/shards"


def test_a_machine_holds_two_workers_a_core_unless_threads_are_set() -> None:
    cores = usable_cores()

    def check(workers: int, *more: str) -> None:
        check_machine(load(None, [f"runtime.workers={workers}", "runtime.device=cpu", *more]).runtime)

    check(2 * cores)
    check(cores, "runtime.threads=1")
    for workers, more in (
        (2 * cores + 1, ()),
        (cores + 1, ("runtime.threads=1",)),
        (1, (f"runtime.threads={cores + 1}",)),
    ):
        with pytest.raises(
            IstanasError, match=r"runtime.workers: this machine is too small for .*: it has \d+ core"
        ) as caught:
            check(workers, *more)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "127.0.0.1:99999999"])
def test_an_address_without_a_listener_is_a_one_line_error(address: str) -> None:
    with pytest.raises(IstanasError, match=r"no process listens at ") as caught:
        check_address(address)
    assert "\n" not in str(caught.value)
    assert caught.value.field == "runtime.address"
    assert caught.value.remedy == "start the cluster, or give HOST:PORT of the head node, or auto"


@pytest.mark.parametrize("way", ["option", "setting", "variable", "variable, for auto"])
@pytest.mark.parametrize("command", ["search", "sweep", "sweep --dry-run", "doctor"])
def test_an_address_of_ray_client_is_refused_at_once_with_the_alternatives(
    command: str,
    way: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    client = "ray://127.0.0.1:10001"
    given = {
        "option": ["--address", client],
        "setting": ["--set", f"runtime.address='{client}'"],
        "variable": [],
        "variable, for auto": ["--address", "auto"],
    }[way]
    if way.startswith("variable"):
        monkeypatch.setenv("RAY_ADDRESS", client)
    workers = ["--workers", "1"] if command in ("search", "doctor") else ["--config", str(SWEEP)]
    assert run([*command.split(), *workers, *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    field = "RAY_ADDRESS" if way.startswith("variable") else "runtime.address"
    assert line == (
        f"error: {field}: '{client}' is an address for Ray Client, which is not supported; use istanas submit "
        "--address http://HOST:8265 (the job server) from outside the cluster, or --address HOST:6379 on one of "
        "its nodes"
    )
    assert not list(tmp_path.iterdir())


def test_a_job_without_workers_ignores_the_address_of_ray_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    assert not Runtime(load(None).runtime).joined


def test_the_last_line_of_an_error_is_its_cause() -> None:
    assert last_line(RuntimeError("Traceback:\n  File x\nValueError: no\n")) == "ValueError: no"
    assert last_line(RuntimeError()) == "RuntimeError"


def test_an_elastic_job_continues_after_a_limited_number_of_losses(tmp_path: Path) -> None:
    """Failed starts and preempted machines do not count as failures of the job."""
    from ray.exceptions import RayActorError
    from ray.train import ControllerError, WorkerGroupError

    class Notes(Silent):
        def note(self, text: str) -> None:
            said.append(text)

    said: list[str] = []
    config = load(None, ["runtime.workers='1:2'", "runtime.max_failures=1"])
    job = _RayJob(
        "search", config, FolderStore(tmp_path / "checkpoints"), Notes(), Runtime(config.runtime), ()
    )
    timeout = ControllerError(RuntimeError("The worker group startup timed out after 5.0 seconds. Potential"))
    taken = RayActorError(preempted=True)
    job._stuck_at = time.monotonic() + 60  # No worker has started yet.
    for _ in range(3):
        assert job._may_continue(timeout)
        assert job._may_continue(WorkerGroupError("lost", {0: ValueError(), 1: taken}))
    assert said == 3 * [
        "the workers ended, or did not start (The worker group startup timed out after 5.0 seconds): starting them "
        "again"
    ]
    job._stuck_at = float("inf")
    assert not job._may_continue(OSError())
    assert job._may_continue(WorkerGroupError("lost", {0: ValueError()}))
    assert not job._may_continue(timeout)
    assert not job._may_continue(WorkerGroupError("lost", {0: ValueError()}))


def test_an_unused_runtime_starts_nothing() -> None:
    with Runtime(load(None).runtime) as runtime:
        assert not runtime._connected


def test_an_elastic_job_needs_room_for_its_minimum_only() -> None:
    check_machine(load(None, ["runtime.workers='1:64'"]).runtime)
    too_many = 2 * usable_cores() + 1
    with pytest.raises(IstanasError, match="this machine is too small"):
        check_machine(load(None, [f"runtime.workers='{too_many}:{too_many + 1}'"]).runtime)


@pytest.mark.slow
def test_another_kind_of_server_is_not_taken_for_ray() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        check_address(address)  # A process listens there.
        start = time.monotonic()
        with pytest.raises(
            IstanasError, match="does not answer as Ray does, or requires a token; give HOST:PORT"
        ):
            ask_ray(address, seconds=8.0)()
        assert time.monotonic() - start < 15
    check = check_cluster("127.0.0.1:1")
    assert (check.state, check.message[:50]) == ("fail", "runtime.address: no process listens at '127.0.0.1:")


def test_ctrl_c_is_delivered_after_uninterruptible_work() -> None:
    before = signal.getsignal(signal.SIGINT)
    done = []

    def work() -> None:
        with uninterrupted() as interrupted:
            os.kill(os.getpid(), signal.SIGINT)
            wait_until(lambda: interrupted, 5, "the signal", interval=0.01)
            done.append(True)
            raise OSError("hidden by the interruption")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done
    assert signal.getsignal(signal.SIGINT) is before
    with ThreadPoolExecutor(1) as pool:  # No handler can be set in another thread.
        assert pool.submit(lambda: list(uninterrupted().__enter__())).result() == []


def test_sigterm_is_delivered_after_uninterruptible_work_despite_ray() -> None:
    def work() -> None:
        with uninterrupted() as interrupted:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: interrupted, 5, "the signal", interval=0.01)
            assert not ended
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray sets its own handler.

    with signals_interrupt() as ended:
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            work()
        assert signal.getsignal(signal.SIGTERM) is handler
        assert ended == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)  # It must not interrupt the cleanup.


# ---------- a lost cluster
STUCK = """
import signal, time
from pathlib import Path
from pipeline.cluster.lost_cluster import watch_cluster
with watch_cluster("sweep", Path("logs"), "127.0.0.1:{port}", 0.1, seconds_to_unwind=0.5):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # like a call into a library that handles no signals
    time.sleep(60)
"""


def test_the_loss_of_the_head_interrupts_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with socket.create_server(("127.0.0.1", 0)) as head:
        port = head.getsockname()[1]
        with watch_cluster("sweep", Path("logs"), f"127.0.0.1:{port}", 0.1):
            head.settimeout(10)
            for _ in range(2):  # Two looks are answered, and nothing is interrupted.
                head.accept()[0].close()
    began = time.monotonic()
    with (
        pytest.raises(
            IstanasError, match=f"^sweep: Ray was lost .no answer from 127.0.0.1:{port} for 0 s., see "
        ),
        watch_cluster("sweep", Path("logs"), f"127.0.0.1:{port}", 0.1),
    ):
        time.sleep(30)
    assert time.monotonic() - began < 10
    assert signal.getsignal(signal.SIGUSR1) == before


def test_uninterruptible_work_finishes_before_a_loss_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    exits: list[str] = []
    monkeypatch.setattr(lost_cluster, "_exit_process", exits.append)
    finished: list[bool] = []

    def deliver() -> None:
        with uninterrupted() as signals:
            wait_until(lambda: signals, 5, "the loss", interval=0.01)
            time.sleep(1)  # much longer than the process may take to unwind
            finished.append(True)

    with (
        pytest.raises(IstanasError, match=r"^sweep: Ray was lost "),
        watch_cluster("sweep", Path("logs"), f"127.0.0.1:{unused_port()}", 0.1, seconds_to_unwind=0.2),
    ):
        deliver()
    assert finished
    assert not exits


def test_a_process_that_cannot_be_interrupted_exits_with_the_same_error() -> None:
    command = [sys.executable, "-c", STUCK.format(port=unused_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: sweep: Ray was lost (no answer from 127.0.0.1:")
