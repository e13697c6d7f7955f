"""Choices from the posterior: what to measure next, which architecture is best, and how sure that is."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

import numpy as np
import numpy.typing as npt

from istanas.effects.budget import Budget, relaxed
from istanas.effects.coding import Architecture, Array, Layout, coded, heaviest, layout
from istanas.effects.posterior import Posterior
from istanas.errors import ConfigError
from istanas.space.base import SearchSpace

_MOST_RANKED = 100_000  # Architectures that `best_architecture` looks at before it gives up.
_MOST_COMPARED = 2_000  # Architectures that it looks at to find a better one within a budget.


def ranked_architectures(space: SearchSpace, effects: Array) -> Iterator[Architecture]:
    """Yield all architectures in descending order of their score under the additive model.

    The best one keeps, in each decision, the candidates with the largest effects, at most one of an edge where the
    space requires it. The others follow by a best-first search: after an architecture, all architectures that differ
    from it in one kept candidate are put into a queue.

    This is exact. The supports of a decision are the bases of a matroid (a uniform one, or a truncated partition
    matroid with `one_per_edge`), and a basis that is not the heaviest has an exchange of one element by which it does
    not become lighter and comes closer to the heaviest. So every architecture is reached from one that is yielded
    before it.

    Args:
        space: The search space.
        effects: Effects of all candidates, (N,).

    Example:
        >>> from istanas.space import NasBench201Space
        >>> effects = np.tile([0.0, 0.1, 0.2, 3.0, 0.4], 6)
        >>> next(ranked_architectures(NasBench201Space(), effects))
        (3, 8, 13, 18, 23, 28)

    Source: Edmonds, Matroids and the greedy algorithm, 1971; Lawler, Management Science 1972 (k best solutions).
    """
    numbering = layout(space)
    start: Architecture = tuple(heaviest(numbering, effects).tolist())
    queue = [(-float(effects[list(start)].sum()), start)]
    seen = {start}
    while queue:
        _, kept = heapq.heappop(queue)
        yield kept
        for other in _exchanges(numbering, kept):
            if other not in seen:
                seen.add(other)
                heapq.heappush(queue, (-float(effects[list(other)].sum()), other))


def best_architecture(
    space: SearchSpace,
    effects: Array,
    *,
    excluded: Collection[Architecture] = (),
    budget: Budget | None = None,
) -> Architecture:
    """Return the architecture with the highest score that is within a budget and not excluded.

    With a budget, architectures are ranked by their score minus a price of their costs, see `relaxed`, which bounds the
    score of all further ones within the budget. The ranking ends when the bound is not above the best score so far. The
    result is therefore exact, unless this takes more than 2,000 architectures; then it is the best one of these.

    Args:
        space: The search space.
        effects: Effects of all candidates, (N,).
        excluded: Architectures that must not be returned.
        budget: The limits of its costs; `None` for none.

    Raises:
        ConfigError: If there is none among the first 100,000.

    Example:
        >>> from istanas.space import NasBench201Space
        >>> effects = np.tile([0.0, 0.1, 0.2, 3.0, 0.4], 6)
        >>> effects[3] = 2.9
        >>> best_architecture(NasBench201Space(), effects, excluded={(3, 8, 13, 18, 23, 28)})
        (4, 8, 13, 18, 23, 28)
        >>> budget = Budget(np.tile([0.0, 0.0, 1.0, 9.0, 0.0], (1, 6)), np.array([10.0]))
        >>> best_architecture(NasBench201Space(), effects, budget=budget)  # one 3x3 convolution, else pooling
        (4, 8, 14, 19, 24, 29)
    """
    price, cost, limit = 0.0, np.zeros(len(effects)), 0.0
    if budget is not None:
        prices, _ = relaxed(space, effects[None], budget)
        price, (cost, limit) = float(prices[0]), budget.joint
    weighted = effects - price * cost
    best, score = None, -np.inf
    for number, kept in enumerate(islice(ranked_architectures(space, weighted), _MOST_RANKED)):
        own = float(effects[list(kept)].sum())
        if own > score and kept not in excluded and (budget is None or budget.allows(kept)):
            best, score = kept, own
        bound = float(weighted[list(kept)].sum()) + price * limit
        if best is not None and (score >= bound - 1e-12 or number >= _MOST_COMPARED):
            return best
    if best is not None:
        return best
    raise ConfigError(
        f"no other architecture of {space.name} is left or allowed",
        field="measurements",
        remedy="measure fewer",
    )


def count_within(space: SearchSpace, budget: Budget, most: int) -> int:
    """Return the number of architectures within a budget, or `most` if there are more.

    Args:
        space: The search space.
        budget: The limits. The condition `allowed` is ignored.
        most: The largest number that is of interest, >= 0.

    Example:
        >>> from istanas.space import NasBench201Space
        >>> budget = Budget(np.tile([0.0, 0.0, 1.0, 9.0, 1.0], (1, 6)), np.array([1.0]))
        >>> count_within(NasBench201Space(), budget, 1000)  # 2^6, and 12 x 2^5 with one candidate of cost 1
        448
    """
    cost, limit = budget.joint
    unconditional = Budget(budget.costs, budget.most)
    cheap = takewhile(
        lambda kept: cost[list(kept)].sum() <= limit + 1e-9,
        islice(ranked_architectures(space, -cost), _MOST_RANKED),
    )
    return sum(1 for _ in islice(filter(unconditional.allows, cheap), most))


def thompson(
    space: SearchSpace,
    posterior: Posterior,
    n: int,
    seed: int,
    *,
    excluded: Collection[Architecture] = (),
    budget: Budget | None = None,
) -> list[Architecture]:
    """Return what to measure next by Thompson sampling: for each free place the best architecture of one draw.

    An architecture is thus measured with the probability that it is the best one of those not excluded. Draws for
    several places are independent, so that they differ as far as the posterior is undecided, and no place waits for
    another one. Pending measurements are excluded like finished ones. They change no mean, and a draw is random anyway,
    so that the regret of asynchronous Thompson sampling is that of the sequential one up to a term for the number of
    places.

    Args:
        space: The search space.
        posterior: The posterior of the effects.
        n: Number of free places, 1 to the number of draws.
        seed: An integer >= 0, different for each call.
        excluded: Architectures that are measured or pending at this fidelity.
        budget: As in `best_architecture`.

    Raises:
        ConfigError: If n is out of range, or as in `best_architecture`.

    Example:
        >>> from istanas.effects import System, coded, ridge
        >>> from istanas.space import NasBench201Space
        >>> space = NasBench201Space()
        >>> rows = coded(space, [(0, 5, 10, 15, 20, 25), (3, 8, 13, 18, 23, 28)])
        >>> posterior = ridge(System(rows - rows.mean(0), np.array([-1.0, 1.0])), 10, seed=0)
        >>> len(set(thompson(space, posterior, 4, seed=0)))
        4

    Source: Thompson, Biometrika 1933; Kandasamy et al., Parallelised Bayesian optimisation via Thompson sampling,
        AISTATS 2018.
    """
    if not 1 <= n <= len(posterior.draws):
        raise ConfigError(
            f"{n} places and {len(posterior.draws)} draws", field="n", remedy="use 1 to the number of draws"
        )
    rng = np.random.Generator(np.random.PCG64(seed))
    chosen: list[Architecture] = []
    for index in rng.permutation(len(posterior.draws))[:n]:  # The first is the same for every n.
        taken = {*excluded, *chosen}
        chosen.append(best_architecture(space, posterior.draws[index], excluded=taken, budget=budget))
    return chosen


def probability_best(space: SearchSpace, posterior: Posterior, considered: Sequence[Architecture]) -> Array:
    """Return the probability that each architecture is the best of those considered, by the draws, (C,).

    Equal scores of a draw share it. The standard error is at most 1 / (2 sqrt(S)) for S draws.

    Args:
        space: The search space.
        posterior: The posterior of the effects.
        considered: Different architectures, at least one.

    Returns:
        Probabilities, which sum to 1.

    Example:
        >>> from istanas.effects import System, coded, ridge
        >>> from istanas.space import NasBench201Space
        >>> space, pair = NasBench201Space(), [(0, 5, 10, 15, 20, 25), (3, 8, 13, 18, 23, 28)]
        >>> rows = coded(space, pair * 10)
        >>> posterior = ridge(System(rows - rows.mean(0), np.tile([-1.0, 1.0], 10)), 100, seed=0)
        >>> probability_best(space, posterior, pair).tolist()
        [0.0, 1.0]
    """
    values = posterior.draws @ coded(space, considered).T
    best = values >= values.max(1, keepdims=True)
    return np.asarray((best / best.sum(1, keepdims=True)).mean(0))


@dataclass(frozen=True)
class Improvement:
    """What the search can still gain over an architecture.

    Args:
        probability: Probability that some architecture is better by more than a margin.
        expected: Expected score of the best architecture minus that of this one, >= 0.
    """

    probability: float
    expected: float


def improvement(
    space: SearchSpace,
    posterior: Posterior,
    incumbent: Architecture,
    *,
    margin: float = 0.0,
    budget: Budget | None = None,
) -> Improvement:
    """Return the probability of an improvement over an architecture, and the expected one.

    Each draw compares the incumbent with the draw's own best architecture, see `best_of_draws`. The expected
    improvement is the expected value of perfect information: no further measurement can be worth more. A search stops
    early when the probability falls below a setting.

    Args:
        space: The search space.
        posterior: The posterior of the effects.
        incumbent: The architecture that would be the result now.
        margin: Smallest improvement of the score that counts, >= 0.
        budget: As in `best_of_draws`.

    Example:
        >>> from istanas.effects import System, coded, ridge
        >>> from istanas.space import NasBench201Space
        >>> space, pair = NasBench201Space(), [(0, 5, 10, 15, 20, 25), (3, 8, 13, 18, 23, 28)]
        >>> rows = coded(space, pair * 10)
        >>> posterior = ridge(System(rows - rows.mean(0), np.tile([-1.0, 1.0], 10)), 100, seed=0)
        >>> improvement(space, posterior, pair[0]).probability
        1.0
    """
    draws = posterior.draws
    best = best_of_draws(space, posterior, budget)
    gains = np.take_along_axis(draws, best, 1).sum(1) - draws[:, list(incumbent)].sum(1)
    # A difference of rounding is no improvement.
    return Improvement(float((gains > margin + 1e-12).mean()), float(np.maximum(gains, 0.0).mean()))


def best_of_draws(
    space: SearchSpace, posterior: Posterior, budget: Budget | None = None
) -> npt.NDArray[np.int64]:
    """Return the best architecture of each draw, as its kept candidates in ascending order, (S, kept).

    With a budget, it is that of a Lagrangian relaxation, which is within the budget and may be slightly worse than the
    best one, see `relaxed`.

    Args:
        space: The search space.
        posterior: The posterior of the effects.
        budget: The limits of the architectures' costs; `None` for none.

    Example:
        >>> from istanas.effects import System, coded, ridge
        >>> from istanas.space import NasBench201Space
        >>> space, pair = NasBench201Space(), [(0, 5, 10, 15, 20, 25), (3, 8, 13, 18, 23, 28)]
        >>> rows = coded(space, pair * 10)
        >>> posterior = ridge(System(rows - rows.mean(0), np.tile([-1.0, 1.0], 10)), 100, seed=0)
        >>> best_of_draws(space, posterior).shape
        (100, 6)
    """
    if budget is None:
        return heaviest(layout(space), posterior.draws)
    return relaxed(space, posterior.draws, budget)[1]


def kept_probabilities(space: SearchSpace, posterior: Posterior, budget: Budget | None = None) -> Array:
    """Return the probability of each candidate that the best architecture keeps it, by the draws, (N,).

    In a decision that keeps one candidate, it is the probability that the candidate is the best one. The probabilities
    of a decision sum to the number of candidates that it keeps.

    Args:
        space: The search space.
        posterior: The posterior of the effects.
        budget: As in `best_of_draws`.

    Example:
        >>> from istanas.effects import System, coded, ridge
        >>> from istanas.space import NasBench201Space
        >>> space, pair = NasBench201Space(), [(0, 5, 10, 15, 20, 25), (3, 8, 13, 18, 23, 28)]
        >>> rows = coded(space, pair * 10)
        >>> posterior = ridge(System(rows - rows.mean(0), np.tile([-1.0, 1.0], 10)), 100, seed=0)
        >>> kept_probabilities(space, posterior).reshape(6, 5).sum(1).round(6).tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    best, n = best_of_draws(space, posterior, budget), layout(space).n_candidates
    return np.asarray(np.bincount(best.ravel(), minlength=n) / len(best))


