"""Every kind of address: HOST:PORT, auto and ray://, on a cluster that wants a token; and a client that has none."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cli import run
from pipeline.rundir import RunDir
from pipeline.sweep_report import read_table
from tests.ports import unused_port
from tests.ray_cluster import ENVIRONMENT, RayCluster

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}
CONFIG = """
data: {name: digits, holdout: 0.2}
space: {nodes: 1, ops: [skip_connect, sep_conv_3x3]}
search: {epochs: 1, batch_size: 64, max_pictures: 256, init_channels: 4, layers: 3, arch_lr: 0.01}
retrain: {epochs: 1, batch_size: 256, init_channels: 4, layers: 3, auxiliary_weight: 0, drop_path: 0, cutout: 0}
runtime: {threads: 1, device: cpu}
tracking: {enabled: false}
sweep: {trials: 1, objective: valid, scheduler: none, space: {search.lr: {uniform: [0.01, 0.1]}}}
"""
# By a command that joins a cluster, in its own environment; here it is the tests'.
SET_ON_THE_WAY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def scratch() -> Iterator[str]:
    """Where Ray on this machine looks for "the" cluster; a short path, for sockets lie below it."""
    folder = tempfile.mkdtemp(prefix="ia-")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def client_port() -> int:
    return unused_port()


@pytest.fixture(scope="module")
def cluster(scratch: str, client_port: int) -> Iterator[RayCluster]:
    serving = {
        "RAY_TMPDIR": scratch,
        # A busy machine takes its time to start the process that serves a client,
        "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "120",
        # and forked while gRPC's threads were busy with another one, it sometimes hung before it had begun.
        "GRPC_ENABLE_FORK_SUPPORT": "0",
    }
    cluster = RayCluster(3, client_port, {**TOKEN, **serving})
    yield cluster
    cluster.close()


class Started:
    """A command in a folder of its own, all of whose output is kept."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        folder.mkdir()
        (folder / "tiny.yaml").write_text(CONFIG)
        self.folder = folder
        self._command = [sys.executable, "-m", "pipeline.cli", *arguments, "--config", "tiny.yaml"]
        self._environment = {**ENVIRONMENT, **TOKEN, **environment}
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def lines(self) -> list[str]:
        """All that it printed. Ray's server of clients hangs now and then before it has begun: one more try."""
        try:
            out, _ = self._process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            self._start()
            out, _ = self._process.communicate(timeout=300)
        assert self._process.returncode == 0, out
        return out.splitlines()

    def run_directory(self) -> Path:
        (path,) = (self.folder / "runs").glob("tiny-*")
        return path


def test_jobs_run_at_every_kind_of_address_and_none_without_the_token(
    cluster: RayCluster,
    client_port: int,
    scratch: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """HOST:PORT is what all other tests of clusters use. All at once: each waits for processes to start, mostly."""
    client = f"ray://127.0.0.1:{client_port}"
    one = ("--workers", "1", "--address")
    sweep = Started(tmp_path / "sweep", "sweep", "--address", client)
    auto = Started(tmp_path / "auto", "sweep", "--dry-run", "--address", "auto", RAY_TMPDIR=scratch)
    retrain = Started(tmp_path / "retrain", "retrain", "--genotype", "random:0", *one, client)

    *_, plan = auto.lines()
    assert plan == "a trial has 1 core; 3 fit, 1 at once", "this machine, or another cluster"

    # In this process, which does not get as far as to join.
    stranger = {**SET_ON_THE_WAY, "RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}
    for name, value in stranger.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert run(["search", *one, cluster.address]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: runtime.address is {cluster.address}: ")
    assert "token" in line
    assert not list((tmp_path / "runs").iterdir())

    # Through Ray's client, word for word as without: what Ray says to a client goes to the log.
    versions, storage, begun, workers, epoch, table, *_ = retrain.lines()
    assert versions.startswith("pre-flight: versions: the same on 1 node (")
    assert storage == f"pre-flight: storage: 1 node and this process share {retrain.folder}/runs"
    assert begun.startswith("retrain: runs/tiny-retrain-")
    assert workers.startswith("1 worker (cpu, gloo)")
    assert epoch.startswith("epoch 1: ")
    assert table.startswith("┏")
    assert RunDir(retrain.run_directory()).read().status == "FINISHED"
    assert "Connected to Ray cluster" in (retrain.run_directory() / "ray" / "driver.log").read_text()

    versions, storage, begun, plan, trial, table, *_ = sweep.lines()
    assert plan == "a trial has 1 core; 3 fit, 1 at once"
    assert trial.startswith("trial 0 done: ")
    assert table.startswith("┏")
    assert list(read_table(sweep.run_directory())["state"]) == ["COMPLETE"]


def test_an_address_that_is_none_says_which_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    for address, words in (
        (
            "http://127.0.0.1:8265",
            "'http://127.0.0.1:8265': that is the job server, for istanas submit; give HOST",
        ),
        ("auto", "'127.0.0.1:1': nobody answers there"),
    ):
        assert run(["search", "--workers", "1", "--address", address]) == 1
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert out == ""
        assert line.startswith(f"error: runtime.address is {words}")
        assert not any(Path("runs").iterdir())
