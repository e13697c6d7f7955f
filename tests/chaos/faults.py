"""The faults. Each one hits a running job at random moments; after the last one, the job runs to its end."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pipeline.runs.directory import RunDir
from pipeline.runs.layout import LOCK_FILE
from tests.chaos.checks import check_nothing_lives
from tests.chaos.cluster import OneMachine, TwoMachines
from tests.chaos.victims import Attempt, Case
from tests.in_process import istanas
from tests.mlflow_server import server
from tests.namespaces import refusal
from tests.pipeline.runs.test_bucket import BUCKET, bucket, keys_of_the_bucket
from tests.ports import unused_port

RESUMES = "run the same command again to resume"


@dataclass(frozen=True)
class Fault:
    """A fault and what it requires.

    Args:
        name: Its name in the table.
        strike: Hits a case at the given moments. Each moment is the number of moments that are left, with itself: 1 is
            the last one, after which the job runs to its end, and the others leave epochs for those that follow.
        jobs: The jobs that it can hit; default: all.
        place: The job's cluster; None: it runs on this machine without a cluster.
        workers: Number of Ray Train's workers; 0: none.
        sweep_workers: The same for each trial of a sweep.
        settings: Returns additional options of a job's command.
        needs: Returns why the fault is impossible on this machine, or None.
    """

    name: str
    strike: Callable[[Case, Sequence[int]], None]
    jobs: tuple[str, ...] = ("two-stage", "one-stage", "retraining", "sweep")
    place: type[OneMachine] | type[TwoMachines] | None = None
    workers: int = 0
    sweep_workers: int = 0
    settings: Callable[[str], tuple[str, ...]] = lambda job: ()
    needs: Callable[[], str | None] = lambda: None


# ---------- sequences of strikes
def end_each_time(
    case: Case, moments: Sequence[int], strike: Callable[[Attempt], None], code: int, message: str = ""
) -> None:
    """Start the command again after each strike, which ends it with an exit code and a message."""
    for left in moments:
        attempt = case.start()
        case.moment(attempt, left, going=False)
        strike(attempt)
        ended = attempt.end()
        assert ended == code, f"exit code {ended}:\n{attempt.words}"
        assert not message or attempt.said(message), attempt.words
        check_nothing_lives(case)
    finish_after(case, moments)


def finish_after(case: Case, moments: Sequence[int], *arguments: str) -> None:
    """Run the job to its end, unless another fault follows."""
    if moments[-1] == 1:
        case.finish(*arguments)


def while_it_goes_on(case: Case, moments: Sequence[int], strike: Callable[[], None]) -> None:
    """Hit one command, which must survive all strikes."""
    attempt = case.start()
    for left in moments:
        case.moment(attempt, left)
        strike()
    assert attempt.end() == 0, attempt.words


# ---------- the job's own process
def kill_driver(case: Case, moments: Sequence[int]) -> None:
    end_each_time(case, moments, lambda attempt: attempt.process.kill(), -signal.SIGKILL)


def terminate(case: Case, moments: Sequence[int]) -> None:
    def strike(attempt: Attempt) -> None:
        attempt.wait(attempt.listens, "its signal handlers")
        attempt.process.terminate()

    end_each_time(case, moments, strike, 143, RESUMES)


def interrupt_twice(case: Case, moments: Sequence[int]) -> None:
    def strike(attempt: Attempt) -> None:
        attempt.wait(attempt.listens, "its signal handlers")
        os.killpg(attempt.process.pid, signal.SIGINT)
        time.sleep(case.draw.uniform(0, 0.5))  # a random moment
        with contextlib.suppress(ProcessLookupError):  # it has already ended
            os.killpg(attempt.process.pid, signal.SIGINT)

    end_each_time(case, moments, strike, 130)


def run_twice(case: Case, moments: Sequence[int]) -> None:
    """Start a second command while the first is halted and thus still has its directory locked."""
    first = case.start()
    for left in moments:
        case.moment(first, left)
        first.process.send_signal(signal.SIGSTOP)
        halted = psutil.Process(first.process.pid)
        first.wait(lambda halted=halted: halted.status() == psutil.STATUS_STOPPED, "its halt")  # type: ignore[misc]
        before = snapshot(case.run)
        second = case.start()
        assert second.end() == 2, second.words
        assert second.lines[-1].startswith("error: run directory "), second.words
        assert f"in use by process {first.process.pid} on " in second.lines[-1]
        changed = snapshot(case.run).items() ^ before.items()
        assert not changed, f"the refused command has changed files: {sorted(changed)}"
        first.process.send_signal(signal.SIGCONT)
    assert first.end() == 0, first.words


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of every file, except those that Ray and a sweep's trials write.

    The lock file is empty, and older releases of filelock change its time when they find it locked.
    """
    files = [f for f in folder.rglob("*") if f.is_file() and not f.is_symlink() and f.name != LOCK_FILE]
    own = [
        f for f in files if f.relative_to(folder).parts[0] != "ray" and not f.parent.name.startswith("trial-")
    ]
    return {str(f): (f.stat().st_size, f.stat().st_mtime_ns) for f in own if "checkpoints" not in f.parts}


