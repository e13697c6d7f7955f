"""Ports of 127.0.0.1 for the servers of tests."""

import socket


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def unused_port() -> int:
    """One that nobody listens on now."""
    (port,) = free_ports(1)
    return port
