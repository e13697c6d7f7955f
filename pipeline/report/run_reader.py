"""Reading of a run for a comparison, from its run directory or, if that is not on this machine, from MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from istanas.errors import ConfigError
from istanas.space import Genotype
from pipeline.runs.bucket import shown
from pipeline.runs.directory import RunDir
from pipeline.runs.genotype_file import read_genotype
from pipeline.runs.layout import CONFIG_FILE, GENOTYPE_FILE, NETWORK_FILE, WEIGHTS_FILE
from pipeline.runs.mlflow_link import read_link
from pipeline.runs.outcome import data_of, outcome
from pipeline.runs.record import MetricsLine
from pipeline.runs.tags import Tag
from pipeline.tracking.queries import readable
from pipeline.tracking.references import is_mlflow_id, resolve_run
from pipeline.tracking.store import open_client, store_exists, store_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_FILES = (CONFIG_FILE, GENOTYPE_FILE, NETWORK_FILE, WEIGHTS_FILE)


@dataclass(frozen=True)
class ReadRun:
    """A run with its settings, metrics and files.

    Args:
        label: The name of its directory, which distinguishes runs with the same name.
        kind, method, status: As in its record.
        dataset: The name of its data set.
        outcome: Its status, with INTERRUPTED and PRUNED distinguished.
        run_dir: Its directory on this machine, or `None`.
        mlflow_run_id: Its id in the MLflow store; `None` if it was never delivered.
        settings: "section.key" -> value as text, of the sections that it depends on.
        lines: Its metrics, one line for each epoch.
        seconds: The time spent working; `None` while it runs.
        files: The folder of its configuration, genotype and network, as far as they exist.
    """

    label: str
    kind: str
    method: str
    dataset: str
    status: str
    outcome: str
    run_dir: str | None
    mlflow_run_id: str | None
    settings: dict[str, str]
    lines: list[MetricsLine]
    seconds: float | None
    files: Path

    @property
    def genotype(self) -> Genotype | None:
        """The genotype that it found or trained, or `None`."""
        file = self.files / GENOTYPE_FILE
        return read_genotype(file) if file.is_file() else None

    @property
    def has_network(self) -> bool:
        """Whether there is a trained network in `files`."""
        return all((self.files / name).is_file() for name in (NETWORK_FILE, WEIGHTS_FILE))

    def points(self, metric: str) -> list[tuple[int, float]]:
        """Return the (epoch, value) pairs of a metric."""
        return [(line.step, line.metrics[metric]) for line in self.lines if metric in line.metrics]

    def last(self, metric: str) -> float | None:
        """Return the last value of a metric, or `None`."""
        points = self.points(metric)
        return points[-1][1] if points else None


def read_run(ref: str, *, runs_dir: Path, tracking_uri: str | None, scratch: Path) -> ReadRun:
    """Read a run from its directory or, given an MLflow run id without a directory on this machine, from the store.

    Args:
        ref: A run directory, an MLflow run id or a unique name.
        runs_dir: The folder of run directories.
        tracking_uri: The address of the store, see `pipeline.tracking.store.store_uri`.
        scratch: A folder for downloaded files, which must exist as long as the result is used.

    Raises:
        ConfigError: If there is no such run, or the store cannot be read.
        CheckpointError: If the run directory is damaged.
    """
    try:
        run_dir = resolve_run(ref, runs_dir=runs_dir, tracking_uri=tracking_uri)
    except ConfigError as unresolved:
        if not is_mlflow_id(ref):
            raise
        return _from_store(ref, store_uri(tracking_uri), scratch, unresolved)
    return _from_directory(run_dir)


def _from_directory(run_dir: RunDir) -> ReadRun:
    record, link = run_dir.read(), read_link(run_dir)
    return ReadRun(
        label=run_dir.path.resolve().name,
        kind=record.kind,
        method=record.method,
        dataset=record.data_label,
        status=record.status,
        outcome=outcome(record.status, record.tags),
        run_dir=shown(run_dir.path),
        mlflow_run_id=None if link is None else link.run_id,
        settings={key: str(value) for key, value in record.params.items()},
        lines=_by_epoch(run_dir.metrics()),
        seconds=record.result.get("seconds"),
        files=run_dir.path,
    )


def _from_store(run_id: str, uri: str, scratch: Path, unresolved: ConfigError) -> ReadRun:
    if not store_exists(uri):
        raise unresolved
    client = open_client(uri)
    try:
        run = client.get_run(run_id)
    except Exception:  # The first error explains that the run was not found.
        raise unresolved from None
    tags = run.data.tags
    if Tag.KIND not in tags:
        raise ConfigError(
            "in the MLflow store, but not a run of istanas",
            field=f"run {run_id}",
            remedy="choose one that istanas results lists",
        )
    folder = scratch / run_id
    folder.mkdir(exist_ok=True)
    with readable(uri):
        for name in sorted({item.path for item in client.list_artifacts(run_id)} & set(_FILES)):
            client.download_artifacts(run_id, name, str(folder))
        lines = _lines(client, run)
    seconds = tags.get(Tag.SECONDS)
    return ReadRun(
        label=Path(tags.get(Tag.RUN_DIR, run_id)).name,
        kind=tags[Tag.KIND],
        method=tags.get(Tag.METHOD, ""),
        dataset=data_of(tags) or "",
        status=run.info.status,
        outcome=outcome(run.info.status, tags),
        run_dir=None,
        mlflow_run_id=run_id,
        settings=dict(run.data.params),
        lines=lines,
        seconds=None if seconds is None else float(seconds),
        files=folder,
    )


def _lines(client: MlflowClient, run: Run) -> list[MetricsLine]:
    points = [m for name in run.data.metrics for m in client.get_metric_history(run.info.run_id, name)]
    return _by_epoch([MetricsLine(m.step, m.timestamp, {m.key: m.value}) for m in points])


def _by_epoch(lines: list[MetricsLine]) -> list[MetricsLine]:
    """Merge lines of the same epoch."""
    merged: dict[int, MetricsLine] = {}
    for line in lines:
        before = merged.get(line.step, line)
        merged[line.step] = before._replace(metrics={**before.metrics, **line.metrics})
    return [merged[step] for step in sorted(merged)]
