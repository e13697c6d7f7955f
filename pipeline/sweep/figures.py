"""Figures of what mattered in a sweep: drawn by Optuna, then made readable, as PNG and for an interactive page.

The PNG files have a white ground. The interactive figures have none, and only colours that can be seen on a light
and on a dark one; the page's style gives their texts its own colour.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna
from markupsafe import Markup
from optuna.distributions import IntDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from pipeline.base.text import short_names
from pipeline.config.schema import Config
from pipeline.sweep.space import sweep_of, trial_config
from pipeline.sweep.study import SETTINGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEWEST_FOR_IMPORTANCES = 8  # finished trials: a forest that is fitted to fewer tells noise
SCALE = ("#d9822b", "#8d8a99", "#2b8ae2")  # from the worst to the best
TOP1 = "top-1"
_GRID, _NONE = "rgba(128,136,148,0.3)", "rgba(0,0,0,0)"
_DIMENSION = 110  # pixels that the labels of a parallel coordinate need
_FONT = 'system-ui, "Segoe UI", "DejaVu Sans", sans-serif'


@dataclass(frozen=True)
class Plot:
    """One figure of a sweep.

    Args:
        name: of its file and of its section in the page.
        png: the picture.
        html: the same, interactive; the first of several brings the script that all of them need.
        width: pixels that the interactive figure needs at least; narrower windows scroll.
    """

    name: str
    png: bytes
    html: Markup
    width: int

    @property
    def title(self) -> str:
        """The name for people."""
        return self.name.replace("_", " ").capitalize()


def draw_plots(config: Config, own: Study, say: Callable[[str], None]) -> tuple[Plot, ...]:
    """Draw importances, parallel coordinates and history, and the Pareto front of several objectives.

    Args:
        config: of the sweep.
        own: its own trials, as `own_study` gives them.
        say: told of figures that cannot be drawn, with the reason.
    """
    import matplotlib

    matplotlib.use("Agg")
    plots: list[Plot] = []
    with (
        warnings.catch_warnings(),
        matplotlib.rc_context(),
    ):  # Optuna changes the style of all figures to come
        warnings.simplefilter("ignore")  # of an axis that has one value
        finished = len(own.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
        if finished < FEWEST_FOR_IMPORTANCES:
            say(
                f"importances: not drawn ({finished} finished trials; below {FEWEST_FOR_IMPORTANCES} they are chance, "
                "run more)"
            )
        for name, draw in _drawings(config, own):
            try:
                png, figure, width = draw()
            except Exception as error:  # too few trials, all with the same value: libraries' own reasons
                say(f"{name.replace('_', ' ')}: not drawn ({error})")
                continue
            html = figure.to_html(
                full_html=False,
                include_plotlyjs=not plots,
                div_id=f"{name}-figure",
                config={"displaylogo": False, "responsive": True},
            )
            # Made by plotly: a script in which names are escaped as JSON.
            plots.append(Plot(name, png, Markup(html), width))
    return tuple(plots)


def draw_freezing(config: Config, own: Study) -> bytes | None:
    """Draw the initial learning rate of each trial against the epochs after which its nodes froze.

    Args:
        config, own: as `draw_plots` takes them.

    Returns:
        A PNG; None if no trial was a one-stage search.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def rate(trial: FrozenTrial) -> float:
        return trial_config(config, trial.user_attrs[SETTINGS]).search.lr

    frozen = (t for t in own.get_trials(deepcopy=False) if t.user_attrs.get("frozen_epochs"))
    trials = sorted(frozen, key=rate)
    if not trials:
        return None
    _, axes = pyplot.subplots(layout="constrained")
    for trial in trials:
        epochs = trial.user_attrs["frozen_epochs"]
        axes.plot([rate(trial)] * len(epochs), epochs, "o", color="#4878a8", alpha=0.5, markersize=6)
    last = [max(trial.user_attrs["frozen_epochs"]) for trial in trials]
    axes.plot([rate(trial) for trial in trials], last, "-", color="#c44e52", label="last node of a trial")
    axes.set(
        xscale="log", xlabel="initial learning rate (search.lr)", ylabel="epoch after which a node froze"
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(axes)


def _drawings(config: Config, own: Study) -> Iterator[tuple[str, Callable[[], tuple[bytes, Any, int]]]]:
    """The name of each figure, and what draws it: as PNG, with plotly, and how wide that has to be."""
    objectives = sweep_of(config).objectives
    study, names = _with_short_names(config, own), short_names(sweep_of(config).space)
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    shared = sorted(name for name in names.values() if done and all(name in t.params for t in done))
    whole = {name for name in shared if isinstance(done[0].distributions[name], IntDistribution)}

    def top1(trial: FrozenTrial) -> float:
        return float(trial.values[objectives.index("top1")])

    of_top1 = {"target": top1 if len(objectives) > 1 else None, "target_name": TOP1}

    def figures(function: str, **options: Any) -> tuple[Axes, Any]:
        from optuna import visualization as page
        from optuna.visualization import matplotlib as picture

        axes = getattr(picture, function)(study, **options)
        return axes.flat[0] if hasattr(axes, "flat") else axes, getattr(page, function)(study, **options)

    def plain(function: str, **options: Any) -> tuple[bytes, Any, int]:
        axes, figure = figures(function, **options)
        return _png(_on_white(axes)), _on_any_ground(figure), 0

    def parallel() -> tuple[bytes, Any, int]:
        axes, figure = figures("plot_parallel_coordinate", params=shared, **of_top1)
        labels = [TOP1, *shared]
        _label_picture(_on_white(axes), labels, whole)
        _label_page(_on_any_ground(figure), labels, whole)
        return _png(axes, width=1.5 + 1.4 * len(labels)), figure, _DIMENSION * (len(labels) + 1)

    if len(done) >= FEWEST_FOR_IMPORTANCES:
        # Optuna's own choice of an evaluator asks what makes values low.
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        yield "importances", lambda: plain("plot_param_importances", evaluator=evaluator, **of_top1)
    yield "parallel_coordinates", parallel
    yield "history", lambda: plain("plot_optimization_history", **of_top1)
    if len(objectives) in (2, 3):
        yield "pareto_front", lambda: plain("plot_pareto_front", target_names=objectives)


def _with_short_names(config: Config, own: Study) -> Study:
    """A copy whose keys have their short names, because Optuna's figures cut long ones off."""
    names = short_names(sweep_of(config).space)
    study = optuna.create_study(study_name=own.study_name, directions=own.directions)
    for trial in own.get_trials(deepcopy=False):
        study.add_trial(
            optuna.create_trial(
                state=trial.state,
                values=trial.values,
                params={names[key]: value for key, value in trial.params.items()},
                distributions={names[key]: kind for key, kind in trial.distributions.items()},
                intermediate_values=trial.intermediate_values,
            )
        )
    return study


def _png(axes: Axes, width: float = 9.0) -> bytes:
    from matplotlib import pyplot

    picture, buffer = axes.figure, io.BytesIO()
    picture.set_size_inches(max(width, 9.0), 5)  # type: ignore[union-attr]
    picture.savefig(buffer, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})  # type: ignore[union-attr]
    pyplot.close(picture)  # type: ignore[arg-type]
    return buffer.getvalue()


