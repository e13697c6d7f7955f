"""How much of a file from elsewhere is read: more is refused in one line, before it costs memory or time.

Each limit is far above what the program itself writes, and low enough that the worst file takes seconds and some
hundreds of megabytes; but a checkpoint that holds nothing but empty lists takes 70 times its size, 1 s a megabyte.
"""

from __future__ import annotations

import os
import stat

KB, MB = 2**10, 2**20

GENOTYPE_BYTES = 1 * MB
GENOTYPE_TEXT_BYTES = 64 * 1024  # of a text form, whose syntax tree takes a hundred times as much memory
GENOTYPE_NODES = 32
"""Nodes of a cell; a search has at most 16."""

GENOTYPE_PICKS = 256
"""Picks of a cell; 16 nodes that keep 14 candidates each have 224."""

CONFIG_BYTES = 256 * KB
CONFIG_VALUES = 5_000
"""Keys and values of a configuration, those counted again that an alias repeats."""

CONFIG_DEPTH = 12
"""Sections and lists inside one another; also the names of a key of --set."""

CONFIG_ERRORS = 20
"""Mistakes that are told at once."""

RECORD_BYTES = 8 * MB
"""Of a JSON file of a run directory: run.json, network.json, environment.json, mlflow.json, a checkpoint's manifest."""

METRICS_BYTES = 32 * MB
"""Of metrics.jsonl: 600 epochs take one."""

LOG_SEGMENT_BYTES = 32 * MB
"""Of a segment of the log of epochs, which has the records of 100: those of a search with 16 nodes take five."""

TABLE_BYTES = 64 * MB
"""Of trials.csv (some 300 bytes a trial), trajectory.csv and codes.csv."""

CHECKPOINT_PICKLE_BYTES = 32 * MB
"""Of what is no tensor in a checkpoint: under one in the published search, however many epochs are done.

Checkpoints of version 0.1, which are still read, hold the records of all epochs: 1,000 of 16 nodes take 32.
"""

NETWORK_LAYERS = 1_000
"""Cells of a network that is loaded."""

WEIGHTS_HEADER_BYTES = 8 * MB
"""Of a trained network's file, beside the weights themselves: their names, shapes and places."""

SMALL_SIDE = 64
"""Pixels of a side up to which pictures are small: decoded once, kept in memory, and given the stem of CIFAR-10."""

MIN_IMAGE_SIZE = 8
"""Pixels of a side below which the networks accept no pictures."""

MAX_SIDE = 4_096
"""Pixels of a side of the pictures that a loaded network is for."""


def read_at_most(path: str | os.PathLike[str], limit: int, *, start: int = 0, pipe: bool = False) -> bytes:
    """The content of a file.

    Args:
        path: the file.
        limit: bytes that it may have, from `start` on.
        start: the byte from which it is read.
        pipe: it may be a pipe, such as a shell's `<(...)`, whose writer is waited for.

    Raises:
        OSError: it can't be read.
        ValueError: it is larger, or a pipe.

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
        # Not `limit` of a file, for so much would be set aside for it.
        data = file.read() if stat.S_ISREG(status.st_mode) else file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"larger than {limit} bytes")
    return data
