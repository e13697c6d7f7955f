"""`mlflow.json` in a run directory: the MLflow run that mirrors it."""

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
    """The MLflow run that mirrors a run directory, and what was sent to it.

    Args:
        tracking_uri, experiment, run_id: The MLflow run.
        artifacts: SHA-256 of every artifact that was sent, by path.
        metrics_bytes: Size of the part of `metrics.jsonl` that was sent; 0 in links of version 0.1.
        metrics_digest: Digest of that part, see `RunDir.metrics_digest`.
    """

    tracking_uri: str
    experiment: str
    run_id: str
    artifacts: dict[str, str] = field(default_factory=dict)
    metrics_bytes: int = 0
    metrics_digest: str = ""

    def write(self, run_dir: RunDir) -> None:
        """Write the link atomically; a store above the run directory gets a relative path, so that both can move."""
        written = dataclasses.asdict(self) | {"tracking_uri": _portable(self.tracking_uri, run_dir)}
        atomic_write(run_dir.path / LINK_FILE, json.dumps(written, indent=2) + "\n")


def read_link(run_dir: RunDir) -> Link | None:
    """Read `mlflow.json`; return None if it is missing or invalid. The MLflow run is then found by its key.

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
    """Return a store's URI; a SQLite file in a folder above the run directory gets a relative path."""
    file, here = sqlite_file(uri), run_dir.path.absolute()
    if file is None or not here.is_relative_to(file.parent):
        return uri
    return f"sqlite:///{os.path.relpath(file, here)}"


def _located(uri: str, run_dir: RunDir) -> str:
    """Invert `_portable`."""
    path = uri.removeprefix("sqlite:///")
    if path == uri or Path(path).is_absolute():
        return uri
    return f"sqlite:///{os.path.normpath(run_dir.path.absolute() / path)}"
