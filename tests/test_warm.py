"""A command of `tests/warm.py` behaves as one of a process of its own: streams, exit code, environment, signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from istanas import __version__
from tests.waiting import wait_until
from tests.warm import warm_program
from tests.warm_client import LENGTH

# More than a socket's buffer holds, and less than Linux allows for one variable.
LARGE = {f"LARGE_{number}": "x" * 100_000 for number in range(8)}
PROBE = """
import json, os, sys
from istanas.data import register_dataset
register_dataset("probe", lambda request: None)
found = {"input": sys.stdin.read(), "folder": os.getcwd(), "large": sum(k[:6] == "LARGE_" for k in os.environ)}
print(json.dumps({**found, "process": os.getpid()}), flush=True)
"""
SLEEP = "import time\ntime.sleep(60)\n"


def started(folder: Path, plugin: str) -> "subprocess.Popen[str]":
    """Start a command that runs a plugin, whose output is on stderr."""
    (folder / "probe.py").write_text(plugin)
    return subprocess.Popen(
        [*warm_program(), "config", "--plugin", "probe.py", "--list"],
        cwd=folder,
        env={**os.environ, **LARGE},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def asleep(folder: Path) -> tuple["subprocess.Popen[str]", int]:
    """Start a command that sleeps in a plugin; returns the client and the process of the command."""
    client = started(folder, PROBE + SLEEP)
    assert client.stdin is not None
    assert client.stderr is not None
    client.stdin.close()
    client.stdin = None
    return client, json.loads(client.stderr.readline())["process"]


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        (["--version"], 0, __version__, ""),
        (["config", "--set", "search.epochs=no"], 2, "", "error: "),
    ],
)
def test_a_command_has_its_streams_and_exit_code(arguments: list[str], code: int, out: str, err: str) -> None:
    done = subprocess.run(
        [*warm_program(), *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code
    for found, wanted in ((done.stdout, out), (done.stderr, err)):
        assert wanted in found
        assert bool(found) == bool(wanted)


def test_a_command_has_its_input_folder_and_whole_environment(tmp_path: Path) -> None:
    client = started(tmp_path, PROBE)
    out, err = client.communicate("typed", timeout=60)
    assert client.returncode == 0
    assert "digits_quickstart" in out
    found = json.loads(err)
    assert (found["input"], found["folder"], found["large"]) == ("typed", str(tmp_path), len(LARGE))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_sent_on(tmp_path: Path, number: signal.Signals, code: int) -> None:
    client, process = asleep(tmp_path)
    client.send_signal(number)
    _, err = client.communicate(timeout=60)
    assert client.returncode == code
    assert "Traceback" not in err
    assert not psutil.pid_exists(process)


def test_a_killed_client_ends_its_command(tmp_path: Path) -> None:
    client, process = asleep(tmp_path)
    client.kill()
    client.communicate(timeout=60)
    assert wait_until(lambda: not psutil.pid_exists(process), 30, "the end of the command")


def test_a_signal_within_the_request_comes_after_it() -> None:
    """The request is larger than the socket's buffer, so that the client is still sending it."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen()
        words = [sys.executable, "-IS", warm_program()[2], f"{folder}/socket"]
        client = subprocess.Popen(words, env={**os.environ, **LARGE})
        server, _ = listener.accept()
        with server:
            header, streams, _, _ = socket.recv_fds(server, LENGTH.size, 3)
            for descriptor in streams:
                os.close(descriptor)
            client.send_signal(signal.SIGINT)
            stream = server.makefile("rb")
            request = json.loads(stream.read(LENGTH.unpack(header)[0]))
            assert request["environment"].items() >= LARGE.items()
            assert stream.read(1) == bytes([signal.SIGINT])
            server.sendall(b"0")
            assert client.wait(30) == 0