def choice_probabilities(
    space: SearchSpace, posterior: Posterior, chosen: Architecture, budget: Budget | None = None
) -> Array:
    """Return the probability of each decision that the best architecture keeps the same candidates in it, (D,).

    The standard error is at most 1 / (2 sqrt(S)) for S draws.

    Args:
        space: The search space.
        posterior: The posterior of the effects.
        chosen: The architecture whose choices are judged.
        budget: As in `best_of_draws`.

    Example:
        >>> from istanas.effects import System, coded, ridge
        >>> from istanas.space import NasBench201Space
        >>> space, pair = NasBench201Space(), [(0, 5, 10, 15, 20, 25), (3, 8, 13, 18, 23, 28)]
        >>> rows = coded(space, pair * 10)
        >>> posterior = ridge(System(rows - rows.mean(0), np.tile([-1.0, 1.0], 10)), 100, seed=0)
        >>> bool(choice_probabilities(space, posterior, pair[0]).max() < 0.1)
        True
    """
    equal = best_of_draws(space, posterior, budget) == np.array(chosen)
    sizes = [decision.sparsity for decision in layout(space).decisions]
    starts = np.cumsum([0, *sizes[:-1]])
    return np.asarray(np.logical_and.reduceat(equal, starts, axis=1).mean(0))


def _exchanges(numbering: Layout, kept: Architecture) -> Iterator[Architecture]:
    """Yield all architectures that differ in one kept candidate."""
    parts, edges = numbering.parts(), {int(numbering.edge[c]) for c in kept}
    for out in kept:
        part = parts[numbering.decision[out]]
        for new in range(part.start, part.stop):
            own = int(numbering.edge[new])
            if new not in kept and (own not in edges or own == numbering.edge[out]):
                yield tuple(sorted((*(c for c in kept if c != out), new)))
