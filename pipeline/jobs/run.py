"""From pictures to a trained network in one go: two-stage searches and retrains, one-stage searches and exports."""

from __future__ import annotations

from typing import cast

from rich.console import Console

from istanas.space import Genotype
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.schema import Config, OneStageConfig
from pipeline.jobs.export import run_export
from pipeline.jobs.results import OneStageResult, RunResult, SearchResult
from pipeline.jobs.retrain import run_retrain
from pipeline.jobs.search import run_search


def run_whole(
    config: Config, *, name: str, fresh: bool, console: Console, runtime: Runtime
) -> RunResult | OneStageResult:
    """Search; then retrain what was found, or export what was found and trained.

    Returns:
        See `RunResult` (two-stage) and `OneStageResult`.
    """
    if isinstance(config, OneStageConfig):
        result = run_search(config, name=name, fresh=fresh, console=console, runtime=runtime)
        exports = run_export(config, result["run_dir"], console=console)["exports"]
        return {**cast(OneStageResult, result), "exports": exports}
    found = run_search(
        config, name=name, fresh=fresh, console=console, runtime=runtime, jobs=("search", "retrain")
    )
    search = cast(SearchResult, found)
    retrain = run_retrain(
        config,
        Genotype.from_dict(search["genotype"]),
        name=name,
        parent=search["run_dir"],
        fresh=fresh,
        console=console,
        runtime=runtime,
    )
    both: RunResult = {
        **search,
        "retrain_run_dir": retrain["run_dir"],
        "retrain_run_id": retrain["mlflow_run_id"],
        "params": retrain["params"],
        "macs": retrain["macs"],
        "search_seconds": search["seconds"],
        "retrain_seconds": retrain["seconds"],
        "seconds": search["seconds"] + retrain["seconds"],
    }
    if "test_top1" in retrain:
        both["test_top1"] = retrain["test_top1"]
    if "test_top5" in retrain:
        both["test_top5"] = retrain["test_top5"]
    return both
