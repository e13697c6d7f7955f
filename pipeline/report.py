"""Tables of what was run, from the MLflow store: searches and retrainings, and one-stage weights against retrained."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from istanas.errors import ConfigError
from pipeline.tracking import one_line, open_client, public_uri, sqlite_file, store_uri

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
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

WEIGHTS_COLUMNS: dict[str, str] = {
    "run_id": "string",
    "name": "string",
    "dataset": "string",
    "genotype": "string",
    "one_stage_top1": "Float64",
    "one_stage_params": "Int64",
    "one_stage_epochs": "Int64",
    "one_stage_seconds": "Float64",
    "retrain_run_id": "string",
    "retrain_name": "string",
    "retrained_top1": "Float64",
    "retrained_params": "Int64",
    "retrained_epochs": "Int64",
    "retrained_seconds": "Float64",
    "difference": "Float64",
}
"""Column -> pandas dtype of `weights_frame`: top-1 are fractions of the test split, `difference` is what
retraining gains, epochs and seconds of a search hold its training too."""

_NUMBERS = {
    "test_top1": "test/top1",
    "valid_top1": "valid/top1",
    "params": "target/params",
    "macs": "target/macs",
}
_KINDS = ("sweep", "search", "retrain")
_PAGE = 1000


def results_frame(*, tracking_uri: str | None, experiment: str | None = None) -> "pd.DataFrame":
    """All sweeps, searches and retrainings of a store, newest first, each followed by what belongs to it.

    `test_top1` of a one-stage search is that of its own weights; a two-stage search has none.

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
    """The frame as a table that fits 80 columns; trials are set in under their sweep, retrainings under their search.

    Valid and test are top-1; a status is shown where a run is not finished: a trial that was stopped early is KILLED.
    The frame has the rest.

    Args:
        frame: as `results_frame` gives it.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=None if len(frame) else "no runs yet", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("run", overflow="fold")
    table.add_column("genotype", no_wrap=True)
    for heading in ("valid", "test", "params", "MACs", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    depths: dict[Any, int] = {}
    for row in frame.to_dict("records"):
        depths[row["run_id"]] = depth = depths.get(row["parent_run_id"], -1) + 1
        table.add_row(
            f"{'  ' * depth}{row['name']}" + ("" if row["status"] == "FINISHED" else f" ({row['status']})"),
            shown(row["genotype"], "{:.8}"),
            shown(row["valid_top1"], "{:.2%}"),
            shown(row["test_top1"], "{:.2%}"),
            shown(row["params"], "{:,}"),
            shown(row["macs"], "{:,}"),
            shown_time(row["seconds"]),
        )
    return table


def weights_frame(*, tracking_uri: str | None, experiment: str | None = None) -> "pd.DataFrame":
    """The weights of every finished one-stage search against its network retrained from scratch, newest search first.

    A search has one row for each of its finished retrainings of the same genotype on the same data set (of a
    retraining that was started over, the newest counts), or one row without figures of a retraining.

    Args:
        tracking_uri: see `pipeline.tracking.store_uri`.
        experiment: only this experiment; None means all of them.

    Returns:
        A frame with the columns and types of `WEIGHTS_COLUMNS`; no rows where there is no store yet.

    Raises:
        ConfigError: the store can't be read, or has no such experiment.
    """
    import pandas as pd

    uri = store_uri(tracking_uri)
    runs = [run for run in _family_order(_load_runs(uri, experiment)) if run.info.status == "FINISHED"]
    pairs = [(search, retraining) for search in _one_stage(runs) for retraining in _retrainings(search, runs)]
    rows = []
    if pairs:  # without any there may be no store, and opening it would create it
        with _readable(uri):
            client = open_client(uri)
            rows = [_weights_row(client, search, retraining) for search, retraining in pairs]
    return pd.DataFrame(rows, columns=list(WEIGHTS_COLUMNS)).astype(WEIGHTS_COLUMNS)


def weights_table(frame: "pd.DataFrame") -> "Table":
    """The frame as a table that fits 80 columns: a search's weights, under them the retrained ones.

    Test is top-1; points are per cent points that retraining gains. The frame has the rest.

    Args:
        frame: as `weights_frame` gives it.

    Example:
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
    with _readable(uri):
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
    if experiment is not None and not ids:
        raise ConfigError(
            f"experiment {experiment!r}: not in the MLflow store {public_uri(uri)}; leave it out"
        )
    return runs


