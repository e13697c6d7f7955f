"""The table of a sweep's trials as a frame, and the sweep's figures and page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from optuna.study import Study
from optuna.trial import FrozenTrial

from pipeline.base.files import atomic_write
from pipeline.base.text import count, shown_value
from pipeline.cluster.tune import FAILED
from pipeline.config.schema import Config
from pipeline.report.html import render
from pipeline.report.trials import COLUMNS, page_table, typed
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import FRONT_TABLE, PLOTS_FOLDER, REPORT_PAGE, SWEEP_PAGE
from pipeline.runs.mlflow_link import read_link
from pipeline.sweeps.figures import draw_freezing, draw_plots
from pipeline.sweeps.front import front_of, front_table
from pipeline.sweeps.space import sweep_of
from pipeline.sweeps.study import SETTINGS, own_study


def sweep_frame(config: Config, study: Study) -> pd.DataFrame:
    """Return a frame with a row for each trial that was started.

    Args:
        config: The sweep's configuration.
        study: The sweep's study.

    Returns:
        A frame with the columns of `COLUMNS`, and a column for each swept key after `state`.
    """
    own, keys = own_study(study), list(sweep_of(config).space)
    front = {t.number for t in own.best_trials} if len(own.directions) > 1 else set()
    rows = [_row(trial, keys, trial.number in front) for trial in own.get_trials(deepcopy=False)]
    names = list(COLUMNS)
    order = [*names[:2], *keys, *names[2:]]
    return typed(pd.DataFrame(rows, columns=order))


def _cell(value: Any) -> Any:
    """Return the table cell of a setting. `None` becomes text: an empty cell means that the key does not apply."""
    return shown_value(value) if value is None or isinstance(value, list) else value


def write_figures(
    folder: Path, config: Config, own: Study, frame: pd.DataFrame, say: Callable[[str], None]
) -> tuple[str, ...]:
    """Write a sweep's figures as PNG, and a page with the interactive ones and the table of all trials.

    A sweep over the weight of the costs also has the table of its front.

    Args:
        folder: The sweep's run directory.
        config: The sweep's configuration.
        own: The sweep's own trials, as `own_study` returns them.
        frame: The same trials, as `sweep_frame` returns them.
        say: Called with a line for each figure that cannot be drawn.

    Returns:
        The names of the files, relative to the folder.
    """
    plots = draw_plots(config, own, say)
    pictures = {plot.name: plot.png for plot in plots}
    freezing = draw_freezing(config, own)
    if freezing is not None:
        pictures["freezing"] = freezing
    for name, png in pictures.items():
        atomic_write(folder / PLOTS_FOLDER / f"{name}.png", png)
    tables: tuple[str, ...] = ()
    if points := front_of(config, own):
        atomic_write(folder / FRONT_TABLE, front_table(points))
        tables = (FRONT_TABLE,)
    page = render(
        "sweep.html",
        title=own.study_name,
        subtitle=f"Sweep with {count(len(frame), 'trial')}, {_objectives(config)}",
        footer=f"Run directory {folder.name}",
        report=REPORT_PAGE,
        plots=plots,
        trials=page_table(folder, frame),
    )
    atomic_write(folder / SWEEP_PAGE, page)
    return (*(f"{PLOTS_FOLDER}/{name}.png" for name in pictures), *tables, SWEEP_PAGE)


def _objectives(config: Config) -> str:
    names = sweep_of(config).objectives
    return f"{'objective' if len(names) == 1 else 'objectives'}: {', '.join(names)}"


def _row(trial: FrozenTrial, keys: Sequence[str], pareto: bool) -> dict[str, Any]:
    figures = trial.user_attrs
    settings = figures.get(SETTINGS, {})
    link = read_link(RunDir(bucket.local(figures["run_dir"]))) if "run_dir" in figures else None
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
