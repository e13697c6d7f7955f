"""Numbers of threads of each worker and of a job in this process. The module imports neither Ray nor torch.

`runtime.threads` takes precedence if it is set. Otherwise `threads_per_worker` (called by `cluster.allotment`) divides
the cores among workers, and `threads_in_process` (called by `training.compute`) gives all of them to this process, if
the variable OMP_NUM_THREADS does not limit them.
"""

from __future__ import annotations

import os
import re
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
    """Return the number of threads of a job in this process.

    It is the setting; if that is `None`, the value of OMP_NUM_THREADS (the first one of a list for nested regions, as
    in "4,2"), but at most one thread per usable core; and without a positive value, one thread per usable core.

    Args:
        threads: `runtime.threads`.

    Example:
        >>> threads_in_process(3)
        3
    """
    if threads is not None:
        return threads
    limit = re.match(r"\s*\+?(\d+)\s*(,|$)", os.environ.get("OMP_NUM_THREADS", ""), re.ASCII)
    return min(int(limit[1]) or usable_cores(), usable_cores()) if limit else usable_cores()


def usable_cores() -> int:
    """Return the number of cores that this process may use. Containers and batch systems may grant only some of them.

    Example:
        >>> usable_cores() >= 1
        True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
