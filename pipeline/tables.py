"""Tables for the terminal: of the frames that `pipeline.report` makes, and of a cluster's jobs."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from pipeline.job_server import Job

WIDE = 120
"""Columns of a terminal from which on a table of results says more."""


def results_table(frame: "pd.DataFrame", *, width: int = 80, none: str = "no runs yet") -> "Table":
    """The frame as a table; trials are set in under their sweep, retrainings under their search.

    Valid and test are top-1, and a split has a column of top-5 if a run has one. A status is shown where a run is not
    finished: a trial that was stopped early is KILLED. The frame has the rest.

    Args:
        frame: as `pipeline.report.results_frame` gives it.
        width: of the terminal; from `WIDE` on, method, data set and start (local time) are shown too. Below, only one
            column of top-5 is shown: of the test split if a run has it.
        none: what to say of a frame without rows.
    """
    from rich import box
    from rich.table import Table

    table = Table(
        title=None if len(frame) else none, box=box.SIMPLE_HEAD, padding=0 if width < WIDE else (0, 1)
    )
    table.add_column("run", overflow="fold")
    table.add_column("genotype", no_wrap=True)
    tops = top_columns(key for key in frame.columns if frame[key].notna().any())
    if width < WIDE and "test_top5" in tops:
        tops.pop("valid_top5", None)
    for heading in (*tops.values(), "params", "MACs", "time"):
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for heading in ("data", "method", "started") if width >= WIDE else ():
        table.add_column(heading, no_wrap=True)
    depths: dict[Any, int] = {}
    for row in frame.to_dict("records"):
        depths[row["run_id"]] = depth = depths.get(row["parent_run_id"], -1) + 1
        cells = [
            f"{'  ' * depth}{row['name']}" + ("" if row["status"] == "FINISHED" else f" ({row['status']})"),
            shown(row["genotype"], "{:.8}"),
            *(shown(row[key], "{:.2%}") for key in tops),
            shown(row["params"], "{:,}"),
            shown(row["macs"], "{:,}"),
            shown_time(row["seconds"]),
        ]
        if width >= WIDE:
            started = f"{row['started'].to_pydatetime().astimezone():%Y-%m-%d %H:%M}"
            cells += [shown(row["dataset"], "{}"), shown(row["method"], "{}"), started]
        table.add_row(*cells)
    return table


def weights_table(frame: "pd.DataFrame") -> "Table":
    """The frame as a table that fits 80 columns: a search's weights, under them the retrained ones.

    Test is top-1; points are per cent points that retraining gains. The frame has the rest.

    Args:
        frame: as `pipeline.report.weights_frame` gives it.

    Example:
        >>> from pipeline.report import weights_frame
        >>> weights_table(weights_frame(tracking_uri="sqlite:////nowhere/mlflow.db")).title
        'no finished one-stage search yet'
    """
    import pandas as pd
    from rich import box
    from rich.table import Table

    table = Table(
        title=None if len(frame) else "no finished one-stage search yet", box=box.SIMPLE_HEAD, padding=0
    )
    table.add_column("one-stage weights\n  retrained", overflow="fold")
    table.add_column("genotype", no_wrap=True)
    for heading in ("test", "points", "params", "epochs", "time"):
        table.add_column(heading, justify="right", no_wrap=True)

    def figures(row: dict[Any, Any], weights: str, points: str) -> list[str]:
        return [
            shown(row[f"{weights}_top1"], "{:.2%}"),
            points,
            shown(row[f"{weights}_params"], "{:,}"),
            shown(row[f"{weights}_epochs"], "{:,}"),
            shown_time(row[f"{weights}_seconds"]),
        ]

    above = None
    for row in frame.to_dict("records"):
        if row["run_id"] != above:
            table.add_row(row["name"], shown(row["genotype"], "{:.8}"), *figures(row, "one_stage", ""))
        above = row["run_id"]
        if pd.isna(row["retrain_run_id"]):
            table.add_row("  not retrained yet")
        else:
            points = shown(100 * row["difference"], "{:+.2f}")
            table.add_row(f"  {row['retrain_name']}", "", *figures(row, "retrained", points))
    return table


def jobs_table(jobs: "Sequence[Job]") -> "Table":
    """The jobs of a cluster; what does not fit of a command is cut off."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), expand=True)
    for heading in ("job", "status", "started", "took"):
        table.add_column(heading, no_wrap=True)
    table.add_column("command", no_wrap=True, overflow="ellipsis", ratio=1)
    for job in jobs:
        table.add_row(job.id, _status(job), *_when(job), job.command)
    return table


def job_table(job: "Job") -> "Table":
    """All about one job of a cluster."""
    from rich.table import Table

    table = Table("figure", "value")
    started, took = _when(job)
    rows = {
        "job": job.id,
        "status": _status(job),
        "started": started,
        "took": took,
        "command": job.command,
        "reason": job.message,
    }
    for figure, value in rows.items():
        if value:
            table.add_row(figure, value)
    return table


def _status(job: "Job") -> str:
    return f"{job.status} ({job.exit_code})" if job.exit_code else job.status


def _when(job: "Job") -> tuple[str, str]:
    if job.started is None or job.seconds is None:
        return "", ""
    return f"{datetime.fromtimestamp(job.started):%m-%d %H:%M}", duration(job.seconds)


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


def percent(fraction: float) -> str:
    """A share for people.

    Example:
        >>> percent(0.98607)
        '98.61 %'
    """
    return f"{100 * fraction:.2f} %"


def duration(seconds: float) -> str:
    """A time for people.

    Example:
        >>> duration(7.31), duration(83), duration(3 * 3600 + 125)
        ('7.3 s', '1 min 23 s', '3 h 2 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


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
