"""The pandas frames that `pipeline.report` exports, read from the MLflow store."""

import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Unpack

from istanas.methods import trains_target
from pipeline.report.columns import (
    COLUMNS,
    EPOCHS_KEYS,
    GENOTYPES_COLUMNS,
    METRICS,
    SEARCHES_COLUMNS,
    SPACE_PREFIX,
    SWEEPS_COLUMNS,
    WEIGHTS_COLUMNS,
)
from pipeline.report.terminal import has_validation
from pipeline.runs.layout import GENOTYPE_FILE
from pipeline.runs.outcome import data_of, outcome
from pipeline.runs.tags import Tag
from pipeline.tracking.queries import Filters, load_runs, readable
from pipeline.tracking.store import open_client, store_uri

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Run

_NUMBERS = {
    "test_top1": "test/top1",
    "test_top5": "test/top5",
    "valid_top1": "valid/top1",
    "valid_top5": "valid/top5",
    "params": "target/params",
    "macs": "target/macs",
}
_REQUESTS_AT_ONCE = 8


def results_frame(
    *, tracking_uri: str | None, experiment: str | None = None, **filters: Unpack[Filters]
) -> "pd.DataFrame":
    """Return the sweeps, searches and retrainings of a store, newest first, each followed by its child runs.

    `test_top1` of a one-stage search is measured with its own weights; a two-stage search has none.

    Args:
        tracking_uri: The address of the store, see `pipeline.tracking.store.store_uri`.
        experiment: The name of an experiment; `None` selects all.
        filters: Conditions on the runs, see `Filters`.

    Returns:
        A frame with the columns and types of `COLUMNS`, without rows if the store does not exist yet.

    Raises:
        ConfigError: If a filter is invalid, the store cannot be read, or it has no such experiment.

    Example:
        >>> frame = results_frame(tracking_uri="sqlite:////nowhere/mlflow.db", dataset="digits", kind="search")
        >>> len(frame), str(frame["params"].dtype)
        (0, 'Int64')
    """
    return _frame((_row(run) for run in load_runs(store_uri(tracking_uri), experiment, filters)), COLUMNS)


def searches_frame(
    *,
    tracking_uri: str | None,
    experiment: str | None = None,
    settings: Sequence[str] = (),
    **filters: Unpack[Filters],
) -> "pd.DataFrame":
    """Return a row for each search, trials of sweeps included, with the results of retraining; newest first.

    Args:
        tracking_uri, experiment, filters: As in `results_frame`.
        settings: Keys of the configuration, such as "search.lr", to add as text columns.

    Returns:
        A frame with the columns and types of `SEARCHES_COLUMNS`, followed by those of `settings` (string).

    Raises:
        ConfigError: As in `results_frame`.

    Example:
        >>> frame = searches_frame(tracking_uri="sqlite:////nowhere/mlflow.db", settings=["search.lr"])
        >>> list(frame.columns[-2:])
        ['run_dir', 'search.lr']
    """
    uri = store_uri(tracking_uri)
    wanted: Filters = {**filters, "kind": "search"}
    searches = load_runs(uri, experiment, wanted) if filters.get("kind") in (None, "search") else []
    retrainings = _finished_retrainings(load_runs(uri, experiment, {"kind": "retrain"}) if searches else [])
    rows = [{**_search_row(s, _of_search(s, retrainings)), **_settings(s, settings)} for s in searches]
    return _frame(rows, {**SEARCHES_COLUMNS, **dict.fromkeys(settings, "string")})


