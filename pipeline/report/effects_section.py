"""The section of `report.html` about the effects of the candidates, in the run of a search by measurements."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from markupsafe import Markup
from scipy.special import ndtr

from istanas.effects import CERTAIN, INTERVAL, TOSS_UP, levels, scores
from istanas.errors import ConfigError
from istanas.limits import TABLE_BYTES, read_at_most
from istanas.settings import Fidelity
from istanas.space import Genotype, kind_title, space_of
from istanas.statistics import kendall
from pipeline.base.text import count, rounded
from pipeline.report.html import BLUE, GREEN, ORANGE, add_axes, chart, chart_svg, data_uri
from pipeline.report.terminal import effects_lines
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import EFFECTS_FILE, MEASUREMENTS_FILE
from pipeline.runs.record import MetricsLine, RunRecord

_GREY = "#8d95a1"
_COLOURS = (BLUE, ORANGE, GREEN, "#6b4ea0", "#1d2129")  # of the stages
_ROW, _HEADING, _LEFT, _EFFECTS, _GAP, _MAP = (
    14,
    24,
    170,
    230,
    14,
    330,
)  # sizes of the map; its font size is 11


@dataclass(frozen=True, eq=False)
class _Measured:
    """The measurements in their order.

    Args:
        kept: Their kept candidates.
        fidelity: Their fidelities.
        level: The position of each fidelity among the different ones, from the lowest, (M,).
        score: Their scores after the last measurement, (M,).
        predicted: Their scores as predicted before each of them, NaN if there was no prediction, (M,).
        diverged: Whether the training has diverged, (M,).
    """

    kept: list[list[int]]
    fidelity: list[Fidelity]
    level: npt.NDArray[np.int64]
    score: npt.NDArray[np.float64]
    predicted: npt.NDArray[np.float64]
    diverged: npt.NDArray[np.bool_]


def effects_contents(run: RunDir, record: RunRecord) -> dict[str, Any]:
    """Return the template's values for the section about the effects.

    Args:
        run: The run directory of a search by measurements, of which `effects.csv`, `measurements.csv` and the metrics
            are read.
        record: The record of the run, whose result has the figures of `pipeline.jobs.results.EffectsResult`.

    Raises:
        OSError: If a table cannot be read.
        ValueError: If a table is too large, or damaged.
    """
    figures = record.result["effects"]
    space = space_of(Genotype.from_dict(record.result["genotype"]))
    effects, measured = _read_effects(run.path / EFFECTS_FILE), _read_measured(run.path / MEASUREMENTS_FILE)
    names = [space.describe_pick(op, state, word="←") for op, state in _pairs(effects)]
    following = [
        {
            "architecture": each["architecture"],
            "differences": _differences(effects, names, each["candidates"]) or "nothing: it is the result",
            "score": _score(each),
        }
        for each in figures["next"]
    ]
    return {
        "sentences": _sentences(figures, effects, names),
        "chart": _chart(run.metrics(), measured, figures["choices"]),
        "correlations": [_correlation(measured, level) for level in range(max(measured.level) + 1)],
        "interval": rounded(INTERVAL),
        "maps": _maps(figures, effects, names, measured),
        "diverged": bool(measured.diverged.any()),
        "following": following,
        "has_text": any(each["architecture"] for each in figures["next"]),
        "score": _score(figures),
    }


def _read_effects(file: Path) -> pd.DataFrame:
    # A plugin's operation may be called "nan", "None" or "3".
    return _frame(file, ("cell", "op"))


def _read_measured(file: Path) -> _Measured:
    frame = _frame(file, ("architecture", "candidates"), missing={"loss": ["nan"], "predicted": [""]})
    loss = frame["loss"].to_numpy(dtype=np.float64)
    pairs = zip(frame["layers"], frame["epochs"], strict=True)
    fidelity = [Fidelity(int(layers), int(epochs)) for layers, epochs in pairs]
    level = np.array(levels(fidelity))
    return _Measured(
        kept=[[int(number) for number in text.split()] for text in frame["candidates"]],
        fidelity=fidelity,
        level=level,
        score=scores(loss, level),
        predicted=frame["predicted"].to_numpy(dtype=np.float64),
        diverged=~np.isfinite(loss),
    )


def _frame(file: Path, texts: Sequence[str], missing: dict[str, list[str]] | None = None) -> pd.DataFrame:
    """Read a table with columns of text, and with texts that mean a missing number."""
    content = io.BytesIO(read_at_most(file, TABLE_BYTES))
    return pd.read_csv(
        content, dtype=dict.fromkeys(texts, str), keep_default_na=False, na_values=missing or {}
    )


def _pairs(effects: pd.DataFrame) -> list[tuple[str, int]]:
    return list(zip(effects["op"], effects["state"], strict=True))


def _places(effects: pd.DataFrame) -> list[tuple[str, int]]:
    """Return the decisions in the order of the space."""
    return list(dict.fromkeys(zip(effects["cell"], effects["node"], strict=True)))


def _rows(effects: pd.DataFrame, place: tuple[str, int]) -> pd.DataFrame:
    cell, node = place
    return effects[(effects["cell"] == cell) & (effects["node"] == node)]


def _score(figures: dict[str, Any]) -> str:
    return f"{figures['predicted']:.2f} ± {figures['deviation']:.2f}"


def _sentences(figures: dict[str, Any], effects: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Return what is certain and what is not, in sentences."""
    groups: dict[str, list[str]] = {"certain": [], "likely": [], "toss-up": []}
    for place, probability in zip(_places(effects), figures["choice_probabilities"], strict=True):
        rows = _rows(effects, place)
        kept = ", ".join(names[number] for number in rows.index[rows["kept"]])
        groups[_word(probability)].append(f"{place[0]} node {place[1]}: {kept} ({rounded(probability)})")
    titles = {
        "certain": f"Certain (at least {rounded(CERTAIN)})",
        "likely": "Likely",
        "toss-up": "Toss-up (odds below 2 to 1)",
    }
    choices = [
        f"{titles[word]}: {'; '.join(each) if each else 'no choice'}." for word, each in groups.items()
    ]
    _, improvement = effects_lines(figures)
    sparse = int((effects["lasso"] != 0).sum())
    return [
        *choices,
        f"{improvement[0].upper()}{improvement[1:]}.",
        f"The LASSO, whose l1 is chosen by BIC, keeps {sparse} of {count(len(effects), 'effect')} (relative duality "
        f"gap {figures['lasso_gap']:.1g}).",
    ]


