"""Ports of 127.0.0.1 for the servers of tests."""

import contextlib
import random
import socket

# Above the ports that Ray gives to its own processes and below those that Linux gives to port 0, so that no other
# process takes a port between this check and the server's start.
RANGE = range(25_000, 32_768)


def free_ports(number: int) -> list[int]:
    """Return different ports on which nothing listens now."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(RANGE, len(RANGE)):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
        if len(ports) == number:
            return ports
    raise OSError(f"no {number} free ports on 127.0.0.1 in {RANGE}")


def unused_port() -> int:
    """Return a port on which nothing listens now."""
    (port,) = free_ports(1)
    return port
