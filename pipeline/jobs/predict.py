"""The prediction of the classes of picture files with a trained network."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import torch

from istanas.data.folders import pictures_below
from istanas.data.reading import PICTURE_SUFFIXES, shown
from istanas.data.request import GivenFolder
from istanas.errors import ConfigError, DataError
from pipeline.base.fitted_table import Column, FittedTable
from pipeline.config.schema import Config
from pipeline.jobs.export import check_network
from pipeline.jobs.settings import find_run
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.predictor import BATCH, TOP, Predictor, is_network, open_predictor
from pipeline.tracking.picture_model import REGISTERED, registered_predictor


class ClassProbability(TypedDict("ClassProbability", {"class": str})):
    """A class and its probability."""

    probability: float


class Prediction(ClassProbability):
    """The most probable class of a file, and the five most probable ones; fewer if the network has fewer."""

    file: str
    top5: list[ClassProbability]


class BrokenFile(TypedDict):
    """A file that cannot be used, and why."""

    file: str
    reason: str


class PredictResult(TypedDict):
    """Result of `predict`."""

    network: str
    predictions: list[Prediction]
    broken: list[BrokenFile]


def find_predictor(reference: str, config: Config) -> tuple[str, Predictor]:
    """Load the trained network that a reference names.

    Args:
        reference: A RUN, see `pipeline.tracking.references.resolve_run`; an export folder, a file model.safetensors or
            model.onnx; or a registered model, models:/NAME@ALIAS or models:/NAME/VERSION.
        config: The configuration, which names the folder of runs and the MLflow store in which run ids and registered
            models are looked up.

    Returns:
        The network's place as messages show it, and the network.

    Raises:
        ConfigError: The reference matches nothing, or a run without a trained network.
        CheckpointError: Files of the network are missing or broken.
    """
    if reference.startswith(REGISTERED):
        return reference, registered_predictor(reference, config.tracking.uri)
    path = Path(reference).expanduser()
    if not RunDir(path).exists() and is_network(path):
        return reference, open_predictor(path)
    run = find_run(reference, config)
    check_network(run, run.read())
    return bucket.shown(run.path), open_predictor(run.path)


def picture_files(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the given files, and all picture files in the given folders and their sub-folders, sorted by name.

    Raises:
        ConfigError: A folder contains no picture file.
        DataError: A folder cannot be read, or a link in it leads out of it.
    """
    for argument in arguments:
        if not os.path.isdir(argument):
            yield argument
            continue
        found = list(pictures_below(Path(argument), GivenFolder("FILE", "name")))
        if not found:
            raise ConfigError(
                f"{shown(argument)} contains no picture",
                field="FILE",
                remedy=f"name a folder with files such as {' '.join(sorted(PICTURE_SUFFIXES))}",
            )
        yield from found


def read_pictures(
    predictor: Predictor, files: Sequence[str], broken: list[BrokenFile], complain: Callable[[str], None]
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Yield the files in batches, each with the probabilities (B, K) of its pictures.

    Args:
        predictor: The network.
        files: The files, in order.
        broken: Receives each file that cannot be used, which is left out.
        complain: Receives one line for each of them.
    """
    for start in range(0, len(files), BATCH):
        names: list[str] = []
        pictures: list[torch.Tensor] = []
        for file in files[start : start + BATCH]:
            try:
                pictures.append(predictor.preprocessing.read(file))
            except DataError as error:
                complain(error.problem)
                broken.append({"file": file, "reason": error.problem})
            else:
                names.append(file)
        if pictures:
            yield names, predictor.probabilities(torch.stack(pictures))


def predict(
    name: str, predictor: Predictor, files: Sequence[str], *, complain: Callable[[str], None]
) -> PredictResult:
    """Predict the classes of picture files.

    Args:
        name: The network's place, for the result.
        predictor: The network.
        files: The files, see `picture_files`.
        complain: Receives one line for each file that cannot be used; the others are predicted.
    """
    result = PredictResult(network=name, predictions=[], broken=[])
    for names, probabilities in read_pictures(predictor, files, result["broken"], complain):
        for file, guesses in zip(names, predictor.guesses(probabilities), strict=True):
            top = [ClassProbability({"class": g.name, "probability": g.probability}) for g in guesses]
            result["predictions"].append({"file": file, **top[0], "top5": top})
    return result


def predictions_csv(predictions: Sequence[Prediction]) -> str:
    """Return predictions as CSV: file, class and probability, then the next four classes with theirs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    more = [f"{word}_{place}" for place in range(2, TOP + 1) for word in ("class", "probability")]
    writer.writerow(["file", "class", "probability", *more])
    for each in predictions:
        cells = [cell for guess in each["top5"] for cell in (guess["class"], guess["probability"])]
        writer.writerow([shown(each["file"]), *cells, *[""] * (2 * TOP - len(cells))])
    return text.getvalue()


def predictions_table(predictions: Sequence[Prediction]) -> FittedTable:
    """Return predictions as a table for the terminal."""
    columns = [
        Column("file"),
        Column("class"),
        Column("probability", right=True),
        Column("next classes", rank=1),
    ]
    rows = [
        [
            shown(each["file"]),
            shown(each["class"]),
            f"{each['probability']:.4f}",
            ", ".join(f"{shown(guess['class'])} {guess['probability']:.4f}" for guess in each["top5"][1:]),
        ]
        for each in predictions
    ]
    return FittedTable(columns, rows)
