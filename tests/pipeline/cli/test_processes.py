"""Commands as processes: what they import, and how interrupts and signals end them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from istanas.space import CellSpace, random_genotype
from pipeline.base.interruption import STILL_CLOSING
from pipeline.cli import options
from pipeline.cli.options import RESUMES, STARTS_OVER, hint_after_interrupt
from pipeline.config.load import load, run_hash
from pipeline.runs.directory import RunDir
from tests.pipeline.cli.tiny_commands import (
    COMMANDS,
    KEYS,
    WITHOUT_CONFIG,
    Command,
    as_process,
    error_lines,
    unignore_sigint,
)


def test_a_process_has_the_same_codes_and_streams_in_any_directory(
    here: Path,
) -> None:
    bad = as_process(here, "search", "--set", "search.epochs=0")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert len(error_lines(bad.stderr)) == 1
    nowhere = ("--set", "data={name: folder, root: nowhere}", "--set", "tracking.enabled=false")
    failed = as_process(here, "search", *nowhere)
    assert failed.returncode == 1
    assert len(error_lines(failed.stderr)) == 1
    assert failed.stdout == ""


def test_help_imports_neither_torch_nor_mlflow(here: Path) -> None:
    code = (
        "import sys; from pipeline.cli.commands import run; assert run(['run', '--help']) == 0;"
        "print([m for m in ('torch', 'mlflow', 'ray', 'cvxpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_search_in_process_imports_no_ray(here: Path) -> None:
    code = (
        "import sys; from pipeline.cli.commands import run; assert run(['search', '--config', 'tiny.yaml']) == 0;"
        "print([m for m in sys.modules if m.partition('.')[0] == 'ray'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    assert "epoch 2: loss" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def searching(here: Path, arguments: list[str]) -> subprocess.Popen[str]:
    """Start a search, and return when it has printed its second epoch."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=unignore_sigint,
    )
    assert process.stdout is not None
    assert any(line.startswith("epoch 2:") for line in process.stdout)
    return process


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (signal.SIGINT, 130, "interrupted: run the same command again to resume"),
        (signal.SIGTERM, 143, "terminated (SIGTERM): run the same command again to resume"),
        (signal.SIGHUP, 129, "the terminal was closed (SIGHUP): run the same command again to resume"),
    ],
    ids=["ctrl-c", "sigterm", "sighup"],
)
def test_an_interrupt_in_mid_epoch_is_one_line_and_the_run_resumes(
    istanas: Command, here: Path, number: signal.Signals, code: int, says: str
) -> None:
    arguments = ["search", "--config", "tiny.yaml", "--set", "search.epochs=12", "--set", "search.layers=4"]
    process = searching(here, arguments)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, out + err
    assert err.strip() == says  # below the terminal's ^C
    (path,) = (here / "runs").iterdir()
    stopped = RunDir(path)
    assert stopped.read().status == "FAILED"
    assert stopped.read().tags["istanas.outcome"] == "INTERRUPTED"
    done = len(stopped.metrics())
    assert 2 <= done < 12
    if number != signal.SIGINT:
        return  # the resumption does not depend on the signal
    resumed, out, err = istanas(*arguments, "--json")
    assert resumed == 0, err
    assert out.count("\n") == 1
    assert json.loads(out).keys() >= KEYS["search"]
    assert "resumed after epoch" in err
    assert f"epoch {done - 1}: loss" not in err
    assert [m.step for m in stopped.metrics()] == list(range(1, 13))
    assert stopped.read().tags["istanas.outcome"] == "FINISHED"


A_COMMAND = """
import signal, time
from pipeline.cli import commands as cli

class Finalised:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

@cli.cli.command()
def wait():
    {where}
    time.sleep(60)

cli.main()
"""


