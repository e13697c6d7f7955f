"""The number of concurrent trials of a sweep, and the resources of each."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.cluster.places import Plan, trials_that_fit
from pipeline.config.schema import Config
from pipeline.config.workers import Node, workers_that_fit
from pipeline.sweeps.space import sweep_of


def plan_trials(config: Config, nodes: Sequence[Node]) -> Plan:
    """Divide the machines among trials, at least one of which must fit.

    Raises:
        IstanasError: If no trial fits.
    """
    plan = divide(config, nodes)
    plan.check_fit(
        nodes,
        "lower --workers, sweep.cpus_per_trial or sweep.gpus_per_trial, or name a cluster with --address",
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
        fit = trials_that_fit(nodes, cpus, gpus)
    most = fit if sweep.max_concurrent is None else sweep.max_concurrent
    return Plan(cpus, gpus, workers, fit, min(fit, most, sweep.trials))
