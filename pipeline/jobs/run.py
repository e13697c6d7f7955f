"""The job `run`: a two-stage search with its retraining, or a one-stage search with its export."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from istanas.space import Genotype
from pipeline.base.extras import check_extra
from pipeline.jobs.context import JobContext
from pipeline.jobs.export import run_export
from pipeline.jobs.results import OneStageResult, RunResult, SearchResult
from pipeline.jobs.retrain import run_retrain
from pipeline.jobs.search import run_search


def run_whole(context: JobContext) -> RunResult | OneStageResult:
    """Search for an architecture, then retrain it (two-stage) or export the trained network (one-stage).

    Returns:
        See `RunResult` (two-stage) and `OneStageResult`.

    Raises:
        IstanasError: A one-stage search, and the packages of the export are not installed.
    """
    if context.config.trains_target:
        check_extra("export", "run")
        result = run_search(context)
        exports = run_export(context.config, result["run_dir"], console=context.console)["exports"]
        return {**cast(OneStageResult, result), "exports": exports}
    search = cast(SearchResult, run_search(context, jobs=("search", "retrain")))
    retrain = run_retrain(replace(context, parent=search["run_dir"]), Genotype.from_dict(search["genotype"]))
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
