"""The commands that search and train: search, retrain, run and sweep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.options import STARTS_OVER, Command, complete_file, hint_after_interrupt, job_options
from pipeline.cli.output import console_for, print_json, show_result, show_sweep_result
from pipeline.jobs.settings import load_config, load_for_genotype

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.jobs.context import JobContext


@click.command(cls=Command, resumes=True)
@job_options
def search(as_json: bool, fresh: bool, **settings: Any) -> None:
    """Search for an architecture."""
    config, name = load_config(**settings)
    from pipeline.jobs.search import run_search

    with _context(config, name, as_json, fresh) as context:
        result = run_search(context)
    show_result(result, as_json, context.console, config)


@click.command(cls=Command, resumes=True)
@click.option(
    "--genotype",
    required=True,
    metavar="FILE|NAME|RUN|random:SEED|TEXT",
    shell_complete=complete_file,
    help="Genotype to train: a JSON file, a published cell (ISTA_twostage, ISTA_onestage, ISTA_ImageNet), a search "
    "(run directory, MLflow run id or unique name), random:SEED for a random cell of the same space, or "
    "the text of a cell of NAS-Bench-201, such as nas_bench_201:1462.",
)
@job_options
def retrain(genotype: str, as_json: bool, fresh: bool, **settings: Any) -> None:
    """Train the network of a genotype from scratch and test it.

    Without --config, the settings of data, space and tracking are those of the run that found the genotype, if a run
    found it.
    """
    cells, parent, config, name = load_for_genotype(genotype, console_for(as_json), **settings)
    from pipeline.jobs.retrain import run_retrain

    origin = Path(genotype).name if Path(genotype).is_file() else genotype
    with _context(config, name, as_json, fresh, parent) as context:
        result = run_retrain(context, cells, origin=origin)
    show_result(result, as_json, context.console, config, kind="retrain")


@click.command(name="run", cls=Command, resumes=True)
@job_options
def run_command(as_json: bool, fresh: bool, **settings: Any) -> None:
    """Search, then retrain the result (one-stage: search and export).

    A one-stage search trains its network in the same run; the network is then exported instead of being retrained.
    """
    config, name = load_config(**settings)
    from pipeline.jobs.run import run_whole

    with _context(config, name, as_json, fresh) as context:
        result = run_whole(context)
    show_result(result, as_json, context.console, config)


@click.command(cls=Command, resumes=True)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show the space, example settings and the resources, without starting a trial.",
)
@click.option(
    "--max-concurrent",
    type=click.IntRange(min=1),
    metavar="N",
    help="Largest number of trials at once. Without it, as many run as fit.",
)
@job_options
def sweep(as_json: bool, fresh: bool, dry_run: bool, **settings: Any) -> None:
    """Run many searches with different settings and keep the best.

    Optuna chooses the settings; Ray Tune places the trials and stops unpromising ones early.
    """
    config, name = load_config(**settings)
    from pipeline.sweeps.job import print_dry_run, run_sweep

    with _context(config, name, as_json, fresh) as context:
        if dry_run:
            with hint_after_interrupt(STARTS_OVER):
                plan = print_dry_run(config, context.console, context.runtime)
            if as_json:
                print_json(asdict(plan))
            return
        result = run_sweep(context)
    show_sweep_result(result, as_json, context.console, config)


@contextmanager
def _context(
    config: Config, name: str, as_json: bool, fresh: bool, parent: str | None = None
) -> Iterator[JobContext]:
    """Yield the context of a job. At the end, shut down Ray if the job has started it."""
    from pipeline.cluster.ray_runtime import Runtime
    from pipeline.jobs.context import JobContext

    with Runtime(config.runtime) as runtime:
        yield JobContext(config, name, console_for(as_json), runtime, fresh, parent)


COMMANDS = (search, retrain, run_command, sweep)
