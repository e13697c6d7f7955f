"""The comparison of runs: settings, curves, cells and figures, on the terminal and as a page."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from rich.console import Console

from istanas.errors import ConfigError, IstanasError
from istanas.measure import measure_latency
from istanas.methods import trains_target
from istanas.nets import TargetNetwork
from pipeline.base.files import atomic_write
from pipeline.base.fitted_table import Column, FittedTable
from pipeline.base.text import count
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.config.threads import threads_in_process
from pipeline.jobs.context import say_to
from pipeline.report.compare_page import draw_curves, draw_whole, render_page
from pipeline.report.run_reader import ReadRun, read_run
from pipeline.report.terminal import has_validation, shown, shown_time, top_columns, validation_note
from pipeline.runs import bucket
from pipeline.runs.layout import BENCHMARK_TABLE, CONFIG_FILE, RANK_TABLE, VERSUS_TABLE
from pipeline.runs.network_files import load_network
from pipeline.runs.outcome import shown_outcome
from pipeline.training.build import target_network
from pipeline.training.pictures import load_pictures

PAGE_FILE, PICTURE_FILE = "compare.html", "compare.png"
TRAINED, UNTRAINED = "trained network", "untrained target network"
ROUNDS, PASSES = 7, 10  # latency: rounds, and forward passes of each network in a round

Network = tuple[TargetNetwork, tuple[int, int, int], str]  # network, (C, H, W), TRAINED or UNTRAINED


# Kind of a run that consists of others -> what it is in words, and the table that lists the others.
_STUDIES = {
    "benchmark": ("a benchmark", BENCHMARK_TABLE),
    "versus": ("a comparison at equal cost", VERSUS_TABLE),
    "rank": ("a comparison of judges", RANK_TABLE),
}


class ComparedRun(TypedDict):
    """One row of the comparison. Accuracies are fractions, times are seconds, and None marks a missing value."""

    run: str
    run_dir: str | None  # None if the run was read from the MLflow store
    mlflow_run_id: str | None
    kind: str
    method: str
    dataset: str
    status: str
    outcome: str
    digest: str | None
    params: int | None
    macs: int | None
    latency_seconds: float | None  # for one picture
    latency_of: str | None  # TRAINED or UNTRAINED
    valid_top1: float | None
    valid_top5: float | None
    test_top1: float | None
    test_top5: float | None
    epochs: int
    seconds: float | None


class CompareResult(TypedDict):
    """What `--json` prints: the runs in the given order, and the settings that differ, with a value for each run."""

    files: list[str]
    threads: int  # used to measure the latencies
    runs: list[ComparedRun]
    differing: dict[str, list[str | None]]
    notes: list[str]


def run_compare(config: Config, references: Sequence[str], *, out: Path, console: Console) -> CompareResult:
    """Compare runs, and write a page and a figure.

    Args:
        config: Its `runtime.runs_dir`, `runtime.threads` and `tracking.uri` are used.
        references: At least two searches or retrainings: run directories, MLflow run ids or unique names.
        out: Folder of `compare.html` and `compare.png`.
        console: Where the tables are printed.

    Returns:
        See `CompareResult`.

    Raises:
        ConfigError: A run is unknown, given twice, a sweep, a benchmark, or a comparison at equal cost.
    """
    torch.set_num_threads(threads_in_process(config.runtime.threads))
    with tempfile.TemporaryDirectory() as scratch:
        runs = [
            read_run(
                ref,
                runs_dir=bucket.local(config.runtime.runs_dir),
                tracking_uri=config.tracking.uri,
                scratch=Path(scratch),
            )
            for ref in references
        ]
        _check(references, runs)
        notes = _notes(runs)
        networks = [_network(number, run, notes) for number, run in enumerate(runs, start=1)]
        rows = [_row(run, *timed) for run, timed in zip(runs, _latencies(networks), strict=True)]
        genotypes = [run.genotype for run in runs]
    differing = differing_settings(runs)
    result = CompareResult(
        files=[str(out / PAGE_FILE), str(out / PICTURE_FILE)],
        threads=torch.get_num_threads(),
        runs=rows,
        differing=differing,
        notes=notes,
    )
    headings, table = figures_table(result)
    curves = draw_curves(runs)
    page = render_page(headings, table, differing, [*notes, latency_note(result)], genotypes, curves)
    atomic_write(out / PICTURE_FILE, draw_whole(headings, table, differing, genotypes, curves))
    atomic_write(out / PAGE_FILE, page)
    print_comparison(result, console)
    return result


def differing_settings(runs: Sequence[ReadRun]) -> dict[str, list[str | None]]:
    """Return the settings in which runs differ, with each run's value, or None if it lacks the setting.

    A section is compared only between the runs that depend on it: a retraining, which has no section `search`, does not
    differ from a search in that section.
    """
    sections = [{_section(key) for key in run.settings} for run in runs]
    found: dict[str, list[str | None]] = {}
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        concerned = [run for run, has in zip(runs, sections, strict=True) if _section(key) in has]
        if len({run.settings.get(key) for run in concerned}) > 1:
            found[key] = [run.settings.get(key) for run in runs]
    return found


def figures_table(result: CompareResult) -> tuple[list[str], list[list[str]]]:
    """Return the headings and one row of text for each run, for the terminal and the page.

    "valid" and "test" are top-1. A split has a top-5 column if a run has its top-5.
    """
    runs = result["runs"]
    tops = top_columns(key for run in runs for key, value in run.items() if value is not None)
    headings = ["", "run", "params", "MACs", "latency", *tops.values(), "epochs", "time"]
    table = [
        [
            str(number),
            _name(run, several=len({r["dataset"] for r in runs}) > 1),
            shown(run["params"], "{:,}"),
            shown(run["macs"], "{:,}"),
            _latency(run),
            *(shown(run.get(key), "{:.2%}") for key in tops),
            str(run["epochs"]),
            shown_time(run["seconds"]),
        ]
        for number, run in enumerate(runs, start=1)
    ]
    return headings, table


def latency_note(result: CompareResult) -> str:
    """Return a sentence about how the latencies were measured."""
    threads = count(result["threads"], "thread")
    note = f"latency: one picture at a time on this CPU, {threads}, median over passes of runs in turn"
    if any(run["latency_of"] == UNTRAINED for run in result["runs"]):
        note += "; * marks an untrained network built from the run's settings"
    return note


def print_comparison(result: CompareResult, console: Console) -> None:
    """Print the figures, the settings that differ, and the location of the page."""
    from rich import box
    from rich.table import Table

    headings, rows = figures_table(result)
    shorter = headings.index("epochs")  # the page shows the others
    ranks = {"": 0, "run": 0, "params": 1, "MACs": 4, "latency": 3}
    columns = [
        Column(heading, right=heading not in ("", "run"), rank=ranks.get(heading, 2))
        for heading in headings[:shorter]
    ]
    table = FittedTable(columns, [row[:shorter] for row in rows], rest="the page and --json have everything")
    console.print(table, crop=False)
    settings = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    settings.add_column("setting", no_wrap=True)
    for number in range(1, len(rows) + 1):
        settings.add_column(str(number), overflow="fold")
    for key, values in result["differing"].items():
        settings.add_row(key, *(value or "" for value in values))
    if result["differing"]:
        console.print(settings)
    say = say_to(console)
    if not result["differing"]:
        say("all shared settings are equal")
    for note in (*result["notes"], latency_note(result)):
        say(note)
    for file in result["files"]:
        say(file)


def _check(references: Sequence[str], runs: Sequence[ReadRun]) -> None:
    seen: dict[Any, str] = {}
    for ref, run in zip(references, runs, strict=True):
        if run.kind == "sweep":
            raise ConfigError(
                "is a sweep, not a run",
                field=f"run {ref!r}",
                remedy=f"compare its trials (directories in it); istanas results --sweep {ref} lists them",
            )
        if run.kind in _STUDIES:
            words, table = _STUDIES[run.kind]
            raise ConfigError(
                f"is {words}, not a run",
                field=f"run {ref!r}",
                remedy=f"compare the runs that {table} in its directory lists",
            )
        same = run.files.resolve() if run.run_dir is not None else run.mlflow_run_id
        if same in seen:
            raise ConfigError(
                f"is given twice ({seen[same]!r} is the same)",
                field=f"run {ref!r}",
                remedy="give different runs",
            )
        seen[same] = ref


def _notes(runs: Sequence[ReadRun]) -> list[str]:
    """Return notes on differences that affect the comparison."""
    notes = []
    if len({run.dataset for run in runs}) > 1:
        notes.append("the runs are on different data sets: their accuracies cannot be compared")
    if len({run.kind for run in runs}) > 1:
        notes += dict.fromkeys(validation_note(run.kind, run.method) for run in runs)
    unfinished = [
        f"{n} is {shown_outcome(run.outcome)}"
        for n, run in enumerate(runs, start=1)
        if run.status != "FINISHED"
    ]
    if unfinished:
        notes.append(f"not finished: {', '.join(unfinished)}")
    return notes


def _row(run: ReadRun, latency: float | None, latency_of: str | None) -> ComparedRun:
    genotype, validated = run.genotype, has_validation(run.kind, run.method)
    return {
        "run": run.label,
        "run_dir": run.run_dir,
        "mlflow_run_id": run.mlflow_run_id,
        "kind": run.kind,
        "method": run.method,
        "dataset": run.dataset,
        "status": run.status,
        "outcome": run.outcome,
        "digest": None if genotype is None else genotype.digest(),
        "params": _whole(run.last("target/params")),
        "macs": _whole(run.last("target/macs")),
        "latency_seconds": latency,
        "latency_of": latency_of,
        "valid_top1": run.last("valid/top1") if validated else None,
        "valid_top5": run.last("valid/top5") if validated else None,
        "test_top1": run.last("test/top1"),
        "test_top5": run.last("test/top5"),
        "epochs": run.lines[-1].step if run.lines else 0,
        "seconds": run.seconds,
    }


def _network(number: int, run: ReadRun, notes: list[str]) -> Network | None:
    """Return the network to time; None if there is none, with a note if it could not be loaded."""
    try:
        if run.has_network:
            net, example = load_network(run.files)
            channels, height, width = example.shape[1:]
            return net, (channels, height, width), TRAINED
        return _untrained(run)
    except (IstanasError, OSError) as error:
        # Pictures or weights are missing. The other figures can still be compared.
        notes.append(f"latency of {number}: not measured ({error})")
        return None


def _untrained(run: ReadRun) -> Network | None:
    """Return the network that a run's settings build from its genotype; None if it has no genotype yet."""
    genotype = run.genotype
    if genotype is None or not (run.files / CONFIG_FILE).is_file():
        return None
    config = load(run.files / CONFIG_FILE)
    sizes = config.search if run.kind == "search" and trains_target(run.method) else config.retrain
    dataset = load_pictures(config.data, download=False)
    net = target_network(config, sizes, genotype, dataset)
    return net, (dataset.channels, dataset.height, dataset.width), UNTRAINED


def _latencies(networks: Sequence[Network | None]) -> list[tuple[float | None, str | None]]:
    """Return the seconds of a forward pass, and the kind of the timed network, for each run.

    The networks take turns, so that a slow moment of the machine affects all of them.
    """
    seconds: list[list[float]] = [[] for _ in networks]
    for _ in range(ROUNDS):
        for network, found in zip(networks, seconds, strict=True):
            if network is not None:
                net, shape, _ = network
                found.append(measure_latency(net, shape, repeats=PASSES))
    return [
        (None, None) if network is None else (statistics.median(found), network[2])
        for network, found in zip(networks, seconds, strict=True)
    ]


def _name(run: ComparedRun, *, several: bool) -> str:
    status = "" if run["status"] == "FINISHED" else f" ({shown_outcome(run['outcome'])})"
    return f"{run['run']}{status}" + (f", {run['dataset']}" if several else "")


def _latency(run: ComparedRun) -> str:
    mark = "*" if run["latency_of"] == UNTRAINED else ""
    seconds = run["latency_seconds"]
    return "" if seconds is None else f"{1000 * seconds:.2f} ms{mark}"


def _section(key: str) -> str:
    return key.partition(".")[0]


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
