"""Writing and reading of `metrics.jsonl`, to which a run appends one line of metrics per epoch or trial.

Every line is flushed. A killed writer leaves at most an incomplete last line, which is ignored.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from istanas.errors import CheckpointError
from istanas.limits import METRICS_BYTES, read_at_most
from pipeline.base.files import append, ensure_content
from pipeline.runs.record import MetricsLine

_LOG = logging.getLogger(__name__)
_DIGESTED_BYTES = 4096  # length of the part before an offset that is hashed


def append_line(file: Path, line: MetricsLine) -> None:
    """Append one step's metrics durably.

    Args:
        file: The file, which need not exist.
        line: The step, its time, and its values by name, e.g. `{"train/loss": 1.2}`.
    """
    append(file, _dump_line(line), at=_end_of_whole_lines(file))


def read_lines(file: Path, start: int = 0) -> tuple[list[MetricsLine], int]:
    """Return the complete lines from an offset on, and the offset of their end.

    An incomplete last line is ignored with a warning.

    Args:
        file: The file, which need not exist.
        start: The offset in bytes at which a line starts.

    Raises:
        CheckpointError: A complete line was not written by `append_line`.
    """
    try:
        *complete, torn = read_at_most(file, METRICS_BYTES, start=start).split(b"\n")
    except FileNotFoundError:
        return [], start
    except ValueError as error:
        raise CheckpointError(
            str(error), field=str(file), remedy="restore it, or start over with --fresh"
        ) from None
    if torn:
        _LOG.warning("%s: ignored a incomplete last line (the writer was killed)", file)
    where = "line" if start == 0 else f"after byte {start}, line"
    lines = [_parse_line(line, file, f"{where} {number}") for number, line in enumerate(complete, 1)]
    return lines, start + sum(len(line) + 1 for line in complete)


def digest(file: Path, end: int) -> str:
    """Return a digest of the metrics before an offset; "" if the file is shorter.

    Only the last lines before the offset are hashed; their timestamps make them unique.

    Args:
        file: The file, which need not exist.
        end: The offset in bytes.
    """
    start = max(0, end - _DIGESTED_BYTES)
    try:
        with open(file, "rb") as stream:
            stream.seek(start)
            data = stream.read(end - start)
    except FileNotFoundError:
        return ""
    return hashlib.sha256(data).hexdigest() if len(data) == end - start else ""


def ends_in_mid_line(file: Path) -> bool:
    """Return whether the last line is incomplete."""
    try:
        data = read_at_most(file, METRICS_BYTES)
    except FileNotFoundError:
        return False
    return data != b"" and not data.endswith(b"\n")


def replace_lines(file: Path, lines: Iterable[MetricsLine]) -> None:
    """Replace all lines atomically."""
    ensure_content(file, b"".join(_dump_line(line) for line in lines))


def _dump_line(line: MetricsLine) -> bytes:
    return (json.dumps(line._asdict()) + "\n").encode()


def _end_of_whole_lines(file: Path) -> int:
    """Return the offset at which to write the next line; an incomplete last line is overwritten."""
    if not file.exists():
        return 0
    with open(file, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        if size == 0 or os.pread(stream.fileno(), 1, size - 1) == b"\n":
            return size
        _LOG.warning("%s: dropped a incomplete last line (the writer was killed)", file)
        return os.pread(stream.fileno(), size, 0).rfind(b"\n") + 1


def _parse_line(line: bytes, file: Path, where: str) -> MetricsLine:
    try:
        data = json.loads(line)
        metrics = {str(name): float(value) for name, value in data["metrics"].items()}
        return MetricsLine(int(data["step"]), int(data["timestamp_ms"]), metrics)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise CheckpointError(
            f"{where} is not a line of metrics",
            field=str(file),
            remedy="run the same command again to restore the file",
        ) from None
