"""What lies between workers and the user's process, without Ray (with it: tests/integration/test_ray.py)."""

import asyncio
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from istanas.errors import ConfigError, IstanasError
from pipeline.base.interruption import signals_interrupt, uninterrupted
from pipeline.base.text import last_line
from pipeline.cli.doctor import check_cluster
from pipeline.cluster import address as cluster_address
from pipeline.cluster import loss, ray_runtime
from pipeline.cluster.address import check_address
from pipeline.cluster.allotment import allotment, check_machine
from pipeline.cluster.launch import _on_workers, _RayJob
from pipeline.cluster.mailbox import Mailbox
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.load import load
from pipeline.config.workers import Node, usable_cores
from pipeline.training.observer import Silent
from tests.ports import unused_port


# ---------- the mailbox
def test_a_checkpoint_is_kept_only_when_the_users_process_says_so() -> None:
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


def test_a_dead_group_is_no_longer_listened_to() -> None:
    async def talk() -> None:
        box = Mailbox(None)
        await box.begin("dead", "places")
        await box.begin("new", "places")
        await box.take(1)
        await box.post("dead", "epoch", b"")
        assert await box.keep("dead", 7, b"late", b"line", 7, 2) is False
        assert await box.begin("third", "places") is None
        await box.post(None, "lost", b"worker 0")  # the controller speaks for no group
        assert await box.take(1) == [("started", "places"), ("lost", b"worker 0")]

    asyncio.run(talk())


def test_of_the_steps_only_the_last_is_kept_and_nothing_is_waited_for_longer_than_asked() -> None:
    async def talk() -> None:
        box = Mailbox(None)
        await box.begin("a", "places")
        for step in range(5):
            await box.post("a", "step", b"%d" % step)
        await box.post("a", "epoch", b"1")
        assert await box.take(1) == [("started", "places"), ("step", b"4"), ("epoch", b"1")]
        assert await box.take(0.01) == []

    asyncio.run(talk())


# ---------- who gets what
def test_device_backend_and_threads_are_chosen_once_for_all_workers() -> None:
    auto = load(None, ["runtime.workers=4"]).runtime
    cpu = allotment(auto, [Node(8), Node(8)])
    assert (cpu.threads, cpu.compute.backend, cpu.bundle) == (4, "gloo", {"CPU": 4})
    gpu = allotment(auto, [Node(16, 2), Node(16, 2)])
    assert (gpu.threads, gpu.compute.backend, gpu.bundle) == (8, "nccl", {"CPU": 8, "GPU": 1})
    assert gpu.compute.autocast_dtype is torch.bfloat16
    with pytest.raises(ConfigError, match=r"runtime\.device: cuda needs a GPU"):
        allotment(load(None, ["runtime.workers=4", "runtime.device=cuda"]).runtime, [Node(8)])


def test_workers_are_told_what_was_decided_and_absolute_paths() -> None:
    config = load(None, ["runtime.workers=2", "data.root=pictures"])
    sent = _on_workers(config, allotment(config.runtime, [Node(2)]))
    assert (sent.runtime.device, sent.runtime.threads) == ("cpu", 1)
    assert sent.data.root == str(Path("pictures").resolve())


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
            IstanasError, match=r"waiting is of no use: .* are asked for, this machine has"
        ) as caught:
            check(workers, *more)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "ray://127.0.0.1:1", "127.0.0.1:99999999"])
def test_an_address_where_nobody_listens_is_one_clear_line(address: str) -> None:
    with pytest.raises(
        IstanasError, match=r"nobody answers there .*start the cluster or give HOST:PORT"
    ) as caught:
        check_address(address)
    assert "\n" not in str(caught.value)


def test_the_last_line_of_an_error_is_what_happened() -> None:
    assert last_line(RuntimeError("Traceback:\n  File x\nValueError: no\n")) == "ValueError: no"
    assert last_line(RuntimeError()) == "RuntimeError"


