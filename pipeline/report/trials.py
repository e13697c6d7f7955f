"""The table of a sweep's trials: as a file, as a pandas frame, on the terminal and in HTML pages."""

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
"""Column -> pandas dtype of a sweep's table, which also has a column for each swept key.

- Accuracies are fractions. `epochs` and `seconds` are those of the search.
- `retrain_seconds` is the duration of the retraining, 0 if another trial had already retrained the same cell, in which
  case `reused` is true.
- `frozen_epochs` are the epochs after which the nodes of a one-stage search froze.
- `reason` is the reason of a failure.
"""


def read_table(folder: Path) -> pd.DataFrame:
    """Read the table in the run directory of a sweep.

    Raises:
        ConfigError: If the run is not a sweep, or has not started a trial, or the table is damaged.
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
    """Convert columns to nullable types, which keep integers next to missing values; mixed columns become text."""
    keys = [name for name in frame.columns if name not in COLUMNS]
    kinds = {key: frame[key].convert_dtypes().dtype for key in keys}
    return frame.astype(
        {
            **COLUMNS,
            **{key: "string" if pd.api.types.is_object_dtype(kind) else kind for key, kind in kinds.items()},
        }
    )


def trials_table(frame: pd.DataFrame) -> FittedTable:
    """Format the trials as a terminal table of settings and results.

    Args:
        frame: A frame of `sweep_frame` or `read_table`.
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
    """Return Kendall's tau between top-1 in the search and after retraining; `None` for fewer than two trials."""
    both = frame[["valid_top1", "retrained_top1"]].dropna().astype(float)
    if len(both) < 2:
        return None
    tau = float(stats.kendalltau(both["valid_top1"], both["retrained_top1"]).statistic)
    return None if pd.isna(tau) else tau


def write_table(folder: Path, frame: pd.DataFrame) -> None:
    """Write the table of a sweep into its run directory."""
    atomic_write(folder / TRIALS_TABLE, frame.to_csv(index=False))


def page_table(folder: Path, frame: pd.DataFrame) -> dict[str, Any]:
    """Return the values for the template's table of trials, sorted from the best trial to the worst.

    Args:
        folder: The sweep's run directory, which contains those of the trials.
        frame: A frame of `sweep_frame` or `read_table`.

    Returns:
        "headings", "numbers" (the indices of numeric columns) and "rows" of (text, file or `None`). The file is the
        report of the trial's search or retraining, relative to the folder. Only finished runs have one.
    """
    keys = short_names(name for name in frame.columns if name not in COLUMNS)
    top1 = frame["retrained_top1"].fillna(frame["valid_top1"])
    # Accuracies of trials that were stopped early cannot be compared with those of finished ones.
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
            *("search top-1", "retrained top-1", "parameters", "multiply-adds", "epochs", "time", "genotype"),
        ],
        "numbers": set(range(first, first + 6)),
        "rows": rows,
    }


def _report_of(folder: Path, run_dir: Any) -> str | None:
    """Return the report of a run in a sweep's directory, relative to it; `None` if the run has no report."""
    if pd.isna(run_dir):
        return None
    run = RunDir(folder / str(run_dir).rstrip("/").rpartition("/")[2])
    try:
        # The record is checked, not the file: with runs in a bucket, only the node of the trial has the file.
        return f"{run.path.name}/{REPORT_PAGE}" if REPORT_PAGE in run.read().artifacts else None
    except CheckpointError:  # The table is useful without links to damaged runs.
        return None


def _state(row: Mapping[Any, Any]) -> str:
    """Describe the state of a trial."""
    state = shown_outcome(row["state"]).lower() if pd.isna(row["reason"]) else f"failed: {row['reason']}"
    return f"{state}{', on the Pareto front' if row['pareto'] else ''}"