def _word(probability: float) -> str:
    return "certain" if probability >= CERTAIN else "toss-up" if probability < TOSS_UP else "likely"


def _differences(effects: pd.DataFrame, names: Sequence[str], candidates: Sequence[int]) -> str:
    """Describe the candidates by which an architecture differs from the result."""
    parts = []
    for place in _places(effects):
        rows = _rows(effects, place)
        old = set(rows.index[rows["kept"]])
        new = set(candidates) & set(rows.index)
        if old != new:
            added, removed = (", ".join(names[n] for n in sorted(each)) for each in (new - old, old - new))
            parts.append(f"{place[0]} node {place[1]}: {added} instead of {removed}")
    return "; ".join(parts)


def _chart(lines: Sequence[MetricsLine], measured: _Measured, n_choices: int) -> Markup:
    """Draw the course of the posterior, and the measured scores against the predicted ones."""
    from matplotlib.ticker import MaxNLocator

    finished = [line.metrics for line in lines if "measured/epochs" in line.metrics]
    with chart(9.6, 3.2, left=0.05, right=0.99, top=0.9, bottom=0.16, wspace=0.22) as page:
        panels = (
            ("certain_choices", f"certain choices of {n_choices}"),
            ("expected_improvement", "expected improvement"),
        )
        for place, (name, title) in enumerate(panels, start=1):
            axes = add_axes(page, 1, 3, place, title)
            points = [
                (m["measured/count"], m[f"measured/{name}"]) for m in finished if f"measured/{name}" in m
            ]
            axes.step(*zip(*points, strict=True), where="post", color=BLUE)
            axes.set_xlabel("measurements")
            if place == 1:
                axes.set_ylim(-0.05 * n_choices, 1.05 * n_choices)
                axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            else:
                axes.set_ylim(bottom=0)
        axes = add_axes(page, 1, 3, 3, "measured score")
        for level in range(max(measured.level) + 1):
            own = _predicted(measured, level)
            axes.plot(
                measured.predicted[own],
                measured.score[own],
                "o",
                color=_COLOURS[level % len(_COLOURS)],
                ms=3.5,
                label=_fidelity_name(measured, level),
            )
        axes.axline((0, 0), slope=1, color=_GREY, linewidth=1, linestyle=":")
        axes.set_xlabel("predicted score")
        axes.legend(loc="best")
        return chart_svg(
            page,
            "effects",
            "Certain choices and expected improvement over the measurements; measured against predicted",
        )


def _predicted(measured: _Measured, level: int) -> npt.NDArray[np.bool_]:
    """Return which measurements have a fidelity and a prediction."""
    return (measured.level == level) & np.isfinite(measured.predicted)


