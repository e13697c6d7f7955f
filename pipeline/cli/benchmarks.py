"""The commands that measure whether a search is worth its cost: versus, benchmark and rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import Command, complete_file, complete_folder, job_options
from pipeline.cli.output import console_for, show_benchmark_result, show_rank_result, show_versus_result
from pipeline.jobs.settings import config_of_search, load_config


def _split(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names in all values, which commas separate."""
    return tuple(name.strip() for each in value for name in each.split(",") if name.strip())


@click.command(cls=Command, resumes=True)
@click.option(
    "--table",
    required=True,
    type=click.Path(path_type=Path),
    shell_complete=complete_file,
    help="Table of true accuracies (CSV or .csv.gz): a column architecture with the text form of each architecture, "
    "then one or more columns with accuracies in per cent.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=2),
    default=5,
    show_default=True,
    metavar="N",
    help="Number of searches of each method. Their seeds are seed, seed + 1, ...",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    callback=_split,
    metavar="NAME,...",
    help="Other methods that take part; repeatable. A name uses the configuration with another method; a "
    "configuration file uses its method and its section search.",
)
@click.option("--column", metavar="NAME", help="Column of the table that scores. Default: the first one.")
@job_options
def benchmark(
    table: Path,
    seeds: int,
    methods: tuple[str, ...],
    column: str | None,
    as_json: bool,
    fresh: bool,
    **settings: Any,
) -> None:
    """Score searches by a table of true accuracies.

    The configured search and those of --method run for several seeds, one after the other. The table is read when all
    have finished: no search can see it. The command writes benchmark.csv and benchmark.html; run again, it resumes.
    """
    config, name = load_config(**settings)
    from pipeline.cluster.ray_runtime import Runtime
    from pipeline.jobs.benchmark import run_benchmark
    from pipeline.jobs.context import JobContext

    console = console_for(as_json)
    with Runtime(config.runtime) as runtime:
        context = JobContext(config, name, console, runtime, fresh)
        result = run_benchmark(context, table, seeds=seeds, methods=methods, column=column)
    show_benchmark_result(result, as_json, console, config)


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Return the whole numbers in a text, which commas separate."""
    if value is None:
        return None
    try:
        numbers = tuple(int(part) for part in value.split(",") if part.strip())
    except ValueError:
        raise click.BadParameter(f"{value!r:.80} is not a list such as 1,3,10") from None
    if any(number < 1 for number in numbers):
        raise click.BadParameter(f"{min(numbers)} is not a number of epochs: use 1 or more")
    return numbers


@click.command(cls=Command, resumes=True)
@click.argument("run", metavar="[RUN]", required=False, shell_complete=complete_folder)
@click.option(
    "--cells",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    metavar="N",
    help="Number of random cells, 6 or more.",
)
@click.option(
    "--epochs",
    callback=_numbers,
    metavar="N,...",
    help="Epochs of the short retrainings that are compared; an empty list leaves them out. Default: an eighth, a "
    "quarter and half of retrain.epochs, or none with --table.",
)
@click.option(
    "--table",
    type=click.Path(path_type=Path),
    shell_complete=complete_file,
    help="Compare with a table of true accuracies instead of retraining each cell, see istanas benchmark.",
)
@click.option("--column", metavar="NAME", help="Column of the table that counts. Default: the first one.")
@job_options
def rank(
    run: str | None,
    cells: int,
    epochs: tuple[int, ...] | None,
    table: Path | None,
    column: str | None,
    as_json: bool,
    fresh: bool,
    **settings: Any,
) -> None:
    """Measure how well cheap measurements rank cells.

    Random cells are retrained, and measured cheaply: by short retrainings, with the shared weights of the search (of
    RUN, or of the configured search, which runs first), and for method: measured by its measurements. The command
    writes rank.csv and rank.html; run again, it resumes.
    """
    config, name = load_config(**settings) if run is None else config_of_search(run, **settings)
    from pipeline.cluster.ray_runtime import Runtime
    from pipeline.jobs.context import JobContext
    from pipeline.jobs.rank import run_rank

    console = console_for(as_json)
    with Runtime(config.runtime) as runtime:
        context = JobContext(config, name, console, runtime, fresh)
        result = run_rank(context, cells=cells, epochs=epochs, table=table, column=column)
    show_rank_result(result, as_json, console, config)


@click.command(cls=Command, resumes=True)
@click.option(
    "--against",
    multiple=True,
    callback=_split,
    default=("random",),
    show_default=True,
    metavar="NAME,...",
    help="Methods to compare with; repeatable. A name uses the configuration with another method; a configuration file "
    "uses its method and its section search.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=2),
    default=6,
    show_default=True,
    metavar="N",
    help="Number of runs of each method. Their seeds are seed, seed + 1, ... With fewer than 6, no difference can be "
    "found.",
)
@job_options
def versus(against: tuple[str, ...], seeds: int, as_json: bool, fresh: bool, **settings: Any) -> None:
    """Compare a search with other methods at equal cost.

    For each seed, the configured search and the retraining of its cell set the cost. With the same pictures and the
    same retraining, random cells are retrained for as many seconds, and the best on the hold-out counts; other methods
    search for as many seconds. The command writes versus.csv and versus.html; run again, it resumes.
    """
    config, name = load_config(**settings)
    from pipeline.cluster.ray_runtime import Runtime
    from pipeline.jobs.context import JobContext
    from pipeline.jobs.versus import run_versus

    console = console_for(as_json)
    with Runtime(config.runtime) as runtime:
        result = run_versus(JobContext(config, name, console, runtime, fresh), seeds=seeds, against=against)
    show_versus_result(result, as_json, console, config)


COMMANDS = (versus, benchmark, rank)
