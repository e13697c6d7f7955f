"""Commands that are forked from a process that has imported their packages: each other start takes seconds of imports.

`warm_program()` returns the words of a command line that runs `istanas`, as `PROGRAM` does. Its process is a small
client (`tests/warm_client.py`), which gives its arguments, environment, folder and streams to the server of this test
process, sends its signals on, and ends as the command does; if it is killed, the server kills the command.

Tests start `PROGRAM` instead if they look at the process itself, such as its children or signal handlers, if they kill
it, or if they set variables that packages read when they are imported, such as RAY_AUTH_MODE.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import NoReturn

from tests.ray_cluster import ENVIRONMENT, ROOT
from tests.warm_client import LENGTH, SENT_ON

CLIENT = Path(__file__).with_name("warm_client.py")
# What commands import when they search, train, export, draw, and use Ray and MLflow.
PRELOADED = (
    "pipeline.cli.commands",
    "pipeline.jobs.search",
    "pipeline.jobs.retrain",
    "pipeline.jobs.export",
    "pipeline.jobs.run",
    "pipeline.sweeps.job",
    "mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.pyfunc",
    "ray.train.torch",
    "ray.tune",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "pandas",
)


@functools.cache
def warm_program() -> list[str]:
    """Return the words that start a command, after starting the server of this process."""
    folder = tempfile.mkdtemp(prefix="warm-")  # short, since paths of sockets are limited to 107 bytes
    address = os.path.join(folder, "socket")
    server = subprocess.Popen(
        [sys.executable, __file__, address],
        env={
            **ENVIRONMENT,
            "JE_ARROW_MALLOC_CONF": "background_thread:false",  # Arrow's own allocator starts a thread.
        },
        cwd=folder,
        stdin=subprocess.PIPE,  # The server exits when this pipe closes.
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    assert server.stdin is not None
    assert server.stdout.readline() == "ready\n", "the server of warm commands did not start"
    atexit.register(_end, server, folder)
    return [sys.executable, "-IS", str(CLIENT), address]


def _end(server: "subprocess.Popen[str]", folder: str) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait(10)
    os.rmdir(folder)


# ---------- in the server
def _serve(address: str) -> None:
    """Fork a process for each client, until the end of stdin."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    clients: dict[int, socket.socket] = {}  # process -> its client
    wakeup, written = os.pipe()
    for end in (wakeup, written):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(written)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    print("ready", flush=True)
    while True:
        readable, _, _ = select.select([0, wakeup, listener, *clients.values()], [], [])
        if wakeup in readable:
            os.read(wakeup, 512)
            _send_ends(clients)
        if 0 in readable:
            for process in clients:
                os.kill(process, signal.SIGKILL)
            os.unlink(address)
            return
        for process, client in clients.items():
            if client in readable:
                signals = client.recv(64)
                for number in signals or [signal.SIGKILL]:  # The client is gone.
                    os.kill(process, number)
        if listener in readable:
            client, _ = listener.accept()
            header, streams, _, _ = socket.recv_fds(client, LENGTH.size, 3)
            request = _receive(client, LENGTH.unpack(header)[0]) if len(header) == LENGTH.size else None
            if request is None:  # The client was killed.
                for descriptor in (*streams, client.detach()):
                    os.close(descriptor)
                continue
            signal.pthread_sigmask(signal.SIG_BLOCK, SENT_ON)  # until the command can handle them
            process = os.fork()
            if process == 0:
                signal.set_wakeup_fd(-1)
                for each in (listener, client, *clients.values()):
                    each.close()
                for descriptor in (wakeup, written):
                    os.close(descriptor)
                _run(request, streams)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SENT_ON)
            for descriptor in streams:
                os.close(descriptor)
            clients[process] = client


def _receive(client: socket.socket, length: int) -> bytes | None:
    """Return `length` bytes from a client; None if it has sent less and is gone."""
    received = bytearray()
    while len(received) < length:
        part = client.recv(min(length - len(received), 1 << 20))
        if not part:
            return None
        received += part
    return bytes(received)


def _send_ends(clients: dict[int, socket.socket]) -> None:
    """Send the status of each ended process to its client."""
    for process in list(clients):
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            client = clients.pop(process)
            with contextlib.suppress(BrokenPipeError):  # The client was killed.
                client.sendall(str(status).encode())
            client.close()


def _run(request: bytes, streams: list[int]) -> NoReturn:
    """Run a command in the forked process, as if the client had started it."""
    import numpy as np

    wanted = json.loads(request)
    os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(wanted["environment"])
    os.chdir(wanted["folder"])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    np.random.seed()
    sys.stdin = os.fdopen(0, closefd=False)
    unbuffered = os.isatty(1) or "PYTHONUNBUFFERED" in os.environ
    sys.stdout = os.fdopen(1, "w", 1 if unbuffered else -1, closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, closefd=False)
    sys.argv = [str(ROOT / "pipeline" / "cli" / "__main__.py"), *wanted["arguments"]]
    from pipeline.cli.commands import main

    code = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SENT_ON)
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    # The interpreter would take a second to free all modules; this does what else it does at its end.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    for name in PRELOADED:
        importlib.import_module(name)
    threads = [Path(f"/proc/self/task/{each}/comm").read_text() for each in os.listdir("/proc/self/task")]
    assert len(threads) == 1, f"threads do not survive a fork: {threads}"
    gc.collect()
    gc.freeze()
    _serve(sys.argv[1])
