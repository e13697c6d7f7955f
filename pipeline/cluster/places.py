"""The places of a job's trials: how many trials run at once on the machines, and the resources of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from istanas.errors import IstanasError
from istanas.training import Compute
from pipeline.base.text import count
from pipeline.cluster.allotment import Allotment, cluster_nodes
from pipeline.cluster.preflight import check_gpus, check_nodes
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.schema import Config, RuntimeSettings
from pipeline.config.workers import Node, WorkerRange


@dataclass(frozen=True)
class Plan:
    """The resources of each trial, and the number of concurrent trials.

    Args:
        cpus: The cores of each trial, or of each of its workers.
        gpus: The GPUs of each trial, or of each of its workers; a fraction shares a GPU.
        workers: The Ray Train workers of a trial; 0 if the trial runs in a single process.
        fit: The number of trials that the machines have room for.
        at_once: The number of concurrent trials.
    """

    cpus: int
    gpus: float
    workers: int
    fit: int
    at_once: int

    @property
    def share(self) -> str:
        """The resources of one trial, in words."""
        each = count(self.cpus, "core") + (f" and {self.gpus:g} GPU" if self.gpus else "")
        return f"{count(self.workers, 'worker')} of {each}" if self.workers else each

    def __str__(self) -> str:
        return f"each trial has {self.share}; {count(self.fit, 'trial')} fit, at most {self.at_once} at once"

    def runtime_of_trial(self, settings: RuntimeSettings) -> RuntimeSettings:
        """Return the settings of a trial's own process, which already runs on the cluster."""
        own = {
            "workers": self.workers,
            "threads": self.cpus,
            "address": None,
            "device": "cuda" if self.gpus else "cpu",
        }
        return settings.model_copy(update=own)

    def check_fit(self, nodes: Sequence[Node], remedy: str) -> None:
        """Check that at least one trial fits on the machines.

        Raises:
            IstanasError: If none does.
        """
        if self.fit == 0:
            cpus, gpus = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
            raise IstanasError(
                f"no trial fits: a trial needs {self.share}, and there are {count(cpus, 'core')} and "
                f"{count(gpus, 'GPU')}",
                remedy=remedy,
            )


def trials_that_fit(nodes: Sequence[Node], cpus: int, gpus: float) -> int:
    """Return how many trials of one process with these cores and GPUs fit on the machines.

    Example:
        >>> trials_that_fit([Node(8, 1), Node(8, 1)], 1, 0.25)
        8
    """
    return sum(min(node.cpus // cpus, _shares(node.gpus, gpus)) for node in nodes)


def _shares(gpus: int, each: float) -> int:
    """Return the number of trials that the GPUs of a node have room for; unlimited if a trial needs no GPU."""
    if each == 0:
        return 10**9
    return gpus * int(1 / each + 1e-9) if each < 1 else int(gpus // each)


def wait_for_places(
    config: Config,
    divide: Callable[[Sequence[Node]], Plan],
    runtime: Runtime,
    say: Callable[[str], None],
    *,
    trials_write: bool,
) -> None:
    """Check the nodes of a joined cluster, and wait until one trial fits if the cluster may still grow.

    Args:
        config: The configuration of the job.
        divide: Divides machines among the trials.
        runtime: The cluster.
        say: Called with lines for the user.
        trials_write: Whether trials write to runs and to the store themselves.

    Raises:
        IstanasError: If a check fails, or no trial fits in time.
    """
    check_nodes(config, say, trials=trials_write, known=runtime.examined)
    nodes = cluster_nodes()
    plan = divide(nodes)
    required, available = math.ceil(plan.gpus * max(plan.workers, 1)), sum(node.gpus for node in nodes)
    check_gpus(required, available, config.runtime.wait_minutes, say)
    if plan.fit == 0:
        workers, device = max(plan.workers, 1), torch.device("cuda" if plan.gpus else "cpu")
        runtime.wait(Allotment(WorkerRange(workers, workers), plan.cpus, Compute(device)), say)
        check_nodes(config, say, trials=trials_write, known=runtime.examined)
