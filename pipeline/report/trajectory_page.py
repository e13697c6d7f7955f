"""`trajectory.html`: the epochs of a search, selected by a slider, written from its run directory only.

Each distinct cell is drawn once. The script of the page sets the widths of its edges for the selected epoch.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from istanas.draw import edge_widths, graph_svg
from istanas.limits import TABLE_BYTES, read_at_most
from istanas.space import Genotype, SearchSpace, kind_title, space_of
from istanas.space.operations import skip_ratio
from pipeline.base.files import atomic_write
from pipeline.base.text import count, percent
from pipeline.report.html import (
    BLUE,
    ORANGE,
    add_axes,
    chart,
    chart_svg,
    data_uri,
    epoch_axis,
    job_title,
    kind_label,
    render,
)
from pipeline.runs.directory import RunDir
from pipeline.runs.genotype_file import read_genotype
from pipeline.runs.layout import CODES_FILE, GENOTYPE_FILE, REPORT_PAGE, TRAJECTORY_FILE, TRAJECTORY_PAGE

COST_WEIGHT = "arch/cost_weight"  # in metrics.jsonl
_STYLES = ((BLUE, "-", "solid blue"), (ORANGE, "--", "dashed orange"))
_ROW, _HEADING, _LEFT, _SPAN = 14, 24, 170, 420  # sizes in the heat map, whose font size is 11


@dataclass(frozen=True)
class _Node:
    """A row of trajectory.csv: a node after an epoch. Picks and edge weights are in the order of the states."""

    picks: tuple[tuple[str, int], ...]
    edge_weights: tuple[float, ...]
    state: str
    changed: bool
    distance: float
    gap: float
    truncation: float
    margin: float  # NaN if an earlier version did not record it


Places = list[tuple[str, int]]
Epochs = list[int]
Table = dict[tuple[int, str, int], _Node]


def write_trajectory_page(run: RunDir) -> None:
    """Write the page into the run directory of a search.

    Args:
        run: The run directory, of which the record, genotype.json, trajectory.csv and codes.csv are read.

    Raises:
        CheckpointError: If the record is damaged.
    """
    record = run.read()
    genotype = read_genotype(run.path / GENOTYPE_FILE)
    space = space_of(genotype)
    table = _read(_frame(run.path / TRAJECTORY_FILE))
    epochs: Epochs = sorted({epoch for epoch, _, _ in table})
    places: Places = [(kind, node) for kind in genotype.kinds for node in range(len(genotype.picks(kind)))]
    certified = _is_certified(table)
    weights = {line.step: line.metrics.get(COST_WEIGHT) for line in run.metrics()}
    cells, cells_at, widths = _draw(genotype, table, epochs)
    data = {
        "cells": cells_at,
        "widths": widths,
        "summaries": [_summary(table, epoch, places, certified, weights.get(epoch)) for epoch in epochs],
        "rows": [[_row(table[epoch, *place], space, certified) for place in places] for epoch in epochs],
    }
    maps = _maps(run, genotype, table, epochs)
    page = render(
        "trajectory.html",
        title=f"{record.name}: epoch by epoch",
        subtitle=job_title(record),
        footer=f"Run directory {run.path.name}",
        report=REPORT_PAGE,
        first=epochs[0],
        last=epochs[-1],
        cells=cells,
        nodes=[f"{cell} node {node}" for cell, node in places],
        lines=[
            f"{_STYLES[i % len(_STYLES)][2]}: {kind_title(kind)}" for i, kind in enumerate(genotype.kinds)
        ],
        data=data,
        curves=_curves(table, epochs, places, certified),
        certified=certified,
        maps=maps,
        gaps=any(heat["gaps"] for heat in maps),
        margins=not any(math.isnan(node.margin) for node in table.values()),
    )
    atomic_write(run.path / TRAJECTORY_PAGE, page)


def _read(frame: pd.DataFrame) -> Table:
    """Return the rows of trajectory.csv by (epoch, kind, node)."""
    table: Table = {}
    for row in frame.to_dict("records"):
        picks = [(op, int(state)) for op, state in (pick.split("<-") for pick in row["picks"].split())]
        weights = [float(weight) for weight in str(row["edge_weights"]).split()]
        # With sorted picks, cells that differ only in the order of picks are equal.
        pairs = sorted(zip(picks, weights, strict=True), key=lambda pair: (pair[0][1], pair[0][0]))
        figures = {name: row[name] for name in ("state", "changed", "distance", "gap", "truncation")}
        figures["margin"] = row.get("margin", math.nan)
        table[row["epoch"], row["cell"], row["node"]] = _Node(
            tuple(pick for pick, _ in pairs), tuple(weight for _, weight in pairs), **figures
        )
    return table


def _draw(
    genotype: Genotype, table: Table, epochs: Epochs
) -> tuple[list[tuple[str, list[tuple[int, Markup]]]], list[list[int]], list[list[list[float]]]]:
    """Draw each distinct cell once.

    Returns:
        The cells as (kind, [(number, drawing)]), the numbers of the cells of each epoch, and the widths of the edges of
        each epoch and cell.
    """
    numbers: dict[tuple[str, Any], int] = {}
    space = space_of(genotype)
    drawings: dict[str, list[tuple[int, Markup]]] = {kind: [] for kind in genotype.kinds}
    cells_at: list[list[int]] = []
    widths: list[list[list[float]]] = []
    for epoch in epochs:
        cells_at.append([])
        widths.append([])
        for cell in genotype.kinds:
            nodes = [table[epoch, cell, node] for node in range(len(genotype.picks(cell)))]
            picks = tuple(node.picks for node in nodes)
            if (cell, picks) not in numbers:
                numbers[cell, picks] = len(numbers)
                then = genotype.with_picks(cell, picks)
                # A genotype contains only valid names of operations, so its drawing is safe markup.
                drawing = Markup(graph_svg(space.drawing(then)[cell], label=kind_label(then, cell)))
                drawings[cell].append((numbers[cell, picks], drawing))
            cells_at[-1].append(numbers[cell, picks])
            flat = [width for row in edge_widths([node.edge_weights for node in nodes]) for width in row]
            widths[-1].append([round(width, 2) for width in flat])
    return [(kind_title(kind), each) for kind, each in drawings.items()], cells_at, widths


def _is_certified(table: Table) -> bool:
    """Return whether the nodes have sparse codes, whose gaps include rounding and are therefore above 0."""
    return any(node.gap > 0 for node in table.values())


def _row(node: _Node, space: SearchSpace, certified: bool) -> list[Any]:
    """Return whether a node changed, followed by the texts of its table row."""
    picks = zip(node.picks, node.edge_weights, strict=True)
    keeps = ", ".join(f"{space.describe_pick(*pick, word='←')} ({weight:.2g})" for pick, weight in picks)
    if not certified:
        return [bool(node.changed), keeps, node.state.lower(), f"{node.distance:.2g}"]
    figures = [f"{value:.2g}" for value in (node.distance, node.gap, node.truncation)]
    figures.append("–" if math.isnan(node.margin) else f"{node.margin:.2g}")  # noqa: RUF001
    return [bool(node.changed), keeps, node.state.lower(), *figures]


def _summary(table: Table, epoch: int, places: Places, certified: bool, cost_weight: float | None) -> str:
    """Describe an epoch in one sentence.

    Args:
        table: The rows of trajectory.csv.
        epoch: The epoch.
        places: All decisions.
        certified: Whether the nodes have sparse codes.
        cost_weight: The weight of the costs; None if the search considers none.
    """
    nodes = [table[epoch, *place] for place in places]
    changed, frozen = sum(node.changed for node in nodes), sum(node.state == "FROZEN" for node in nodes)
    start = "Before training" if epoch == 0 else f"{changed} of {count(len(nodes), 'node')} changed"
    margins = [node.margin for node in nodes if not math.isnan(node.margin)]
    common = (
        f"{start}{f', {frozen} frozen' if frozen else ''}; skip ratio {percent(_skip_ratio(nodes))}; largest distance "
        f"{max(node.distance for node in nodes):.2g}"
    )
    if cost_weight is not None:
        common += f", weight of the costs {cost_weight:.3g}"
    if not certified:
        return f"{common}."
    return (
        f"{common}, relative gap {max(node.gap for node in nodes):.2g}, truncation "
        f"{max(node.truncation for node in nodes):.2g}{f'; smallest margin {min(margins):.2g}' if margins else ''}."
    )


def _skip_ratio(nodes: Sequence[_Node]) -> float:
    return skip_ratio(op for node in nodes for op, _ in node.picks)


def _curves(table: Table, epochs: Epochs, places: Places, certified: bool) -> Markup:
    """Draw distance, gap, truncation and skip ratio, each with a line that marks the selected epoch.

    Gap and truncation are left out if the nodes have no sparse codes.
    """
    first, last = epochs[0], epochs[-1]
    kinds = dict.fromkeys(kind for kind, _ in places)
    styles = {kind: _STYLES[i % len(_STYLES)] for i, kind in enumerate(kinds)}
    inches, top, bottom, rows = (5.2, 0.94, 0.09, 2) if certified else (2.8, 0.88, 0.17, 1)
    with chart(9.6, inches, left=0.07, right=0.99, top=top, bottom=bottom, wspace=0.16, hspace=0.34) as page:
        # A logarithmic axis has no zero, so smaller values are drawn at its lower end.
        panels: tuple[tuple[str, float], ...] = (("distance", 1e-6),)
        if certified:
            panels = (*panels, ("gap", 1e-17), ("truncation", 1e-9))
        cursors = []
        for number, (name, least) in enumerate((*panels, ("skip ratio, %", None)), start=1):
            title = "relative gap" if name == "gap" else name
            axes = add_axes(page, rows, 2, number, title, log=least is not None)
            if least is None:
                ratios = [100 * _skip_ratio([table[epoch, *place] for place in places]) for epoch in epochs]
                axes.plot(epochs, ratios, "o-", color="#1d2129", markersize=3.5)
                axes.set_ylim(bottom=0)
            else:
                for cell, node in places:
                    colour, style, _ = styles[cell]
                    # There is no distance before training.
                    shown = [epoch for epoch in epochs if name != "distance" or epoch > 0]
                    values = [max(getattr(table[epoch, cell, node], name), least) for epoch in shown]
                    axes.plot(shown, values, style, color=colour, linewidth=1.2, marker="o", markersize=2)
            epoch_axis(axes, first, last)
            if number > 2 * (rows - 1):
                axes.set_xlabel("epoch")
            (x, _), (after, _) = axes.transData.transform([(last, 0), (last + 1, 0)]).tolist()
            box, height = axes.get_window_extent(), page.bbox.height
            cursors.append(
                f'<line class="cursor" x1="{x:.1f}" x2="{x:.1f}" y1="{height - box.y1:.1f}" '
                f'y2="{height - box.y0:.1f}" data-step="{after - x:.2f}"/>'
            )
        shown_names = "Distance, relative gap, truncation" if certified else "Distance"
        svg = chart_svg(page, "curves", f"{shown_names} and skip ratio over the epochs")
    return Markup(str(svg).rstrip().removesuffix("</svg>") + "".join(cursors) + "</svg>")


def _frame(file: Path) -> pd.DataFrame:
    text = io.BytesIO(read_at_most(file, TABLE_BYTES))
    # A plugin's operation may be called "nan", "None" or "3".
    names = dict.fromkeys(("cell", "picks", "op"), str)
    return pd.read_csv(text, dtype=names, keep_default_na=False, na_values=[""])


def _maps(run: RunDir, genotype: Genotype, table: Table, epochs: Epochs) -> list[dict[str, Any]]:
    """Return the template's values for the heat map of each kind; none if no codes were recorded."""
    frame = _frame(run.path / CODES_FILE) if (run.path / CODES_FILE).is_file() else pd.DataFrame()
    if frame.empty:
        return []
    space = space_of(genotype)
    return [_map(frame[frame["cell"] == kind], kind, space, table, epochs) for kind in genotype.kinds]