@contextlib.contextmanager
def _readable(uri: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # every store fails in its own way
        raise ConfigError(
            f"MLflow store {public_uri(uri)}: can't be read ({one_line(error)}); "
            "start it or set MLFLOW_TRACKING_URI"
        ) from None


def _family_order(runs: "list[Run]") -> "list[Run]":
    """Newest family first; in a family each run is followed by its children, as they were begun."""
    by_id = {run.info.run_id: run for run in runs}

    def place(run: "Run") -> list[tuple[int, str]]:
        head, *children = _lineage(run, by_id)
        steps = [(child.info.start_time, child.info.run_id) for child in children]
        return [(-head.info.start_time, head.info.run_id), *steps]

    return sorted(runs, key=place)


def _lineage(run: "Run", by_id: "dict[str, Run]") -> "list[Run]":
    """The run's ancestors among these runs, the first of all first, and the run."""
    line = [run]
    while (parent := by_id.get(line[0].data.tags.get("mlflow.parentRunId", ""))) is not None:
        if parent in line:  # no store of ours, but tags can be edited
            break
        line.insert(0, parent)
    return line


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


def _one_stage(runs: "list[Run]") -> "list[Run]":
    wanted = {"istanas.kind": "search", "istanas.method": "one_stage"}
    return [run for run in runs if wanted.items() <= run.data.tags.items()]


def _retrainings(search: "Run", runs: "list[Run]") -> "list[Run | None]":
    """The retrainings to compare a search with, as they were begun; [None] if there are none.

    Args:
        search: the search.
        runs: finished runs in the order of `_family_order`.
    """
    same = {name: search.data.tags.get(name) for name in ("istanas.genotype", "istanas.dataset")}
    wanted = {"istanas.kind": "retrain", "mlflow.parentRunId": search.info.run_id, **same}
    newest: dict[str, Run] = {}
    for run in runs:
        if wanted.items() <= run.data.tags.items():
            directory = run.data.tags.get("istanas.run_dir", run.info.run_id)
            newest.pop(directory, None)  # started over since
            newest[directory] = run
    return list(newest.values()) or [None]


def _weights_row(client: "MlflowClient", search: "Run", retraining: "Run | None") -> dict[str, Any]:
    found, trained = _row(search), _row(retraining) if retraining is not None else {}
    tops = (found["test_top1"], trained.get("test_top1"))
    return {
        **{name: found[name] for name in ("run_id", "name", "dataset", "genotype")},
        "one_stage_top1": tops[0],
        "one_stage_params": found["params"],
        "one_stage_epochs": _epochs(client, search),
        "one_stage_seconds": found["seconds"],
        "retrain_run_id": trained.get("run_id"),
        "retrain_name": trained.get("name"),
        "retrained_top1": tops[1],
        "retrained_params": trained.get("params"),
        "retrained_epochs": None if retraining is None else _epochs(client, retraining),
        "retrained_seconds": trained.get("seconds"),
        "difference": None if tops[0] is None or tops[1] is None else tops[1] - tops[0],
    }


def _epochs(client: "MlflowClient", run: "Run") -> int | None:
    """The epochs that a run has done; its settings name only limits."""
    return max((m.step for m in client.get_metric_history(run.info.run_id, "train/loss")), default=None)


def shown(value: Any, text: str) -> str:
    """A cell of a table: the value in this format, nothing for a missing one."""
    import pandas as pd

    return "" if pd.isna(value) else text.format(value)


def shown_time(seconds: Any) -> str:
    """A cell of a table with a time."""
    import pandas as pd

    return "" if pd.isna(seconds) else duration(seconds)


def _seconds(run: "Run") -> float | None:
    """The time that the job reported, else from start to end, breaks included; None while it runs."""
    try:
        return float(run.data.tags["istanas.seconds"])
    except (KeyError, ValueError):
        if run.info.end_time is None or run.info.status == "RUNNING":
            return None
        return (run.info.end_time - run.info.start_time) / 1000
