"""The evaluation of a trained network on labelled pictures: accuracies, calibration, confusion and worst mistakes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from istanas.data import FilePictures, ImageDataset, Pictures, Preprocessing
from istanas.data.reading import shown
from istanas.nets import TargetNetwork, to_channels_last
from istanas.statistics import Interval, expected_calibration_error, wilson_interval
from istanas.training import TOP5_ABOVE
from pipeline.base.files import atomic_write
from pipeline.report.mistakes import draw_mistakes
from pipeline.runs.layout import EVALUATION_FILE, MISTAKES_FIGURE
from pipeline.runs.predictor import BATCH, TOP, Predictor

WORST = 20
MOST_MACS = 10**12
"""Multiply-adds of an evaluation at the end of a training, which takes at most about two minutes on one core."""


class Share(TypedDict):
    """A share of pictures with its 95 % interval by Wilson's formula."""

    estimate: float
    low: float
    high: float


class ClassFigures(TypedDict):
    """The figures of one class; `accuracy` is the share of its pictures that are recognised, None without pictures."""

    name: str
    pictures: int
    correct: int
    accuracy: Share | None
    taken_for: str | None


class LabelledPrediction(TypedDict):
    """A picture, its true and its predicted class, and the probabilities of both, in [0, 1].

    `picture` is its file: as it was given, or relative to the root of the data set. A picture without a file of its own
    is "test picture N", where N is its place in the test split, from 0.
    """

    picture: str
    true: str
    predicted: str
    probability: float
    true_probability: float


class Evaluation(TypedDict):
    """Figures of a network on labelled pictures.

    `confusion[i][j]` is the number of pictures of class i that were predicted as class j. The mistakes are the worst
    ones: those whose true class has the lowest probability.
    """

    data: str
    pictures: int
    top1: Share
    top5: Share | None
    calibration_error: float
    classes: list[ClassFigures]
    confusion: list[list[int]]
    mistakes: list[LabelledPrediction]
    n_mistakes: int


class EvaluatedPictures(NamedTuple):
    """The figures of a network, and its prediction of each picture.

    Args:
        figures: The figures.
        predictions: The predictions, in the order of the pictures.
        worst: The indices of the pictures of the worst mistakes.
    """

    figures: Evaluation
    predictions: list[LabelledPrediction]
    worst: list[int]


def evaluate(
    data: str,
    class_names: Sequence[str],
    batches: Iterable[tuple[Tensor, Tensor]],
    name_of: Callable[[int], str],
) -> EvaluatedPictures:
    """Compute the figures of a network from its probabilities.

    Args:
        data: Name of the pictures.
        class_names: Names of the K classes.
        batches: Labels (B,) int64 and probabilities (B, K), at least one picture in all.
        name_of: Returns the name of the picture with an index; called when all batches were read.
    """
    # Only five numbers are kept for each picture: all probabilities of ImageNet's 50,000 would take 400 MB.
    kept: list[tuple[Tensor, ...]] = []
    for labels, batch in batches:
        top, places = batch.topk(min(TOP, batch.shape[1]), dim=1)
        among = (places == labels[:, None]).any(1)
        kept.append((labels, places[:, 0], top[:, 0], among, batch.gather(1, labels[:, None])[:, 0]))
    truth, predicted, confidence, among_top, of_truth = (
        torch.cat(part).numpy() for part in zip(*kept, strict=True)
    )
    count = len(class_names)
    correct = predicted == truth
    # As sklearn.metrics.confusion_matrix, whose import takes a second.
    confusion = np.bincount(truth * count + predicted, minlength=count**2).reshape(count, count)
    wrong = np.flatnonzero(~correct)
    worst = wrong[np.argsort(of_truth[wrong], kind="stable")][:WORST].tolist()
    predictions = [
        LabelledPrediction(
            picture=name_of(index),
            true=class_names[truth[index]],
            predicted=class_names[predicted[index]],
            probability=float(confidence[index]),
            true_probability=float(of_truth[index]),
        )
        for index in range(len(truth))
    ]
    figures = Evaluation(
        data=data,
        pictures=len(truth),
        top1=_share(int(correct.sum()), len(truth)),
        top5=_share(int(among_top.sum()), len(truth)) if count > TOP5_ABOVE else None,
        calibration_error=expected_calibration_error(np.clip(confidence, 0, 1), correct),
        classes=[_class_figures(place, class_names, confusion) for place in range(count)],
        confusion=confusion.tolist(),
        mistakes=[predictions[index] for index in worst],
        n_mistakes=len(wrong),
    )
    return EvaluatedPictures(figures, predictions, worst)


