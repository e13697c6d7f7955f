"""The commands for results: results, compare, ui, draw, export, promote and sync."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import click

from istanas.errors import IstanasError
from pipeline.cli.options import (
    Command,
    complete_file,
    complete_folder,
    complete_method,
    config_options,
    csv_option,
    json_option,
    run_options,
    store_options,
)
from pipeline.cli.output import STDOUT, check_csv, console_for, print_json, write_csv
from pipeline.config.choices import DEFAULT_METRIC, KINDS, METRICS, TOLERANCE_POINTS
from pipeline.jobs.settings import load_config, run_and_config


@click.command(cls=Command)
@click.option("--kind", type=click.Choice(KINDS), help="Show only runs of this kind.")
@click.option(
    "--method", metavar="NAME", shell_complete=complete_method, help="Show only runs of this search method."
)
@click.option("--dataset", metavar="NAME", help="Show only runs on this data set.")
@click.option(
    "--where",
    metavar="CONDITION",
    help="Show only runs that fulfil a condition in MLflow's syntax: "
    "'metrics.`test/top1` > 0.9 and params.seed = \"1\"'.",
)
@csv_option("the whole table")
@click.option(
    "--one-stage",
    is_flag=True,
    help="Compare the weights of one-stage searches with the same cells retrained from scratch.",
)
@click.option(
    "--sweep",
    "sweep_run",
    metavar="RUN",
    shell_complete=complete_folder,
    help="Show the trials of a sweep, with every swept setting.",
)
@store_options
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
    check_csv(csv_file, as_json)
    config, _ = load_config(file, overrides)
    console = console_for(as_json or csv_file == STDOUT)
    from pipeline import report
    from pipeline.report import terminal
    from pipeline.tracking.store import public_uri, store_exists, store_uri

    store = {"tracking_uri": config.tracking.uri, "experiment": config.tracking.experiment}
    if sweep_run is not None:
        from pipeline.report.trials import read_table, trials_table

        run, _ = run_and_config(sweep_run, file, overrides)
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
        write_csv(csv_file, frame.to_csv(index=False), len(frame), console)
    else:
        console.print(table, crop=False)
    if as_json:
        print_json({"results": json.loads(frame.to_json(orient="records", date_format="iso"))})


def _check_table(one_stage: bool, sweep_run: str | None, filters: Mapping[str, str | None]) -> None:
    """Reject options that do not apply to the requested table."""
    if one_stage and sweep_run is not None:
        raise click.UsageError("--one-stage and --sweep show different tables; give one of them")
    taken = {"dataset"} if one_stage else set() if sweep_run is not None else set(filters)
    for name, value in filters.items():
        if value is not None and name not in taken:
            table = "--one-stage takes --dataset only" if one_stage else "--sweep has all trials of one run"
            raise click.UsageError(f"--{name}: {table}, leave it out")


@click.command(cls=Command)
@click.argument("references", metavar="RUN RUN...", nargs=-1, shell_complete=complete_folder)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("compare"),
    show_default=True,
    help="Folder of the page and the figure.",
)
@store_options
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
    config, _ = load_config(file, overrides)
    console = console_for(as_json)
    from pipeline.jobs.compare import run_compare

    result = run_compare(config, references, out=out, console=console)
    if as_json:
        print_json(result)


@click.command(cls=Command)
@store_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=5000, show_default=True, help="Port; if it is in use, the next free one.")
@json_option
def ui(file: str | None, overrides: tuple[str, ...], host: str, port: int, as_json: bool) -> None:
    """Serve MLflow's web pages for the local store; Ctrl-C stops it."""
    config, _ = load_config(file, overrides)
    from pipeline.tracking.ui import announce_on_stdout, serve_ui

    def as_object(address: str, store: str, newest_run: str | None) -> None:
        print_json({"url": address, "store": store, "newest_run": newest_run})

    announce = as_object if as_json else announce_on_stdout
    code = serve_ui(tracking_uri=config.tracking.uri, host=host, port=port, announce=announce)
    raise click.exceptions.Exit(code)


