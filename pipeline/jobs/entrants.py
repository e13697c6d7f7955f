"""What jobs that consist of searches and retrainings share: methods that take part, runs, statistics, execution."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from istanas.data import ImageDataset
from istanas.errors import ConfigError
from istanas.methods import METHODS
from istanas.statistics import Comparison
from pipeline.config.load import load, run_hash, with_method, with_search_of
from pipeline.config.schema import Config
from pipeline.jobs.context import JobContext
from pipeline.jobs.lifecycle import JobSteps, Outcome, check_data, execute, settled
from pipeline.jobs.observer import RunObserver
from pipeline.jobs.opening import JobSpec, now_ms
from pipeline.jobs.search import check_solver
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.record import MetricsLine

Row = TypeVar("Row", bound=Mapping[str, Any])


@dataclass(frozen=True)
class Entrant:
    """A method that takes part.

    Args:
        label: Its name in the tables.
        name: The name of its searches.
        config: Its configuration, with the first seed.
    """

    label: str
    name: str
    config: Config

    def at_seed(self, index: int) -> Config:
        """Return the configuration of the search with the index-th seed."""
        return self.config.model_copy(update={"seed": self.config.seed + index})


def entrants(context: JobContext, methods: Sequence[str], option: str) -> list[Entrant]:
    """Return the methods that take part, the configured one first.

    Args:
        context: The context of the job. It receives a line about settings that a method does not have, if it trains
            anything.
        methods: The other methods: names, or configuration files whose `method` and `search` are used.
        option: The option of the command line that names them, for error messages.

    Raises:
        ConfigError: A method is unknown, named twice, or does not fit the configuration.
    """
    config, name = context.config, context.name
    # The name of a store, the number of workers and so on are those of the configured method.
    untracked = config.model_copy(
        update={"tracking": config.tracking.model_copy(update={"models": False}), "sweep": None}
    )
    listed = [Entrant(config.method, name, untracked)]
    for given in methods:
        if given in METHODS or not Path(given).is_file():
            own, left_out = with_method(untracked, given, option)
            if left_out and own.search.trains:  # a method that trains nothing uses none of them
                keys = ", ".join(f"search.{key}" for key in left_out)
                context.say(f"{given} has no {keys}: left out, its defaults are used")
            label = given
        else:
            label = re.sub(r"[^\w.-]", "-", Path(given).stem)
            own = with_search_of(untracked, load(given), given)
        if label in [each.label for each in listed]:
            raise ConfigError(
                f"{label} takes part already",
                field=option,
                remedy="name each method once; give a file with another name for other settings of a method",
            )
        listed.append(Entrant(label, f"{name}-{label}", own))
    return listed


def identity(listed: Sequence[Entrant], seeds: int) -> dict[str, str]:
    """Return the further inputs of `run_hash`: the number of seeds, and each method with its settings."""
    return {
        "seeds": str(seeds),
        "entrants": " ".join(f"{each.label}-{run_hash(each.config, 'search')}" for each in listed),
    }


def check_entrants(
    context: JobContext, listed: Sequence[Entrant], dataset: ImageDataset, jobs: Sequence[str]
) -> None:
    """Check the settings of all methods against the pictures.

    Args:
        context: The context of the job.
        listed: The methods.
        dataset: The pictures.
        jobs: "search", and "retrain" if what a search finds is retrained.

    Raises:
        ConfigError: A setting does not fit the pictures.
        SolverError: A solver cannot run here.
    """
    for each in listed:
        config = settled(each.config, context.console)
        check_solver(config.space.solver)
        check_data(config, dataset, jobs)


def execute_study(
    context: JobContext,
    spec: JobSpec,
    prepare: Callable[[ImageDataset], ImageDataset],
    run: Callable[[RunDir, RunObserver, ImageDataset], Outcome],
    metrics_lines: Callable[[Mapping[str, Any], int], list[MetricsLine]],
    warn: Callable[[], list[str]] = list,
) -> dict[str, Any]:
    """Execute a job that consists of searches and retrainings, each of which is a run of its own.

    Args:
        context: The context of the job.
        spec: The identity of its run.
        prepare: See `pipeline.jobs.lifecycle.JobSteps`.
        run: See `pipeline.jobs.lifecycle.JobSteps`.
        metrics_lines: Returns the metrics of a result, with a time in ms.
        warn: Returns warnings.
    """
    steps = JobSteps(
        datasets=lambda _: (),  # each search and retraining records its own; the seed changes the split
        prepare=prepare,
        warn=lambda _: warn(),
        run=run,
        describe=lambda _: "",
        rebuild_metrics=lambda: metrics_lines(RunDir(spec.path).read().result, now_ms()),
        has_report=False,
    )
    return execute(context.with_config(spec.config), spec, steps)


def context_of(
    context: JobContext, run: RunDir, config: Config, name: str, tag: str, parent: str | None = None
) -> JobContext:
    """Return the context of a search or a retraining that the job starts.

    Args:
        context: The context of the job.
        run: The run directory of the job.
        config: The configuration of the search or the retraining.
        name: Its name.
        tag: The MLflow tag that names the job's run directory.
        parent: The run directory that it belongs to; None for that of the job.
    """
    above = bucket.named(run.path) if parent is None else parent
    return replace(context, config=config, name=name, parent=above, tags={tag: run.path.name}, run=None)


def by_method(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group rows by their method, in the order in which the methods appear.

    Example:
        >>> rows = [{"method": name, "seed": seed} for seed in (0, 1) for name in ("darts", "random")]
        >>> {name: [row["seed"] for row in own] for name, own in by_method(rows).items()}
        {'darts': [0, 1], 'random': [0, 1]}
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    return groups


def comparison_row(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as `--json` prints it."""
    return {**asdict(comparison), "found": comparison.found}


def seed_metrics(
    runs: Sequence[Mapping[str, Any]],
    methods: Sequence[Mapping[str, Any]],
    keys: Sequence[str],
    timestamp_ms: int,
) -> list[MetricsLine]:
    """Return metrics with a step for each seed, and the means over all seeds at the last one.

    Args:
        runs: A row for each method and seed, with the keys "method", "seed" and `keys`.
        methods: A row for each method, with an interval under each of `keys`.
        keys: The names of the metrics.
        timestamp_ms: The time of the lines.
    """
    steps: dict[int, dict[str, float]] = {}
    first = min(run["seed"] for run in runs)
    for run in runs:
        values = steps.setdefault(run["seed"] - first + 1, {})
        for key in keys:
            values[f"{run['method']}/{key}"] = run[key]
    for method in methods:
        for key in keys:
            steps[max(steps)][f"{method['method']}/mean_{key}"] = method[key]["estimate"]
    return [MetricsLine(step, timestamp_ms, values) for step, values in sorted(steps.items())]
