"""Files that are written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Yield the path of a new file that replaces `target` when the block ends, and is deleted if the block fails.

    A crash leaves either the old or the new content, never a mixture.

    Args:
        target: The file. Its folder exists.

    Raises:
        OSError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "note.txt"
        >>> for text in ("first", "second"):
        ...     with replacing_file(file) as new:
        ...         _ = new.write_text(text)
        >>> file.read_text(), [path.name for path in file.parent.iterdir()]
        ('second', ['note.txt'])
    """
    # In the folder of the target, because a rename is atomic only within one file system.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(target.parent)


def sync_directory(directory: Path) -> None:
    """Flush a directory to the disk, so that created, renamed and deleted files survive a power failure.

    Args:
        directory: The directory. On systems that cannot open directories, this function does nothing.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
