"""Commands whose terminal or output pipe is closed."""

import errno
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from pipeline.cli.streams import _is_closed
from pipeline.runs.directory import RunDir

TINY = """
space: {nodes: 2}
search: {epochs: 3, batch_size: 64, init_channels: 2, layers: 3, max_pictures: 200}
runtime: {threads: 1, device: cpu}
tracking: {enabled: false}
"""
SEARCH = ["search", "--config", "tiny.yaml"]
PROGRAM = [sys.executable, "-m", "pipeline.cli"]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A working directory with a tiny configuration."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def the_run(here: Path) -> RunDir:
    """The only run of a working directory."""
    (path,) = (here / "runs").iterdir()
    return RunDir(path)


def on_a_terminal() -> None:
    """Make standard input the controlling terminal, as a shell's window does."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def broken_pipe() -> int:
    """The write end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


# ---------- a closed terminal
def test_a_closed_terminal_closes_the_run(here: Path) -> None:
    terminal, inside = pty.openpty()
    command = [*PROGRAM, *SEARCH, "--set", "search.epochs=50"]
    process = subprocess.Popen(
        command, cwd=here, stdin=inside, stdout=inside, stderr=inside, preexec_fn=on_a_terminal
    )
    os.close(inside)
    try:
        seen = b""
        while b"epoch 2:" not in seen:
            seen += os.read(terminal, 4096)
    finally:
        os.close(terminal)
    assert process.wait(60) == 129
    assert the_run(here).read().status == "FAILED"
    assert 2 <= len(the_run(here).metrics()) < 50


def test_under_nohup_a_closed_terminal_is_ignored(here: Path) -> None:
    process = subprocess.Popen(
        [*PROGRAM, *SEARCH],
        cwd=here,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert process.stdout is not None
    assert any(line.startswith("epoch 1:") for line in process.stdout)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert the_run(here).read().status == "FINISHED"


HANG_UP = """
import os, signal
from pathlib import Path
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.load import load

heard = []
signal.signal(signal.SIGHUP, lambda number, _: heard.append(number))
with Runtime(load(None, ["runtime.workers=1"]).runtime) as runtime:
    runtime.start(Path("run"))
    import psutil, ray
    processes = psutil.Process().children(recursive=True)
    os.killpg(os.getpgrp(), signal.SIGHUP)
    ray.get(ray.put("which Ray's store keeps"), timeout=60)
    lost = [p.name() for p in processes if p.status() == psutil.STATUS_ZOMBIE]
    print(heard, lost)
"""


@pytest.mark.ray
def test_rays_processes_outlive_the_terminal(here: Path) -> None:
    """The driver stops them after it has closed its run; if they ended first, Ray would terminate the driver."""
    done = subprocess.run(
        [sys.executable, "-c", HANG_UP],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=150,
        start_new_session=True,
    )
    assert done.stdout.splitlines()[-1:] == ["[1] []"], done.stderr


# ---------- a closed pipe
@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["text", "json"])
def test_a_job_outlives_the_reader_of_its_output(here: Path, as_json: list[str]) -> None:
    """As with `| head -1`: the reader exits after the first line, while the job runs."""
    stream = "stderr" if as_json else "stdout"
    process = subprocess.Popen(
        [*PROGRAM, *SEARCH, *as_json],
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    reader = getattr(process, stream)
    assert any(line.startswith("search: ") for line in reader)
    reader.close()
    setattr(process, stream, None)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert the_run(here).read().status == "FINISHED"
    if as_json:
        assert json.loads(out)["digest"]
    else:
        assert not err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["results"], 0),
        (["results", "--json"], 0),
        (["search", "--config", "absent.yaml"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_broken_pipe_changes_no_exit_code(here: Path, arguments: list[str], code: int, stream: str) -> None:
    writer, other = broken_pipe(), "stderr" if stream == "stdout" else "stdout"
    streams = {stream: writer, other: subprocess.PIPE}
    done = subprocess.run([*PROGRAM, *arguments], cwd=here, text=True, timeout=60, **streams)
    os.close(writer)
    assert done.returncode == code
    assert "Traceback" not in (done.stdout or "") + (done.stderr or "")
    assert "Broken pipe" not in (done.stdout or "") + (done.stderr or "")


def test_a_failing_disk_is_no_reader_that_has_gone(here: Path) -> None:
    """A terminal that was closed and a disk that fails have the same error."""
    terminal, other_end = pty.openpty()
    with open(here / "out.txt", "w") as file:
        found = [_is_closed(OSError(errno.EIO, "EIO"), end) for end in (other_end, file.fileno())]
        assert found == [True, False]
        assert _is_closed(OSError(errno.EPIPE, "EPIPE"), file.fileno())
    os.close(terminal)
    os.close(other_end)


def test_closed_streams_write_into_no_file(here: Path) -> None:
    """Without the redirection, the first files of a process would get the numbers of its closed descriptors."""
    code = "import os; from pipeline.cli.streams import ignore_closed_readers; ignore_closed_readers(); print('lost')\n"
    code += "os.write(2, b'lost'); file = open('first', 'w'); assert file.fileno() > 2; file.write('kept')\n"
    code += (
        'import subprocess, sys; child = \'print(open("second", "w").fileno(), file=open("number", "w"))\'\n'
    )
    code += "subprocess.run([sys.executable, '-c', child], check=True)"
    closed = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code]
    assert subprocess.run(closed, cwd=here, timeout=60).returncode == 0
    assert (here / "first").read_text() == "kept"
    assert int((here / "number").read_text()) > 2
