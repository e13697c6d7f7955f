"""The MLflow mirror of a run directory: read from the directory, so it can be delivered at any time.

A tracker has one verb, `deliver`: bring the store up to date. It sends only what the store lacks, by explicit
run ids: calling it after every epoch, after a crash, or a week later from another process gives the same run.
"""

import contextlib
import dataclasses
import errno
import getpass
import hashlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit

from filelock import FileLock
from pydantic import TypeAdapter

from istanas.errors import CheckpointError
from istanas.limits import RECORD_BYTES, read_at_most
from pipeline import links, registry
from pipeline.interruption import uninterrupted
from pipeline.outcome import FOLDER_TAG
from pipeline.pages import without_file_links
from pipeline.probe import by_proxy
from pipeline.redaction import without_secrets
from pipeline.rundir import OWN_PICTURES, DatasetUse, RunDir, RunRecord, atomic_write
from pipeline.storage import local, shown

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

_LOG = logging.getLogger(__name__)

LINK_FILE = "mlflow.json"
ARTIFACTS = "mlartifacts"  # the folder beside a SQLite store
DELIVERY_LOCK = ".mlflow.lock"
RETRY_SECONDS = 60.0
LOCK_SECONDS = 60.0
SECONDS_FOR_A_LOCK = 10.0  # that another program may hold on a SQLite file
CHUNK_METRICS, CHUNK_PARAMS, CHUNK_TAGS = 1000, 100, 100  # the most that one log_batch request may hold

Names = tuple[str, ...]

_said: set[str] = set()  # what this process has already told the user


@dataclass(frozen=True)
class Delivery:
    """What one `deliver` sent: counts, and the names of artifacts.

    `missing` are artifacts that the record lists and the run directory does not have; `registered` is the name
    and version under which this delivery entered the network in the model registry, None if it did not.
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
    """Where a run is mirrored to. Rank 0 only."""

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once there is one."""

    def deliver(self) -> bool:
        """Bring the store up to date with the run directory; False if the store can't be reached."""


class NullTracker:
    """Tracking switched off.

    Example:
        >>> NullTracker().deliver()
        True
    """

    run_id: str | None = None

    def deliver(self) -> bool:
        """Nothing is to be delivered, so nothing is missing."""
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
    """The tracker that the configuration asks for.

    Args:
        run_dir: the run.
        enabled: False gives a `NullTracker`.
        tracking_uri: see `store_uri`.
        experiment: name of the MLflow experiment, created if need be.
        models, registered_model: see `MLflowTracker`.

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


def store_uri(tracking_uri: str | None, *, known: str | None = None) -> str:
    """The MLflow store to use: the argument, else `MLFLOW_TRACKING_URI`, else `known`, else `sqlite:///mlflow.db`.

    Args:
        tracking_uri: an MLflow tracking URI, or None.
        known: the store that a run is already in, if any.

    Returns:
        The URI, that of a SQLite file with its absolute path.

    Example:
        >>> store_uri("http://host:5000"), store_uri("sqlite:////data/mlflow.db")
        ('http://host:5000', 'sqlite:////data/mlflow.db')
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or known or "sqlite:///mlflow.db"
    file = sqlite_file(uri)
    return uri if file is None else f"sqlite:///{file}"


def sqlite_file(uri: str) -> Path | None:
    """The absolute path of a SQLite store's file; None for every other store.

    Example:
        >>> str(sqlite_file("sqlite:////data/mlflow.db")), sqlite_file("http://host:5000")
        ('/data/mlflow.db', None)
    """
    path = uri.removeprefix("sqlite:///")
    return None if path == uri else Path(path).absolute()


def store_exists(uri: str) -> bool:
    """False of a SQLite store without its file, which opening it would create; of a server only asking it tells.

    Example:
        >>> store_exists("sqlite:////nowhere/mlflow.db"), store_exists("http://host:5000")
        (False, True)
    """
    file = sqlite_file(uri)
    return file is None or file.exists()


def public_uri(uri: str) -> str:
    """A URI without the user name and password that it may hold, fit for files and messages.

    Example:
        >>> public_uri("postgresql://me:secret@host/db")
        'postgresql://host/db'
    """
    return without_secrets(uri)


