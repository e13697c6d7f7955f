"""A replacement for the home folder of users without a writable one, as in many containers.

Ray's token and the caches of istanas, matplotlib and torch are in the home folder. Some of these libraries fail if it
is not writable.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
import warnings
from pathlib import Path

from istanas.errors import IstanasError

REMEDY = "set HOME to a writable folder"
TOKEN = Path(".ray", "auth_token")  # below the home folder, where Ray reads and writes it


def ensure_usable_home() -> None:
    """Set environment variables to writable folders, for this process and its children.

    HOME itself is not changed if the folder exists, because it may contain files to read (licences, credentials).

    Raises:
        IstanasError: No folder is writable, not even one for temporary files.
    """
    home = _home()
    if home is None or not (_exists(home) or _can_be_written(home)):
        problem = (
            "HOME is not set, and this user has none" if home is None else f"HOME is {home}: no such folder"
        )
        os.environ["HOME"] = str(_substitute(problem))
        _warn(f"{problem}; {os.environ['HOME']} is used, {REMEDY} to keep caches")
        return
    for name, default, place in (
        ("XDG_CACHE_HOME", home / ".cache", "cache"),
        ("MPLCONFIGDIR", home / ".config" / "matplotlib", "matplotlib"),
    ):
        if not os.environ.get(name) and not _can_be_written(default):
            os.environ[name] = str(_substitute(f"{default}: can't be written") / place)
            _warn(f"{default}: can't be written; {os.environ[name]} is used, set {name} to keep it elsewhere")
    if not any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        _ensure_token(home / TOKEN)


def _ensure_token(token: Path) -> None:
    """Create a token for Ray elsewhere if Ray cannot write one to the home folder."""
    if _can_be_read(token) if _exists(token) else _can_be_written(token.parent):
        return
    file = _substitute(f"{token}: can't be written") / TOKEN.name
    _write_once(file, secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(file)


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:  # HOME is not set, and the system does not know the user
        return None


def _write_once(file: Path, text: str) -> None:
    """Write a private file unless it exists, atomically because several commands may start at the same time."""
    with tempfile.NamedTemporaryFile("w", dir=file.parent) as written:
        written.write(text)
        written.flush()
        try:
            os.link(written.name, file)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            with contextlib.suppress(FileExistsError), open(file, "x", opener=_private) as plain:
                plain.write(text)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _exists(path: Path) -> bool:
    """Return whether a path exists; False if a parent is not accessible or the file system is unreachable."""
    try:
        return path.exists()
    except OSError:
        return False


def _can_be_written(folder: Path) -> bool:
    """Return whether files can be created in a folder, or the folder itself can be created."""
    while not _exists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _can_be_read(file: Path) -> bool:
    return os.access(file, os.R_OK)


def _substitute(problem: str) -> Path:
    """Return this user's replacement folder, a private temporary folder that all commands share."""
    try:
        folder = Path(tempfile.gettempdir(), f"istanas-home-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise IstanasError(
            f"{problem}, and no temporary folder can be created ({error})", remedy=REMEDY
        ) from None
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    if not private:
        raise IstanasError(f"{problem}, and {folder} is not a private folder of this user", remedy=REMEDY)
    return folder


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)