@pytest.mark.parametrize(
    "where",
    [
        'exec("signal.raise_signal(signal.SIGINT)")',  # as in the creation of a dataclass
        "Finalised()",  # Python swallows exceptions there
    ],
    ids=["in an import", "in a finaliser"],
)
def test_an_interrupt_ends_the_command_wherever_it_strikes(where: str, here: Path) -> None:
    (here / "waiting.py").write_text(A_COMMAND.format(where=where))
    command = [sys.executable, "-m", "waiting", "wait"]
    done = subprocess.run(
        command, cwd=here, capture_output=True, text=True, preexec_fn=unignore_sigint, timeout=50
    )
    assert (done.returncode, done.stderr.strip()) == (
        130,
        "interrupted: run the same command again to resume",
    )


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return the contents and times of files. Some releases of filelock change the time of a lock that is held."""
    return {
        file.name: (file.read_bytes(), 0 if file.suffix == ".lock" else file.stat().st_mtime_ns)
        for file in folder.iterdir()
    }


@pytest.mark.parametrize("job", ["search", "run", "retrain", "sweep"])
@pytest.mark.parametrize("fresh", [[], ["--fresh"]], ids=["resume", "fresh"])
def test_a_second_identical_command_names_the_first_and_changes_nothing(
    istanas: Command, here: Path, job: str, fresh: list[str]
) -> None:
    sweep = "sweep={trials: 2, space: {search.lr: {uniform: [0.01, 0.1]}}}"
    overrides = ["tracking.enabled=true", *([sweep] if job == "sweep" else [])]
    config = load("tiny.yaml", overrides)
    genotype = random_genotype(0, CellSpace(n_nodes=2))
    kind = "search" if job == "run" else job
    extra = {"genotype": genotype.to_json()} if job == "retrain" else {}
    path = Path("runs") / f"tiny-{kind}-{run_hash(config, kind, **extra)}"
    path.mkdir(parents=True)
    (path / "run.json").write_text("what the first one writes")
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(path=str(path))], stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        before = contents(path)
        command = [job, *(["--genotype", "random:0"] if job == "retrain" else []), "--config", "tiny.yaml"]
        sets = [part for override in overrides for part in ("--set", override)]
        code, _, err = istanas(*command, *sets, *fresh)
        after = contents(path)
    finally:
        first.kill()
        first.communicate()
    assert code == 2
    (line,) = err.splitlines()
    assert line == (
        f"error: run directory {path}: in use by process {first.pid} on {socket.gethostname()}; wait until it ends "
        "or stop it"
    )
    assert after == before
    assert {entry.name for entry in here.iterdir()} == {"tiny.yaml", "runs"}, "a store was written"
    assert [entry.name for entry in (here / "runs").iterdir()] == [path.name]


HOLD = """
import time
from pipeline.runs.directory import RunDir
with RunDir("{path}").lock():
    print("held", flush=True)
    time.sleep(600)
"""


def test_repeated_signals_do_not_interrupt_the_closing(here: Path) -> None:
    """Repeated Ctrl-C and SIGTERM do not prevent the closing of the run, in MLflow included."""
    settings = ["--set", "search.epochs=12", "--set", "tracking.enabled=true"]
    process = searching(here, ["search", "--config", "tiny.yaml", *settings])
    sent = 0
    while process.poll() is None and sent < 3000:
        process.send_signal(signal.SIGTERM if sent % 10 == 9 else signal.SIGINT)
        sent += 1
        time.sleep(0.01)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    *closing, last = err.strip().splitlines()
    assert last == "interrupted: run the same command again to resume"
    assert set(filter(None, closing)) == {STILL_CLOSING.decode().strip()}
    assert sent > 1
    (path,) = (here / "runs").iterdir()
    assert RunDir(path).read().status == "FAILED"

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{here / 'mlflow.db'}")
    (run,) = client.search_runs(["1"])
    assert run.info.status == "FAILED"


RESUMING = ("search", "retrain", "run", "sweep", "benchmark", "versus", "rank", "promote", "sync")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in WITHOUT_CONFIG])
def test_after_an_interrupt_only_a_job_is_said_to_resume(istanas: Command, here: Path, command: str) -> None:
    (here / "interrupted.py").write_text("raise KeyboardInterrupt")
    says = "run the same command again to resume"
    if command not in RESUMING:
        says = "nothing was stored; the same command starts over"
    code, out, err = istanas(command, "--plugin", "interrupted.py")
    assert (code, out, err.strip()) == (130, "", f"interrupted: {says}")


@pytest.mark.parametrize(("resumes", "says"), [(False, STARTS_OVER), (True, RESUMES)])
def test_an_interrupt_while_a_command_works_has_the_hint(resumes: bool, says: str) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    command = options.Command("interrupted", callback=interrupted, resumes=resumes)
    with pytest.raises(KeyboardInterrupt, match=says):
        command.invoke(command.make_context("interrupted", []))


def test_a_command_may_give_its_own_hint_after_an_interrupt() -> None:
    with (
        pytest.raises(KeyboardInterrupt, match="the inner hint"),
        hint_after_interrupt("another hint"),
        hint_after_interrupt("the inner hint"),
    ):
        raise KeyboardInterrupt
