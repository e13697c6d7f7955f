"""Tables of what was run, from the MLflow store: one row per search and per retraining."""

from typing import TYPE_CHECKING, Any

from istanas.errors import ConfigError
from pipeline.tracking import one_line, open_client, public_uri, sqlite_file, store_uri

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities import Run
    from rich.table import Table

COLUMNS: dict[str, str] = {
    "run_id": "string",
    "name": "string",
    "kind": "string",
    "method": "string",
    "dataset": "string",
    "status": "string",
    "genotype": "string",
    "test_top1": "Float64",
    "valid_top1": "Float64",
    "params": "Int64",
    "macs": "Int64",
    "seconds": "Float64",
    "started": "datetime64[ms, UTC]",
    "parent_run_id": "string",
    "run_dir": "string",
}
"""Column -> pandas dtype: accuracies are fractions, `genotype` is the digest, `seconds` the time worked."""

_NUMBERS = {
    "test_top1": "test/top1",
    "valid_top1": "valid/top1",
    "params": "target/params",
    "macs": "target/macs",
}
_KINDS = ("search", "retrain")
_PAGE = 1000


def results_frame(*, tracking_uri: str | None, experiment: str | None = None) -> "pd.DataFrame":
    """All searches and retrainings of a store, newest search first, each followed by its retrainings.

    Args:
        tracking_uri: see `pipeline.tracking.store_uri`.
        experiment: only this experiment; None means all of them.

    Returns:
        A frame with the columns and types of `COLUMNS`; no rows where there is no store yet.

    Raises:
        ConfigError: the store can't be read, or has no such experiment.
    """
    import pandas as pd

    rows = [_row(run) for run in _family_order(_load_runs(store_uri(tracking_uri), experiment))]
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def results_table(frame: "pd.DataFrame") -> "Table":
    """The frame as a table that fits 80 columns; retrainings are set in under their search.

    Valid and test are top-1; a status is shown where a run is not finished. The frame has the rest.

    Args:
        frame: as `results_frame` gives it.
    """
    import pandas as pd
    from rich import box
    from rich.table import Table

    table = Table(title=None if len(frame) else "no runs yet", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("run", overflow="fold")
    table.add_column("genotype", no_wrap=True)
    for heading in ("valid", "test", "params", "MACs", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    searches = set(frame["run_id"])

    def shown(value: Any, text: str) -> str:
        return "" if pd.isna(value) else text.format(value)

    for row in frame.to_dict("records"):
        indent = "  " if not pd.isna(row["parent_run_id"]) and row["parent_run_id"] in searches else ""
        table.add_row(
            f"{indent}{row['name']}" + ("" if row["status"] == "FINISHED" else f" ({row['status']})"),
            shown(row["genotype"], "{:.8}"),
            shown(row["valid_top1"], "{:.2%}"),
            shown(row["test_top1"], "{:.2%}"),
            shown(row["params"], "{:,}"),
            shown(row["macs"], "{:,}"),
            "" if pd.isna(row["seconds"]) else duration(row["seconds"]),
        )
    return table


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


def _load_runs(uri: str, experiment: str | None) -> "list[Run]":
    file = sqlite_file(uri)
    if file is not None and not file.exists():  # opening it would create it
        return []
    try:
        client = open_client(uri)
        named = None if experiment is None else client.get_experiment_by_name(experiment)
        experiments = client.search_experiments() if experiment is None else [named] if named else []
        ids = [e.experiment_id for e in experiments]
        runs: list[Run] = []
        token: str | None = None
        while ids:
            page = client.search_runs(
                ids, "tags.`istanas.kind` LIKE '%'", max_results=_PAGE, page_token=token
            )
            runs += [run for run in page if run.data.tags["istanas.kind"] in _KINDS]
            token = page.token
            if not token:
                break
    except Exception as error:  # every store fails in its own way
        raise ConfigError(
            f"MLflow store {public_uri(uri)}: can't be read ({one_line(error)}); "
            "start it or set MLFLOW_TRACKING_URI"
        ) from None
    if experiment is not None and not ids:
        raise ConfigError(
            f"experiment {experiment!r}: not in the MLflow store {public_uri(uri)}; leave it out"
        )
    return runs


def _family_order(runs: "list[Run]") -> "list[Run]":
    """Newest family first; in a family the search, then its retrainings as they were begun."""
    begun = {run.info.run_id: run.info.start_time for run in runs}

    def place(run: "Run") -> tuple[int, str, bool, int]:
        parent = run.data.tags.get("mlflow.parentRunId", "")
        head: str = parent if parent in begun else run.info.run_id
        return -begun[head], head, head != run.info.run_id, run.info.start_time

    return sorted(runs, key=place)


def _row(run: "Run") -> dict[str, Any]:
    tags, metrics = run.data.tags, run.data.metrics
    numbers = {column: metrics.get(metric) for column, metric in _NUMBERS.items()}
    return {
        "run_id": run.info.run_id,
        "name": run.info.run_name,
        "kind": tags.get("istanas.kind"),
        "method": tags.get("istanas.method"),
        "dataset": tags.get("istanas.dataset"),
        "status": run.info.status,
        "genotype": tags.get("istanas.genotype"),
        **numbers,
        "seconds": _seconds(run),
        "started": run.info.start_time,
        "parent_run_id": tags.get("mlflow.parentRunId"),
        "run_dir": tags.get("istanas.run_dir"),
    }


def _seconds(run: "Run") -> float | None:
    """The time that the job reported, else from start to end, breaks included; None while it runs."""
    try:
        return float(run.data.tags["istanas.seconds"])
    except (KeyError, ValueError):
        if run.info.end_time is None or run.info.status == "RUNNING":
            return None
        return (run.info.end_time - run.info.start_time) / 1000