# ---------- Ray's processes
def one_of(case: Case) -> OneMachine:
    assert isinstance(case.cluster, OneMachine)
    return case.cluster


def two_of(case: Case) -> TwoMachines:
    assert isinstance(case.cluster, TwoMachines)
    return case.cluster


def kill_worker(case: Case, moments: Sequence[int]) -> None:
    """Kill a worker of Ray Train or a sweep's trial, which is replaced while the command continues."""
    cluster = one_of(case)

    def strike() -> None:
        case.draw.choice(cluster.named("RayTrainWorker") or cluster.named("ray::ImplicitFunc")).kill()

    while_it_goes_on(case, moments, strike)
    check_workers_were_lost(case, len(moments))


def kill_controller(case: Case, moments: Sequence[int]) -> None:
    """Kill Ray Train's controller, with which its workers end; a new one starts while the command continues."""
    cluster = one_of(case)

    def strike() -> None:
        (controller,) = cluster.named("TrainController")
        controller.kill()

    while_it_goes_on(case, moments, strike)
    assert len(re.findall("lost Ray Train's controller", "\n".join(case.told()))) == len(moments)


def kill_node(case: Case, moments: Sequence[int]) -> None:
    """Replace the node on which the command does not run."""
    while_it_goes_on(case, moments, one_of(case).replace_node)
    check_workers_were_lost(case, len(moments))


def check_workers_were_lost(case: Case, times: int) -> None:
    """Check that each strike was reported. A sweep's trial, alone on one of two nodes, may be on the other one."""
    if case.job.name != "sweep":
        assert len(re.findall(r"^lost worker", "\n".join(case.told()), re.MULTILINE)) >= times


def kill_head(case: Case, moments: Sequence[int]) -> None:
    """Kill the whole cluster, and resume on a new one with another address."""
    cluster = one_of(case)
    for left in moments:
        attempt = case.start()
        case.moment(attempt, left)
        cluster.kill()
        assert attempt.end() == 1, attempt.words
        assert attempt.said(RESUMES), attempt.words
        cluster.start()
    finish_after(case, moments)


def lose_machine(case: Case, moments: Sequence[int]) -> None:
    """Kill the command and delete its disk, which has only a copy of the runs in a bucket."""
    disk, prefix = case.folder / "disk", f"runs/{case.mark}"
    copies = disk / "istanas" / "storage" / "s3-" / BUCKET / prefix
    case.runs.symlink_to(copies)
    where = ("--set", f"runtime.runs_dir=s3://{BUCKET}/{prefix}")
    with bucket() as server:
        case.environment = {**keys_of_the_bucket(), "XDG_CACHE_HOME": str(disk)}
        done = 0
        for left in moments:
            attempt = case.start(*where)
            attempt.wait(lambda done=done: case.epochs_done() >= done, "the files of the bucket")  # type: ignore[misc]
            case.moment(attempt, left, going=False)
            attempt.process.kill()
            attempt.end()
            check_nothing_lives(case)
            there = server.objects(prefix)
            done = sum(there[name].count(b"\n") for name in there if is_of_epochs(name))
            shutil.rmtree(disk)
        case.finish(*where)
        shutil.rmtree(disk)
        for name, data in server.objects(prefix).items():  # the bucket's files are compared
            (copies / name).parent.mkdir(parents=True, exist_ok=True)
            (copies / name).write_bytes(data)


def is_of_epochs(name: str) -> bool:
    """Return whether an object has one line per epoch; the lines of a sweep's own metrics are trials."""
    run, _, file = name.rpartition("/")
    return file == "metrics.jsonl" and not run.rpartition("/")[2].startswith("job-sweep")


def halt_node(case: Case, moments: Sequence[int]) -> None:
    """Halt the node for some seconds; it is replaced if the cluster gives it up."""
    while_it_goes_on(case, moments, lambda: one_of(case).halt_node(case.draw.choice((2, 3, 15))))


def longer_trials(job: str) -> tuple[str, ...]:
    """Return settings with which the sweep is not over before the node returns: a trial runs on the other node."""
    return ("--set", "search.epochs=40") if job == "sweep" else ()