def test_an_elastic_job_goes_on_after_losses_but_not_for_ever(tmp_path: Path) -> None:
    """Starts that fail and machines that are taken away are no failures of its own."""
    from ray.exceptions import RayActorError
    from ray.train import ControllerError, WorkerGroupError

    class Notes(Silent):
        def note(self, text: str) -> None:
            said.append(text)

    said: list[str] = []
    config = load(None, ["runtime.workers='1:2'", "runtime.max_failures=1"])
    job = _RayJob("search", config, tmp_path / "checkpoints", Notes(), Runtime(config.runtime), ())
    timeout = ControllerError(RuntimeError("The worker group startup timed out after 5.0 seconds. Potential"))
    taken = RayActorError(preempted=True)
    job._stuck_at = time.monotonic() + 60  # nothing has started yet
    for _ in range(3):
        assert job._may_go_on(timeout)
        assert job._may_go_on(WorkerGroupError("lost", {0: ValueError(), 1: taken}))
    assert said == 3 * [
        "the workers ended, or did not start (The worker group startup timed out after 5.0 seconds): again"
    ]
    job._stuck_at = float("inf")
    assert not job._may_go_on(OSError())
    assert job._may_go_on(WorkerGroupError("lost", {0: ValueError()}))
    assert not job._may_go_on(timeout)
    assert not job._may_go_on(WorkerGroupError("lost", {0: ValueError()}))


def test_a_runtime_that_nobody_needs_starts_nothing() -> None:
    with Runtime(load(None).runtime) as runtime:
        assert not runtime._ours


def test_an_elastic_job_needs_room_for_its_least_number_only() -> None:
    check_machine(load(None, ["runtime.workers='1:64'"]).runtime)
    too_many = 2 * usable_cores() + 1
    with pytest.raises(IstanasError, match="waiting is of no use"):
        check_machine(load(None, [f"runtime.workers='{too_many}:{too_many + 1}'"]).runtime)


@pytest.mark.slow
def test_who_listens_and_is_no_ray_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_address, "SECONDS_TO_ANSWER", 8.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        check_address(address)  # somebody is there
        start = time.monotonic()
        check = check_cluster(address)
        assert time.monotonic() - start < 15
    assert (check.state, check.remedy) == ("fail", cluster_address.NOT_RAY)
    assert check_cluster("127.0.0.1:1").state == "fail"


def test_ctrl_c_in_what_must_not_be_interrupted_comes_after_it() -> None:
    before = signal.getsignal(signal.SIGINT)
    done = []

    def work() -> None:
        with uninterrupted() as interrupted:
            os.kill(os.getpid(), signal.SIGINT)
            assert wait_until(lambda: bool(interrupted))
            done.append(True)
            raise OSError("which is not what it ends with")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done
    assert signal.getsignal(signal.SIGINT) is before
    with ThreadPoolExecutor(1) as pool:  # where no handler can be set
        assert pool.submit(lambda: list(uninterrupted().__enter__())).result() == []


def test_sigterm_in_what_must_not_be_interrupted_comes_after_it_whatever_ray_does() -> None:
    def work() -> None:
        with uninterrupted() as interrupted:
            os.kill(os.getpid(), signal.SIGTERM)
            assert wait_until(lambda: bool(interrupted))
            assert not ended
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray puts one of its own there

    with signals_interrupt() as ended:
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            work()
        assert signal.getsignal(signal.SIGTERM) is handler
        assert ended == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)  # must not interrupt the closing


def wait_until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


# ---------- a cluster whose head goes away
STUCK = """
import signal, time
from pathlib import Path
from pipeline.cluster import loss
loss.SECONDS_TO_UNWIND = 0.5
with loss.noticing_its_loss("sweep", Path("logs"), "127.0.0.1:{port}", 0.1):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # as a call into a library that hears of nothing
    time.sleep(60)
"""


