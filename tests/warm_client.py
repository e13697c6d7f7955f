"""The client of `tests/warm.py`: it stands for a command that the server runs. It imports little, to start at once."""

import json
import os
import signal
import socket
import sys

SENT_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def run(address: str, arguments: list[str]) -> int:
    """Run a command on the server, and return its status as `os.waitpid` does."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    for number in SENT_ON:
        signal.signal(number, lambda number, _: server.send(bytes([number])))
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
    for stream in (0, 1, 2):
        os.close(stream)
    return int(server.recv(64) or signal.SIGKILL)  # Without an answer, the server has been killed.


if __name__ == "__main__":
    code = os.waitstatus_to_exitcode(run(sys.argv[1], sys.argv[2:]))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
