"""The results of the jobs, as `--json` prints them. Accuracies are fractions in [0, 1]; times are seconds of training.

Top-5 is measured only with more than 10 classes (`istanas.training.TOP5_ABOVE`).
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
    rollbacks: NotRequired[int]  # halvings of the learning rate after divergence


class NextMeasurement(TypedDict):
    """An architecture that a search by measurements would measure next."""

    architecture: str | None  # its text, if the space has one
    candidates: list[int]  # its kept candidates, as they are numbered in effects.csv
    predicted: float  # mean of its score
    deviation: float  # standard deviation of its score, without the noise of a measurement


class EffectsResult(TypedDict):
    """What the measurements of a search have shown, see `istanas.effects.EffectsSummary`."""

    measurements: int
    predicted: float  # mean of the result's score
    deviation: float  # its standard deviation
    choices: int  # decisions of the space
    certain: int
    toss_ups: int
    choice_probabilities: list[float]  # of each decision, in the order of the space
    probability_best: float  # among the measured architectures and the result
    expected_improvement: float
    lasso_gap: float
    next: list[NextMeasurement]


class SearchResult(_Result):
    """Result of a search whose cell is retrained; `params` and `macs` belong to the network of that retraining."""

    valid_top1: NotRequired[float]  # unless the method measures none of its result
    valid_top5: NotRequired[float]
    effects: NotRequired[EffectsResult]  # only of a search by measurements


class OneStageResult(_Result):
    """Result of a one-stage search. `test_top1` belongs to the absorbed network, `valid_top1` to the last supernet."""

    test_top1: NotRequired[float]  # unless search.test_every = 0
    test_top5: NotRequired[float]
    valid_top1: NotRequired[float]  # with data.holdout
    valid_top5: NotRequired[float]
    search_epochs: int
    train_epochs: int
    rejected: int  # architectures that exceeded the limits
    frozen: list[dict[str, Any]]  # per node: cell, node, epoch, reason ("tolerance" or "limit")
    exports: NotRequired[dict[str, Any]]  # only from `run`, see `pipeline.jobs.export`


class RetrainResult(_Result):
    """Result of a retraining."""

    test_top1: NotRequired[float]  # unless retrain.test_every = 0
    test_top5: NotRequired[float]
    valid_top1: NotRequired[float]  # with data.holdout
    valid_top5: NotRequired[float]


class RunResult(SearchResult):
    """Result of a search and its retraining: `run_dir` and `mlflow_run_id` belong to the search, `seconds` to both."""

    retrain_run_dir: str
    retrain_run_id: str | None
    test_top1: NotRequired[float]  # unless retrain.test_every = 0
    test_top5: NotRequired[float]
    search_seconds: float
    retrain_seconds: float


class SweepResult(TypedDict):
    """Result of a sweep: the figures of the best trial, numbers of trials, and epochs and seconds of all searches."""

    run_dir: str
    mlflow_run_id: str | None
    best_trial: int
    best_run_dir: str
    settings: dict[str, Any]
    digest: str
    genotype: dict[str, Any]
    objective_top1: float
    valid_top1: NotRequired[float]  # unless the method measures none of its result
    retrained_top1: NotRequired[float]  # with sweep.objective = retrained
    # Between valid_top1 and retrained_top1, over the trials that have both.
    kendall_tau: NotRequired[float | None]
    retrain_seconds: NotRequired[float]  # of all retrainings
    params: int
    macs: int
    trials: int
    complete: int
    pruned: int
    failed: int
    epochs: int
    seconds: float


def accuracies(metrics: Mapping[str, float], *splits: str) -> dict[str, float]:
    """Return the accuracies of an epoch under their names in a result; those that were not measured are left out.

    Args:
        metrics: The metrics of the epoch.
        splits: "valid" or "test", in the order of the result.

    Example:
        >>> accuracies({"train/top1": 0.9, "valid/top1": 0.6, "valid/top5": 0.8}, "test", "valid")
        {'valid_top1': 0.6, 'valid_top5': 0.8}
    """
    names = [(split, top) for split in splits for top in ("top1", "top5")]
    return {
        f"{split}_{top}": metrics[f"{split}/{top}"] for split, top in names if f"{split}/{top}" in metrics
    }