def artifact_root(uri: str) -> str | None:
    """Where a new experiment keeps its files: `mlartifacts` beside a SQLite file; None: the server decides.

    Example:
        >>> artifact_root("sqlite:////data/mlflow.db"), artifact_root("http://host:5000")
        ('file:///data/mlartifacts', None)
    """
    file = sqlite_file(uri)
    return None if file is None else (file.parent / ARTIFACTS).as_uri()


def open_client(uri: str) -> "MlflowClient":
    """A client of one store, quiet on stdout and stderr, that does not wait long for a dead server.

    Args:
        uri: as `store_uri` gives it.

    Raises:
        ImportError: MLflow is not installed.
        Exception: whatever the store raises if it can't be opened.
    """
    defaults = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line for every retry
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a page for what it raises, too
    check_folder(uri)
    with database_lock(uri):
        _check_not_locked(sqlite_file(uri))
        follow_move(uri)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


# Where MLflow's database has absolute addresses of files.
_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def follow_move(uri: str) -> None:
    """Correct the addresses of files in a SQLite store that was moved together with the files of its runs.

    A folder of artifacts may have any name. It is recognised beside the store by a run's id, which is a part of the
    path. Nothing is changed if the folder at an old address still exists, or if no folder lies beside the store.
    """
    file = sqlite_file(uri)
    if file is None or not file.exists():
        return
    with contextlib.closing(sqlite3.connect(file, timeout=SECONDS_FOR_A_LOCK)) as database, database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not {"experiments", "runs"} <= tables:
            return
        moved: dict[str, str] = {}
        for number, place in database.execute("SELECT experiment_id, artifact_location FROM experiments"):
            if not place or _folder_of(place) is None or _is_folder(place):
                continue
            runs = database.execute(
                "SELECT run_uuid, artifact_uri FROM runs WHERE experiment_id = ?", (number,)
            )
            found = (_moved_folder(run_id, address or "", file.parent) for run_id, address in runs)
            moved.update(next(filter(None, found), _moved_before_its_first_file(place, file.parent)))
        for old, new in moved.items():
            for table, column in _ADDRESSES:
                if table in tables:
                    database.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                        f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                        (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
                    )


def _folder_of(address: str) -> Path | None:
    """The folder at an address of artifacts; None if it is not on this machine.

    Example:
        >>> str(_folder_of("file:///my%20data/mlartifacts")), str(_folder_of("/mlruns/1")), _folder_of("s3://b/1")
        ('/my data/mlartifacts', '/mlruns/1', None)
    """
    if address.startswith("/"):
        return Path(address)
    return Path(unquote(urlsplit(address).path)) if address.startswith("file:///") else None


def _is_folder(address: str) -> bool:
    folder = _folder_of(address)
    return folder is not None and folder.is_dir()


def _moved_folder(run_id: str, address: str, here: Path) -> dict[str, str]:
    """The folder of artifacts that holds a run's files: {old address: new one} if it lies in `here` now."""
    folder = _folder_of(address)
    if folder is None or run_id not in folder.parts or folder.is_dir():
        return {}
    for depth in range(1, folder.parts.index(run_id) + 1):
        if here.joinpath(*folder.parts[depth:]).is_dir():
            # Of a run's folder that lies beside the store itself, it is the store's folder that has moved.
            kept = folder.parts[depth : depth + 1] if folder.parts[depth] != run_id else ()
            old, new = Path(*folder.parts[:depth], *kept), here.joinpath(*kept)
            return {} if old.is_dir() else {_like(address, old): _like(address, new)}
    return {}


def _moved_before_its_first_file(place: str, here: Path) -> dict[str, str]:
    """The same of an experiment without any files yet, for which we have named the folder beside the store."""
    folder, new = _folder_of(place), here / ARTIFACTS
    if folder is None or folder.name != ARTIFACTS or (folder.parent.is_dir() and not new.is_dir()):
        return {}
    return {place: _like(place, new)}


def _like(address: str, folder: Path) -> str:
    """The address of a folder, written as another address is."""
    return str(folder) if address.startswith("/") else folder.as_uri()


def check_folder(uri: str) -> None:
    """Refuse a SQLite store in a folder that does not exist: its project was moved, or its name is misspelt.

    Raises:
        FileNotFoundError: there is no such folder, and it is not created.
    """
    if (file := sqlite_file(uri)) is not None and has_gone(uri):
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(file.parent))


