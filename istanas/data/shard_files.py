"""The bytes of pictures in tar files ("shards"), in a folder or in a bucket.

A picture is read by its offset and size, which the index of the shards contains (`istanas.data.shard_index`). The
shards of a folder are opened once in each process. They are opened before the processes that decode pictures are
forked, so that these inherit the open files. Ranges of objects in a bucket are requested by several threads of the
training process.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import weakref
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from istanas.buckets import file_system, is_address
from istanas.data.cache import reason
from istanas.data.reading import Content, shown
from istanas.errors import DataError, MissingDataError

SAMPLE = np.dtype(
    [
        *(("label", "<i4"), ("shard", "<i4"), ("offset", "<i8"), ("size", "<i4")),
        *(("start", "<i4"), ("length", "<i4"), ("crc", "<u4")),
    ]
)
"""Record of a sample: its class, the number of its shard, the region of the shard with all its members (`offset` and
`size` in bytes), the picture in the region (`start`, `length`), and the CRC-32 of the region."""

SPLITS = ("train", "test")
THREADS = 32
"""Number of threads that open shards, or request ranges of a bucket's objects."""

PATIENCE_S = 60.0
"""Seconds for which a request to a bucket is repeated."""

_BLOCK = 16 * 1024  # bytes of each part of a shard's excerpt
_AHEAD = 2  # batches that are requested from a bucket before the decoding processes ask for them

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Shard:
    """A tar file of samples.

    Args:
        name: Its path in the data set, such as "train/shard-000000.tar".
        size: Its size in bytes.
        samples: Number of its samples.
        sha256: Digest of its content.
        excerpt: Digest of its size and of its first, middle and last 16 KiB.
    """

    name: str
    size: int
    samples: int
    sha256: str
    excerpt: str


class ShardStorage(Protocol):
    """Where shards lie. `field` is the setting or argument that names the place, for error messages."""

    root: str
    field: str
    is_remote: bool

    def sizes(self) -> dict[str, int]:
        """Return the tar files and their sizes in bytes."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return a range of a shard's bytes; fewer if the shard ends before."""

    def content(self, name: str) -> bytes:
        """Return a whole file.

        Raises:
            FileNotFoundError: If there is no such file.
            DataError: If it cannot be read.
        """

    def open_all(self, names: Sequence[str]) -> None:
        """Open shards, if that saves time later."""


def storage_at(root: str) -> ShardStorage:
    """Return the storage at a path or an address."""
    return BucketShards(root) if is_address(root) else FolderShards(root)


