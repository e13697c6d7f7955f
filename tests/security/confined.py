"""The command line in a process of its own with little memory and time, both measured.

The process is forked from the test's, where all is imported already: a hundred cases would import torch for minutes.
"""

import logging
import os
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.cli import commands as cli

PAGE = resource.getpagesize()
MEGABYTES = 400  # that a command may take beyond what the test's process has, whatever the file
SECONDS = 60  # of a core, and as many times as long by the clock as others keep it busy


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it took.

    Args:
        code: exit code; negative: the signal that ended it.
        out: its standard output.
        errors: lines of its standard error.
        seconds: of processor time.
        megabytes: by which its memory grew at most.
    """

    code: int
    out: str
    errors: list[str]
    seconds: float
    megabytes: float


def confined(arguments: list[str], folder: Path) -> Outcome:
    """Run `istanas ARGUMENTS` in a folder; if it asks for more than `MEGABYTES` it gets a MemoryError."""
    return confined_call(lambda: cli.run(arguments), folder)


def confined_call(call: Callable[[], int], folder: Path) -> Outcome:
    """The same with any function in the place of the command."""
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch, name) for name in ("out", "errors", "before")]
        child = os.fork()
        if child == 0:
            _run(call, folder, *files)
        _, status, used = os.wait4(child, 0)
        out, errors, before = (file.read_text() for file in files)
    return Outcome(
        os.waitstatus_to_exitcode(status),
        out,
        errors.splitlines(),
        used.ru_utime + used.ru_stime,
        used.ru_maxrss / 1024 - int(before) * PAGE / 2**20,
    )


def _run(call: Callable[[], int], folder: Path, out: Path, errors: Path, before: Path) -> None:
    code = 70
    try:
        os.chdir(folder)
        sys.stdout, sys.stderr = out.open("w"), errors.open("w")
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
        # Nothing of pytest's own way with logs and warnings.
        logging.getLogger().handlers.clear()
        warnings.resetwarnings()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # else pytest-timeout's
        signal.setitimer(signal.ITIMER_REAL, 4 * SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        limit = _pages(0) * PAGE + MEGABYTES * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        before.write_text(str(_pages(1)))
        code = call()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _pages(column: int) -> int:
    """Of this process: 0 those it has asked for, 1 those that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[column])
