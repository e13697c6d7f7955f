"""MLflow's user interface for a local store, served by a child process until Ctrl-C."""

import contextlib
import http.client
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import IO

from istanas.errors import ConfigError, IstanasError
from pipeline.base.interruption import signals_interrupt
from pipeline.base.servers import by_proxy, unreachable
from pipeline.base.text import one_line
from pipeline.tracking.store import (
    artifact_root,
    check_folder,
    open_client,
    public_uri,
    store_exists,
    store_uri,
)

_LOG = logging.getLogger(__name__)

START_SECONDS = 120.0
STOP_SECONDS = 10.0

Announce = Callable[[str, str, str | None], None]  # (address, store, address of the page of the newest run)


def announce_on_stdout(address: str, store: str, newest_run: str | None) -> None:
    """Print the address of the user interface, served by the store itself or by this command."""
    note = "it runs already" if address == store else f"store {store}; Ctrl-C ends it"
    lines = [f"MLflow: {address} ({note})"]
    if newest_run is not None:
        lines += [f"table of runs: {table_of_runs(newest_run)}", f"newest run: {newest_run}"]
    print("\n".join(lines), flush=True)


def table_of_runs(run_page: str) -> str:
    """Return the address of an experiment's table of runs, given the address of a run's page.

    Example:
        >>> table_of_runs("http://here/#/experiments/1/runs/ab?workflowType=machine_learning")
        'http://here/#/experiments/1/runs?workflowType=machine_learning'
    """
    experiment, _, run = run_page.rpartition("/")
    return experiment + run[len(run.partition("?")[0]) :]


def newest_run(uri: str, address: str) -> str | None:
    """Return the address of the newest run's page; None if there is no run, or the store does not answer.

    Args:
        uri: The store, as `pipeline.tracking.store.store_uri` returns it; a missing SQLite file is not created.
        address: The address of the user interface.
    """
    if not store_exists(uri):
        return None
    try:
        client = open_client(uri)
        experiments = [e.experiment_id for e in client.search_experiments()]
        found = client.search_runs(experiments, order_by=["attributes.start_time DESC"], max_results=1)
    except Exception as error:  # stores raise many types of errors, and the pages may require a password
        _LOG.warning(
            "newest run: not known, MLflow store %s can't be read (%s%s)",
            public_uri(uri),
            one_line(error),
            by_proxy(uri),
        )
        return None
    if not found:
        return None
    info = found[0].info
    # MLflow has two kinds of pages; this parameter selects those for the training of models.
    return f"{address}/#/experiments/{info.experiment_id}/runs/{info.run_id}?workflowType=machine_learning"


