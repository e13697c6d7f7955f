"""MLflow's interface as a child process: it answers, takes a free port, and ends with its parent."""

import contextlib
import re
import signal
import socket
import socketserver
import subprocess
import sys
import textwrap
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from istanas.errors import ConfigError, IstanasError
from pipeline.tracking.store import open_client
from pipeline.tracking.ui import free_port, newest_run, serve_ui, wait_until_up
from tests.pipeline.cli.tiny_commands import unignore_sigint
from tests.ports import unused_port


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", unused_port())) as listener:
        yield listener.getsockname()[1]


def test_served_beside_a_taken_port_and_ended_cleanly(tmp_path: Path) -> None:
    client = open_client(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("one")
    newest = client.create_run(client.create_experiment("two"), start_time=2000)
    client.create_run(experiment, start_time=1000)
    script = f"""
        import sys
        from pipeline.tracking.ui import serve_ui
        sys.exit(serve_ui(tracking_uri="sqlite:///{tmp_path}/mlflow.db", port=int(sys.argv[1])))
    """
    with taken_port() as taken:
        command = [sys.executable, "-c", textwrap.dedent(script), str(taken)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=unignore_sigint
        ) as child:
            assert child.stdout is not None
            line = child.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
            assert found, line + child.communicate()[1]
            assert int(found[1]) > taken
            page = f"#/experiments/{newest.info.experiment_id}/runs/{newest.info.run_id}?workflowType=machine_learning"
            runs = page.partition("/runs/")[0]
            table = f"table of runs: {found[0]}/{runs}/runs?workflowType=machine_learning\n"
            assert child.stdout.readline() == table
            assert child.stdout.readline() == f"newest run: {found[0]}/{page}\n"
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


class EchoesOnce(socketserver.StreamRequestHandler):
    """Sends the first request back, as a socket does that is connected to itself; answers the others."""

    requests = 0

    def handle(self) -> None:
        request = self.rfile.readline()
        type(self).requests += 1
        self.wfile.write(request if self.requests == 1 else b"HTTP/1.1 200 OK\r\n\r\n")


def test_an_answer_that_is_not_http_is_asked_for_again(tmp_path: Path) -> None:
    with (
        socketserver.TCPServer(("127.0.0.1", 0), EchoesOnce) as server,
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True) as running,
        (tmp_path / "log").open("w+") as log,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        wait_until_up(running, f"http://127.0.0.1:{server.server_address[1]}", log)
        running.communicate("\n")
        server.shutdown()
    assert EchoesOnce.requests == 2


class WantsAPassword(BaseHTTPRequestHandler):
    """An MLflow server that requires a login."""

    def do_GET(self) -> None:
        self.send_error(401)

    do_POST = do_GET  # noqa: N815, the name is the library's

    def log_message(self, *_: object) -> None:
        pass


def test_a_running_server_is_announced(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), WantsAPassword) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
        assert serve_ui(tracking_uri=f"http://me:secret@127.0.0.1:{port}") == 0
        server.shutdown()
    out = capsys.readouterr().out
    assert out == f"MLflow: http://127.0.0.1:{port} (it runs already)\n"
    assert "newest run: not known" in caplog.text
    assert "secret" not in caplog.text


def test_a_server_that_does_not_answer_is_an_error() -> None:
    with taken_port() as port:
        pass
    with pytest.raises(
        IstanasError, match=rf"^MLflow store http://127.0.0.1:{port}: does not answer \(Connection ref"
    ):
        serve_ui(tracking_uri=f"http://me:secret@127.0.0.1:{port}")


def test_an_empty_store_has_no_newest_run(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert newest_run(uri, "http://here") is None
    assert list(tmp_path.iterdir()) == [], "looking makes no store"
    client = open_client(uri)
    assert newest_run(uri, "http://here") is None
    client.delete_run(client.create_run("0").info.run_id)
    assert newest_run(uri, "http://here") is None


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