def _check_not_locked(file: Path | None) -> None:
    """Refuse a database that another program has locked: MLflow would go on trying for minutes, and say so each time.

    Raises:
        sqlite3.OperationalError: "database is locked".
    """
    if file is not None and file.exists():
        with contextlib.closing(sqlite3.connect(file, timeout=SECONDS_FOR_A_LOCK)) as database:
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()


@contextlib.contextmanager
def database_lock(uri: str) -> Iterator[None]:
    """Tables are made when a SQLite store is first opened; two processes doing that at once spoil it."""
    file = sqlite_file(uri)
    if file is None:
        yield
        return
    with FileLock(f"{file}.lock", timeout=LOCK_SECONDS):
        yield


def one_line(error: BaseException, limit: int = 200) -> str:
    """An error as one readable line without passwords: what the system said, if that was at the bottom of it.

    Args:
        error: the error; the errors that led to it are looked at too.
        limit: characters after which a text is cut, >= 1.

    Example:
        >>> one_line(ValueError("no\\n  route to http://me:secret@host"))
        'ValueError: no route to http://host'
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            file = f": {link.filename}" if isinstance(link.filename, str) else ""
            return f"{type(link).__name__}: {link.strerror}{file}"
        link = link.__cause__ or link.__context__
    text = without_secrets(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text if len(text) <= limit else text[:limit] + '...'}"


class MLflowTracker:
    """Mirrors one run directory into one MLflow store.

    Args:
        run_dir: the run; it must have a `run.json` before `deliver` is called.
        tracking_uri: see `store_uri`; None goes on with the store that the run is already in.
        experiment: name of the experiment in which a new MLflow run is made.
        models: whether a trained network is logged and registered.
        registered_model: name in the model registry under which a trained network gets a version; None means
            `istanas-` and the data set's name.
        load_network: run directory -> (network in eval mode, example pictures (2, C, H, W)); by default
            `pipeline.models.load_network`.
    """

    def __init__(
        self,
        run_dir: RunDir,
        *,
        tracking_uri: str | None,
        experiment: str,
        models: bool = True,
        registered_model: str | None = None,
        load_network: registry.NetworkLoader | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.experiment = experiment
        self.models, self.registered_model = models, registered_model
        self.last_delivery: Delivery | None = None
        self._load_network = load_network
        link = read_link(run_dir)
        self.tracking_uri = store_uri(tracking_uri, known=link.tracking_uri if link else None)
        self._link = link if link and link.tracking_uri == public_uri(self.tracking_uri) else None
        self._client: MlflowClient | None = None
        self._is_known = False  # whether the store has no metrics beyond those that the link says were sent
        self._retry_at = 0.0

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id, once it exists."""
        return self._link.run_id if self._link else None

    def deliver(self) -> bool:
        """Bring the store up to date with the run directory, doubling nothing.

        Returns:
            False if the store can't be reached: said once per process, and tried again at most once a minute
            while the run goes on.

        Raises:
            CheckpointError: the run directory itself is broken.
        """
        if time.monotonic() < self._retry_at and self.run_dir.read().status == "RUNNING":
            return False
        if has_gone(self.tracking_uri):
            self._say_gone()
            return False
        try:
            # A `sync` beside a running training would otherwise open a second MLflow run.
            with FileLock(self.run_dir.path / DELIVERY_LOCK, timeout=LOCK_SECONDS):
                if self._client is None:
                    self._client = open_client(self.tracking_uri)
                with self._to_its_end():
                    self.last_delivery = self._deliver(self._client)
        except CheckpointError:
            raise
        except Exception as error:  # SQL, HTTP, S3, disk: stores fail in too many ways to list
            self._retry_at = time.monotonic() + RETRY_SECONDS
            self._client, self._is_known = None, False
            self._say_unreachable(error)
            return False
        return True

    def _to_its_end(self) -> contextlib.AbstractContextManager[object]:
        """Interrupts have to wait where they would leave a file locked; a server takes care of itself."""
        return uninterrupted() if sqlite_file(self.tracking_uri) is not None else contextlib.nullcontext()

    def _say_unreachable(self, error: Exception) -> None:
        remedy = "install mlflow, then" if isinstance(error, ImportError) else "when it is back,"
        _say_once(
            f"MLflow store {public_uri(self.tracking_uri)}: can't be used ({one_line(error)}"
            f"{by_proxy(self.tracking_uri)}); everything stays in {shown(self.run_dir.path)}; {remedy} run: "
            f"istanas sync {shown(self.run_dir.path)}",
            about=f"unreachable {self.tracking_uri}",
        )

    def _say_gone(self) -> None:
        file = sqlite_file(self.tracking_uri)
        _say_once(
            f"MLflow store {public_uri(self.tracking_uri)}: its folder does not exist; everything stays in "
            f"{shown(self.run_dir.path)}; create the folder, or name the store where it is now: istanas sync "
            f"{shown(self.run_dir.path)} --set tracking.uri=sqlite:///FOLDER/{file.name if file else ''}",
            about=f"gone {self.tracking_uri}",
        )

    def _deliver(self, client: "MlflowClient") -> Delivery:
        record = self.run_dir.read()
        run, created = self._find_or_create(client, record)
        run_id = run.info.run_id
        parent_id = run.data.tags.get(links.PARENT) or self._parent_id(client, record.parent)
        kin = links.ancestors(client, parent_id)
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
            registered = self._register(client, model, record, (links.kin_of(client.get_run(run_id)), *kin))
        if (run.info.status, run.info.end_time) != (record.status, record.ended_ms):
            client.set_terminated(run_id, status=record.status, end_time=record.ended_ms)
        return dataclasses.replace(done, artifacts=sent, missing=missing, model=new, registered=registered)

    def _find_or_create(self, client: "MlflowClient", record: RunRecord) -> "tuple[Run, bool]":
        run = self._known_run(client)
        if run is not None:
            return run, False
        self._is_known = False
        experiment_id = _experiment_id(client, self.experiment, artifact_root(self.tracking_uri))
        # A crash between creating the run and noting its id leaves a run that only its key can find.
        found = client.search_runs([experiment_id], f"tags.`istanas.key` = '{record.key}'", max_results=1)
        run = found[0] if found else None
        if run is None:
            run = client.create_run(
                experiment_id,
                start_time=record.started_ms,
                run_name=record.name,
                tags={"istanas.key": record.key, **_source_tags()},
            )
        self._link = Link(public_uri(self.tracking_uri), self.experiment, run.info.run_id)
        self._link.write(self.run_dir)
        return run, not found

    def _known_run(self, client: "MlflowClient") -> "Run | None":
        """The run that `mlflow.json` names, unless it was deleted from the store since."""
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
        self, client: "MlflowClient", run: "Run", record: RunRecord, kin: Sequence[links.Kin]
    ) -> int:
        from mlflow.entities import RunTag

        wanted = {
            "istanas.kind": record.kind,
            "istanas.method": record.method,
            "istanas.dataset": record.dataset,
            **({FOLDER_TAG: record.data_label} if record.dataset == OWN_PICTURES else {}),
            "istanas.key": record.key,
            "istanas.run_dir": shown(self.run_dir.path.absolute()),
            **_commit_tag(self.run_dir),
            **record.tags,
            **links.lineage_tags(kin),
        }
        if kin:
            wanted[links.PARENT] = kin[0].run_id
        if record.description:
            wanted[links.DESCRIPTION] = links.with_links(
                record.description, kin, run.info.run_id, record.artifacts
            )
        if isinstance(record.result.get("seconds"), int | float):
            wanted["istanas.seconds"] = str(record.result["seconds"])  # without the time between two sittings
        tags = [RunTag(name, value) for name, value in wanted.items() if run.data.tags.get(name) != value]
        for start in range(0, len(tags), CHUNK_TAGS):
            client.log_batch(run.info.run_id, tags=tags[start : start + CHUNK_TAGS], synchronous=True)
        return len(tags)

    def _parent_id(self, client: "MlflowClient", parent: str | None) -> str | None:
        """The MLflow run of the run directory that this one belongs to, delivered if it is not there yet."""
        if parent is None:
            return None
        given = RunDir(local(parent))
        # Run directories may have been moved together.
        directory = given if given.exists() else RunDir(self.run_dir.path.parent / given.path.name)
        if not directory.exists():
            return None
        tracker = MLflowTracker(
            directory,
            tracking_uri=self.tracking_uri,
            experiment=self.experiment,
            models=False,  # its configuration may want none, or another name: that is left to its own delivery
        )
        try:
            with FileLock(directory.path / DELIVERY_LOCK, timeout=LOCK_SECONDS):
                return tracker._deliver(client).run_id
        except CheckpointError as error:  # a search that was damaged since must not stop its retraining
            _say_once(f"MLflow parent of {self.run_dir.path}: left out ({error})", about=f"parent {parent}")
            return None

    def _send_metrics(self, client: "MlflowClient", run: "Run") -> int:
        from mlflow.entities import Metric

        assert self._link is not None
        run_id, sent, known = run.info.run_id, self._link.metrics_bytes, self._is_known
        if sent and self.run_dir.metrics_digest(sent) != self._link.metrics_digest:
            sent, known = 0, False  # they were replaced: a run was resumed, or an export has added to them
        lines, end = self.run_dir.metrics_from(sent)
        values = {
            (name, line.step): Metric(name, value, line.timestamp_ms, line.step)
            for line in lines
            for name, value in line.metrics.items()
        }
        held: set[tuple[str, int]] = set()
        if not known:  # a process that was killed may have sent more than it has noted
            names = {name for name, _ in values} & set(run.data.metrics)
            history = (metric for name in names for metric in client.get_metric_history(run_id, name))
            held = {(metric.key, metric.step) for metric in history}
        # A value that is there stays: a resumed run measures some epochs again, and must not double them.
        new = [value for key, value in values.items() if key not in held]
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
            _check_files_place(client, self._link.run_id, store.parent)
        sent = dict(self._link.artifacts)
        new: list[str] = []
        missing: list[str] = []
        for name in record.artifacts:
            file = self.run_dir.path / name
            # A link out of the run directory, or a name that leads out, is not ours to send.
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
        """The run's logged model, and whether it was logged just now; None if the network can't be loaded."""
        try:
            return registry.log_model(client, run, self.run_dir, self._load_network or _default_loader())
        except registry.UnusableNetworkError as error:  # a run without its model is still worth having
            _say_once(
                f"MLflow model of {self.run_dir.path}: left out ({one_line(error.reason)}); the weights stay in "
                f"the run directory; to try again run: istanas sync {self.run_dir.path}",
                about=f"model {self.run_dir.path}",
            )
            return None, False

    def _register(
        self, client: "MlflowClient", model: "LoggedModel", record: RunRecord, kin: Sequence[links.Kin]
    ) -> tuple[str, int] | None:
        """Name and version if the model was entered in the registry just now."""
        name = registry.registered_name(self.registered_model, record)
        try:
            version, new = registry.register(client, name, model, record, kin)
        except Exception as error:  # a run that is in no registry is still worth having
            _say_once(
                f"MLflow registered model {name!r}: {shown(self.run_dir.path)} is not entered ({one_line(error)}); set "
                f"tracking.registered_model or try again with: istanas sync {shown(self.run_dir.path)}",
                about=f"registry {self.run_dir.path}",
            )
            return None
        return (name, version) if new else None


