"""Jobs on a real cluster that wants its token: left, stopped and resumed, they end as they would have here."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from istanas.space import Genotype
from pipeline.checkpoint import load_latest
from pipeline.cli import run
from pipeline.rundir import RunDir
from pipeline.tracking import open_client
from tests.local_cluster import LocalCluster
from tests.ray_cluster import PROGRAM

EPOCHS = 6
CONFIG = f"""
space: {{nodes: 1, ops: [skip_connect, sep_conv_3x3]}}
search: {{epochs: {EPOCHS}, batch_size: 32, max_pictures: 320, init_channels: 4, layers: 3, arch_lr: 0.01}}
runtime: {{threads: 1, device: cpu}}
"""

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def head() -> Iterator[LocalCluster]:
    head = LocalCluster(2)
    try:
        code, said = head("up", "1")
        assert code == 0, said
        yield head
    finally:
        head.close()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: LocalCluster) -> Path:
    """A working directory of somebody whose home has the cluster's token, and nothing else says so."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "own.py").write_text("")
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    keys = tmp_path / "home" / ".ray"
    keys.mkdir(parents=True)
    (keys / "auth_token").write_text(head.token_file.read_text())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # of another cluster, for other commands
    monkeypatch.chdir(folder)
    return folder


class Client:
    """A command at somebody's terminal, followed line by line."""

    def __init__(self, *arguments: str) -> None:
        root = str(Path(__file__).resolve().parents[2])
        self.process = subprocess.Popen(
            [*PROGRAM, *arguments],
            env={**os.environ, "PYTHONPATH": root},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []

    def until(self, start: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if line.startswith(start):
                return
        raise AssertionError(f"no line begins with {start!r}:\n" + "\n".join(self.lines))

    def end(self) -> int:
        assert self.process.stdout is not None
        self.lines += [line.rstrip("\n") for line in self.process.stdout]
        return self.process.wait(60)


def halt_after_an_epoch(head: LocalCluster, job: str, client: Client) -> psutil.Process:
    """Halt a job's command once it has told of an epoch: however long the rest takes, it is in its middle."""
    end = time.monotonic() + 240
    logs = head.state / "1" / "session_latest" / "logs"
    while not any("\nepoch 1:" in file.read_text() for file in logs.glob(f"job-driver-{job}.log")):
        assert time.monotonic() < end, "no epoch is done"
        assert client.process.poll() is None, client.end()
        time.sleep(0.01)
    (command,) = [process for process in head.processes() if "search" in process.cmdline()]
    command.suspend()
    return command


def wake_when_told_to_end(process: psutil.Process) -> None:
    """Before it does anything else, it then hears of it."""
    end = time.monotonic() + 60
    while not signals(process, "ShdPnd") >> (signal.SIGTERM - 1) & 1 and time.monotonic() < end:
        time.sleep(0.01)
    process.resume()


def signals(process: psutil.Process, which: str) -> int:
    """The kernel's mask of them."""
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith(which)), 16)


