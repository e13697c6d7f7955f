"""How many trials of a sweep run at once, and what each of them gets."""

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
    """What each trial gets, and how many run at once.

    Args:
        cpus: of each trial, or of each of its workers.
        gpus: likewise; a fraction shares one.
        workers: Ray Train workers of a trial; 0: it runs in its own process.
        fit: how many trials the machines can hold.
        at_once: how many run, `sweep.max_concurrent` kept.
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
        return f"a trial has {self.share}; {self.fit} fit, {self.at_once} at once"


def plan_trials(config: Config, nodes: Sequence[Node]) -> Plan:
    """`divide`, and refuse what holds no trial.

    Raises:
        IstanasError: if not even one trial fits.
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
    """Divide the machines among trials; of none, `fit` is 0.

    Args:
        config: of the sweep.
        nodes: what there is.
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
    """How many trials the GPUs of a node can hold; as many as you like that need none."""
    if each == 0:
        return 10**9
    return gpus * int(1 / each + 1e-9) if each < 1 else int(gpus // each)
