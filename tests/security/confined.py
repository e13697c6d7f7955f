"""The command line in a process with limited memory and time, both of which are measured.

The process is forked from the test's, which has already imported torch: that would take minutes for a hundred cases.
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
MEGABYTES = 400  # memory of a command in addition to the test's process, for any file
SECONDS = 60  # CPU time of a command; its wall time may be longer on a busy machine


@dataclass(frozen=True)
class Outcome:
    """The end of a command and its costs.

    Args:
        code: Exit code; negative: the signal that ended the command.
        out: Standard output.
        errors: Lines of standard error.
        seconds: CPU time.
        megabytes: Largest growth of its memory.
    """

    code: int
    out: str
    errors: list[str]
    seconds: float
    megabytes: float


def confined(arguments: list[str], folder: Path) -> Outcome:
    """Run `istanas ARGUMENTS` in a folder; more than `MEGABYTES` are a MemoryError."""
    return confined_call(lambda: cli.run(arguments), folder)


def confined_call(call: Callable[[], int], folder: Path) -> Outcome:
    """Call a function in place of the command."""
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
        # Logs and warnings go to stderr, not to pytest.
        logging.getLogger().handlers.clear()
        warnings.resetwarnings()
        warnings.simplefilter("ignore", DeprecationWarning)  # as Python does by default
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
    """Return the pages of this process: 0 those that it has allocated, 1 those in memory."""
    return int(Path("/proc/self/statm").read_text().split()[column])
