"""Handling of Ctrl-C, SIGTERM and SIGHUP: they unwind a command, so that its run is closed and can be resumed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

INTERRUPTED = 128 + signal.SIGINT  # exit codes, as shells define them
TERMINATED = 128 + signal.SIGTERM
HUNG_UP = 128 + signal.SIGHUP
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECONDS_TO_REPEAT = 0.1  # delay before a swallowed signal is sent again
STILL_CLOSING = (
    b"closing what runs, which takes some seconds; Ctrl-\\ (SIGQUIT) ends at once; "
    b"then run the same command again\n"
)

signals_deferred = threading.Event()  # set while `uninterrupted` defers signals


@contextlib.contextmanager
def signals_interrupt(*, leaving: bool = False) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt in the body on the first Ctrl-C, SIGTERM or SIGHUP, and yield the list of signals.

    Later signals only print a message, because interrupting the closing of the run would leave processes behind.
    Cluster managers and schedulers (Ray's jobs, SLURM, Kubernetes) send SIGTERM some seconds before SIGKILL. SIGHUP is
    sent when the terminal or the SSH connection is closed; under nohup it stays ignored.

    If Python swallows a KeyboardInterrupt (in a `__del__` or a callback), the signal is sent again shortly after.

    A signal often reaches the whole process group. When a child dies, the SIGCHLD handler of torch's DataLoader would
    raise a RuntimeError in this process. The handler is therefore removed after a signal.

    Args:
        leaving: Whether the process exits after the body; it then ignores further signals after the first one.
    """
    noted: list[int] = []
    repeats: list[threading.Timer] = []
    children: list[Any] = []  # the handler of SIGCHLD
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield noted
        return

    def interrupt(number: int, _frame: FrameType | None) -> None:
        noted.append(number)
        if len(noted) == 1:
            children.append(signal.signal(signal.SIGCHLD, signal.SIG_DFL))
            raise KeyboardInterrupt
        with contextlib.suppress(OSError):
            os.write(2, STILL_CLOSING)  # safe in a signal handler, unlike print

    def repeat() -> None:
        number = noted[0]
        noted.clear()
        # Sent to the main thread, which would otherwise not wake up.
        signal.pthread_kill(main, number)

    def again(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt) or not noted:
            unraisable_hook(unraisable)
        elif not any(timer.is_alive() for timer in repeats):
            repeats.append(threading.Timer(SECONDS_TO_REPEAT, repeat))
            repeats[-1].daemon = True
            repeats[-1].start()

    main = threading.get_ident()
    unraisable_hook, sys.unraisablehook = sys.unraisablehook, again
    before = {number: signal.getsignal(number) for number in SIGNALS}
    # A shell's background jobs ignore Ctrl-C, and jobs under nohup ignore SIGHUP. They must continue to do so.
    taken = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield noted
    finally:
        sys.unraisablehook = unraisable_hook
        for timer in repeats:
            timer.cancel()
        for number in taken:
            signal.signal(number, signal.SIG_IGN if leaving and noted else before[number])
        if children and not leaving:
            signal.signal(signal.SIGCHLD, children[0])
        if leaving and noted:
            # After an interrupt inside an exec of text (as when dataclasses are created), `python -m` exits by SIGINT
            # whatever the exit code. Another exec resets this.
            exec("")


@contextlib.contextmanager
def uninterrupted() -> Iterator[list[int]]:
    """Defer Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 (a lost cluster) to the end of the body, and yield the list of them.

    Some short operations must not be interrupted: a start of Ray would leave processes behind, and a write to a
    database would leave its lock behind. Ray replaces the handler of SIGTERM; the previous one is restored at the end.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield noted
        return
    before: dict[int, Callable[[int, FrameType | None], object]] = {}
    within = True

    def note(number: int, frame: FrameType | None) -> None:
        if within:
            noted.append(number)
        else:  # while the previous handlers are restored
            before[number](number, frame)

    try:
        signals_deferred.set()
        for number in (*SIGNALS, signal.SIGUSR1):
            handler = signal.getsignal(number)
            if callable(handler):  # otherwise the signal is ignored or has its default action
                before[number] = handler
                signal.signal(number, note)
        yield noted
    finally:
        within = False
        signals_deferred.clear()
        for taken, handler_before in before.items():
            signal.signal(taken, handler_before)
        if noted:
            signal.raise_signal(signal.SIGUSR1 if signal.SIGUSR1 in noted else noted[0])


@contextlib.contextmanager
def children_ignore_hangups() -> Iterator[None]:
    """Keep a closed terminal from terminating processes that start in the body. This process stops them itself.

    The terminal sends SIGHUP to all processes of the command at once. The signal is blocked, which new processes
    inherit. It is not ignored, because the handler of this process must still receive it afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
