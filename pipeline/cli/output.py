"""Output of the commands: tables and paths for people, JSON for programs."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from istanas.errors import ConfigError
from pipeline.runs.layout import (
    BENCHMARK_PAGE,
    BEST_FOLDER,
    CELLS_FOLDER,
    CONFIG_FILE,
    GENOTYPE_FILE,
    RANK_PAGE,
    REPORT_PAGE,
    TRIALS_TABLE,
    VERSUS_PAGE,
    WEIGHTS_FILE,
)

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.config.schema import Config

STDOUT = Path("-")
"""The value of --csv that stands for stdout."""


def console_for(as_json: bool) -> Console:
    """Return the console for people: stdout, or stderr if a program reads stdout."""
    from rich.console import Console

    return Console(stderr=as_json, markup=False)  # names and paths may contain brackets


def print_json(value: Mapping[str, Any]) -> None:
    """Print a result for programs, on one line."""
    click.echo(json.dumps(value))


def show_result(
    result: Mapping[str, Any], as_json: bool, console: Console, config: Config, *, kind: str = "search"
) -> None:
    """Print the result of a job as a table, and where its files and its MLflow run are.

    Args:
        result: The job's result.
        as_json: Whether to print it for programs, too.
        console: The console for people.
        config: The job's configuration.
        kind: Kind of the run in which the validation accuracy was measured.
    """
    from rich.table import Table

    from pipeline.config.plugins import plugin_options
    from pipeline.report import terminal
    from pipeline.runs import bucket

    table = Table("figure", "value")
    for key, label, shown in (
        ("test_top1", "test top-1", lambda v: f"{100 * v:.2f} %"),
        ("test_top5", "test top-5", lambda v: f"{100 * v:.2f} %"),
        ("valid_top1", "validation top-1", lambda v: f"{100 * v:.2f} %"),
        ("valid_top5", "validation top-5", lambda v: f"{100 * v:.2f} %"),
        ("params", "parameters", lambda v: f"{v:,}"),
        ("macs", "multiply-adds", lambda v: f"{v:,}"),
        ("latency_ms", "predicted latency", lambda v: f"{v:.3g} ms"),
        (
            "seconds",
            "seconds of both jobs" if "search_seconds" in result else "seconds",
            lambda v: f"{v:.1f}",
        ),
    ):
        if key in result:
            table.add_row(label, shown(result[key]))
    console.print(table)
    if "valid_top1" in result:
        console.print(terminal.validation_note(kind, config.method), highlight=False)
    if "effects" in result:
        for line in terminal.effects_lines(result["effects"]):
            console.print(line, highlight=False, soft_wrap=True)
    runs = [bucket.local(result[key]) for key in ("run_dir", "retrain_run_dir") if key in result]
    pages = [run / REPORT_PAGE for run in runs if (run / REPORT_PAGE).exists()]  # those on this machine
    paths = [("report", str(page)) for page in pages]
    paths += [
        (label, bucket.shown(runs[0] / n))
        for label, n in (("genotype", GENOTYPE_FILE), ("cell pictures", CELLS_FOLDER))
    ]
    if (runs[-1] / WEIGHTS_FILE).exists():
        paths.append(("network", bucket.shown(runs[-1] / WEIGHTS_FILE)))
        command = [program_name(), "predict", shlex.quote(bucket.shown(runs[-1])), "FILE_OR_FOLDER"]
        paths.append(("classify pictures", " ".join([*command, *map(shlex.quote, plugin_options())])))
    for label, path in paths:
        console.print(f"{label}: {path}", highlight=False, soft_wrap=True)
    show_store(console, config)
    if as_json:
        print_json(result)


def show_sweep_result(result: Mapping[str, Any], as_json: bool, console: Console, config: Config) -> None:
    """Print the best trial of a sweep, and the command that retrains it."""
    from rich.table import Table

    from pipeline.base.text import shown_value
    from pipeline.config.plugins import plugin_options
    from pipeline.runs import bucket

    table = Table("figure", "value")
    table.add_row("best trial", str(result["best_trial"]))
    for key, value in result["settings"].items():
        table.add_row(f"  {key}", f"{value:.4g}" if isinstance(value, float) else shown_value(value))
    if "valid_top1" in result:
        table.add_row("top-1 in search", f"{100 * result['valid_top1']:.2f} %")
    if "retrained_top1" in result:
        table.add_row("top-1 after retraining", f"{100 * result['retrained_top1']:.2f} %")
    if "valid_top1" in result and "retrained_top1" in result:
        tau = result["kendall_tau"]
        table.add_row("Kendall's tau of both accuracies", "not defined" if tau is None else f"{tau:.2f}")
    for key, label in (
        ("params", "parameters"),
        ("macs", "multiply-adds"),
        ("epochs", "epochs of all trials"),
    ):
        table.add_row(label, f"{result[key]:,}")
    ended = f"{result['complete']} finished, {result['pruned']} stopped early, {result['failed']} failed"
    table.add_row("trials", ended)
    console.print(table)
    here, program = bucket.local(result["run_dir"]), program_name()
    plugins = map(shlex.quote, plugin_options())
    best = here / BEST_FOLDER
    for label, text in (
        ("report", here / REPORT_PAGE),
        ("all trials", bucket.shown(here / TRIALS_TABLE)),
        ("best", bucket.shown(best)),
        (
            "retrain it",
            " ".join(
                [
                    f"{program} retrain --genotype {best}/{GENOTYPE_FILE} --config {best}/{CONFIG_FILE}",
                    *plugins,
                ]
            ),
        ),
    ):
        console.print(f"{label}: {text}", highlight=False, soft_wrap=True)
    show_store(console, config)
    if as_json:
        print_json(result)


def show_benchmark_result(result: Mapping[str, Any], as_json: bool, console: Console, config: Config) -> None:
    """Print the scores of the methods of a benchmark, their comparisons in words, and where the files are."""
    from pipeline.report.benchmark_page import methods_table, table_note, tau_note

    notes = [note for note in (table_note(result), tau_note(result)) if note is not None]
    ranks = {"method": 0, "rank": 0, "true accuracy (%)": 1, "regret (points)": 3, "deviation": 4}
    _show_table(result, as_json, console, config, methods_table(result), ranks, notes, BENCHMARK_PAGE)


def show_versus_result(result: Mapping[str, Any], as_json: bool, console: Console, config: Config) -> None:
    """Print the results of the methods of a comparison at equal cost, the comparisons in words, and the files."""
    from pipeline.report.versus_page import NOTE, methods_table

    ranks = {"method": 0, "test accuracy (%)": 0, "cost ratio": 1, "seconds": 3, "deviation": 4}
    notes = [NOTE, *result["cost_sentences"]]
    _show_table(result, as_json, console, config, methods_table(result), ranks, notes, VERSUS_PAGE)


def _show_table(
    result: Mapping[str, Any],
    as_json: bool,
    console: Console,
    config: Config,
    table: tuple[list[str], list[list[str]]],
    ranks: Mapping[str, int],
    notes: Sequence[str],
    page: str,
) -> None:
    """Print a table, notes about it, what it says in words, and where the files are.

    Args:
        result: The result of the job.
        as_json: Whether to print it for programs, too.
        console: The console for people.
        config: The job's configuration.
        table: Its headings and rows; the first column has the names of the rows.
        ranks: Heading -> rank of the column, see `pipeline.base.fitted_table.Column`; 2 for others.
        notes: Sentences about the table.
        page: The file that has everything.
    """
    from pipeline.base.fitted_table import Column, FittedTable

    headings, rows = table
    columns = [
        Column(heading, right=heading != headings[0], rank=ranks.get(heading, 2)) for heading in headings
    ]
    console.print(FittedTable(columns, rows, rest=f"{page} and --json have everything"), crop=False)
    for line in (*notes, *result["sentences"], *result["files"]):
        console.print(line, highlight=False, soft_wrap=True)
    show_store(console, config)
    if as_json:
        print_json(result)


def show_rank_result(result: Mapping[str, Any], as_json: bool, console: Console, config: Config) -> None:
    """Print how well the judges rank, what that says in words, and where the files are."""
    from pipeline.report.rank_page import judges_note, judges_table

    ranks = {"judge": 0, "tau": 0, "seconds": 1, "nats/min": 1}
    _show_table(
        result, as_json, console, config, judges_table(result), ranks, [judges_note(result)], RANK_PAGE
    )


def show_evaluation(result: Mapping[str, Any], as_json: bool, console: Console) -> None:
    """Print the figures of an evaluation, those of each class, its confusion matrix, and where the files are."""
    from rich.table import Table

    from pipeline.base.fitted_table import Column, FittedTable
    from pipeline.report import evaluation_section as section

    figures = result["evaluation"]
    table = Table("figure", "value")
    table.add_row("pictures", f"{figures['pictures']:,}")
    for row in section.figure_rows(figures):
        table.add_row(*row)
    console.print(table)
    headings, rows = section.class_table(figures)
    ranks = {"class": 0, "accuracy": 0, "interval (%)": 2}
    columns = [
        Column(heading, right=heading not in (headings[0], headings[-1]), rank=ranks.get(heading, 1))
        for heading in headings
    ]
    console.print(FittedTable(columns, rows, rest="--json has everything"), crop=False)
    for line in section.confusion_lines(figures, console.width):
        console.print(line, highlight=False)
    console.print(section.NOTE, highlight=False, soft_wrap=True)
    for path in result["files"]:
        console.print(path, highlight=False, soft_wrap=True)
    if as_json:
        print_json(result)


def show_store(console: Console, config: Config) -> None:
    """Print the MLflow store, and the commands that show it."""
    if not config.tracking.enabled:
        return
    from pipeline.tracking.store import public_uri, store_uri

    store = f" --set tracking.uri={public_uri(config.tracking.uri)}" if config.tracking.uri else ""
    for line in (
        f"MLflow store: {public_uri(store_uri(config.tracking.uri))}",
        f"browse it: {program_name()} ui{store}",
        f"as a table: {program_name()} results{store}",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def program_name() -> str:
    """Return the command that runs this program: its bare name if the shell finds it."""
    if shutil.which("istanas"):
        return "istanas"
    return f"{sys.executable} -m pipeline.cli" if sys.argv[0].endswith(".py") else sys.argv[0]


def check_csv(file: Path | None, as_json: bool) -> None:
    """Check the option --csv, before the work for the table.

    Args:
        file: The file, `STDOUT`, or None without the option.
        as_json: Whether --json was given, too.

    Raises:
        ConfigError: The path is a folder, or a file that cannot be written.
    """
    if file is None:
        return
    if file == STDOUT:
        if as_json:
            raise click.UsageError("--csv -: --json writes to stdout, too; give one of them")
        return
    from pipeline.base.files import writable_file

    if file.is_dir():
        raise ConfigError("a folder", field=f"--csv {file}", remedy="name a file")
    if not file.exists() or file.is_file():  # not a pipe or device
        writable_file(file, "--csv")


def write_csv(file: Path, text: str, rows: int, console: Console) -> None:
    """Write a table to a file, atomically, with a line about it; to stdout, a pipe or a device directly."""
    from pipeline.base.files import atomic_write

    if file == STDOUT:
        click.echo(text, nl=False)
        return
    check_csv(file, as_json=False)
    if file.exists() and not file.is_file():
        file.write_text(text)
    else:
        atomic_write(file, text)
    console.print(f"{rows} rows: {file}", highlight=False, soft_wrap=True)


def printable(line: str) -> str:
    """Return a line with its control characters escaped, because names of files may contain them.

    Example:
        >>> printable("data.root: é\\x1b[2J is missing")
        'data.root: é\\\\x1b[2J is missing'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
