"""Standard streams that tolerate a closed reader, such as `| head` or a closed terminal."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from typing import Any, TextIO


class _Outlet(io.FileIO):
    """A file descriptor that is redirected to the null device as soon as its reader has closed it."""

    def write(self, b: Any, /) -> int:
        try:
            return super().write(b)
        except OSError as error:
            if not _is_closed(error, self.fileno()):
                raise
            _redirect_to_null(self.fileno())  # so that other code can write there, too
            return memoryview(b).nbytes


def _is_closed(error: OSError, descriptor: int) -> bool:
    """Return whether a write failed because a pipe or terminal was closed. A failing disk also raises EIO."""
    return error.errno == errno.EPIPE or (
        error.errno == errno.EIO and stat.S_ISCHR(os.fstat(descriptor).st_mode)
    )


def ignore_closed_readers() -> None:
    """Discard output whose terminal or pipe reader is closed, instead of ending this process.

    Standard descriptors that are closed from the start are redirected to the null device, too. Otherwise, the next
    opened file would get the number of one of them and receive the output for the terminal.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            _redirect_to_null(descriptor)
    sys.stdout = _tolerant_stream(sys.stdout, 1)
    sys.stderr = _tolerant_stream(sys.stderr, 2)


def _tolerant_stream(stream: TextIO | None, descriptor: int) -> TextIO:
    """Return a text stream like the given one; None means that the descriptor was closed when Python started."""
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


def _redirect_to_null(descriptor: int) -> None:
    """Redirect a standard descriptor to the null device, in this process and its children."""
    null = os.open(os.devnull, os.O_RDWR)
    if null == descriptor:
        os.set_inheritable(null, True)
    else:
        os.dup2(null, descriptor)
        os.close(null)
