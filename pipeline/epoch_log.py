"""The log of a run's epochs: one line per epoch, appended when its checkpoint is written and never rewritten.

The log lies beside the checkpoints, in two copies: the folders `epochs` and `epochs-copy`. Each copy consists of
segments of `SEGMENT` lines, so that a bucket, which takes whole files, receives a bounded part of it after an epoch.
A line is a SHA-256 digest, a space and the record of the epoch as JSON. The digest covers the digest of the line
before it and the record; a segment begins with the digest at which it goes on. A checkpoint holds the last digest, and
with it vouches for every line: a damaged segment is noticed, and replaced from the other copy.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from istanas.errors import CheckpointError
from istanas.limits import LOG_SEGMENT_BYTES, read_at_most
from pipeline.rundir import append, atomic_write

SEGMENT = 100
COPIES = ("epochs", "epochs-copy")


class BrokenCheckpointWarning(UserWarning):
    """A checkpoint or a segment of the log did not match its checksum, and another file was used."""


@dataclass(frozen=True)
class LogEnd:
    """The end of a log, which a checkpoint holds.

    Args:
        epochs: lines of the log.
        digest: of the last line; "" if there is none.
        offset: bytes of the segment in which the next line is written.

    Example:
        >>> end, line = LogEnd().after("{}")
        >>> end.epochs, end.offset == len(line), line[-4:]
        (1, True, b' {}\\n')
    """

    epochs: int = 0
    digest: str = ""
    offset: int = 0

    def after(self, text: str) -> tuple[LogEnd, bytes]:
        """Return the end of the log after one more line, and that line, with what a segment begins with.

        Args:
            text: the record, in one line.
        """
        digest = _chained(self.digest, text)
        start = f"{self.digest}\n" if self.epochs % SEGMENT == 0 else ""
        line = f"{start}{digest} {text}\n".encode()
        epochs = self.epochs + 1
        offset = 0 if epochs % SEGMENT == 0 else self.offset + len(line)
        return LogEnd(epochs, digest, offset), line


def append_line(folder: Path, epoch: int, line: bytes, offset: int) -> None:
    """Write the line of an epoch to both copies; whatever a log held from this epoch on is removed.

    Args:
        folder: of the checkpoints.
        epoch: number of the line, from 1.
        line: as `LogEnd.after` returns it.
        offset: of the `LogEnd` before this line.

    Raises:
        OSError: if the disk refuses; the lines before this one are then untouched.
        CheckpointError: if a copy is shorter than it was when it was last verified.
    """
    for copy in COPIES:
        segment = (epoch - 1) // SEGMENT
        file = _file(folder, copy, segment)
        try:
            append(file, line, at=offset)
        except ValueError as error:
            raise CheckpointError(
                f"{file}: {error}, something else has changed it; the same command restores it"
            ) from None
        while (later := _file(folder, copy, segment := segment + 1)).exists():
            later.unlink()


def rewrite(folder: Path, texts: Iterable[str]) -> LogEnd:
    """Replace the whole log.

    Args:
        folder: of the checkpoints.
        texts: the records, one line each.

    Returns:
        Its end.
    """
    end, segments = LogEnd(), list[list[bytes]]()
    for text in texts:
        if end.epochs % SEGMENT == 0:
            segments.append([])
        end, line = end.after(text)
        segments[-1].append(line)
    for copy in COPIES:
        for number, lines in enumerate(segments):
            atomic_write(_file(folder, copy, number), b"".join(lines))
    return end


def read(folder: Path, end: LogEnd) -> Iterator[str]:
    """Yield the records of all epochs up to an end of the log, verified; what lies behind it is not looked at.

    A segment that is damaged in one copy is replaced from the other.

    Args:
        folder: of the checkpoints.
        end: as the checkpoint holds it.

    Raises:
        CheckpointError: if both copies of a segment are damaged, or do not belong to this end; before any record.

    Warns:
        BrokenCheckpointWarning: for every segment that was replaced.
    """
    counts = [min(SEGMENT, end.epochs - first) for first in range(0, end.epochs, SEGMENT)]
    digest = end.digest
    # From the end, which the checkpoint vouches for, to the start.
    for number, count in reversed(list(enumerate(counts))):
        digest = _mend_segment(folder, number, count, digest)
    for number, count in enumerate(counts):
        lines = read_at_most(_file(folder, COPIES[0], number), LOG_SEGMENT_BYTES).decode().split("\n")
        for line in lines[1 : count + 1]:
            yield line.partition(" ")[2]


def _mend_segment(folder: Path, number: int, count: int, digest: str) -> str:
    """Replace a damaged copy of a segment; returns the digest with which the segment before it must end."""
    whole: bytes | None = None
    before = ""
    damaged: dict[Path, str] = {}
    for file in (_file(folder, copy, number) for copy in COPIES):
        try:
            lines = read_at_most(file, LOG_SEGMENT_BYTES).splitlines(keepends=True)[: count + 1]
            before = _verify(lines, number * SEGMENT, count, digest)
        except (OSError, ValueError) as error:
            damaged[file] = (error.strerror if isinstance(error, OSError) else None) or str(error)
        else:
            whole = b"".join(lines)
    if whole is None:
        told = "; ".join(f"{file} is damaged ({reason})" for file, reason in damaged.items())
        raise CheckpointError(
            f"{told}: the epochs before the checkpoint are lost, restore one of the two from a copy, or start over "
            "with --fresh"
        )
    for file, reason in damaged.items():
        atomic_write(file, whole)
        warnings.warn(
            f"{file} was damaged ({reason}): replaced from its copy", BrokenCheckpointWarning, stacklevel=4
        )
    return before


def _verify(lines: list[bytes], first: int, count: int, expected: str) -> str:
    """Check a segment that is to end with a digest; returns the one with which it goes on from the one before."""
    if len(lines) <= count:
        raise ValueError(f"it ends after line {first + max(len(lines) - 1, 0)}")
    before = digest = lines[0].decode().removesuffix("\n")
    for number, line in enumerate(lines[1:], start=first + 1):
        told, _, text = line.decode().partition(" ")
        digest = _chained(digest, text.removesuffix("\n"))
        if told != digest or not text.endswith("\n"):
            raise ValueError(f"line {number} does not match its checksum")
    if digest != expected or (first == 0 and before != ""):
        raise ValueError("it is not of this run's last checkpoint")
    return before


def _chained(digest: str, text: str) -> str:
    return hashlib.sha256(f"{digest} {text}".encode()).hexdigest()


def _file(folder: Path, copy: str, segment: int) -> Path:
    return folder / copy / f"{segment * SEGMENT + 1:06d}.jsonl"
