"""The job of `istanas evaluate`: a trained network on its own test split, or on another folder of labelled pictures."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from rich.console import Console
from torch import Tensor

from istanas.data.folders import TEST_SPLITS, class_pictures
from istanas.data.reading import shown
from istanas.data.request import GivenFolder
from istanas.errors import ConfigError
from pipeline.base.files import atomic_write
from pipeline.config.schema import Config
from pipeline.jobs.closing import tracker_of
from pipeline.jobs.context import say_to
from pipeline.jobs.evaluation import (
    Evaluation,
    LabelledPrediction,
    evaluate,
    evaluate_dataset,
    write_evaluation,
)
from pipeline.jobs.export import check_network
from pipeline.jobs.lifecycle import load_data
from pipeline.jobs.predict import BrokenFile, read_pictures
from pipeline.report.evaluation_section import evaluation_page
from pipeline.report.run_page import write_report
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import EVALUATION_PAGE, REPORT_PAGE
from pipeline.runs.predictor import Predictor, open_predictor
from pipeline.training.compute import compute_for
from pipeline.training.pictures import check_same_pictures, data_digest, datasets_used


class EvaluateResult(TypedDict):
    """Result of `evaluate_run` and `evaluate_folder`; it has `predictions` if `with_predictions` is true."""

    network: str
    evaluation: Evaluation
    broken: list[BrokenFile]
    files: list[str]
    predictions: NotRequired[list[LabelledPrediction]]


def evaluate_run(
    run_dir: Path, config: Config, console: Console, *, with_predictions: bool = False
) -> EvaluateResult:
    """Evaluate the network of a run on its test split, and write the result to its directory, report and MLflow run.

    Args:
        run_dir: Run directory of a finished retraining or one-stage search.
        config: Its configuration.
        console: Where lines for the user are written.
        with_predictions: Whether the result has the predictions of all pictures.

    Raises:
        ConfigError: The run has no trained network, or is in use by another process.
        DataError: The pictures are missing or broken.
        CheckpointError: The pictures have changed since the run was started.
    """
    say = say_to(console)
    run = RunDir(run_dir)
    check_network(run, run.read())
    dataset = load_data(config, console)
    with run.lock(), bucket.acquired(run, say) as run:
        record = run.read()
        used = datasets_used(config, dataset, record.kind)
        check_same_pictures(record, dataset, data_digest(config, dataset, record.kind), used)
        predictor = open_predictor(run.path, compute_for(config.runtime).device)
        label = f"the test split of {record.data_label}"
        found, pictures = evaluate_dataset(predictor, dataset, label)
        files = write_evaluation(run.path, found.figures, pictures)
        write_report(run, record)
        artifacts = tuple(dict.fromkeys((*record.artifacts, *files, REPORT_PAGE)))
        run.write(dataclasses.replace(record, artifacts=artifacts))
        if not tracker_of(run, config).deliver():
            say(f"not in MLflow yet: deliver it with istanas sync {bucket.shown(run.path)}")
        run.push()
    paths = [bucket.shown(run.path / name) for name in (*files, REPORT_PAGE)]
    result = EvaluateResult(network=bucket.shown(run.path), evaluation=found.figures, broken=[], files=paths)
    if with_predictions:
        result["predictions"] = found.predictions
    return result


def evaluate_folder(
    name: str,
    predictor: Predictor,
    data: Path,
    out: Path,
    *,
    complain: Callable[[str], None],
    say: Callable[[str], None] = lambda line: None,
    with_predictions: bool = False,
) -> EvaluateResult:
    """Evaluate a network on a folder with one sub-folder of pictures for each class.

    Args:
        name: The network's place, for the result.
        predictor: The network.
        data: The folder; its sub-folder `test` or `val` is read if there is one, as in training.
        out: The folder of the results, which is created.
        complain: Receives one line for each file that cannot be used; the others are evaluated.
        say: Receives one line for each reason for which files are left out, as in training.
        with_predictions: Whether the result has the predictions of all pictures.

    Raises:
        ConfigError: The folder has no classes, a class that the network does not know, or no picture.
        DataError: A folder cannot be read, or a link in it leads out of it.
    """
    if are_training_pictures(Path(name), data):
        say(
            f"warning: {shown(str(data))} has the pictures of the training, so that its accuracy is too high; "
            "without --data, the test split is measured"
        )
    label_of = labelled_files(data, predictor.class_names, say)
    files = list(label_of)
    used: list[str] = []
    broken: list[BrokenFile] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for names, probabilities in read_pictures(predictor, files, broken, complain):
            used.extend(names)
            yield torch.tensor([label_of[file] for file in names]), probabilities
        if not used:
            raise ConfigError(
                "contains no picture that can be used", field=f"--data {data}", remedy="add some"
            )

    found = evaluate(shown(str(data)), predictor.class_names, batches(), lambda index: shown(used[index]))
    out.mkdir(parents=True, exist_ok=True)
    pictures = [predictor.preprocessing.read(used[index]) for index in found.worst]
    written = write_evaluation(out, found.figures, pictures)
    atomic_write(out / EVALUATION_PAGE, evaluation_page(out, "Evaluation", f"{name} on {shown(str(data))}"))
    paths = [str(out / file) for file in (*written, EVALUATION_PAGE)]
    result = EvaluateResult(network=name, evaluation=found.figures, broken=broken, files=paths)
    if with_predictions:
        result["predictions"] = found.predictions
    return result


def are_training_pictures(run: Path, data: Path) -> bool:
    """Return whether a folder is that of the pictures which a run was trained on, or its training split.

    Args:
        run: The run directory. Networks in other places do not name their pictures.
        data: The folder.
    """
    if not RunDir(run).exists():
        return False
    splits = [data / split for split in TEST_SPLITS]
    if any(split.is_dir() for split in splits):  # these are evaluated, and not used for training
        return False
    trained = [Path(use.source).resolve() for use in RunDir(run).read().datasets]
    return any(data.resolve() in (folder, folder / "train") for folder in trained)


def check_folder(out: Path) -> None:
    """Check that the results can be written, before the work for them.

    Raises:
        ConfigError: The path is not a folder, or its folder cannot be written.
    """
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(
            "cannot be written", field=f"--out {out}", remedy="name a folder that can be written"
        )


def labelled_files(data: Path, class_names: tuple[str, ...], say: Callable[[str], None]) -> dict[str, int]:
    """Return the pictures of a folder that a training would read, with the labels of their classes.

    Raises:
        ConfigError, DataError: See `evaluate_folder`.
    """
    field = f"--data {shown(str(data))}"
    remedy = "name a folder with one sub-folder of pictures for each class"
    if not data.is_dir():
        problem = "a file, not a folder" if data.exists() else "no such folder"
        raise ConfigError(problem, field=field, remedy=remedy)
    root = next((data / split for split in TEST_SPLITS if (data / split).is_dir()), data)
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise ConfigError("contains no folder of a class", field=field, remedy=remedy)
    for folder in folders:
        if folder.name not in class_names:
            raise ConfigError(
                f"{shown(folder.name)} is not a class of the network ({', '.join(class_names):.200})",
                field=field,
                remedy="rename or remove that folder",
            )
    labels: dict[str, int] = {}
    for folder in folders:
        files, left_out = class_pictures(folder, data, GivenFolder(field, "name"))
        labels.update(dict.fromkeys(files, class_names.index(folder.name)))
        for each in left_out:
            say(f"left out: {each}")
    return labels
