"""Policies that spend a number of noisy measurements of architectures, and say at some points which one is best.

A policy is `policy(space, measure, at, seed)`: `measure` returns a loss, `at` are the numbers of measurements after
which the policy is asked, the last of which ends it. It returns one architecture for each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import optuna

from istanas.effects import (
    Architecture,
    Posterior,
    System,
    architecture,
    balanced_design,
    best_architecture,
    coded,
    fit_effects,
    layout,
    linear_system,
    normal_scores,
    sparse_path,
    spike_and_slab,
    thompson,
)
from istanas.effects.sharing import RATIOS
from istanas.effects.sparse_fit import Criterion
from istanas.space import SearchSpace

POPULATION, SAMPLE = 20, 5  # Of regularised evolution.

Measure = Callable[[Architecture], float]
Fit = Callable[[SearchSpace, Sequence[Architecture], Sequence[float], int, Posterior | None], Posterior]


class Policy(Protocol):
    """How measurements are spent."""

    def __call__(
        self, space: SearchSpace, measure: Measure, at: Sequence[int], seed: int
    ) -> list[Architecture]:
        """Return the best architecture after each number of measurements in `at`, by what the policy knows then."""


def by_ridge(
    space: SearchSpace,
    done: Sequence[Architecture],
    losses: Sequence[float],
    seed: int,
    previous: Posterior | None = None,
    *,
    ratios: Sequence[float] = (0.0,),
) -> Posterior:
    """Return the ridge posterior, by default with independent effects."""
    return fit_effects(space, done, losses, [1] * len(done), n_draws=8, seed=seed, ratios=ratios)


by_sharing = partial(by_ridge, ratios=RATIOS)
"""The ridge posterior that shares effects between the places of an operation, as searches use it."""


def by_spike(
    space: SearchSpace,
    done: Sequence[Architecture],
    losses: Sequence[float],
    seed: int,
    previous: Posterior | None = None,
) -> Posterior:
    """Return the spike-and-slab posterior. Its chains continue those before the latest measurement."""
    system = system_of(space, done, losses)
    if previous is None:
        return spike_and_slab(system, 8, seed, sweeps=60)
    return spike_and_slab(system, 8, seed, sweeps=10, start=previous.draws)


def system_of(space: SearchSpace, done: Sequence[Architecture], losses: Sequence[float]) -> System:
    """Return the equations of the measurements by their normal scores."""
    return linear_system(coded(space, done), normal_scores(losses))


def best_by_effects(
    space: SearchSpace, done: Sequence[Architecture], losses: Sequence[float], fit: Fit, seed: int
) -> Architecture:
    """Return the architecture with the highest posterior mean."""
    return best_architecture(space, fit(space, done, losses, seed, None).mean)


def best_by_lasso(
    space: SearchSpace, done: Sequence[Architecture], losses: Sequence[float], *_: Any, criterion: Criterion
) -> Architecture:
    """Return the architecture with the largest entries of the code that a criterion chooses."""
    return best_architecture(space, sparse_path(system_of(space, done, losses), criterion).code)


def best_measured(
    space: SearchSpace, done: Sequence[Architecture], losses: Sequence[float], *_: Any
) -> Architecture:
    """Return the architecture with the smallest measured loss."""
    return done[int(np.argmin(losses))]


def random_architectures(space: SearchSpace, n: int, seed: int) -> list[Architecture]:
    """Return distinct architectures, drawn uniformly."""
    rng, drawn = np.random.default_rng(seed), dict[Architecture, None]()
    while len(drawn) < n:
        drawn[architecture(space, space.random_supports(int(rng.integers(2**31))))] = None
    return list(drawn)


def fixed(
    space: SearchSpace,
    measure: Measure,
    at: Sequence[int],
    seed: int,
    *,
    design: Callable[[SearchSpace, int, int], list[Architecture]],
    best: Callable[..., Architecture],
    fit: Fit | None = None,
) -> list[Architecture]:
    """Measure a design that does not depend on the losses."""
    done = design(space, at[-1], seed)
    losses = [measure(kept) for kept in done]
    return [best(space, done[:n], losses[:n], fit, seed) for n in at]


def adaptive(
    space: SearchSpace,
    measure: Measure,
    at: Sequence[int],
    seed: int,
    *,
    fit: Fit,
    first: int,
    places: int = 1,
) -> list[Architecture]:
    """Measure a balanced part, then by Thompson sampling, `places` at a time; the best is that of the effects."""
    done: list[Architecture] = []
    losses: list[float] = []
    found: list[Architecture] = []
    posterior: Posterior | None = None
    planned = deque(balanced_design(space, first, seed))
    while len(done) < at[-1]:
        if not planned:
            posterior = fit(space, done, losses, seed + len(done), posterior)
            planned.extend(thompson(space, posterior, places, seed + len(done), excluded=set(done)))
        done.append(planned.popleft())
        losses.append(measure(done[-1]))
        if len(done) in at:
            found.append(best_by_effects(space, done, losses, fit, seed))
    return found


def tpe(space: SearchSpace, measure: Measure, at: Sequence[int], seed: int) -> list[Architecture]:
    """Optuna's TPE with its defaults and a categorical choice for each decision; the best measured is kept."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    parts = layout(space).parts()
    done: list[Architecture] = []
    losses: list[float] = []
    for _ in range(at[-1]):
        trial = study.ask()
        kept = tuple(trial.suggest_categorical(str(i), range(p.start, p.stop)) for i, p in enumerate(parts))
        done.append(kept)
        losses.append(measure(kept))
        study.tell(trial, losses[-1])
    return [best_measured(space, done[:n], losses[:n]) for n in at]


