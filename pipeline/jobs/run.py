"""Search and retraining in one go, one lineage in MLflow."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from istanas.space import Genotype
from pipeline.config import Config
from pipeline.jobs.retrain import run_retrain
from pipeline.jobs.search import run_search


def run_whole(config: Config, *, name: str, fresh: bool, console: Console) -> dict[str, Any]:
    """Search, then retrain what was found.

    Returns:
        The search's run_dir, mlflow_run_id, digest, genotype; the retraining's test_top1, params, macs,
        retrain_run_dir, retrain_run_id; seconds of both together.
    """
    search = run_search(config, name=name, fresh=fresh, console=console)
    genotype = Genotype.from_dict(search["genotype"])
    retrain = run_retrain(config, genotype, name=name, parent=search["run_dir"], fresh=fresh, console=console)
    return {
        **search,
        "retrain_run_dir": retrain["run_dir"],
        "retrain_run_id": retrain["mlflow_run_id"],
        "test_top1": retrain["test_top1"],
        "params": retrain["params"],
        "macs": retrain["macs"],
        "search_seconds": search["seconds"],
        "retrain_seconds": retrain["seconds"],
        "seconds": search["seconds"] + retrain["seconds"],
    }
