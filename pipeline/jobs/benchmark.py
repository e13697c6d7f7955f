"""The benchmark: searches of several methods and seeds, scored by a table of true accuracies."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict, cast

import pandas as pd

from istanas.data import ImageDataset
from istanas.errors import ConfigError
from istanas.space import Genotype, SearchSpace
from istanas.statistics import Interval, compare, describe_comparison, kendall, mean_interval
from pipeline.base.files import atomic_write
from pipeline.config.load import run_hash
from pipeline.config.schema import Config
from pipeline.jobs.context import JobContext
from pipeline.jobs.entrants import (
    Entrant,
    by_method,
    check_entrants,
    comparison_row,
    context_of,
    entrants,
    execute_study,
    identity,
    seed_metrics,
)
from pipeline.jobs.lifecycle import Outcome, settled_spec, write_page
from pipeline.jobs.observer import RunObserver
from pipeline.jobs.opening import JobSpec, now_ms
from pipeline.jobs.results import OneStageResult, SearchResult
from pipeline.jobs.search import run_search
from pipeline.jobs.truth import Truth, check_table, read_truth
from pipeline.report import mlflow_note
from pipeline.report.benchmark_page import write_benchmark_page
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import (
    BENCHMARK_EPOCHS,
    BENCHMARK_PAGE,
    BENCHMARK_TABLE,
    CHECKPOINTS,
    CONFIG_FILE,
)
from pipeline.runs.record import MetricsLine
from pipeline.runs.tags import Tag
from pipeline.training.epoch_record import load_progress, read_records

SECTIONS = ("data", "space", "search")
FEWEST_FOR_TAU = 6  # With fewer, the interval of `istanas.statistics.kendall` is too narrow.


class BenchmarkRun(TypedDict):
    """A search and its score. Accuracies are fractions; `valid_top1` is the search's own figure, if it has one."""

    method: str
    seed: int
    run_dir: str
    digest: str
    architecture: str
    seconds: float
    valid_top1: float | None
    true_accuracy: float
    rank: int
    regret: float
    accuracies: dict[str, float]


class BenchmarkEpoch(TypedDict):
    """The true accuracy and rank of a search's current architecture after an epoch; `seconds` since its start."""

    method: str
    seed: int
    epoch: int
    seconds: float
    true_accuracy: float
    rank: int


class BenchmarkMethod(TypedDict):
    """The scores of a method over its seeds; each interval has the fields of `istanas.statistics.Interval`."""

    method: str
    seeds: int
    true_accuracy: dict[str, Any]
    deviation: float  # standard deviation of the true accuracy
    rank: dict[str, Any]
    rank_deviation: float
    regret: dict[str, Any]
    seconds: dict[str, Any]
    # Between the validation accuracies of the searches and the true accuracies of what they found.
    kendall_tau: dict[str, Any] | None


class BenchmarkResult(TypedDict):
    """What `--json` prints."""

    run_dir: str
    mlflow_run_id: str | None
    table: dict[str, Any]  # rows, column, best, mean and chance_rank of the table
    methods: list[BenchmarkMethod]
    runs: list[BenchmarkRun]
    comparisons: dict[str, list[dict[str, Any]]]  # by "true_accuracy" (in per cent) and by "rank"
    sentences: list[str]
    seconds: float  # of all searches
    files: list[str]


@dataclass(frozen=True)
class Found:
    """A finished search: its method, its seed and its result."""

    label: str
    seed: int
    result: SearchResult | OneStageResult

    @property
    def run(self) -> RunDir:
        """The run directory."""
        return RunDir(bucket.local(self.result["run_dir"]))


