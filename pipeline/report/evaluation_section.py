"""The evaluation of a trained network as a section of a page, and as tables of the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from istanas.limits import TABLE_BYTES, read_at_most
from pipeline.base.text import count, percent
from pipeline.report.html import data_uri, render
from pipeline.runs.layout import EVALUATION_FILE, MISTAKES_FIGURE

MOST_CLASSES = 30
"""Largest number of classes of a confusion matrix that is shown; `evaluation.json` always has it."""


def evaluation_contents(folder: Path) -> dict[str, Any] | None:
    """Return the contents of the section for the evaluation in a folder; None if there is none."""
    if not (folder / EVALUATION_FILE).is_file():
        return None
    figures = json.loads(read_at_most(folder / EVALUATION_FILE, TABLE_BYTES))
    names = [each["name"] for each in figures["classes"]]
    shown = len(names) <= MOST_CLASSES
    picture = folder / MISTAKES_FIGURE
    return {
        "sentence": f"{count(figures['pictures'], 'picture')} of {figures['data']}. {NOTE}",
        "tiles": figure_rows(figures),
        "classes": class_table(figures),
        "confusion": _confusion_rows(names, figures["confusion"]) if shown else None,
        "mistakes": data_uri(picture.read_bytes()) if figures["mistakes"] and picture.is_file() else None,
        "mistakes_label": mistakes_label(figures),
        "mistake_rows": [
            (each["picture"], each["true"], each["predicted"], f"{each['probability']:.2f}")
            for each in figures["mistakes"]
        ],
    }


NOTE = (
    "The intervals are Wilson's with 95 %. The calibration error is the mean absolute difference between the "
    "probability of the predicted class and the share of correct predictions, in 15 bins."
)


def evaluation_page(folder: Path, title: str, subtitle: str) -> str:
    """Return the page of the evaluation in a folder."""
    return render(
        "evaluation.html",
        title=title,
        subtitle=subtitle,
        footer="",
        evaluation=evaluation_contents(folder),
    )


def figure_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return name and value of the figures of an evaluation.

    Example:
        >>> share = {"estimate": 0.9, "low": 0.85, "high": 0.934}
        >>> figure_rows({"top1": share, "top5": None, "calibration_error": 0.02, "n_mistakes": 3})
        [('top-1', '90.00 % (85.00 to 93.40)'), ('calibration error', '0.020'), ('mistakes', '3')]
    """
    rows = [
        (name, with_interval(figures[key]))
        for key, name in (("top1", "top-1"), ("top5", "top-5"))
        if figures[key] is not None
    ]
    return [
        *rows,
        ("calibration error", f"{figures['calibration_error']:.3f}"),
        ("mistakes", f"{figures['n_mistakes']:,}"),
    ]


def with_interval(share: Mapping[str, float]) -> str:
    """Return a share and its interval in per cent."""
    return f"{percent(share['estimate'])} ({100 * share['low']:.2f} to {100 * share['high']:.2f})"


def class_table(figures: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and one row of text for each class."""
    rows = [
        [
            each["name"],
            f"{each['pictures']:,}",
            percent(each["accuracy"]["estimate"]) if each["accuracy"] else "",
            f"{100 * each['accuracy']['low']:.2f} to {100 * each['accuracy']['high']:.2f}"
            if each["accuracy"]
            else "",
            each["taken_for"] or "",
        ]
        for each in figures["classes"]
    ]
    return ["class", "pictures", "accuracy", "interval (%)", "most often taken for"], rows


def confusion_lines(figures: Mapping[str, Any], width: int) -> list[str]:
    """Return the confusion matrix as lines of text, whose columns have the numbers of the classes.

    Args:
        figures: The figures of an evaluation.
        width: The width of the terminal; a matrix that does not fit is replaced by one line.

    Example:
        >>> figures = {"classes": [{"name": "ant"}, {"name": "bee"}], "confusion": [[9, 1], [0, 12]]}
        >>> print("\\n".join(confusion_lines(figures, 80)))
        confusion matrix, predicted classes in columns:
                0   1
        0 ant   9   1
        1 bee   0  12
    """
    names = [f"{place} {each['name']}" for place, each in enumerate(figures["classes"])]
    head, rows = max(map(len, names)), figures["confusion"]
    cell = max(len(str(number)) for row in [*rows, [len(names) - 1]] for number in row) + 2
    if head + cell * len(names) > width:
        return [f"the confusion matrix of {len(names)} classes does not fit; {EVALUATION_FILE} has it"]
    return [
        "confusion matrix, predicted classes in columns:",
        " " * head + "".join(f"{place:{cell}}" for place in range(len(names))),
        *(
            f"{name:{head}}" + "".join(f"{number:{cell}}" for number in row)
            for name, row in zip(names, rows, strict=True)
        ),
    ]


def mistakes_label(figures: Mapping[str, Any]) -> str:
    """Return a sentence about the mistakes that are shown."""
    number = len(figures["mistakes"])
    which = f"the {number} worst of {figures['n_mistakes']:,}" if number < figures["n_mistakes"] else "all"
    return f"Mistakes ({which}): the lower the probability of the true class, the worse."


def _confusion_rows(names: list[str], confusion: list[list[int]]) -> list[tuple[str, list[tuple[int, int]]]]:
    """Return each class with its row: each number, and the opacity of its cell in per cent.

    A number that is the whole row has 60, with which its text stays readable.
    """
    return [
        (name, [(number, round(60 * number / max(sum(row), 1))) for number in row])
        for name, row in zip(names, confusion, strict=True)
    ]
