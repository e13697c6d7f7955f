"""The epoch log of a run: one line per epoch, appended when the epoch's checkpoint is written.

The log is kept in two copies beside the checkpoints: the folders `epochs` and `epochs-copy`. Each copy consists of
segments of `SEGMENT` lines, so that each epoch sends only one segment to a bucket, where files cannot be appended to. A
line is a SHA-256 digest, a space and the record of the epoch as JSON. The digest covers the previous line's digest and
the record; a segment starts with the digest of the previous segment's last line. A checkpoint holds the last digest,
which authenticates all lines. A damaged segment is detected and replaced from the other copy.
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from istanas.errors import CheckpointError
from istanas.limits import LOG_SEGMENT_BYTES, read_at_most
from pipeline.base.files import append, atomic_write, ensure_content
from pipeline.runs.directory import is_absent, unreadable_error
from pipeline.runs.layout import EPOCH_LOGS

SEGMENT = 100
LINE_BYTES = LOG_SEGMENT_BYTES // SEGMENT
"""Maximum size of a line, which limits a segment to `LOG_SEGMENT_BYTES`."""


class BrokenCheckpointWarning(UserWarning):
    """A checkpoint or log segment did not match its checksum, and another file was used."""


class LogError(CheckpointError):
    """No copy of the log has the lines that a checkpoint needs."""


@dataclass(frozen=True)
class LogEnd:
    """The end of a log, as a checkpoint stores it.

    Args:
        epochs: Number of lines.
        digest: Digest of the last line; "" if there is none.
        offset: Size in bytes of the segment in which the next line is written.

    Example:
        >>> end, line = LogEnd().after("{}")
        >>> end.epochs, end.offset == len(line), line[-4:]
        (1, True, b' {}\\n')
    """

    epochs: int = 0
    digest: str = ""
    offset: int = 0

    def after(self, text: str) -> tuple[LogEnd, bytes]:
        """Return the end of the log after one more line, and the bytes of that line.

        For the first line of a segment, the bytes include the digest with which the segment starts.

        Args:
            text: The record, in one line.

        Raises:
            CheckpointError: the line has more than `LINE_BYTES`.
        """
        digest = _chained(self.digest, text)
        start = f"{self.digest}\n" if self.epochs % SEGMENT == 0 else ""
        line = f"{start}{digest} {text}\n".encode()
        if len(line) > LINE_BYTES:
            raise CheckpointError(
                f"the record of epoch {self.epochs + 1} has {len(line)} bytes, more than the {LINE_BYTES} that fit "
                "into the log",
                remedy="search fewer nodes or operations",
            )
        epochs = self.epochs + 1
        offset = 0 if epochs % SEGMENT == 0 else self.offset + len(line)
        return LogEnd(epochs, digest, offset), line


def append_line(folder: Path, epoch: int, line: bytes, offset: int) -> None:
    """Append the line of an epoch to both copies, and remove older lines of this and later epochs.

    A copy that became shorter after it was verified is restored from the other copy.

    Args:
        folder: The folder of the checkpoints.
        epoch: Number of the line, from 1.
        line: The line as `LogEnd.after` returns it.
        offset: The offset of the `LogEnd` before this line.

    Raises:
        OSError: the files cannot be written; the earlier lines are then unchanged.
        CheckpointError: both copies are damaged.

    Warns:
        BrokenCheckpointWarning: for a copy that was restored.
    """
    segment = (epoch - 1) // SEGMENT
    files = [_file(folder, copy, segment) for copy in EPOCH_LOGS]
    for file, other in zip(files, reversed(files), strict=True):
        try:
            append(file, line, at=offset)
        except ValueError as error:
            try:
                whole = read_at_most(other, LOG_SEGMENT_BYTES)[:offset] + line
                end, _, _ = line.decode().partition(" ")
                _verify(whole.splitlines(keepends=True), segment * SEGMENT, epoch - segment * SEGMENT, end)
            except (OSError, ValueError) as reason:
                if isinstance(reason, OSError) and not is_absent(reason):
                    raise
                raise CheckpointError(
                    f"{error}, and {other} is damaged ({reason})",
                    field=str(file),
                    remedy="run the same command again, which resumes from the newest checkpoint that matches the log",
                ) from None
            atomic_write(file, whole)
            _warn_of_damage(file, str(error))
    for copy in EPOCH_LOGS:
        for number in itertools.count(segment + 1):
            later = _file(folder, copy, number)
            if not later.exists():
                break
            later.unlink()


def rewrite(folder: Path, texts: Iterable[str]) -> LogEnd:
    """Replace the content of both copies by these records; identical files are not written.

    Args:
        folder: The folder of the checkpoints.
        texts: The records, one line each.

    Returns:
        The end of the log.
    """
    end, segments = LogEnd(), list[list[bytes]]()
    for text in texts:
        if end.epochs % SEGMENT == 0:
            segments.append([])
        end, line = end.after(text)
        segments[-1].append(line)
    for copy in EPOCH_LOGS:
        for number, lines in enumerate(segments):
            ensure_content(_file(folder, copy, number), b"".join(lines))
    return end


def read(folder: Path, end: LogEnd) -> Iterator[str]:
    """Verify the log up to an end, and yield the records of its epochs; later lines are ignored.

    Arguments, errors and warnings are those of `verify`; errors are raised before the first record is yielded.
    """
    verify(folder, end)
    for number, count in enumerate(_counts(end)):
        lines = read_at_most(_file(folder, EPOCH_LOGS[0], number), LOG_SEGMENT_BYTES).decode().split("\n")
        for line in lines[1 : count + 1]:
            yield line.partition(" ")[2]


def verify(folder: Path, end: LogEnd) -> None:
    """Check the log up to an end, and replace segments that are damaged in one copy from the other copy.

    Args:
        folder: The folder of the checkpoints.
        end: The end that a checkpoint holds.

    Raises:
        LogError: both copies of a segment are damaged, or do not match this end.
        CheckpointError: a segment cannot be read, though it may be intact.

    Warns:
        BrokenCheckpointWarning: for every segment that was replaced.
    """
    digest = end.digest
    # In reverse order, because the checkpoint holds the last digest.
    for number, count in reversed(list(enumerate(_counts(end)))):
        digest = _restore_segment(folder, number, count, digest)


def _counts(end: LogEnd) -> list[int]:
    """Return the number of lines of each segment."""
    return [min(SEGMENT, end.epochs - first) for first in range(0, end.epochs, SEGMENT)]


def _restore_segment(folder: Path, number: int, count: int, digest: str) -> str:
    """Replace a damaged copy of a segment; return the digest with which the previous segment must end."""
    whole: bytes | None = None
    before = ""
    damaged: dict[Path, str] = {}
    for file in (_file(folder, copy, number) for copy in EPOCH_LOGS):
        try:
            lines = read_at_most(file, LOG_SEGMENT_BYTES).splitlines(keepends=True)[: count + 1]
            before = _verify(lines, number * SEGMENT, count, digest)
        except OSError as error:
            if not is_absent(error):
                raise unreadable_error(error, file) from error
            damaged[file] = error.strerror or str(error)
        except ValueError as error:
            damaged[file] = str(error)
        else:
            whole = b"".join(lines)
    if whole is None:
        damage = "; ".join(f"{file} is damaged ({reason})" for file, reason in damaged.items())
        raise LogError(damage, remedy="restore one of the two from a copy")
    for file, reason in damaged.items():
        atomic_write(file, whole)
        _warn_of_damage(file, reason)
    return before


def _warn_of_damage(file: Path, reason: str) -> None:
    warnings.warn(
        f"{file} was damaged ({reason}): replaced from its copy", BrokenCheckpointWarning, stacklevel=3
    )


def _verify(lines: list[bytes], first: int, count: int, expected: str) -> str:
    """Check that a segment ends with a digest; return the digest with which the previous segment must end."""
    if len(lines) <= count:
        raise ValueError(f"it ends after line {first + max(len(lines) - 1, 0)}")
    before = digest = lines[0].decode().removesuffix("\n")
    for number, line in enumerate(lines[1:], start=first + 1):
        stored, _, text = line.decode().partition(" ")
        digest = _chained(digest, text.removesuffix("\n"))
        if stored != digest or not text.endswith("\n"):
            raise ValueError(f"line {number} does not match its checksum")
    if digest != expected or (first == 0 and before != ""):
        raise ValueError("it does not match the checkpoint's digest")
    return before


def _chained(digest: str, text: str) -> str:
    return hashlib.sha256(f"{digest} {text}".encode()).hexdigest()


def _file(folder: Path, copy: str, segment: int) -> Path:
    return folder / copy / f"{segment * SEGMENT + 1:06d}.jsonl"
