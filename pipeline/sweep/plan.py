"""The number of concurrent trials of a sweep, and the resources of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from istanas.errors import IstanasError
from pipeline.base.text import count
from pipeline.config.schema import Config
from pipeline.config.workers import Node, workers_that_fit
from pipeline.sweep.space import sweep_of


@dataclass(frozen=True)
class Plan:
    """The resources of each trial, and the number of concurrent trials.

    Args:
        cpus: The cores of each trial, or of each of its workers.
        gpus: The GPUs of each trial, or of each of its workers; a fraction shares a GPU.
        workers: The Ray Train workers of a trial; 0 if the trial runs in a single process.
        fit: The number of trials that the machines have room for.
        at_once: The number of concurrent trials, at most `sweep.max_concurrent`.
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


def plan_trials(config: Config, nodes: Sequence[Node]) -> Plan:
    """Divide the machines among trials, at least one of which must fit.

    Raises:
        IstanasError: If no trial fits.
    """
    plan = divide(config, nodes)
    if plan.fit == 0:
        cpus, gpus = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
        raise IstanasError(
            f"no trial fits: a trial needs {plan.share}, and there are {count(cpus, 'core')} and {count(gpus, 'GPU')}",
            remedy="lower --workers, sweep.cpus_per_trial or sweep.gpus_per_trial, or name a cluster with --address",
        )
    return plan


def divide(config: Config, nodes: Sequence[Node]) -> Plan:
    """Divide the machines among trials; `Plan.fit` is 0 if no trial fits.

    Args:
        config: The sweep's configuration.
        nodes: The machines.
    """
    sweep, workers = sweep_of(config), config.runtime.worker_range.maximum
    gpus_there = sum(node.gpus for node in nodes)
    gpu = config.runtime.device == "cuda" or (config.runtime.device == "auto" and gpus_there > 0)
    if workers > 1:
        cpus = config.runtime.threads if config.runtime.threads is not None else 1
        gpus, fit = float(gpu), workers_that_fit(nodes, cpus, gpu) // workers
    else:
        workers, cpus = 0, sweep.cpus_per_trial
        gpus = sweep.gpus_per_trial if sweep.gpus_per_trial is not None else float(gpu)
        fit = sum(min(node.cpus // cpus, _shares(node.gpus, gpus)) for node in nodes)
    most = fit if sweep.max_concurrent is None else sweep.max_concurrent
    return Plan(cpus, gpus, workers, fit, min(fit, most, sweep.trials))


def _shares(gpus: int, each: float) -> int:
    """Return the number of trials that the GPUs of a node have room for; unlimited if a trial needs no GPU."""
    if each == 0:
        return 10**9
    return gpus * int(1 / each + 1e-9) if each < 1 else int(gpus // each)
