"""The address of a Ray cluster: where it comes from, and whether Ray answers there."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil

from istanas.errors import ConfigError, IstanasError
from pipeline.base.redaction import without_secrets

RAY_ADDRESS = "RAY_ADDRESS"
SECONDS_TO_ANSWER = 20.0
HEAD_NODE = "give HOST:PORT of the head node, or auto"
# Ray's name for the variable is misleading: on Linux, 0 binds every port to 127.0.0.1.
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def find_address(address: str | None) -> str | None:
    """Return the cluster's address: as given, from RAY_ADDRESS, or, for "auto", that of the newest cluster here.

    Returns:
        HOST:PORT, or None to start Ray on this machine. "auto" is returned if Ray itself has to find the cluster.

    Raises:
        ConfigError: The address is for Ray Client (ray://), which is not supported.

    Example:
        >>> find_address("local"), find_address("head:6379")
        (None, 'head:6379')
    """
    if address in (None, "auto"):
        address = os.environ.get(RAY_ADDRESS) or address
    if address == "auto":
        # `ray start` writes this file. Without the address in it, Ray would join any cluster that runs here.
        file = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray", "ray_current_cluster")
        with contextlib.suppress(OSError):
            address = file.read_text().strip() or address
    if address is not None and address.startswith("ray://"):
        raise ConfigError(
            f"{without_secrets(address)!r:.60} is an address for Ray Client, which is not supported",
            field=setting_of(address),
            remedy="use istanas submit --address http://HOST:8265 (the job server) from outside the cluster, or "
            "--address HOST:6379 on one of its nodes",
        )
    return None if address == "local" else address


def from_environment(address: str | None) -> bool:
    """Return whether an address comes from the user's RAY_ADDRESS. In a submitted job, Ray itself sets RAY_ADDRESS."""
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return bool(address) and address == os.environ.get(RAY_ADDRESS) and not submitted


def setting_of(address: str | None) -> str:
    """Return the setting that an address comes from, for error messages.

    Example:
        >>> setting_of("head:6379")
        'runtime.address'
    """
    return RAY_ADDRESS if from_environment(address) else "runtime.address"


def address_error(address: str, problem: str, remedy: str) -> IstanasError:
    """Return the error for an address at which no cluster can be used."""
    field = setting_of(address)
    if field == RAY_ADDRESS:
        remedy += ", or unset RAY_ADDRESS to start Ray on this machine"
    return IstanasError(problem, field=field, remedy=remedy)


def check_address(address: str) -> None:
    """Reject an address at which no process listens, because Ray would try to connect for minutes.

    Raises:
        IstanasError: No process listens there, or the job server's address was given.

    Example:
        >>> check_address("auto")
    """
    if address == "auto":  # Ray looks for a cluster on this machine, and fails at once if there is none.
        return
    if address.startswith(("http://", "https://")):
        raise address_error(address, f"{address!r:.60} is the job server, for istanas submit", HEAD_NODE)
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        problem = f"no process listens at {address!r:.60} ({error})"
        raise address_error(address, problem, f"start the cluster, or {HEAD_NODE}") from None


def ask_ray(address: str | None, seconds: float = SECONDS_TO_ANSWER) -> Callable[[], None]:
    """Start a check whether Ray listens at an address. Call the result to wait for the answer.

    The check runs in a separate process, because Ray's client tries to connect for minutes and can't be stopped.

    Args:
        address: The address as `find_address` returns it.
        seconds: The longest time to wait for the answer.

    Returns:
        A function that raises an `IstanasError` if Ray does not answer.
    """
    if address is None or address == "auto":
        return lambda: None
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    environment = {**(LOOPBACK_ONLY if is_loopback_only(address) else {}), **os.environ}
    health_check = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def wait_for_answer() -> None:
        try:
            answered = health_check.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            answered = False
        finally:
            health_check.kill()
            health_check.wait()
        if not answered:
            problem = f"the process at {address} does not answer as Ray does, or requires a token"
            raise address_error(address, problem, HEAD_NODE)

    return wait_for_answer


def is_loopback_only(address: str) -> bool:
    """Return whether a cluster listens on 127.0.0.1 and on no other address of this machine."""
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost"):
        return False
    own = [a.address for nic in psutil.net_if_addrs().values() for a in nic if a.family == socket.AF_INET]
    for other in own:
        if not other.startswith("127."):
            with contextlib.suppress(OSError):  # A loopback-only cluster refuses the connection.
                socket.create_connection((other, int(port)), timeout=2).close()
                return False
    return True
