"""The common parts of all HTML pages: templates, charts as inline SVG, and formatted values.

A page is a single file that loads nothing, so it opens from a disk and in MLflow's viewer, which blocks requests. The
viewer cannot open other files either, so MLflow receives pages without links to files.
"""

from __future__ import annotations

import base64
import functools
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup, escape

from istanas.space import Genotype, kind_title, space_of
from pipeline.base.text import duration, percent
from pipeline.runs.record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN = "#0b5fa5", "#b3400e", "#1b7a3d"  # visible on the white background of charts
# Text is not converted to paths, and ids are not random: equal figures give equal SVG.
_SVG: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "istanas"}
_STYLE: dict[Any, Any] = {
    **_SVG,
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 10.0,
    "lines.linewidth": 1.6,
}


def render(template: str, **values: Any) -> str:
    """Render a template of `pipeline/report/templates`; all values that are not `Markup` are escaped."""
    return _templates().get_template(template).render(**values)


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "duration": duration, "figure": figure}
    return environment


def figure(value: Any) -> str:
    """Format a setting or a number for a page: thousands are separated, floats have at most six digits.

    Example:
        >>> [figure(v) for v in (40482, 0.0030000000001, True, None, "cosine", 7)]
        ['40,482', '0.003', 'yes', 'none', 'cosine', '7']
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def job_title(record: RunRecord) -> str:
    """Return the job and the data set of a run, such as "Two-stage search on digits"."""
    search = f"{record.method.replace('_', '-')} search"
    kind = {"search": search, "retrain": "retraining", "sweep": "sweep"}[record.kind]
    return f"{kind[0].upper()}{kind[1:]} on {record.data_label}"


def kind_label(genotype: Genotype, kind: str) -> str:
    """Describe the kept operations of one kind of decisions, such as a cell, for screen readers.

    Args:
        genotype: The genotype.
        kind: The kind, such as "normal".

    Example:
        >>> picks = ((("skip_connect", 0), ("sep_conv_3x3", 1)),)
        >>> kind_label(Genotype(normal=picks, reduce=picks), "normal")
        'normal cell: node 0: skip_connect from c(k-2), sep_conv_3x3 from c(k-1)'
    """
    describe = space_of(genotype).describe_pick
    nodes = (", ".join(describe(*pick, word="from") for pick in node) for node in genotype.picks(kind))
    return f"{kind_title(kind)}: " + "; ".join(f"node {i}: {node}" for i, node in enumerate(nodes))


@contextmanager
def chart(width: float, height: float, **grid: float) -> Iterator[Figure]:
    """Yield an empty figure in the style of the pages. It must be drawn and converted to SVG inside the block.

    Args:
        width, height: The size in inches.
        grid: The arguments of `Figure.subplots_adjust`.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        page = Figure(figsize=(width, height), facecolor="white", dpi=72)  # A pixel is then a point of SVG.
        FigureCanvasAgg(page)
        page.subplots_adjust(**grid)
        yield page


def add_axes(page: Figure, rows: int, columns: int, number: int, title: str, *, log: bool = False) -> Axes:
    """Add axes with few ticks to a chart, because drawing ticks takes most of the time."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes = page.add_subplot(rows, columns, number)
    axes.set_title(title, y=1.0)  # Without y, matplotlib measures everything to place the title.
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return axes


def epoch_axis(axes: Axes, first: int, last: int) -> None:
    """Give axes whole epochs from the first to the last."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlim(first - 0.5, last + 0.5)


def chart_svg(chart: Figure, name: str, label: str) -> Markup:
    """Convert a figure to an SVG element of a page, see `inline_svg`. Equal figures give equal text."""
    import matplotlib

    content = io.StringIO()
    no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context(_SVG):
        chart.savefig(content, format="svg", metadata=no_metadata)
    return inline_svg(content.getvalue(), name, label)


def inline_svg(source: str, name: str, label: str) -> Markup:
    """Convert the text of an SVG file by matplotlib to an element of a page.

    Args:
        source: The text of the file, which must come from a trusted writer.
        name: A prefix that distinguishes the element's ids from those of other pictures on the page.
        label: The text for screen readers.

    Example:
        >>> print(inline_svg('<?xml?><svg id="a" width="5pt" height="5pt"><use href="#a"/></svg>', "loss", "a < b"))
        <svg role="img" aria-label="a &lt; b" id="loss-a"><use href="#loss-a"/></svg>
    """
    text = source[source.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(?<=[\s"])(id="|(?:xlink:)?href="#)', rf"\g<1>{name}-", text)
    text = text.replace("url(#", f"url(#{name}-")
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head).removeprefix("<svg")
    return Markup(f'<svg role="img" aria-label="{escape(label)}"{head}>{rest}')


def data_uri(png: bytes) -> str:
    """Return a PNG as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
