"""Ctrl-C and SIGTERM: both unwind a command, so that its run is closed and the same command resumes."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT  # exit codes, as shells have them
TERMINATED = 128 + signal.SIGTERM


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[list[int]]:
    """Inside, SIGTERM raises KeyboardInterrupt, once; it is noted in the list that is given.

    Cluster managers and schedulers (Ray's jobs, SLURM, Kubernetes) send it some seconds before they kill.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # where signals never arrive
        yield noted
        return

    def interrupt(number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # another would interrupt the closing
        noted.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)
