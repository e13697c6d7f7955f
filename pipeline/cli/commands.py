"""The command line `istanas`: arguments in, exit code out; the work is done elsewhere.

Exit codes: 0 done, 1 failed job, 2 bad argument or configuration, 129 terminal closed (SIGHUP), 130 interrupted, 143
terminated (SIGTERM). Errors are one line each on stderr. Only what is cheap is imported at module level, because every
completion in a shell imports this module; the commands import the rest.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from istanas import __version__
from istanas.errors import CheckpointError, ConfigError, GenotypeError, IstanasError
from pipeline.base.home_folder import ensure_usable_home
from pipeline.base.interruption import HUNG_UP, INTERRUPTED, TERMINATED, signals_interrupt
from pipeline.base.redaction import without_secrets
from pipeline.cli.streams import outlive_readers
from pipeline.config.choices import DEFAULT_METRIC, KINDS, METHODS, METRICS
from pipeline.runs.layout import (
    BEST_FOLDER,
    CELLS_FOLDER,
    CONFIG_FILE,
    GENOTYPE_FILE,
    REPORT_PAGE,
    TRIALS_TABLE,
    WEIGHTS_FILE,
)

if TYPE_CHECKING:
    from rich.console import Console

    from istanas.space import Genotype
    from pipeline.cluster.job_server import Job, JobServer
    from pipeline.config.schema import Config
    from pipeline.runs.directory import RunDir
    from pipeline.tracking.references import Origin

Command = Callable[..., Any]
ENDS = {  # of a command that a signal has ended: what is said, and the exit code
    signal.SIGINT: ("interrupted", INTERRUPTED),
    signal.SIGTERM: ("told to end (SIGTERM)", TERMINATED),
    signal.SIGHUP: ("the terminal was closed (SIGHUP)", HUNG_UP),
}

SECTIONS = {  # of `istanas --help`: every command belongs to one
    "Search and train": ("search", "retrain", "run", "sweep"),
    "Results": ("results", "compare", "ui", "draw", "export", "promote", "sync"),
    "Cluster": ("submit", "jobs", "stop"),
    "Tools": ("config", "doctor", "profile"),
}


def main() -> None:
    """Entry point of the console script."""
    outlive_readers()
    sys.exit(run(leaving=True))


def run(arguments: list[str] | None = None, *, leaving: bool = False) -> int:
    """Run one command line (None: the process's) and return its exit code.

    Args:
        arguments: without the program's name.
        leaving: whether the process ends with it.
    """
    signals: list[int] = []
    try:
        with signals_interrupt(leaving=leaving) as signals:
            return _run(arguments)
    except (click.Abort, KeyboardInterrupt) as error:  # here, where a further signal is no longer answered
        what, code = ENDS[signal.Signals(signals[0]) if signals else signal.SIGINT]
        cause = error.__cause__ if isinstance(error, click.Abort) else error
        hint = str(cause) if isinstance(cause, KeyboardInterrupt) else ""  # see `_interruptible`
        click.echo(f"{what}: {hint or 'the same command resumes'}", err=True)
        return code


def _run(arguments: list[str] | None) -> int:
    try:
        # Not standalone, click returns the code of an Exit, and what a command returns: nothing.
        return cli.main(args=arguments, prog_name="istanas", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "istanas"
        click.echo(f"error: {' '.join(error.format_message().split())} See: {command} --help", err=True)
        return 2
    except IstanasError as error:
        for line in str(error).splitlines():
            click.echo(f"error: {_printable(line)}", err=True)
        return 2 if isinstance(error, ConfigError | GenotypeError) else 1
    except (MemoryError, RuntimeError) as error:
        from pipeline.base.files import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        reason = f" ({_printable(str(error).splitlines()[0]):.200})" if str(error) else ""
        remedy = "free some, or give a job a smaller batch_size, fewer init_channels or layers"
        click.echo(f"error: out of memory{reason}: {remedy}", err=True)
        return 1
    except OSError as error:  # a full disk, a folder that may not be written
        from pipeline.base.files import is_full

        if error.strerror is None:  # not the system's word but a mistake of ours: its traceback is needed
            raise
        where = f"{error.filename}: " if error.filename else ""
        remedy = "fix the path or its rights"
        if is_full(error):
            remedy = "free space there (old runs, their ray folders, mlartifacts)"
        click.echo(f"error: {where}{error.strerror}: {remedy}, the same command resumes", err=True)
        return 1


class Sections(click.Group):
    """A group whose help lists the commands by task."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for heading, names in SECTIONS.items():
            with formatter.section(heading):
                limit = formatter.width - width - 6
                lines = [(name, self.commands[name].get_short_help_str(limit)) for name in names]
                formatter.write_dl([(f"{name:{width}}", line) for name, line in lines])


def _complete_file(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete a file."""
    return [CompletionItem(incomplete, type="file")]


def _complete_folder(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete a folder, such as a run directory."""
    return [CompletionItem(incomplete, type="dir")]


@click.group(cls=Sections, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Neural architecture search as sparse coding: find a network for your pictures, train it, track it in MLflow."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.showwarning = _show_warning
    ensure_usable_home()


def configured(command: Command) -> Command:
    """Add the options of every command with a configuration."""
    command = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY.PATH=VALUE",
        help="Override a setting of the configuration; repeatable. istanas config --describe explains the keys.",
    )(command)
    return click.option(
        "--config",
        "file",
        metavar="FILE",
        shell_complete=_complete_file,
        help="Configuration file (YAML). Without it, the configuration of the handwritten digits is used.",
    )(command)


class Workers(click.ParamType):
    """A number of workers, or a range."""

    name = "workers"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from pipeline.config.workers import parse_workers

        try:
            return str(parse_workers(value))
        except ConfigError as error:
            self.fail(str(error).removeprefix("workers: "), param, ctx)


def placed(command: Command) -> Command:
    """Add the options that say where workers run; they are short for settings of `runtime`."""
    command = click.option(
        "--address",
        metavar="ADDR",
        help="Ray cluster to run on: HOST:PORT of its head node, auto (the cluster that this machine belongs to), or "
        "ray://HOST:PORT from outside. Without it, RAY_ADDRESS is used if it is set, and otherwise this machine.",
    )(command)
    return click.option(
        "--workers",
        type=Workers(),
        metavar="N|MIN:MAX",
        help="Number of Ray Train workers; MIN:MAX lets the number follow the cluster. 0 runs the job in this process, "
        "without Ray.",
    )(command)


def job(command: Command) -> Command:
    """Add the options of every job."""
    command = click.option(
        "--fresh", is_flag=True, help="Delete what the run directory holds, and start over."
    )(command)
    return configured(placed(json_option(command)))


def json_option(command: Command) -> Command:
    """Add --json, the output for programs."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object as the last line on stdout."
    )(command)


@cli.command()
@job
def search(as_json: bool, fresh: bool, **settings: Any) -> None:
    """Search for an architecture."""
    config, name = _load(**settings)
    console = _console(as_json)
    from pipeline.cluster.ray_runtime import Runtime
    from pipeline.jobs.search import run_search

    with Runtime(config.runtime) as runtime:
        result = run_search(config, name=name, fresh=fresh, console=console, runtime=runtime)
    _finish(result, as_json, console, config)


@cli.command()
@click.option(
    "--genotype",
    required=True,
    metavar="FILE|NAME|RUN|random:SEED",
    shell_complete=_complete_file,
    help="Genotype to train: a JSON file, a published cell (ISTA_twostage, ISTA_onestage, ISTA_ImageNet), a search "
    "(run directory, MLflow run id or unique name), or random:SEED for a random cell of the same space.",
)
@job
def retrain(genotype: str, as_json: bool, fresh: bool, **settings: Any) -> None:
    """Train the network of a genotype from scratch and test it.

    Without --config, the settings of data and tracking are those of the run that found the genotype, if a run found it.
    """
    console = _console(as_json)
    from pipeline.cluster.ray_runtime import Runtime
    from pipeline.jobs.retrain import run_retrain

    cells, parent, config, name = _load_for_genotype(genotype, console, **settings)
    with Runtime(config.runtime) as runtime:
        result = run_retrain(
            config,
            cells,
            name=name,
            parent=parent,
            origin=Path(genotype).name if Path(genotype).is_file() else genotype,
            fresh=fresh,
            console=console,
            runtime=runtime,
        )
    _finish(result, as_json, console, config, kind="retrain")


@cli.command(name="run")
@job
def run_command(as_json: bool, fresh: bool, **settings: Any) -> None:
    """Search, then retrain the result (one-stage: search and export).

    A one-stage search trains its network in the same run; the network is then exported instead of being retrained.
    """
    config, name = _load(**settings)
    console = _console(as_json)
    from pipeline.cluster.ray_runtime import Runtime
    from pipeline.jobs.run import run_whole

    with Runtime(config.runtime) as runtime:
        result = run_whole(config, name=name, fresh=fresh, console=console, runtime=runtime)
    _finish(result, as_json, console, config)


@cli.command()
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
@job
def sweep(as_json: bool, fresh: bool, dry_run: bool, max_concurrent: int | None, **settings: Any) -> None:
    """Run many searches with different settings and keep the best.

    Optuna chooses the settings; Ray Tune places the trials and stops unpromising ones early.
    """
    config, name = _load(**settings)
    console = _console(as_json)
    from pipeline.cluster.ray_runtime import Runtime
    from pipeline.sweep.job import print_dry_run, run_sweep
    from pipeline.sweep.space import sweep_of

    if max_concurrent is not None:
        wanted = sweep_of(config).model_copy(update={"max_concurrent": max_concurrent})
        config = config.model_copy(update={"sweep": wanted})

    with Runtime(config.runtime) as runtime:
        if dry_run:
            plan = print_dry_run(config, console, runtime)
            if as_json:
                _print_json(asdict(plan))
            return
        result = run_sweep(config, name=name, fresh=fresh, console=console, runtime=runtime)
    _finish_sweep(result, as_json, console, config)


@cli.command()
@click.argument("reference", metavar="FILE|NAME|RUN|random:SEED", shell_complete=_complete_file)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("cells"),
    show_default=True,
    help="Folder of the figures.",
)
@configured
@json_option
def draw(reference: str, out: Path, file: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Draw the two cells of a genotype (SVG and PNG)."""
    config, _ = _load(file, overrides)
    console = _console(as_json)
    from istanas.draw import save_genotype_figures
    from pipeline.runs import bucket
    from pipeline.tracking.references import resolve_genotype

    genotype, _ = resolve_genotype(
        reference,
        space=config.space.cell_space(),
        runs_dir=bucket.local(config.runtime.runs_dir),
        tracking_uri=config.tracking.uri,
    )
    files = save_genotype_figures(genotype, out)
    console.print(str(genotype), highlight=False)
    for path in files:
        console.print(str(path), highlight=False, soft_wrap=True)
    if as_json:
        _print_json(
            {"digest": genotype.digest(), "genotype": genotype.to_dict(), "files": [str(f) for f in files]}
        )


@cli.command()
@click.option("--kind", type=click.Choice(KINDS), help="Show only runs of this kind.")
@click.option("--method", type=click.Choice(METHODS), help="Show only runs of this method.")
@click.option("--dataset", metavar="NAME", help="Show only runs on this data set.")
@click.option(
    "--where",
    metavar="CONDITION",
    help="Show only runs that fulfil a condition in MLflow's syntax: "
    "'metrics.`test/top1` > 0.9 and params.seed = \"1\"'.",
)
@click.option(
    "--csv", "csv_file", type=click.Path(path_type=Path), help="Write the whole table to this file (CSV)."
)
@click.option(
    "--one-stage",
    is_flag=True,
    help="Compare the weights of one-stage searches with the same cells retrained from scratch.",
)
@click.option(
    "--sweep",
    "sweep_run",
    metavar="RUN",
    shell_complete=_complete_folder,
    help="Show the trials of a sweep, with every swept setting.",
)
@configured
@json_option
def results(
    file: str | None,
    overrides: tuple[str, ...],
    csv_file: Path | None,
    one_stage: bool,
    sweep_run: str | None,
    as_json: bool,
    **filters: str | None,
) -> None:
    """Show all sweeps, searches and retrainings as a table.

    The runs are those of the MLflow store. A terminal of 120 columns shows more columns; --csv and --json have all.
    """
    _check_table(one_stage, sweep_run, filters)
    config, _ = _load(file, overrides)
    console = _console(as_json)
    from pipeline import report
    from pipeline.report import terminal
    from pipeline.tracking.store import public_uri, store_exists, store_uri

    store = {"tracking_uri": config.tracking.uri, "experiment": config.tracking.experiment}
    if sweep_run is not None:
        from pipeline.report.trials import read_table, trials_table

        run, _ = _run_and_config(sweep_run, file, overrides)
        frame = read_table(run.path)
        table = trials_table(frame)
    elif one_stage:
        frame = report.weights_frame(**store, dataset=filters["dataset"])
        table = terminal.weights_table(frame)
    else:
        frame = report.results_frame(**store, **filters)
        none = "no run fits the filters" if any(filters.values()) else "no runs yet"
        table = terminal.results_table(frame, width=console.width, none=none)
    if sweep_run is None and not store_exists(uri := store_uri(config.tracking.uri)):
        console.print(
            f"MLflow store {public_uri(uri)}: does not exist; if the runs are in another one, set tracking.uri or "
            "MLFLOW_TRACKING_URI",
            highlight=False,
            soft_wrap=True,
        )
    if csv_file is not None:
        _write_csv(csv_file, frame.to_csv(index=False))
        console.print(f"{len(frame)} rows: {csv_file}", highlight=False, soft_wrap=True)
    else:
        console.print(table, crop=False)
    if as_json:
        _print_json({"results": json.loads(frame.to_json(orient="records", date_format="iso"))})


def _check_table(one_stage: bool, sweep_run: str | None, filters: Mapping[str, str | None]) -> None:
    """Refuse options that do not fit the table that is asked for."""
    if one_stage and sweep_run is not None:
        raise click.UsageError("--one-stage and --sweep: two tables, give one of them")
    taken = {"dataset"} if one_stage else set() if sweep_run is not None else set(filters)
    for name, value in filters.items():
        if value is not None and name not in taken:
            table = "--one-stage takes --dataset only" if one_stage else "--sweep has all trials of one run"
            raise click.UsageError(f"--{name}: {table}, leave it out")


@cli.command()
@click.argument("references", metavar="RUN RUN...", nargs=-1, shell_complete=_complete_folder)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("compare"),
    show_default=True,
    help="Folder of the page and the figure.",
)
@configured
@json_option
def compare(
    references: tuple[str, ...], out: Path, file: str | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Compare runs: settings, curves, cells, size, latency, accuracy.

    Each RUN is a search or a retraining (run directory, MLflow run id or unique name). The command writes compare.html,
    which opens in any browser, and compare.png. The latency is measured by this command, on this machine.
    """
    if len(references) < 2:
        raise click.UsageError(f"RUN: {len(references)} given, name at least two runs to compare")
    config, _ = _load(file, overrides)
    console = _console(as_json)
    from pipeline.jobs.compare import run_compare

    result = run_compare(config, references, out=out, console=console)
    if as_json:
        _print_json(result)


@cli.command()
@configured
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=5000, show_default=True, help="Port; if it is in use, the next free one.")
@json_option
def ui(file: str | None, overrides: tuple[str, ...], host: str, port: int, as_json: bool) -> None:
    """Serve MLflow's web pages for the local store; Ctrl-C stops it."""
    config, _ = _load(file, overrides)
    from pipeline.tracking.ui import announce_on_stdout, serve_ui

    def as_object(address: str, store: str, newest_run: str | None) -> None:
        _print_json({"url": address, "store": store, "newest_run": newest_run})

    announce = as_object if as_json else announce_on_stdout
    code = serve_ui(tracking_uri=config.tracking.uri, host=host, port=port, announce=announce)
    raise click.exceptions.Exit(code)


@cli.command()
@configured
@placed
@json_option
def doctor(as_json: bool, **settings: Any) -> None:
    """Check packages, GPUs, threads, MLflow store, licence and data.

    Each check prints one line, with the remedy if it fails. Exit code 0: no check failed.
    """
    config, _ = _load(**settings)
    from pipeline.cli.doctor import run_checks

    checks = run_checks(
        tracking_uri=config.tracking.uri,
        data=config.data,
        workers=config.runtime.workers,
        threads=config.runtime.threads,
        address=config.runtime.address,
    )
    for check in checks:
        remedy = f"; {check.remedy}" if check.remedy else ""
        click.echo(f"{check.state:4}  {check.name}: {check.message}{remedy}", err=as_json)
    if as_json:
        _print_json({"checks": [asdict(check) for check in checks]})
    raise click.exceptions.Exit(1 if any(check.state == "fail" for check in checks) else 0)


@cli.command(name="config")
@click.option(
    "--describe",
    is_flag=False,
    flag_value="",
    metavar="[KEY]",
    help="Explain a key: type, range, default and meaning. A section, or the beginning of a key, lists its keys; "
    "without KEY, all keys are listed.",
)
@click.option("--json-schema", "schema", is_flag=True, help="Write the JSON schema of the file, for editors.")
@configured
@json_option
def config_command(
    describe: str | None, schema: bool, file: str | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Print the resolved configuration, or explain its keys.

    The output is a valid configuration file: istanas config --config FILE --set search.epochs=10 > my.yaml. Passwords
    in the addresses of stores are left out. The ranges of a sweep are checked by istanas sweep --dry-run.
    """
    alone = [
        name for name, given in (("--describe", describe is not None), ("--json-schema", schema)) if given
    ]
    others = [name for name, given in (("--config", file), ("--set", overrides)) if given]
    if alone and len(alone + others) > 1:
        raise click.UsageError(f"{alone[0]} does not take {(alone + others)[1]}, leave one of them out")
    from pipeline.config import describe as description
    from pipeline.config import load as configuration

    if describe is not None:
        keys = description.describe(describe)
        if as_json:
            _print_json({"keys": [key.as_json() for key in keys]})
        else:
            click.echo(description.as_text(keys, min(shutil.get_terminal_size().columns, 120)))
    elif schema:
        click.echo(json.dumps(description.json_schema(), indent=None if as_json else 2))
    else:
        config, _ = _load(file, overrides)
        public = configuration.without_passwords(config)
        if public != config:
            click.echo("warning: passwords in the addresses of stores are left out", err=True)
        if as_json:
            _print_json({"config": configuration.to_tree(public)})
        else:
            click.echo(configuration.to_yaml(public), nl=False)


@cli.command()
@click.option(
    "--job",
    type=click.Choice(["search", "retrain"]),
    help="Job to profile: search, or retrain with --genotype. [default: search]",
)
@click.option(
    "--genotype",
    metavar="FILE|NAME|RUN|random:SEED",
    shell_complete=_complete_file,
    help="Genotype to retrain, as for istanas retrain.",
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Number of steps to measure."
)
@click.option(
    "--trace", type=click.Path(path_type=Path), metavar="FILE", help="Write a Chrome trace of one step."
)
@configured
@json_option
def profile(
    job: str | None, genotype: str | None, steps: int, trace: Path | None, as_json: bool, **settings: Any
) -> None:
    """Measure some training steps and estimate the time of a whole run.

    The steps run in this process, on the real pictures, and their results are discarded. The report says where the time
    goes, and which share of the machine's peak performance is reached.
    """
    if (job == "retrain" and genotype is None) or (job == "search" and genotype is not None):
        raise click.UsageError(
            "--genotype: a retraining needs one and a search has none, give both --job retrain and --genotype"
        )
    console = _console(as_json)
    from pipeline.jobs.profile import print_profile, run_profile

    cells = None
    if genotype is None:
        config, _ = _load(**settings)
    else:
        cells, _, config, _ = _load_for_genotype(genotype, console, **settings)
    result = run_profile(config, genotype=cells, steps=steps, trace=trace, console=console)
    print_profile(result, console)
    if as_json:
        _print_json(result)


@cli.command()
@click.argument("reference", metavar="RUN", shell_complete=_complete_folder)
@configured
@json_option
def export(reference: str, file: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Export a trained network (safetensors, torch.export, ONNX).

    RUN is a finished one-stage search or retraining (run directory, MLflow run id or unique name). Each file is loaded
    again and compared with the network. The files are written to the folder export of the run, and to MLflow.
    """
    console = _console(as_json)
    from pipeline.jobs.export import run_export

    run, config = _run_and_config(reference, file, overrides)
    result = run_export(config, run.path, console=console, again=True)
    if as_json:
        _print_json(result)


@cli.command()
@click.argument("reference", metavar="RUN", shell_complete=_complete_folder)
@configured
@json_option
def sync(reference: str, file: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Send a run's missing records to MLflow; safe to run repeatedly.

    RUN is a run directory, an MLflow run id or a unique name.
    """
    console = _console(as_json)
    from pipeline.runs import bucket
    from pipeline.tracking.tracker import MLflowTracker

    run_dir, config = _run_and_config(reference, file, overrides)
    t = config.tracking
    tracker = MLflowTracker(
        run_dir,
        tracking_uri=t.uri,
        experiment=t.experiment,
        models=t.models,
        registered_model=t.registered_model,
    )
    if not tracker.deliver():
        raise IstanasError(
            f"sync: {bucket.shown(run_dir.path)} could not be delivered, start the store and try again"
        )
    sent = tracker.last_delivery
    assert sent is not None
    if run_dir.read().kind == "sweep":
        from pipeline.jobs.closing import deliver_below

        if not deliver_below(run_dir.path, config):
            raise IstanasError(f"sync: not all trials of {run_dir.path} could be delivered, try again")
    counts = (
        f"{sent.metrics} metrics, {sent.params} parameters, {sent.tags} tags, {sent.datasets} data sets, "
        f"{len(sent.artifacts)} files"
    )
    console.print(
        f"{bucket.shown(run_dir.path)}: sent {counts}{', the model' if sent.model else ''} to {sent.tracking_uri}, "
        f"MLflow run {sent.run_id}",
        highlight=False,
        soft_wrap=True,
    )
    if sent.registered is not None:
        name, version = sent.registered
        console.print(f"registered as version {version} of {name}", highlight=False, soft_wrap=True)
    for name in sent.missing:
        console.print(f"not there any more: {run_dir.path / name}", highlight=False, soft_wrap=True)
    if as_json:
        _print_json({"run_dir": bucket.shown(run_dir.path), "mlflow_run_id": tracker.run_id})


@cli.command()
@click.argument("reference", metavar="RUN", shell_complete=_complete_folder)
@click.option(
    "--metric",
    type=click.Choice(METRICS),
    default=DEFAULT_METRIC,
    show_default=True,
    help="Metric to compare: top-1 and top-5 are better if higher, all others if lower. test/... chooses by the "
    "test split, which is then no longer a fair estimate of the champion's accuracy.",
)
@click.option("--force", is_flag=True, help="Move the alias regardless of the metric.")
@configured
@json_option
def promote(
    reference: str, metric: str, force: bool, file: str | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Make a run's network the champion of its model, if it is better.

    RUN is a finished one-stage search or retraining (run directory, MLflow run id or unique name). It is compared with
    the champion of its registered model on the same pictures; if there is no champion, it becomes the champion. Exit
    code 0: it is the champion; 1: it is not better, and nothing was changed; 2: the two cannot be compared, or RUN has
    no registered network.
    """
    console = _console(as_json)
    from pipeline.runs import bucket
    from pipeline.tracking.promote import promote as move_alias

    run, config = _run_and_config(reference, file, overrides)
    done = move_alias(run, config.tracking, metric=metric, force=force)
    model = f"{done.registered_model} version {done.version}"
    verdict = "is the champion" if done.champion else f"stays behind, version {done.before} is the champion"
    console.print(f"{model} {verdict}: {done.reason}", highlight=False, soft_wrap=True)
    if done.moved and done.before is not None:
        console.print(f"the champion before was version {done.before}", highlight=False, soft_wrap=True)
    if as_json:
        _print_json({"run_dir": bucket.shown(run.path), **asdict(done)})
    if not done.champion:
        raise click.exceptions.Exit(1)


class LongEnd(click.Command):
    """A command whose usage line says where another command begins."""

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["[OPTIONS] -- COMMAND [ITS OPTIONS]"]


def served(command: Command) -> Command:
    """Add the option that names the cluster by its dashboard, which contains the job server."""
    return click.option(
        "--address",
        metavar="URL",
        envvar="RAY_API_SERVER_ADDRESS",
        default="http://127.0.0.1:8265",
        show_default=True,
        help="The cluster's dashboard, http://HOST:8265. Without it, RAY_API_SERVER_ADDRESS is used if it is set.",
    )(command)


@cli.command(cls=LongEnd, context_settings={"allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@served
@click.option(
    "--name",
    "job_id",
    metavar="ID",
    help="Name of the job, unique on the cluster. Without it, a name is generated.",
)
@click.option("--no-wait", is_flag=True, help="Return with exit code 0 as soon as the job is submitted.")
@click.option(
    "--cluster-mlflow", is_flag=True, help="Do not send MLFLOW_TRACKING_URI: use that of the cluster's nodes."
)
@json_option
@click.pass_context
def submit(
    context: click.Context,
    command: tuple[str, ...],
    address: str,
    job_id: str | None,
    no_wait: bool,
    cluster_mlflow: bool,
    as_json: bool,
) -> None:
    """Submit search, retrain, run or sweep to a Ray cluster as a job.

    The command is checked on this machine first. The working directory is sent along, without data, runs, well-known
    files of secrets, and the files that a .gitignore or .rayignore names. The job's log is shown, and the exit code is
    that of the job; 143 if it was stopped. After Ctrl-C (exit code 130) the job continues. The same command, submitted
    again, resumes its run.
    """
    from pipeline.cluster.submit import Submission
    from pipeline.cluster.submit import submit as submit_job

    job, options, config, name = _parse(context, command)
    say = _say(as_json)
    submission = Submission(job, command, options, config, name, cluster_mlflow)
    listed = f"{_program()} jobs --address {without_secrets(address)}"
    with _interruptible(f"whether the job was submitted already, say: {listed}"):
        if job == "sweep" and not options.get("dry_run"):
            from pipeline.sweep.space import check_space

            check_space(config)
        server, started = submit_job(submission, address, job_id, say)
    say(f"submitted {started} to {server.shown}, whose pages show it too")
    if no_wait:
        say(f"follow it: {_program()} jobs {started} --follow --address {server.shown}")
        if as_json:
            _print_json(server.job(started).as_json())
        return
    _follow(server, started, as_json)


def _parse(context: click.Context, command: tuple[str, ...]) -> tuple[str, dict[str, Any], Config, str]:
    """Another command, parsed as if it ran here: its name, its options, its configuration and the runs' name."""
    from pipeline.cluster.submit import JOBS

    first, *rest = command
    inner = cli.get_command(context, first) if first in JOBS else None
    if inner is None:
        raise click.UsageError(f"COMMAND: {first!r:.40} can't be submitted, choose {', '.join(JOBS)}")
    options = inner.make_context(first, list(rest), parent=context.parent).params
    placed_by = {key: options[key] for key in ("file", "overrides", "workers", "address")}
    config, name = _load(**placed_by)
    return first, options, config, name


def _follow(server: JobServer, job_id: str, as_json: bool) -> None:
    """Show a job's log until its end, and exit as it did; Ctrl-C leaves it running."""
    say = _say(as_json)

    def write(text: str) -> None:
        click.echo(text, nl=False, err=as_json)

    program, at = _program(), f"--address {server.shown}"
    attach = f"Attach again: {program} jobs {job_id} --follow {at}; end it: {program} stop {job_id} {at}"
    with _interruptible(f"detached, {job_id} runs on. {attach}"):
        try:
            job = server.follow(job_id, write)
        except KeyboardInterrupt:
            if as_json:
                _print_json(server.job(job_id).as_json())
            raise
    _say_end(job, say)
    if as_json:
        _print_json(job.as_json())
    raise click.exceptions.Exit(1 if job.exit_code is None else job.exit_code)


@contextmanager
def _interruptible(hint: str) -> Iterator[None]:
    """Inside, who interrupts is told this, not that the same command resumes."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(hint) from None


def _say_end(job: Job, say: Callable[[str], None]) -> None:
    reason = f": {job.message}" if job.message else ""
    again = "" if job.exit_code == 0 else "; submitted again, the same command resumes"
    say(f"{job.id}: {job.status}, exit code {job.exit_code}{reason}{again}")


def _say(as_json: bool) -> Callable[[str], None]:
    """What writes a line for people: on stderr where stdout is for a program."""
    return lambda text: click.echo(text, err=as_json)


@cli.command()
@click.argument("job_id", metavar="[ID]", required=False)
@served
@click.option(
    "--follow", is_flag=True, help="Show the job's log from the beginning, and return the job's exit code."
)
@json_option
def jobs(job_id: str | None, address: str, follow: bool, as_json: bool) -> None:
    """List the jobs of a cluster, or show or follow one of them.

    The newest job is listed first. After Ctrl-C (exit code 130) a followed job continues.
    """
    if follow and job_id is None:
        raise click.UsageError("--follow: say which job, istanas jobs ID --follow")
    from pipeline.cluster.job_server import JobServer
    from pipeline.cluster.job_tables import job_table, jobs_table

    server = JobServer(address)
    console = _console(as_json)
    if job_id is None:
        found = server.jobs()
        console.print(jobs_table(found) if found else "no jobs yet", crop=False)
        if as_json:
            _print_json({"jobs": [job.as_json() for job in found]})
        return
    job = server.job(job_id)
    if follow:
        _follow(server, job.id, as_json)
    console.print(job_table(job))
    if as_json:
        _print_json(job.as_json())


@cli.command()
@click.argument("job_id", metavar="ID")
@served
@json_option
def stop(job_id: str, address: str, as_json: bool) -> None:
    """Stop a job of a cluster and wait until it has ended.

    Its run directory is kept, and the same command resumes the run. Exit code 0: the job has ended.
    """
    from pipeline.cluster.job_server import SECONDS_TO_STOP, JobServer

    server, say = JobServer(address), _say(as_json)
    if server.job(job_id).exit_code is None:
        say(f"{job_id}: told to end, which may take {SECONDS_TO_STOP} s")
    with _interruptible(f"not waited for. How it is: {_program()} jobs {job_id} --address {server.shown}"):
        job, stopped = server.stop(job_id)
    if stopped:
        say(f"{job_id}: stopped; submitted again, the same command resumes")
    else:
        say(f"{job_id}: had ended before, {job.status} with exit code {job.exit_code}")
    if as_json:
        _print_json(job.as_json())


def _run_and_config(reference: str, file: str | None, overrides: tuple[str, ...]) -> tuple[RunDir, Config]:
    """A run, and the configuration that says which store it belongs in: the given file, else its own; with --set."""
    from pipeline.runs import bucket
    from pipeline.tracking.references import load_of_run, resolve_run

    config, _ = _load(file, overrides)
    run = resolve_run(
        reference, runs_dir=bucket.local(config.runtime.runs_dir), tracking_uri=config.tracking.uri
    )
    if file is None and (run.path / CONFIG_FILE).exists():
        config = load_of_run(run.path / CONFIG_FILE, run, overrides)
    return run, config


def _load_for_genotype(
    reference: str, console: Console, file: str | None, overrides: tuple[str, ...], **short: str | None
) -> tuple[Genotype, str | None, Config, str]:
    """What a retraining is of: genotype, directory of the run that found it, configuration and name of its runs."""
    from pipeline.config.load import default_file, load
    from pipeline.runs import bucket
    from pipeline.tracking.references import genotype_to_train, resolve_origin

    config, name = _load(file, overrides, **short)
    cells, parent = genotype_to_train(reference, config)
    runs_dir = bucket.local(config.runtime.runs_dir)
    origin = (
        resolve_origin(reference, runs_dir=runs_dir, tracking_uri=config.tracking.uri)
        if file is None
        else None
    )
    if origin is not None:
        sections = {
            section: getattr(origin.config, section).model_dump(mode="json")
            for section in ("data", "tracking")
        }
        config = load(default_file(), _overrides(overrides, **short), sections)
        _check_store_of(origin, config)
        name = config.tracking.name or origin.name
        root = f" in {config.data.root}" if config.data.root is not None else ""
        console.print(
            f"data ({config.data.name}{root}) and tracking settings are those of {origin.run}; the others are those of "
            f"{default_file().name}: give --config for other ones",
            highlight=False,
            soft_wrap=True,
        )
    return cells, parent, config, name


def _check_store_of(origin: Origin, config: Config) -> None:
    """Refuse a store that comes from another run's settings and whose folder is missing, as in a copied project.

    Raises:
        ConfigError: with the remedy. A new store in the old place would be found by nobody.
    """
    from pipeline.tracking.store import folder_is_missing, public_uri

    uri = config.tracking.uri
    if (
        config.tracking.enabled
        and uri is not None
        and uri == origin.config.tracking.uri
        and folder_is_missing(uri)
    ):
        raise ConfigError(
            f"tracking.uri is {public_uri(uri)}, a setting of {origin.run}: the folder of this MLflow store no longer "
            "exists; name a store with --set tracking.uri=URI"
        )


def _overrides(
    overrides: tuple[str, ...], workers: str | None = None, address: str | None = None
) -> tuple[str, ...]:
    """--set, and the options that are short for it."""
    short = {"workers": workers, "address": address}
    return overrides + tuple(f"runtime.{key}={json.dumps(v)}" for key, v in short.items() if v is not None)


def _load(
    file: str | None, overrides: tuple[str, ...], workers: str | None = None, address: str | None = None
) -> tuple[Config, str]:
    """Configuration and the name of its runs."""
    from pipeline.config.load import default_file, load
    from pipeline.tracking.references import load_of_run, run_of_config

    if file is not None and "://" in file:
        raise ConfigError(f"--config {without_secrets(file)!r:.80}: an address; give a file on this machine")
    path = default_file() if file is None else Path(file)
    given, run = _overrides(overrides, workers, address), run_of_config(path)
    config = load(path, given) if run is None else load_of_run(path, run, given)
    return config, config.tracking.name or _name_of(path, run)


def _name_of(path: Path, run: RunDir | None) -> str:
    """What runs of a configuration file are called: the file, or the run whose own configuration it is."""
    if run is None:
        return path.stem
    try:
        name = run.read().name
    except CheckpointError:  # the configuration is whole, and the name of a broken run is not needed
        return path.stem
    return name if run.path == path.absolute().parent else f"{name}-best"


def _write_csv(file: Path, text: str) -> None:
    """Write a table: a file whole or not at all, a pipe or device as it is."""
    from pipeline.base.files import atomic_write

    if file.is_dir():
        raise ConfigError(f"--csv {file}: a folder, name a file")
    if file.exists() and not file.is_file():
        file.write_text(text)
    else:
        atomic_write(file, text)


def _console(as_json: bool) -> Console:
    """For people: stdout, or stderr where stdout is for a program."""
    from rich.console import Console

    return Console(stderr=as_json, markup=False)  # names and paths may hold brackets


def _finish(
    result: Mapping[str, Any], as_json: bool, console: Console, config: Config, *, kind: str = "search"
) -> None:
    """The short table at the end of a job, and where everything lies; `kind` is that of the run it validates."""
    from rich.table import Table

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
        ("seconds", "seconds", lambda v: f"{v:.1f}"),
    ):
        if key in result:
            table.add_row(label, shown(result[key]))
    console.print(table)
    if "valid_top1" in result:
        console.print(terminal.validation_note(kind, config.method), highlight=False)
    runs = [bucket.local(result[key]) for key in ("run_dir", "retrain_run_dir") if key in result]
    pages = [run / REPORT_PAGE for run in runs if (run / REPORT_PAGE).exists()]  # to be opened: here
    where = [("report", str(page)) for page in pages]
    where += [
        (label, bucket.shown(runs[0] / n))
        for label, n in (("genotype", GENOTYPE_FILE), ("cell pictures", CELLS_FOLDER))
    ]
    if (runs[-1] / WEIGHTS_FILE).exists():
        where.append(("network", bucket.shown(runs[-1] / WEIGHTS_FILE)))
    for label, path in where:
        console.print(f"{label}: {path}", highlight=False, soft_wrap=True)
    _say_where(console, config)
    if as_json:
        _print_json(result)


def _say_where(console: Console, config: Config) -> None:
    """The MLflow store, and the commands that show it."""
    if not config.tracking.enabled:
        return
    from pipeline.tracking.store import public_uri, store_uri

    store = f" --set tracking.uri={public_uri(config.tracking.uri)}" if config.tracking.uri else ""
    for line in (
        f"MLflow store: {public_uri(store_uri(config.tracking.uri))}",
        f"browse it: {_program()} ui{store}",
        f"as a table: {_program()} results{store}",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def _finish_sweep(result: Mapping[str, Any], as_json: bool, console: Console, config: Config) -> None:
    """The best trial, and what to type next."""
    from rich.table import Table

    from pipeline.base.text import shown_value
    from pipeline.runs import bucket

    table = Table("figure", "value")
    table.add_row("best trial", str(result["best_trial"]))
    for key, value in result["settings"].items():
        table.add_row(f"  {key}", f"{value:.4g}" if isinstance(value, float) else shown_value(value))
    table.add_row("top-1 in search", f"{100 * result['valid_top1']:.2f} %")
    if "retrained_top1" in result:
        table.add_row("top-1 after retraining", f"{100 * result['retrained_top1']:.2f} %")
        tau = result["kendall_tau"]
        table.add_row("Kendall's tau of the two", "not defined" if tau is None else f"{tau:.2f}")
    for key, label in (
        ("params", "parameters"),
        ("macs", "multiply-adds"),
        ("epochs", "epochs of all trials"),
    ):
        table.add_row(label, f"{result[key]:,}")
    ended = f"{result['complete']} finished, {result['pruned']} stopped early, {result['failed']} failed"
    table.add_row("trials", ended)
    console.print(table)
    here, program = bucket.local(result["run_dir"]), _program()  # files to be opened, or named as such
    best = here / BEST_FOLDER
    for label, text in (
        ("report", here / REPORT_PAGE),
        ("all trials", bucket.shown(here / TRIALS_TABLE)),
        ("best", bucket.shown(best)),
        ("retrain it", f"{program} retrain --genotype {best}/{GENOTYPE_FILE} --config {best}/{CONFIG_FILE}"),
    ):
        console.print(f"{label}: {text}", highlight=False, soft_wrap=True)
    _say_where(console, config)
    if as_json:
        _print_json(result)


def _program() -> str:
    """What to type to call this program again: the bare name only where the shell finds it."""
    if shutil.which("istanas"):
        return "istanas"
    return f"{sys.executable} -m pipeline.cli" if sys.argv[0].endswith(".py") else sys.argv[0]


def _print_json(value: Mapping[str, Any]) -> None:
    click.echo(json.dumps(value))


def _printable(line: str) -> str:
    """A line in which nothing, such as the name of a stranger's file, commands the terminal.

    Example:
        >>> _printable("data.root: é\\x1b[2J is missing")
        'data.root: é\\\\x1b[2J is missing'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    for line in str(message).splitlines():
        click.echo(f"warning: {_printable(line)}", err=True)
