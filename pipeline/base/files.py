"""Atomic writing of files, and what an error of the disk or of memory means."""

import contextlib
import errno
import os
import shutil
import uuid
from pathlib import Path


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Replace a file's content so that a crash leaves either the old or the new content, never a mixture.

    Args:
        path: the file; its directory is created if need be.
        data: the whole new content; text is written as UTF-8.

    Raises:
        OSError: the directory can't be written.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a" / "note.txt"
        >>> atomic_write(file, "first"); atomic_write(file, "second")
        >>> file.read_text(), [p.name for p in file.parent.iterdir()]
        ('second', ['note.txt'])
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = data.encode() if isinstance(data, str) else data
    # Beside the target, because a rename is atomic only within one file system.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)  # now: it is told how much is free without it
        raise refused(error, target, len(content)) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(target.parent)


def append(path: Path, data: bytes, *, at: int) -> None:
    """Cut a file to some length and add to it; the data is on the disk when this returns.

    Args:
        path: the file; it and its directory are created if need be.
        data: what to add.
        at: bytes of the file that stay.

    Raises:
        OSError: the disk refuses; the first `at` bytes are then all that the file holds.
        ValueError: the file has fewer than `at` bytes.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "lines"
        >>> append(file, b"first, torn", at=0); append(file, b" and second", at=5)
        >>> file.read_text()
        'first and second'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    created = not path.exists()
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size < at:
            raise ValueError(f"it has {size} bytes, not at least {at}")
        os.ftruncate(stream.fileno(), at)
        stream.seek(at)
        left = memoryview(data)
        try:
            while left:  # A write may take only a part of the data, for example when a disk fills up.
                left = left[stream.write(left) :]
            os.fsync(stream.fileno())
        except OSError as error:
            os.ftruncate(stream.fileno(), at)
            raise refused(error, path, len(data)) from error
    if created:
        sync_directory(path.parent)


def is_full(error: BaseException) -> bool:
    """Whether it is a disk, a quota or a limit on files that has no room left.

    Example:
        >>> is_full(OSError(errno.ENOSPC, "No space left")), is_full(OSError(errno.EACCES, "Permission denied"))
        (True, False)
    """
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine, or its GPU, has no memory left; torch says so of either only in words.

    Example:
        >>> is_out_of_memory(RuntimeError("CUDA error: out of memory")), is_out_of_memory(RuntimeError("no"))
        (True, False)
    """
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)


def refused(error: OSError, path: Path, needed: int) -> OSError:
    """The error with what the system leaves out of it: which file, and, of a full disk, what it needs and what is free.

    Args:
        error: of writing the file.
        path: of the file.
        needed: bytes.
    """
    text = error.strerror
    if is_full(error):
        try:
            free = f", {shutil.disk_usage(path.parent).free / 1e6:.2f} MB are free"
        except OSError:
            free = ""
        text = f"{text} ({needed / 1e6:.2f} MB are needed{free})"
    return OSError(f"{path}: {error}") if text is None else OSError(error.errno, text, str(path))


def sync_directory(directory: Path) -> None:
    """Make created, renamed and deleted files of a folder survive a power cut.

    Args:
        directory: the folder. Where the system cannot open a folder, nothing is done.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
