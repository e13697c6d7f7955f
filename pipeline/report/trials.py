"""The table of a sweep's trials: as a file, as a pandas frame and on the terminal."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from istanas.errors import CheckpointError, ConfigError
from istanas.limits import TABLE_BYTES, read_at_most
from pipeline.base.files import atomic_write
from pipeline.base.fitted_table import Column, FittedTable
from pipeline.base.text import percent, short_names
from pipeline.report.terminal import shown, shown_time
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import REPORT_PAGE, TRIALS_TABLE
from pipeline.runs.outcome import shown_outcome

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


def read_table(folder: Path) -> pd.DataFrame:
    """The table that a sweep keeps in its run directory, as `sweep_frame` gives it.

    Raises:
        ConfigError: if the run is no sweep, or has begun no trial.
    """
    file = folder / TRIALS_TABLE
    if not file.is_file():
        raise ConfigError(
            f"no {TRIALS_TABLE} in this run",
            field=f"sweep {bucket.shown(folder)}",
            remedy="name a sweep that has started a trial",
        )
    try:
        text = io.BytesIO(read_at_most(file, TABLE_BYTES))
        return typed(pd.read_csv(text, dtype=COLUMNS, keep_default_na=False, na_values=[""]))
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"not a valid table of trials ({reason:.100})",
            field=bucket.shown(file),
            remedy="run the sweep's command again to recreate it",
        ) from None


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with whole numbers as such, though some trials lack the key, and mixed values as text."""
    keys = [name for name in frame.columns if name not in COLUMNS]
    kinds = {key: frame[key].convert_dtypes().dtype for key in keys}
    return frame.astype(
        {
            **COLUMNS,
            **{key: "string" if pd.api.types.is_object_dtype(kind) else kind for key, kind in kinds.items()},
        }
    )


def trials_table(frame: pd.DataFrame) -> FittedTable:
    """The frame for people: settings, figures, and the reason of a failure; the frame has the rest.

    Args:
        frame: as `sweep_frame` gives it.
    """
    keys = short_names(name for name in frame.columns if name not in COLUMNS)
    columns = [
        Column("trial"),
        Column("state", prose=True),
        *(Column(name) for name in keys.values()),
        *(
            Column(heading, right=True, rank=rank)
            for heading, rank in (("valid", 0), ("retrained", 1), ("params", 3), ("epochs", 4), ("time", 5))
        ),
        Column("genotype", rank=2),
    ]
    rows = []
    for row in frame.to_dict("records"):
        same = " (same)" if not pd.isna(row["reused"]) and row["reused"] else ""
        rows.append(
            [
                str(row["trial"]),
                _state(row),
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
    atomic_write(folder / TRIALS_TABLE, frame.to_csv(index=False))


def page_table(folder: Path, frame: pd.DataFrame) -> dict[str, Any]:
    """Everything that the template's table of trials shows: all of them, the best first.

    Args:
        folder: the sweep's run directory, in which the trials' own directories lie.
        frame: as `sweep_frame` gives it.

    Returns:
        "headings", "numbers" (places of the columns that hold numbers) and "rows" of (text, file or None): the file,
        relative to the folder, is the report of the trial's search or retraining. Only a finished run has a report.
    """
    keys = short_names(name for name in frame.columns if name not in COLUMNS)
    top1 = frame["retrained_top1"].fillna(frame["valid_top1"])
    # Trials that were stopped early have been measured too early to be compared with the others.
    order = pd.DataFrame({"done": frame["state"] == "COMPLETE", "top1": top1}).sort_values(
        ["done", "top1"], ascending=False, kind="stable"
    )
    rows: list[list[tuple[str, str | None]]] = []
    for row in frame.loc[order.index].to_dict("records"):
        retrained = "" if pd.isna(row["retrained_top1"]) else percent(row["retrained_top1"])
        texts = [
            *(shown(row[key], "{:.4g}" if isinstance(row[key], float) else "{}") for key in keys),
            "" if pd.isna(row["valid_top1"]) else percent(row["valid_top1"]),
        ]
        figures = [
            shown(row["params"], "{:,}"),
            shown(row["macs"], "{:,}"),
            shown(row["epochs"], "{:,}"),
            shown_time(row["seconds"]),
            shown(row["digest"], "{:.8}"),
        ]
        rows.append(
            [
                (str(row["trial"]), _report_of(folder, row["run_dir"])),
                (_state(row), None),
                *((text, None) for text in texts),
                (retrained, _report_of(folder, row["retrain_dir"])),
                *((text, None) for text in figures),
            ]
        )
    first = 2 + len(keys)
    return {
        "headings": [
            *("trial", "state", *keys.values()),
            *("in search", "retrained", "parameters", "multiply-adds", "epochs", "time", "genotype"),
        ],
        "numbers": set(range(first, first + 6)),
        "rows": rows,
    }


def _report_of(folder: Path, run_dir: Any) -> str | None:
    """The report of a run in a sweep's directory, relative to that; None if it has none."""
    if pd.isna(run_dir):
        return None
    run = RunDir(folder / str(run_dir).rstrip("/").rpartition("/")[2])
    try:
        # Not whether the file is here: of runs in a bucket, the report is where the run was computed.
        return f"{run.path.name}/{REPORT_PAGE}" if REPORT_PAGE in run.read().artifacts else None
    except CheckpointError:  # missing, or damaged: the table is worth having without the link
        return None


def _state(row: Mapping[Any, Any]) -> str:
    """What became of a trial, for people."""
    state = shown_outcome(row["state"]).lower() if pd.isna(row["reason"]) else f"failed: {row['reason']}"
    return f"{state}{', on the front' if row['pareto'] else ''}"
