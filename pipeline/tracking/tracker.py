"""Trackers, which mirror run directories in MLflow.

A tracker has one operation, `deliver`, which updates the MLflow run from the run directory. It sends only what the
store lacks, and is safe to repeat: after every epoch, after a crash, or later from another process.
"""

import contextlib
import dataclasses
import errno
import getpass
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from filelock import FileLock

from istanas.errors import CheckpointError, ConfigError
from istanas.methods import trains_target
from pipeline.base.addresses import sqlite_file
from pipeline.base.interruption import uninterrupted
from pipeline.base.page_links import without_file_links
from pipeline.base.servers import by_proxy
from pipeline.base.text import one_line
from pipeline.runs.bucket import local, shown
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import DELIVERY_LOCK
from pipeline.runs.mlflow_link import Link, read_link
from pipeline.runs.record import DatasetUse, RunRecord
from pipeline.runs.tags import Tag, tags_of
from pipeline.tracking import lineage, model_registry
from pipeline.tracking.notices import OF_THIS_PROCESS, Notices
from pipeline.tracking.store import (
    LOCK_SECONDS,
    artifact_root,
    folder_is_missing,
    folder_of,
    open_client,
    public_uri,
    store_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

RETRY_SECONDS = 60.0
CHUNK_METRICS, CHUNK_PARAMS, CHUNK_TAGS = 1000, 100, 100  # MLflow's limits of a log_batch request

Names = tuple[str, ...]


@dataclass(frozen=True)
class Delivery:
    """The result of `deliver`: numbers of entries and names of artifacts that were sent.

    Attributes:
        run_id, tracking_uri: The MLflow run.
        created: Whether this delivery created the MLflow run.
        missing: Artifacts in the record that the run directory does not have.
        model: Whether this delivery logged the network.
        registered: Name and version under which this delivery registered the network, or None.
    """

    run_id: str
    tracking_uri: str
    created: bool = False
    metrics: int = 0
    params: int = 0
    tags: int = 0
    datasets: int = 0
    artifacts: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    model: bool = False
    registered: tuple[str, int] | None = None


class Tracker(Protocol):
    """Interface that mirrors a run; only rank 0 uses it."""

    @property
    def run_id(self) -> str | None:
        """The id of the MLflow run, if there is one."""

    def deliver(self) -> bool:
        """Update the store from the run directory; return False if the store is unreachable."""


class NullTracker:
    """A tracker that does nothing, for `tracking.enabled=false`.

    Example:
        >>> NullTracker().deliver()
        True
    """

    run_id: str | None = None

    def deliver(self) -> bool:
        """Return True."""
        return True


def open_tracker(
    run_dir: RunDir,
    *,
    enabled: bool,
    tracking_uri: str | None,
    experiment: str,
    models: bool = True,
    registered_model: str | None = None,
) -> "MLflowTracker | NullTracker":
    """Return the tracker of a run.

    Args:
        run_dir: The run directory.
        enabled: False returns a `NullTracker`.
        tracking_uri: See `store_uri`.
        experiment: Name of the MLflow experiment, which is created if it does not exist.
        models, registered_model: See `MLflowTracker`.

    Example:
        >>> tracker = open_tracker(RunDir("x"), enabled=False, tracking_uri=None, experiment="digits")
        >>> tracker.deliver(), tracker.run_id
        (True, None)
    """
    if not enabled:
        return NullTracker()
    return MLflowTracker(
        run_dir,
        tracking_uri=tracking_uri,
        experiment=experiment,
        models=models,
        registered_model=registered_model,
    )


class MLflowTracker:
    """Mirrors a run directory in an MLflow store.

    Args:
        run_dir: The run directory; it must have a `run.json` when `deliver` is called.
        tracking_uri: See `store_uri`; None selects the store that has the run already.
        experiment: Name of the experiment in which a new MLflow run is created.
        models: Whether a trained network is logged and registered.
        registered_model: Name in the model registry under which a trained network gets a version; None means
            `istanas-` and the label of the data set.
        load_network: Loads the network in eval mode and example pictures (2, C, H, W) from a run directory; by
            default `pipeline.runs.network_files.load_network`.
        notices: Warnings that were logged already.
    """

    def __init__(
        self,
        run_dir: RunDir,
        *,
        tracking_uri: str | None,
        experiment: str,
        models: bool = True,
        registered_model: str | None = None,
        load_network: model_registry.NetworkLoader | None = None,
        notices: Notices = OF_THIS_PROCESS,
    ) -> None:
        self.run_dir = run_dir
        self.experiment = experiment
        self.models, self.registered_model = models, registered_model
        self.last_delivery: Delivery | None = None
        self._load_network, self._notices = load_network, notices
        link = read_link(run_dir)
        self.tracking_uri = store_uri(tracking_uri, known=link.tracking_uri if link else None)
        self._link = link if link and link.tracking_uri == public_uri(self.tracking_uri) else None
        self._client: MlflowClient | None = None
        self._is_known = False  # whether `_in_store` is up to date
        self._in_store: set[tuple[str, int]] = (
            set()
        )  # metrics (name, step) that the store had when it was read
        self._retry_at = 0.0

    @property
    def run_id(self) -> str | None:
        """The id of the MLflow run, if it exists."""
        return self._link.run_id if self._link else None

    def deliver(self) -> bool:
        """Update the store from the run directory; safe to call repeatedly.

        Returns:
            False if the store is unreachable. This is reported once per process, and the store is tried again at most
            once a minute while the run is running.

        Raises:
            CheckpointError: the run directory itself is broken.
        """
        if time.monotonic() < self._retry_at and self.run_dir.read().status == "RUNNING":
            return False
        if folder_is_missing(self.tracking_uri):
            self._warn_no_folder()
            return False
        try:
            # Without a lock, `istanas sync` during a training could create a second MLflow run.
            with FileLock(self.run_dir.path / DELIVERY_LOCK, timeout=LOCK_SECONDS):
                if self._client is None:
                    self._client = open_client(self.tracking_uri)
                with self._delaying_interrupts():
                    self.last_delivery = self._deliver(self._client)
        except CheckpointError:
            raise
        except Exception as error:  # SQL, HTTP, S3 and disks raise too many types of errors to list
            self._retry_at = time.monotonic() + RETRY_SECONDS
            self._client, self._is_known = None, False
            self._warn_unreachable(error)
            return False
        return True

    def _delaying_interrupts(self) -> contextlib.AbstractContextManager[object]:
        """Delay interrupts that would leave a SQLite file locked."""
        return uninterrupted() if sqlite_file(self.tracking_uri) is not None else contextlib.nullcontext()

    def _warn_unreachable(self, error: Exception) -> None:
        remedy = "install mlflow, then" if isinstance(error, ImportError) else "when it is back,"
        self._notices.warn_once(
            f"MLflow store {public_uri(self.tracking_uri)}: can't be used ({one_line(error)}"
            f"{by_proxy(self.tracking_uri)}); everything stays in {shown(self.run_dir.path)}; {remedy} run: "
            f"istanas sync {shown(self.run_dir.path)}",
            about=f"unreachable {self.tracking_uri}",
        )

    def _warn_no_folder(self) -> None:
        file = sqlite_file(self.tracking_uri)
        self._notices.warn_once(
            f"MLflow store {public_uri(self.tracking_uri)}: its folder does not exist; everything stays in "
            f"{shown(self.run_dir.path)}; create the folder, or name the store where it is now: istanas sync "
            f"{shown(self.run_dir.path)} --set tracking.uri=sqlite:///FOLDER/{file.name if file else ''}",
            about=f"gone {self.tracking_uri}",
        )

    def _deliver(self, client: "MlflowClient") -> Delivery:
        record = self.run_dir.read()
        run, created = self._find_or_create(client, record)
        run_id = run.info.run_id
        parent_id = run.data.tags.get(lineage.PARENT) or self._parent_id(client, record.parent)
        kin = lineage.ancestors(client, parent_id)
        done = Delivery(
            run_id=run_id,
            tracking_uri=public_uri(self.tracking_uri),
            created=created,
            params=_send_params(client, run, record),
            tags=self._send_tags(client, run, record, kin),
            datasets=_send_datasets(client, run, record),
            metrics=self._send_metrics(client, run),
        )
        if record.status == "RUNNING":
            if run.info.status != "RUNNING":
                client.update_run(run_id, status="RUNNING")
            return done
        sent, missing = self._send_artifacts(client, record)
        wanted = self.models and has_network(record)
        model, new = self._send_model(client, run) if wanted else (None, False)
        registered = None
        if model is not None:
            registered = self._register(client, model, record, (lineage.kin_of(client.get_run(run_id)), *kin))
        if (run.info.status, run.info.end_time) != (record.status, record.ended_ms):
            client.set_terminated(run_id, status=record.status, end_time=record.ended_ms)
        return dataclasses.replace(done, artifacts=sent, missing=missing, model=new, registered=registered)

    def _find_or_create(self, client: "MlflowClient", record: RunRecord) -> "tuple[Run, bool]":
        run = self._known_run(client)
        if run is not None:
            return run, False
        self._is_known = False
        experiment_id = _experiment_id(client, self.experiment, artifact_root(self.tracking_uri))
        # After a crash between creating the run and storing its id, the run can only be found by its key.
        found = client.search_runs([experiment_id], f"tags.`istanas.key` = '{record.key}'", max_results=1)
        run = found[0] if found else None
        if run is None:
            run = client.create_run(
                experiment_id,
                start_time=record.started_ms,
                run_name=record.name,
                tags={Tag.KEY: record.key, **_source_tags()},
            )
        self._link = Link(public_uri(self.tracking_uri), self.experiment, run.info.run_id)
        self._link.write(self.run_dir)
        return run, not found

    def _known_run(self, client: "MlflowClient") -> "Run | None":
        """Return the run in `mlflow.json`, unless it was deleted from the store."""
        from mlflow.exceptions import MlflowException

        if self.run_id is None:
            return None
        try:
            run = client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _send_tags(
        self, client: "MlflowClient", run: "Run", record: RunRecord, kin: Sequence[lineage.Kin]
    ) -> int:
        from mlflow.entities import RunTag

        wanted = {
            **_commit_tag(self.run_dir),
            **tags_of(record, shown(self.run_dir.path.absolute())),
            **lineage.lineage_tags(kin),
        }
        if kin:
            wanted[lineage.PARENT] = kin[0].run_id
        if record.description:
            wanted[lineage.DESCRIPTION] = lineage.with_links(
                record.description, kin, run.info.run_id, record.artifacts
            )
        tags = [RunTag(name, value) for name, value in wanted.items() if run.data.tags.get(name) != value]
        for start in range(0, len(tags), CHUNK_TAGS):
            client.log_batch(run.info.run_id, tags=tags[start : start + CHUNK_TAGS], synchronous=True)
        return len(tags)

    def _parent_id(self, client: "MlflowClient", parent: str | None) -> str | None:
        """Deliver the parent's run directory, and return the id of its MLflow run; None without a usable directory."""
        if parent is None:
            return None
        given = RunDir(local(parent))
        # Parent and child may have been moved together.
        directory = given if given.exists() else RunDir(self.run_dir.path.parent / given.path.name)
        if not directory.exists():
            return None
        tracker = MLflowTracker(
            directory,
            tracking_uri=self.tracking_uri,
            experiment=self.experiment,
            notices=self._notices,
            models=False,  # the parent's own configuration decides about models
        )
        try:
            with FileLock(directory.path / DELIVERY_LOCK, timeout=LOCK_SECONDS):
                return tracker._deliver(client).run_id
        except CheckpointError as error:  # a damaged search must not stop its retraining
            self._notices.warn_once(
                f"MLflow parent of {self.run_dir.path}: left out ({error})", about=f"parent {parent}"
            )
            return None

    def _send_metrics(self, client: "MlflowClient", run: "Run") -> int:
        from mlflow.entities import Metric

        assert self._link is not None
        run_id, sent, known = run.info.run_id, self._link.metrics_bytes, self._is_known
        if sent and self.run_dir.metrics_digest(sent) != self._link.metrics_digest:
            sent, known = 0, False  # the file was replaced, because the run was resumed or exported
        lines, end = self.run_dir.metrics_from(sent)
        values = {
            (name, line.step): Metric(name, value, line.timestamp_ms, line.step)
            for line in lines
            for name, value in line.metrics.items()
        }
        if not known:  # a killed process may have sent more metrics than the link or the file has
            history = (m for name in run.data.metrics for m in client.get_metric_history(run_id, name))
            self._in_store = {(metric.key, metric.step) for metric in history}
        # A resumed run measures some epochs again; the values in the store are kept.
        new = [value for key, value in values.items() if key not in self._in_store]
        for start in range(0, len(new), CHUNK_METRICS):
            client.log_batch(run_id, metrics=new[start : start + CHUNK_METRICS], synchronous=True)
        self._is_known = True
        link = dataclasses.replace(
            self._link, metrics_bytes=end, metrics_digest=self.run_dir.metrics_digest(end)
        )
        if link != self._link:
            self._link = link
            link.write(self.run_dir)
        return len(new)

    def _send_artifacts(self, client: "MlflowClient", record: RunRecord) -> tuple[Names, Names]:
        assert self._link is not None
        if (store := sqlite_file(self.tracking_uri)) is not None:
            _check_artifact_folder(client, self._link.run_id, store.parent)
        sent = dict(self._link.artifacts)
        new: list[str] = []
        missing: list[str] = []
        for name in record.artifacts:
            file = self.run_dir.path / name
            # Files outside of the run directory, to which a link or a name may point, are not sent.
            if not file.is_file() or not file.resolve().is_relative_to(self.run_dir.path.resolve()):
                missing.append(name)
                continue
            content = file.read_bytes()
            page = without_file_links(content.decode()) if file.suffix == ".html" else None
            digest = hashlib.sha256(content if page is None else page.encode()).hexdigest()
            if sent.get(name) == digest:
                continue
            folder = Path(name).parent.as_posix()
            if page is not None:
                client.log_text(self._link.run_id, page, name)
            else:
                client.log_artifact(self._link.run_id, str(file), None if folder == "." else folder)
            sent[name] = digest
            new.append(name)
        if new:
            self._link = dataclasses.replace(self._link, artifacts=sent)
            self._link.write(self.run_dir)
        return tuple(new), tuple(missing)

    def _send_model(self, client: "MlflowClient", run: "Run") -> "tuple[LoggedModel | None, bool]":
        """Return the run's logged model, and whether this call logged it; None if the network cannot be loaded."""
        try:
            return model_registry.log_model(
                client, run, self.run_dir, self._load_network or _default_loader()
            )
        except model_registry.UnusableNetworkError as error:  # the run is delivered without its model
            self._notices.warn_once(
                f"MLflow model of {self.run_dir.path}: left out ({one_line(error.reason)}); the weights stay in "
                f"the run directory; to try again run: istanas sync {self.run_dir.path}",
                about=f"model {self.run_dir.path}",
            )
            return None, False

    def _register(
        self, client: "MlflowClient", model: "LoggedModel", record: RunRecord, kin: Sequence[lineage.Kin]
    ) -> tuple[str, int] | None:
        """Return the name and the version if this call registered the model."""
        name = model_registry.registered_name(self.registered_model, record)
        try:
            version, new = model_registry.register(client, name, model, record, kin)
        except Exception as error:  # the run is delivered without a version in the registry
            self._notices.warn_once(
                f"MLflow registered model {name!r}: {shown(self.run_dir.path)} could not be registered "
                f"({one_line(error)}); set tracking.registered_model or try again with: istanas sync "
                f"{shown(self.run_dir.path)}",
                about=f"registry {self.run_dir.path}",
            )
            return None
        return (name, version) if new else None


def _check_artifact_folder(client: "MlflowClient", run_id: str, here: Path) -> None:
    """Reject a folder of artifacts that no longer exists, because MLflow would create it again.

    Args:
        client: A client of the store.
        run_id: The run.
        here: The folder of the store, in which folders may be created.

    Raises:
        FileNotFoundError: the folder of the artifacts lies elsewhere, and its parent folder does not exist.
    """
    run = client.get_run(run_id)
    experiment = client.get_experiment(run.info.experiment_id)
    folder = folder_of(experiment.artifact_location or "")
    if folder is None or folder.is_relative_to(here):
        return
    root = (
        folder.parent if folder.name == experiment.experiment_id else folder
    )  # the form of MLflow's default location
    if not root.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT,
            f"the folder for files of experiment {experiment.name!r} has gone, move it beside the store",
            str(root),
        )


