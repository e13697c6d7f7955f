"""Figures: all picks are readable and nothing overlaps; the freezing of nodes."""

import itertools
import random
import re
import warnings
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.transforms import Bbox
from PIL import Image

from istanas.draw import (
    CONCAT_COLOUR,
    cell_svg,
    colour_of,
    draw_cell,
    draw_freezing,
    edge_widths,
    save_freezing_figure,
    save_genotype_figures,
)
from istanas.errors import GenotypeError
from istanas.space import OPERATIONS, PRIMITIVES, PUBLISHED
from istanas.space.operations import OTHER_COLOUR

OPS = PRIMITIVES
COLOURS = {op: OPERATIONS[op].colour for op in OPS}
TWO_ON_AN_EDGE = ((("sep_conv_3x3", 0), ("dil_conv_5x5", 0)), (("max_pool_3x3", 2), ("skip_connect", 2)))

Picks = tuple[tuple[tuple[str, int], ...], ...]


def random_picks(seed: int, n_nodes: int = 4, sparsity: int = 2) -> Picks:
    draw = random.Random(seed)
    edges = [[(op, state) for state in range(node + 2) for op in OPS] for node in range(n_nodes)]
    return tuple(tuple(draw.sample(candidates, sparsity)) for candidates in edges)


def edge_lines(figure: Figure) -> list[PathPatch]:
    return [patch for patch in figure.artists if isinstance(patch, PathPatch)]


def names_and_boxes(figure: Figure) -> tuple[dict[str, list[Bbox]], list[Bbox]]:
    """Return the extents in pixels of the labels of operations, and of the boxes of states."""
    figure.canvas.draw()
    boxes = [p.get_window_extent() for p in figure.artists if isinstance(p, FancyBboxPatch)]
    names: dict[str, list[Bbox]] = {}
    for text in figure.texts:
        if text.get_bbox_patch() is not None:  # Names of states have no background of their own.
            names.setdefault(text.get_text(), []).append(text.get_window_extent())
    return names, boxes


CELLS = [
    *(
        pytest.param(getattr(g, cell), id=f"{name}-{cell}")
        for name, g in PUBLISHED.items()
        for cell in ("normal", "reduce")
    ),
    *(pytest.param(random_picks(seed), id=f"random-{seed}") for seed in range(8)),
    pytest.param(random_picks(0, sparsity=1), id="one-op-a-node"),
    pytest.param(random_picks(1, n_nodes=6), id="six-nodes"),
    pytest.param(random_picks(2, sparsity=3), id="three-ops-a-node"),
    pytest.param(random_picks(1, sparsity=4), id="four-ops-a-node"),
    pytest.param(TWO_ON_AN_EDGE, id="two-ops-on-an-edge"),
]


@pytest.mark.parametrize("picks", CELLS)
def test_names_overlap_neither_each_other_nor_a_box_nor_the_border(picks: Picks) -> None:
    figure = draw_cell(picks, range(2, len(picks) + 2), title="cell")
    names, boxes = names_and_boxes(figure)
    labels = [(op, extent) for op, extents in names.items() for extent in extents]

    assert Counter({op: len(extents) for op, extents in names.items()}) == Counter(
        op for node in picks for op, _ in node
    )
    assert not [(a, b) for (a, one), (b, two) in itertools.combinations(labels, 2) if one.overlaps(two)]
    assert not [op for op, extent in labels for box in boxes if extent.overlaps(box)]
    assert not [one for one, two in itertools.combinations(boxes, 2) if one.overlaps(two)]
    page = figure.bbox
    assert all(page.x0 <= e.x0 and e.x1 <= page.x1 and page.y0 <= e.y0 and e.y1 <= page.y1 for _, e in labels)
    # Readable at a width of 800 pixels: a line of text is at least 9 pixels high.
    assert min(extent.height for _, extent in labels) * 800 / page.width >= 9


def test_two_ops_on_one_edge_are_two_curves() -> None:
    figure = draw_cell(TWO_ON_AN_EDGE, [3])
    figure.canvas.draw()
    first, second = edge_lines(figure)[:2]
    middles = [line.get_path().interpolated(10).vertices[10] for line in (first, second)]
    assert abs(middles[0] - middles[1]).max() > 0.1
    labels, _ = names_and_boxes(figure)
    assert set(labels) == {"sep_conv_3x3", "dil_conv_5x5", "max_pool_3x3", "skip_connect"}


