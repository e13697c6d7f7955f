"""The figures of an evaluation against scikit-learn and numbers worked out by hand."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from istanas.errors import ConfigError
from pipeline.jobs.evaluate import are_training_pictures, labelled_files
from pipeline.jobs.evaluation import WORST, Evaluation, evaluate
from pipeline.report.mistakes import draw_mistakes
from pipeline.runs.record import DatasetUse
from tests.pipeline.jobs.test_export import make_run

NAMES = tuple("abcdefghijkl")  # more than ten classes have a top-5 accuracy


def random_figures(n: int = 300) -> tuple[np.ndarray, np.ndarray, Evaluation, list[int]]:
    """Return labels (the last class has none), probabilities, and their evaluation in batches of 64."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(NAMES) - 1, n)
    logits = rng.normal(size=(n, len(NAMES))) + 1.5 * np.eye(len(NAMES))[labels]
    values = torch.from_numpy(logits).softmax(1)
    parts = torch.arange(n).split(64)
    batches = ((torch.from_numpy(labels)[part], values[part]) for part in parts)
    found = evaluate("some pictures", NAMES, batches, lambda index: f"picture {index}")
    assert [each["predicted"] for each in found.predictions] == [NAMES[i] for i in values.argmax(1)]
    return labels, values.numpy(), found.figures, found.worst


def test_the_figures_are_those_of_scikit_learn() -> None:
    labels, values, figures, _ = random_figures()
    places = list(range(len(NAMES)))
    assert figures["confusion"] == confusion_matrix(labels, values.argmax(1), labels=places).tolist()
    for key, k in (("top1", 1), ("top5", 5)):
        share = figures[key]  # type: ignore[literal-required]
        assert share["estimate"] == pytest.approx(top_k_accuracy_score(labels, values, k=k, labels=places))
        assert share["low"] < share["estimate"] < share["high"]
    assert figures["n_mistakes"] == int((labels != values.argmax(1)).sum())
    for place, each in enumerate(figures["classes"][:-1]):
        assert each["accuracy"] is not None
        chosen = labels == place
        assert each["accuracy"]["estimate"] == pytest.approx((values[chosen].argmax(1) == place).mean())
    assert figures["classes"][-1]["accuracy"] is None  # a class without pictures


def test_the_worst_mistakes_have_the_least_likely_true_classes() -> None:
    labels, values, figures, worst = random_figures()
    of_truth = values[np.arange(len(labels)), labels]
    wrong = np.flatnonzero(labels != values.argmax(1))
    assert len(worst) == WORST < len(wrong)
    assert worst == sorted(wrong.tolist(), key=lambda index: of_truth[index])[:WORST]
    first = figures["mistakes"][0]
    assert first["picture"] == f"picture {worst[0]}"
    assert first["true"] == NAMES[labels[worst[0]]]
    assert first["predicted"] == NAMES[values[worst[0]].argmax()]
    assert first["probability"] == pytest.approx(values[worst[0]].max())


def test_a_file_in_the_place_of_a_folder_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("")
    with pytest.raises(
        ConfigError, match=r"note\.txt: a file, not a folder; name a folder with one sub-folder"
    ):
        labelled_files(tmp_path / "note.txt", NAMES, lambda line: None)


def test_the_grid_has_a_cell_for_each_picture() -> None:
    pictures = [np.full((3, 4, 8), 10 * number, np.uint8) for number in range(7)]
    lines = [("a class with quite a long name", "bee", 0.5)] * 7
    grid = Image.open(io.BytesIO(draw_mistakes(pictures, lines)))
    assert grid.getpixel((12, 12)) == (0, 0, 0)
    assert grid.getpixel((12 + 140, 12)) == (10, 10, 10)
    assert grid.getpixel((12 + 140, 12 + 176)) == (60, 60, 60)
    assert grid.getpixel((12 + 140 * 2, 12 + 176)) == (255, 255, 255)


def test_pictures_of_the_training_are_recognised(tmp_path: Path) -> None:
    """Their accuracy is too high. Where a folder has a test split, that is evaluated."""
    photos = tmp_path / "photos"
    run = make_run(tmp_path / "run", kind="retrain", method="two_stage")
    use = DatasetUse("photos", "training", "0" * 16, str(photos), 8, 2, (3, 8, 8), ())
    run.write(replace(run.read(), datasets=(use,)))
    (photos / "train").mkdir(parents=True)
    assert are_training_pictures(run.path, photos)
    assert are_training_pictures(run.path, photos / "train")
    assert not are_training_pictures(run.path, tmp_path / "others")
    assert not are_training_pictures(tmp_path / "export", photos)
    (photos / "test").mkdir()
    assert not are_training_pictures(run.path, photos)
    assert are_training_pictures(run.path, photos / "train")
