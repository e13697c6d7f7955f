"""Terminal tables of the frames of `pipeline.report`."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from istanas.methods import has_alpha_half, validates
from pipeline.base.fitted_table import Column, FittedTable
from pipeline.base.text import count, duration, rounded
from pipeline.runs.outcome import shown_outcome

if TYPE_CHECKING:
    import pandas as pd

WIDE = 120
"""Smallest width of a terminal for the additional columns of a table of results."""


def results_table(frame: "pd.DataFrame", *, width: int = 80, none: str = "no runs yet") -> FittedTable:
    """Format a frame as a table, with trials indented under their sweep and retrainings under their search.

    "valid" and "test" are top-1. Top-5 has a column if a run has it. Runs that are not finished show their outcome, and
    runs with the same name show their directory.

    Args:
        frame: A frame of `pipeline.report.results_frame`.
        width: The width of the terminal. If it is at least `WIDE`, the table also has data set, method and start (local
            time); otherwise, it has at most one top-5 column, preferably that of the test split.
        none: The title of a table without rows.
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
    """Return run id -> label: the name, or the directory if the name is not unique, and the outcome."""
    import pandas as pd

    rows = frame.to_dict("records")
    names = Counter(row["name"] for row in rows)
    folders = Counter(_folder(row) for row in rows)
    labels = {}
    for row in rows:
        label, folder = str(row["name"]), _folder(row)
        if names[row["name"]] > 1:
            # A run that was started over has the same directory as the earlier one.
            label = folder if folder and folders[folder] == 1 else f"{folder or label} {row['run_id'][:8]}"
        # A child run needs no origin, because the table shows it below its parent.
        has_parent = pd.notna(row["parent_run_id"])
        notes = [] if pd.isna(row["origin"]) or has_parent else [row["origin"]]
        if row["outcome"] != "FINISHED":
            notes.append(shown_outcome(row["outcome"]))
        labels[row["run_id"]] = f"{label} ({', '.join(notes)})" if notes else label
    return labels


def _folder(row: Mapping[Any, Any]) -> str:
    """Return the last part of a run's directory, or the last two for a trial; empty if the directory is unknown."""
    import pandas as pd

    if pd.isna(row["run_dir"]):
        return ""
    parts = str(row["run_dir"]).rstrip("/").split("/")
    return "/".join(parts[-2:] if parts[-1] == row["name"] else parts[-1:])


def weights_table(frame: "pd.DataFrame") -> FittedTable:
    """Format a frame as a table, with the results of retraining below those of each search.

    "test" is top-1, and "points" are the percentage points that retraining gains.

    Args:
        frame: A frame of `pipeline.report.weights_frame`.

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
    """Explain in one sentence on which pictures the validation accuracies of a run were measured.

    Args:
        kind: "search", "retrain" or "sweep".
        method: The method of the search, which has no effect on a retraining.

    Example:
        >>> validation_note("retrain", "two_stage") == validation_note("search", "one_stage")
        True
    """
    if kind != "retrain" and has_alpha_half(method):
        return (
            f"Validation accuracy of a {method.replace('_', '-')} search is measured on the alpha half: the part of "
            "the training pictures (search.alpha_fraction) that does not train the weights. It may be low after a "
            "short search; the accuracy of what the search found is that of its retraining."
        )
    return (
        "Validation accuracy is measured on the hold-out: the part of the training pictures (data.holdout) "
        "that is not used for training."
    )


def has_validation(kind: str | None, method: str | None) -> bool:
    """Return whether the validation accuracies in a run's metrics belong to the architecture that it found or trained.

    Args:
        kind: "search", "retrain" or "sweep".
        method: The method of the search.

    Example:
        >>> has_validation("search", "two_stage"), has_validation("search", "measured")
        (True, False)
    """
    return kind != "search" or validates(method)


def effects_lines(effects: Mapping[str, Any]) -> list[str]:
    """Return two lines about the result of a search by measurements.

    Args:
        effects: `pipeline.jobs.results.EffectsResult`.
    """
    from istanas.effects import CERTAIN

    certain = (
        f"{effects['certain']} of {count(effects['choices'], 'choice')} certain (at least {rounded(CERTAIN)})"
    )
    improvement, best = effects["expected_improvement"], rounded(effects["probability_best"])
    return [
        f"{count(effects['measurements'], 'measurement')}: {certain}, {count(effects['toss_ups'], 'toss-up')} (odds "
        "below 2 to 1)",
        f"expected improvement by further measurements: {improvement:.2f} standard deviations of a score; the result "
        f"is better than every other measured architecture with a probability of {best}",
    ]


def top_columns(measured: Iterable[str]) -> dict[str, str]:
    """Return key -> heading of a table's accuracies: top-1 always, top-5 only if a run has it.

    Args:
        measured: The keys for which a run has a value.

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
    """Format a table cell; a missing value gives an empty cell."""
    import pandas as pd

    return "" if pd.isna(value) else text.format(value)


def shown_time(seconds: Any) -> str:
    """Format a table cell with a duration."""
    import pandas as pd

    return "" if pd.isna(seconds) else duration(seconds)
