"""Reads runs from the MLflow store: which ones, in which order; every failure is one line."""

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypedDict, get_args

from istanas.errors import ConfigError
from pipeline.base.servers import by_proxy
from pipeline.base.text import one_line
from pipeline.config.choices import KINDS, METHODS
from pipeline.runs.outcome import FOLDER_TAG
from pipeline.tracking.store import open_client, public_uri, store_exists

if TYPE_CHECKING:
    from mlflow.entities import Run

WHERE_EXAMPLE = "metrics.`test/top1` > 0.9 and params.seed = '1'"
_PAGE = 1000
_FOLDER_LABEL = re.compile(r"([a-z0-9-]+-)?[0-9a-f]{6}")  # as `pipeline.runs.record.data_label` makes it


class Filters(TypedDict, total=False):
    """Which runs are meant: those that fulfil every condition; None is none.

    `kind` is "sweep", "search" or "retrain"; `method` that of the run's configuration, "two_stage" or "one_stage";
    `dataset` the data set's name, "folder" of all own pictures, or what one folder of them is called; `where` a
    condition of MLflow's own search, such as
    ``metrics.`test/top1` > 0.9 and params.seed = '1'``.
    """

    kind: str | None
    method: str | None
    dataset: str | None
    where: str | None


def load_runs(uri: str, experiment: str | None, filters: Filters) -> "list[Run]":
    """Sweeps, searches and retrainings, in the order of `family_order`; none where there is no store yet.

    Args:
        uri: as `pipeline.tracking.store.store_uri` gives it.
        experiment: only this experiment; None means all of them.
        filters: which runs.

    Raises:
        ConfigError: a filter is refused, the store can't be read, or has no such experiment.
    """
    query = _query(filters)
    if not store_exists(uri):
        return []
    with readable(uri):
        client = open_client(uri)
        named = None if experiment is None else client.get_experiment_by_name(experiment)
        experiments = client.search_experiments() if experiment is None else [named] if named else []
        ids = [e.experiment_id for e in experiments]
        runs: list[Run] = []
        token: str | None = None
        while ids:
            with _explained(filters.get("where")):
                page = client.search_runs(ids, query, max_results=_PAGE, page_token=token)
            runs += [run for run in page if run.data.tags["istanas.kind"] in KINDS]
            token = page.token
            if not token:
                break
    if experiment is not None and not ids:
        raise ConfigError(
            f"experiment {experiment!r}: not in the MLflow store {public_uri(uri)}; leave it out"
        )
    return family_order(runs)


@contextlib.contextmanager
def readable(uri: str, *, what: str = "read") -> Iterator[None]:
    """Every failure of a store as a `ConfigError`: it can't be read, or what else is done to it."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # every store fails in its own way
        raise ConfigError(
            f"MLflow store {public_uri(uri)}: can't be {what} ({one_line(error)}{by_proxy(uri)}); "
            "start it or set MLFLOW_TRACKING_URI"
        ) from None


def family_order(runs: "list[Run]") -> "list[Run]":
    """Newest family first; in a family each run is followed by its children, as they were begun.

    A run whose parent is not among these heads a family.
    """
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


def _query(filters: Filters) -> str:
    """The filters as one condition of MLflow's search."""
    from pipeline.config.schema import DatasetName

    known = {"kind": KINDS, "method": METHODS, "dataset": get_args(DatasetName)}
    wanted: dict[str, str] = {name: value for name in known if (value := filters.get(name)) is not None}  # type: ignore[misc]
    folder = _FOLDER_LABEL.fullmatch(wanted.get("dataset", "")) is not None
    for name, value in wanted.items():
        if value not in known[name] and not (name == "dataset" and folder):
            raise ConfigError(f"{name} {value!r}: unknown, choose {', '.join(known[name])}")
    conditions = [
        f"tags.`{FOLDER_TAG if name == 'dataset' and folder else f'istanas.{name}'}` = '{value}'"
        for name, value in wanted.items()
    ]
    if "kind" not in wanted:
        conditions.append("tags.`istanas.kind` LIKE '%'")
    where = (filters.get("where") or "").strip()
    return " and ".join([*conditions, where] if where else conditions)


@contextlib.contextmanager
def _explained(where: str | None) -> Iterator[None]:
    """What MLflow says of a condition that it can't read; our own conditions it can."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if where is None or error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        reason = " ".join(error.message.split()).rstrip(".")
        raise ConfigError(
            f"where {where!r}: MLflow refuses it ({reason:.300}); write for example: {WHERE_EXAMPLE}"
        ) from None
