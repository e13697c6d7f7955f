"""What a sweep has found: a table of its trials, and figures of what mattered, as PNG and in one interactive page."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from markupsafe import Markup
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from scipy import stats

from istanas.errors import ConfigError
from istanas.limits import TABLE_BYTES, read_at_most
from pipeline import storage
from pipeline.fitted import Column, FittedTable
from pipeline.pages import render
from pipeline.rundir import RunDir, atomic_write
from pipeline.schema import Config, shown_value
from pipeline.study import FAILED, SETTINGS, own_study
from pipeline.sweep_space import sweep_of, trial_config
from pipeline.tables import shown, shown_time
from pipeline.tracking import read_link

TABLE_FILE = "trials.csv"
PAGE_FILE = "sweep.html"
PLOTS = "plots"
FEWEST_FOR_IMPORTANCES = 8  # finished trials: a forest that is fitted to fewer tells noise

COLUMNS: dict[str, str] = {
    "trial": "Int64",
    "state": "string",
    "valid_top1": "Float64",
    "retrained_top1": "Float64",
    "params": "Int64",
    "macs": "Int64",
    "epochs": "Int64",
    "seconds": "Float64",
    "retrain_seconds": "Float64",
    "digest": "string",
    "reused": "boolean",
    "frozen_epochs": "string",
    "pareto": "boolean",
    "reason": "string",
    "run_dir": "string",
    "retrain_dir": "string",
    "mlflow_run_id": "string",
}
"""Column -> pandas dtype of a sweep's table, beside a column for every swept key: accuracies are fractions, `epochs`
and `seconds` those of the search, `retrain_seconds` of the retraining (0 if there was none to do), `reused` says that
another trial had retrained the same cell, `frozen_epochs` after which epochs of a one-stage search its nodes froze,
`reason` why it failed."""

Plot = tuple[str, Callable[[], Any], Callable[[], Any]]  # name, with matplotlib, with plotly


def sweep_frame(config: Config, study: Study) -> pd.DataFrame:
    """One row for every trial that was begun.

    Args:
        config: of the sweep.
        study: its study.

    Returns:
        A frame with a column for every swept key, between `state` and the rest of `COLUMNS`.
    """
    own, keys = own_study(study), list(sweep_of(config).space)
    front = {t.number for t in own.best_trials} if len(own.directions) > 1 else set()
    rows = [_row(trial, keys, trial.number in front) for trial in own.get_trials(deepcopy=False)]
    names = list(COLUMNS)
    order = [*names[:2], *keys, *names[2:]]
    return _typed(pd.DataFrame(rows, columns=order))


def read_table(folder: Path) -> pd.DataFrame:
    """The table that a sweep keeps in its run directory, as `sweep_frame` gives it.

    Raises:
        ConfigError: if the run is no sweep, or has begun no trial.
    """
    file = folder / TABLE_FILE
    if not file.is_file():
        raise ConfigError(
            f"sweep {storage.shown(folder)}: has no {TABLE_FILE}, name a sweep that has begun a trial"
        )
    try:
        text = io.BytesIO(read_at_most(file, TABLE_BYTES))
        return _typed(pd.read_csv(text, dtype=COLUMNS, keep_default_na=False, na_values=[""]))
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{storage.shown(file)}: no table of trials ({reason:.100}); the sweep's command makes it anew"
        ) from None


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with whole numbers as such, though some trials lack the key, and mixed values as text."""
    keys = [name for name in frame.columns if name not in COLUMNS]
    kinds = {key: frame[key].convert_dtypes().dtype for key in keys}
    return frame.astype(
        {
            **COLUMNS,
            **{key: "string" if pd.api.types.is_object_dtype(kind) else kind for key, kind in kinds.items()},
        }
    )


def _cell(value: Any) -> Any:
    """A setting in the table; an empty cell is a key that does not apply."""
    return shown_value(value) if value is None or isinstance(value, list) else value


def trials_table(frame: pd.DataFrame) -> FittedTable:
    """The frame for people: settings, figures, and the reason of a failure; the frame has the rest.

    Args:
        frame: as `sweep_frame` gives it.
    """
    keys = [name for name in frame.columns if name not in COLUMNS]
    columns = [
        Column("trial"),
        Column("state", prose=True),
        *(Column(key.rpartition(".")[2]) for key in keys),
        *(
            Column(heading, right=True, rank=rank)
            for heading, rank in (("valid", 0), ("retrained", 1), ("params", 3), ("epochs", 4), ("time", 5))
        ),
        Column("genotype", rank=2),
    ]
    rows = []
    for row in frame.to_dict("records"):
        state = row["state"].lower() if pd.isna(row["reason"]) else f"failed: {row['reason']}"
        same = " (same)" if not pd.isna(row["reused"]) and row["reused"] else ""
        rows.append(
            [
                str(row["trial"]),
                f"{state}{', on the front' if row['pareto'] else ''}",
                *(shown(row[key], "{:.3g}" if isinstance(row[key], float) else "{}") for key in keys),
                shown(row["valid_top1"], "{:.2%}"),
                shown(row["retrained_top1"], "{:.2%}") + same,
                shown(row["params"], "{:,}"),
                shown(row["epochs"], "{}"),
                shown_time(row["seconds"]),
                shown(row["digest"], "{:.8}"),
            ]
        )
    return FittedTable(columns, rows)


