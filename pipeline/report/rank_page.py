"""The page of a comparison of judges: how well each ranks, and the scores of the cells against the truth."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from math import ceil, inf
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.base.files import atomic_write
from pipeline.base.text import count, percent
from pipeline.report.compare_page import COLOURS
from pipeline.report.html import add_axes, chart, chart_svg, render
from pipeline.runs.layout import RANK_PAGE, RANK_TABLE

HEADINGS = ["judge", "tau", "Spearman", "best found", "seconds", "search", "nats/min"]
COLUMNS = 3  # of the figure


def judges_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and one row of text for each judge, for the terminal, the page and MLflow.

    Args:
        result: The figures of a `pipeline.jobs.rank.RankResult`.
    """
    rows = [
        [
            each["judge"],
            _interval(each["tau"]),
            _interval(each["spearman"]),
            f"{100 * each['precision']:.0f} %",
            f"{each['seconds']:.1f}",
            f"{each['seconds_once']:.1f}" if each["seconds_once"] else "",
            f"{60 * each['information_per_second']:.3g}",
        ]
        for each in result["judges"]
    ]
    return list(HEADINGS), rows


def judges_note(result: Mapping[str, Any]) -> str:
    """Return sentences that explain the columns."""
    truth = "" if result["truth_seconds"] is None else f" ({result['truth_seconds']:.1f} s for a cell)"
    return (
        f"{result['cells']} random cells. The truth is the {result['truth']}{truth}. Tau and Spearman are rank "
        f"correlations with it, with 95 % intervals. Best found: the share of the best {count(result['top'], 'cell')} "
        f"that is also among the judge's best; by chance it is {percent(result['top'] / result['cells'])}. Search: "
        "seconds of the search whose weights are shared. Nats/min: the information of a measurement, divided by its "
        "time and its share of the search."
    )


def write_rank_page(folder: Path, name: str, dataset: str, result: Mapping[str, Any]) -> None:
    """Write the page of a comparison of judges into its run directory.

    Args:
        folder: The run directory.
        name: Name of the run.
        dataset: Label of the data set.
        result: The figures of a `pipeline.jobs.rank.RankResult`.
    """
    names = [each["judge"] for each in result["judges"]]
    page = render(
        "rank.html",
        title=name,
        subtitle=f"How well cheap measurements rank cells on {dataset}",
        footer=f"Run directory {folder.name}",
        judges=judges_table(result),
        note=judges_note(result),
        sentences=result["sentences"],
        colours=dict(zip(names, cycle(COLOURS), strict=False)),
        chart=_chart(names, result),
        file=RANK_TABLE,
    )
    atomic_write(folder / RANK_PAGE, page)


def _chart(names: list[str], result: Mapping[str, Any]) -> Markup:
    """Draw the score of each cell by each judge against its true accuracy."""
    scores: dict[str, dict[int, float | None]] = {}
    for row in result["judgements"]:
        scores.setdefault(row["judge"], {})[row["cell"]] = row["score"]
    true = scores["truth"]
    lines = ceil(len(names) / COLUMNS)
    margins = {"left": 0.07, "right": 0.98, "top": 1 - 0.1 / lines, "bottom": 0.18 / lines}
    with chart(9.6, 2.9 * lines, hspace=0.5, wspace=0.35, **margins) as page:
        for place, (name, colour) in enumerate(zip(names, cycle(COLOURS), strict=False), start=1):
            finite = {
                cell: score
                for cell, score in scores[name].items()
                if score is not None and true[cell] is not None
            }
            # Minus the loss has a sign of its own; an accuracy is shown in per cent.
            scale = 100 if min(finite.values(), default=-inf) >= 0 else 1
            axes = add_axes(page, lines, min(COLUMNS, len(names)), place, name.removesuffix(" statistics"))
            axes.scatter(
                [100 * (true[cell] or 0.0) for cell in finite],
                [scale * score for score in finite.values()],
                color=colour,
                s=18,
                alpha=0.8,
            )
            axes.set_xlabel("true accuracy, %")
            axes.set_ylabel("accuracy, %" if scale == 100 else "minus the loss")
        return chart_svg(page, "judges", "Score of each cell by each judge against its true accuracy")


def _interval(interval: Mapping[str, Any] | None) -> str:
    return (
        ""
        if interval is None
        else f"{interval['estimate']:.2f} ({interval['low']:.2f} to {interval['high']:.2f})"
    )