def _fidelity_name(measured: _Measured, level: int) -> str:
    """Return the name of a fidelity, without its number of layers if all have the same."""
    fidelity = sorted(set(measured.fidelity))[level]
    several = len({each.layers for each in measured.fidelity}) > 1
    return str(fidelity) if several else count(fidelity.epochs, "epoch")


def _correlation(measured: _Measured, level: int) -> str:
    """Return Kendall's tau between predicted and measured scores of one fidelity, in words."""
    own = _predicted(measured, level)
    what = f"{count(int(own.sum()), 'measurement')} of {_fidelity_name(measured, level)}"
    try:
        tau = kendall(measured.predicted[own], measured.score[own])
    except ConfigError:  # fewer than four, or all equal
        return f"{what}: no rank correlation"
    return f"{what}: Kendall's tau {tau.estimate:.2f} ({tau.low:.2f} to {tau.high:.2f})"


def _maps(
    figures: dict[str, Any], effects: pd.DataFrame, names: Sequence[str], measured: _Measured
) -> list[dict[str, Any]]:
    """Return the template's values for the figure of each kind: effects, and the measurements as a map."""
    step = _MAP / len(measured.kept)
    least = float(effects[["low", "lasso"]].to_numpy().min())
    most = float(effects[["high", "lasso"]].to_numpy().max())
    span = max(most - least, 1e-9)

    def x(value: float) -> float:
        return round(_LEFT + 4 + (_EFFECTS - 8) * (value - least) / span, 2)

    pictures = _pixels(len(effects), measured)
    probabilities = dict(zip(_places(effects), figures["choice_probabilities"], strict=True))
    stages = np.flatnonzero(np.diff(measured.level)) + 1
    every = max(1, math.ceil(len(measured.kept) / 8))
    map_left = _LEFT + _EFFECTS + _GAP
    found = []
    for kind in dict.fromkeys(effects["cell"]):
        nodes, top = [], 0
        for place in _places(effects):
            if place[0] != kind:
                continue
            top += _HEADING
            rows = _rows(effects, place)
            nodes.append(
                {
                    "node": place[1],
                    "choice": f"{rounded(probabilities[place])}, {_word(probabilities[place])}",
                    "top": top,
                    "height": _ROW * len(rows),
                    "rows": [
                        _map_row(row, names[row["candidate"]], top + _ROW * (i + 0.5), x)
                        for i, row in enumerate(rows.to_dict("records"))
                    ],
                    "uri": data_uri(_png(pictures[rows.index])),
                }
            )
            top += _ROW * len(rows)
        found.append(
            {
                "cell": kind_title(kind),
                "nodes": nodes,
                "left": _LEFT,
                "middle": _LEFT + _EFFECTS / 2,
                "map_left": map_left,
                "map_width": _MAP,
                "width": map_left + _MAP + 8,
                "height": top + 38,
                "effect_ticks": [(x(tick), f"{tick:g}") for tick in _ticks(least, most)],
                "measurement_ticks": [
                    (round(map_left + step * (i + 0.5), 2), i + 1)
                    for i in range(0, len(measured.kept), every)
                ],
                "stages": [round(map_left + step * int(i), 2) for i in stages],
            }
        )
    return found


def _map_row(row: dict[Any, Any], name: str, y: float, x: Any) -> dict[str, Any]:
    return {
        "name": name,
        "y": y,
        "kept": row["kept"],
        "colour": BLUE if row["kept"] else _GREY,
        **{key: x(row[key]) for key in ("mean", "low", "high")},
        "lasso": x(row["lasso"]) if row["lasso"] != 0 else None,
    }


def _ticks(least: float, most: float) -> list[float]:
    """Return three to six round numbers within an interval, 0 among them if it contains 0."""
    rough = (most - least) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough)
    return [round(i * step, 10) + 0.0 for i in range(math.ceil(least / step), math.floor(most / step) + 1)]


def _pixels(n_candidates: int, measured: _Measured) -> npt.NDArray[np.uint8]:
    """Return a pixel for each candidate and measurement: white unless it was kept, darker for a smaller loss."""
    from matplotlib import colormaps

    pixels = np.full((n_candidates, len(measured.kept), 3), 255, dtype=np.uint8)
    colours = np.rint(255 * colormaps["Blues"](0.2 + 0.8 * ndtr(measured.score))[:, :3]).astype(np.uint8)
    colours[measured.diverged] = (179, 64, 14)
    for column, kept in enumerate(measured.kept):
        pixels[kept, column] = colours[column]
    return pixels


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="png")
    return content.getvalue()
