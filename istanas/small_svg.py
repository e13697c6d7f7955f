"""Conversion of a matplotlib figure to one small `<svg>` element, without ids and style sheets, with text as text.

Many such elements can share one page, unlike several SVG images of matplotlib.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, Literal
from xml.etree import ElementTree as ET

from matplotlib.backend_bases import GraphicsContextBase, RendererBase
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.transforms import Transform

_POINTS = 72  # Points in an inch.
_COMMANDS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}
_SUBSCRIPT = re.compile(r"\$(\w+)_\{(.+)\}\$")


def figure_svg(figure: Figure, attributes: Mapping[str, str]) -> str:
    """Return a figure of patches and horizontal, centred texts as an `<svg>` element.

    Args:
        figure: The figure. The group id (`gid`) of an artist becomes the class of its lines.
        attributes: Attributes of the element, which its texts inherit.

    Example:
        >>> figure = Figure(figsize=(1, 1))
        >>> _ = figure.text(0.5, 0.5, "node", ha="center", va="baseline")
        >>> figure_svg(figure, {"role": "img"}).partition("<text")[2]
        ' x="36.0" y="36.0" fill="#000000">node</text></svg>'
    """
    figure.set_dpi(_POINTS)
    renderer = _Renderer(figure, attributes)
    figure.draw(renderer)
    return ET.tostring(renderer.svg, encoding="unicode")


@functools.cache  # Measuring a text takes longer than writing it.
def _text_metrics(s: str, prop: FontProperties, ismath: bool | Literal["TeX"]) -> tuple[float, float, float]:
    return RendererBase().get_text_width_height_descent(s, prop, ismath)


class _Renderer(RendererBase):
    """A matplotlib renderer that writes SVG elements, in points from the top left corner."""

    def __init__(self, figure: Figure, attributes: Mapping[str, str]) -> None:
        super().__init__()
        self.width, self.height = (float(inches) * _POINTS for inches in figure.get_size_inches())
        view = f"0 0 {self.width:.0f} {self.height:.0f}"
        fixed = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": view, "text-anchor": "middle"}
        self.svg = ET.Element("svg", {**fixed, **attributes})
        self._group: str | None = None

    def get_canvas_width_height(self) -> tuple[float, float]:
        return self.width, self.height

    def open_group(self, s: str, gid: str | None = None) -> None:
        self._group = gid

    def close_group(self, s: str) -> None:
        self._group = None

    def get_text_width_height_descent(
        self, s: str, prop: FontProperties, ismath: bool | Literal["TeX"]
    ) -> tuple[float, float, float]:
        return _text_metrics(s, prop, ismath)

    def draw_path(
        self, gc: GraphicsContextBase, path: Path, transform: Transform, rgbFace: Any = None
    ) -> None:
        style = {"fill": "none" if rgbFace is None else to_hex(rgbFace)}
        if gc.get_linewidth() > 0:
            style |= {"stroke": to_hex(gc.get_rgb()), "stroke-width": f"{gc.get_linewidth():.2f}"}
        if self._group is not None:
            style["class"] = self._group
        steps = []
        for vertices, code in path.iter_segments(transform, simplify=False):
            points = [self._point(x, y) for x, y in vertices.reshape(-1, 2)]
            steps.append(_COMMANDS[code] + ("" if code == Path.CLOSEPOLY else " ".join(points)))
        ET.SubElement(self.svg, "path", {"d": "".join(steps), **style})

    def draw_text(
        self,
        gc: GraphicsContextBase,
        x: float,
        y: float,
        s: str,
        prop: FontProperties,
        angle: float,
        ismath: bool | Literal["TeX"] = False,
        mtext: Text | None = None,
    ) -> None:
        # The viewer may use another font with other widths, so only the middle of the text is known.
        assert mtext is not None
        middle, _ = mtext.get_transform().transform(mtext.get_unitless_position())
        at = dict(zip("xy", self._point(middle, self.height - y).split(), strict=True))
        element = ET.SubElement(self.svg, "text", {**at, "fill": to_hex(gc.get_rgb())})
        subscript = _SUBSCRIPT.fullmatch(s)
        element.text = s if subscript is None else subscript[1]
        if subscript is not None:
            small = {"dy": "2.5", "font-size": "8"}
            ET.SubElement(element, "tspan", small).text = subscript[2].replace("-", "\N{MINUS SIGN}")

    def _point(self, x: float, y: float) -> str:
        return f"{x:.1f} {self.height - y:.1f}"
