"""Figures of a sweep, drawn by Optuna and restyled: as PNG files, and as interactive figures for a page.

PNG files have a white background. Interactive figures have a transparent one, and colours that are visible on light
and on dark pages; the page's style sheet colours their texts.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import optuna
from markupsafe import Markup
from optuna.distributions import IntDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from pipeline.base.text import count, short_names
from pipeline.config.schema import Config
from pipeline.sweeps.front import FrontPoint, draw_front, front_of
from pipeline.sweeps.space import sweep_of, trial_config
from pipeline.sweeps.study import SETTINGS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIN_TRIALS_FOR_IMPORTANCES = 8  # with fewer finished trials, importances are noise
SCALE = ("#d9822b", "#8d8a99", "#2b8ae2")  # from the worst to the best trial
TOP1 = "top-1"
_GRID, _TRANSPARENT = "rgba(128,136,148,0.3)", "rgba(0,0,0,0)"
_AXIS_WIDTH = 110  # pixels between two axes of the parallel coordinates, wide enough for their labels
_FONT = 'system-ui, "Segoe UI", "DejaVu Sans", sans-serif'


@dataclass(frozen=True)
class Plot:
    """One figure of a sweep.

    Args:
        name: The name of its file, and of its section in the page.
        png: The figure as a picture.
        html: The interactive figure. The first one of a page contains the script that all need.
        width: The smallest width of the interactive figure in pixels. Narrower windows scroll.
    """

    name: str
    png: bytes
    html: Markup
    width: int

    @property
    def title(self) -> str:
        """The heading of the figure."""
        return self.name.replace("_", " ").capitalize()


def draw_plots(config: Config, own: Study, say: Callable[[str], None]) -> tuple[Plot, ...]:
    """Draw importances, parallel coordinates, history and fronts.

    A sweep over `search.cost_weight` has the accuracy against the cost, and one with several objectives their front.

    Args:
        config: The sweep's configuration.
        own: The sweep's own trials, as `own_study` returns them.
        say: Called with a line for each figure that cannot be drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    plots: list[Plot] = []
    # Optuna sets a global matplotlib style.
    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore")  # matplotlib warns of an axis with a single value.
        finished = len(own.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
        if finished < MIN_TRIALS_FOR_IMPORTANCES:
            say(
                f"importances: not drawn (only {count(finished, 'finished trial')}; fewer than "
                f"{MIN_TRIALS_FOR_IMPORTANCES} give noise)"
            )
        for name, draw in _drawings(config, own):
            try:
                png, figure, width = draw()
            except Exception as error:  # Libraries raise many errors, for example if all values are equal.
                say(f"{name.replace('_', ' ')}: not drawn ({error})")
                continue
            html = figure.to_html(
                full_html=False,
                include_plotlyjs=not plots,
                div_id=f"{name}-figure",
                config={"displaylogo": False, "responsive": True},
            )
            # plotly escapes names as JSON in its script, so the markup is safe.
            plots.append(Plot(name, png, Markup(html), width))
    return tuple(plots)


def draw_freezing(config: Config, own: Study) -> bytes | None:
    """Draw the epochs after which the nodes of each trial froze, by the trial's initial learning rate.

    Args:
        config: The sweep's configuration.
        own: The sweep's own trials, as `own_study` returns them.

    Returns:
        A PNG; `None` if no trial was a one-stage search.
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
    axes.plot([rate(trial) for trial in trials], last, "-", color="#c44e52", label="last node of each trial")
    axes.set(
        xscale="log", xlabel="initial learning rate (search.lr)", ylabel="epoch after which a node froze"
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(axes)


def _drawings(config: Config, own: Study) -> Iterator[tuple[str, Callable[[], tuple[bytes, Any, int]]]]:
    """Yield each figure's name and the function that draws it, which returns PNG, plotly figure and minimal width."""
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
        return _png(_on_white(axes)), _transparent(figure), 0

    def history() -> tuple[bytes, Any, int]:
        from matplotlib.ticker import MaxNLocator

        axes, figure = figures("plot_optimization_history", **of_top1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # Numbers of trials have no fractions.
        figure.update_xaxes(dtick=math.ceil(sweep_of(config).trials / 10))
        return _png(_on_white(axes)), _transparent(figure), 0

    def against(points: Sequence[FrontPoint], cost: str) -> tuple[bytes, Any, int]:
        axes, figure = draw_front(points, cost)
        return _png(_on_white(axes)), _transparent(figure), 0

    def parallel() -> tuple[bytes, Any, int]:
        axes, figure = figures("plot_parallel_coordinate", params=shared, **of_top1)
        labels = [TOP1, *shared]
        _label_picture(_on_white(axes), labels, whole)
        _label_page(_transparent(figure), labels, whole)
        return _png(axes, width=1.5 + 1.4 * len(labels)), figure, _AXIS_WIDTH * (len(labels) + 1)

    if len(done) >= MIN_TRIALS_FOR_IMPORTANCES:
        # Optuna's default evaluator explains low values, but high accuracies matter here.
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        yield "importances", lambda: plain("plot_param_importances", evaluator=evaluator, **of_top1)
    yield "parallel_coordinates", parallel
    yield "history", history
    points = front_of(config, own)
    for cost in dict.fromkeys(point.cost for point in points):
        yield f"accuracy_against_{cost}", partial(against, points, cost)
    if len(objectives) in (2, 3):
        yield "pareto_front", lambda: plain("plot_pareto_front", target_names=objectives)


def _with_short_names(config: Config, own: Study) -> Study:
    """Return a copy of the study with short key names, because Optuna truncates long labels."""
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
    """Give a figure a white background instead of the grey one of Optuna's style."""
    for each in axes.figure.axes:
        each.set_facecolor("white")
        each.grid(color="#e4e4e4")
    return axes


def _label_picture(axes: Axes, labels: Sequence[str], whole: set[str]) -> None:
    """Give parallel coordinates horizontal labels, few rounded ticks, and colours that are visible on white."""
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
    # The first two axes are those of the objective and the colour bar; one for each key follows.
    for label, axis in zip(labels[1:], figure.axes[2:], strict=True):
        axis.grid(False)
        axis.set_facecolor("none")
        axis.tick_params(colors="#333333")
        axis.spines[["left", "right"]].set_color("#888888")
        if axis.get_yscale() == "log":
            axis.yaxis.set_major_locator(FixedLocator(_log_ticks(*axis.get_ylim())))
            axis.yaxis.set_minor_locator(NullLocator())
        elif not isinstance(axis.yaxis.get_major_locator(), FixedLocator):  # Choices have fixed ticks.
            axis.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=label in whole))
        else:
            continue
        axis.yaxis.set_major_formatter(rounded)
    for axis in figure.axes[2:]:
        for text in axis.get_yticklabels():
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})


