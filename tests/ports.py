"""Ports of 127.0.0.1 for the servers of tests."""

import contextlib
import random
import socket

# Above the ports that Ray gives to its own processes, below those that Linux gives to whoever asks for any: between
# the look and the server's start nobody else takes one.
RANGE = range(25_000, 32_768)


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(RANGE, len(RANGE)):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
        if len(ports) == number:
            return ports
    raise OSError(f"no {number} free ports on 127.0.0.1 in {RANGE}")


def unused_port() -> int:
    """One that nobody listens on now."""
    (port,) = free_ports(1)
    return port
