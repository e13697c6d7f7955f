"""The page of a benchmark: scores of the methods, comparisons, and the rank of each search over its epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from pipeline.base.files import atomic_write
from pipeline.base.text import duration, percent
from pipeline.report.html import add_axes, chart, chart_svg, epoch_axis
from pipeline.report.methods_page import colours_of, points, render_methods, with_interval
from pipeline.runs.layout import BENCHMARK_EPOCHS, BENCHMARK_PAGE, BENCHMARK_TABLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADINGS = ["method", "seeds", "true accuracy (%)", "deviation", "rank", "regret (points)", "seconds", "tau"]


def methods_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and one row of text for each method, for the terminal, the page and MLflow.

    Each mean is followed by its 95 % interval.

    Args:
        result: The figures of a `pipeline.jobs.benchmark.BenchmarkResult`.
    """
    rows = []
    for method in result["methods"]:
        tau = method["kendall_tau"]
        rows.append(
            [
                method["method"],
                str(method["seeds"]),
                with_interval(method["true_accuracy"], points),
                points(method["deviation"]),
                with_interval(method["rank"], "{:,.0f}".format),
                with_interval(method["regret"], points),
                with_interval(method["seconds"], "{:,.1f}".format),
                "" if tau is None else with_interval(tau, "{:.2f}".format),
            ]
        )
    return list(HEADINGS), rows


def runs_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and one row of text for each search, the best first.

    Args:
        result: The figures of a `pipeline.jobs.benchmark.BenchmarkResult`.
    """
    headings = ["method", "seed", "rank", "true accuracy", "regret", "validation", "time", "architecture"]
    rows = [
        [
            run["method"],
            str(run["seed"]),
            f"{run['rank']:,}",
            percent(run["true_accuracy"]),
            percent(run["regret"]),
            "" if run["valid_top1"] is None else percent(run["valid_top1"]),
            duration(run["seconds"]),
            run["architecture"],
        ]
        for run in sorted(result["runs"], key=lambda run: (run["rank"], run["method"], run["seed"]))
    ]
    return headings, rows


def table_note(result: Mapping[str, Any]) -> str:
    """Return a sentence about the table of true accuracies."""
    table = result["table"]
    return (
        f"The table has {table['rows']:,} architectures; rank 1 is the best, with {percent(table['best'])} "
        f"({table['column']}). A random architecture has an expected rank of {table['chance_rank']:,.0f} and an "
        f"expected accuracy of {percent(table['mean'])}."
    )


def tau_note(result: Mapping[str, Any]) -> str | None:
    """Return a sentence about the column "tau"; None if no method has it."""
    if all(method["kendall_tau"] is None for method in result["methods"]):
        return None
    return "Tau: Kendall's rank correlation of validation accuracy in the search and true accuracy, over the seeds."


def write_benchmark_page(
    folder: Path, name: str, dataset: str, result: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]
) -> None:
    """Write the page of a benchmark into its run directory.

    Args:
        folder: The run directory.
        name: Name of the run.
        dataset: Label of the data set.
        result: The figures of a `pipeline.jobs.benchmark.BenchmarkResult`.
        epochs: The rows of `pipeline.jobs.benchmark.BenchmarkEpoch`.
    """
    page = render_methods(
        folder,
        name,
        result,
        subtitle=f"Benchmark of {{methods}} on {dataset}",
        methods=methods_table(result),
        notes=[
            "Means over the seeds, each with its 95 % interval; the deviation is that of the true accuracy, in points.",
            *(note for note in (table_note(result), tau_note(result)) if note is not None),
        ],
        figure="ranks",
        figure_title="Rank over time",
        chart=_chart(colours_of(result), result["table"], epochs),
        caption="One line for each seed. The rank is that of the search's current architecture after each epoch.",
        runs_title="Searches",
        runs=runs_table(result),
        texts=(0, 7),
        files=[BENCHMARK_TABLE, BENCHMARK_EPOCHS],
    )
    atomic_write(folder / BENCHMARK_PAGE, page)


def _chart(
    colours: Mapping[str, str], table: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]
) -> Markup:
    """Draw the rank of the current architecture of each search over its epochs and over its seconds."""
    with chart(9.6, 3.8, left=0.08, right=0.99, top=0.83, bottom=0.14, wspace=0.18) as page:
        for place, unit in enumerate(("epoch", "seconds"), start=1):
            axes = add_axes(page, 1, 2, place, "rank of the current architecture", log=True)
            for method, colour in colours.items():
                own = [point for point in epochs if point["method"] == method]
                _draw(axes, own, unit, method, colour)
            axes.axhline(table["chance_rank"], color="#8d8a99", linestyle=":", linewidth=1.2, label="chance")
            axes.set_xlabel(unit)
            axes.set_ylim(table["rows"] * 1.3, 0.8)  # the best rank is at the top
            if unit == "epoch":
                epoch_axis(axes, 1, max(point["epoch"] for point in epochs))
                page.legend(*axes.get_legend_handles_labels(), loc="upper right", ncols=len(colours) + 1)
        return chart_svg(
            page, "ranks", "Rank of the current architecture of each search over epochs and seconds"
        )


def _draw(axes: Axes, points: Sequence[Mapping[str, Any]], unit: str, method: str, colour: str) -> None:
    """Draw one line for each seed of a method; only the first one is in the legend."""
    for number, seed in enumerate(dict.fromkeys(point["seed"] for point in points)):
        own = [point for point in points if point["seed"] == seed]
        axes.plot(
            [point[unit] for point in own],
            [point["rank"] for point in own],
            drawstyle="steps-post",
            color=colour,
            alpha=0.75,
            marker="o",
            markersize=3,
            label=f"_{seed}" if number else method,  # a leading underscore hides a line from the legend
        )