def _log_ticks(low: float, high: float) -> list[float]:
    """Return both ends, and the powers of ten between them that are not too close to an end.

    Example:
        >>> _log_ticks(0.002, 0.3)
        [0.002, 0.01, 0.1, 0.3]
    """
    first, last = math.log10(low), math.log10(high)
    room = 0.07 * (last - first)
    powers = range(math.ceil(first), math.floor(last) + 1)
    return [low, *(10.0**power for power in powers if first + room < power < last - room), high]


def _transparent(figure: Any) -> Any:
    """Give an interactive figure a transparent background, and the style of our pages."""
    axis = {"gridcolor": _GRID, "zerolinecolor": _GRID, "linecolor": _GRID, "automargin": True}
    figure.update_layout(
        template="none",
        title=None,
        paper_bgcolor=_TRANSPARENT,
        plot_bgcolor=_TRANSPARENT,
        legend_bgcolor=_TRANSPARENT,
        font={"family": _FONT, "size": 13},
        hoverlabel={"bgcolor": "#1d2129", "bordercolor": "#1d2129", "font": {"color": "#ffffff"}},
        modebar={"bgcolor": _TRANSPARENT, "color": "#8d8a99", "activecolor": "#2b8ae2"},
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        height=420,
    )
    figure.update_xaxes(title_standoff=10, **axis)
    figure.update_yaxes(title_standoff=10, **axis)
    return figure


def _label_page(figure: Any, labels: Sequence[str], whole: set[str]) -> None:
    """Give parallel coordinates full labels, whole numbers where keys have them, and colours for any background."""
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
        else:  # The other trace has the colour bar.
            trace.marker.update(colorscale=list(SCALE), reversescale=False)