def epochs_frame(
    *,
    tracking_uri: str | None,
    experiment: str | None = None,
    metrics: Sequence[str] = METRICS,
    **filters: Unpack[Filters],
) -> "pd.DataFrame":
    """Return a row for each epoch of each search and retraining (learning curves), in the order of `results_frame`.

    The store receives one request for each run and metric, so fewer `metrics` or runs take less time.

    Args:
        tracking_uri, experiment, filters: As in `results_frame`. Sweeps have no epochs.
        metrics: The metrics to read, each of which is a column.

    Returns:
        A frame with the columns and types of `EPOCHS_COLUMNS`, restricted to `metrics`.

    Raises:
        ConfigError: As in `results_frame`.

    Example:
        >>> frame = epochs_frame(tracking_uri="sqlite:////nowhere/mlflow.db", metrics=["valid/top1"])
        >>> list(frame.columns)
        ['run_id', 'name', 'kind', 'method', 'dataset', 'epoch', 'valid/top1']
    """
    uri = store_uri(tracking_uri)
    runs = [r for r in load_runs(uri, experiment, filters) if r.data.tags[Tag.KIND] != "sweep"]
    asked = [(run.info.run_id, name) for run in runs for name in metrics if name in run.data.metrics]
    values: dict[str, dict[int, dict[str, float]]] = {run.info.run_id: {} for run in runs}
    if asked:
        with readable(uri), ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            client = open_client(uri)
            histories = pool.map(lambda pair: client.get_metric_history(*pair), asked)
            for (run_id, name), history in zip(asked, histories, strict=True):
                for point in history:
                    values[run_id].setdefault(point.step, {})[name] = point.value
    rows = (
        {**_row(run), "epoch": epoch, **values[run.info.run_id][epoch]}
        for run in runs
        for epoch in sorted(values[run.info.run_id])
    )
    return _frame(rows, {**EPOCHS_KEYS, **dict.fromkeys(metrics, "Float64")})


def genotypes_frame(
    *, tracking_uri: str | None, experiment: str | None = None, **filters: Unpack[Filters]
) -> "pd.DataFrame":
    """Return a row for each genotype and data set, with the finished searches that found it and its retrainings.

    If a run was started over, only the newest counts. A cell that was only retrained (published, random) has no
    searches. Genotypes that were found most often come first, then those with the best accuracy.

    Args:
        tracking_uri, experiment, filters: As in `results_frame`. Other runs are not counted.

    Returns:
        A frame with the columns and types of `GENOTYPES_COLUMNS`.

    Raises:
        ConfigError: As in `results_frame`.

    Example:
        >>> len(genotypes_frame(tracking_uri="sqlite:////nowhere/mlflow.db"))
        0
    """
    uri = store_uri(tracking_uri)
    families: dict[tuple[str, str], list[Run]] = {}
    for run in _newest_of_directory(load_runs(uri, experiment, filters)):
        tags = run.data.tags
        if run.info.status == "FINISHED" and tags[Tag.KIND] != "sweep" and Tag.GENOTYPE in tags:
            families.setdefault((tags[Tag.GENOTYPE], data_of(tags) or ""), []).append(run)
    texts: dict[str, str | None] = {}
    if families:
        with readable(uri), tempfile.TemporaryDirectory() as scratch:
            client = open_client(uri)
            for (digest, _), runs in families.items():
                if texts.get(digest) is None:
                    texts[digest] = _genotype_text(client, runs[0], scratch)
    rows = [_genotype_row(digest, texts[digest], runs) for (digest, _), runs in families.items()]
    rows.sort(key=lambda row: (-row["searches"], -(row["best_retrained_test_top1"] or 0), row["genotype"]))
    return _frame(rows, GENOTYPES_COLUMNS)


def sweeps_frame(
    *, tracking_uri: str | None, experiment: str | None = None, **filters: Unpack[Filters]
) -> "pd.DataFrame":
    """Return a row for each sweep, newest first. `pipeline.report.trials.read_table` returns the trials of a sweep.

    Args:
        tracking_uri, experiment, filters: As in `results_frame`.

    Returns:
        A frame with the columns and types of `SWEEPS_COLUMNS`.

    Raises:
        ConfigError: As in `results_frame`.

    Example:
        >>> len(sweeps_frame(tracking_uri="sqlite:////nowhere/mlflow.db"))
        0
    """
    wanted: Filters = {**filters, "kind": "sweep"}
    kept = filters.get("kind") in (None, "sweep")
    sweeps = load_runs(store_uri(tracking_uri), experiment, wanted) if kept else []
    return _frame(map(_sweep_row, sweeps), SWEEPS_COLUMNS)


