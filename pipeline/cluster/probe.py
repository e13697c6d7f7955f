"""The part of the pre-flight checks that runs on a node: storage, data, versions, and MLflow's store.

This module is sent to the nodes as code, because they may lack this project. It therefore uses only the standard
library, and pyarrow (a part of Ray's installation) for storage that is not a folder.
"""

import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.base.servers import unreachable

OURS = ("istanas", "pipeline")
MOST_FILES = 2000  # read from a data set, which may have millions of files on a network disk


@dataclass(frozen=True)
class Question:
    """What a node has to check.

    Args:
        packages: The packages whose versions are compared.
        storage: Folders or URIs that must be shared. Each contains a mark, a small file named by the token.
        token: The content of the marks, and the first part of their names.
        data: The folder of the pictures; "" for torchvision's cache on the node, None for no check.
        parts: The parts of that folder that are compared.
        store: The address of MLflow's store that the node must reach, or None.
        store_in_environment: Whether MLFLOW_TRACKING_URI must contain that address on the node.
    """

    packages: tuple[str, ...]
    storage: tuple[str, ...] = ()
    token: str = ""
    data: str | None = None
    parts: tuple[str, ...] = ()
    store: str | None = None
    store_in_environment: bool = False


@dataclass(frozen=True)
class Answer:
    """What a node has found. An empty reason means that the check has passed.

    Args:
        versions: The versions of Python and the packages; "none" for a missing one.
        code: The digest of this project's files, or None if the project is missing.
        storage: For each place, the reason why a mark could not be read or written.
        data: The digest of the pictures' names and sizes, or "" if there are none.
        store: The reason why MLflow's store is not reachable.
    """

    versions: dict[str, str]
    code: str | None
    storage: dict[str, str] = field(default_factory=dict)
    data: str = ""
    store: str = ""


def examine(question: dict[str, Any], mark: str) -> dict[str, Any]:
    """Answer a question on this machine.

    Args:
        question: The fields of `Question`.
        mark: Suffix of the name of the mark to write to the storage; "" skips the check of the storage.

    Returns:
        The fields of `Answer` as plain values, because this module has another name in the receiving process.
    """
    asked = Question(**question)
    answer = Answer(
        versions=versions(asked.packages),
        code=code_digest(),
        storage={place: meet(place, asked.token, mark) for place in asked.storage} if mark else {},
        data="" if asked.data is None else listing_digest(_data_folder(asked.data), asked.parts),
        store="" if asked.store is None else unreachable(asked.store),
    )
    if asked.store_in_environment and "MLFLOW_TRACKING_URI" not in os.environ:
        answer = Answer(**{**vars(answer), "store": "MLFLOW_TRACKING_URI is not set there"})
    return vars(answer)


# ---------- storage
def meet(place: str, token: str, mark: str) -> str:
    """Read the mark of the user's process, and write another mark, which that process reads.

    Returns:
        The reason why that failed, or "".
    """
    try:
        if read_mark(place, token) != token:
            return "the content of a file from the user's process differs"
        write_mark(place, token + mark, token)
    except OSError as error:
        return error.strerror or str(error).splitlines()[0]
    return ""


def write_mark(place: str, name: str, text: str) -> None:
    """Write a small file in a folder or under a URI that pyarrow supports (s3://, gs://, file://).

    Raises:
        OSError: The file cannot be written.
    """
    if "://" not in place:
        Path(place, _file_name(name)).write_text(text)
        return
    system, path = _remote(place, name)
    with system.open_output_stream(path) as stream:
        stream.write(text.encode())


def read_mark(place: str, name: str) -> str:
    """Return the content of a file that `write_mark` wrote.

    Raises:
        OSError: There is no such file.
    """
    if "://" not in place:
        return Path(place, _file_name(name)).read_text()
    system, path = _remote(place, name)
    with system.open_input_stream(path) as stream:
        text: str = stream.read().decode()
    return text


def delete_mark(place: str, name: str) -> None:
    """Delete a file that `write_mark` wrote, if it exists."""
    if "://" not in place:
        Path(place, _file_name(name)).unlink(missing_ok=True)
        return
    system, path = _remote(place, name)
    if system.get_file_info(path).type.name != "NotFound":
        system.delete_file(path)


def _file_name(name: str) -> str:
    return f".pre-flight-{name}"


def _remote(place: str, name: str) -> tuple[Any, str]:
    from pyarrow import fs

    try:
        system, path = fs.FileSystem.from_uri(place)
    except ValueError as error:  # an unknown protocol, which callers treat like an unreachable host
        raise OSError(str(error)) from None
    return system, f"{path.rstrip('/')}/{_file_name(name)}"


# ---------- versions
def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of Python (such as 3.11) and the packages, without build tags such as +cu130."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def code_digest() -> str | None:
    """Return the digest of this project's files, or None if Python does not find them."""
    digest = hashlib.sha256()
    for package in OURS:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            return None
        folder = Path(next(iter(spec.submodule_search_locations)))
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{package}/{file.relative_to(folder).as_posix()}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:8]


# ---------- data
def listing_digest(folder: str, parts: Sequence[str], most_files: int = MOST_FILES) -> str:
    """Return a digest of some parts of a folder: their entries, and the names and sizes of the first files.

    Returns:
        The digest, or "" if there are no readable files.
    """
    lines: list[str] = []
    try:
        for part in parts:
            path = Path(folder, part)
            if path.is_dir():
                lines += [f"{part}/{name}" for name in sorted(os.listdir(path))]
        lines += [f"{name} {size}" for name, size in itertools.islice(_files(folder, parts), most_files)]
    except OSError:
        return ""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8] if lines else ""


def _files(folder: str, parts: Sequence[str]) -> Iterator[tuple[str, int]]:
    for part in parts:
        path = os.path.join(folder, part)
        if os.path.isfile(path):
            yield part, os.path.getsize(path)
        for where, below, names in os.walk(path):
            below.sort()
            for name in sorted(names):
                file = os.path.join(where, name)
                yield os.path.relpath(file, folder), os.stat(file).st_size


def _data_folder(place: str) -> str:
    if place:
        return place
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "istanas", "downloads")
