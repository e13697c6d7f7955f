"""Search and retraining in one go, one lineage in MLflow."""

from __future__ import annotations

from rich.console import Console

from istanas.space import Genotype
from pipeline.cluster import Runtime
from pipeline.config import Config
from pipeline.jobs.results import RunResult
from pipeline.jobs.retrain import run_retrain
from pipeline.jobs.search import run_search


def run_whole(config: Config, *, name: str, fresh: bool, console: Console, runtime: Runtime) -> RunResult:
    """Search, then retrain what was found.

    Returns:
        See `RunResult`.
    """
    search = run_search(
        config, name=name, fresh=fresh, console=console, runtime=runtime, jobs=("search", "retrain")
    )
    genotype = Genotype.from_dict(search["genotype"])
    retrain = run_retrain(
        config,
        genotype,
        name=name,
        parent=search["run_dir"],
        fresh=fresh,
        console=console,
        runtime=runtime,
    )
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
