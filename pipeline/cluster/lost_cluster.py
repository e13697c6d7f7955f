"""Detection of a lost Ray cluster, which interrupts the main thread."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from istanas.errors import IstanasError
from pipeline.base.interruption import signals_deferred

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_FINISH = 60.0  # Longest time that work which must not be interrupted may take.
SECONDS_TO_UNWIND = (
    5.0  # Longest time that the interrupted thread may take; calls into a lost cluster never return.
)


class _ClusterLost(KeyboardInterrupt):
    """Interruption of the main thread, which libraries do not handle because it is a KeyboardInterrupt."""


@contextlib.contextmanager
def watch_cluster(
    job: str, logs: Path, head: str, seconds: float, *, seconds_to_unwind: float = SECONDS_TO_UNWIND
) -> Iterator[None]:
    """Interrupt the main thread if the cluster's head is lost, before Ray ends the process without a message.

    In other threads, which cannot be interrupted, this does nothing.

    Args:
        job: The name of the job, for the message.
        logs: The folder of Ray's logs, for the message.
        head: HOST:PORT of the cluster's head.
        seconds: The time without an answer after which the head counts as lost.
        seconds_to_unwind: The time that the interrupted thread may take, after which the process exits.

    Raises:
        IstanasError: The cluster was lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    host, _, port = head.rpartition(":")
    lost = IstanasError(
        f"{job}: Ray was lost (no answer from {head} for {seconds:.0f} s), see {logs}",
        remedy="run the same command again to resume, also on another cluster",
    )
    ended, main = threading.Event(), threading.get_ident()

    def watch() -> None:
        last_answer = time.monotonic()
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            with contextlib.suppress(OSError):
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
                last_answer = time.monotonic()
            if time.monotonic() - last_answer > seconds:
                signal.pthread_kill(main, signal.SIGUSR1)
                end = time.monotonic() + SECONDS_TO_FINISH
                while signals_deferred.is_set() and time.monotonic() < end:
                    if ended.wait(0.1):
                        return
                if not ended.wait(seconds_to_unwind):
                    _exit_process(str(lost))
                return

    def interrupt(*_: Any) -> NoReturn:
        raise _ClusterLost

    before = signal.signal(signal.SIGUSR1, interrupt)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except _ClusterLost:
        raise lost from None
    finally:
        ended.set()
        watcher.join()
        signal.signal(signal.SIGUSR1, before)


def _exit_process(message: str) -> NoReturn:
    """Exit with a message, because the main thread hangs in a call of Ray, which would end the process without one."""
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # The progress bar hides it.
    try:
        os.write(2, f"{show_cursor}\nerror: {message}\n".encode(errors="replace"))
    finally:
        os._exit(1)
