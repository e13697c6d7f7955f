"""Everything around the algorithms of `istanas`: configuration, runs, tracking, Ray, reports and the command line.

The jobs are Python functions, which return finished runs (`pipeline.api`):

    >>> import pipeline
    >>> trained = pipeline.run("digits.yaml", seed=1)  # doctest: +SKIP
    >>> trained.result["test_top1"], trained.network, trained.parent.history  # doctest: +SKIP

No usage statistics leave the machine by default. Ray and MLflow read these variables when they are first imported, so
they are set here; other values in the environment are kept.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api.finished import FinishedRun, load
    from pipeline.api.jobs import evaluate, export, predict, retrain, run, search, sweep

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

__all__ = ["FinishedRun", "evaluate", "export", "load", "predict", "retrain", "run", "search", "sweep"]


def __getattr__(name: str) -> Any:
    """Import the Python API at its first use, because every worker imports `pipeline` and none needs the jobs."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "finished" if name in ("FinishedRun", "load") else "jobs"
    return getattr(importlib.import_module(f"pipeline.api.{room}"), name)