def cut_off_node(case: Case, moments: Sequence[int]) -> None:
    """Cut the node's network link for some seconds; it is replaced if the cluster gives it up."""
    while_it_goes_on(case, moments, lambda: two_of(case).cut_off_node(case.draw.choice((2, 3, 15))))


# ---------- MLflow and its database
def kill_mlflow(case: Case, moments: Sequence[int]) -> None:
    """Kill MLflow's server and restart it; the last time only after the job, when `sync` delivers the rest.

    The command is halted while a server starts, which takes longer than all its epochs.
    """
    port = unused_port()
    store = case.folder / "mlflow"
    store.mkdir()
    shutil.copy(case.folder / "mlflow.db", store)
    case.environment = {**case.environment, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    attempt = None
    for left in moments:
        with server(store, port):
            if attempt is None:
                attempt = case.start()
            attempt.process.send_signal(signal.SIGCONT)
            case.moment(attempt, left)
        if left > 1:
            time.sleep(case.draw.uniform(0, 1))  # a random moment without a server
            attempt.process.send_signal(signal.SIGSTOP)
    assert attempt is not None
    assert attempt.end() == 0, attempt.words
    assert attempt.said("MLflow store .* can't be used"), attempt.words
    with server(store, port):
        typed(case, "sync", str(case.run))
    (case.folder / "mlflow.db").unlink()
    (case.folder / "mlflow.db").symlink_to(store / "mlflow.db")


def lock_sqlite(case: Case, moments: Sequence[int]) -> None:
    """Lock MLflow's database for some seconds, the last time to the end of the job.

    A sweep is always locked for seconds only: each trial, and the sweep for each trial, would wait for the lock.
    """
    attempt = case.start()
    for left in moments:
        case.moment(attempt, left)
        with writer(case.folder / "mlflow.db"):
            if left == 1 and case.job.name != "sweep":
                assert attempt.end() == 0, attempt.words
            else:
                time.sleep(case.draw.uniform(0, 8))  # how long the lock lasts
    assert attempt.end() == 0, attempt.words
    typed(case, "sync", str(case.run))


@contextlib.contextmanager
def writer(database: Path) -> Iterator[None]:
    connection = sqlite3.connect(database, timeout=30, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        connection.rollback()
        connection.close()


# ---------- the disk
def no_small_disk() -> str | None:
    return None if os.getuid() == 0 and shutil.which("mount") else "only root mounts a small disk"


def fill_disk(case: Case, moments: Sequence[int]) -> None:
    """Fill the disk of the runs, which is a small one meanwhile, and free it before the next start."""
    kept, filler = case.folder / "kept", case.runs / "filler"
    case.runs.mkdir(exist_ok=True)
    case.runs.rename(kept)
    case.runs.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(case.runs)], check=True)
    try:
        shutil.copytree(kept, case.runs, symlinks=True, dirs_exist_ok=True)
        for left in moments:
            attempt = case.start()
            case.moment(attempt, left, going=False)
            fill(filler)
            assert attempt.end() == 1, attempt.words
            assert attempt.said("(No space left|disk is full)"), attempt.words
            filler.unlink()
            check_nothing_lives(case)
        finish_after(case, moments)
        shutil.rmtree(kept)
        shutil.copytree(case.runs, kept, symlinks=True)
    finally:
        subprocess.run(["umount", "--lazy", str(case.runs)], check=True)
    case.runs.rmdir()
    kept.rename(case.runs)


def fill(file: Path) -> None:
    """Write a file until the disk is full."""
    with open(file, "wb", buffering=0) as stream, contextlib.suppress(OSError):
        while stream.write(bytes(1 << 16)):
            pass


def damage(case: Case, moments: Sequence[int]) -> None:
    """Kill the command and damage a file: a checkpoint is truncated or has a wrong bit, or metrics are truncated."""
    ways = [cut_checkpoint, flip_bit, spoil_sweep if case.job.name == "sweep" else cut_metrics]
    case.draw.shuffle(ways)
    for left in moments:
        attempt = case.start()
        case.moment(attempt, left)
        attempt.process.kill()
        attempt.end()
        check_nothing_lives(case)
        way = ways[left % len(ways)]
        way(case)
        case.strikes[-1] += f", {way.__name__}"
        case.may_repeat += way in (cut_checkpoint, flip_bit)
    finish_after(case, moments)


def newest(case: Case, pattern: str) -> Path:
    return max(case.runs.glob(pattern), key=lambda file: (file.stat().st_mtime_ns, file.name))


