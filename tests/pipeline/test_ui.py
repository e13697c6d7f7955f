"""MLflow's interface as a child process: it answers, takes a free port, and ends with us."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from istanas.errors import ConfigError
from pipeline.ui import free_port, serve_ui


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_served_beside_a_taken_port_and_ended_cleanly(tmp_path: Path) -> None:
    script = f"""
        import sys
        from pipeline.ui import serve_ui
        sys.exit(serve_ui(tracking_uri="sqlite:///{tmp_path}/mlflow.db", port=int(sys.argv[1])))
    """
    with taken_port() as taken:
        command = [sys.executable, "-c", textwrap.dedent(script), str(taken)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            line = child.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            assert found, line + child.communicate()[1]
            assert int(found[1]) > taken
            with urllib.request.urlopen(found[0], timeout=30) as answer:
                assert b"MLflow" in answer.read()
            family = psutil.Process(child.pid).children(recursive=True)
            assert family
            child.send_signal(signal.SIGINT)  # Ctrl-C
            out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (0, "", "")
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(found[0], timeout=5)


def test_a_server_that_runs_already_is_pointed_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve_ui(tracking_uri="http://me:secret@host:5000") == 0
    out = capsys.readouterr().out
    assert out == "MLflow: http://host:5000 (it runs already)\n"


def test_free_port() -> None:
    with taken_port() as taken:
        assert free_port("127.0.0.1", taken) > taken
        with pytest.raises(ConfigError, match=r"no port from .* can be used"):
            free_port("127.0.0.1", taken, tries=1)
    for port in (0, 65536, -1):
        with pytest.raises(ConfigError, match=f"port {port}: not a port"):
            free_port("127.0.0.1", port)
    with pytest.raises(ConfigError, match="unknown"):
        free_port("no such host", 5000)