def evolution(space: SearchSpace, measure: Measure, at: Sequence[int], seed: int) -> list[Architecture]:
    """Regularised evolution: the best of a sample has a child with one other candidate, and the oldest one dies.

    Source: Real et al., Regularized evolution for image classifier architecture search, AAAI 2019.
    """
    rng, flat = np.random.default_rng(seed), layout(space)
    done = random_architectures(space, POPULATION, seed)
    losses = [measure(kept) for kept in done]
    population = deque(range(POPULATION), maxlen=POPULATION)
    while len(done) < at[-1]:
        parent = min(rng.choice(population, SAMPLE, replace=False), key=lambda i: losses[i])
        child = list(done[parent])
        place = int(rng.integers(len(child)))
        part = flat.parts()[flat.decision[child[place]]]
        child[place] = int(rng.choice([c for c in range(part.start, part.stop) if c != child[place]]))
        population.append(len(done))
        done.append(tuple(child))
        losses.append(measure(done[-1]))
    return [best_measured(space, done[:n], losses[:n]) for n in at]


FIRST = 53  # A third of 160 measurements.

POLICIES: dict[str, Policy] = {
    "random, best measured": partial(fixed, design=random_architectures, best=best_measured),
    "random, lasso": partial(
        fixed, design=random_architectures, best=partial(best_by_lasso, criterion="aicc")
    ),
    "random, ridge": partial(fixed, design=random_architectures, best=best_by_effects, fit=by_ridge),
    "balanced, ridge": partial(fixed, design=balanced_design, best=best_by_effects, fit=by_ridge),
    "thompson, ridge": partial(adaptive, fit=by_ridge, first=FIRST),
    "thompson, spike": partial(adaptive, fit=by_spike, first=FIRST),
    "thompson, sharing": partial(adaptive, fit=by_sharing, first=FIRST),
    "thompson, sharing, first 20": partial(adaptive, fit=by_sharing, first=20),
    "thompson, ridge, first 20": partial(adaptive, fit=by_ridge, first=20),
    "thompson, ridge, 8 places": partial(adaptive, fit=by_ridge, first=FIRST, places=8),
    "evolution, best measured": evolution,
    "tpe, best measured": tpe,
}
"""All policies by name. Evolution and TPE choose one candidate of each decision."""