def weights_frame(
    *, tracking_uri: str | None, experiment: str | None = None, dataset: str | None = None
) -> "pd.DataFrame":
    """Compare the weights of each finished one-stage search with its network retrained from scratch; newest first.

    A search has one row for each finished retraining of its genotype on its data set, or a single row without one.
    If a retraining was started over, only the newest counts.

    Args:
        tracking_uri: The address of the store, see `pipeline.tracking.store.store_uri`.
        experiment: The name of an experiment; `None` selects all.
        dataset: The name of a data set; `None` selects all.

    Returns:
        A frame with the columns and types of `WEIGHTS_COLUMNS`, without rows if the store does not exist yet.

    Raises:
        ConfigError: If the store cannot be read, or has no such experiment or data set.
    """
    uri = store_uri(tracking_uri)
    runs = load_runs(uri, experiment, {"dataset": dataset})
    retrainings = _finished_retrainings(runs)
    pairs: list[tuple[Run, Run | None]] = [
        (search, retraining)
        for search in runs
        if search.info.status == "FINISHED"
        and _has(search, kind="search")
        and trains_target(search.data.tags.get(Tag.METHOD))
        for retraining in (*_of_search(search, retrainings),) or (None,)
    ]
    rows = []
    if pairs:  # Opening a store that does not exist would create it.
        with readable(uri):
            client = open_client(uri)
            rows = [_weights_row(client, search, retraining) for search, retraining in pairs]
    return _frame(rows, WEIGHTS_COLUMNS)


def _frame(rows: Iterable[dict[str, Any]], columns: dict[str, str]) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame(list(rows), columns=list(columns)).astype(columns)


def _has(run: "Run", **tags: str | None) -> bool:
    return all(run.data.tags.get(f"istanas.{name}") == value for name, value in tags.items())


def _newest_of_directory(runs: "Iterable[Run]") -> "list[Run]":
    """Return the newest run of each run directory: the earlier ones were started over."""
    newest: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: run.info.start_time):
        directory = run.data.tags.get(Tag.RUN_DIR, run.info.run_id)
        newest.pop(directory, None)
        newest[directory] = run
    return list(newest.values())


def _finished_retrainings(runs: "Iterable[Run]") -> "dict[str, list[Run]]":
    """Return run id of a search -> its finished retrainings, in the order of their start."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if _has(run, kind="retrain") and run.info.status == "FINISHED":
            found.setdefault(run.data.tags.get("mlflow.parentRunId", ""), []).append(run)
    return {parent: _newest_of_directory(group) for parent, group in found.items()}


def _of_search(search: "Run", retrainings: "dict[str, list[Run]]") -> "list[Run]":
    """Return the retrainings of the cell that a search found, on the search's data set."""
    genotype, data = search.data.tags.get(Tag.GENOTYPE), data_of(search.data.tags)
    return [
        run
        for run in retrainings.get(search.info.run_id, [])
        if _has(run, genotype=genotype) and data_of(run.data.tags) == data
    ]


def _row(run: "Run") -> dict[str, Any]:
    tags, metrics = run.data.tags, run.data.metrics
    numbers = {column: metrics.get(metric) for column, metric in _NUMBERS.items()}
    if not has_validation(tags.get(Tag.KIND), tags.get(Tag.METHOD)):
        numbers |= {"valid_top1": None, "valid_top5": None}
    return {
        "run_id": run.info.run_id,
        "name": run.info.run_name,
        "kind": tags.get(Tag.KIND),
        "method": tags.get(Tag.METHOD),
        "dataset": data_of(tags),
        "status": run.info.status,
        "genotype": tags.get(Tag.GENOTYPE),
        **numbers,
        "seconds": _seconds(run),
        "started": run.info.start_time,
        "parent_run_id": tags.get("mlflow.parentRunId"),
        "run_dir": tags.get(Tag.RUN_DIR),
        "outcome": outcome(run.info.status, tags),
        "origin": tags.get(Tag.ORIGIN),
    }


