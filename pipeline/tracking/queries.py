"""Queries of runs in the MLflow store."""

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypedDict

from istanas.data.registry import DATASETS
from istanas.errors import ConfigError
from istanas.methods import METHODS
from pipeline.base.servers import by_proxy
from pipeline.base.text import one_line
from pipeline.config.choices import KINDS
from pipeline.runs.tags import Tag
from pipeline.tracking.store import open_client, public_uri, store_exists

if TYPE_CHECKING:
    from mlflow.entities import Run

WHERE_EXAMPLE = "metrics.`test/top1` > 0.9 and params.seed = '1'"
_PAGE = 1000
_FOLDER_LABEL = re.compile(r"([a-z0-9-]+-)?[0-9a-f]{6}")  # as `pipeline.runs.record.data_label` makes it


class Filters(TypedDict, total=False):
    """Conditions that a run must fulfil; `None` disables a filter.

    Attributes:
        kind: "sweep", "search" or "retrain".
        method: The name of a search method.
        dataset: The name of a data set, "folder" for all picture folders, or the label of one of them.
        where: A condition of MLflow's own search, such as ``metrics.`test/top1` > 0.9 and params.seed = '1'``.
    """

    kind: str | None
    method: str | None
    dataset: str | None
    where: str | None


def load_runs(uri: str, experiment: str | None, filters: Filters) -> "list[Run]":
    """Return sweeps, searches and retrainings in the order of `family_order`; [] if there is no store yet.

    Args:
        uri: The store, as `pipeline.tracking.store.store_uri` returns it.
        experiment: The name of an experiment; None means all.
        filters: Conditions that the runs must fulfil.

    Raises:
        ConfigError: a filter is invalid, the store cannot be read, or it has no such experiment.
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
            runs += [run for run in page if run.data.tags[Tag.KIND] in KINDS]
            token = page.token
            if not token:
                break
    if experiment is not None and not ids:
        raise ConfigError(
            f"not in the MLflow store {public_uri(uri)}",
            field=f"experiment {experiment!r}",
            remedy="leave it out",
        )
    return family_order(runs)


@contextlib.contextmanager
def readable(uri: str, *, what: str = "read") -> Iterator[None]:
    """Convert any error of a store to a `ConfigError` with the problem "can't be {what}"."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # stores raise many types of errors
        raise ConfigError(
            f"can't be {what} ({one_line(error)}{by_proxy(uri)})",
            field=f"MLflow store {public_uri(uri)}",
            remedy="start it or set MLFLOW_TRACKING_URI",
        ) from None


def family_order(runs: "list[Run]") -> "list[Run]":
    """Sort runs by family, newest first; within a family, each run precedes its children, sorted by start time.

    A run whose parent is not in the list starts a family.
    """
    by_id = {run.info.run_id: run for run in runs}

    def place(run: "Run") -> list[tuple[int, str]]:
        head, *children = _lineage(run, by_id)
        steps = [(child.info.start_time, child.info.run_id) for child in children]
        return [(-head.info.start_time, head.info.run_id), *steps]

    return sorted(runs, key=place)


def _lineage(run: "Run", by_id: "dict[str, Run]") -> "list[Run]":
    """Return the run's ancestors in `by_id`, the oldest first, and the run itself."""
    line = [run]
    while (parent := by_id.get(line[0].data.tags.get("mlflow.parentRunId", ""))) is not None:
        if parent in line:  # edited tags may have a cycle
            break
        line.insert(0, parent)
    return line


def _query(filters: Filters) -> str:
    """Return the filters as a condition of MLflow's search."""
    known = {"kind": KINDS, "method": tuple(METHODS), "dataset": tuple(DATASETS)}
    wanted: dict[str, str] = {name: value for name in known if (value := filters.get(name)) is not None}  # type: ignore[misc]
    folder = _FOLDER_LABEL.fullmatch(wanted.get("dataset", "")) is not None
    for name, value in wanted.items():
        if value not in known[name] and not (name == "dataset" and folder):
            own = "" if name == "kind" else ", or name the plugin that registers it with --plugin FILE"
            remedy = f"choose {', '.join(known[name])}{own}"
            raise ConfigError("unknown", field=f"{name} {value!r}", remedy=remedy)
    conditions = [
        f"tags.`{Tag.FOLDER if name == 'dataset' and folder else f'istanas.{name}'}` = '{value}'"
        for name, value in wanted.items()
    ]
    if "kind" not in wanted:
        conditions.append(f"tags.`{Tag.KIND}` != 'measurement'")  # and the run has this tag
    where = (filters.get("where") or "").strip()
    return " and ".join([*conditions, where] if where else conditions)


@contextlib.contextmanager
def _explained(where: str | None) -> Iterator[None]:
    """Convert MLflow's error for an invalid condition of the user to a `ConfigError`."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if where is None or error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        reason = " ".join(error.message.split()).rstrip(".")
        raise ConfigError(
            f"MLflow refuses it ({reason:.300})",
            field=f"where {where!r}",
            remedy=f"write for example: {WHERE_EXAMPLE}",
        ) from None