def _share(successes: int, n: int) -> Share:
    interval: Interval = wilson_interval(successes, n)
    return Share(estimate=interval.estimate, low=interval.low, high=interval.high)


def _class_figures(place: int, class_names: Sequence[str], confusion: NDArray[np.int64]) -> ClassFigures:
    row = confusion[place]
    pictures, correct = int(row.sum()), int(row[place])
    others = np.where(np.arange(len(row)) == place, 0, row)
    return ClassFigures(
        name=class_names[place],
        pictures=pictures,
        correct=correct,
        accuracy=_share(correct, pictures) if pictures else None,
        taken_for=class_names[int(others.argmax())] if others.any() else None,
    )


def evaluate_dataset(
    predictor: Predictor, dataset: ImageDataset, data: str
) -> tuple[EvaluatedPictures, list[Tensor]]:
    """Evaluate a network on the test split of a data set.

    Returns:
        The evaluation, and the pictures (C, H, W) uint8 of the worst mistakes.
    """
    test = dataset.test

    def name_of(index: int) -> str:
        name = test.name(index)
        return f"test picture {index}" if name is None else shown(name)

    parts = torch.arange(len(test)).split(BATCH)
    steps = predictor.preprocessing
    batches = ((test.labels[part], predictor.probabilities(pictures_at(test, part, steps))) for part in parts)
    found = evaluate(data, predictor.class_names, batches, name_of)
    worst = torch.tensor(found.worst, dtype=torch.int64)
    return found, list(pictures_at(test, worst, steps)) if len(worst) else []


def pictures_at(pictures: Pictures, indices: Tensor, steps: Preprocessing) -> Tensor:
    """Return pictures of a data set as a network takes them before normalisation.

    Args:
        pictures: The split of the data set that contains them.
        indices: (N,) int64, N >= 1.
        steps: The preprocessing of the network, which reads large pictures from their files.

    Returns:
        (N, C, H, W) uint8.
    """
    if isinstance(pictures, FilePictures):
        return torch.stack([steps.read(source) for source in pictures.sources(indices)])
    return pictures.images[indices]


def labelled_predictions_csv(predictions: Iterable[LabelledPrediction]) -> str:
    """Return predictions as CSV, with a row for each picture and the fields of `LabelledPrediction` as columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(LabelledPrediction.__annotations__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(predictions)
    return text.getvalue()


def write_evaluation(folder: Path, figures: Evaluation, pictures: Sequence[Tensor]) -> tuple[str, ...]:
    """Write figures as JSON and the pictures of the worst mistakes as a PNG, and return the names of the files."""
    atomic_write(folder / EVALUATION_FILE, json.dumps(figures, indent=1) + "\n")
    if not pictures:
        (folder / MISTAKES_FIGURE).unlink(missing_ok=True)
        return (EVALUATION_FILE,)
    lines = [(each["true"], each["predicted"], each["probability"]) for each in figures["mistakes"]]
    atomic_write(folder / MISTAKES_FIGURE, draw_mistakes([picture.numpy() for picture in pictures], lines))
    return (EVALUATION_FILE, MISTAKES_FIGURE)


def evaluate_trained(
    folder: Path, net: TargetNetwork, dataset: ImageDataset, data: str, macs: int, say: Callable[[str], None]
) -> tuple[str, ...]:
    """Evaluate the network of a training on the test split, unless that would take minutes on this machine's CPU.

    Args:
        folder: The run directory.
        net: The network, in eval mode, on the CPU.
        dataset: The data set.
        data: Its label.
        macs: Multiply-adds of the network for one picture.
        say: Receives a line if the network is not evaluated.

    Returns:
        The names of the files that were written.
    """
    if macs * len(dataset.test) > MOST_MACS:
        say(f"the report has no evaluation, which would take minutes: add it with istanas evaluate {folder}")
        return ()
    predictor = Predictor(to_channels_last(net), dataset.preprocessing, dataset.class_names)
    found, pictures = evaluate_dataset(predictor, dataset, data)
    return write_evaluation(folder, found.figures, pictures)