def run_benchmark(
    context: JobContext,
    table: Path,
    *,
    seeds: int,
    methods: Sequence[str] = (),
    column: str | None = None,
) -> BenchmarkResult:
    """Search with several methods and seeds, then score what was found by a table of true accuracies.

    The searches run in this process, one after the other. Each is a run of its own in `runtime.runs_dir`, which a
    benchmark with other methods or more seeds uses again. No search can read the table: its accuracies are read after
    the last one.

    Args:
        context: The context of the job.
        table: The table, see `check_table`.
        seeds: Number of seeds, >= 2. The first is `seed` of the configuration.
        methods: Methods besides the configured one: names, or configuration files whose `method` and `search` are used.
        column: The column of the table that scores; None for the first.

    Raises:
        ConfigError: The table, a method or a setting is invalid. This is reported before any work.
        DataError: The table lacks an architecture that a search found.
    """
    if seeds < 2:
        raise ConfigError(f"{seeds} gives no interval", field="--seeds", remedy="use 2 or more")
    space = context.config.space.build()
    facts = check_table(table, space, column)
    listed = entrants(context, methods, "--method")

    def describe(config: Config) -> JobSpec:
        extra = {"table": facts.digest, "column": facts.column, **identity(listed, seeds)}
        return JobSpec(
            kind="benchmark",
            name=f"{context.name}-benchmark",
            digits=run_hash(config, "benchmark", **extra),
            config=config,
            sections=SECTIONS,
            epochs=seeds * len(listed),
            unit="search",
        )

    spec = settled_spec(context.config, context.console, describe)

    def prepare(dataset: ImageDataset) -> ImageDataset:
        check_entrants(context, listed, dataset, ("search",))
        return dataset

    def run_all(run: RunDir, observer: RunObserver, _: ImageDataset) -> Outcome:
        found = _search_all(context, run, observer, listed, seeds)
        truth = read_truth(table, space, facts)
        return _finish(run, observer, spec, truth, found, space)

    result = execute_study(context, spec, prepare, run_all, metrics_lines)
    return cast(BenchmarkResult, result)


def _search_all(
    context: JobContext, run: RunDir, observer: RunObserver, listed: Sequence[Entrant], seeds: int
) -> list[Found]:
    """Run all searches, seed by seed, so that an unfinished benchmark has the same seeds of all methods."""
    found: list[Found] = []
    durations: list[float] = []  # of the searches that this process has run
    for index in range(seeds):
        for each in listed:
            config, start = each.at_seed(index), time.monotonic()
            result = run_search(context_of(context, run, config, each.name, Tag.BENCHMARK))
            durations.append(time.monotonic() - start)
            found.append(Found(each.label, config.seed, result))
            observer.step(len(found) - 1, 1, 1, lambda: None)
            left = seeds * len(listed) - len(found)
            observer.trial_done(
                f"{each.label}, seed {config.seed}: searched in {result['seconds']:.1f} s",
                len(found),
                fmean(durations) * left,
            )
            observer.deliver()
    return found


def _finish(
    run: RunDir,
    observer: RunObserver,
    spec: JobSpec,
    truth: Truth,
    found: Sequence[Found],
    space: SearchSpace,
) -> Outcome:
    """Score the searches and write the tables, the page and the metrics."""
    runs = [_scored(each, truth, space) for each in found]
    epochs = [epoch for each in found for epoch in trajectory(each, truth)]
    pages = (BENCHMARK_TABLE, BENCHMARK_EPOCHS, BENCHMARK_PAGE)
    result = {
        **evaluate(runs, truth),
        "runs": runs,
        "seconds": math.fsum(each["seconds"] for each in runs),
        "files": [bucket.shown(run.path / name) for name in pages],
    }
    atomic_write(run.path / BENCHMARK_TABLE, runs_frame(runs).to_csv(index=False))
    atomic_write(run.path / BENCHMARK_EPOCHS, pd.DataFrame(epochs).to_csv(index=False))
    run.replace_metrics(metrics_lines(result, now_ms()))
    record = run.read()
    page = write_page(
        BENCHMARK_PAGE,
        lambda: write_benchmark_page(run.path, spec.name, record.data_label, result, epochs),
        observer.note,
    )
    return Outcome(
        result=result,
        artifacts=(CONFIG_FILE, BENCHMARK_TABLE, BENCHMARK_EPOCHS, *page),
        tags={},
        description=mlflow_note.of_benchmark(record.data_label, result),
    )


def _scored(found: Found, truth: Truth, space: SearchSpace) -> BenchmarkRun:
    genotype = Genotype.from_dict(found.result["genotype"])
    score = truth.score(genotype)
    valid: Any = found.result.get("valid_top1")
    return {
        "method": found.label,
        "seed": found.seed,
        "run_dir": found.result["run_dir"],
        "digest": found.result["digest"],
        "architecture": space.text(genotype) or str(genotype),
        "seconds": found.result["seconds"],
        "valid_top1": valid,
        "true_accuracy": score.accuracy,
        "rank": score.rank,
        "regret": score.regret,
        "accuracies": dict(score.accuracies),
    }


