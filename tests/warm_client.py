"""The client of `tests/warm.py`: it stands for a command that the server runs. It imports little, to start at once.

The request is the length of a JSON text (`LENGTH`), with the three streams as ancillary data, and that text. Each byte
after it is the number of a signal.
"""

import json
import os
import signal
import socket
import struct
import sys

SENT_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
LENGTH = struct.Struct("!Q")


def run(address: str, arguments: list[str]) -> int:
    """Run a command on the server, and return its status as `os.waitpid` does."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SENT_ON)  # no signal before or within the request
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    wanted = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    request = json.dumps(wanted).encode()
    socket.send_fds(server, [LENGTH.pack(len(request))], [0, 1, 2])
    server.sendall(request)
    for number in SENT_ON:
        signal.signal(number, lambda number, _: server.send(bytes([number])))
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for stream in (0, 1, 2):
        os.close(stream)
    return int(server.recv(64) or signal.SIGKILL)  # Without an answer, the server has been killed.


if __name__ == "__main__":
    code = os.waitstatus_to_exitcode(run(sys.argv[1], sys.argv[2:]))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
