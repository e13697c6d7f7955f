"""Terminal tables of the jobs of a cluster."""

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from pipeline.base.fitted_table import Column, FittedTable
from pipeline.base.text import duration

if TYPE_CHECKING:
    from rich.table import Table

    from pipeline.cluster.job_server import Job


def jobs_table(jobs: "Sequence[Job]") -> FittedTable:
    """Return a table of the jobs of a cluster. Long commands are wrapped between words."""
    columns = [
        *(Column("job"), Column("status", rank=1), Column("started", rank=3), Column("took", rank=2)),
        Column("command", prose=True, rank=4),
    ]
    rows = [[job.id, _status(job), *_when(job), job.command] for job in jobs]
    return FittedTable(columns, rows, rest="--json has everything")


def job_table(job: "Job") -> "Table":
    """Return a table with everything about one job."""
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