def kendall_tau(frame: pd.DataFrame) -> float | None:
    """Kendall's tau between top-1 in search and after retraining; None below two trials that have both."""
    both = frame[["valid_top1", "retrained_top1"]].dropna().astype(float)
    if len(both) < 2:
        return None
    tau = float(stats.kendalltau(both["valid_top1"], both["retrained_top1"]).statistic)
    return None if pd.isna(tau) else tau


def write_table(folder: Path, frame: pd.DataFrame) -> None:
    """The table as a file."""
    atomic_write(folder / TABLE_FILE, frame.to_csv(index=False))


def write_figures(folder: Path, config: Config, own: Study, say: Callable[[str], None]) -> tuple[str, ...]:
    """Importances, parallel coordinates, history; the Pareto front of several objectives; when one-stage nodes froze.

    Args:
        folder: the sweep's run directory.
        config: of the sweep.
        own: its own trials, as `own_study` gives them.
        say: told of figures that can't be drawn, with the reason.

    Returns:
        The files, relative to the folder.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    files: list[str] = []
    parts: list[str] = []
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
        for name, draw, draw_page in _plots(config, own):
            try:
                axes, figure = draw(), draw_page()
            except Exception as error:  # too few trials, all with the same value: libraries' own reasons
                say(f"{name.replace('_', ' ')}: not drawn ({error})")
                continue
            buffer = io.BytesIO()
            picture = axes.flat[0].figure if hasattr(axes, "flat") else axes.figure
            picture.set_size_inches(9, 5)
            picture.savefig(buffer, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
            pyplot.close(picture)
            files.append(f"{PLOTS}/{name}.png")
            atomic_write(folder / files[-1], buffer.getvalue())
            parts.append(figure.to_html(full_html=False, include_plotlyjs=not parts, div_id=name))
    frozen = [t for t in own.get_trials(deepcopy=False) if t.user_attrs.get("frozen_epochs")]
    if frozen:
        files.append(f"{PLOTS}/freezing.png")
        atomic_write(folder / files[-1], _freezing_figure(config, frozen))
    if parts:
        # Made by plotly: scripts, in which names are escaped as JSON.
        page = render("sweep.html", title=f"Sweep {own.study_name}", parts=[Markup(part) for part in parts])
        atomic_write(folder / PAGE_FILE, page)
        files.append(PAGE_FILE)
    return tuple(files)


def _freezing_figure(config: Config, trials: Sequence[FrozenTrial]) -> bytes:
    """The initial learning rate of each trial against the epochs after which its nodes froze, as PNG."""
    from matplotlib import pyplot

    def rate(trial: FrozenTrial) -> float:
        return trial_config(config, trial.user_attrs[SETTINGS]).search.lr

    trials = sorted(trials, key=rate)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()


def _plots(config: Config, own: Study) -> list[Plot]:
    from optuna import visualization as page
    from optuna.visualization import matplotlib as picture

    objectives = sweep_of(config).objectives
    done = own.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    shared = [key for key in sweep_of(config).space if done and all(key in t.params for t in done)]

    def top1(trial: FrozenTrial) -> float:
        return float(trial.values[objectives.index("top1")])

    of_top1 = {"target": top1 if len(objectives) > 1 else None, "target_name": "top-1"}
    # Optuna's own choice of an evaluator asks what makes values low.
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    figures: list[tuple[str, str, dict[str, Any]]] = [
        ("parallel_coordinates", "plot_parallel_coordinate", {"params": shared, **of_top1}),
        ("history", "plot_optimization_history", of_top1),
    ]
    if len(done) >= FEWEST_FOR_IMPORTANCES:
        figures.insert(0, ("importances", "plot_param_importances", {"evaluator": evaluator, **of_top1}))
    if len(objectives) in (2, 3):
        figures.append(("pareto_front", "plot_pareto_front", {"target_names": objectives}))

    def bound(module: Any, function: str, options: dict[str, Any]) -> Callable[[], Any]:
        return lambda: getattr(module, function)(own, **options)

    return [(name, bound(picture, function, o), bound(page, function, o)) for name, function, o in figures]


def _row(trial: FrozenTrial, keys: Sequence[str], pareto: bool) -> dict[str, Any]:
    figures = trial.user_attrs
    settings = figures.get(SETTINGS, {})
    link = read_link(RunDir(storage.local(figures["run_dir"]))) if "run_dir" in figures else None
    return {
        "trial": trial.number,
        "state": trial.state.name,
        **{key: _cell(settings[key]) for key in keys if key in settings},
        **{name: figures.get(name) for name in COLUMNS if name in figures},
        "frozen_epochs": " ".join(map(str, figures["frozen_epochs"])) if "frozen_epochs" in figures else None,
        "pareto": pareto,
        "reason": figures.get(FAILED),
        "mlflow_run_id": None if link is None else link.run_id,
    }
