"""`mlflow.json` in a run directory: where the run is mirrored in MLflow."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from istanas.limits import RECORD_BYTES, read_at_most
from pipeline.base.addresses import sqlite_file
from pipeline.base.files import atomic_write
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import LINK_FILE


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