def test_every_pick_and_every_concatenated_state_is_an_edge_of_its_colour() -> None:
    picks = ((("sep_conv_3x3", 0), ("mystery", 1)), (("max_pool_3x3", 1),))
    colours = [to_hex(line.get_edgecolor()) for line in edge_lines(draw_cell(picks, [3]))]
    assert colours[:3] == [COLOURS["sep_conv_3x3"], OTHER_COLOUR, COLOURS["max_pool_3x3"]]
    assert len(colours) == 4


def test_operations_have_the_colours_of_their_kinds_or_a_fallback() -> None:
    kinds = {"pool": "#1b7a3d", "skip": "#555555", "sep_conv": "#0b5fa5", "dil_conv": "#b3400e"}
    assert all(colour_of(op) == colour for op in OPS for kind, colour in kinds.items() if kind in op)
    assert colour_of("fused_conv_7x7") == OTHER_COLOUR
    assert OTHER_COLOUR not in COLOURS.values()


def test_the_wider_edge_is_the_one_of_greater_weight_whatever_its_sign() -> None:
    picks = ((("sep_conv_3x3", 0), ("skip_connect", 1)),)
    small, large = (
        line.get_linewidth() for line in edge_lines(draw_cell(picks, [2], weights=[[0.1, -2.0]]))[:2]
    )
    assert small < large


@pytest.mark.parametrize("weights", [None, [], [[0.0, 0.0]]])
def test_no_weights_or_weights_of_zero_draw_edges_of_equal_width(weights: list[list[float]] | None) -> None:
    picks = ((("sep_conv_3x3", 0), ("skip_connect", 1)),)
    first, second = (line.get_linewidth() for line in edge_lines(draw_cell(picks, [2], weights=weights))[:2])
    assert first == second > 0


@pytest.mark.parametrize(
    ("picks", "concat", "weights", "words"),
    [
        ([[("skip_connect", 2)]], [2], None, "picks: skip_connect of node 0 reads state 2"),
        ([[("skip_connect", -1)]], [2], None, "state -1"),
        ([[("skip_connect", 0)]], [3], None, "concat: no state 3"),
        ([[("skip_connect", 0)]], [2], [[1.0, 2.0]], "weights: "),
        ([[("skip_connect", 0)]], [2], [[float("nan")]], "weights: "),
    ],
)
def test_what_cannot_be_drawn_is_one_clear_line(picks, concat, weights, words) -> None:
    with pytest.raises(GenotypeError, match=words) as error:
        draw_cell(picks, concat, weights=weights)
    assert "\n" not in str(error.value)


def test_a_node_without_inputs_or_outputs_is_drawn() -> None:
    names = {text.get_text() for text in draw_cell([[], [("skip_connect", 0)], []], [3]).texts}
    assert {"node 0", "node 1", "node 2"} <= names


def test_four_files_that_are_what_they_say(tmp_path: Path) -> None:
    genotype = PUBLISHED["ISTA_twostage"]
    paths = save_genotype_figures(genotype, tmp_path / "cells", weights={"normal": [[1.0, 0.5]] * 4})
    assert [p.name for p in paths] == ["normal.svg", "normal.png", "reduce.svg", "reduce.png"]
    assert sorted(tmp_path.rglob("*.*")) == sorted(paths)  # No partial files are left.

    for path, picks in ((paths[0], genotype.normal), (paths[2], genotype.reduce)):
        texts = Counter(
            "".join(t.itertext()).strip() for t in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")
        )
        assert {op: texts[op] for op in OPS} == {
            op: sum(op == o for node in picks for o, _ in node) for op in OPS
        }
    for path in (paths[1], paths[3]):
        with Image.open(path) as image:
            assert image.width >= 1600
            assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def test_the_same_genotype_gives_the_same_bytes(tmp_path: Path) -> None:
    first = save_genotype_figures(PUBLISHED["ISTA_onestage"], tmp_path / "a")
    second = save_genotype_figures(PUBLISHED["ISTA_onestage"], tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


# --- readable on a light page and on a dark one ---
SVG = "{http://www.w3.org/2000/svg}"


def contrast(one: object, other: object) -> float:
    """Return the contrast of two colours as WCAG 2 defines it, 1 .. 21."""

    def luminance(colour: object) -> float:
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]  # type: ignore[arg-type]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_colour_stands_out_from_the_ground_that_it_is_on() -> None:
    assert contrast("white", "black") == pytest.approx(21)
    figure = draw_cell(random_picks(0), range(2, 6), title="cell")
    assert to_rgba(figure.get_facecolor()) == (1, 1, 1, 1)  # Independent of the colour of the page.
    boxes = {patch.get_facecolor() for patch in figure.artists if isinstance(patch, FancyBboxPatch)}
    for text in figure.texts:
        ground = text.get_bbox_patch()
        grounds = boxes if ground is None else {ground.get_facecolor()}
        assert all(contrast(text.get_color(), colour) >= 4.5 for colour in grounds), text.get_text()
    assert {to_hex(line.get_edgecolor()) for line in edge_lines(figure)} <= {
        *COLOURS.values(),
        CONCAT_COLOUR,
    }
    for colour in (*COLOURS.values(), OTHER_COLOUR, CONCAT_COLOUR):
        assert contrast(colour, "white") >= 4.5, colour