@dataclass(frozen=True)
class Link:
    """`mlflow.json`: the store and the id under which a run is mirrored, and what was sent."""

    tracking_uri: str
    experiment: str
    run_id: str
    artifacts: dict[str, str] = field(default_factory=dict)  # path -> SHA-256 of what was sent
    metrics_bytes: int = 0  # of metrics.jsonl that were sent; a link of version 0.1 does not say
    metrics_digest: str = ""  # of the last of them, see `RunDir.metrics_digest`

    def write(self, run_dir: RunDir) -> None:
        """Write it into the run directory, atomically; a store of the same project relative to it: both may move."""
        written = dataclasses.asdict(self) | {"tracking_uri": _portable(self.tracking_uri, run_dir)}
        atomic_write(run_dir.path / LINK_FILE, json.dumps(written, indent=2) + "\n")


def read_link(run_dir: RunDir) -> Link | None:
    """The run directory's `mlflow.json`, or None: without it the run is found again by its key.

    Example:
        >>> read_link(RunDir("nowhere")) is None
        True
    """
    try:
        link = TypeAdapter(Link).validate_json(read_at_most(run_dir.path / LINK_FILE, RECORD_BYTES))
    except (OSError, ValueError):
        return None
    return dataclasses.replace(link, tracking_uri=_located(link.tracking_uri, run_dir))


