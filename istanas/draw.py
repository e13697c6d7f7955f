"""Figures: cells as graphs from left to right, and the freezing of the nodes of a one-stage search.

networkx places the states (topological generations, multipartite layout), and matplotlib draws them. `_route` chooses
the bend of each edge and the place of its label, by coordinate descent on a cost that counts overlapping labels, edges
through boxes, and overlapping edges.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from istanas.errors import GenotypeError
from istanas.files import replacing_file
from istanas.space import Drawing, cell_drawing, kind_title, space_of
from istanas.space.operations import OPERATIONS, OTHER_COLOUR

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from istanas.space import Genotype

Array = npt.NDArray[np.float64]
Place = tuple[str, int]  # (cell, node).

CONCAT_COLOUR = "#6f7682"
_INK, _NODE_FILL, _END_FILL = "#222222", "#fdf3d1", "#e4ecf4"

# All sizes and coordinates are in inches.
_TITLE = 0.4
_SMALLEST_PAGE = (8.0, 4.2)
_LAYER, _NAME = 1.75, 0.33  # Width of a layer, height of a label.
_MARGIN = (0.75, 0.6)
_NODE_SIZE = (0.74, 0.36)
_FONT_FAMILY, _FONT_SIZE = "DejaVu Sans", 10.0
_BENDS = np.outer([0.0, 0.12, 0.24, 0.36, 0.48, 0.6, 0.8, 1.0], [1, -1]).ravel()[1:]
_STOPS = np.array([0.5, 0.44, 0.56, 0.38, 0.62, 0.32, 0.68, 0.26, 0.74])
_EVEN_WIDTH = 1.8  # Width in points of edges without weights.
_SAMPLES = np.linspace(0, 1, 41)
_FROZEN_BY: dict[str, dict[str, Any]] = {
    "tolerance": {"marker": "o"},
    "limit": {"marker": "s", "markerfacecolor": "white"},
}
_PICK = "pick"  # Label of the lines that show picks.
_LEAST_DISTANCE = 1e-6  # Lower end of the logarithmic axis if the tolerance is 0.


@dataclass(frozen=True)
class _Edge:
    source: int
    target: int
    op: str | None
    width: float


def colour_of(op: str) -> str:
    """Return the colour of an operation, or `OTHER_COLOUR` if it is not registered (as in runs of a lost plugin).

    Example:
        >>> colour_of("sep_conv_5x5") == colour_of("sep_conv_3x3")
        True
    """
    return OPERATIONS[op].colour if op in OPERATIONS else OTHER_COLOUR


def draw_cell(
    picks: Sequence[Sequence[tuple[str, int]]],
    concat: Sequence[int],
    *,
    title: str = "",
    weights: Sequence[Sequence[float]] | None = None,
) -> Figure:
    """Draw one cell from its inputs on the left to the concatenation on the right.

    Args:
        picks: For each node its inputs (operation, state); states 0 and 1 are the cell's inputs, i + 2 is node i.
        concat: States whose outputs are concatenated, each in 0 .. len(picks) + 1.
        title: Title above the graph.
        weights: Finite edge weights in the shape of `picks`. The greater |weight|, the wider the edge. `None` or empty
            draws all edges alike.

    Returns:
        A figure with a white background, at least 8 inches wide. Two operations on one edge are drawn as two curves.

    Raises:
        GenotypeError: If a state does not precede its use, or the weights do not fit the picks.

    Example:
        >>> figure = draw_cell([[("skip_connect", 0), ("sep_conv_3x3", 1)]], [2], title="normal")
        >>> sorted(text.get_text() for text in figure.texts)
        ['$c_{k-1}$', '$c_{k-2}$', 'concat', 'node 0', 'normal', 'sep_conv_3x3', 'skip_connect']
    """
    _check_cell(picks, concat)
    return draw_graph(cell_drawing(picks, concat), title=title, weights=weights)


def cell_svg(
    picks: Sequence[Sequence[tuple[str, int]]],
    concat: Sequence[int],
    *,
    label: str,
    weights: Sequence[Sequence[float]] | None = None,
) -> str:
    """Draw the graph of `draw_cell` as one small `<svg>` element for a page with a white background.

    It has no title, no id and no style sheet. The lines of the picks have the class "pick", in the order of the picks.
    A page can show the same cell with other weights by changing the widths of these lines (`edge_widths`).

    Args:
        picks: As in `draw_cell`.
        concat: As in `draw_cell`.
        label: Text for screen readers.
        weights: As in `draw_cell`.

    Raises:
        GenotypeError: As in `draw_cell`.

    Example:
        >>> cell_svg([[("skip_connect", 0), ("sep_conv_3x3", 1)]], [2], label="normal cell").count('class="pick"')
        2
    """
    _check_cell(picks, concat)
    return graph_svg(cell_drawing(picks, concat), label=label, weights=weights)


def draw_graph(
    drawing: Drawing, *, title: str = "", weights: Sequence[Sequence[float]] | None = None
) -> Figure:
    """Draw the kept operations of one kind of decisions, from the first state on the left to the last one.

    Args:
        drawing: The graph, see `SearchSpace.drawing`.
        title: Title above the graph.
        weights: Finite edge weights for each decision and pick, see `draw_cell`.

    Raises:
        GenotypeError: If the weights do not fit the picks.
    """
    return _figure(drawing, _edges(drawing, weights), title)


def graph_svg(drawing: Drawing, *, label: str, weights: Sequence[Sequence[float]] | None = None) -> str:
    """Draw the graph of `draw_graph` as one small `<svg>` element, see `cell_svg`."""
    from istanas.small_svg import figure_svg

    figure = _figure(drawing, _edges(drawing, weights), title=None)
    figure.patch.set_visible(False)
    for artist in figure.artists:
        if artist.get_label() == _PICK:
            artist.set_gid(_PICK)
    font = f"{_FONT_FAMILY}, Verdana, sans-serif"
    return figure_svg(
        figure, {"role": "img", "aria-label": label, "font-family": font, "font-size": f"{_FONT_SIZE:g}"}
    )


def _figure(drawing: Drawing, edges: Sequence[_Edge], title: str | None) -> Figure:
    """Return the figure of a graph. A title, even an empty one, takes space above the graph."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import FancyBboxPatch, Patch, PathPatch, Polygon
    from matplotlib.path import Path as Line

    places, page = _places(edges, len(drawing.states))
    bends, stops = _route(edges, places, page)
    width, height = page[0], page[1] + (0.0 if title is None else _TITLE)

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    # There are no axes, because creating them takes as long as everything else.
    inches: Any = figure.dpi_scale_trans
    font = FontProperties(family=_FONT_FAMILY, size=_FONT_SIZE)
    if title is not None:
        figure.suptitle(title, y=1 - _TITLE / 2 / height, va="center", fontproperties=font)

    def write(place: Array, text: str, colour: str, **options: Any) -> None:
        style = {"ha": "center", "va": "center", "fontproperties": font, "color": colour, **options}
        figure.text(place[0], place[1], text, transform=inches, **style)

    def draw(patch: Patch) -> None:
        patch.set_transform(inches)
        figure.add_artist(patch)

    half = np.array(_NODE_SIZE) / 2
    fills = [_END_FILL if i in drawing.ends else _NODE_FILL for i in range(len(drawing.states))]
    for place, name, fill in zip(places, drawing.states, fills, strict=True):
        corner = (place[0] - half[0], place[1] - half[1])
        shape = "round,pad=0,rounding_size=0.1"
        draw(FancyBboxPatch(corner, *_NODE_SIZE, boxstyle=shape, facecolor=fill, edgecolor=_INK, zorder=3))
        write(place, name, _INK, zorder=4)

    for edge, bend, stop in zip(edges, bends, stops, strict=True):
        colour = CONCAT_COLOUR if edge.op is None else colour_of(edge.op)
        *line, head = _arrow(places[edge.source], places[edge.target], bend)
        curve = Line(line, [Line.MOVETO, Line.CURVE3, Line.CURVE3])
        label = "" if edge.op is None else _PICK
        draw(PathPatch(curve, fill=False, linewidth=edge.width, edgecolor=colour, label=label, zorder=1))
        draw(Polygon(head, facecolor=colour, linewidth=0, zorder=1))
        if edge.op is not None:
            place = _curve(places[edge.source], places[edge.target], bend, stop)
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
            write(place, edge.op, colour, bbox=ground, zorder=2)
    return figure


