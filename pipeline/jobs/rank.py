"""The comparison of judges: how well cheap measurements rank architectures, against a longer training or a table."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from istanas.data import ImageDataset
from istanas.errors import ConfigError, DivergedError
from istanas.methods import METHODS
from istanas.seeds import derive_seed
from istanas.space import Genotype
from istanas.statistics import information_of_tau, kendall, precision_at_top, spearman
from pipeline.base.files import atomic_write
from pipeline.base.text import count
from pipeline.config.load import run_hash
from pipeline.config.schema import Config
from pipeline.jobs.budget import with_retrain_epochs
from pipeline.jobs.context import JobContext
from pipeline.jobs.entrants import context_of, execute_study
from pipeline.jobs.lifecycle import Outcome, check_data, settled_spec, write_page
from pipeline.jobs.observer import RunObserver
from pipeline.jobs.opening import JobSpec, now_ms
from pipeline.jobs.retrain import run_retrain
from pipeline.jobs.search import check_solver, run_search
from pipeline.jobs.truth import TableFacts, check_table, read_truth
from pipeline.report import mlflow_note
from pipeline.report.rank_page import write_rank_page
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import CHECKPOINTS, CONFIG_FILE, RANK_PAGE, RANK_TABLE
from pipeline.runs.record import MetricsLine
from pipeline.runs.tags import Tag
from pipeline.training.epoch_record import load_progress
from pipeline.training.judges import Score, SharedWeights, ShortTrainings

SECTIONS = ("data", "space", "search", "retrain")
FEWEST_CELLS = 6  # With fewer, the interval of `istanas.statistics.kendall` is too narrow.
TOP_SHARE = 0.2  # of the cells, whose precision is reported
TRUTH = "truth"  # the judge's name in the rows of the true values
DRAWS_PER_CELL = 100  # attempts at different cells before the space counts as too small


class Judgement(TypedDict):
    """The score that a judge gives to a cell, higher is better, and the seconds that it took."""

    cell: int
    digest: str
    architecture: str
    judge: str
    score: float  # in a result None after a training that diverged, because JSON has no infinity
    seconds: float


class JudgeFigures(TypedDict):
    """How well a judge ranks. Each interval has the fields of `istanas.statistics.Interval`.

    The correlations are None if all scores, or all true values, are equal. `seconds` are those of one cell,
    `seconds_once` those of the search whose weights are shared. `information` is that of tau, in nats, and
    `information_per_second` counts the share of the cell in `seconds_once`.
    """

    judge: str
    tau: dict[str, Any] | None
    spearman: dict[str, Any] | None
    precision: float
    seconds: float
    seconds_once: float
    information: float
    information_per_second: float


class RankResult(TypedDict):
    """What `--json` prints."""

    run_dir: str
    mlflow_run_id: str | None
    truth: str  # what the judges are compared with
    truth_seconds: float | None  # of one cell; None for a table
    cells: int
    top: int  # number of best cells that `precision` counts
    judges: list[JudgeFigures]
    judgements: list[Judgement]
    sentences: list[str]
    seconds: float
    files: list[str]


@dataclass(frozen=True)
class Truth:
    """What the judges are compared with: a table of accuracies, or the retraining of the configuration.

    Args:
        table: The table; None for the retraining.
        facts: The facts about the table.
    """

    table: Path | None = None
    facts: TableFacts | None = None

    def describe(self, config: Config) -> str:
        """Return what the true values are, in words."""
        if self.facts is not None:
            return f"{self.facts.column} of the table"
        return f"test accuracy after {config.retrain.epochs} epochs"


def run_rank(
    context: JobContext,
    *,
    cells: int,
    epochs: Sequence[int] | None = None,
    table: Path | None = None,
    column: str | None = None,
) -> RankResult:
    """Measure random architectures with all judges, and compare the order that each judge gives with the true order.

    The judges are short retrainings, the shared weights of the configured search (which runs first, or is a finished
    run), and for `method: measured` its measurements at each fidelity. The true value of an architecture is its test
    accuracy after the configured retraining, or its accuracy in a table. Retrainings and searches are runs of their
    own, which other commands use again. Nothing that this job reports is used to choose anything.

    Args:
        context: The context of the job.
        cells: Number of random architectures, >= 6.
        epochs: Numbers of epochs of the short retrainings; None for an eighth, a quarter and half of `retrain.epochs`,
            or with a table none.
        table: A table of true accuracies, see `pipeline.jobs.truth.check_table`; None for the retraining.
        column: The column of the table; None for the first.

    Raises:
        ConfigError: A setting or the table is invalid. This is reported before any work.
        DataError: The table lacks an architecture.
    """
    truth = Truth()
    if table is not None:
        truth = Truth(table, check_table(table, context.config.space.build(), column))
    elif column is not None:
        raise ConfigError("there is no table", field="--column", remedy="give --table, too")
    short = short_epochs(context.config, epochs, table is not None)
    _check(context.config, cells, short, truth)

    def describe(config: Config) -> JobSpec:
        extra = {"cells": str(cells), "short": " ".join(map(str, short))}
        if truth.facts is not None:
            extra |= {"table": truth.facts.digest, "column": truth.facts.column}
        return JobSpec(
            kind="rank",
            name=f"{context.name}-rank",
            digits=run_hash(config, "rank", **extra),
            config=config,
            sections=SECTIONS,
            epochs=cells,
            unit="cell",
        )

    spec = settled_spec(context.config, context.console, describe)
    config = spec.config
    drawn = draw(config, cells)

    def prepare(dataset: ImageDataset) -> ImageDataset:
        check_solver(config.space.solver)
        check_data(config, dataset, ("search", "retrain"))
        return dataset

    def run_all(run: RunDir, observer: RunObserver, dataset: ImageDataset) -> Outcome:
        context_of_run = context.with_config(config)
        rows, seconds_once = _judge_all(context_of_run, run, observer, dataset, drawn, short, truth)
        return _finish(run, observer, spec, truth, rows, seconds_once)

    result = execute_study(context, spec, prepare, run_all, metrics_lines)
    return cast(RankResult, result)


def short_epochs(config: Config, given: Sequence[int] | None, has_table: bool) -> list[int]:
    """Return the numbers of epochs of the short retrainings, ascending, see `run_rank`.

    Raises:
        ConfigError: One of them is not shorter than the retraining that it is compared with.
    """
    longest = config.retrain.epochs
    if given is None:
        return [] if has_table else sorted({max(1, longest // part) for part in (8, 4, 2)} - {longest})
    for each in given:
        if not has_table and each >= longest:
            raise ConfigError(
                f"{each} is not shorter than the retraining",
                field="--epochs",
                remedy=f"use 1 to {longest - 1}",
            )
    return sorted(set(given))


def _check(config: Config, cells: int, short: Sequence[int], truth: Truth) -> None:
    """Check what this job needs, before any work."""
    if cells < FEWEST_CELLS:
        raise ConfigError(
            f"{cells} cells say too little about an order",
            field="--cells",
            remedy=f"use {FEWEST_CELLS} or more",
        )
    if short and config.data.holdout == 0:
        raise ConfigError(
            "0 leaves no pictures on which short retrainings are compared",
            field="data.holdout",
            remedy="use for example 0.2",
        )
    if truth.table is None and config.retrain.test_every == 0:
        raise ConfigError("0 never tests", field="retrain.test_every", remedy="use 1 or more")
    if not short and not _search_judges(config):
        raise ConfigError(
            f"{config.method} measures no architectures, and there are no short retrainings",
            field="--epochs",
            remedy="give numbers of epochs, or another method",
        )


def _search_judges(config: Config) -> bool:
    """Return whether the configured method can measure any architecture."""
    return config.method == "measured" or _shares_weights(config)


def _shares_weights(config: Config) -> bool:
    return METHODS[config.method].search_class.has_supernet and not config.trains_target


def draw(config: Config, cells: int) -> list[Genotype]:
    """Draw different random architectures of the space, the same for the same seed.

    Raises:
        ConfigError: The space has fewer.
    """
    space = config.space.build()
    found: dict[str, Genotype] = {}
    for number in range(DRAWS_PER_CELL * cells):
        # In canonical form, equal genotypes share a run directory.
        genotype = space.random(derive_seed(config.seed, "rank", number)).canonical()
        found.setdefault(genotype.digest(), genotype)
        if len(found) == cells:
            return list(found.values())
    raise ConfigError(
        f"the space has only {len(found)} architectures", field="--cells", remedy=f"use at most {len(found)}"
    )


def _judge_all(
    context: JobContext,
    run: RunDir,
    observer: RunObserver,
    dataset: ImageDataset,
    drawn: Sequence[Genotype],
    short: Sequence[int],
    truth: Truth,
) -> tuple[list[Judgement], float]:
    """Measure all cells, and write the measurements after each of them.

    Returns:
        One row for each cell and judge, and the seconds of the search whose weights are shared.
    """
    child = context_of(context, run, context.config, context.name, Tag.RANK)
    child = replace(child, fresh=False)  # Finished searches and retrainings belong to other commands, too.
    judge, seconds_once = _judge_of_search(child, dataset)
    known = {(row["digest"], row["judge"]): row for row in _read_rows(run.path / RANK_TABLE)}
    space, rows, spent = context.config.space.build(), list[Judgement](), list[float]()
    for number, genotype in enumerate(drawn):
        digest = genotype.digest()
        earlier = [known.get((digest, name)) for name in (judge.names if judge is not None else ())]
        scores: list[Score]
        if judge is None or all(row is not None for row in earlier):
            scores = [(row["judge"], row["score"], row["seconds"]) for row in earlier if row is not None]
        else:
            scores = list(judge.measure(genotype))
        scores += _retrainings(child, genotype, short, truth)
        for name, score, seconds in scores:
            rows.append(
                {
                    "cell": number + 1,
                    "digest": digest,
                    "architecture": space.text(genotype) or str(genotype),
                    "judge": name,
                    "score": score,
                    "seconds": seconds,
                }
            )
        atomic_write(run.path / RANK_TABLE, rows_frame(rows).to_csv(index=False))
        spent.append(math.fsum(seconds for _, _, seconds in scores))
        observer.step(number, 1, 1, lambda: None)
        observer.trial_done(
            f"cell {number + 1}: {count(len(scores), 'measurement')} in {spent[-1]:.1f} s",
            number + 1,
            fmean(spent) * (len(drawn) - number - 1),
        )
        observer.deliver()
    if truth.table is not None and truth.facts is not None:
        accuracies = read_truth(truth.table, space, truth.facts)
        for number, genotype in enumerate(drawn):
            last = next(row for row in rows if row["cell"] == number + 1)
            rows.append(
                {**last, "judge": TRUTH, "score": accuracies.score(genotype).accuracy, "seconds": 0.0}
            )
    return rows, seconds_once


def _judge_of_search(
    context: JobContext, dataset: ImageDataset
) -> tuple[SharedWeights | ShortTrainings | None, float]:
    """Return the judge that belongs to the configured method, and the seconds of its search."""
    config = context.config
    if config.method == "measured":
        return ShortTrainings(config, dataset), 0.0
    if not _shares_weights(config):
        return None, 0.0
    result = run_search(context)
    folder = RunDir(bucket.local(result["run_dir"])).path / CHECKPOINTS
    return SharedWeights(config, dataset, folder, load_progress(folder).epochs), result["seconds"]


def _retrainings(
    context: JobContext, genotype: Genotype, short: Sequence[int], truth: Truth
) -> Iterator[Score]:
    """Yield the accuracies after short retrainings on the hold-out, and the true one on the test pictures."""
    config = context.config
    for epochs in short:
        shorter = context.with_config(with_retrain_epochs(config, epochs))
        yield _retraining(f"retraining of {count(epochs, 'epoch')}", shorter, genotype, "valid_top1")
    if truth.table is None:
        yield _retraining(TRUTH, context, genotype, "test_top1")


def _retraining(name: str, context: JobContext, genotype: Genotype, key: str) -> Score:
    """Return the score of a retraining, which is minus infinity if it diverges."""
    start = time.monotonic()
    try:
        result: Mapping[str, Any] = run_retrain(context, genotype)
    except DivergedError as error:
        context.say(f"{name}: {error.problem}, which counts as the lowest score")
        return name, -math.inf, time.monotonic() - start
    return name, float(result[key]), float(result["seconds"])


def _read_rows(file: Path) -> list[Judgement]:
    """Return the measurements of an earlier process; none if the file is missing or damaged."""
    try:
        frame = pd.read_csv(file, dtype={"digest": str})
        frame["score"], frame["seconds"] = frame["score"].astype(float), frame["seconds"].astype(float)
        return cast(list[Judgement], frame[list(Judgement.__annotations__)].to_dict("records"))
    except (OSError, ValueError, KeyError):  # measured again
        return []


def rows_frame(rows: Sequence[Judgement]) -> pd.DataFrame:
    """Return one row for each measurement, with all digits of the scores."""
    return pd.DataFrame(rows, columns=list(Judgement.__annotations__))


def _finish(
    run: RunDir,
    observer: RunObserver,
    spec: JobSpec,
    truth: Truth,
    rows: Sequence[Judgement],
    seconds_once: float,
) -> Outcome:
    """Compare the judges, and write the table, the page and the metrics."""
    result = {
        **evaluate(rows, truth.describe(spec.config), seconds_once),
        "judgements": [
            {**row, "score": row["score"] if math.isfinite(row["score"]) else None} for row in rows
        ],
        "seconds": seconds_once + math.fsum(row["seconds"] for row in rows),
        "files": [bucket.shown(run.path / name) for name in (RANK_TABLE, RANK_PAGE)],
    }
    atomic_write(run.path / RANK_TABLE, rows_frame(rows).to_csv(index=False))
    run.replace_metrics(metrics_lines(result, now_ms()))
    label = run.read().data_label
    page = write_page(RANK_PAGE, lambda: write_rank_page(run.path, spec.name, label, result), observer.note)
    return Outcome(
        result=result,
        artifacts=(CONFIG_FILE, RANK_TABLE, *page),
        tags={},
        description=mlflow_note.of_rank(label, result),
    )


def evaluate(rows: Sequence[Judgement], truth: str, seconds_once: float) -> dict[str, Any]:
    """Return how well each judge ranks the cells.

    A score that is not finite, as after a diverged training, counts as the judge's lowest.

    Args:
        rows: One row for each cell and judge, with those of the judge `TRUTH`.
        truth: What the true values are, in words.
        seconds_once: Seconds of the search whose weights are shared.

    Returns:
        The keys "truth", "truth_seconds", "cells", "top", "judges" and "sentences" of a `RankResult`.
    """
    scores = pd.DataFrame(rows).pivot(index="cell", columns="judge", values="score")
    seconds = pd.DataFrame(rows).groupby("judge")["seconds"].mean()
    true = _finite(scores[TRUTH])
    top = max(1, round(TOP_SHARE * len(true)))
    judges: list[JudgeFigures] = []
    for name in dict.fromkeys(row["judge"] for row in rows):
        if name == TRUTH:
            continue
        own = _finite(scores[name])
        once = seconds_once if name in SharedWeights.names else 0.0
        tells = len(set(own)) > 1 and len(set(true)) > 1
        tau = kendall(own, true) if tells else None
        # Between n cells, tau has steps of 4 / (n (n - 1)). A tau of 1 is known to half a step.
        most = 1.0 - 2.0 / (len(true) * (len(true) - 1))
        information = information_of_tau(min(tau.estimate, most)) if tau is not None else 0.0
        judges.append(
            {
                "judge": name,
                "tau": None if tau is None else asdict(tau),
                "spearman": asdict(spearman(own, true)) if tells else None,
                "precision": precision_at_top(own, true, top),
                "seconds": float(seconds[name]),
                "seconds_once": once,
                "information": information,
                "information_per_second": information / max(seconds[name] + once / len(true), 1e-9),
            }
        )
    return {
        "truth": truth,
        "truth_seconds": float(seconds[TRUTH]) or None,
        "cells": len(true),
        "top": top,
        "judges": judges,
        "sentences": sentences(judges, len(true)),
    }


def _finite(scores: pd.Series[float]) -> npt.NDArray[np.float64]:
    """Return scores in which those that are not finite are below all others."""
    finite = scores.astype(float).replace([math.inf, -math.inf], math.nan)
    lowest = 0.0 if finite.isna().all() else finite.min() - 1.0
    return np.asarray(finite.fillna(lowest), dtype=np.float64)


def sentences(judges: Sequence[JudgeFigures], cells: int) -> list[str]:
    """Return what the figures say, in words."""
    useful = [each for each in judges if each["tau"] is not None and each["tau"]["low"] > 0]
    uncertain = [each["judge"] for each in judges if each["tau"] is not None and each["tau"]["low"] <= 0]
    silent = [each["judge"] for each in judges if each["tau"] is None]
    said = []
    if useful:
        best = max(useful, key=lambda each: each["information_per_second"])
        tau = cast(dict[str, Any], best["tau"])["estimate"]
        said.append(
            f"The most information per second comes from: {best['judge']} (tau {tau:.2f}, {best['seconds']:.1f} s for "
            "a cell)."
        )
    if uncertain:
        said.append(
            f"With {cells} cells, no order better than chance was found for: {'; '.join(uncertain)}. The 95 % "
            "intervals of their taus contain 0 or are below it."
        )
    if silent:
        said.append(f"All cells have the same score or the same true accuracy for: {'; '.join(silent)}.")
    return said


def metrics_lines(result: Mapping[str, Any], timestamp_ms: int) -> list[MetricsLine]:
    """Return the metrics of a finished comparison, all at step 1.

    Args:
        result: The figures of a `RankResult`.
        timestamp_ms: The time of the line.
    """
    values = {
        f"{each['judge'].replace(', ', '/').replace(' ', '_')}/{key}": figure
        for each in result["judges"]
        for key, figure in (
            ("tau", None if each["tau"] is None else each["tau"]["estimate"]),
            ("precision", each["precision"]),
            ("seconds", each["seconds"]),
        )
        if figure is not None
    }
    return [MetricsLine(1, timestamp_ms, values)]