def _settings(run: "Run", names: Iterable[str]) -> dict[str, str | None]:
    return {name: run.data.params.get(name) for name in names}


def _search_row(search: "Run", retrainings: "list[Run]") -> dict[str, Any]:
    newest = _row(retrainings[-1]) if retrainings else {}
    return {
        **_row(search),
        "seed": _whole(search.data.params.get("seed")),
        "retrainings": len(retrainings),
        "retrain_run_id": newest.get("run_id"),
        "retrained_valid_top1": newest.get("valid_top1"),
        "retrained_valid_top5": newest.get("valid_top5"),
        "retrained_test_top1": newest.get("test_top1"),
        "retrained_test_top5": newest.get("test_top5"),
    }


def _genotype_row(digest: str, text: str | None, runs: "list[Run]") -> dict[str, Any]:
    searches = [run for run in runs if _has(run, kind="search")]
    retrained = [_row(run) for run in runs if _has(run, kind="retrain")]
    tests, valids = (
        [row[name] for row in retrained if row[name] is not None] for name in ("test_top1", "valid_top1")
    )
    newest = retrained[-1] if retrained else _row(runs[-1])
    return {
        **newest,
        "genotype": digest,
        "searches": len(searches),
        "found_by": " ".join(run.info.run_id for run in searches),
        "retrainings": len(retrained),
        "best_retrained_test_top1": max(tests, default=None),
        "mean_retrained_test_top1": fmean(tests) if tests else None,
        "best_retrained_valid_top1": max(valids, default=None),
        "genotype_json": text,
    }


def _genotype_text(client: "MlflowClient", run: "Run", scratch: str) -> str | None:
    """Return the genotype artifact of a finished run; `None` if the store does not have it."""
    run_id = run.info.run_id
    if GENOTYPE_FILE not in {file.path for file in client.list_artifacts(run_id)}:
        return None
    folder = Path(scratch) / run_id
    folder.mkdir(exist_ok=True)
    return Path(client.download_artifacts(run_id, GENOTYPE_FILE, str(folder))).read_text().strip()


def _sweep_row(sweep: "Run") -> dict[str, Any]:
    params, metrics = sweep.data.params, sweep.data.metrics
    return {
        **_row(sweep),
        **{
            name: params.get(f"sweep.{name}") for name in ("searcher", "scheduler", "objective", "objectives")
        },
        "space": ",".join(
            sorted(key.removeprefix(SPACE_PREFIX) for key in params if key.startswith(SPACE_PREFIX))
        ),
        "trials": _whole(params.get("sweep.trials")),
        "complete": metrics.get("sweep/complete", 0),
        "pruned": metrics.get("sweep/pruned", 0),
        "failed": metrics.get("sweep/fail", 0),
        "best_top1": metrics.get("sweep/best_top1"),
    }


def _whole(text: str | None) -> int | None:
    return None if text is None else int(text)


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
    """Return the number of epochs of a run, counted in its metrics, because the settings are only limits."""
    return max((m.step for m in client.get_metric_history(run.info.run_id, "train/loss")), default=None)


def _seconds(run: "Run") -> float | None:
    """Return the seconds that the job reported or, without them, the time from start to end; `None` while it runs."""
    try:
        return float(run.data.tags[Tag.SECONDS])
    except (KeyError, ValueError):
        if run.info.end_time is None or run.info.status == "RUNNING":
            return None
        return (run.info.end_time - run.info.start_time) / 1000
