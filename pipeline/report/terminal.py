"""Terminal tables of the frames that `pipeline.report` makes."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.base.fitted_table import Column, FittedTable
from pipeline.base.text import duration
from pipeline.runs.outcome import shown_outcome

if TYPE_CHECKING:
    import pandas as pd

WIDE = 120
"""Columns of a terminal from which on a table of results says more."""


def results_table(frame: "pd.DataFrame", *, width: int = 80, none: str = "no runs yet") -> FittedTable:
    """The frame as a table; trials are set in under their sweep, retrainings under their search.

    Valid and test are top-1, and a split has a column of top-5 if a run has one. An outcome is shown where a run is
    not finished, and a run's directory where several runs have its name. The frame has the rest.

    Args:
        frame: as `pipeline.report.results_frame` gives it.
        width: of the terminal; from `WIDE` on, method, data set and start (local time) are shown too. Below, only one
            column of top-5 is shown: of the test split if a run has it.
        none: what to say of a frame without rows.
    """
    tops = top_columns(key for key in frame.columns if frame[key].notna().any())
    if width < WIDE and "test_top5" in tops:
        tops.pop("valid_top5", None)
    ranks = {"valid_top1": 3, "valid_top5": 6, "test_top1": 1, "test_top5": 5}
    columns = [
        Column("run"),
        Column("genotype", rank=2),
        *(Column(heading, right=True, rank=ranks[key]) for key, heading in tops.items()),
        *(
            Column(heading, right=True, rank=rank)
            for heading, rank in (("params", 4), ("MACs", 8), ("time", 7))
        ),
        *(Column(heading, rank=9) for heading in ("data", "method", "started") if width >= WIDE),
    ]
    labels = _labels(frame)
    depths: dict[Any, int] = {}
    rows = []
    for row in frame.to_dict("records"):
        depths[row["run_id"]] = depth = depths.get(row["parent_run_id"], -1) + 1
        cells = [
            f"{'  ' * depth}{labels[row['run_id']]}",
            shown(row["genotype"], "{:.8}"),
            *(shown(row[key], "{:.2%}") for key in tops),
            shown(row["params"], "{:,}"),
            shown(row["macs"], "{:,}"),
            shown_time(row["seconds"]),
        ]
        if width >= WIDE:
            started = f"{row['started'].to_pydatetime().astimezone():%Y-%m-%d %H:%M}"
            cells += [shown(row["dataset"], "{}"), shown(row["method"], "{}"), started]
        rows.append(cells)
    return FittedTable(columns, rows, title=None if len(frame) else none)


def _labels(frame: "pd.DataFrame") -> dict[str, str]:
    """Run id -> what a table calls it: its name, or its directory's where others have its name, and its outcome."""
    import pandas as pd

    rows = frame.to_dict("records")
    names = Counter(row["name"] for row in rows)
    folders = Counter(_folder(row) for row in rows)
    labels = {}
    for row in rows:
        label, folder = str(row["name"]), _folder(row)
        if names[row["name"]] > 1:
            # A run that was started over has the directory of the one before.
            label = folder if folder and folders[folder] == 1 else f"{folder or label} {row['run_id'][:8]}"
        # Of a cell that a run has found, the table says so by its place below that run.
        found = pd.notna(row["parent_run_id"])
        notes = [] if pd.isna(row["origin"]) or found else [row["origin"]]
        if row["outcome"] != "FINISHED":
            notes.append(shown_outcome(row["outcome"]))
        labels[row["run_id"]] = f"{label} ({', '.join(notes)})" if notes else label
    return labels


def _folder(row: Mapping[Any, Any]) -> str:
    """The last part of a run's directory, of a sweep's trial the last two; empty if it is not known."""
    import pandas as pd

    if pd.isna(row["run_dir"]):
        return ""
    parts = str(row["run_dir"]).rstrip("/").split("/")
    return "/".join(parts[-2:] if parts[-1] == row["name"] else parts[-1:])


def weights_table(frame: "pd.DataFrame") -> FittedTable:
    """The frame as a table: a search's weights, under them the retrained ones.

    Test is top-1; points are per cent points that retraining gains. The frame has the rest.

    Args:
        frame: as `pipeline.report.weights_frame` gives it.

    Example:
        >>> from pipeline.report import weights_frame
        >>> weights_table(weights_frame(tracking_uri="sqlite:////nowhere/mlflow.db")).title
        'no finished one-stage search yet'
    """
    import pandas as pd

    columns = [
        Column("one-stage weights\n  retrained"),
        Column("genotype", rank=3),
        *(
            Column(heading, right=True, rank=rank)
            for heading, rank in (("test", 0), ("points", 1), ("params", 2), ("epochs", 4), ("time", 5))
        ),
    ]

    def figures(row: dict[Any, Any], weights: str, points: str) -> list[str]:
        return [
            shown(row[f"{weights}_top1"], "{:.2%}"),
            points,
            shown(row[f"{weights}_params"], "{:,}"),
            shown(row[f"{weights}_epochs"], "{:,}"),
            shown_time(row[f"{weights}_seconds"]),
        ]

    rows = []
    above = None
    for row in frame.to_dict("records"):
        if row["run_id"] != above:
            rows.append([row["name"], shown(row["genotype"], "{:.8}"), *figures(row, "one_stage", "")])
        above = row["run_id"]
        if pd.isna(row["retrain_run_id"]):
            rows.append(["  not retrained yet", *[""] * 6])
        else:
            points = shown(100 * row["difference"], "{:+.2f}")
            rows.append([f"  {row['retrain_name']}", "", *figures(row, "retrained", points)])
    return FittedTable(columns, rows, title=None if len(frame) else "no finished one-stage search yet")


def validation_note(kind: str, method: str) -> str:
    """Return on which pictures the validation accuracies of a run were measured, in one sentence.

    Args:
        kind: "search", "retrain" or "sweep".
        method: of the search. A retraining has no alphas to train, whatever the method is.

    Example:
        >>> validation_note("retrain", "two_stage") == validation_note("search", "one_stage")
        True
    """
    if method == "two_stage" and kind != "retrain":
        return (
            "Validation accuracy of a two-stage search is measured on the alpha half: the part of the training "
            "pictures (search.alpha_fraction) that trains the alphas and not the weights."
        )
    return (
        "Validation accuracy is measured on the hold-out: the part of the training pictures (data.holdout) "
        "that trains nothing."
    )


def top_columns(measured: Iterable[str]) -> dict[str, str]:
    """Return key -> heading of a table's accuracies: always top-1; top-5, to save width, only where a run has it.

    Args:
        measured: keys of which a run has a value.

    Example:
        >>> top_columns(["test_top1", "test_top5"])
        {'valid_top1': 'valid', 'test_top1': 'test', 'test_top5': 'test top-5'}
    """
    headings = {
        "valid_top1": "valid",
        "valid_top5": "valid top-5",
        "test_top1": "test",
        "test_top5": "test top-5",
    }
    keys = {"valid_top1", "test_top1", *measured}
    return {key: heading for key, heading in headings.items() if key in keys}


def shown(value: Any, text: str) -> str:
    """A cell of a table: the value in this format, nothing for a missing one."""
    import pandas as pd

    return "" if pd.isna(value) else text.format(value)


def shown_time(seconds: Any) -> str:
    """A cell of a table with a time."""
    import pandas as pd

    return "" if pd.isna(seconds) else duration(seconds)