def store_of_run(run_dir: RunDir, configured: str | None) -> str | None:
    """Return the store in a run's configuration, or, if the project was moved, the store that has the run.

    Args:
        run_dir: The run directory.
        configured: The setting `tracking.uri` in its config.yaml, in which paths are absolute.
    """
    link = read_link(run_dir)
    if (
        configured is None
        or link is None
        or not folder_is_missing(configured)
        or folder_is_missing(link.tracking_uri)
    ):
        return configured
    return link.tracking_uri


def _experiment_id(client: "MlflowClient", name: str, location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # another process has created it in the meantime
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise ConfigError(
            "is deleted", field=f"experiment {name!r}", remedy="restore it or set tracking.experiment"
        )
    return str(experiment.experiment_id)


def _source_tags() -> dict[str, str]:
    tags = {"mlflow.source.name": "istanas", "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(OSError, KeyError, ImportError):  # the user of a container may have no name
        tags["mlflow.user"] = getpass.getuser()
    return tags


def _commit_tag(run_dir: RunDir) -> dict[str, str]:
    """Return MLflow's tag for the commit that computed the run, if it is known."""
    git = run_dir.environment().get("git")
    commit = git.get("commit") if isinstance(git, dict) else None
    return {} if commit is None else {"mlflow.source.git.commit": str(commit)}


def _send_params(client: "MlflowClient", run: "Run", record: RunRecord) -> int:
    from mlflow.entities import Param

    # Only new parameters, because MLflow does not change existing ones.
    new = [Param(name, str(value)) for name, value in record.params.items() if name not in run.data.params]
    for start in range(0, len(new), CHUNK_PARAMS):
        client.log_batch(run.info.run_id, params=new[start : start + CHUNK_PARAMS], synchronous=True)
    return len(new)


def _send_datasets(client: "MlflowClient", run: "Run", record: RunRecord) -> int:
    """Log the data sets in the record as inputs of the run, unless they were logged before."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    inputs = run.inputs.dataset_inputs if run.inputs is not None else []
    there = {(entry.dataset.name, entry.dataset.digest) for entry in inputs}
    new = [use for use in record.datasets if (use.name, use.digest) not in there]
    if new:
        client.log_inputs(
            run.info.run_id,
            [
                DatasetInput(
                    Dataset(
                        name=use.name,
                        digest=use.digest,
                        source_type="local",
                        source=json.dumps({"uri": use.source}),
                        schema=json.dumps({"mlflow_colspec": _columns(use)}),
                        profile=json.dumps(
                            {
                                "num_rows": use.pictures,
                                "classes": use.classes,
                                "shape": "x".join(map(str, use.shape)),
                                **({"classes_without_pictures": list(use.missing)} if use.missing else {}),
                            }
                        ),
                    ),
                    [InputTag(MLFLOW_DATASET_CONTEXT, use.context)],
                )
                for use in new
            ],
        )
    return len(new)


def _columns(use: DatasetUse) -> list[dict[str, str]]:
    """Return the schema in the form that MLflow's pages show as a table of names and types."""
    shape = " x ".join(map(str, use.shape))
    return [
        {"name": "picture", "type": f"uint8, {shape}"},
        {"name": "label", "type": f"one of {use.classes} classes"},
    ]


def has_network(record: RunRecord) -> bool:
    """Return whether the run has a trained network; other searches only find an architecture."""
    trains = record.kind == "retrain" or (record.kind == "search" and trains_target(record.method))
    return trains and record.status == "FINISHED"


def _default_loader() -> model_registry.NetworkLoader:
    from pipeline.runs.network_files import load_network

    return load_network
