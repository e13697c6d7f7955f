"""Standard output and standard error of a command whose reader may go: `| head`, a closed terminal, `>&-`."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from typing import Any, TextIO


class _Outlet(io.FileIO):
    """A file descriptor that leads to the null device as soon as nobody reads it any more."""

    def write(self, b: Any, /) -> int:
        try:
            return super().write(b)
        except OSError as error:
            if not _reader_has_gone(error, self.fileno()):
                raise
            _lead_nowhere(self.fileno())  # what other code writes there, too
            return memoryview(b).nbytes


def _reader_has_gone(error: OSError, descriptor: int) -> bool:
    """Whether a write failed because a pipe or a terminal was closed; a failing disk has the error of a terminal."""
    return error.errno == errno.EPIPE or (
        error.errno == errno.EIO and stat.S_ISCHR(os.fstat(descriptor).st_mode)
    )


def outlive_readers() -> None:
    """Let this process go on when its terminal or the reader of its pipe goes: its output is then discarded.

    Descriptors that were closed from the start lead to the null device, too: the next file that is opened would get
    their numbers, and what is meant for the terminal would be written into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            _lead_nowhere(descriptor)
    sys.stdout = _tolerant(sys.stdout, 1)
    sys.stderr = _tolerant(sys.stderr, 2)


def _tolerant(stream: TextIO | None, descriptor: int) -> TextIO:
    """A text stream like the one that is given (None: Python found the descriptor closed)."""
    if stream is not None:
        stream.flush()
        descriptor = stream.fileno()
    outlet = _Outlet(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(outlet),
        encoding=None if stream is None else stream.encoding,
        errors=None if stream is None else stream.errors,
        line_buffering=stream is None or bool(getattr(stream, "line_buffering", False)),
        write_through=bool(getattr(stream, "write_through", False)),
    )


def _lead_nowhere(descriptor: int) -> None:
    """Connect a standard descriptor with the null device, in this process and in those that it starts."""
    null = os.open(os.devnull, os.O_RDWR)
    if null == descriptor:
        os.set_inheritable(null, True)
    else:
        os.dup2(null, descriptor)
        os.close(null)