def _check_files_place(client: "MlflowClient", run_id: str, here: Path) -> None:
    """Refuse to write a run's files where a folder of artifacts was that is gone: MLflow would create it again.

    Args:
        client: of the store.
        run_id: the run.
        here: the folder of the store, in which any folder may be created.

    Raises:
        FileNotFoundError: the folder of the artifacts lies elsewhere, and the one above it does not exist.
    """
    run = client.get_run(run_id)
    experiment = client.get_experiment(run.info.experiment_id)
    folder = _folder_of(experiment.artifact_location or "")
    if folder is None or folder.is_relative_to(here):
        return
    root = folder.parent if folder.name == experiment.experiment_id else folder  # MLflow's own form
    if not root.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT,
            f"the folder for files of experiment {experiment.name!r} has gone, move it beside the store",
            str(root),
        )


def _portable(uri: str, run_dir: RunDir) -> str:
    """A store's URI, that of a SQLite file in a folder above the run directory relative to the latter."""
    file, here = sqlite_file(uri), run_dir.path.absolute()
    if file is None or not here.is_relative_to(file.parent):
        return uri
    return f"sqlite:///{os.path.relpath(file, here)}"


def _located(uri: str, run_dir: RunDir) -> str:
    """The inverse of `_portable`."""
    path = uri.removeprefix("sqlite:///")
    if path == uri or Path(path).is_absolute():
        return uri
    return f"sqlite:///{os.path.normpath(run_dir.path.absolute() / path)}"


