"""The four jobs that every fault hits, each of which takes seconds, and the commands that run them."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos.cluster import OneMachine, TwoMachines
from tests.followed import has_signal
from tests.ray_cluster import ENVIRONMENT, PROGRAM, kill
from tests.waiting import wait_until

CELL = (
    '{"version": 1, "normal": [[["sep_conv_3x3", 0], ["skip_connect", 1]], [["max_pool_3x3", 2], ["dil_conv_3x3", 0]]],'
    ' "normal_concat": [2, 3], "reduce": [[["max_pool_3x3", 0], ["sep_conv_3x3", 1]], [["skip_connect", 2],'
    ' ["max_pool_3x3", 1]]], "reduce_concat": [2, 3]}'
)
COMMON = """
space: {nodes: 2}
data: {crop_padding: 1}
runtime: {threads: 1, device: cpu, wait_minutes: 5, max_failures: 20}
"""
TWO_STAGE = "search: {epochs: 10, batch_size: 32, init_channels: 6, layers: 3, arch_lr: 0.05, cutout: 2}\n"
ONE_STAGE = """
method: one_stage
search: {max_search_epochs: 4, train_epochs: 5, batch_size: 32, max_pictures: 640, init_channels: 6, layers: 3,
         arch_lr: 0.05, lr: 0.05, auxiliary_weight: 0.4, drop_path: 0.2, cutout: 2, test_every: 2}
"""
RETRAIN = """
retrain: {epochs: 10, batch_size: 32, init_channels: 6, layers: 3, auxiliary_weight: 0.4, drop_path: 0.2, cutout: 2}
"""
SWEEP = """
search: {epochs: 4, batch_size: 32, init_channels: 6, layers: 3, arch_lr: 0.05, cutout: 2}
sweep:
  trials: 3
  objective: valid
  scheduler: none
  max_concurrent: 1
  max_restarts: 9
  space: {search.lr: {loguniform: [0.01, 0.2]}, space.sparsity: {int: [1, 2]}}
"""


@dataclass(frozen=True)
class Job:
    """A command, its configuration and its total number of epochs."""

    name: str
    command: tuple[str, ...]
    config: str
    epochs: int


JOBS = {
    job.name: job
    for job in (
        Job("two-stage", ("search",), TWO_STAGE, 10),
        Job("one-stage", ("search",), ONE_STAGE, 10),
        Job("retraining", ("retrain", "--genotype", "cell.json"), RETRAIN, 10),
        Job("sweep", ("sweep",), SWEEP, 12),
    )
}
MARK = "ISTANAS_CHAOS_CASE"  # environment variable that identifies the processes of a case


@dataclass
class Case:
    """A job in its own folder, the faults that hit it, and its output.

    Args:
        job: The job.
        folder: The folder in which it runs.
        draw: Draws the moments, from a seed that the test prints.
        settings: Options of every start of the command.
        environment: Environment variables in addition to those of the tests.
        cluster: The cluster on which it runs, or None.
    """

    job: Job
    folder: Path
    draw: random.Random
    settings: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    cluster: OneMachine | TwoMachines | None = None
    may_repeat: int = 0  # reported epochs that may be repeated, since their checkpoint was damaged
    strikes: list[str] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "job.yaml").write_text(COMMON + self.job.config)
        (self.folder / "cell.json").write_text(CELL)

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def run(self) -> Path:
        """The run directory of the job; of a sweep, that of the sweep itself."""
        kind = self.job.command[0]
        (path,) = self.runs.glob(f"job-{kind}-*")
        return path

    @property
    def command(self) -> list[str]:
        """The arguments of `istanas`."""
        return [*self.job.command, "--config", "job.yaml", *self.settings]

    def start(self, *arguments: str) -> Attempt:
        """Start the command."""
        attempt = Attempt(self, arguments)
        self.attempts.append(attempt)
        return attempt

    def finish(self, *arguments: str) -> Attempt:
        """Run the command to its end, and check that it succeeds."""
        attempt = self.start(*arguments)
        code = attempt.end()
        assert code == 0, attempt.words
        return attempt

    def epochs_done(self) -> int:
        """Return the number of epochs in the metrics of all runs in the folder."""
        files = (*self.runs.glob("job-*/metrics.jsonl"), *self.runs.glob("job-sweep-*/trial-*/metrics.jsonl"))
        # The lines of a sweep's own metrics are trials.
        epochs = [file for file in files if not file.parent.name.startswith("job-sweep")]
        return sum(read_or_nothing(file).count(b"\n") for file in epochs)

    def moment(self, attempt: Attempt, left: int, *, going: bool = True) -> None:
        """Wait for a random moment that leaves enough epochs for the moments after it.

        Args:
            attempt: The running command, which must not end before.
            left: Number of moments to come, with this one.
            going: Whether at least one epoch must end in this attempt or since the last strike.
        """
        done = self.epochs_done()
        spare = self.job.epochs - done - 1 - left
        more = self.draw.randint(int(going), max(int(going), spare // left))
        seconds = self.draw.uniform(0, 0.6)
        attempt.wait(
            lambda: self.began() and self.epochs_done() >= done + more, f"{more} more epochs after {done}"
        )
        time.sleep(seconds)  # the random moment
        assert attempt.alive, f"it had ended before the strike:\n{attempt.words}"
        self.strikes.append(f"after epoch {self.epochs_done()}, {seconds:.2f} s")

    def began(self) -> bool:
        return any(self.runs.glob("job-*/run.json"))

    def processes(self) -> list[psutil.Process]:
        """Return all running processes of this case."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def told(self) -> list[str]:
        """Return all output, on the terminal and in the logs of trials."""
        return [
            *(attempt.words for attempt in self.attempts),
            *(file.read_text() for file in self.runs.glob("job-sweep-*/trial-*/trial.log")),
        ]

    def end_leftovers(self) -> None:
        """Kill the remaining processes, also after a failed test."""
        kill(self.processes())


class Attempt:
    """A running command of a case, whose output is read by a thread."""

    def __init__(self, case: Case, arguments: tuple[str, ...]) -> None:
        cluster = case.cluster
        place = ["--address", cluster.address] if cluster is not None else []
        command = [*PROGRAM, *case.command, *place, *arguments]
        command = [*(cluster.prefix if cluster is not None else ()), *command]
        environment = ENVIRONMENT if cluster is None else cluster.environment
        self.process = subprocess.Popen(
            command,
            cwd=case.folder,
            env={**environment, "PYTHONUNBUFFERED": "1", MARK: case.mark, **case.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a process group, as a shell makes it, for Ctrl-C
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    @property
    def words(self) -> str:
        return "\n".join(self.lines)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def listens(self) -> bool:
        """Return whether the command's handler for SIGTERM is installed, which Python imports first."""
        return has_signal(self.process.pid, "SigCgt", signal.SIGTERM)

    def said(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in list(self.lines))

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 180) -> None:
        """Wait until the condition is true, and fail if the command ends before."""
        alive, words = (lambda: self.alive), (lambda: self.words)
        wait_until(condition, seconds, what, alive=alive, state=words, interval=0.02)

    def end(self, seconds: float = 600) -> int:
        """Wait for the end of the command, and return its exit code."""
        code = self.process.wait(seconds)
        self._reader.join(30)
        return code


def read_or_nothing(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""
