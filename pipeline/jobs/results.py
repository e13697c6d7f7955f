"""What the jobs return, and what `--json` prints. Accuracies are fractions in [0, 1], times seconds of training.

Top-5 is measured with more than 10 classes only (`istanas.training.TOP5_ABOVE`), beside the top-1 of the same split.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict


class _Result(TypedDict):
    run_dir: str
    mlflow_run_id: str | None
    digest: str
    genotype: dict[str, Any]
    params: int
    macs: int
    seconds: float
    rollbacks: NotRequired[int]  # halvings of the learning rate, if the run diverged


class SearchResult(_Result):
    """Of a two-stage search; parameters and multiply-adds are of the network that `retrain`'s settings would build."""

    valid_top1: float
    valid_top5: NotRequired[float]


class OneStageResult(_Result):
    """Of a one-stage search: `test_top1` of its absorbed network, `valid_top1` of what its last epoch has trained."""

    test_top1: NotRequired[float]  # but with search.test_every = 0
    test_top5: NotRequired[float]
    valid_top1: NotRequired[float]  # with data.holdout
    valid_top5: NotRequired[float]
    search_epochs: int
    train_epochs: int
    rejected: int  # architectures above the limits
    frozen: list[dict[str, Any]]  # per node: cell, node, epoch, reason ("tolerance" or "limit")
    exports: NotRequired[dict[str, Any]]  # of `run`: see `pipeline.jobs.export`


class RetrainResult(_Result):
    """Of a retraining."""

    test_top1: NotRequired[float]  # but with retrain.test_every = 0
    test_top5: NotRequired[float]
    valid_top1: NotRequired[float]  # with data.holdout
    valid_top5: NotRequired[float]


class RunResult(SearchResult):
    """Of both: run_dir and mlflow_run_id are the search's, seconds are of both together."""

    retrain_run_dir: str
    retrain_run_id: str | None
    test_top1: NotRequired[float]  # but with retrain.test_every = 0
    test_top5: NotRequired[float]
    search_seconds: float
    retrain_seconds: float


class SweepResult(TypedDict):
    """Of a sweep: the figures of its best trial, numbers of trials; epochs and seconds of all searches together."""

    run_dir: str
    mlflow_run_id: str | None
    best_trial: int
    best_run_dir: str
    settings: dict[str, Any]
    digest: str
    genotype: dict[str, Any]
    objective_top1: float
    valid_top1: float
    retrained_top1: NotRequired[float]  # with sweep.objective = retrained
    kendall_tau: NotRequired[float | None]  # of the two, over the trials that have both
    retrain_seconds: NotRequired[float]  # of all retrainings together
    params: int
    macs: int
    trials: int
    complete: int
    pruned: int
    failed: int
    epochs: int
    seconds: float


def accuracies(metrics: Mapping[str, float], *splits: str) -> dict[str, float]:
    """Return the accuracies of an epoch under their names in a result; one that was not measured is left out.

    Args:
        metrics: of the epoch.
        splits: "valid", "test", in the order of the result.

    Example:
        >>> accuracies({"train/top1": 0.9, "valid/top1": 0.6, "valid/top5": 0.8}, "test", "valid")
        {'valid_top1': 0.6, 'valid_top5': 0.8}
    """
    names = [(split, top) for split in splits for top in ("top1", "top5")]
    return {
        f"{split}_{top}": metrics[f"{split}/{top}"] for split, top in names if f"{split}/{top}" in metrics
    }
