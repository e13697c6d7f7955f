"""Limits of the files that are read. Larger files are rejected before they take memory or time.

Each limit is far above what the program writes, but low enough that the worst file takes seconds and some hundreds of
megabytes. The exception is a checkpoint of empty lists only, which takes 70 times its size and 1 s per megabyte.
"""

from __future__ import annotations

import os
import stat

KB, MB = 2**10, 2**20

GENOTYPE_BYTES = 1 * MB
GENOTYPE_TEXT_BYTES = 64 * 1024
"""Limit of the text form of a genotype, whose syntax tree takes a hundred times as much memory."""

GENOTYPE_NODES = 32
"""Largest number of nodes of a cell; a search has at most 16."""

GENOTYPE_PICKS = 256
"""Largest number of picks of a cell; 16 nodes that keep 14 candidates each have 224."""

CONFIG_BYTES = 256 * KB
CONFIG_VALUES = 5_000
"""Largest number of keys and values of a configuration. Those that an alias repeats are counted again."""

CONFIG_DEPTH = 12
"""Largest depth of nested sections and lists of a configuration, and of a key of --set."""

CONFIG_ERRORS = 20
"""Largest number of errors of a configuration that are reported together."""

RECORD_BYTES = 8 * MB
"""Limit of a JSON file of a run directory, such as run.json, network.json or a checkpoint's manifest."""

METRICS_BYTES = 32 * MB
"""Limit of metrics.jsonl: 600 epochs take 1 MB."""

LOG_SEGMENT_BYTES = 32 * MB
"""Limit of a segment of the log of epochs: the 100 records of a segment take 5 MB for a search with 16 nodes."""

TABLE_BYTES = 64 * MB
"""Limit of trials.csv (about 300 bytes per trial) and of the tables of a search, such as trajectory.csv."""

CHECKPOINT_PICKLE_BYTES = 32 * MB
"""Limit of a checkpoint without its tensors: less than 1 MB in the published search, after any number of epochs.

Checkpoints of version 0.1, which are still read, contain the records of all epochs: 1,000 with 16 nodes take 32 MB.
"""

NETWORK_LAYERS = 1_000
"""Largest number of cells of a network that is loaded."""

WEIGHTS_HEADER_BYTES = 8 * MB
"""Limit of the header of a trained network's file: the names, shapes and positions of its weights."""

SMALL_SIDE = 64
"""Largest side of small pictures, in pixels: they are decoded once, kept in memory, and get the stem of CIFAR-10."""

MIN_IMAGE_SIZE = 8
"""Smallest side of pictures that the networks accept, in pixels."""

MAX_SIDE = 4_096
"""Largest side of the pictures of a network that is loaded, in pixels."""


def read_at_most(path: str | os.PathLike[str], limit: int, *, start: int = 0, pipe: bool = False) -> bytes:
    """Return the content of a file.

    Args:
        path: The file.
        limit: Largest number of bytes from `start` on.
        start: Offset of the first byte.
        pipe: Whether the file may be a pipe, such as a shell's `<(...)`. The call then waits for the writer.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is larger than the limit, or a pipe that is not allowed.

    Example:
        >>> read_at_most("/dev/zero", 10)
        Traceback (most recent call last):
        ValueError: larger than 10 bytes
    """
    if not pipe and stat.S_ISFIFO(os.stat(path).st_mode):
        raise ValueError("a pipe, not a file")
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if status.st_size > start + limit:
            raise ValueError(f"larger than {limit} bytes")
        if start:
            file.seek(start)
        # `file.read(limit)` would allocate `limit` bytes.
        data = file.read() if stat.S_ISREG(status.st_mode) else file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"larger than {limit} bytes")
    return data
