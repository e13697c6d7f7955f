"""The page of a comparison at equal cost: results and costs of the methods, their differences, and each run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.base.files import atomic_write
from pipeline.base.text import duration, percent
from pipeline.report.html import add_axes, chart, chart_svg
from pipeline.report.methods_page import colours_of, points, render_methods, with_interval
from pipeline.runs.layout import VERSUS_CELLS, VERSUS_PAGE, VERSUS_TABLE

HEADINGS = ["method", "seeds", "test accuracy (%)", "deviation", "cells", "seconds", "cost ratio"]
NOTE = (
    "Means over the seeds. Test accuracy and seconds have their 95 % intervals, the cost ratio its smallest and "
    "largest value. The deviation is that of the test accuracy, in points; cells is the number of retrained cells."
)


def methods_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and one row of text for each method, for the terminal, the page and MLflow.

    Args:
        result: The figures of a `pipeline.jobs.versus.VersusResult`.
    """
    rows = []
    for method in result["methods"]:
        ratio = method["cost_ratio"]
        ends = {"estimate": ratio["estimate"], "low": ratio["smallest"], "high": ratio["largest"]}
        rows.append(
            [
                method["method"],
                str(method["seeds"]),
                with_interval(method["test_top1"], points),
                points(method["deviation"]),
                f"{method['cells']:.1f}",
                with_interval(method["seconds"], "{:,.1f}".format),
                with_interval(ends, "{:.2f}".format),
            ]
        )
    return list(HEADINGS), rows


def runs_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and one row of text for each method and seed, seed by seed.

    Args:
        result: The figures of a `pipeline.jobs.versus.VersusResult`.
    """
    headings = [
        "method",
        "seed",
        "test accuracy",
        "hold-out",
        "cells",
        "search",
        "retraining",
        "cost ratio",
        "cell",
    ]
    rows = [
        [
            run["method"],
            str(run["seed"]),
            percent(run["test_top1"]),
            "" if run["valid_top1"] is None else percent(run["valid_top1"]),
            str(run["cells"]),
            duration(run["search_seconds"]),
            duration(run["retrain_seconds"]),
            f"{run['cost_ratio']:.3f}",
            run["architecture"],
        ]
        for run in result["runs"]
    ]
    return headings, rows


def write_versus_page(folder: Path, name: str, dataset: str, result: Mapping[str, Any]) -> None:
    """Write the page of a comparison at equal cost into its run directory.

    Args:
        folder: The run directory.
        name: Name of the run.
        dataset: Label of the data set.
        result: The figures of a `pipeline.jobs.versus.VersusResult`.
    """
    page = render_methods(
        folder,
        name,
        result,
        subtitle=f"Comparison of {{methods}} on {dataset} at equal cost",
        methods=methods_table(result),
        notes=[NOTE, *result["cost_sentences"]],
        figure="accuracies",
        figure_title="Test accuracy of each seed",
        chart=_chart(result),
        caption="Left: each line is a seed, and each bar is a mean with its 95 % interval. Right: the differences "
        "between the configured method and each other method, with the interval of their mean; above zero, the "
        "configured method is better.",
        runs_title="Results of each seed",
        runs=runs_table(result),
        texts=(0, 8),
        files=[VERSUS_TABLE, VERSUS_CELLS],
    )
    atomic_write(folder / VERSUS_PAGE, page)


def _chart(result: Mapping[str, Any]) -> Markup:
    """Draw the accuracies of all methods and seeds, and the differences from the configured method."""
    colours = colours_of(result)
    accuracies = {
        name: [100 * run["test_top1"] for run in result["runs"] if run["method"] == name] for name in colours
    }
    with chart(9.6, 3.8, left=0.08, right=0.99, top=0.9, bottom=0.1, wspace=0.2) as page:
        axes = add_axes(page, 1, 2, 1, "test accuracy, %")
        axes.plot(list(accuracies.values()), color="#b9b6c3", linewidth=0.8, zorder=1)
        for place, method in enumerate(result["methods"]):
            interval = {end: 100 * method["test_top1"][end] for end in ("estimate", "low", "high")}
            _draw(axes, place, accuracies[method["method"]], interval, colours[method["method"]])
        _name(axes, list(colours))
        axes = add_axes(page, 1, 2, 2, "difference, points of test accuracy")
        axes.axhline(0, color="#8d8a99", linestyle=":", linewidth=1.2)
        names = []
        for place, each in enumerate(result["comparisons"]):
            first, second = each["first"], each["second"]
            differences = [x - y for x, y in zip(accuracies[first], accuracies[second], strict=True)]
            _draw(axes, place, differences, each["difference"], colours[second])
            names.append(f"{first} - {second}")
        _name(axes, names)
        return chart_svg(
            page, "accuracies", "Test accuracy of each method and seed, and differences from the first method"
        )


def _draw(axes: Any, place: int, values: list[float], interval: Mapping[str, float], colour: str) -> None:
    """Draw values as dots, and beside them their mean with its interval."""
    axes.scatter([place] * len(values), values, color=colour, s=18, alpha=0.75, zorder=2)
    mean = interval["estimate"]
    error = [[mean - interval["low"]], [interval["high"] - mean]]
    axes.errorbar(place + 0.14, mean, yerr=error, color=colour, marker="s", markersize=5, capsize=4, zorder=3)


def _name(axes: Any, names: list[str]) -> None:
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.4)
    for label in axes.get_xticklabels():
        label.set_parse_math(False)  # A name may contain dollar signs.
    axes.grid(visible=False, axis="x")
