"""The commands that use a trained network: predict and evaluate."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli.options import (
    Command,
    complete_file,
    complete_folder,
    csv_option,
    json_option,
    run_options,
    store_options,
)
from pipeline.cli.output import (
    STDOUT,
    check_csv,
    console_for,
    print_json,
    printable,
    show_evaluation,
    write_csv,
)
from pipeline.jobs.settings import load_config, run_and_config


@click.command(cls=Command)
@click.argument("reference", metavar="RUN", shell_complete=complete_folder)
@click.argument("files", metavar="FILE|DIR...", nargs=-1, required=True, shell_complete=complete_file)
@csv_option("the predictions")
@store_options
@json_option
def predict(
    reference: str,
    files: tuple[str, ...],
    csv_file: Path | None,
    file: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Classify pictures with a trained network.

    RUN is a finished retraining or one-stage search (run directory, MLflow run id or unique name), an export folder, a
    file model.safetensors or model.onnx, or a registered model (models:/NAME@champion, models:/NAME/VERSION). Each
    picture is preprocessed as in training. A folder stands for all pictures in it and in its sub-folders. A file that
    cannot be used is one line on stderr; the others are predicted, and the exit code is 1.
    """
    check_csv(csv_file, as_json)
    config, _ = load_config(file, overrides)
    console = console_for(as_json or csv_file == STDOUT)
    from pipeline.jobs import predict as job

    name, predictor = job.find_predictor(reference, config)
    result = job.predict(
        name,
        predictor,
        list(job.picture_files(files)),
        complain=_complain,
    )
    predictions, broken = result["predictions"], result["broken"]
    if csv_file is not None:
        write_csv(csv_file, job.predictions_csv(predictions), len(predictions), console)
    elif predictions:
        console.print(job.predictions_table(predictions), crop=False)
    if as_json:
        print_json(result)
    if broken:
        console.print(f"{len(broken)} of {len(broken) + len(predictions)} files could not be used")
        raise click.exceptions.Exit(1)


def _complain(line: str) -> None:
    """Print a line about a file that cannot be used."""
    click.echo(f"error: {printable(line)}", err=True)


@click.command(cls=Command)
@click.argument("reference", metavar="RUN", shell_complete=complete_folder)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    shell_complete=complete_folder,
    help="Other pictures: a folder with a sub-folder for each class, or with such folders in test/ or val/.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the files about --data. Default: evaluation.",
)
@csv_option("the true and the predicted class of each picture")
@run_options
@json_option
def evaluate(
    reference: str,
    data: Path | None,
    out: Path | None,
    csv_file: Path | None,
    file: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure a trained network: accuracy, calibration, mistakes.

    RUN is a finished retraining or one-stage search (run directory, MLflow run id or unique name). It is measured on
    its test split, and the result is written to the run directory, its report and MLflow. With --data, RUN may be any
    network that istanas predict takes, and the files are written to the folder --out.
    """
    if out is not None and data is None:
        raise click.UsageError(
            "--out: without --data, the files are written to the run directory; leave it out"
        )
    check_csv(csv_file, as_json)
    console = console_for(as_json or csv_file == STDOUT)
    with_predictions = csv_file is not None
    from pipeline.jobs import evaluate as job
    from pipeline.jobs.evaluation import labelled_predictions_csv

    if data is None:
        run, config = run_and_config(reference, file, overrides)
        result = job.evaluate_run(run.path, config, console, with_predictions=with_predictions)
    else:
        from pipeline.jobs.context import say_to
        from pipeline.jobs.predict import find_predictor

        config, _ = load_config(file, overrides)
        out = Path("evaluation") if out is None else out
        job.check_folder(out)
        name, predictor = find_predictor(reference, config)
        say = say_to(console)
        result = job.evaluate_folder(
            name, predictor, data, out, complain=_complain, say=say, with_predictions=with_predictions
        )
    predictions = result.pop("predictions", [])
    show_evaluation(result, as_json, console)
    if csv_file is not None:
        write_csv(csv_file, labelled_predictions_csv(predictions), len(predictions), console)
    if result["broken"]:
        console.print(f"{len(result['broken'])} files could not be used", highlight=False)
        raise click.exceptions.Exit(1)


COMMANDS = (predict, evaluate)
