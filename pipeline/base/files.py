"""Atomic writing of files, and classification of errors of the disk and of memory."""

import errno
import os
import shutil
from pathlib import Path

from istanas.errors import ConfigError
from istanas.files import replacing_file, sync_directory


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Replace a file's content so that a crash leaves either the old or the new content, never a mixture.

    Args:
        path: The file. Its directory is created if necessary.
        data: The new content. Text is encoded as UTF-8.

    Raises:
        OSError: The file cannot be written.

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
    try:
        with replacing_file(target) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise detailed_error(error, target, len(content)) from error


def writable_file(path: Path, field: str) -> Path:
    """Return the file behind a path, with links resolved, if it can be written. Renaming a file to a link replaces it.

    Args:
        path: The file, which need not exist.
        field: The option that named it, for error messages.

    Raises:
        ConfigError: It cannot be written, or would replace something that is not a regular file.
    """
    target = Path(os.path.realpath(path))
    writable = target.parent.is_dir() and os.access(target.parent, os.W_OK)
    if os.path.lexists(target):
        writable = writable and target.is_file() and os.access(target, os.W_OK)
    if not writable:
        raise ConfigError(
            f"{path} cannot be written",
            field=field,
            remedy="name a regular file in a writable folder",
        )
    return target


def append(path: Path, data: bytes, *, at: int) -> None:
    """Truncate a file, append to it, and wait until the data is on the disk.

    Args:
        path: The file. It and its directory are created if necessary.
        data: The bytes to append.
        at: Number of bytes of the file to keep.

    Raises:
        OSError: The data cannot be written. The file then contains only its first `at` bytes.
        ValueError: The file has fewer than `at` bytes.

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
            raise ValueError(f"it has {size} bytes, fewer than {at}")
        os.ftruncate(stream.fileno(), at)
        stream.seek(at)
        left = memoryview(data)
        try:
            while left:  # A write may take only a part of the data, for example when a disk fills up.
                left = left[stream.write(left) :]
            os.fsync(stream.fileno())
        except OSError as error:
            os.ftruncate(stream.fileno(), at)
            raise detailed_error(error, path, len(data)) from error
    if created:
        sync_directory(path.parent)


def is_full(error: BaseException) -> bool:
    """Return whether an error says that a disk, a quota or a limit on file sizes is exhausted.

    Example:
        >>> is_full(OSError(errno.ENOSPC, "No space left")), is_full(OSError(errno.EACCES, "Permission denied"))
        (True, False)
    """
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the machine or its GPU is out of memory. Torch says so only in the text.

    Example:
        >>> is_out_of_memory(RuntimeError("CUDA error: out of memory")), is_out_of_memory(RuntimeError("no"))
        (True, False)
    """
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)


def detailed_error(error: OSError, path: Path, needed: int) -> OSError:
    """Return a write error with the file and, if the disk is full, the required and the free space.

    Args:
        error: The error.
        path: The file.
        needed: Number of bytes that were to be written.
    """
    text = error.strerror
    if is_full(error):
        try:
            free = f", {shutil.disk_usage(path.parent).free / 1e6:.2f} MB are free"
        except OSError:
            free = ""
        text = f"{text} ({needed / 1e6:.2f} MB are needed{free})"
    return OSError(f"{path}: {error}") if text is None else OSError(error.errno, text, str(path))


def ensure_content(path: Path, content: bytes) -> None:
    """Give a file exactly this content: a file that starts with it is truncated, any other is replaced atomically.

    Args:
        path: The file; it and its directory are created if they do not exist.
        content: The whole content.

    Raises:
        OSError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "lines"
        >>> for before in (b"first, torn", b"other"):
        ...     _ = file.write_bytes(before); ensure_content(file, b"first"); print(file.read_text())
        first
        first
    """
    if path.is_file():
        with open(path, "rb") as stream:
            if stream.read(len(content)) == content:
                if stream.read(1):
                    os.truncate(path, len(content))
                return
    atomic_write(path, content)