def newest_checkpoint(case: Case) -> Path:
    """Return the newest checkpoint with a checksum, which is written after the checkpoint."""
    return newest(case, "**/checkpoints/epoch-*.json").with_suffix(".pt")


def cut_checkpoint(case: Case) -> None:
    file = newest_checkpoint(case)
    data = file.read_bytes()
    file.write_bytes(data[: case.draw.randrange(len(data))])


def flip_bit(case: Case) -> None:
    file = newest_checkpoint(case)
    data = bytearray(file.read_bytes())
    data[case.draw.randrange(len(data))] ^= 1 << case.draw.randrange(8)
    file.write_bytes(data)


def cut_metrics(case: Case) -> None:
    file = newest(case, "**/metrics.jsonl")
    data = file.read_bytes()
    file.write_bytes(data[: -case.draw.randrange(1, 40)])


def spoil_sweep(case: Case) -> None:
    """Damage metrics of the sweep or of a trial, and all of Ray's files in the run directory."""
    cut_metrics(case)
    files = [file for file in case.run.glob("ray/**/*") if file.is_file() and not file.is_symlink()]
    assert files
    for file in files:
        file.write_bytes(case.draw.randbytes(64))


# ---------- numbers
def far_too_fast(job: str) -> tuple[str, ...]:
    """Return settings with which the loss exceeds its limit until the learning rate was halved some ten times."""
    section = "retrain" if job == "retraining" else "search"
    settings = [f"{section}.lr=1000", f"{section}.grad_clip=null"]
    settings += ["runtime.on_nan=rollback", "runtime.max_rollbacks=40", "runtime.max_loss=4"]
    if job == "sweep":
        settings[0] = "sweep.space={search.lr: {loguniform: [200, 1000]}, space.sparsity: {int: [1, 2]}}"
    return tuple(word for setting in settings for word in ("--set", setting))


def diverge(case: Case, moments: Sequence[int]) -> None:
    """Roll back and kill the command; the learning rate must stay halved."""
    kill_driver(case, moments)
    assert any("rolled back to" in text for text in case.told())


def fail_to_solve(case: Case, moments: Sequence[int]) -> None:
    """Kill a job whose solver, plain ISTA, misses the tolerance, so that another solver replaces it."""
    kill_driver(case, moments)
    lines = [line for file in case.runs.glob("**/metrics.jsonl") for line in RunDir(file.parent).metrics()]
    assert any(line.metrics.get("recovery/fallbacks", 0) > 0 for line in lines)
    assert max(line.metrics.get("recovery/gap", 0) for line in lines) <= 1e-9


# ---------- another command
def typed(case: Case, *arguments: str) -> None:
    """Run another `istanas` command in this process, which must succeed."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in case.environment.items():
            patch.setenv(name, value)
        istanas(case.folder, arguments)


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("SIGKILL of the command", kill_driver),
        Fault("SIGKILL of a worker", kill_worker, place=OneMachine, workers=2),
        Fault(
            "SIGKILL of Ray Train's controller",
            kill_controller,
            place=OneMachine,
            workers=2,
            sweep_workers=2,
        ),
        Fault("a node dies, another comes", kill_node, place=OneMachine, workers=2),
        Fault("the whole cluster dies, another comes", kill_head, place=OneMachine, workers=2),
        Fault("SIGKILL of the command, and its disk lost (runs in a bucket)", lose_machine),
        Fault("a node stands still (SIGSTOP), and is back", halt_node, place=OneMachine, workers=2),
        Fault(
            "a node is cut off, and is back",
            cut_off_node,
            place=TwoMachines,
            workers=2,
            settings=longer_trials,
            needs=refusal,
        ),
        Fault("MLflow's server is killed", kill_mlflow),
        Fault("MLflow's SQLite file locked by another writer", lock_sqlite),
        Fault("disk full", fill_disk, needs=no_small_disk),
        Fault("files damaged after a kill", damage),
        Fault("exploding loss, rolled back; and SIGKILL", diverge, settings=far_too_fast),
        Fault(
            "a solver that does not converge; and SIGKILL",
            fail_to_solve,
            jobs=("two-stage", "one-stage", "sweep"),
            settings=lambda job: ("--set", "space.solver=ista"),
        ),
        Fault("SIGTERM", terminate),
        Fault("SIGINT twice", interrupt_twice),
        Fault("the same command twice at once", run_twice),
    )
}
# `make test` hits one job with these, each sequence in a run of its own; other tests have the remaining faults.
FAST_JOB = "one-stage"
FAST = (
    ("MLflow's server is killed",),
    ("SIGINT twice", "files damaged after a kill", "disk full", "the same command twice at once"),
)