def edge_widths(weights: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the line widths of a cell's picks in points: the greater |weight|, the wider.

    Example:
        >>> edge_widths([[1.0, -0.5], [0.0]])
        [[4.2, 2.5], [0.8]]
    """
    largest = max((abs(w) for row in weights for w in row), default=0.0)
    if largest == 0:
        return [[_EVEN_WIDTH] * len(row) for row in weights]
    return [[float(0.8 + 3.4 * abs(w) / largest) for w in row] for row in weights]


def save_genotype_figures(
    genotype: Genotype, folder: Path, *, weights: Mapping[str, Sequence[Sequence[float]]] | None = None
) -> list[Path]:
    """Write the kept operations of each kind, such as both cells, as SVG and PNG. Equal genotypes give equal bytes.

    Args:
        genotype: The genotype.
        folder: The folder, which is created if it does not exist. Files are written atomically.
        weights: For each kind, edge weights in the shape of its picks.

    Returns:
        The paths, two for each kind.

    Raises:
        GenotypeError: As in `draw_cell`.

    Example:
        >>> import tempfile
        >>> from istanas.space import PUBLISHED
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in save_genotype_figures(PUBLISHED["ISTA_twostage"], Path(folder))]
        ['normal.svg', 'normal.png', 'reduce.svg', 'reduce.png']
    """
    paths = []
    for kind, drawing in space_of(genotype).drawing(genotype).items():
        figure = draw_graph(drawing, title=kind_title(kind), weights=(weights or {}).get(kind))
        paths += _save(figure, folder, kind)
    return paths


def draw_freezing(
    distances: Mapping[Place, Sequence[tuple[int, float]]],
    *,
    tolerance: float,
    rejected: Sequence[int] = (),
    frozen: Mapping[Place, tuple[int, str]] | None = None,
) -> Figure:
    """Draw how far each node's code moved in every epoch of a one-stage search, and when the node froze.

    Args:
        distances: (cell, node) -> (epoch, distance ||z_t - z_(t-1)||_2 >= 0). Distances below a thousandth of the
            tolerance are raised to that value, because the axis is logarithmic.
        tolerance: The threshold, >= 0; 0 is not drawn.
        rejected: Epochs whose new architecture was too large, drawn as dotted lines.
        frozen: (cell, node) -> (epoch, "tolerance" or "limit"), drawn as filled dots or hollow squares.

    Example:
        >>> figure = draw_freezing({("normal", 0): [(1, 0.1), (2, 1e-4)]}, tolerance=1e-3)
        >>> figure.axes[0].get_ylabel()
        'distance of the code to the last accepted one'
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8.0, 4.5), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(
        yscale="log", xlabel="epoch", ylabel="distance of the code to the last accepted one"
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    floor = max(tolerance, _LEAST_DISTANCE) / 1000
    seen: dict[str, int] = {}
    for (cell, node), points in distances.items():
        shade = colormaps["Blues" if cell == "normal" else "Oranges"](0.95 - 0.15 * (seen.get(cell, 0) % 5))
        seen[cell] = seen.get(cell, 0) + 1
        epochs = [epoch for epoch, _ in points]
        heights = [max(distance, floor) for _, distance in points]
        axes.plot(epochs, heights, color=shade, linewidth=1.6, label=f"{cell} node {node}")
        if frozen and (cell, node) in frozen:
            epoch, reason = frozen[cell, node]
            style = _FROZEN_BY[reason]
            height = dict(zip(epochs, heights, strict=True)).get(epoch, floor)
            axes.plot([epoch], [height], color=shade, markersize=7, linestyle="none", zorder=3, **style)
    if tolerance > 0:
        axes.axhline(tolerance, color=_INK, linestyle="--", linewidth=1, label="tolerance")
    for i, epoch in enumerate(rejected):
        axes.axvline(epoch, color="#b00020", linestyle=":", linewidth=1, label="rejected" if i == 0 else None)
    for reason, style in _FROZEN_BY.items():
        if any(why == reason for _, why in (frozen or {}).values()):
            axes.plot([], [], color="grey", linestyle="none", label=f"frozen by {reason}", **style)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    return figure


def save_freezing_figure(
    folder: Path, distances: Mapping[Place, Sequence[tuple[int, float]]], **options: Any
) -> list[Path]:
    """Write the figure of `draw_freezing` as freezing.svg and freezing.png. The same data give the same bytes."""
    return _save(draw_freezing(distances, **options), folder, "freezing")


# The default level of compression, 6, takes twice the time for files that are smaller by 1 %.
_FORMATS: dict[str, dict[str, Any]] = {
    "svg": {"metadata": {"Date": None, "Creator": None}},
    "png": {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": 4}},
}


def _save(figure: Figure, folder: Path, name: str) -> list[Path]:
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    # Text is kept as text, which is small and searchable. Without random ids and dates, equal figures are equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "istanas"}):
        for kind, options in _FORMATS.items():
            content = io.BytesIO()
            figure.savefig(content, format=kind, dpi=200, **options)
            paths.append(_write(folder / f"{name}.{kind}", content.getvalue()))
    return paths


def _write(path: Path, content: bytes) -> Path:
    with replacing_file(path) as new:
        new.write_bytes(content)
    return path


def _check_cell(picks: Sequence[Sequence[tuple[str, int]]], concat: Sequence[int]) -> None:
    """Check that each state of a cell precedes its use."""
    last = len(picks) + 1
    for node, inputs in enumerate(picks):
        for op, state in inputs:
            if not 0 <= state < node + 2:
                raise GenotypeError(
                    f"{op} of node {node} reads state {state}",
                    field="picks",
                    remedy=f"choose 0 to {node + 1}",
                )
    for state in concat:
        if not 0 <= state <= last:
            raise GenotypeError(f"no state {state}", field="concat", remedy=f"choose 0 to {last}")


def _edges(drawing: Drawing, weights: Sequence[Sequence[float]] | None) -> list[_Edge]:
    """Check the weights and return the edges with their widths."""
    n_picks: dict[int, int] = {}
    for _, _, op, decision, _ in drawing.edges:
        if op is not None:
            n_picks[decision] = n_picks.get(decision, 0) + 1
    expected = [n_picks.get(decision, 0) for decision in range(drawing.n_decisions)]
    if weights is not None and len(weights) == 0:
        weights = None
    if weights is not None and [len(row) for row in weights] != expected:
        raise GenotypeError(
            f"the nodes have {[len(row) for row in weights]} values",
            field="weights",
            remedy=f"give one for each pick, {expected}",
        )
    if not all(np.isfinite(w) for row in weights or () for w in row):
        raise GenotypeError(
            "NaN or infinite values",
            field="weights",
            remedy="give finite numbers, or none to draw all edges alike",
        )

    widths = edge_widths(weights or [[0.0] * n for n in expected])
    return [
        _Edge(source, target, op, 1.2 if op is None else widths[decision][position])
        for source, target, op, decision, position in drawing.edges
    ]


def _places(edges: Sequence[_Edge], n_states: int) -> tuple[Array, Array]:
    """Return the centres of all states, (n_states, 2), and the size (width, height) of the page below the title."""
    import networkx

    output = n_states - 1
    graph = networkx.MultiDiGraph()
    graph.add_nodes_from(range(output))
    graph.add_edges_from((edge.source, edge.target) for edge in edges if edge.target != output)
    # The layout fills a layer from below. With the largest state first, c_{k-2} is above c_{k-1}.
    layers = [sorted(generation, reverse=True) for generation in networkx.topological_generations(graph)]
    layers.append([output])
    raw = networkx.multipartite_layout(range(output + 1), subset_key=dict(enumerate(layers)))

    n_names = sum(edge.op is not None for edge in edges)
    page = np.maximum(_SMALLEST_PAGE, (_LAYER * len(layers), _NAME * n_names))
    xy = np.array([raw[state] for state in range(output + 1)])
    # Shift and scale: the concatenation is at (0, 0), and the inputs are at x = -1.
    xy = (xy - xy[output]) / (xy[output, 0] - xy[0, 0])
    span = page - 2 * np.array(_MARGIN)
    spread = max(np.ptp(xy[:, 1]), 1e-9)
    rise = min(span[1] / spread, 2.6 * (len(layers) - 1))
    return np.array([page[0] - _MARGIN[0], page[1] / 2]) + xy * (span[0], rise), page


def _curve(start: Array, end: Array, bend: float | Array, t: float | Array) -> Array:
    """Return points of a quadratic Bezier curve whose control point is `bend` edge lengths beside the midpoint."""
    along = end - start
    control = (start + end) / 2 + np.asarray(bend)[..., None] * np.array([along[1], -along[0]])
    t = np.asarray(t)[..., None]
    curve: Array = (1 - t) ** 2 * start + 2 * t * (1 - t) * control + t**2 * end
    return curve


def _arrow(source: Array, target: Array, bend: float) -> tuple[Array, Array, Array, Array]:
    """Return an arrow from the middle of a box to the border of another box.

    Returns:
        (start, control point, end) of the line, which ends where the head begins, and the corners of the head.
    """
    box, head = np.array(_NODE_SIZE) / 2, np.array([0.12, 0.06])
    t = np.linspace(0, 1, 401)
    outside = ~_touches(_curve(source, target, bend, t), target[None], box)[:, 0]
    border = t[np.flatnonzero(outside)[-1]]
    tip = _curve(source, target, bend, border)
    # The curve is split where the head begins, by de Casteljau's algorithm.
    back = np.linalg.norm(_curve(source, target, bend, t) - tip, axis=-1)
    stop = t[np.flatnonzero((t < border) & (back >= head[0]))[-1]]
    end = _curve(source, target, bend, stop)
    along = target - source
    control = (source + target) / 2 + bend * np.array([along[1], -along[0]])
    ahead = (tip - end) / np.linalg.norm(tip - end)
    side = head[1] * np.array([-ahead[1], ahead[0]])
    return source, source + stop * (control - source), end, np.array([end + side, tip, end - side])


def _route(edges: Sequence[_Edge], places: Array, page: Array) -> tuple[Array, Array]:
    """Return the bend of each edge and the position of its label along it, in 0 .. 1, both (E,).

    Each edge in turn takes the cheapest (bend, position), given the others, until no edge changes.
    """
    ends = [(places[edge.source], places[edge.target]) for edge in edges]
    curves = np.array([_curve(*pair, _BENDS[:, None], _SAMPLES) for pair in ends])  # (E, bends, samples, 2)
    spots = np.array([_curve(*pair, _BENDS[:, None], _STOPS) for pair in ends])  # (E, bends, stops, 2)
    box = np.array(_NODE_SIZE) / 2
    names = np.array([_text_size(edge.op) for edge in edges]) / 2
    # Edges that share a box meet there. They count as overlapping only outside of the boxes.
    at_ends = np.array(
        [_touches(curves[i], np.array(pair), box + 0.2).any(-1) for i, pair in enumerate(ends)]
    )
    free = np.where(at_ends[..., None], np.nan, curves)

    def own_cost(i: int) -> Array:
        middle = page[None] / 2
        strangers = np.delete(places, [edges[i].source, edges[i].target], axis=0)
        through = _touches(curves[i], strangers, box + 0.08).sum((-2, -1))
        covered = _touches(spots[i], places, box + names[i] + 0.14).sum(-1)
        outside = (~_touches(curves[i], middle, middle - 0.1)).sum((-2, -1))
        cut = (~_touches(spots[i], middle, middle - 0.1 - names[i])).sum(-1)
        effort = 4 * np.abs(_BENDS)[:, None] + 3 * np.abs(_STOPS - 0.5)
        cost: Array = 10.0 * (through + outside)[:, None] + 200 * covered + 50 * cut + effort
        return cost

    nothing = np.zeros(free.shape[1:-1], dtype=bool)

    @functools.cache
    def beside_path(j: int, bend: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Return which samples of all curves are on the path of edge j, and how many path samples each label covers."""
        path = free[j, bend]
        path = path[~np.isnan(path[:, 0])]
        close = np.zeros(free.shape[:-1], dtype=bool)
        if len(path):  # The bounding box excludes most samples quickly.
            half = np.ptp(path, axis=0) / 2 + 0.1
            around = _touches(free, path.min(0)[None] + half - 0.1, half)[..., 0]
            close[around] = _touches(free[around], path, 0.09).any(-1)
        return close, _touches(spots, path, names[:, None, None, None] + 0.04).sum(-1)

    def shared_cost(i: int) -> Array:
        rest = np.arange(len(edges)) != i
        paths = [beside_path(j, int(bends[j])) for j in np.flatnonzero(rest)]
        labels, sizes = spots[rest, bends[rest], stops[rest]], names[rest]
        close = np.any([nothing, *(on[i] for on, _ in paths)], axis=0).sum(-1)
        over = np.sum([below[i] for _, below in paths], axis=0)
        under = _touches(curves[i], labels, sizes + 0.04).sum((-2, -1))
        clash = _touches(spots[i], labels, sizes + names[i] + 0.04).sum(-1)
        cost: Array = (close + 4.0 * under)[:, None] + 4 * over + 200 * clash
        return cost

    fixed = [own_cost(i) for i in range(len(edges))]
    bends, stops = np.zeros((2, len(edges)), dtype=int)
    for _ in range(8):
        before = (bends.copy(), stops.copy())
        for i in range(len(edges)):
            cost = fixed[i] + shared_cost(i)
            bends[i], stops[i] = np.unravel_index(cost.argmin(), cost.shape)
        if np.array_equal(before, (bends, stops)):
            break
    return _BENDS[bends], _STOPS[stops]


def _touches(points: Array, centres: Array, half: float | Array) -> npt.NDArray[np.bool_]:
    """Return which points (..., 2) are in which boxes of half size `half` around centres (M, 2), as (..., M).

    A point with NaN is in no box.
    """
    across, along = (half[..., 0], half[..., 1]) if isinstance(half, np.ndarray) else (half, half)
    near = np.abs(points[..., None, 0] - centres[:, 0]) < across
    near &= np.abs(points[..., None, 1] - centres[:, 1]) < along
    return near


@functools.cache  # Measuring a text takes longer than placing and drawing it.
def _text_size(text: str | None) -> tuple[float, float]:
    """Return the width and height of a text in inches. For no text they are NaN, which overlaps nothing."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    if text is None:
        return (np.nan, np.nan)
    font = FontProperties(family=_FONT_FAMILY, size=_FONT_SIZE)
    return (TextPath((0, 0), text, prop=font).get_extents().width / 72, 1.3 * _FONT_SIZE / 72)
