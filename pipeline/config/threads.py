"""Numbers of threads: of each worker, and of a job in this process. Imports neither Ray nor torch.

`runtime.threads` decides if it is set. Otherwise the cores are divided: on workers by `threads_per_worker`, which
`cluster.allotment` calls, and in this process by `threads_in_process`, which `training.compute` calls.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from pipeline.config.workers import Node, workers_that_fit


def threads_per_worker(nodes: Sequence[Node], workers: int, gpu: bool) -> int:
    """Return the largest number of threads with which as many workers fit as with one thread.

    Example:
        >>> threads_per_worker([Node(8)], 2, gpu=False), threads_per_worker([Node(3), Node(3)], 3, gpu=False)
        (4, 1)
    """
    wanted = min(workers, workers_that_fit(nodes, 1, gpu))
    most = max((node.cpus for node in nodes), default=1)
    return max((t for t in range(1, most + 1) if workers_that_fit(nodes, t, gpu) >= wanted), default=1)


def threads_in_process(threads: int | None) -> int:
    """Return the number of threads of a job in this process: as set, or all usable cores."""
    return usable_cores() if threads is None else threads


def usable_cores() -> int:
    """Return the number of cores that this process may use. Containers and batch systems may grant only some of them.

    Example:
        >>> usable_cores() >= 1
        True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
