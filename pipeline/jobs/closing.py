"""Closing of runs, in their records and in MLflow, including the runs of killed processes."""

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
from pipeline.runs.outcome import INTERRUPTED
from pipeline.runs.tags import Tag
from pipeline.tracking.tracker import Tracker, open_tracker


def close(path: Path, config: Config, status: str, tags: dict[str, str], result: dict[str, Any]) -> bool:
    """Close a run, whose process has exited or waits to be terminated, in its record and in MLflow.

    A finished run only gets the tags. The run is not locked, because a process that waits to be terminated still holds
    its lock.

    Args:
        path: The run directory.
        config: The configuration of the run.
        status: MLflow's status: FINISHED, FAILED or KILLED.
        tags: MLflow tags that say how the run ended.
        result: The run's figures so far.

    Returns:
        Whether MLflow has received everything.
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
    """Deliver the ended runs in a run directory, such as the trials of a sweep, to MLflow.

    Returns:
        Whether MLflow has received all of them.
    """
    delivered = []
    for run in runs_below(path):
        if _status(run) not in ("RUNNING", None):
            fetch_for_mlflow(run)
            delivered.append(tracker_of(run, without_models(config)).deliver())
            bucket.send(run.path, LINK_FILE)
    return all(delivered)


def close_below(path: Path, config: Config) -> bool:
    """Close the runs in a sweep's run directory whose status is still RUNNING; see `close_running`."""
    return close_running(runs_below(path), config)


def close_running(runs: Sequence[RunDir], config: Config) -> bool:
    """Close those runs whose status is still RUNNING although no process executes them.

    Returns:
        Whether MLflow has received all of them.
    """
    left = [run for run in runs if _status(run) == "RUNNING"]
    delivered = [
        close(run.path, without_models(config), "KILLED", {Tag.OUTCOME: INTERRUPTED}, {}) for run in left
    ]
    return all(delivered)


def _status(run: RunDir) -> str | None:
    """Return the status of a run; None if its record is damaged. The run's own command repairs it."""
    try:
        return run.read().status
    except CheckpointError:
        return None


def runs_below(path: Path) -> list[RunDir]:
    """Return the runs in a run directory: a sweep's trials and retrainings, or a search's measurements."""
    bucket.fetch_records(path)
    return [RunDir(file.parent) for file in sorted(path.glob(f"*/{RECORD_FILE}"))]


def fetch_for_mlflow(run: RunDir) -> None:
    """Download those files of a run from its bucket that MLflow may lack, because another machine wrote them."""
    bucket.fetch_parts(
        run.path, lambda name: not name.startswith(f"{CHECKPOINTS}/") and not name.endswith(".log")
    )


def without_models(config: Config) -> Config:
    """Return the configuration of runs whose networks are not registered."""
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"models": False})})


def tracker_of(run: RunDir, config: Config) -> Tracker:
    """Return the tracker that mirrors a run to MLflow with the settings of its configuration."""
    t = config.tracking
    return open_tracker(
        run,
        enabled=t.enabled,
        tracking_uri=t.uri,
        experiment=t.experiment,
        models=t.models,
        registered_model=t.registered_model,
    )
