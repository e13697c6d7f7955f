"""The MLflow store: which one is used, and how it is opened without two processes colliding."""

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


def open_client(uri: str, *, lock_seconds: float = 10.0) -> "MlflowClient":
    """A client of one store, quiet on stdout and stderr, that does not wait long for a dead server.

    Args:
        uri: as `store_uri` gives it.
        lock_seconds: how long another program may lock a SQLite file.

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
        _check_not_locked(sqlite_file(uri), lock_seconds)
        follow_move(uri, lock_seconds=lock_seconds)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


# Where MLflow's database has absolute addresses of files.
_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def follow_move(uri: str, *, lock_seconds: float) -> None:
    """Correct the addresses of files in a SQLite store that was moved together with the files of its runs.

    A folder of artifacts may have any name. It is recognised beside the store by a run's id, which is a part of the
    path. Nothing is changed if the folder at an old address still exists, or if no folder lies beside the store.
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
    """The folder at an address of artifacts; None if it is not on this machine.

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
    """The folder of artifacts that holds a run's files: {old address: new one} if it lies in `here` now."""
    folder = folder_of(address)
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
    folder, new = folder_of(place), here / ARTIFACTS
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


def _check_not_locked(file: Path | None, lock_seconds: float) -> None:
    """Refuse a database that another program has locked: MLflow would go on trying for minutes, and say so each time.

    Raises:
        sqlite3.OperationalError: "database is locked".
    """
    if file is not None and file.exists():
        with contextlib.closing(sqlite3.connect(file, timeout=lock_seconds)) as database:
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


def has_gone(uri: str) -> bool:
    """Whether a SQLite store's whole folder is missing; a file alone may be deleted, and is created again."""
    file = sqlite_file(uri)
    return file is not None and not file.parent.exists()
