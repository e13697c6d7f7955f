"""Numbers of workers and threads for the cores of this machine or a cluster. Imports no Ray and no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from istanas.errors import ConfigError


@dataclass(frozen=True)
class WorkerRange:
    """How many workers a job may have; a fixed number has both ends equal, 0 is this process."""

    minimum: int
    maximum: int

    @property
    def elastic(self) -> bool:
        """Whether the number may change while the job runs."""
        return self.minimum != self.maximum

    def __str__(self) -> str:
        return f"{self.minimum}:{self.maximum}" if self.elastic else str(self.maximum)


def parse_workers(value: int | str) -> WorkerRange:
    """Read "N" or "MIN:MAX".

    Raises:
        ConfigError: for anything else.

    Example:
        >>> parse_workers("1:4"), parse_workers(2).elastic
        (WorkerRange(minimum=1, maximum=4), False)
    """
    found = re.fullmatch(r"(\d{1,6})(?::(\d{1,6}))?", str(value))
    if found and not isinstance(value, bool):
        low = int(found[1])
        high = low if found[2] is None else int(found[2])
        if low == high or 1 <= low < high:
            return WorkerRange(low, high)
    raise ConfigError(
        f"{value!r:.40} is not a number of workers",
        field="workers",
        remedy="give a number or MIN:MAX, such as 2 or 1:4",
    )


@dataclass(frozen=True)
class Node:
    """What a machine of a cluster has for workers."""

    cpus: int
    gpus: int = 0


def workers_that_fit(nodes: Sequence[Node], threads: int, gpu: bool) -> int:
    """How many workers of so many threads (and, with `gpu`, one GPU) the nodes can hold.

    Example:
        >>> workers_that_fit([Node(8), Node(3)], threads=2, gpu=False)
        5
    """
    return sum(min(node.cpus // threads, node.gpus) if gpu else node.cpus // threads for node in nodes)


def largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number from `low`, which is taken for granted, to `high` that fits, as all below it do.

    Example:
        >>> largest(1, 9, lambda number: number <= 4)
        4
    """
    number = high  # which fits more often than not, and may take long to ask for
    while low < high:
        if fits(number):
            low = number
        else:
            high = number - 1
        number = (low + high + 1) // 2
    return low


def threads_per_worker(nodes: Sequence[Node], workers: int, gpu: bool) -> int:
    """Cores / workers: the most threads with which as many of the workers find a place as with one thread.

    Example:
        >>> threads_per_worker([Node(8)], 2, gpu=False), threads_per_worker([Node(3), Node(3)], 3, gpu=False)
        (4, 1)
    """
    wanted = min(workers, workers_that_fit(nodes, 1, gpu))
    most = max((node.cpus for node in nodes), default=1)
    return max((t for t in range(1, most + 1) if workers_that_fit(nodes, t, gpu) >= wanted), default=1)


def threads_in_process(threads: int | None) -> int:
    """Threads of a process that has this machine to itself: as set, else the cores it may use."""
    return usable_cores() if threads is None else threads


def usable_cores() -> int:
    """Cores that this process may use (a container or a batch system may grant fewer than there are).

    Example:
        >>> usable_cores() >= 1
        True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
