"""What one place of a cluster tells of itself: storage, data, versions, the store of the trials.

It runs on every node, which may lack this very project and is sent it as code: nothing but the standard library here,
and pyarrow (a part of Ray's installation) for storage that is no folder.
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
MOST_FILES = 2000  # of a data set that are looked at: there may be millions, on a disk across the network


@dataclass(frozen=True)
class Question:
    """What to look at.

    Args:
        packages: whose versions are wanted.
        storage: folders or URIs that every place must see; in each lies a mark with the token.
        token: what the marks hold, and their names begin with.
        data: where the pictures lie; "": in torchvision's cache of whoever is asked; None: nowhere.
        parts: of that folder that matter.
        store: address of MLflow's store that this place must reach, or None.
        store_in_environment: whether that address is to be in MLFLOW_TRACKING_URI there.
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
    """What there is. Empty reasons are good ones.

    Args:
        versions: of Python and the packages; "none" of what is not installed.
        code: digest of this project's own files; None: it is not there.
        storage: for each, why the mark could not be read or another one left beside it.
        data: digest of the names and sizes, "" if there is nothing.
        store: why MLflow's store is not reached.
    """

    versions: dict[str, str]
    code: str | None
    storage: dict[str, str] = field(default_factory=dict)
    data: str = ""
    store: str = ""


def examine(question: dict[str, Any], mark: str) -> dict[str, Any]:
    """Answer a question here.

    Args:
        question: the fields of `Question`.
        mark: end of the name of the mark that this place leaves in the storage; "" leaves none.

    Returns:
        The fields of `Answer`. Plain values, for they go to a process that knows these classes by another name.
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
    """Read the mark that was written elsewhere, and leave one to be read there.

    Returns:
        Why that failed, or "".
    """
    try:
        if read_mark(place, token) != token:
            return "what was written elsewhere reads differently"
        write_mark(place, token + mark, token)
    except OSError as error:
        return error.strerror or str(error).splitlines()[0]
    return ""


def write_mark(place: str, name: str, text: str) -> None:
    """Leave a small file in a folder or under a URI that pyarrow knows (s3://, gs://, file://).

    Raises:
        OSError: if that can't be.
    """
    if "://" not in place:
        Path(place, _file_name(name)).write_text(text)
        return
    system, path = _remote(place, name)
    with system.open_output_stream(path) as stream:
        stream.write(text.encode())


def read_mark(place: str, name: str) -> str:
    """What `write_mark` has left, here or elsewhere.

    Raises:
        OSError: if it is not there.
    """
    if "://" not in place:
        return Path(place, _file_name(name)).read_text()
    system, path = _remote(place, name)
    with system.open_input_stream(path) as stream:
        text: str = stream.read().decode()
    return text


def delete_mark(place: str, name: str) -> None:
    """Take away what `write_mark` has left; one that is not there is no mistake."""
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
    except ValueError as error:  # no such protocol: as unreachable as a host that is down
        raise OSError(str(error)) from None
    return system, f"{path.rstrip('/')}/{_file_name(name)}"


# ---------- versions
def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python (3.11) and the packages, without what tells builds of one release apart, such as +cu130."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def code_digest() -> str | None:
    """Digest of this project's own files, as Python finds them here; None if it does not."""
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
def listing_digest(folder: str, parts: Sequence[str]) -> str:
    """Digest of what lies in some parts of a folder: the names right below, names and sizes of the first files.

    Returns:
        "" if nothing lies there, or nothing that may be read.
    """
    lines: list[str] = []
    try:
        for part in parts:
            path = Path(folder, part)
            if path.is_dir():
                lines += [f"{part}/{name}" for name in sorted(os.listdir(path))]
        lines += [f"{name} {size}" for name, size in itertools.islice(_files(folder, parts), MOST_FILES)]
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
