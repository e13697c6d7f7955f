"""A search against other methods at equal cost: is the search worth its time on these pictures?"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, TypedDict, cast

import pandas as pd

from istanas.data import ImageDataset
from istanas.errors import CheckpointError, ConfigError
from istanas.seeds import derive_seed
from istanas.space import Genotype
from istanas.statistics import compare, describe_comparison, fewest_seeds, mean_interval
from pipeline.base.files import atomic_write
from pipeline.base.text import count, duration
from pipeline.config.load import run_hash
from pipeline.config.schema import Config
from pipeline.jobs.budget import (
    PROBE_EPOCHS,
    TOLERANCE,
    retraining_epochs,
    search_epochs,
    with_retrain_epochs,
)
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
from pipeline.jobs.results import OneStageResult, RetrainResult, SearchResult
from pipeline.jobs.retrain import run_retrain
from pipeline.jobs.search import run_search
from pipeline.report import mlflow_note
from pipeline.report.versus_page import write_versus_page
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import CHECKPOINTS, CONFIG_FILE, VERSUS_CELLS, VERSUS_PAGE, VERSUS_TABLE
from pipeline.runs.record import MetricsLine
from pipeline.runs.tags import Tag
from pipeline.training.epoch_record import load_progress, read_records

SECTIONS = ("data", "space", "search", "retrain")
OPTION = "--against"
DRAWS = 20  # A space from which so many draws in a row are known cells is taken to have no other one.


class VersusCell(TypedDict):
    """A cell that a method found, and its retraining. Accuracies are fractions."""

    method: str
    seed: int
    chosen: bool  # whether it is the method's result
    architecture: str
    digest: str
    search_dir: str
    retrain_dir: str
    search_epochs: int
    retrain_epochs: int
    search_seconds: float
    retrain_seconds: float
    valid_top1: float | None  # on the hold-out, with data.holdout
    test_top1: float


class VersusRun(TypedDict):
    """The result of a method with a seed: its chosen cell, and the cost of all its cells."""

    method: str
    seed: int
    test_top1: float
    valid_top1: float | None
    cells: int
    architecture: str
    digest: str
    search_dir: str
    retrain_dir: str
    search_epochs: int
    search_seconds: float  # of all cells, as the following two
    retrain_seconds: float
    seconds: float
    cost_ratio: float  # `seconds` divided by those of the configured method with the same seed


class VersusMethod(TypedDict):
    """The results of a method over its seeds; an interval has the fields of `istanas.statistics.Interval`."""

    method: str
    seeds: int
    test_top1: dict[str, Any]
    deviation: float  # standard deviation of test_top1
    cells: float  # mean number of retrained cells
    seconds: dict[str, Any]
    cost_ratio: dict[str, float]  # mean ("estimate"), "smallest" and "largest" over the seeds


class VersusResult(TypedDict):
    """What `--json` prints."""

    run_dir: str
    mlflow_run_id: str | None
    methods: list[VersusMethod]
    runs: list[VersusRun]
    cells: list[VersusCell]
    comparisons: list[dict[str, Any]]  # of test_top1 in per cent
    sentences: list[str]
    cost_sentences: list[str]
    seconds: float  # of all searches and retrainings
    files: list[str]


def run_versus(context: JobContext, *, seeds: int, against: Sequence[str] = ("random",)) -> VersusResult:
    """Search and retrain with the configured method, and let other methods have the same cost for each seed.

    The runs follow each other, because concurrent ones would distort the seconds that are compared. Each search and
    each retraining is a run of its own in `runtime.runs_dir`, which a comparison with other methods or more seeds uses
    again. A genotype is retrained once per seed.

    A method that trains nothing (`random`) retrains further cells, of which the one with the best accuracy on the
    hold-out is its result. Another method searches for as many epochs as take the time of the configured search.
    See `pipeline.jobs.budget`.

    Args:
        context: The context of the job.
        seeds: Number of seeds, >= 2. The first is `seed` of the configuration.
        against: The other methods: names, or configuration files whose `method` and `search` are used.

    Raises:
        ConfigError: A method or a setting is invalid. This is reported before any work.
    """
    listed = entrants(context, against, OPTION)
    _check(context.config, listed, seeds)

    def describe(config: Config) -> JobSpec:
        return JobSpec(
            kind="versus",
            name=f"{context.name}-versus",
            digits=run_hash(config, "versus", **identity(listed, seeds)),
            config=config,
            sections=SECTIONS,
            epochs=seeds * len(listed),
            unit="method and seed",
        )

    spec = settled_spec(context.config, context.console, describe)

    def prepare(dataset: ImageDataset) -> ImageDataset:
        check_entrants(context, listed, dataset, ("search", "retrain"))
        return dataset

    def run_all(run: RunDir, observer: RunObserver, _: ImageDataset) -> Outcome:
        cells = _run_all(_Study(context, run, observer), listed, seeds)
        return _finish(run, observer, spec, cells)

    result = execute_study(
        context, spec, prepare, run_all, metrics_lines, lambda: _warnings(seeds, len(listed) - 1)
    )
    return cast(VersusResult, result)


def _check(config: Config, listed: Sequence[Entrant], seeds: int) -> None:
    """Check what only a comparison at equal cost requires.

    Raises:
        ConfigError: A method cannot take part, or a setting prevents a comparison.
    """
    if seeds < 2:
        raise ConfigError(f"{seeds} gives no interval", field="--seeds", remedy="use 2 or more")
    if len(listed) < 2:
        raise ConfigError("names no method", field=OPTION, remedy="name one or more, such as random,darts")
    for place, each in enumerate(listed):
        if each.config.trains_target:
            raise ConfigError(
                f"{each.label} trains its network while it searches, and its cell is not retrained",
                field=OPTION if place else "method",
                remedy="choose a method whose cell is retrained, such as two_stage or darts",
            )
        if each.config.search.trials_at_once > 1:
            raise ConfigError(
                f"{each.config.search.trials_at_once} trainings at a time have no seconds that can be compared",
                field="search.max_concurrent",
                remedy="set it to 1 for a comparison",
            )
    if not config.search.trains:
        raise ConfigError(
            f"{config.method} trains nothing, and a comparison requires a search with a cost",
            field="method",
            remedy=f"configure a search, and name {config.method} with {OPTION}",
        )
    if config.retrain.test_every == 0:
        raise ConfigError(
            "0 measures no test accuracy to compare", field="retrain.test_every", remedy="use 1 or more"
        )
    free = [each.label for each in listed if not each.config.search.trains]
    if free and config.data.holdout == 0:
        raise ConfigError(
            f"0 keeps no pictures on which {free[0]} can choose among its cells; the test split chooses nothing",
            field="data.holdout",
            remedy="give --set data.holdout=0.1",
        )


def _warnings(seeds: int, comparisons: int) -> list[str]:
    """Return a warning if the seeds are too few to find any difference."""
    fewest = fewest_seeds(comparisons)
    if fewest is None or seeds >= fewest:
        return []
    return [
        f"warning: with {seeds} seeds and {count(comparisons, 'comparison')}, no difference can be found, however "
        f"large it is; --seeds {fewest} is the smallest number that can find one"
    ]


@dataclass(frozen=True)
class _Study:
    """A comparison that is running.

    Args:
        context: The context of the job.
        run: Its run directory.
        observer: Its observer.
        retrained: The retrainings of this process, by seed, genotype and number of epochs.
        paces: Seconds of each epoch of the newest search of a method, by its label.
    """

    context: JobContext
    run: RunDir
    observer: RunObserver
    retrained: dict[tuple[int, str, int], RetrainResult] = field(default_factory=dict)
    paces: dict[str, list[float]] = field(default_factory=dict)

    def search(self, config: Config, name: str) -> SearchResult | OneStageResult:
        """Run a search, or return the result of a finished one."""
        return run_search(
            context_of(self.context, self.run, config, name, Tag.VERSUS), jobs=("search", "retrain")
        )

    def cell(
        self, label: str, config: Config, search: SearchResult | OneStageResult, epochs: int
    ) -> VersusCell:
        """Retrain the cell of a search, or use its retraining with the same seed and number of epochs again."""
        # In canonical form, equal genotypes share a run directory.
        genotype = Genotype.from_dict(search["genotype"]).canonical()
        key = (config.seed, genotype.digest(), epochs)
        if key not in self.retrained:
            child = context_of(
                self.context,
                self.run,
                with_retrain_epochs(config, epochs),
                self.context.name,
                Tag.VERSUS,
                search["run_dir"],
            )
            self.retrained[key] = run_retrain(child, genotype)
        retrained = self.retrained[key]
        return {
            "method": label,
            "seed": config.seed,
            "chosen": True,
            "architecture": config.space.build().text(genotype) or genotype.digest()[:12],
            "digest": genotype.digest(),
            "search_dir": search["run_dir"],
            "retrain_dir": retrained["run_dir"],
            "search_epochs": len(_epoch_seconds(search)),
            "retrain_epochs": epochs,
            "search_seconds": search["seconds"],
            "retrain_seconds": retrained["seconds"],
            "valid_top1": retrained.get("valid_top1"),
            "test_top1": retrained["test_top1"],
        }


def _epoch_seconds(search: SearchResult | OneStageResult) -> list[float]:
    """Return the seconds of each epoch of a search.

    Raises:
        CheckpointError: Its log of epochs is missing or damaged.
    """
    folder = bucket.local(search["run_dir"]) / CHECKPOINTS
    seconds = [record.seconds for record in read_records(folder, load_progress(folder))]
    if not seconds:
        raise CheckpointError("has no log of epochs", field=str(folder), remedy="start over with --fresh")
    return seconds


def _run_all(study: _Study, listed: Sequence[Entrant], seeds: int) -> list[VersusCell]:
    """Run all methods, seed by seed, so that an unfinished comparison has the same seeds of all methods."""
    cells: list[VersusCell] = []
    _warm_up(study, listed[0])
    durations: list[float] = []
    for index in range(seeds):
        for place, each in enumerate(listed):
            config, start = each.at_seed(index), time.monotonic()
            if place == 0:
                configured = study.cell(
                    each.label, config, study.search(config, each.name), config.retrain.epochs
                )
                own = [configured]
            elif config.search.trains:
                own = [_searched(study, each, config, configured)]
            else:
                own = _retrained(study, each, config, configured)
            cells += own
            durations.append(time.monotonic() - start)
            done = index * len(listed) + place + 1
            text = f"{each.label}, seed {config.seed}: {count(len(own), 'cell')} in {duration(_seconds(own))}"
            if place:
                text += f", {_seconds(own) / _seconds([configured]):.2f} times the cost of {listed[0].label}"
            study.observer.step(done - 1, 1, 1, lambda: None)
            study.observer.trial_done(text, done, fmean(durations) * (seeds * len(listed) - done))
            study.observer.deliver()
    return cells


def _seconds(cells: Sequence[VersusCell]) -> float:
    return math.fsum(cell["search_seconds"] + cell["retrain_seconds"] for cell in cells)


def _warm_up(study: _Study, configured: Entrant) -> None:
    """Run a short search that is not counted, because the first epochs of a process take longer than all others."""
    shortest = configured.config.search.lasting(PROBE_EPOCHS)
    if shortest is not None:
        study.observer.note("a short search, which is not counted, prepares the machine")
        config = configured.config.model_copy(update={"search": shortest})
        study.search(config, f"{configured.name}-warm-up")


def _searched(study: _Study, entrant: Entrant, config: Config, configured: VersusCell) -> VersusCell:
    """Return the cell of a search that takes as long as the configured one, as far as whole epochs allow."""
    shortest = config.search.lasting(PROBE_EPOCHS)
    if shortest is None:
        study.observer.note(
            f"{entrant.label} does not let its length be chosen: it searches as configured, and the ratio is reported"
        )
    else:
        if entrant.label not in study.paces:
            probe = config.model_copy(update={"search": shortest})
            study.observer.note(f"{entrant.label}: a short search measures the seconds of an epoch")
            study.paces[entrant.label] = _epoch_seconds(study.search(probe, f"{entrant.name}-probe"))
        epochs = search_epochs(study.paces[entrant.label], configured["search_seconds"])
        lasting = config.search.lasting(epochs, config.space.build().n_architectures)
        config = config.model_copy(update={"search": lasting})
    search = study.search(config, entrant.name)
    newest = _epoch_seconds(search)
    if len(newest) >= 3:  # a first, a middle and a last epoch
        study.paces[entrant.label] = newest
    return study.cell(entrant.label, config, search, config.retrain.epochs)


def _retrained(study: _Study, entrant: Entrant, config: Config, configured: VersusCell) -> list[VersusCell]:
    """Retrain cells of a method that trains nothing until the cost is reached, and choose the best on the hold-out.

    The first cell has the whole retraining. The seconds of an epoch of a new cell are expected to be those of the
    slowest one so far: if it is faster, a further cell uses the rest.
    """
    cells: list[VersusCell] = []
    epochs = config.retrain.epochs
    while epochs > 0:
        search = _other_cell(study, entrant, config, cells)
        if search is None:
            study.observer.note(f"{entrant.label}, seed {config.seed}: the space has no other cell")
            break
        cells.append(study.cell(entrant.label, config, search, epochs))
        slowest = max(cell["retrain_seconds"] / cell["retrain_epochs"] for cell in (configured, *cells))
        epochs = retraining_epochs(_seconds([configured]), _seconds(cells), slowest, config.retrain.epochs)
    chosen = best_cell(cells)
    return [{**cell, "chosen": place == chosen} for place, cell in enumerate(cells)]


def _other_cell(
    study: _Study, entrant: Entrant, config: Config, cells: Sequence[VersusCell]
) -> SearchResult | OneStageResult | None:
    """Return a search that found a cell that the method has not retrained with this seed; None if there is none."""
    known = {cell["digest"] for cell in cells}
    first = len(cells) * DRAWS
    for draw in range(first, first + DRAWS):
        # The first cell is that of the method with the same seed.
        seed = derive_seed(config.seed, "versus", draw) % 2**32 if draw else config.seed
        search = study.search(config.model_copy(update={"seed": seed}), entrant.name)
        if search["digest"] not in known:
            return search
    return None


def best_cell(cells: Sequence[VersusCell]) -> int:
    """Return the place of the cell with the best accuracy on the hold-out; of equal ones, the longest retrained.

    Args:
        cells: The cells of a method with a seed, at least one. If there are several, all have `valid_top1`.
    """
    if len(cells) == 1:
        return 0
    return max(
        range(len(cells)),
        key=lambda place: (cells[place]["valid_top1"], cells[place]["retrain_epochs"], -place),
    )


def _finish(run: RunDir, observer: RunObserver, spec: JobSpec, cells: Sequence[VersusCell]) -> Outcome:
    """Compare the methods, and write the tables, the page and the metrics."""
    pages = (VERSUS_TABLE, VERSUS_CELLS, VERSUS_PAGE)
    runs = {(cell["search_dir"], cell["retrain_dir"]): cell for cell in cells}
    retrainings = {cell["retrain_dir"]: cell["retrain_seconds"] for cell in cells}
    searches = {search: cell["search_seconds"] for (search, _), cell in runs.items()}
    result = {
        **evaluate(cells),
        "cells": list(cells),
        "seconds": math.fsum([*searches.values(), *retrainings.values()]),
        "files": [bucket.shown(run.path / name) for name in pages],
    }
    atomic_write(run.path / VERSUS_TABLE, pd.DataFrame(result["runs"]).to_csv(index=False))
    atomic_write(run.path / VERSUS_CELLS, pd.DataFrame(result["cells"]).to_csv(index=False))
    run.replace_metrics(metrics_lines(result, now_ms()))
    record = run.read()
    page = write_page(
        VERSUS_PAGE,
        lambda: write_versus_page(run.path, spec.name, record.data_label, result),
        observer.note,
    )
    return Outcome(
        result=result,
        artifacts=(CONFIG_FILE, VERSUS_TABLE, VERSUS_CELLS, *page),
        tags={},
        description=mlflow_note.of_versus(record.data_label, result),
    )


def evaluate(cells: Sequence[VersusCell]) -> dict[str, Any]:
    """Return the figures of a comparison: each result, each method, and the comparisons with the first method.

    Args:
        cells: The cells of all methods with the same seeds, at least 2; those of the configured method come first. One
            cell of each method and seed is chosen.

    Returns:
        The keys "methods", "runs", "comparisons", "sentences" and "cost_sentences" of a `VersusResult`.
    """
    of_seed: dict[tuple[int, str], list[VersusCell]] = {}
    for cell in cells:
        of_seed.setdefault((cell["seed"], cell["method"]), []).append(cell)
    first = cells[0]["method"]
    runs = [_run(own, _seconds(of_seed[seed, first])) for (seed, _), own in of_seed.items()]
    groups = by_method(runs)
    accuracies = {name: [100 * run["test_top1"] for run in own] for name, own in groups.items()}
    compared = compare(accuracies, [(first, name) for name in groups if name != first])
    methods = [_method(name, own) for name, own in groups.items()]
    return {
        "methods": methods,
        "runs": runs,
        "comparisons": [comparison_row(each) for each in compared],
        "sentences": [describe_comparison(each, unit="points of test accuracy") for each in compared],
        "cost_sentences": [_describe_cost(each, first) for each in methods if each["method"] != first],
    }


def _run(cells: Sequence[VersusCell], cost: float) -> VersusRun:
    [chosen] = [cell for cell in cells if cell["chosen"]]
    seconds = _seconds(cells)
    return {
        "method": chosen["method"],
        "seed": chosen["seed"],
        "test_top1": chosen["test_top1"],
        "valid_top1": chosen["valid_top1"],
        "cells": len(cells),
        "architecture": chosen["architecture"],
        "digest": chosen["digest"],
        "search_dir": chosen["search_dir"],
        "retrain_dir": chosen["retrain_dir"],
        "search_epochs": chosen["search_epochs"],
        "search_seconds": math.fsum(cell["search_seconds"] for cell in cells),
        "retrain_seconds": math.fsum(cell["retrain_seconds"] for cell in cells),
        "seconds": seconds,
        "cost_ratio": seconds / cost,
    }


def _method(name: str, runs: Sequence[VersusRun]) -> VersusMethod:
    accuracies, ratios = ([run[key] for run in runs] for key in ("test_top1", "cost_ratio"))
    return {
        "method": name,
        "seeds": len(runs),
        "test_top1": asdict(mean_interval(accuracies, low=0, high=1)),
        "deviation": float(pd.Series(accuracies).std()),
        "cells": fmean(run["cells"] for run in runs),
        "seconds": asdict(mean_interval([run["seconds"] for run in runs], low=0)),
        "cost_ratio": {"estimate": fmean(ratios), "smallest": min(ratios), "largest": max(ratios)},
    }


def _describe_cost(method: VersusMethod, first: str) -> str:
    ratio = method["cost_ratio"]
    low, high = ratio["smallest"], ratio["largest"]
    text = f"{method['method']} had {low:.3f} to {high:.3f} times the cost of {first}"
    if low >= 1 - TOLERANCE and high <= 1 + TOLERANCE:
        return f"{text}: the costs agree within {100 * TOLERANCE:g} % for each seed."
    return (
        f"{text}. The costs do not agree within {100 * TOLERANCE:g} % for each seed. Usual causes are short "
        "runs, whose epochs are a large part of the cost, and other work on the machine."
    )


def metrics_lines(result: Mapping[str, Any], timestamp_ms: int) -> list[MetricsLine]:
    """Return the metrics of a finished comparison: a step for each seed, and the means over all at the last one.

    Args:
        result: The figures of a `VersusResult`.
        timestamp_ms: The time of the lines.
    """
    return seed_metrics(
        result["runs"], result["methods"], ("test_top1", "seconds", "cost_ratio"), timestamp_ms
    )