def command(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, list[str]]:
    """The same in this process: exit code, stdout, the lines of stderr."""
    capsys.readouterr()
    code = run(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def test_a_job_is_followed_left_stopped_and_resumed_and_ends_as_it_would_have_here(
    head: LocalCluster,
    here: Path,
    tmp_path: Path,
    blank_database: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs, store = tmp_path / "shared", f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}"
    (tmp_path / "store").mkdir()
    shutil.copy(blank_database, tmp_path / "store")
    (here / "runs").mkdir()
    (here / "runs" / "large").write_bytes(b"not shipped")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    at = ("--address", head.address)
    search = ("search", "--config", "../tiny.yaml", "--set", f"runtime.runs_dir={runs}", "--workers", "0")

    assert command("jobs", *at, capsys=capsys)[1] == "no jobs yet\n"
    first = Client("submit", *at, "--name", "digits", "--", *search)
    driver = halt_after_an_epoch(head, "digits", first)
    first.until("epoch 1:")
    attached = Client("jobs", *at, "digits", "--follow")
    first.process.send_signal(signal.SIGINT)
    assert first.end() == 130
    log = "\n".join(first.lines)
    assert f"shipping {here}: 2 files" in log  # own.py, and the configuration
    assert "\x1b" not in log
    assert "\r" not in log
    assert "Attach again: " in log
    assert f"jobs digits --follow --address {head.address}" in log

    code, out, _ = command("jobs", *at, "--json", capsys=capsys)
    (listed,) = json.loads(out)["jobs"]
    assert (code, listed["id"], listed["status"], listed["exit_code"]) == (0, "digits", "RUNNING", None)
    assert listed["command"] == f"istanas {' '.join(search)}".replace("../", ".submitted/0/")

    attached.until("epoch 1:")  # from the beginning
    threading.Thread(target=wake_when_told_to_end, args=(driver,), daemon=True).start()
    code, out, _ = command("stop", *at, "digits", capsys=capsys)
    assert code == 0
    assert out.splitlines()[-1] == "digits: stopped; submitted again, the same command resumes"
    assert attached.end() == 143
    log = "\n".join(attached.lines)
    assert "told to end (SIGTERM): the same command resumes" in log
    assert "Traceback" not in log
    (path,) = runs.iterdir()
    stopped = RunDir(path)
    assert stopped.read().status == "FAILED"
    saved = load_latest(path / "checkpoints")
    assert saved is not None
    done = len(saved["history"])
    assert 1 <= done < EPOCHS, "it had ended before it was stopped: more epochs are needed"
    code, out, _ = command("stop", *at, "digits", capsys=capsys)
    assert (code, out) == (0, "digits: had ended before, STOPPED with exit code 143\n")

    taken = command("submit", *at, "--name", "digits", "--", *search, capsys=capsys)
    assert taken[0] == 2
    assert taken[2][-1].startswith(f"error: --name digits: {head.address} has had a job of this name, choose")
    second = Client("submit", *at, "--json", "--", *search)
    assert second.end() == 0
    (line,) = [line for line in second.lines if line.startswith("{")]
    job: dict[str, Any] = json.loads(line)
    assert (job["status"], job["exit_code"]) == ("SUCCEEDED", 0)
    assert job["id"].startswith("search-tiny-")
    assert f"resumed after epoch {done}" in "\n".join(second.lines)
    assert not [line for line in second.lines if line.startswith("epoch 1:")]
    assert [m.step for m in stopped.metrics()] == list(range(1, EPOCHS + 1))

    _, out, _ = command("jobs", *at, "--json", capsys=capsys)
    newest, oldest = json.loads(out)["jobs"]
    assert (newest["status"], newest["exit_code"]) == ("SUCCEEDED", 0)
    assert (oldest["status"], oldest["exit_code"]) == ("STOPPED", 143)
    assert "STOPPED (143)" in command("jobs", *at, "digits", capsys=capsys)[1]

    client = open_client(store)
    (experiment,) = client.search_experiments(filter_string="name = 'istanas'")
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED"
    assert len(client.get_metric_history(tracked.info.run_id, "train/loss")) == EPOCHS

    monkeypatch.delenv("RAY_ADDRESS")
    quiet = ("--set", "tracking.enabled=false", "--json")
    code, out, _ = command("search", "--config", "../tiny.yaml", *quiet, capsys=capsys)
    undisturbed = json.loads(out)
    found = Genotype.from_json((path / "genotype.json").read_text())
    assert undisturbed["genotype"] == found.to_dict()
    clock = "images_per_second"
    here_and_there = [RunDir(p).metrics() for p in (undisturbed["run_dir"], path)]
    figures = [[{k: v for k, v in m.metrics.items() if k != clock} for m in ms] for ms in here_and_there]
    assert figures[0] == figures[1]


def test_who_has_no_token_or_a_wrong_address_gets_one_line(
    head: LocalCluster, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(address: str, *more: str) -> tuple[int, str]:
        code, out, err = command("jobs", "--address", address, *more, capsys=capsys)
        assert out == ""
        (only,) = err
        return code, only

    at = f"error: --address {head.address}: the cluster "
    assert command("jobs", "--address", head.address, capsys=capsys)[0] == 0
    code, said = line(head.address, "unknown")
    assert (code, said) == (
        2,
        f"error: job 'unknown': unknown at {head.address}, istanas jobs lists those that there are",
    )
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 32)
    code, said = line(head.address)
    assert (code, said[: len(at) + 33]) == (1, f"{at}refuses the token of RAY_AUTH_TOK")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (Path.home() / ".ray" / "auth_token").unlink()
    code, said = line(head.address)
    assert (code, said[: len(at) + 15]) == (1, f"{at}wants its token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token_file))
    assert command("jobs", "--address", head.address, capsys=capsys)[0] == 0

    code, said = line(head.gcs)
    assert code == 1
    assert said.startswith(
        f"error: --address http://{head.gcs}: no Ray job server answers there (who listens there does not speak "
        "HTTP), give the address of the head's dashboard, such as http://127.0.0.1:8265"
    )
    code, said = line("127.0.0.1:1")
    assert code == 1
    assert "no Ray job server answers there (ConnectionRefusedError: Connection refused)" in said
    for address in (f"ray://{head.gcs}", "auto", "http://", "127.0.0.1:port"):
        code, said = line(address)
        assert code == 2
        assert "jobs are submitted to the head's dashboard, give http://HOST:8265" in said
