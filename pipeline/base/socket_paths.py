"""Folders for the Unix sockets of Ray and of data workers, whose paths must be short."""

from __future__ import annotations

import os
import sys
import tempfile
from multiprocessing.util import get_temp_dir
from pathlib import Path

from istanas.errors import IstanasError

LONGEST_PATH = 103 if sys.platform == "darwin" else 107  # bytes of a socket's path
# Longest paths below the folder for temporary files.
RAY_SOCKET_PATH = "/istanas-12345678/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
DATA_WORKER_SOCKET_PATH = "/pymp-12345678/listener-12345678"


def short_temporary_folder(below: str, longest: int = LONGEST_PATH) -> Path:
    """Return the folder for temporary files or, if its path is too long for sockets, a shorter one of the system.

    Args:
        below: Longest path of a socket, relative to the folder.
        longest: Largest number of bytes of a whole path.

    Raises:
        IstanasError: No writable folder has a short enough path.
    """
    usual, most = tempfile.gettempdir(), longest - len(below)
    for name in (usual, "/tmp", "/var/tmp", os.environ.get("XDG_RUNTIME_DIR")):
        folder = Path(name or usual).resolve()
        if len(os.fsencode(folder)) <= most and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise IstanasError(
        f"{usual} is too long for the paths of Unix sockets, and /tmp, /var/tmp and XDG_RUNTIME_DIR cannot be written",
        field="TMPDIR",
        remedy=f"set TMPDIR to a folder whose path has at most {most} characters",
    )


def shorten_data_worker_sockets() -> None:
    """Place the sockets through which torch's data workers send batches in a folder with a short path."""
    short = short_temporary_folder(DATA_WORKER_SOCKET_PATH)
    usual, tempfile.tempdir = tempfile.tempdir, str(short)
    try:
        get_temp_dir()  # creates the folder if necessary; forked processes inherit it
    finally:
        tempfile.tempdir = usual
