"""Closing of runs in their records and in MLflow, those of killed processes included."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from istanas.errors import CheckpointError
from pipeline.config.schema import Config
from pipeline.jobs.opening import now_ms
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import CHECKPOINTS, LINK_FILE, RECORD_FILE
from pipeline.runs.outcome import INTERRUPTED, OUTCOME_TAG
from pipeline.tracking.tracker import Tracker, open_tracker


def close(path: Path, config: Config, status: str, tags: dict[str, str], result: dict[str, Any]) -> bool:
    """Close a run whose process is gone or waits to be ended, in its record and in MLflow; a finished one is tagged.

    Not under the run's lock: a process that waits to be ended still holds it.

    Args:
        path: the run directory.
        config: of the run.
        status: as MLflow calls it: FINISHED, FAILED or KILLED.
        tags: what became of it.
        result: the figures that it had reached.

    Returns:
        Whether MLflow has all of it.
    """
    run = RunDir(path)
    fetch_for_mlflow(run)
    record = run.read()
    if record.status != "FINISHED":
        record = dataclasses.replace(record, status=status, ended_ms=now_ms(), result=result)
    run.write(dataclasses.replace(record, tags={**record.tags, **tags}))
    delivered = tracker_of(run, config).deliver()
    bucket.send(path, LINK_FILE, RECORD_FILE)
    return delivered


def deliver_below(path: Path, config: Config) -> bool:
    """Deliver to MLflow the ended runs in a run directory: a sweep's trials and retrainings.

    Returns:
        Whether MLflow has all of them.
    """
    delivered = []
    for run in runs_below(path):  # each of them
        if _status(run) not in ("RUNNING", None):
            fetch_for_mlflow(run)
            delivered.append(tracker_of(run, _without_models(config)).deliver())
            bucket.send(run.path, LINK_FILE)
    return all(delivered)


def close_below(path: Path, config: Config) -> bool:
    """`close_running` of the runs in a run directory, a sweep's."""
    return close_running(runs_below(path), config)


def close_running(runs: Sequence[RunDir], config: Config) -> bool:
    """Close those runs that still say RUNNING, though nobody works on them any more: killed, or left by who did.

    Returns:
        Whether MLflow has all of them.
    """
    left = [run for run in runs if _status(run) == "RUNNING"]
    delivered = [
        close(run.path, _without_models(config), "KILLED", {OUTCOME_TAG: INTERRUPTED}, {}) for run in left
    ]
    return all(delivered)


def _status(run: RunDir) -> str | None:
    """None of a run whose record can't be read: it can be neither closed nor delivered, its own command mends it."""
    try:
        return run.read().status
    except CheckpointError:
        return None


def runs_below(path: Path) -> list[RunDir]:
    """A sweep's trials and retrainings."""
    bucket.fetch_records(path)
    return [RunDir(file.parent) for file in sorted(path.glob(f"*/{RECORD_FILE}"))]


def fetch_for_mlflow(run: RunDir) -> None:
    """Have here of a run in a storage, which another machine may have worked on, what MLflow may lack."""
    bucket.fetch_parts(
        run.path, lambda name: not name.startswith(f"{CHECKPOINTS}/") and not name.endswith(".log")
    )


def _without_models(config: Config) -> Config:
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"models": False})})


def tracker_of(run: RunDir, config: Config) -> Tracker:
    """The mirror of a run that its configuration asks for."""
    t = config.tracking
    return open_tracker(
        run,
        enabled=t.enabled,
        tracking_uri=t.uri,
        experiment=t.experiment,
        models=t.models,
        registered_model=t.registered_model,
    )
