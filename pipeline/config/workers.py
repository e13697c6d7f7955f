"""Numbers of workers: notation, and how many fit on a cluster's nodes. The module imports neither Ray nor torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from istanas.errors import ConfigError


@dataclass(frozen=True)
class WorkerRange:
    """Smallest and largest number of workers of a job. They are equal for a fixed number; 0 means this process."""

    minimum: int
    maximum: int

    @property
    def elastic(self) -> bool:
        """Whether the number may change while the job runs."""
        return self.minimum != self.maximum

    def __str__(self) -> str:
        return f"{self.minimum}:{self.maximum}" if self.elastic else str(self.maximum)


def parse_workers(value: int | str) -> WorkerRange:
    """Parse "N" or "MIN:MAX".

    Raises:
        ConfigError: The value has another form.

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
    """The CPUs and GPUs of a machine in a cluster."""

    cpus: int
    gpus: int = 0


def workers_that_fit(nodes: Sequence[Node], threads: int, gpu: bool) -> int:
    """Return how many workers with this number of threads (and with one GPU each, if `gpu`) fit on the nodes.

    Example:
        >>> workers_that_fit([Node(8), Node(3)], threads=2, gpu=False)
        5
    """
    return sum(min(node.cpus // threads, node.gpus) if gpu else node.cpus // threads for node in nodes)


def largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number that fits, by bisection.

    Args:
        low: A number that is known to fit.
        high: The largest number to consider.
        fits: A function that is true up to some number and false above it.

    Example:
        >>> largest(1, 9, lambda number: number <= 4)
        4
    """
    number = high  # first, because it usually fits and `fits` may be slow
    while low < high:
        if fits(number):
            low = number
        else:
            high = number - 1
        number = (low + high + 1) // 2
    return low