def excerpt_of(read: Callable[[int, int], bytes], size: int) -> str:
    """Return the digest of a file's size and of its first, middle and last 16 KiB.

    Args:
        read: Returns the bytes at (offset, size).
        size: Size of the file.
    """
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    for start in (0, (size - _BLOCK) // 2, size - _BLOCK):
        digest.update(read(max(start, 0), min(_BLOCK, size)))
    return digest.hexdigest()


def in_threads(work: Callable[[Key], Value], keys: Iterable[Key]) -> list[Value]:
    """Return the results of a function that waits for a disk or a network, called by several threads."""
    with ThreadPoolExecutor(THREADS) as executor:
        return list(executor.map(work, keys))


# ---------- folders
class FolderShards:
    """Shards in a folder, each opened once for each process. Only one thread of a process may use an object.

    Args:
        root: The folder.
        field: The setting or argument that names it, for error messages.
    """

    is_remote = False

    def __init__(self, root: str, field: str = "data.root") -> None:
        self.root, self.field = root, field
        self._open: OrderedDict[str, int] = OrderedDict()
        self._most = _most_open_files()
        weakref.finalize(self, _close, self._open)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return a copy without open files, for another process."""
        return FolderShards, (self.root, self.field)

    def sizes(self) -> dict[str, int]:
        """Return the tar files and their sizes in bytes."""
        found: dict[str, int] = {}
        for split in _split_folders(self.root):
            try:
                with os.scandir(Path(self.root, split)) as entries:
                    found |= {f"{split}/{e.name}": self._size_of(e) for e in entries if _is_tar(e.name)}
            except OSError as error:
                raise self._unreadable(split, error) from error
        return found

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return a range of a shard's bytes; fewer if the shard ends before."""
        try:
            if name not in self._open:
                self._keep(name, os.open(os.path.join(self.root, name), os.O_RDONLY))
            self._open.move_to_end(name)
            return os.pread(self._open[name], size, offset)
        except OSError as error:
            raise self._unreadable(name, error) from error

    def content(self, name: str) -> bytes:
        """Return a whole file.

        Raises:
            FileNotFoundError: If there is no such file.
            DataError: If it cannot be read.
        """
        try:
            return Path(self.root, name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(name) from None
        except OSError as error:
            raise self._unreadable(name, error) from error

    def open_all(self, names: Sequence[str]) -> None:
        """Open shards by several threads, because opening a file of a network file system takes milliseconds."""
        missing = [name for name in names if name not in self._open]
        if not missing or len(names) > self._most:
            return

        def opened(name: str) -> int | OSError:
            try:
                return os.open(os.path.join(self.root, name), os.O_RDONLY)
            except OSError as error:
                return error

        failed: list[DataError] = []
        for name, found in zip(missing, in_threads(opened, missing), strict=True):
            if isinstance(found, int):
                self._keep(name, found)
            else:
                failed.append(self._unreadable(name, found))
        if failed:  # the files that the other threads have opened are kept, and closed with this object
            raise failed[0]

    def _keep(self, name: str, descriptor: int) -> None:
        self._open[name] = descriptor
        while len(self._open) > self._most:
            os.close(self._open.popitem(last=False)[1])

    def _size_of(self, entry: os.DirEntry[str]) -> int:
        """Return the size of a shard, which must be a regular file, or a link to one inside the data set."""
        inside = os.path.realpath(self.root)
        if entry.is_symlink() and os.path.commonpath([inside, os.path.realpath(entry.path)]) != inside:
            raise DataError(
                f"{shown(entry.path)} is a link that leads out of the folder",
                field=self.field,
                remedy="put a copy in its place",
            )
        if not entry.is_file():
            raise DataError(
                f"{shown(entry.path)} is not a file",
                field=self.field,
                remedy="move it out of the folder of shards",
            )
        return entry.stat().st_size

    def _unreadable(self, name: str, error: Exception) -> DataError:
        return DataError(
            f"{shown(f'{self.root}/{name}')} cannot be read ({reason(error)})",
            field=self.field,
            remedy="check that the disk is mounted and the file is there; the same command resumes",
        )


def _most_open_files() -> int:
    """Return how many shards may be open: half of the files that the process may open."""
    try:
        import resource
    except ImportError:  # Windows
        return 256
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if soft == resource.RLIM_INFINITY else max(soft // 2, 1)


def _close(descriptors: OrderedDict[str, int]) -> None:
    for descriptor in descriptors.values():
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _split_folders(root: str) -> tuple[str, str]:
    """Return the names of the folders of the training and the test shards."""
    return "train", "test" if Path(root, "test").is_dir() or not Path(root, "val").is_dir() else "val"


def _is_tar(name: str) -> bool:
    return name.endswith(".tar") and not name.startswith(".")


# ---------- buckets
class BucketShards:
    """Shards in a bucket. An object is opened once, and several threads may read ranges of it at the same time.

    Args:
        root: The address, `s3://BUCKET/PREFIX` or `gs://BUCKET/PREFIX`.
    """

    field = "data.root"
    is_remote = True

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self._opened: dict[str, Any] = {}
        self._opening: dict[str, Lock] = {}
        self._connection: tuple[Any, str] | None = None
        self._connecting = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Return a copy without connections, for another process."""
        return BucketShards, (self.root,)

    def sizes(self) -> dict[str, int]:
        """Return the tar files and their sizes in bytes."""
        from pyarrow.fs import FileSelector, FileType

        def listed() -> dict[str, int]:
            system, base = self._system()
            infos = system.get_file_info(FileSelector(base, recursive=True, allow_not_found=True))
            files = [info for info in infos if info.type == FileType.File and _is_tar(info.base_name)]
            return {info.path.removeprefix(f"{base}/"): info.size for info in files}

        return self._patiently("", listed)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return a range of a shard's bytes; fewer if the shard ends before."""

        def ranged() -> bytes:
            with self._opening.setdefault(name, Lock()):
                if name not in self._opened:
                    system, base = self._system()
                    self._opened[name] = system.open_input_file(f"{base}/{name}")
            content: bytes = self._opened[name].read_at(size, offset)
            return content

        return self._patiently(name, ranged)

    def content(self, name: str) -> bytes:
        """Return a whole object.

        Raises:
            FileNotFoundError: If there is no such object.
        """

        def whole() -> bytes:
            system, base = self._system()
            with system.open_input_stream(f"{base}/{name}") as stream:
                content: bytes = stream.read()
            return content

        return self._patiently(name, whole, missing=FileNotFoundError)

    def open_all(self, names: Sequence[str]) -> None:
        """Do nothing: an object is opened when a thread first reads it."""

    def _system(self) -> tuple[Any, str]:
        with self._connecting:
            if self._connection is None:
                try:
                    self._connection = file_system(self.root)
                except (ValueError, TypeError) as error:
                    raise DataError(
                        f"{self.root}: {reason(error):.200}", field=self.field, remedy="correct the address"
                    ) from None
            return self._connection

    def _patiently(
        self, name: str, request: Callable[[], Value], missing: type[Exception] | None = None
    ) -> Value:
        """Return the result of a request, which is repeated for `PATIENCE_S` seconds while the bucket is unreachable.

        Args:
            name: The object, for messages.
            request: The request.
            missing: Type of error to pass on if there is no such object.

        Raises:
            DataError: If the request fails.
        """
        import tenacity

        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_temporary),
            wait=tenacity.wait_exponential(max=10),
            stop=tenacity.stop_after_delay(PATIENCE_S),
            reraise=True,
        )
        try:
            return attempts(request)
        except OSError as error:
            if missing is not None and isinstance(error, missing):
                raise
            place = f"{self.root}/{name}" if name else self.root
            raise MissingDataError(
                f"{place} cannot be read ({reason(error).partition('AWS Error ')[2] or reason(error):.200})",
                field=self.field,
                remedy="check network, credentials and bucket; the same command resumes",
            ) from error


def _is_temporary(error: BaseException) -> bool:
    """Return whether an error of a bucket may pass. A missing object stays missing, and denied access denied."""
    lasting = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "NO_SUCH_KEY", "INVALID_ACCESS_KEY", "SIGNATURE")
    is_lasting = isinstance(error, FileNotFoundError) or any(word in str(error) for word in lasting)
    return isinstance(error, OSError) and not is_lasting


