"""The MLflow store: its selection, and its use by several processes without conflicts."""

import contextlib
import errno
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from pipeline.base.addresses import sqlite_file
from pipeline.base.redaction import without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient

ARTIFACTS = "mlartifacts"  # the folder beside a SQLite store
LOCK_SECONDS = 60.0


def store_uri(tracking_uri: str | None, *, known: str | None = None) -> str:
    """Return the MLflow store: the first of `tracking_uri`, `MLFLOW_TRACKING_URI`, `known` and `sqlite:///mlflow.db`.

    Args:
        tracking_uri: An MLflow tracking URI, or None.
        known: The store that has the run already, if any.

    Returns:
        The URI; for a SQLite file, with its absolute path.

    Example:
        >>> store_uri("http://host:5000"), store_uri("sqlite:////data/mlflow.db")
        ('http://host:5000', 'sqlite:////data/mlflow.db')
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or known or "sqlite:///mlflow.db"
    file = sqlite_file(uri)
    return uri if file is None else f"sqlite:///{file}"


def store_exists(uri: str) -> bool:
    """Return False for a SQLite store whose file is missing (opening it would create the file), otherwise True.

    Example:
        >>> store_exists("sqlite:////nowhere/mlflow.db"), store_exists("http://host:5000")
        (False, True)
    """
    file = sqlite_file(uri)
    return file is None or file.exists()


def public_uri(uri: str) -> str:
    """Return a URI without user name and password, for files and messages.

    Example:
        >>> public_uri("postgresql://me:secret@host/db")
        'postgresql://host/db'
    """
    return without_secrets(uri)


def artifact_root(uri: str) -> str | None:
    """Return the artifact location of a new experiment: `mlartifacts` beside a SQLite file; None if a server decides.

    Example:
        >>> artifact_root("sqlite:////data/mlflow.db"), artifact_root("http://host:5000")
        ('file:///data/mlartifacts', None)
    """
    file = sqlite_file(uri)
    return None if file is None else (file.parent / ARTIFACTS).as_uri()


def open_client(uri: str, *, lock_seconds: float = 10.0) -> "MlflowClient":
    """Open a client that does not print to stdout and stderr and does not wait long for an unreachable server.

    Args:
        uri: The store, as `store_uri` returns it.
        lock_seconds: How long to wait if another program has locked a SQLite file.

    Raises:
        ImportError: MLflow is not installed.
        Exception: any error of a store that cannot be opened.
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
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it logs every retry
    logging.getLogger("mlflow.store.db.utils").setLevel(
        logging.CRITICAL
    )  # it logs a traceback of every error that it raises
    check_folder(uri)
    with database_lock(uri):
        _check_not_locked(sqlite_file(uri), lock_seconds)
        follow_move(uri, lock_seconds=lock_seconds)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


# Columns of MLflow's database with absolute addresses of files.
_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def follow_move(uri: str, *, lock_seconds: float) -> None:
    """Correct the addresses of files in a SQLite store that was moved together with the files of its runs.

    A folder of artifacts may have any name. The moved folder is recognised by the id of a run, which is part of its
    path. Nothing changes if the folder at the old address still exists, or if there is none beside the store.
    """
    file = sqlite_file(uri)
    if file is None or not file.exists():
        return
    with contextlib.closing(sqlite3.connect(file, timeout=lock_seconds)) as database, database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not {"experiments", "runs"} <= tables:
            return
        moved: dict[str, str] = {}
        for number, place in database.execute("SELECT experiment_id, artifact_location FROM experiments"):
            if not place or folder_of(place) is None or _is_folder(place):
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


def folder_of(address: str) -> Path | None:
    """Return the folder at an address of artifacts; None if it is not on this machine.

    Example:
        >>> str(folder_of("file:///my%20data/mlartifacts")), str(folder_of("/mlruns/1")), folder_of("s3://b/1")
        ('/my data/mlartifacts', '/mlruns/1', None)
    """
    if address.startswith("/"):
        return Path(address)
    return Path(unquote(urlsplit(address).path)) if address.startswith("file:///") else None


def _is_folder(address: str) -> bool:
    folder = folder_of(address)
    return folder is not None and folder.is_dir()


def _moved_folder(run_id: str, address: str, here: Path) -> dict[str, str]:
    """Return {old address: new address} of the folder with a run's files, if the folder has moved to `here`."""
    folder = folder_of(address)
    if folder is None or run_id not in folder.parts or folder.is_dir():
        return {}
    for depth in range(1, folder.parts.index(run_id) + 1):
        if here.joinpath(*folder.parts[depth:]).is_dir():
            # If a run's folder lies directly beside the store, the folder of the store has moved.
            kept = folder.parts[depth : depth + 1] if folder.parts[depth] != run_id else ()
            old, new = Path(*folder.parts[:depth], *kept), here.joinpath(*kept)
            return {} if old.is_dir() else {_like(address, old): _like(address, new)}
    return {}


def _moved_before_its_first_file(place: str, here: Path) -> dict[str, str]:
    """Return the same as `_moved_folder` for an experiment without files, recognised by the folder name `ARTIFACTS`."""
    folder, new = folder_of(place), here / ARTIFACTS
    if folder is None or folder.name != ARTIFACTS or (folder.parent.is_dir() and not new.is_dir()):
        return {}
    return {place: _like(place, new)}


def _like(address: str, folder: Path) -> str:
    """Return the address of a folder in the form of another address."""
    return str(folder) if address.startswith("/") else folder.as_uri()


def check_folder(uri: str) -> None:
    """Reject a SQLite store whose folder does not exist, for example because the project was moved.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if (file := sqlite_file(uri)) is not None and folder_is_missing(uri):
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(file.parent))


def _check_not_locked(file: Path | None, lock_seconds: float) -> None:
    """Reject a database that another program has locked, because MLflow would retry for minutes and log each try.

    Raises:
        sqlite3.OperationalError: "database is locked".
    """
    if file is not None and file.exists():
        with contextlib.closing(sqlite3.connect(file, timeout=lock_seconds)) as database:
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()


@contextlib.contextmanager
def database_lock(uri: str) -> Iterator[None]:
    """Lock a SQLite store, because two processes that create its tables at the same time would damage it."""
    file = sqlite_file(uri)
    if file is None:
        yield
        return
    with FileLock(f"{file}.lock", timeout=LOCK_SECONDS):
        yield


def folder_is_missing(uri: str) -> bool:
    """Return whether the folder of a SQLite store is missing. If only the file is missing, it is created again."""
    file = sqlite_file(uri)
    return file is not None and not file.parent.exists()