def _map(frame: pd.DataFrame, cell: str, space: SearchSpace, table: Table, epochs: Epochs) -> dict[str, Any]:
    """Return the template's values for the heat map of one kind: a row for each candidate, a column for each epoch."""
    step = max(1.0, min(24.0, _SPAN / len(epochs)))
    largest = float(frame["magnitude"].max())
    nodes, top = [], 0
    for node in sorted(frame["node"].unique().tolist()):
        rows = frame[frame["node"] == node]
        # The file lists candidates in the order of the search space.
        names = list(dict.fromkeys(zip(rows["op"], rows["state"], strict=True)))
        wide = rows.pivot(index=["op", "state"], columns="epoch", values="magnitude")
        values = wide.reindex(index=pd.MultiIndex.from_tuples(names), columns=epochs).to_numpy()
        kept = np.array([[name in table[epoch, cell, node].picks for epoch in epochs] for name in names])
        top += _HEADING
        nodes.append(
            {
                "node": node,
                "top": top,
                "height": _ROW * len(names),
                "names": [
                    (top + _ROW * i + 0.77 * _ROW, space.describe_pick(op, state, word="←"))
                    for i, (op, state) in enumerate(names)
                ],
                "uri": data_uri(_picture(values / largest if largest > 0 else values, kept)),
            }
        )
        top += _ROW * len(names)
    every = max(1, round(len(epochs) / 12))
    return {
        "cell": kind_title(cell),
        "gaps": frame["epoch"].nunique() < len(epochs),
        "largest": f"{largest:.2g}",
        "left": _LEFT,
        "span": step * len(epochs),
        "step": step,
        "width": _LEFT + step * len(epochs) + 8,
        "height": top + 34,
        "nodes": nodes,
        "ticks": [(_LEFT + step * (i + 0.5), epoch) for i, epoch in enumerate(epochs) if i % every == 0],
    }


def _picture(share: np.ndarray[Any, Any], kept: np.ndarray[Any, Any]) -> bytes:
    """Draw a pixel for each entry, as PNG: darker is larger, kept ones are blue, missing ones (NaN) pink."""
    from matplotlib import colormaps
    from PIL import Image

    depth = np.sqrt(np.nan_to_num(share))  # The square root makes small codes visible.
    colours = np.where(
        kept[..., None], colormaps["Blues"](0.15 + 0.85 * depth), colormaps["Greys"](0.75 * depth)
    )
    pixels = np.rint(255 * colours[..., :3]).astype(np.uint8)
    pixels[np.isnan(share)] = (255, 228, 225)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="png")
    return content.getvalue()