@pytest.mark.parametrize("cell", ["normal", "reduce"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_figures_are_readable_and_opaque(name: str, cell: str, tmp_path: Path) -> None:
    """The smallest text is readable at a width of 800 pixels."""
    svg, png = (
        save_genotype_figures(PUBLISHED[name], tmp_path)[:2]
        if cell == "normal"
        else (save_genotype_figures(PUBLISHED[name], tmp_path)[2:])
    )
    root = ET.parse(svg).getroot()
    width = float(root.attrib["viewBox"].split()[2])
    sizes = [
        float(size)
        for element in root.iter()
        for size in re.findall(r"font(?:-size)?: ?([\d.]+)px", element.get("style", ""))
    ]
    assert len(sizes) >= 8
    assert (
        min(sizes) * 800 / width >= 7
    )  # The subscripts. The next line is about the names of operations and nodes.
    assert max(sizes) * 800 / width >= 10
    with Image.open(png) as image:
        assert image.convert("RGBA").getextrema()[3] == (255, 255)
    ground = next(root.iter(f"{SVG}path"))
    assert "fill: #ffffff" in ground.get("style", "")


def points_of(path: ET.Element) -> np.ndarray:
    """Return all points of a path, control points included, (n, 2)."""
    return np.array(re.findall(r"-?[\d.]+", path.get("d", "")), dtype=float).reshape(-1, 2)


@pytest.mark.parametrize("picks", [CELLS[0].values[0], CELLS[-1].values[0], random_picks(1, n_nodes=6)])
def test_the_small_drawing_has_the_edges_names_and_boxes_of_the_large_one(picks: Picks) -> None:
    concat = range(2, len(picks) + 2)
    text = cell_svg(picks, concat, label='a "cell" & more')
    root = ET.fromstring(text)
    assert len(text) < 8000
    assert root.get("aria-label") == 'a "cell" & more'
    assert not [element for element in root.iter() if "id" in element.attrib]
    lines = [element for element in root.iter(f"{SVG}path") if element.get("class") == "pick"]
    ops = [op for node in picks for op, _ in node]
    assert [line.get("stroke") for line in lines] == [colour_of(op) for op in ops]
    texts = Counter("".join(element.itertext()) for element in root.iter(f"{SVG}text"))
    expected = Counter([*ops, *(f"node {i}" for i in range(len(picks))), "concat"])
    assert texts == expected + Counter(["ck\N{MINUS SIGN}2", "ck\N{MINUS SIGN}1"])

    # Lines begin in the middle of a box; heads end at the border of the box that they point to.
    paths = list(root.iter(f"{SVG}path"))
    curves = [points_of(path) for path in paths if path.get("fill") == "none"]
    heads = [points_of(path) for path in paths if path.get("fill") in {*COLOURS.values(), CONCAT_COLOUR}]
    boxes = [points_of(path) for path in paths if path.get("fill") != "none" and path.get("stroke")]
    assert len(boxes) == len(picks) + 3
    centres = [(box.min(0) + box.max(0)) / 2 for box in boxes]
    half = np.ptp(boxes[0], axis=0) / 2
    pairs = [(state, node + 2) for node, inputs in enumerate(picks) for _, state in inputs]
    pairs += [(state, len(picks) + 2) for state in concat]
    for (source, target), curve, head in zip(pairs, curves, heads, strict=True):
        assert curve[0] == pytest.approx(centres[source], abs=0.11)
        assert max(abs(head[1] - centres[target]) / half) == pytest.approx(1, abs=0.06)


def test_widths_of_a_small_drawing_follow_its_weights() -> None:
    picks = ((("sep_conv_3x3", 0), ("skip_connect", 1)),)
    weights = [[0.1, -2.0]]
    root = ET.fromstring(cell_svg(picks, [2], label="cell", weights=weights))
    drawn = [float(e.get("stroke-width", "")) for e in root.iter(f"{SVG}path") if e.get("class") == "pick"]
    assert drawn == pytest.approx(edge_widths(weights)[0], abs=0.005)
    assert drawn[0] < drawn[1]


def test_a_cell_of_one_edge_is_drawn() -> None:
    assert cell_svg([[("skip_connect", 0)]], [], label="cell").count('class="pick"') == 1


# --- freezing of the nodes of a one-stage search ---

DISTANCES = {
    ("normal", 0): [(1, 0.2), (2, 0.01), (3, 5e-4)],
    ("normal", 1): [(1, 0.3), (2, 0.1), (3, 0.05)],
    ("reduce", 0): [(1, 0.1), (2, 0.0)],
}
FROZEN = {("normal", 0): (3, "tolerance"), ("normal", 1): (3, "limit"), ("reduce", 0): (2, "tolerance")}


def lines(figure: Figure) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in figure.axes[0].lines}


def test_every_node_is_a_line_of_its_distances_on_a_logarithmic_axis() -> None:
    figure = draw_freezing(DISTANCES, tolerance=1e-3)
    assert figure.axes[0].get_yscale() == "log"
    found = lines(figure)
    for (cell, node), points in DISTANCES.items():
        epochs, heights = found[f"{cell} node {node}"].get_data()
        assert list(epochs) == [epoch for epoch, _ in points]
        # A distance of 0 has no logarithm. It is drawn at a thousandth of the tolerance.
        assert list(heights) == pytest.approx([max(distance, 1e-6) for _, distance in points])
    colours = {to_hex(found[f"{cell} node {node}"].get_color()) for cell, node in DISTANCES}
    assert len(colours) == 3
    assert list(found["tolerance"].get_ydata()) == [1e-3, 1e-3]


def test_marks_show_when_and_why_nodes_froze_and_rejected_epochs() -> None:
    figure = draw_freezing(DISTANCES, tolerance=1e-3, rejected=[1, 2], frozen=FROZEN)
    marks = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    assert [(*line.get_xdata(), *line.get_ydata(), line.get_marker()) for line in marks] == [
        (3, 5e-4, "o"),
        (3, 0.05, "s"),
        (2, pytest.approx(1e-6), "o"),
    ]
    assert marks[1].get_markerfacecolor() == "white"
    found = lines(figure)
    assert list(found["rejected"].get_xdata()) == [1, 1]
    dotted = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in dotted] == [1, 2]
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        *("normal node 0", "normal node 1", "reduce node 0", "tolerance", "rejected"),
        *("frozen by tolerance", "frozen by limit"),
    ]


@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
@pytest.mark.parametrize("distances", [{("normal", 0): []}, {("normal", 0): [(1, 0.0)]}])
def test_nothing_to_show_is_drawn_without_a_warning(
    distances: dict[tuple[str, int], list[tuple[int, float]]], tolerance: float
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_freezing(distances, tolerance=tolerance)
        figure.canvas.draw()
    assert ("tolerance" in lines(figure)) == (tolerance > 0)


def test_a_freezing_figure_is_two_files_with_the_same_bytes_every_time(tmp_path: Path) -> None:
    options = {"tolerance": 1e-3, "rejected": [2], "frozen": FROZEN}
    first = save_freezing_figure(tmp_path / "a", DISTANCES, **options)
    second = save_freezing_figure(tmp_path / "b", DISTANCES, **options)
    assert [p.name for p in first] == ["freezing.svg", "freezing.png"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["freezing.png", "freezing.svg"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    texts = [
        "".join(t.itertext()).strip() for t in ET.parse(first[0]).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert {"epoch", "normal node 0", "reduce node 0", "rejected", "frozen by limit"} <= set(texts)
    with Image.open(first[1]) as image:
        assert image.width >= 1600
