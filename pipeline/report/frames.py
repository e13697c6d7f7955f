"""The pandas frames that `pipeline.report` exports, read from the MLflow store."""

import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Unpack

from pipeline.runs.layout import GENOTYPE_FILE
from pipeline.runs.outcome import ORIGIN_TAG, data_of, outcome
from pipeline.tracking.queries import Filters, load_runs, readable
from pipeline.tracking.store import open_client, store_uri

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Run

COLUMNS: dict[str, str] = {
    "run_id": "string",
    "name": "string",
    "kind": "string",
    "method": "string",
    "dataset": "string",
    "status": "string",
    "genotype": "string",
    "test_top1": "Float64",
    "test_top5": "Float64",
    "valid_top1": "Float64",
    "valid_top5": "Float64",
    "params": "Int64",
    "macs": "Int64",
    "seconds": "Float64",
    "started": "datetime64[ms, UTC]",
    "parent_run_id": "string",
    "run_dir": "string",
    "outcome": "string",
    "origin": "string",
}
"""Column -> pandas dtype: accuracies are fractions, top-5 NA with 10 classes or fewer, `genotype` is the digest,
`seconds` the time worked, `outcome` the status with INTERRUPTED and PRUNED told apart, which MLflow calls FAILED or
KILLED, `origin` where the cell that a retraining trained comes from: a run, a file, a random or a
published cell; NA of other runs. `dataset` is the data set's name, of own pictures what their folder is called."""

SEARCHES_COLUMNS: dict[str, str] = {
    "run_id": "string",
    "name": "string",
    "method": "string",
    "dataset": "string",
    "status": "string",
    "seed": "Int64",
    "genotype": "string",
    "valid_top1": "Float64",
    "valid_top5": "Float64",
    "test_top1": "Float64",
    "test_top5": "Float64",
    "retrainings": "Int64",
    "retrain_run_id": "string",
    "retrained_valid_top1": "Float64",
    "retrained_valid_top5": "Float64",
    "retrained_test_top1": "Float64",
    "retrained_test_top5": "Float64",
    "params": "Int64",
    "macs": "Int64",
    "seconds": "Float64",
    "started": "datetime64[ms, UTC]",
    "parent_run_id": "string",
    "run_dir": "string",
}
"""Column -> pandas dtype of `searches_frame`: `valid_*` and `test_*` are the search's own (test of a one-stage
search only), `retrainings` counts the finished ones of what it found, `retrain_run_id` is the newest of them and
`retrained_*` are its accuracies, `parent_run_id` is the sweep's; top-5 is NA with 10 classes or fewer."""

METRICS = (
    "train/loss",
    "train/top1",
    "train/top5",
    "train/rollbacks",
    "valid/loss",
    "valid/top1",
    "valid/top5",
    "test/loss",
    "test/top1",
    "test/top5",
    "recovery/gap",
    "recovery/truncation",
    "recovery/margin",
    "recovery/distance",
    "recovery/support_changes",
    "recovery/fallbacks",
    "arch/skip_ratio",
    "arch/frozen_nodes",
    "arch/rejected",
    "target/params",
    "target/macs",
    "images_per_second",
)
"""What is measured in an epoch, as MLflow calls it; each kind of run has some of it."""

EPOCHS_KEYS: dict[str, str] = {
    "run_id": "string",
    "name": "string",
    "kind": "string",
    "method": "string",
    "dataset": "string",
    "epoch": "Int64",
}
EPOCHS_COLUMNS: dict[str, str] = {**EPOCHS_KEYS, **dict.fromkeys(METRICS, "Float64")}
"""Column -> pandas dtype of `epochs_frame`: epochs count from 1; a metric that was not measured is NA."""

GENOTYPES_COLUMNS: dict[str, str] = {
    "genotype": "string",
    "dataset": "string",
    "searches": "Int64",
    "found_by": "string",
    "retrainings": "Int64",
    "best_retrained_test_top1": "Float64",
    "mean_retrained_test_top1": "Float64",
    "best_retrained_valid_top1": "Float64",
    "params": "Int64",
    "macs": "Int64",
    "genotype_json": "string",
}
"""Column -> pandas dtype of `genotypes_frame`: `genotype` is the digest, `found_by` the run ids of the `searches` that
ended with it, with spaces between; the best of several retrainings flatters, the mean does not; `params` and `macs`
are those of the newest retraining, else search; `genotype_json` is what `Genotype.from_json` reads, NA where the store
has no such artifact."""

