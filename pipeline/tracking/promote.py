"""Promotion: moving the alias `champion` of a registered model to a version that is better on the same pictures."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from istanas.errors import ConfigError
from istanas.methods import trains_target
from pipeline.config.choices import HIGHER
from pipeline.runs.directory import RunDir
from pipeline.runs.outcome import data_of, outcome
from pipeline.runs.record import RunRecord, contexts_of
from pipeline.runs.tags import Tag
from pipeline.tracking.model_registry import CHAMPION, registered_name
from pipeline.tracking.queries import readable
from pipeline.tracking.store import database_lock, open_client, store_exists
from pipeline.tracking.tracker import MLflowTracker, has_network

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from pipeline.config.schema import TrackingSettings


@dataclass(frozen=True)
class Promotion:
    """The result of a promotion.

    Args:
        champion: Whether the run's version is the champion now.
        moved: Whether this promotion has made it the champion.
        registered_model, version: The run's version of the registered model.
        metric, value: The metric that was compared, and its value; None if the run has none.
        before, before_value: The previous champion and its value; None if there was none.
        reason: A sentence that explains the result.
    """

    champion: bool
    moved: bool
    registered_model: str
    version: int
    metric: str
    value: float | None
    before: int | None
    before_value: float | None
    reason: str


@dataclass(frozen=True)
class _Figure:
    """A metric of a run, and the name and digest of the data that it was measured on.

    `pictures` is None if the data is unknown; the digest is None if the metric does not depend on the pictures.
    """

    value: float | None
    pictures: tuple[str, str | None] | None


def promote(run: RunDir, tracking: "TrackingSettings", *, metric: str, force: bool = False) -> Promotion:
    """Make a run's version the champion of its registered model if it is better, or if there is no champion.

    Args:
        run: A run with a trained network.
        tracking: The store and the name of the registered model.
        metric: One of `METRICS` of `pipeline.config.choices`; an equal value is not better.
        force: Promote without a comparison.

    Raises:
        ConfigError: the run has no version, or its metric and the champion's cannot be compared.
    """
    record = run.read()
    tracker = MLflowTracker(run, tracking_uri=tracking.uri, experiment=tracking.experiment)
    name = registered_name(tracking.registered_model, record)
    with readable(tracker.tracking_uri, what="used"):
        if tracker.run_id is None or not store_exists(tracker.tracking_uri):
            raise _no_version(run, record, tracking)
        client = open_client(tracker.tracking_uri)
        with database_lock(tracker.tracking_uri):  # serialises concurrent promotions
            version = _version(client, tracker.run_id, name)
            if version is None:
                raise _no_version(run, record, tracking)
            return _promote(client, version, metric, force)


def is_better(metric: str, value: float, than: float) -> bool:
    """Return whether a value of a metric is better than another.

    Example:
        >>> is_better("test/top1", 0.9, 0.8), is_better("target/params", 9, 8), is_better("test/loss", 1, 1)
        (True, False, False)
    """
    return value > than if metric in HIGHER else value < than


def _promote(client: "MlflowClient", version: "ModelVersion", metric: str, force: bool) -> Promotion:
    name, number = version.name, int(version.version)
    alias = client.get_registered_model(name).aliases.get(CHAMPION)
    before = None if alias is None else client.get_model_version(name, str(alias))
    mine = _figure(client, version, metric)
    theirs = None if before is None else _figure(client, before, metric)
    shown = f"{metric} {_shown(mine.value)}"
    moves = True
    if before is None or theirs is None:
        reason = "there was no champion" if mine.value is None else f"{shown}; there was no champion"
    elif int(before.version) == number:
        moves, reason = False, f"{shown}; it was the champion before"
    else:
        against = f"{shown} against {_shown(theirs.value)} of version {before.version}"
        if not force:
            value, than = _comparable(metric, number, mine, int(before.version), theirs)
            moves = is_better(metric, value, than)
        reason = against + (", by force" if force else "" if moves else ": not better")
    if moves:
        client.set_registered_model_alias(name, CHAMPION, str(number))
        client.set_model_version_tag(name, str(number), Tag.PROMOTED, reason)
        if before is not None:
            client.set_model_version_tag(name, str(number), Tag.CHAMPION_BEFORE, str(before.version))
    return Promotion(
        champion=moves or (before is not None and int(before.version) == number),
        moved=moves,
        registered_model=name,
        version=number,
        metric=metric,
        value=mine.value,
        before=None if before is None else int(before.version),
        before_value=None if theirs is None else theirs.value,
        reason=reason,
    )


def _comparable(metric: str, number: int, mine: _Figure, before: int, theirs: _Figure) -> tuple[float, float]:
    """Return both values, if they were measured on the same pictures."""
    field = f"metric {metric}"
    if mine.value is None:
        hint = "train it with data.holdout above 0, " if metric.startswith("valid") else ""
        from istanas.training import TOP5_ABOVE  # imports torch, which would delay the command line's help

        why = f" (top-5 is measured with more than {TOP5_ABOVE} classes)" if metric.endswith("top5") else ""
        remedy = f"{hint}name another --metric, or use --force"
        raise ConfigError(f"version {number} has none{why}", field=field, remedy=remedy)
    if theirs.value is None:
        raise ConfigError(
            f"the champion, version {before}, has none",
            field=field,
            remedy="name another --metric, or use --force",
        )
    if mine.pictures is None or theirs.pictures is None or not _same(mine.pictures, theirs.pictures):
        raise ConfigError(
            f"version {number} is measured on {_named(mine)}, the champion, version {before}, on {_named(theirs)}",
            field=field,
            remedy="use the same data (and for valid the same seed and data.holdout), or --force",
        )
    return mine.value, theirs.value


def _figure(client: "MlflowClient", version: "ModelVersion", metric: str) -> _Figure:
    """Return the metric of a version from its run in the store."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    if version.run_id is None:  # registered by hand
        return _Figure(None, None)
    try:
        run = client.get_run(version.run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return _Figure(None, None)  # the run was deleted permanently
    contexts = contexts_of(metric)
    pictures: dict[str, tuple[str, str | None]] = {
        tag.value: (entry.dataset.name, entry.dataset.digest)
        for entry in (run.inputs.dataset_inputs if run.inputs is not None else ())
        for tag in entry.tags
        if tag.key == MLFLOW_DATASET_CONTEXT
    }
    found = next((pictures[context] for context in contexts if context in pictures), None)
    if not contexts:
        found = (data_of(run.data.tags) or "", None)
    return _Figure(run.data.metrics.get(metric), found)


def _same(mine: tuple[str, str | None], theirs: tuple[str, str | None]) -> bool:
    """Return whether the pictures are the same; a folder that was moved has another name but the same digest."""
    return mine == theirs or (mine[1] is not None and mine[1] == theirs[1])


def _version(client: "MlflowClient", run_id: str, name: str) -> "ModelVersion | None":
    """Return the run's newest version of the registered model."""
    found = client.search_model_versions(f"run_id = '{run_id}'")
    mine = [version for version in found if version.name == name]
    if found and not mine:
        raise ConfigError(
            f"is {name}, but the run is a version of {found[0].name}",
            field="tracking.registered_model",
            remedy="set that name",
        )
    return max(mine, key=lambda version: int(version.version), default=None)


def _no_version(run: RunDir, record: RunRecord, tracking: "TrackingSettings") -> ConfigError:
    """Return the error for a run without a version in the registry."""
    if record.kind == "sweep" or (record.kind == "search" and not trains_target(record.method)):
        why = " (it found an architecture and has no network)"
        remedy = f"name its retraining, or retrain it with istanas retrain --genotype {run.path}"
    elif not has_network(record):
        why = f" (it is {outcome(record.status, record.tags)})"
        remedy = "run the command that started it again, which resumes it"
    elif not tracking.models:
        why = " (tracking.models is false)"
        remedy = f"run istanas sync {run.path} --set tracking.models=true"
    else:
        why, remedy = "", f"deliver it first: istanas sync {run.path}"
    return ConfigError(f"no version of a registered model{why}", field=f"run {run.path}", remedy=remedy)


def _named(figure: _Figure) -> str:
    if figure.pictures is None:
        return "unknown pictures"
    name, digest = figure.pictures
    return name if digest is None else f"{name} {digest[:8]}"


def _shown(value: Any) -> str:
    return "unknown" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
