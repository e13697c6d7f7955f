"""Detection of a lost Ray cluster, which interrupts the main thread."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from istanas.errors import IstanasError
from pipeline.base.interruption import signals_deferred

SECONDS_BETWEEN_LOOKS = 1  # for a free place; whole ones, Ray cuts off the rest and would not wait at all
GOES_ON = "the same command goes on, on another cluster, too"
SECONDS_TO_FINISH = 60.0  # what must not be interrupted
SECONDS_TO_UNWIND = 5.0  # for a thread that was interrupted; calls into a lost cluster can't be


class _Lost(KeyboardInterrupt):
    """Of the cluster, in the main thread, whatever it is doing; no library takes it for an error of its own."""


@contextlib.contextmanager
def noticing_its_loss(
    job: str, logs: Path, head: str, seconds: float, note: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Inside, the main thread is interrupted when the cluster's head is gone; Ray would end the process without a word.

    Elsewhere than in the main thread, which alone can be interrupted, it does nothing.

    Args:
        job: for the message.
        logs: of Ray, likewise.
        head: HOST:PORT of the cluster's head.
        seconds: without an answer, after which it is gone.
        note: called in the main thread when it is, before anything is unwound.

    Raises:
        IstanasError: the cluster was lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    host, _, port = head.rpartition(":")
    words = f"{job}: Ray was lost (no answer from {head} for {seconds:.0f} s), see {logs}; {GOES_ON}"
    ended, main = threading.Event(), threading.get_ident()

    def watch() -> None:
        heard = time.monotonic()
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            with contextlib.suppress(OSError):
                socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
                heard = time.monotonic()
            if time.monotonic() - heard > seconds:
                signal.pthread_kill(main, signal.SIGUSR1)
                end = time.monotonic() + SECONDS_TO_FINISH
                while signals_deferred.is_set() and time.monotonic() < end:
                    if ended.wait(0.1):
                        return
                if not ended.wait(SECONDS_TO_UNWIND):
                    _die(words)
                return

    def interrupt(*_: Any) -> NoReturn:
        note()
        raise _Lost

    before = signal.signal(signal.SIGUSR1, interrupt)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except _Lost:
        raise IstanasError(words) from None
    finally:
        ended.set()
        watcher.join()
        signal.signal(signal.SIGUSR1, before)


def _die(words: str) -> NoReturn:
    """End the process at once: its main thread hangs in a call of Ray's, until Ray does the same without a word."""
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # the progress bar has hidden it
    try:
        os.write(2, f"{show_cursor}\nerror: {words}\n".encode(errors="replace"))
    finally:
        os._exit(1)
