"""Cache files for arrays that are expensive to compute. A file is used only if it is intact and its state matches."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from istanas.files import replacing_file


def read_cache(file: Path, state: str) -> NDArray[np.uint8] | None:
    """Read a cached array.

    Args:
        file: The cache file.
        state: Text that identifies the data from which the array must have been computed.

    Returns:
        The array; None if there is none, if its state differs, or (with a warning) if the file is damaged.
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
        warnings.warn(f"{file}: damaged cache ({reason(error)}); it will be recreated", stacklevel=2)
        return None


def write_cache(file: Path, state: str, array: NDArray[np.uint8]) -> None:
    """Write an array as a header line and its bytes; if that fails, only warn.

    Args:
        file: The cache file.
        state: Text that identifies the data from which the array was computed.
        array: A contiguous array of bytes.
    """
    header = {"state": state, "shape": list(array.shape), "sha256": _checksum(state, array.shape, array)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(file) as new, open(new, "wb") as stream:
            stream.write(json.dumps(header).encode() + b"\n")
            stream.write(array.data)
    except OSError as error:
        # The folder is named, not the file, because Python shows a warning with the same text only once.
        warnings.warn(
            f"{file.parent}: the cache cannot be written ({reason(error)}), so the pictures will be read again "
            "next time; set data.cache_dir to a writable folder",
            stacklevel=2,
        )


def default_cache_dir() -> Path:
    """Return the default cache folder: `$XDG_CACHE_HOME/istanas` or `~/.cache/istanas`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "istanas"


def sha256(*parts: bytes | memoryview) -> str:
    """Return the hexadecimal SHA-256 of the concatenated parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def reason(error: BaseException) -> str:
    """Return the cause of an error on one line: the system's message, the error's text, or its class."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(text.split()) or type(error).__name__


def _checksum(state: str, shape: Iterable[int], body: NDArray[np.uint8]) -> str:
    return sha256(json.dumps([state, list(shape)]).encode(), body.data)
