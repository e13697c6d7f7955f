"""The posterior of the effects from measured losses of any fidelities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from istanas.effects.coding import Architecture, coded
from istanas.effects.fidelity import join_fidelities
from istanas.effects.model import Fidelities, Score, System, linear_system, scores
from istanas.effects.posterior import Posterior, log_evidence, ridge
from istanas.effects.sharing import RATIOS, prior_root, unrooted
from istanas.space.base import SearchSpace

LEAST_SHARE = 0.1  # of the variance of the scores, which the prior attributes to the effects, see `ridge`


def fit_effects(
    space: SearchSpace,
    measured: Sequence[Architecture],
    losses: Sequence[float],
    fidelity: Sequence[int],
    *,
    n_draws: int,
    seed: int,
    score: Score = "normal",
    ratios: Sequence[float] = RATIOS,
) -> Posterior:
    """Return the ridge posterior of the effects, on the scale of the scores at the highest fidelity.

    The prior shares effects between the decisions where an operation is a candidate, see `istanas.effects.sharing`.

    Args:
        space: The search space.
        measured: The measured architectures, (M,).
        losses: Their losses, (M,); NaN and infinity are allowed with normal scores.
        fidelity: Their fidelities, such as the epochs of their training; a larger number is a higher fidelity, (M,).
        n_draws: Number of draws of the posterior, >= 1.
        seed: An integer >= 0.
        score: See `istanas.effects.model.scores`.
        ratios: The variances of the shared effects in units of that of the own ones, of which the marginal likelihood
            chooses one; (0,) shares nothing.

    Raises:
        ConfigError: If there are not more measurements than fidelities.

    Example:
        >>> from istanas.effects.design import balanced_design
        >>> from istanas.space import NasBench201Space
        >>> space = NasBench201Space()
        >>> measured = balanced_design(space, 20, seed=0)
        >>> losses = [1.0 if 3 in kept else 2.0 for kept in measured]  # the first edge has the candidate 3
        >>> posterior = fit_effects(space, measured, losses, [3] * 20, n_draws=10, seed=0)
        >>> int(np.argmax(posterior.mean))
        3
    """
    levels, index = np.unique(np.asarray(fidelity), return_inverse=True)
    rows, values = coded(space, measured), scores(losses, index, score)
    found: list[tuple[float, Posterior]] = []
    for ratio in ratios:
        root = prior_root(space, ratio)
        joined = join_fidelities(rows @ root, values, index, len(levels))
        system = linear_system(rows @ root, values, index, joined)
        posterior = ridge(system, n_draws, seed, least_share=LEAST_SHARE)
        found.append((_evidence(system, posterior, index, joined), unrooted(posterior, root)))
    return max(found, key=lambda each: each[0])[1]


def _evidence(
    system: System, posterior: Posterior, index: npt.NDArray[np.int64], joined: Fidelities
) -> float:
    """Return the log marginal likelihood of the scores, up to a constant that all priors share.

    That of the system belongs to scores in units of the noise of their fidelity, which depends on the prior.
    """
    of_system = log_evidence(system, posterior.noise_variance / posterior.prior_variance)
    return of_system - float(np.sum((np.bincount(index) - 1) * np.log(joined.noise)))


def effects_system(
    space: SearchSpace,
    measured: Sequence[Architecture],
    losses: Sequence[float],
    fidelity: Sequence[int],
    *,
    score: Score = "normal",
) -> System:
    """Return the equations of all measurements, whose fidelities are joined, for independent effects.

    Args:
        space, measured, losses, fidelity, score: As in `fit_effects`.

    Raises:
        ConfigError: As in `linear_system`.

    Example:
        >>> from istanas.effects.design import balanced_design
        >>> from istanas.space import NasBench201Space
        >>> space = NasBench201Space()
        >>> effects_system(space, balanced_design(space, 3, seed=0), [1.0, 2.0, 3.0], [5, 5, 5]).A.shape
        (3, 30)
    """
    levels, index = np.unique(np.asarray(fidelity), return_inverse=True)
    rows, values = coded(space, measured), scores(losses, index, score)
    joined = join_fidelities(rows, values, index, len(levels))
    return linear_system(rows, values, index, joined)
