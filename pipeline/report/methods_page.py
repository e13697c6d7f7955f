"""The common parts of the pages that compare methods over several seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.report.compare_page import COLOURS
from pipeline.report.html import render

Table = tuple[list[str], list[list[str]]]
"""Headings and rows of text; the first column of a row names the method."""


def colours_of(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the colour of each method.

    Example:
        >>> colours_of({"methods": [{"method": "two_stage"}, {"method": "random"}]})
        {'two_stage': '#0072b2', 'random': '#d55e00'}
    """
    names = [method["method"] for method in result["methods"]]
    return dict(zip(names, cycle(COLOURS), strict=False))


def render_methods(
    folder: Path,
    name: str,
    result: Mapping[str, Any],
    *,
    subtitle: str,
    methods: Table,
    notes: Sequence[str],
    figure: str,
    figure_title: str,
    chart: Markup,
    caption: str,
    runs_title: str,
    runs: Table,
    texts: Sequence[int],
    files: Sequence[str],
) -> str:
    """Return a page that compares methods.

    Args:
        folder: The run directory.
        name: Name of the run.
        result: The figures, with the keys "methods" and "sentences".
        subtitle: The subtitle, in which "{methods}" stands for the names of the methods.
        methods: A row for each method.
        notes: Sentences about this table.
        figure, figure_title, chart, caption: Id, title, contents and caption of the figure.
        runs_title: Title of the table of runs.
        runs: A row for each run.
        texts: Places of the columns of this table that are not numbers.
        files: The files with the same contents.
    """
    colours = colours_of(result)
    return render(
        "methods.html",
        title=name,
        subtitle=subtitle.format(methods=", ".join(colours)),
        footer=f"Run directory {folder.name}",
        colours=colours,
        methods=methods,
        notes=notes,
        sentences=result["sentences"],
        figure_id=figure,
        figure_title=figure_title,
        chart=chart,
        caption=caption,
        runs_title=runs_title,
        runs=runs,
        texts=texts,
        files=files,
    )


def points(fraction: float) -> str:
    """Return a fraction in per cent, without the sign.

    Example:
        >>> points(0.9312)
        '93.12'
    """
    return f"{100 * fraction:.2f}"


def with_interval(interval: Mapping[str, Any], show: Callable[[float], str]) -> str:
    """Return an estimate with its interval.

    Example:
        >>> with_interval({"estimate": 0.93, "low": 0.92, "high": 0.94}, points)
        '93.00 (92.00 to 94.00)'
    """
    return f"{show(interval['estimate'])} ({show(interval['low'])} to {show(interval['high'])})"