def trajectory(found: Found, truth: Truth) -> list[BenchmarkEpoch]:
    """Return the scores of a search's architecture after each epoch, from its log of epochs.

    Args:
        found: The search.
        truth: The true accuracies.

    Raises:
        CheckpointError: The log is damaged.
        DataError: The table lacks an architecture.
    """
    folder, seconds = found.run.path / CHECKPOINTS, 0.0
    points: list[BenchmarkEpoch] = []
    for record in read_records(folder, load_progress(folder)):
        seconds += record.seconds
        score = truth.score(Genotype.from_json(record.found().genotype))
        points.append(
            {
                "method": found.label,
                "seed": found.seed,
                "epoch": record.epoch,
                "seconds": seconds,
                "true_accuracy": score.accuracy,
                "rank": score.rank,
            }
        )
    return points


def evaluate(runs: Sequence[BenchmarkRun], truth: Truth) -> dict[str, Any]:
    """Return the figures of a benchmark: the table's, each method's, and the comparisons.

    Args:
        runs: The scored searches, with the same number of seeds, at least 2, of each method.
        truth: The true accuracies.

    Returns:
        The keys "table", "methods", "comparisons" and "sentences" of a `BenchmarkResult`.
    """
    groups = by_method(runs)
    by_accuracy = compare({name: [100 * r["true_accuracy"] for r in own] for name, own in groups.items()})
    by_rank = compare({name: [r["rank"] for r in own] for name, own in groups.items()})
    return {
        "table": {
            "rows": truth.facts.rows,
            "column": truth.facts.column,
            "best": truth.best,
            "mean": truth.mean,
            "chance_rank": truth.chance_rank,
        },
        "methods": [_method(name, own, truth) for name, own in groups.items()],
        "comparisons": {
            "true_accuracy": [comparison_row(each) for each in by_accuracy],
            "rank": [comparison_row(each) for each in by_rank],
        },
        "sentences": [
            *(describe_comparison(each, unit="points of true accuracy") for each in by_accuracy),
            *(describe_comparison(each, unit="ranks", higher_is_better=False) for each in by_rank),
        ],
    }


def _method(name: str, runs: Sequence[BenchmarkRun], truth: Truth) -> BenchmarkMethod:
    accuracies, ranks = ([float(run[key]) for run in runs] for key in ("true_accuracy", "rank"))
    tau = validation_tau([run["valid_top1"] for run in runs], accuracies)
    return {
        "method": name,
        "seeds": len(runs),
        "true_accuracy": asdict(mean_interval(accuracies, low=0, high=1)),
        "deviation": float(pd.Series(accuracies).std()),
        "rank": asdict(mean_interval(ranks, low=1, high=truth.facts.rows)),
        "rank_deviation": float(pd.Series(ranks).std()),
        "regret": asdict(mean_interval([run["regret"] for run in runs], low=0, high=truth.best)),
        "seconds": asdict(mean_interval([run["seconds"] for run in runs], low=0)),
        "kendall_tau": None if tau is None else asdict(tau),
    }


def validation_tau(valid: Sequence[float | None], accuracies: Sequence[float]) -> Interval | None:
    """Return Kendall's tau between the searches' own validation accuracies and the true accuracies of their results.

    Args:
        valid: Validation accuracy of each search; None if the method measures none.
        accuracies: True accuracy of what each search found.

    Returns:
        None if it is not defined: with fewer than 4 seeds, or if all values of one kind are equal.
    """
    measured = [value for value in valid if value is not None]
    if (
        len(measured) < max(FEWEST_FOR_TAU, len(valid))
        or len(set(measured)) == 1
        or len(set(accuracies)) == 1
    ):
        return None
    return kendall(measured, accuracies)


def runs_frame(runs: Sequence[BenchmarkRun]) -> pd.DataFrame:
    """Return one row for each search; each column of the table of true accuracies is a column table/NAME."""
    rows = [
        {
            **{key: value for key, value in run.items() if key != "accuracies"},
            **{f"table/{name}": value for name, value in run["accuracies"].items()},
        }
        for run in runs
    ]
    return pd.DataFrame(rows)


def metrics_lines(result: Mapping[str, Any], timestamp_ms: int) -> list[MetricsLine]:
    """Return the metrics of a finished benchmark: a step for each seed, and the means over all seeds at the last one.

    Args:
        result: The figures of a `BenchmarkResult`.
        timestamp_ms: The time of the lines.
    """
    return seed_metrics(
        result["runs"], result["methods"], ("true_accuracy", "rank", "regret", "seconds"), timestamp_ms
    )
