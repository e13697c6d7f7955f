"""The settings of the search algorithms. Their defaults are the published ones and are written only here.

This module does not import torch: the schema of the configuration takes its defaults from it, and the command line
must start quickly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Matrix = Literal["uniform", "gaussian"]
"""Distributions of a measurement matrix, see `istanas.sparse.measurement_matrix`."""

Solver = Literal["homotopy", "ista", "fista", "clarabel", "mosek"]
"""Solvers of the LASSO, see `istanas.sparse.recover`."""

Schedule = Literal["cosine", "linear", "linear_by_epoch"]
"""Schedules of the learning rate, see `istanas.training.learning_rate`."""

CLOSING_EPOCHS = 1
"""Epochs of a one-stage search after its last node has frozen.

The published loop notices the end of its search only after it has trained the next epoch, at the search's learning rate
and without drop path.
"""


@dataclass(frozen=True)
class SearchSettings:
    """Hyperparameters that both searches have.

    Args:
        lr: Learning rate of SGD on the weights at the start, > 0.
        lr_min: Learning rate at the end, >= 0.
        momentum: Momentum of SGD, in [0, 1).
        weight_decay: Weight decay of SGD, >= 0.
        grad_clip: Largest joint norm of the weights' gradients, > 0; `None` disables clipping. (The published code
            includes the gradients of the alphas in the norm and clips them, too.)
        arch_lr: Learning rate of Adam on the compressed alphas, > 0.
        arch_betas: Betas of Adam, each in [0, 1).
        arch_weight_decay: Weight decay of Adam, >= 0.
        n_measurements: Rows m of the measurement matrices, >= 1.
        matrix: Distribution of their entries.
        matrix_seed: Seed of the measurement matrices, >= 0.
        alphas_scale: Standard deviation of the initial compressed alphas, >= 0.
        l1_weight: Weight l1 of the LASSO, > 0.
        solver: Solver of the LASSO.
    """

    lr: float = 0.1
    lr_min: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 3e-4
    grad_clip: float | None = 5.0
    arch_lr: float = 6e-4
    arch_betas: tuple[float, float] = (0.5, 0.999)
    arch_weight_decay: float = 1e-3
    n_measurements: int = 7
    matrix: Matrix = "uniform"
    matrix_seed: int = 0
    alphas_scale: float = 1e-3
    l1_weight: float = 1e-5
    solver: Solver = "homotopy"


@dataclass(frozen=True)
class TwoStageSettings(SearchSettings):
    """Hyperparameters of a two-stage search, in addition to those of `SearchSettings`.

    Args:
        epochs: Number of epochs, >= 1. The learning rate of the weights falls from `lr` to `lr_min` over them
            (cosine, updated in every step).
        termination_tol: The search stops early after an epoch in which every code moved by at most this, >= 0;
            `None` disables early stopping.

    Example:
        >>> TwoStageSettings().epochs, TwoStageSettings(lr=0.05).lr
        (50, 0.05)
    """

    epochs: int = 50
    termination_tol: float | None = None


@dataclass(frozen=True)
class OneStageSettings(SearchSettings):
    """Hyperparameters of a one-stage search, in addition to those of `SearchSettings`.

    Args:
        max_search_epochs: Epochs after which the nodes that are still ACTIVE freeze, >= 1.
        train_epochs: Epochs of training after the search, >= 0. The learning rate of the weights is `lr` during the
            search and falls to `lr_min` over these epochs.
        schedule: How the learning rate falls.
        warmup_epochs: Number of epochs at the start in which the learning rate rises to `lr`, >= 0. The warm-up
            continues in the training if the search ends earlier.
        drop_path: Drop-path probability at the end, in [0, 1); it rises linearly from 0 over the `train_epochs`.
        auxiliary_weight: Weight of the auxiliary head's loss, >= 0.
        label_smoothing: Label smoothing of the training loss, in [0, 1).
        termination_tol: A node freezes after an epoch in which its code moved by at most this, >= 0.
        max_params: Largest accepted number of parameters of an architecture, >= 1; `None` disables the limit.
        max_macs: Largest accepted number of multiply-adds, >= 1; `None` disables the limit.

    Example:
        >>> OneStageSettings().lr, OneStageSettings().momentum
        (0.025, 0.9)
    """

    max_search_epochs: int = 600
    train_epochs: int = 600
    lr: float = 0.025
    lr_min: float = 0.001
    schedule: Schedule = "cosine"
    warmup_epochs: float = 0.0
    arch_lr: float = 3e-4
    drop_path: float = 0.2
    auxiliary_weight: float = 0.4
    label_smoothing: float = 0.0
    termination_tol: float = 1e-3
    max_params: int | None = 3_700_000
    max_macs: int | None = None
