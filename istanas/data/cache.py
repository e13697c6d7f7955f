"""Arrays that are costly to compute, kept in files of the cache folder: whole, of a known state, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def read_cache(file: Path, state: str) -> NDArray[np.uint8] | None:
    """Read a cached array.

    Args:
        file: of the cache.
        state: what the array must have been computed from.

    Returns:
        The array; None if there is none, if it is of another state, or (with a warning) if it is broken.
    """
    try:
        with file.open("rb") as stream:
            header = json.loads(stream.readline(10_000))
            if header["state"] != state:
                return None
            body = np.empty(os.fstat(stream.fileno()).st_size - stream.tell(), np.uint8)
            stream.readinto(body.data)
        if header["sha256"] != _checksum(state, header["shape"], body):
            raise ValueError("wrong checksum")
        return body.reshape(header["shape"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        warnings.warn(f"{file}: broken cache ({reason(error)}); it is made anew", stacklevel=2)
        return None


def write_cache(file: Path, state: str, array: NDArray[np.uint8]) -> None:
    """Write an array as a header line and the bytes; a folder that cannot be written is only a warning.

    Args:
        file: of the cache.
        state: what the array was computed from.
        array: of bytes, contiguous.
    """
    header = {"state": state, "shape": list(array.shape), "sha256": _checksum(state, array.shape, array)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.")
        try:
            with open(descriptor, "wb") as stream:
                stream.write(json.dumps(header).encode() + b"\n")
                stream.write(array.data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        # The folder is named, not the file: Python shows a warning with the same text only once.
        warnings.warn(
            f"{file.parent}: the cache cannot be written ({reason(error)}); the pictures will be read again "
            "next time unless data.cache_dir is a folder that can be written",
            stacklevel=2,
        )


def default_cache_dir() -> Path:
    """Return where caches belong on this system: `$XDG_CACHE_HOME/istanas` or `~/.cache/istanas`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "istanas"


def sha256(*parts: bytes | memoryview) -> str:
    """Return the SHA-256 of some bytes one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def reason(error: BaseException) -> str:
    """Say on one line what went wrong: the system's words, the error's text, or its class."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(text.split()) or type(error).__name__


def _checksum(state: str, shape: Iterable[int], body: NDArray[np.uint8]) -> str:
    return sha256(json.dumps([state, list(shape)]).encode(), body.data)