@click.command(cls=Command)
@click.argument("reference", metavar="FILE|NAME|RUN|random:SEED|TEXT", shell_complete=complete_file)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("cells"),
    show_default=True,
    help="Folder of the figures.",
)
@config_options
@json_option
def draw(reference: str, out: Path, file: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Draw the cells of a genotype (SVG and PNG)."""
    config, _ = load_config(file, overrides)
    console = console_for(as_json)
    from istanas.draw import save_genotype_figures
    from pipeline.runs import bucket
    from pipeline.tracking.references import resolve_genotype

    genotype, _ = resolve_genotype(
        reference,
        space=config.space.build(),
        runs_dir=bucket.local(config.runtime.runs_dir),
        tracking_uri=config.tracking.uri,
    )
    files = save_genotype_figures(genotype, out)
    console.print(str(genotype), highlight=False, soft_wrap=True)
    for path in files:
        console.print(str(path), highlight=False, soft_wrap=True)
    if as_json:
        print_json(
            {"digest": genotype.digest(), "genotype": genotype.to_dict(), "files": [str(f) for f in files]}
        )


@click.command(cls=Command)
@click.argument("reference", metavar="RUN", shell_complete=complete_folder)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "int8"]),
    default="fp32",
    show_default=True,
    help="int8 also writes model.int8.onnx, quantised with training pictures, and compares size, latency and top-1 "
    "with those of model.onnx.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 100),
    metavar="POINTS",
    help="Largest loss of top-1 accuracy by int8, in percentage points; above it, the export is refused. "
    f"[default: {TOLERANCE_POINTS:g}]",
)
@run_options
@json_option
def export(
    reference: str,
    precision: Literal["fp32", "int8"],
    tolerance: float | None,
    file: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Export a trained network (safetensors, torch.export, ONNX).

    RUN is a finished one-stage search or retraining (run directory, MLflow run id or unique name). Each file is loaded
    again and compared with the network. The files are written to the folder export of the run, and to MLflow. The
    accuracy of int8 is measured on the hold-out if there is one, and otherwise on the test split.
    """
    if tolerance is not None and precision != "int8":
        raise click.UsageError("--tolerance: only --precision int8 changes the accuracy; leave it out")
    console = console_for(as_json)
    from pipeline.jobs.export import run_export

    run, config = run_and_config(reference, file, overrides)
    result = run_export(
        config,
        run.path,
        console=console,
        again=True,
        precision=precision,
        tolerance=tolerance,
    )
    if as_json:
        print_json(result)


@click.command(cls=Command, resumes=True)
@click.argument("reference", metavar="RUN", shell_complete=complete_folder)
@click.option(
    "--metric",
    type=click.Choice(METRICS),
    default=DEFAULT_METRIC,
    show_default=True,
    help="Metric to compare: top-1 and top-5 are better if higher, all others if lower. test/... chooses by the "
    "test split, which is then no longer a fair estimate of the champion's accuracy.",
)
@click.option("--force", is_flag=True, help="Move the alias regardless of the metric.")
@run_options
@json_option
def promote(
    reference: str, metric: str, force: bool, file: str | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Make a run's network the champion of its model if it is better.

    RUN is a finished one-stage search or retraining (run directory, MLflow run id or unique name). It is compared with
    the champion of its registered model on the same pictures; if there is no champion, it becomes the champion. Exit
    code 0: it is the champion; 1: it is not better, and nothing was changed; 2: the two cannot be compared, or RUN has
    no registered network.
    """
    console = console_for(as_json)
    from pipeline.runs import bucket
    from pipeline.tracking.promote import promote as move_alias

    run, config = run_and_config(reference, file, overrides)
    done = move_alias(run, config.tracking, metric=metric, force=force)
    model = f"{done.registered_model} version {done.version}"
    verdict = (
        "is the champion" if done.champion else f"is not promoted, version {done.before} is the champion"
    )
    console.print(f"{model} {verdict}: {done.reason}", highlight=False, soft_wrap=True)
    if done.moved and done.before is not None:
        console.print(f"the previous champion was version {done.before}", highlight=False, soft_wrap=True)
    if as_json:
        print_json({"run_dir": bucket.shown(run.path), **asdict(done)})
    if not done.champion:
        raise click.exceptions.Exit(1)


@click.command(cls=Command, resumes=True)
@click.argument("reference", metavar="RUN", shell_complete=complete_folder)
@run_options
@json_option
def sync(reference: str, file: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Send a run's missing records to MLflow; safe to run repeatedly.

    RUN is a run directory, an MLflow run id or a unique name.
    """
    console = console_for(as_json)
    from pipeline.runs import bucket
    from pipeline.tracking.tracker import MLflowTracker

    run_dir, config = run_and_config(reference, file, overrides)
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
            "could not be delivered to MLflow",
            field=bucket.shown(run_dir.path),
            remedy="start the store and try again",
        )
    sent = tracker.last_delivery
    assert sent is not None
    if run_dir.read().kind in ("sweep", "search"):
        from pipeline.jobs.closing import deliver_below

        if not deliver_below(run_dir.path, config):
            raise IstanasError(
                "not all runs in it could be delivered to MLflow",
                field=bucket.shown(run_dir.path),
                remedy="try again",
            )
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
        console.print(f"missing: {run_dir.path / name}", highlight=False, soft_wrap=True)
    if as_json:
        print_json({"run_dir": bucket.shown(run_dir.path), "mlflow_run_id": tracker.run_id})


COMMANDS = (results, compare, ui, draw, export, promote, sync)