def store_of_run(run_dir: RunDir, configured: str | None) -> str | None:
    """The store that a run's own configuration names, or, if the project was moved, the one that the run is in.

    Args:
        run_dir: the run.
        configured: `tracking.uri` in its config.yaml, in which paths are absolute.
    """
    link = read_link(run_dir)
    if configured is None or link is None or not has_gone(configured) or has_gone(link.tracking_uri):
        return configured
    return link.tracking_uri


def has_gone(uri: str) -> bool:
    """Whether a SQLite store's whole folder is missing; a file alone may be deleted, and is created again."""
    file = sqlite_file(uri)
    return file is not None and not file.parent.exists()


def _experiment_id(client: "MlflowClient", name: str, location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # another process was quicker
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise RuntimeError(f"experiment {name!r} is deleted; restore it or set tracking.experiment")
    return str(experiment.experiment_id)


def _source_tags() -> dict[str, str]:
    tags = {"mlflow.source.name": "istanas", "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    return tags


def _commit_tag(run_dir: RunDir) -> dict[str, str]:
    """MLflow's tag of the commit that the run was computed with, if it is known."""
    git = run_dir.environment().get("git")
    commit = git.get("commit") if isinstance(git, dict) else None
    return {} if commit is None else {"mlflow.source.git.commit": str(commit)}


def _send_params(client: "MlflowClient", run: "Run", record: RunRecord) -> int:
    from mlflow.entities import Param

    # Only what is not there: MLflow refuses to change a parameter.
    new = [Param(name, str(value)) for name, value in record.params.items() if name not in run.data.params]
    for start in range(0, len(new), CHUNK_PARAMS):
        client.log_batch(run.info.run_id, params=new[start : start + CHUNK_PARAMS], synchronous=True)
    return len(new)


def _send_datasets(client: "MlflowClient", run: "Run", record: RunRecord) -> int:
    """Make the record's pictures inputs of the run, unless they are."""
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
    """The schema as MLflow's pages show it: a table of names and types."""
    shape = " x ".join(map(str, use.shape))
    return [
        {"name": "picture", "type": f"uint8, {shape}"},
        {"name": "label", "type": f"one of {use.classes} classes"},
    ]


def has_network(record: RunRecord) -> bool:
    """Whether the run left a trained network: a two-stage search finds only an architecture."""
    trains = record.kind == "retrain" or (record.kind == "search" and record.method == "one_stage")
    return trains and record.status == "FINISHED"


def _default_loader() -> registry.NetworkLoader:
    from pipeline.models import load_network

    return load_network


def _say_once(message: str, *, about: str) -> None:
    if about not in _said:
        _said.add(about)
        _LOG.warning(message)
