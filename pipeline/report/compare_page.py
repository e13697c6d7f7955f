"""A comparison of runs: a self-contained HTML page, and the same content as one picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

from markupsafe import Markup

from istanas.draw import draw_graph
from istanas.space import Genotype, kind_title, space_of
from pipeline.report.html import chart_svg, kind_label, render
from pipeline.report.run_reader import ReadRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = "compare.html"
# Distinguishable with colour blindness (Okabe and Ito), and dark enough on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#b8860b", "#56a0d3", "#333333")
_DASHES = ("-", "--", ":", "-.")
_PANELS = {
    "train/loss": "training loss",
    "train/top1": "training top-1, %",
    "valid/top1": "validation top-1, %",
    "test/top1": "test top-1, %",
    "train/top5": "training top-5, %",
    "valid/top5": "validation top-5, %",
    "test/top5": "test top-5, %",
}


@dataclass(frozen=True)
class Curves:
    """The curves of all runs, as a picture and as an element of a page."""

    png: bytes
    svg: Markup


def draw_curves(runs: Sequence[ReadRun]) -> Curves:
    """Draw the curves of all runs, with a panel for each metric that any of them has.

    Args:
        runs: The runs, numbered from 1 in the legend.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = {metric: title for metric, title in _PANELS.items() if any(run.points(metric) for run in runs)}
    columns = min(2, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(9, 3 * rows + 0.24 * len(runs) + 0.3), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    lines = {}
    for place, (metric, title) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, place, xlabel="epoch", ylabel=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        scale = 100 if metric.endswith(("top1", "top5")) else 1
        for number, (run, (colour, dash)) in enumerate(zip(runs, _styles(len(runs)), strict=True), start=1):
            points = run.points(metric)
            if points:
                epochs, values = [epoch for epoch, _ in points], [scale * value for _, value in points]
                marker = "o" if len(points) < 30 else None
                (lines[number],) = axes.plot(epochs, values, dash, color=colour, marker=marker, markersize=3)
    if lines:
        names = [f"{number}  {runs[number - 1].label}" for number in sorted(lines)]
        handles = [lines[number] for number in sorted(lines)]
        legend = figure.legend(handles, names, loc="outside lower left", frameon=False, fontsize=9)
        for text in legend.get_texts():
            text.set_parse_math(False)  # A name may contain dollar signs.
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, metadata={"Software": None})
    return Curves(content.getvalue(), chart_svg(figure, "curves", "Curves of all runs over the epochs"))


def render_page(
    headings: Sequence[str],
    table: Sequence[Sequence[str]],
    differing: Mapping[str, Sequence[str | None]],
    notes: Sequence[str],
    genotypes: Sequence[Genotype | None],
    curves: Curves,
) -> str:
    """Return the page as HTML.

    Args:
        headings: The headings of the table of results.
        table: A row for each run, which starts with its number and name.
        differing: Setting -> its value in each run.
        notes: Sentences below the table.
        genotypes: The genotype of each run, or `None`. One that several runs share is drawn once.
        curves: The curves that `draw_curves` returns.
    """
    runs_of: dict[str | None, list[int]] = {}
    for place, genotype in enumerate(genotypes):
        runs_of.setdefault(None if genotype is None else genotype.digest(), []).append(place)
    cells = []
    for digest, places in runs_of.items():
        genotype = genotypes[places[0]]
        # Cells are drawn again, because the pictures in a run directory may come from an untrusted source.
        figures = [] if genotype is None else [_cell(genotype, kind) for kind in genotype.kinds]
        cells.append({"runs": places, "digest": digest, "figures": figures})
    return render(
        TEMPLATE,
        title=f"Comparison of {len(table)} runs",
        subtitle=None,
        footer=None,
        headings=headings,
        table=table,
        colours=[colour for colour, _ in _styles(len(table))],
        differing=differing,
        notes=notes,
        cells=cells,
        curves=curves.svg,
    )


def draw_whole(
    headings: Sequence[str],
    table: Sequence[Sequence[str]],
    differing: Mapping[str, Sequence[str | None]],
    genotypes: Sequence[Genotype | None],
    curves: Curves,
) -> bytes:
    """Return the comparison as one PNG: results, different settings, curves, and the cells side by side.

    Args:
        headings, table, differing, genotypes, curves: As in `render_page`.
    """
    from PIL import Image

    strips = [[_table_png(headings, table)]]
    if differing:
        numbers = [str(number) for number in range(1, len(table) + 1)]
        settings = [[key, *(value or "" for value in values)] for key, values in differing.items()]
        strips.append([_table_png(["setting", *numbers], settings)])
    strips.append([curves.png])
    for number, genotype in enumerate(genotypes, start=1):
        if genotype is not None:
            titles = {kind: f"{number}: {kind_title(kind)}" for kind in genotype.kinds}
            strips.append([_png(_figure_of(genotype, kind, title)) for kind, title in titles.items()])
    rows = [[Image.open(io.BytesIO(png)) for png in strip] for strip in strips]
    width = max(sum(image.width for image in row) for row in rows)
    whole = Image.new("RGB", (width, sum(max(i.height for i in row) for row in rows)), "white")
    top = 0
    for row in rows:
        left = (width - sum(image.width for image in row)) // 2
        for image in row:
            whole.paste(image, (left, top))
            left += image.width
        top += max(image.height for image in row)
    content = io.BytesIO()
    whole.save(content, format="png", optimize=True)
    return content.getvalue()


def _table_png(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.28 * (len(rows) + 1) + 0.3), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.02, 0.0, 0.96, 1.0))
    axes.set_axis_off()
    drawn = axes.table(
        cellText=[list(row) for row in rows], colLabels=list(headings), loc="center", cellLoc="left"
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    drawn.auto_set_column_width(list(range(len(headings))))
    for cell in drawn.get_celld().values():
        cell.set_edgecolor("#d9dde3")
        cell.get_text().set_parse_math(False)  # A name may contain dollar signs.
    return _png(figure)


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    return content.getvalue()


def _styles(n: int) -> list[tuple[str, str]]:
    """Return a colour and a dash pattern for each of n runs, different for up to 28 runs."""
    colours = cycle(COLOURS)
    return [(next(colours), _DASHES[i // len(COLOURS) % len(_DASHES)]) for i in range(n)]


def _cell(genotype: Genotype, kind: str) -> Markup:
    figure = _figure_of(genotype, kind, kind_title(kind))
    return chart_svg(figure, f"{genotype.digest()[:8]}-{kind}", kind_label(genotype, kind))


def _figure_of(genotype: Genotype, kind: str, title: str) -> Figure:
    return draw_graph(space_of(genotype).drawing(genotype)[kind], title=title)