# ---------- pictures in shards
class MemberNames(Sequence[str]):
    """Names of the pictures of a split: shard, class and file, such as "DIR/train/shard-000000.tar/cat/1.jpg".

    They are put together when they are asked for, because a million texts would take hundreds of MB.

    Args:
        root: The folder or address.
        shards: Names of all shards.
        class_names: Names of the classes.
        samples: (N,) records, see `SAMPLE`.
        files: N names of files, a pyarrow array of texts.
    """

    def __init__(
        self,
        root: str,
        shards: Sequence[str],
        class_names: Sequence[str],
        samples: NDArray[np.void],
        files: Any,
    ) -> None:
        self._root, self._shards, self._class_names = root, shards, class_names
        self._samples, self._files = samples, files

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> MemberNames: ...
    def __getitem__(self, index: int | slice) -> str | MemberNames:
        """Return a name, or a part of the names."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            files = self._files.slice(start, max(stop - start, 0))
            return MemberNames(self._root, self._shards, self._class_names, self._samples[start:stop], files)
        place = range(len(self))[index]
        sample = self._samples[place]
        shard, label = self._shards[sample["shard"]], self._class_names[sample["label"]]
        return f"{self._root}/{shard}/{label}/{self._files[place].as_py()}"

    def short(self, indices: Sequence[int]) -> list[str]:
        """Return class and file of pictures, such as "cat/1.jpg"."""
        chosen = np.asarray(indices, dtype=np.int64)
        labels = self._samples["label"][chosen].tolist()
        files = self._files.take(chosen).to_pylist()
        return [f"{self._class_names[label]}/{file}" for label, file in zip(labels, files, strict=True)]


class Members(Sequence[bytes]):
    """Contents of the pictures of a split, read when they are asked for.

    Args:
        storage: Where the shards lie.
        shards: Names of all shards.
        samples: (N,) records, see `SAMPLE`.
        names: Names of the N pictures.
    """

    def __init__(
        self, storage: ShardStorage, shards: Sequence[str], samples: NDArray[np.void], names: Sequence[str]
    ) -> None:
        self._storage, self._shards, self._samples, self._names = storage, shards, samples, names

    @property
    def is_remote(self) -> bool:
        """Return whether the pictures lie in a bucket, so that several should be requested at the same time."""
        return self._storage.is_remote

    def open_all(self) -> None:
        """Open the shards in this process, so that processes that it forks inherit the open files."""
        used = np.unique(self._samples["shard"])
        self._storage.open_all([self._shards[shard] for shard in used.tolist()])

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> Content: ...
    @overload
    def __getitem__(self, index: slice) -> Members: ...
    def __getitem__(self, index: int | slice) -> Content | Members:
        """Return the content of a picture, or the contents of several.

        Raises:
            DataError: If the shard cannot be read, or the sample has changed since the index was written.
        """
        if isinstance(index, slice):
            return Members(self._storage, self._shards, self._samples[index], self._names[index])
        place = range(len(self))[index]
        _, number, offset, size, start, length, crc = self._samples[place].item()
        shard = self._shards[number]
        region = self._storage.read(shard, offset, size)
        if len(region) != size or zlib.crc32(region) != crc:
            what = "is truncated" if len(region) < size else "has changed since its index was written"
            raise DataError(
                f"{shown(f'{self._storage.root}/{shard}')} {what}: the picture {shown(self._names[place])} differs",
                field=self._storage.field,
                remedy="restore the shard, or run the istanas pack command that has made it again",
            )
        return Content(memoryview(region)[start : start + length], self._names[place])

    def __iter__(self) -> Iterator[Content]:
        """Yield the contents in order; those in a bucket are requested by several threads."""
        if not self.is_remote:
            yield from (self[index] for index in range(len(self)))
            return
        for _, contents in self.batches(np.array_split(np.arange(len(self)), -(-len(self) // THREADS))):
            yield from contents

    def batches(self, parts: Iterable[Any]) -> Iterator[tuple[int, list[Content]]]:
        """Yield (number, contents) of batches, which several threads request ahead of their use.

        Args:
            parts: Indices of each batch, one-dimensional tensors or arrays.

        Raises:
            DataError: See `__getitem__`.
        """
        executor = ThreadPoolExecutor(THREADS)
        waiting: deque[tuple[int, list[Future[Content]]]] = deque()
        try:
            for number, part in enumerate(parts):
                waiting.append(
                    (number, [executor.submit(self.__getitem__, index) for index in part.tolist()])
                )
                if len(waiting) > _AHEAD:
                    first, futures = waiting.popleft()
                    yield first, [future.result() for future in futures]
            for rest, futures in waiting:
                yield rest, [future.result() for future in futures]
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
