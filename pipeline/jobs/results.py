"""What the jobs return, and what `--json` prints. Accuracies are fractions in [0, 1], times seconds of training."""

from __future__ import annotations

from typing import Any, TypedDict


class _Result(TypedDict):
    run_dir: str
    mlflow_run_id: str | None
    digest: str
    genotype: dict[str, Any]
    params: int
    macs: int
    seconds: float


class SearchResult(_Result):
    """Of a search; parameters and multiply-adds are those of the network that `retrain`'s settings would build."""

    valid_top1: float


class RetrainResult(_Result):
    """Of a retraining."""

    test_top1: float


class RunResult(SearchResult):
    """Of both: run_dir and mlflow_run_id are the search's, seconds are of both together."""

    retrain_run_dir: str
    retrain_run_id: str | None
    test_top1: float
    search_seconds: float
    retrain_seconds: float
