"""Local copies of run directories in a storage, and the conversion between their paths and addresses."""

from __future__ import annotations

import base64
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.base.addresses import is_remote, joined_address, names_in


def local(address: str) -> Path:
    """Return the path for an address: the path of a folder itself, or of the local copy of a storage.

    Nothing is read or created.

    Example:
        >>> local("runs"), local("file:///mnt/runs")
        (PosixPath('runs'), PosixPath('/mnt/runs'))
    """
    if address.startswith("file://"):
        return Path(unquote(urlsplit(address).path))
    if not is_remote(address):
        return Path(address)
    url = urlsplit(address)
    query = base64.urlsafe_b64encode(url.query.encode()).decode().rstrip("=")
    return root().joinpath(f"{url.scheme}-{query}", url.netloc, *names_in(url))


def shown(path: Path) -> str:
    """Return a path as messages and records show it: for a local copy, the address in the storage.

    Example:
        >>> shown(Path("runs/digits")), shown(local("s3://bucket/runs?region=eu-west-1") / "digits")
        ('runs/digits', 's3://bucket/runs/digits?region=eu-west-1')
    """
    try:
        first, *parts = path.relative_to(root()).parts
    except ValueError:
        return str(path)
    scheme, _, encoded = first.partition("-")
    query = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode()
    return joined_address(scheme, parts, query)


def named(path: Path) -> str:
    """Return a path in a form that is valid on other machines: absolute, or the address in the storage.

    Example:
        >>> named(Path("/runs/digits")), named(local("s3://bucket/runs") / "digits")
        ('/runs/digits', 's3://bucket/runs/digits')
    """
    return shown(path) if is_copy(path) else str(path.resolve())


def is_copy(path: Path) -> bool:
    """Return whether a path lies in a local copy of a storage."""
    return path.is_relative_to(root())


def root() -> Path:
    """Return the folder of all local copies, in the user's cache folder."""
    from istanas.data.cache import default_cache_dir  # imports torch, which most commands do not need

    return default_cache_dir() / "storage"


def make_private(path: Path) -> None:
    """Create the folder of a copy; only the user has access to the root folder."""
    root().mkdir(parents=True, exist_ok=True)
    root().chmod(0o700)
    path.mkdir(parents=True, exist_ok=True)
