"""What the measurements of a search have shown: effects with intervals, certain choices, and what would come next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from istanas.effects.budget import Budget
from istanas.effects.choice import (
    Improvement,
    best_architecture,
    choice_probabilities,
    count_within,
    improvement,
    kept_probabilities,
    probability_best,
    thompson,
)
from istanas.effects.coding import Architecture, Array, coded, sum_to_zero
from istanas.effects.fit import effects_system
from istanas.effects.posterior import Posterior
from istanas.effects.sparse_fit import sparse_path
from istanas.space.base import SearchSpace

CERTAIN = 0.95
"""A choice is certain if the best architecture makes it with this probability, see `choice_probabilities`."""

TOSS_UP = 2 / 3
"""A choice is a toss-up if it is made with a smaller probability than this: the odds are below 2 to 1."""

INTERVAL = 0.95
"""Probability of the intervals of the effects."""


@dataclass(frozen=True, eq=False)
class EffectsSummary:
    """What the measurements have shown.

    Args:
        best: The architecture with the highest posterior mean, within the budget if there is one.
        score: Mean and standard deviation of its score, see `predicted_score`.
        mean: Posterior means of the effects, which sum to zero in each decision, (N,).
        intervals: Central intervals of probability `INTERVAL` of the effects as deviations from the mean of their
            decision, (N, 2).
        kept: Probability of each candidate that the best architecture keeps it, (N,).
        code: Code of the LASSO, whose l1 is chosen by the information criterion "bic", (N,).
        gap: Relative duality gap of this code, rounding included.
        choices: Probability of each decision that the best architecture makes the same choice as `best`, (D,).
        probability_best: Probability that `best` is the best one of the measured architectures and itself.
        improvement: What further measurements can gain over `best`.
        following: The architectures that would be measured next, each with the mean and the standard deviation of its
            score.
    """

    best: Architecture
    score: tuple[float, float]
    mean: Array
    intervals: Array
    kept: Array
    code: Array
    gap: float
    choices: Array
    probability_best: float
    improvement: Improvement
    following: tuple[tuple[Architecture, float, float], ...]


def predicted_score(space: SearchSpace, posterior: Posterior, kept: Architecture) -> tuple[float, float]:
    """Return mean and standard deviation of an architecture's score, x mean and sqrt(x V x).

    The score is relative to the mean of all architectures. The noise of a measurement is not included.

    Args:
        space: The search space.
        posterior: The posterior of the effects.
        kept: The architecture, whose coded row is x.

    Example:
        >>> import numpy as np
        >>> from istanas.effects import System, ridge
        >>> from istanas.space import NasBench201Space
        >>> space, pair = NasBench201Space(), [(0, 5, 10, 15, 20, 25), (3, 8, 13, 18, 23, 28)]
        >>> rows = coded(space, pair * 10)
        >>> posterior = ridge(System(rows - rows.mean(0), np.tile([-1.0, 1.0], 10)), 10, seed=0)
        >>> predicted_score(space, posterior, pair[1])[0] > 0
        True
    """
    (row,) = coded(space, [kept])
    # Rounding can make the variance of an architecture that is certain negative.
    return float(row @ posterior.mean), math.sqrt(max(float(row @ posterior.covariance @ row), 0.0))


def summarize(
    space: SearchSpace,
    posterior: Posterior,
    measured: Sequence[Architecture],
    losses: Sequence[float],
    fidelity: Sequence[int],
    *,
    seed: int,
    n_following: int = 5,
    budget: Budget | None = None,
) -> EffectsSummary:
    """Summarise the measurements of a search.

    Args:
        space: The search space.
        posterior: The posterior of the effects after these measurements.
        measured, losses, fidelity: As in `fit_effects`.
        seed: Seed of the choice of the next measurements, an integer >= 0.
        n_following: Number of next measurements, which have the highest fidelity so far. There are fewer, if no more
            architectures are left.
        budget: The limits that the search keeps; `None` for none.

    Raises:
        SolverError: If no solver certifies the code of the LASSO.

    Example:
        >>> from istanas.effects import balanced_design, fit_effects
        >>> from istanas.space import NasBench201Space
        >>> space = NasBench201Space()
        >>> measured = balanced_design(space, 30, seed=0)
        >>> data = measured, [1.0 if 3 in kept else 2.0 for kept in measured], [3] * 30
        >>> summary = summarize(space, fit_effects(space, *data, n_draws=200, seed=0), *data, seed=0)
        >>> summary.best[0], bool(summary.choices[0] > CERTAIN), len(summary.following)
        (3, True, 5)
    """
    best = best_architecture(space, posterior.mean, budget=budget)
    path = sparse_path(effects_system(space, measured, losses, fidelity))
    considered = list(dict.fromkeys([best, *measured]))
    # The mean of a decision's effects has no influence on a score, so that its posterior is as wide as its prior.
    deviations = replace(posterior, draws=sum_to_zero(space, posterior.draws))
    highest = max(fidelity)
    done = {kept for kept, level in zip(measured, fidelity, strict=True) if level == highest}
    wanted = len(done) + n_following
    left = (space.n_architectures if budget is None else count_within(space, budget, wanted)) - len(done)
    n = min(n_following, left, len(posterior.draws))
    following = thompson(space, posterior, n, seed, excluded=done, budget=budget) if n > 0 else []
    return EffectsSummary(
        best=best,
        score=predicted_score(space, posterior, best),
        mean=sum_to_zero(space, posterior.mean),
        intervals=deviations.intervals(INTERVAL),
        kept=kept_probabilities(space, posterior, budget),
        code=path.code,
        gap=float(path.gaps[path.chosen]),
        choices=choice_probabilities(space, posterior, best, budget),
        probability_best=float(probability_best(space, posterior, considered)[0]),
        improvement=improvement(space, posterior, best, budget=budget),
        following=tuple((kept, *predicted_score(space, posterior, kept)) for kept in following),
    )


def count_certain(choices: Array) -> int:
    """Return how many choices are certain.

    Example:
        >>> import numpy as np
        >>> count_certain(np.array([0.94, 0.95, 1.0]))
        2
    """
    return int((choices >= CERTAIN).sum())
