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

from istanas.errors import IstanasError

SECONDS_TO_ANSWER = 20.0  # for a Ray at an address
NOT_RAY = "who listens there does not answer as Ray does (or wants a token), give HOST:PORT of the head node"
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def find_address(address: str | None) -> str | None:
    """Where the cluster is: as given, else by RAY_ADDRESS, else, of "auto", the one started last on this machine.

    Returns:
        HOST:PORT, ray://HOST:PORT, or None: Ray is started here. "auto" stays if Ray itself has to look.

    Example:
        >>> find_address("local"), find_address("ray://head:10001")
        (None, 'ray://head:10001')
    """
    if address in (None, "auto"):
        address = os.environ.get("RAY_ADDRESS") or address
    if address == "auto":
        # What `ray start` has written down. Left to itself, Ray would take any cluster that runs here first.
        file = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray", "ray_current_cluster")
        with contextlib.suppress(OSError):
            address = file.read_text().strip() or address
    return None if address == "local" else address


def from_environment(address: str | None) -> bool:
    """Whether an address is that of RAY_ADDRESS; a job that was submitted has it from Ray, not from the user."""
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return bool(address) and address == os.environ.get("RAY_ADDRESS") and not submitted


def named(address: str | None) -> str:
    """What sets an address, as an error message begins.

    Example:
        >>> named("head:6379")
        'runtime.address is'
    """
    if from_environment(address):
        return "RAY_ADDRESS (unset it to start Ray on this machine) is"
    return "runtime.address is"


def check_address(address: str) -> None:
    """Refuse at once an address where nobody listens: Ray would try again for minutes.

    Raises:
        IstanasError: with the remedy.

    Example:
        >>> check_address("auto")
    """
    if address == "auto":  # of the cluster that this machine belongs to; Ray answers at once if there is none
        return
    if address.startswith(("http://", "https://")):
        raise IstanasError(
            f"{named(address)} {address!r:.60}: that is the job server, for istanas submit; give HOST:PORT of the "
            "head node, ray://HOST:10001, or auto"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        raise IstanasError(
            f"{named(address)} {address!r:.60}: nobody answers there ({error}), start the cluster or give "
            "HOST:PORT of its head node (or auto)"
        ) from None


def ask_ray(address: str | None) -> Callable[[], bool]:
    """Begin to ask whether it is Ray that listens at an address; the result says so when it is called.

    In a process of its own, because Ray's client goes on trying for minutes and can't be stopped.
    """
    if address is None or address == "auto" or address.startswith("ray://"):
        return lambda: True
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    environment = {**(LOOPBACK_ONLY if is_loopback_only(address) else {}), **os.environ}
    asking = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answer() -> bool:
        try:
            return asking.wait(SECONDS_TO_ANSWER) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            asking.kill()
            asking.wait()

    return answer


def is_loopback_only(address: str) -> bool:
    """Whether a cluster listens on 127.0.0.1 and on no other address of this machine."""
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost"):
        return False
    own = [a.address for nic in psutil.net_if_addrs().values() for a in nic if a.family == socket.AF_INET]
    for other in own:
        if not other.startswith("127."):
            with contextlib.suppress(OSError):  # refused, as it should be
                socket.create_connection((other, int(port)), timeout=2).close()
                return False
    return True