def serve_ui(
    *,
    tracking_uri: str | None,
    host: str = "127.0.0.1",
    port: int = 5000,
    announce: Announce = announce_on_stdout,
) -> int:
    """Serve MLflow's user interface until Ctrl-C or SIGTERM.

    Args:
        tracking_uri: See `pipeline.tracking.store.store_uri`; the user interface of a server is only announced.
        host: The network interface to listen on; the default is reachable from this machine only.
        port: The first port to try, 1..65535; the next free port is taken if it is in use.
        announce: Called with the addresses of the user interface, the store and the newest run when the server answers.

    Returns:
        The exit code: 0 after Ctrl-C.

    Raises:
        ConfigError: the port or the host cannot be used, or the store's folder does not exist.
        IstanasError: MLflow's server ended by itself, or a server does not answer.
    """
    uri = store_uri(tracking_uri)
    try:
        check_folder(uri)
    except FileNotFoundError as error:
        raise ConfigError(
            one_line(error),
            field=f"MLflow store {public_uri(uri)}",
            remedy="correct tracking.uri or MLFLOW_TRACKING_URI",
        ) from None
    if uri.startswith(("http://", "https://")):
        server_pages = public_uri(uri)  # a server serves its own pages
        if why := unreachable(server_pages):
            raise IstanasError(
                f"does not answer ({why})",
                field=f"MLflow store {server_pages}",
                remedy="start it or correct its address",
            )
        announce(server_pages, server_pages, newest_run(uri, server_pages.rstrip("/")))
        return 0
    port = free_port(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    with (
        tempfile.TemporaryFile("w+") as log,
        signals_interrupt(),
        _server(uri, host, port, log) as server,
    ):
        try:
            import mlflow  # noqa: F401  takes seconds, during which the server starts

            wait_until_up(server, address, log)
            announce(address, public_uri(uri), newest_run(uri, address))
            server.wait()
        except KeyboardInterrupt:
            return 0
        raise _ended(server, log)


def free_port(host: str, port: int, tries: int = 100) -> int:
    """Return the first unused port from `port` on.

    Args:
        host: The network interface.
        port: The first port to try, 1..65535.
        tries: How many ports to try, >= 1.

    Raises:
        ConfigError: no port is free, the number is out of range, or this machine has no such network interface.

    Example:
        >>> with socket.socket() as taken:
        ...     taken.bind(("127.0.0.1", 0)); taken.listen()
        ...     free_port("127.0.0.1", taken.getsockname()[1]) > taken.getsockname()[1]
        True
    """
    if not 1 <= port <= 65535:
        raise ConfigError("not a port", field=f"port {port}", remedy="give a number from 1 to 65535")
    last = min(port + tries - 1, 65535)
    for candidate in range(port, last + 1):
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[
                0
            ]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except socket.gaierror:
            raise ConfigError("unknown", field=f"host {host!r}", remedy="give 127.0.0.1 or 0.0.0.0") from None
        except PermissionError:
            raise ConfigError(
                "needs more rights", field=f"port {candidate}", remedy="give one above 1023"
            ) from None
        except OSError as error:
            reason = error.strerror
            continue
        return candidate
    raise ConfigError(
        f"no port from {port} to {last} can be used ({reason})",
        field=f"host {host!r}",
        remedy="give another --port",
    )


@contextlib.contextmanager
def _server(uri: str, host: str, port: int, log: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """Run MLflow's server in its own process group, and stop it on exit."""
    # The default, four workers, takes 2 GB and half a minute to start.
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        host,
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    environment = {"MLFLOW_DISABLE_TELEMETRY": "true"} | os.environ
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    # In the environment, because other users can read command lines, and the address may have a password.
    environment["MLFLOW_BACKEND_STORE_URI"] = uri
    artifacts = artifact_root(uri)
    if artifacts is not None:
        environment["MLFLOW_ARTIFACTS_DESTINATION"] = artifacts
    server = subprocess.Popen(
        command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield server
    finally:
        _stop(server)


def _stop(server: "subprocess.Popen[str]") -> None:
    # The whole group, because MLflow starts the web server as a child process. SIGKILL is always sent: it terminates
    # children that are still running after the server has exited, and has no effect on an empty group.
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_SECONDS)


def wait_until_up(server: "subprocess.Popen[str]", address: str, log: IO[str]) -> None:
    """Return as soon as MLflow's server answers.

    Args:
        server: The process of the server.
        address: The address of its user interface.
        log: What the server prints.

    Raises:
        IstanasError: the server ended, or does not answer within `START_SECONDS`.
    """
    deadline = time.monotonic() + START_SECONDS
    # Without proxies, which cannot reach this machine's loopback interface.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise _ended(server, log)
        # Until the server listens, TCP may connect the socket to itself if the port is one that the system assigns to
        # connections; the answer is then the request, which is not HTTP's status line.
        with contextlib.suppress(OSError, http.client.HTTPException):
            direct.open(f"{address}/health", timeout=5).close()
            return
        time.sleep(0.2)
    raise IstanasError(
        f"no answer at {address} after {START_SECONDS:.0f} s ({_last_line(log)})",
        field="MLflow's server",
        remedy="run the same command again",
    )


def _ended(server: "subprocess.Popen[str]", log: IO[str]) -> IstanasError:
    return IstanasError(f"ended with code {server.returncode}: {_last_line(log)}", field="MLflow's server")


def _last_line(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    return lines[-1] if lines else "no output"
