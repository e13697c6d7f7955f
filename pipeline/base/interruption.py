"""Ctrl-C, SIGTERM and SIGHUP unwind a command, so that its run is closed and the same command resumes; and when not."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

INTERRUPTED = 128 + signal.SIGINT  # exit codes, as shells have them
TERMINATED = 128 + signal.SIGTERM
HUNG_UP = 128 + signal.SIGHUP
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECONDS_TO_REPEAT = 0.1  # a signal that was swallowed
STILL_CLOSING = (
    b"closing the run, which takes some seconds; Ctrl-\\ (SIGQUIT) ends at once, the same command resumes\n"
)

working_to_an_end = threading.Event()  # while `uninterrupted` holds back what comes


@contextlib.contextmanager
def signals_interrupt(*, leaving: bool = False) -> Iterator[list[int]]:
    """Inside, the first Ctrl-C, SIGTERM or SIGHUP raises KeyboardInterrupt; it is noted in the list that is given.

    Later ones would interrupt the closing of the run, and leave processes behind: they are answered, and no more.
    Cluster managers and schedulers (Ray's jobs, SLURM, Kubernetes) send SIGTERM some seconds before they kill. SIGHUP
    comes when the terminal or the SSH connection is closed; under nohup it is ignored, and stays so.

    Where Python swallows a KeyboardInterrupt (in a `__del__`, in a callback), the same signal comes again a moment
    later.

    A signal often reaches the whole process group. torch's DataLoader answers the death of a child with a RuntimeError
    wherever this process is: after a signal was noted, children die without it, and the run is closed in peace.

    Args:
        leaving: after one was noted, the process is deaf to others until its end, which comes now.
    """
    noted: list[int] = []
    repeats: list[threading.Timer] = []
    children: list[Any] = []  # who was told of their deaths
    if threading.current_thread() is not threading.main_thread():  # where signals never arrive
        yield noted
        return

    def interrupt(number: int, _frame: FrameType | None) -> None:
        noted.append(number)
        if len(noted) == 1:
            children.append(signal.signal(signal.SIGCHLD, signal.SIG_DFL))
            raise KeyboardInterrupt
        with contextlib.suppress(OSError):
            os.write(2, STILL_CLOSING)  # the one way that is safe in the middle of anything

    def repeat() -> None:
        number = noted[0]
        noted.clear()
        # To the main thread, which else would not wake up.
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
    # A shell's background jobs are deaf to Ctrl-C, those of nohup to SIGHUP, and stay so.
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
            # An interrupt inside an exec of text (dataclasses, while they are imported) leaves a mark, by which
            # `python -m` dies of SIGINT at its very end, whatever the exit code. The next exec takes it away.
            exec("")


@contextlib.contextmanager
def uninterrupted() -> Iterator[list[int]]:
    """Inside, for some seconds, what would interrupt is only noted (in the list that is given), and comes at the end.

    Of Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 (a cluster is lost). For what is half done could not be ended: a Ray that
    starts leaves processes behind, a database that is written to its lock. Ray puts a handler of its own in the place
    of one for SIGTERM; at the end, the one from before is back.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # where signals never arrive
        yield noted
        return
    before: dict[int, Callable[[int, FrameType | None], object]] = {}
    within = True

    def note(number: int, frame: FrameType | None) -> None:
        if within:
            noted.append(number)
        else:  # while the handlers from before are put back
            before[number](number, frame)

    try:
        working_to_an_end.set()
        for number in (*SIGNALS, signal.SIGUSR1):
            handler = signal.getsignal(number)
            if callable(handler):  # not where the process dies of it, or is deaf to it
                before[number] = handler
                signal.signal(number, note)
        yield noted
    finally:
        within = False
        working_to_an_end.clear()
        for taken, handler_before in before.items():
            signal.signal(taken, handler_before)
        if noted:
            signal.raise_signal(signal.SIGUSR1 if signal.SIGUSR1 in noted else noted[0])


@contextlib.contextmanager
def children_deaf_to_hangups() -> Iterator[None]:
    """Inside, processes are started that a closed terminal does not end: this process ends them when it has unwound.

    The terminal sends SIGHUP to all processes of the command at once. It is blocked, which a new program inherits,
    not ignored, because a handler of this process must get it in the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