SWEEPS_COLUMNS: dict[str, str] = {
    "run_id": "string",
    "name": "string",
    "method": "string",
    "dataset": "string",
    "status": "string",
    "searcher": "string",
    "scheduler": "string",
    "objective": "string",
    "objectives": "string",
    "space": "string",
    "trials": "Int64",
    "complete": "Int64",
    "pruned": "Int64",
    "failed": "Int64",
    "best_top1": "Float64",
    "genotype": "string",
    "seconds": "Float64",
    "started": "datetime64[ms, UTC]",
    "run_dir": "string",
}
"""Column -> pandas dtype of `sweeps_frame`: `trials` are planned, the next three have ended; `best_top1` is of the
objective, "valid" or "retrained" (on the hold-out); `objectives` and the swept keys in `space` have commas between."""

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
    "test_top5": "test/top5",
    "valid_top1": "valid/top1",
    "valid_top5": "valid/top5",
    "params": "target/params",
    "macs": "target/macs",
}
_SPACE = "sweep.space."
_REQUESTS_AT_ONCE = 8


def results_frame(
    *, tracking_uri: str | None, experiment: str | None = None, **filters: Unpack[Filters]
) -> "pd.DataFrame":
    """Sweeps, searches and retrainings of a store, newest first, each followed by what belongs to it.

    `test_top1` of a one-stage search is that of its own weights; a two-stage search has none.

    Args:
        tracking_uri: see `pipeline.tracking.store.store_uri`.
        experiment: only this experiment; None means all of them.
        filters: which runs, see `Filters`; one whose parent is left out heads a family.

    Returns:
        A frame with the columns and types of `COLUMNS`; no rows where there is no store yet.

    Raises:
        ConfigError: a filter is refused, the store can't be read, or has no such experiment.

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
    """One row for every search, trials of sweeps included, with what retraining made of it; newest first.

    Args:
        tracking_uri, experiment, filters: as in `results_frame`; of kind "search" all are.
        settings: keys of the configuration to add as columns, such as "search.lr": as text, as the store has them.

    Returns:
        A frame with the columns and types of `SEARCHES_COLUMNS`, and after them those of `settings` (string).

    Raises:
        ConfigError: as `results_frame`.

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
    """One row for every epoch of every search and retraining: learning curves, in the order of `results_frame`.

    The store is asked once for each run and metric that the run has, several at a time: naming few `metrics`, or
    filtering, saves time.

    Args:
        tracking_uri, experiment, filters: as in `results_frame`; sweeps have no epochs.
        metrics: which to read, a column each.

    Returns:
        A frame with the columns and types of `EPOCHS_COLUMNS`, of the metrics those that were asked for.

    Raises:
        ConfigError: as `results_frame`.

    Example:
        >>> frame = epochs_frame(tracking_uri="sqlite:////nowhere/mlflow.db", metrics=["valid/top1"])
        >>> list(frame.columns)
        ['run_id', 'name', 'kind', 'method', 'dataset', 'epoch', 'valid/top1']
    """
    uri = store_uri(tracking_uri)
    runs = [r for r in load_runs(uri, experiment, filters) if r.data.tags["istanas.kind"] != "sweep"]
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
    """One row for every genotype and data set: which finished searches found it, and what its retrainings reached.

    Of a run that was started over, the newest counts. A cell that was only retrained (published, random) has no
    searches. The most often found first, then the best.

    Args:
        tracking_uri, experiment, filters: as in `results_frame`; only what they let through is counted.

    Returns:
        A frame with the columns and types of `GENOTYPES_COLUMNS`.

    Raises:
        ConfigError: as `results_frame`.

    Example:
        >>> len(genotypes_frame(tracking_uri="sqlite:////nowhere/mlflow.db"))
        0
    """
    uri = store_uri(tracking_uri)
    families: dict[tuple[str, str], list[Run]] = {}
    for run in _newest_of_directory(load_runs(uri, experiment, filters)):
        tags = run.data.tags
        if run.info.status == "FINISHED" and tags["istanas.kind"] != "sweep" and "istanas.genotype" in tags:
            families.setdefault((tags["istanas.genotype"], data_of(tags) or ""), []).append(run)
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
    """One row for every sweep, newest first; `pipeline.report.trials.read_table(run_dir)` has the trials of one.

    Args:
        tracking_uri, experiment, filters: as in `results_frame`; of kind "sweep" all are.

    Returns:
        A frame with the columns and types of `SWEEPS_COLUMNS`.

    Raises:
        ConfigError: as `results_frame`.

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
    """The weights of every finished one-stage search against its network retrained from scratch, newest search first.

    A search has one row for each of its finished retrainings of the same genotype on the same data set (of a
    retraining that was started over, the newest counts), or one row without figures of a retraining.

    Args:
        tracking_uri: see `pipeline.tracking.store.store_uri`.
        experiment: only this experiment; None means all of them.
        dataset: only this data set.

    Returns:
        A frame with the columns and types of `WEIGHTS_COLUMNS`; no rows where there is no store yet.

    Raises:
        ConfigError: the store can't be read, or has no such experiment or data set.
    """
    uri = store_uri(tracking_uri)
    runs = load_runs(uri, experiment, {"dataset": dataset})
    retrainings = _finished_retrainings(runs)
    pairs: list[tuple[Run, Run | None]] = [
        (search, retraining)
        for search in runs
        if search.info.status == "FINISHED" and _has(search, kind="search", method="one_stage")
        for retraining in (*_of_search(search, retrainings),) or (None,)
    ]
    rows = []
    if pairs:  # without any there may be no store, and opening it would create it
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
    """Without the runs that were started over since: of those of one directory the newest stays."""
    newest: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: run.info.start_time):
        directory = run.data.tags.get("istanas.run_dir", run.info.run_id)
        newest.pop(directory, None)
        newest[directory] = run
    return list(newest.values())


def _finished_retrainings(runs: "Iterable[Run]") -> "dict[str, list[Run]]":
    """Run id of a search -> its finished retrainings, as they were begun."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if _has(run, kind="retrain") and run.info.status == "FINISHED":
            found.setdefault(run.data.tags.get("mlflow.parentRunId", ""), []).append(run)
    return {parent: _newest_of_directory(group) for parent, group in found.items()}


