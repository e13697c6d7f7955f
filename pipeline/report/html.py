"""What all pages share: templates that escape, charts as SVG inside the page, figures written for people.

A page is one file that loads nothing: it opens from a disk, and in MLflow's own viewer, which allows no request. That
viewer does not open another file either, so MLflow receives pages without the links to files that they have on a disk.
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

from pipeline.base.text import duration, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN = "#0b5fa5", "#b3400e", "#1b7a3d"  # on the charts' white ground
# Text stays text, and no random id makes two equal figures differ.
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
    """A page from one of `pipeline/report/templates`; what is no `Markup` is escaped."""
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
    """A setting or a figure for people: thousands separated, and no more digits than say something.

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


@contextmanager
def chart(width: float, height: float, **grid: float) -> Iterator[Figure]:
    """A figure of this size in inches, in the pages' style; draw it and turn it into SVG inside the block.

    Args:
        width, height: inches.
        grid: what `Figure.subplots_adjust` takes.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        page = Figure(figsize=(width, height), facecolor="white", dpi=72)  # a pixel is a point of SVG
        FigureCanvasAgg(page)
        page.subplots_adjust(**grid)
        yield page


def add_axes(page: Figure, rows: int, columns: int, number: int, title: str, *, log: bool = False) -> Axes:
    """Axes of a chart; what is drawn of their ticks is what is needed, because drawing ticks is what takes time."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes = page.add_subplot(rows, columns, number)
    axes.set_title(title, y=1.0)  # else everything is measured to find out where it fits
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return axes


def epoch_axis(axes: Axes, first: int, last: int) -> None:
    """Whole epochs from the first to the last."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlim(first - 0.5, last + 0.5)


def chart_svg(chart: Figure, name: str, label: str) -> Markup:
    """A figure as an element of a page, see `inline_svg`; equal figures give equal text."""
    import matplotlib

    content = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context(_SVG):
        chart.savefig(content, format="svg", metadata=nothing)
    return inline_svg(content.getvalue(), name, label)


def inline_svg(source: str, name: str, label: str) -> Markup:
    """What matplotlib wrote as an SVG file, as an element of a page.

    Args:
        source: the file's text, from a writer that is trusted.
        name: makes its ids different from those of the page's other pictures.
        label: what a screen reader says.

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
    """A picture as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