def _on_white(axes: Axes) -> Axes:
    """The figure without the grey ground of the style that Optuna sets."""
    for each in axes.figure.axes:
        each.set_facecolor("white")
        each.grid(color="#e4e4e4")
    return axes


def _label_picture(axes: Axes, labels: Sequence[str], whole: set[str]) -> None:
    """Give parallel coordinates level names, few rounded ticks, and colours that can be seen on white."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    figure = axes.figure
    axes.set_xticks(range(len(labels)), labels=labels, rotation=0)
    (lines,) = (each for each in axes.collections if isinstance(each, LineCollection))
    lines.set_cmap(LinearSegmentedColormap.from_list("worst to best", SCALE))
    axes.grid(False)
    rounded = FuncFormatter(lambda value, _: f"{value:.3g}")
    axes.yaxis.set_major_formatter(rounded)
    # Optuna draws the objective's axes and the colour bar first, then an axis for each key.
    for label, axis in zip(labels[1:], figure.axes[2:], strict=True):
        axis.grid(False)
        axis.set_facecolor("none")
        axis.tick_params(colors="#333333")
        axis.spines[["left", "right"]].set_color("#888888")
        if axis.get_yscale() == "log":
            axis.yaxis.set_major_locator(FixedLocator(_log_ticks(*axis.get_ylim())))
            axis.yaxis.set_minor_locator(NullLocator())
        elif not isinstance(axis.yaxis.get_major_locator(), FixedLocator):  # names of choices
            axis.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=label in whole))
        else:
            continue
        axis.yaxis.set_major_formatter(rounded)
    for axis in figure.axes[2:]:
        for text in axis.get_yticklabels():
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})


def _log_ticks(low: float, high: float) -> list[float]:
    """Both ends and the powers of ten between them that do not crowd an end.

    Example:
        >>> _log_ticks(0.002, 0.3)
        [0.002, 0.01, 0.1, 0.3]
    """
    import math

    first, last = math.log10(low), math.log10(high)
    room = 0.07 * (last - first)
    powers = range(math.ceil(first), math.floor(last) + 1)
    return [low, *(10.0**power for power in powers if first + room < power < last - room), high]


def _on_any_ground(figure: Any) -> Any:
    """The figure without a ground of its own, in our style."""
    axis = {"gridcolor": _GRID, "zerolinecolor": _GRID, "linecolor": _GRID, "automargin": True}
    figure.update_layout(
        template="none",
        title=None,
        paper_bgcolor=_NONE,
        plot_bgcolor=_NONE,
        legend_bgcolor=_NONE,
        font={"family": _FONT, "size": 13},
        hoverlabel={"bgcolor": "#1d2129", "bordercolor": "#1d2129", "font": {"color": "#ffffff"}},
        modebar={"bgcolor": _NONE, "color": "#8d8a99", "activecolor": "#2b8ae2"},
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        height=420,
    )
    figure.update_xaxes(title_standoff=10, **axis)
    figure.update_yaxes(title_standoff=10, **axis)
    return figure


def _label_page(figure: Any, labels: Sequence[str], whole: set[str]) -> None:
    """Give parallel coordinates full names, no fractions of whole numbers, and colours for both grounds."""
    from plotly.colors import sample_colorscale

    figure.update_layout(xaxis_ticktext=list(labels), xaxis_tickangle=0)
    figure.layout.annotations = [
        each for each in figure.layout.annotations if labels[int(each.x)] not in whole or "." not in each.text
    ]
    for trace in figure.data:
        if trace.mode == "lines":
            trace.update(
                line_color=sample_colorscale(list(SCALE), [trace.y[0]])[0], line_width=1.8, opacity=0.8
            )
        else:  # has the colour bar
            trace.marker.update(colorscale=list(SCALE), reversescale=False)