def _of_search(search: "Run", retrainings: "dict[str, list[Run]]") -> "list[Run]":
    """The retrainings of what a search found, on its data set."""
    genotype, data = search.data.tags.get("istanas.genotype"), data_of(search.data.tags)
    return [
        run
        for run in retrainings.get(search.info.run_id, [])
        if _has(run, genotype=genotype) and data_of(run.data.tags) == data
    ]


def _row(run: "Run") -> dict[str, Any]:
    tags, metrics = run.data.tags, run.data.metrics
    numbers = {column: metrics.get(metric) for column, metric in _NUMBERS.items()}
    return {
        "run_id": run.info.run_id,
        "name": run.info.run_name,
        "kind": tags.get("istanas.kind"),
        "method": tags.get("istanas.method"),
        "dataset": data_of(tags),
        "status": run.info.status,
        "genotype": tags.get("istanas.genotype"),
        **numbers,
        "seconds": _seconds(run),
        "started": run.info.start_time,
        "parent_run_id": tags.get("mlflow.parentRunId"),
        "run_dir": tags.get("istanas.run_dir"),
        "outcome": outcome(run.info.status, tags),
        "origin": tags.get(ORIGIN_TAG),
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
    """The artifact of a finished run; None if it is not there any more."""
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
        "space": ",".join(sorted(key.removeprefix(_SPACE) for key in params if key.startswith(_SPACE))),
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
    """The epochs that a run has done; its settings name only limits."""
    return max((m.step for m in client.get_metric_history(run.info.run_id, "train/loss")), default=None)


def _seconds(run: "Run") -> float | None:
    """The time that the job reported, else from start to end, breaks included; None while it runs."""
    try:
        return float(run.data.tags["istanas.seconds"])
    except (KeyError, ValueError):
        if run.info.end_time is None or run.info.status == "RUNNING":
            return None
        return (run.info.end_time - run.info.start_time) / 1000
