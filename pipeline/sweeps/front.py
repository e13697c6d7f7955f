"""The front of a sweep over the weight of the costs: accuracy against cost, with intervals over the seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
from optuna.study import Study
from optuna.trial import TrialState

from istanas.statistics import mean_interval
from pipeline.config.schema import Config
from pipeline.sweeps.space import Settings, readable, sweep_of, trial_config
from pipeline.sweeps.study import SETTINGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WEIGHT, SEED = "search.cost_weight", "seed"
AXES = {"macs": "multiply-adds", "params": "parameters", "latency": "predicted latency in ms"}
"""What `search.cost` may be -> the label of the axis."""
_FIGURES = {"latency": "latency_ms"}  # names of a trial's figures that differ from the cost's


@dataclass(frozen=True)
class FrontPoint:
    """The trials of a sweep that have the same weight of the costs, and differ in their seeds.

    Args:
        line: Their other swept settings in words, which are those of one line of the front; "" if there are none.
        cost: What the weight applies to, one of `AXES`.
        cost_weight: The weight.
        seeds: Number of seeds.
        cells: Number of different cells.
        mean_cost: Mean cost of the cells.
        saved: Fraction of the mean cost that is saved against the smallest weight of the line, for the same seeds;
            NaN if there are none.
        top1, low, high: Mean accuracy, in [0, 1], and its 95 % interval, which ends at the mean if there is one seed.
        change, change_low, change_high: Mean change of the accuracy against the smallest weight, for the same seeds, in
            the same way.
    """

    line: str
    cost: str
    cost_weight: float
    seeds: int
    cells: int
    mean_cost: float
    saved: float
    top1: float
    low: float
    high: float
    change: float
    change_low: float
    change_high: float


class _Outcome(NamedTuple):
    top1: float
    cost: float
    digest: str


def front_of(config: Config, own: Study) -> list[FrontPoint]:
    """Return the points of the front, sorted by line and weight; none if the sweep does not vary the weight.

    Args:
        config: The sweep's configuration.
        own: The sweep's own trials, as `own_study` returns them.
    """
    place = sweep_of(config).objectives.index("top1")
    lines: dict[tuple[str, str], dict[float, dict[int, _Outcome]]] = {}
    for trial in own.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        figures, settings = trial.user_attrs, trial.user_attrs[SETTINGS]
        if WEIGHT in settings:
            whole = trial_config(config, settings)
            cost = cost_of(whole)
            outcome = _Outcome(
                trial.values[place], float(figures[_FIGURES.get(cost, cost)]), figures["digest"]
            )
            weights = lines.setdefault((_line(settings), cost), {})
            weights.setdefault(float(settings[WEIGHT]), {})[whole.seed] = outcome
    return [
        _point(line, cost, weight, weights[weight], weights[min(weights)])
        for (line, cost), weights in sorted(lines.items())
        for weight in sorted(weights)
    ]


def cost_of(config: Config) -> str:
    """Return what the weight of the costs applies to."""
    return str(getattr(config.search, "cost"))  # noqa: B009, not all sections have the key


def _line(settings: Settings) -> str:
    return readable({key: value for key, value in settings.items() if key not in (WEIGHT, SEED)})


def _point(
    line: str, cost: str, weight: float, own: dict[int, _Outcome], first: dict[int, _Outcome]
) -> FrontPoint:
    same = [seed for seed in own if seed in first]
    saved = (
        1.0 - fmean([own[s].cost for s in same]) / fmean([first[s].cost for s in same]) if same else math.nan
    )
    top1, low, high = _with_interval([each.top1 for each in own.values()], 0.0, 1.0)
    changes = [own[s].top1 - first[s].top1 for s in same]
    change, change_low, change_high = _with_interval(changes, -1.0, 1.0)
    return FrontPoint(
        line=line,
        cost=cost,
        cost_weight=weight,
        seeds=len(own),
        cells=len({each.digest for each in own.values()}),
        mean_cost=fmean(each.cost for each in own.values()),
        saved=saved,
        top1=top1,
        low=low,
        high=high,
        change=change,
        change_low=change_low,
        change_high=change_high,
    )


def _with_interval(values: Sequence[float], low: float, high: float) -> tuple[float, float, float]:
    """Return the mean and the ends of its interval, all of them NaN without values."""
    if len(values) < 2:
        only = values[0] if values else math.nan
        return only, only, only
    found = mean_interval(values, low=low, high=high)
    return found.estimate, found.low, found.high


def front_table(points: Sequence[FrontPoint]) -> str:
    """Return the front as CSV, with the fields of `FrontPoint` as columns."""
    rows = pd.DataFrame([asdict(point) for point in points])
    if not rows["line"].any():
        rows = rows.drop(columns="line")
    return str(rows.to_csv(index=False, float_format="%.6g"))


def draw_front(points: Sequence[FrontPoint], cost: str) -> tuple[Axes, Any]:
    """Draw accuracy against a cost: one line for each choice of the other settings, and a bar for each interval.

    Args:
        points: Points of the front.
        cost: One of `AXES`. Other points are not drawn.

    Returns:
        The axes of a picture, and a plotly figure.
    """
    from matplotlib import pyplot
    from plotly import graph_objects

    _, axes = pyplot.subplots(layout="constrained")
    figure = graph_objects.Figure()
    lines = dict.fromkeys(point.line for point in points if point.cost == cost)
    for line in lines:
        own = [point for point in points if (point.line, point.cost) == (line, cost)]
        x, y = [point.mean_cost for point in own], [point.top1 for point in own]
        below, above = [p.top1 - p.low for p in own], [p.high - p.top1 for p in own]
        labels = [f"\u03bc = {point.cost_weight:g}" for point in own]
        axes.errorbar(x, y, yerr=[below, above], fmt="o-", capsize=4, label=line)
        for label, place in zip(labels, zip(x, y, strict=True), strict=True):
            axes.annotate(label, place, textcoords="offset points", xytext=(6, 6))
        bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
        figure.add_scatter(
            x=x,
            y=y,
            error_y=bars,
            text=labels,
            name=line,
            mode="lines+markers+text",
            textposition="top right",
        )
    axes.set(xlabel=AXES[cost], ylabel="top-1 (95 % interval over the seeds)")
    figure.update_layout(xaxis_title=AXES[cost], yaxis_title="top-1 (95 % interval over the seeds)")
    figure.update_layout(showlegend=len(lines) > 1)
    if len(lines) > 1:
        axes.legend()
    axes.grid(alpha=0.3)
    return axes, figure