def test_the_loss_of_the_head_interrupts_what_waits_for_it() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with socket.create_server(("127.0.0.1", 0)) as head:
        port = head.getsockname()[1]
        with loss.noticing_its_loss("sweep", Path("logs"), f"127.0.0.1:{port}", 0.1):
            time.sleep(1.5)  # it lives
    began = time.monotonic()
    with (
        pytest.raises(
            IstanasError, match=f"^sweep: Ray was lost .no answer from 127.0.0.1:{port} for 0 s., see "
        ),
        loss.noticing_its_loss("sweep", Path("logs"), f"127.0.0.1:{port}", 0.1),
    ):
        time.sleep(30)
    assert time.monotonic() - began < 10
    assert signal.getsignal(signal.SIGUSR1) == before


def test_what_must_not_be_interrupted_is_brought_to_its_end_before_the_loss_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss, "SECONDS_TO_UNWIND", 0.2)
    monkeypatch.setattr(loss, "_die", lambda words: died.append(words))
    died: list[str] = []
    ended: list[bool] = []

    def deliver() -> None:
        with uninterrupted() as noted:
            assert wait_until(lambda: bool(noted))
            time.sleep(1)
            ended.append(True)

    with (
        pytest.raises(IstanasError, match=r"^sweep: Ray was lost "),
        loss.noticing_its_loss("sweep", Path("logs"), f"127.0.0.1:{unused_port()}", 0.1),
    ):
        deliver()
    assert ended
    assert not died


def test_where_nothing_can_be_interrupted_the_process_ends_with_the_same_words() -> None:
    command = [sys.executable, "-c", STUCK.format(port=unused_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: sweep: Ray was lost (no answer from 127.0.0.1:")


# ---------- of a mere client
def runtime_at(address: str) -> Runtime:
    """As one that has joined."""
    runtime = Runtime(load(None, [f"runtime.address={address}", "runtime.workers=1"]).runtime)
    runtime._ours = True
    return runtime


def test_a_client_that_waits_for_a_cluster_that_is_gone_is_told_before_it_calls_there_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_runtime, "SECONDS_OF_A_CLIENT", 0.1)
    address = f"127.0.0.1:{unused_port()}"
    runtime, lost = runtime_at(f"ray://{address}"), list[bool]()

    def wait() -> None:
        try:
            time.sleep(30)
        finally:  # where it would tidy up on the cluster
            lost.append(runtime.lost)

    with (
        pytest.raises(IstanasError, match=f"^search: Ray was lost .no answer from {address} for "),
        runtime.noticing_a_clients_loss("search", Path("run")),
    ):
        wait()
    assert lost == [True]
    runtime.__exit__(None, None, None)  # does not call there, either


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("GRPC connection failed"),
        Exception("Ray Client is not connected. Please connect by calling `ray.init`."),
        importlib.import_module("grpc").RpcError("Stream removed"),  # Ray's, not ours
    ],
)
def test_a_client_whose_server_has_died_says_so_in_a_line(error: Exception) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        runtime = runtime_at(f"ray://127.0.0.1:{head.getsockname()[1]}")
        with (
            pytest.raises(IstanasError, match=f"^sweep: Ray was lost .{str(error)[:20]}.*; the same command"),
            runtime.noticing_a_clients_loss("sweep", Path("run")),
        ):
            raise error
    assert runtime.lost


def test_other_errors_of_a_client_and_those_of_a_node_stay_what_they_are() -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        for address, error in (
            ("127.0.0.1:1", ConnectionError()),
            ("ray://127.0.0.1:{}", ValueError()),
            ("ray://127.0.0.1:{}", BrokenPipeError(32, "Broken pipe")),
        ):
            runtime = runtime_at(address.format(head.getsockname()[1]))
            with pytest.raises(type(error)), runtime.noticing_a_clients_loss("search", Path("run")):
                raise error
            assert not runtime.lost
