"""Balanced designs: architectures in which all candidates of a decision occur equally often.

The variance of an estimated effect falls with the number of measurements in which its candidate occurs, and the
estimates of two decisions are uncorrelated if all pairs of their candidates occur equally often (an orthogonal array
of strength 2). Random architectures have neither property at the sizes of a search.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from istanas.effects.budget import Budget, relaxed
from istanas.effects.choice import best_architecture
from istanas.effects.coding import Architecture, Layout, layout
from istanas.errors import ConfigError
from istanas.space.base import SearchSpace

_TRIES = 20  # Rows that are drawn to find one that is not in the design yet.


def balanced_design(
    space: SearchSpace, n: int, seed: int, budget: Budget | None = None
) -> list[Architecture]:
    """Return architectures in which the candidates of each decision occur equally often.

    Every row takes, in each decision, those candidates that occurred least often. Among equals it takes the one whose
    pairs with the candidates that are already in the row occurred least often. Therefore, after *every* row, and not
    only after the last one, the numbers of two candidates of a decision differ by at most 1, and the measurements may
    begin with any prefix. With `one_per_edge` this holds if the edges of a decision have equally many candidates; else
    the difference is as small as the edges allow. Pairs are as even as this greedy rule makes them.

    With a budget, a row that exceeds it is replaced by one of the least frequent candidates within the budget, by
    Lagrangian relaxation (`relaxed`). Cheap candidates then occur more often than expensive ones.

    Args:
        space: The search space.
        n: Number of architectures, >= 1. They are distinct, unless balance requires a repetition: a decision of 4
            candidates that is alone in its space has no more than 4 architectures.
        seed: An integer >= 0. Equal seeds give equal designs, and the first rows do not depend on n.
        budget: The limits of the architectures' costs; `None` for none.

    Raises:
        ConfigError: If n < 1, or no architecture is within the budget.

    Example:
        >>> from istanas.effects.coding import incidence
        >>> from istanas.space import NasBench201Space
        >>> design = balanced_design(NasBench201Space(), 10, seed=0)
        >>> incidence(NasBench201Space(), design).sum(0)[:5]
        array([2., 2., 2., 2., 2.])

    Source: McKay, Beckman, Conover, Technometrics 1979 (Latin hypercubes); Rao, 1947 (orthogonal arrays).
    """
    if n < 1:
        raise ConfigError(f"{n} architectures are no design", field="n", remedy="use 1 or more")
    numbering, rng = layout(space), np.random.Generator(np.random.PCG64(seed))
    pairs = np.zeros(
        (numbering.n_candidates, numbering.n_candidates)
    )  # How often both occur; the diagonal counts candidates.
    design: list[Architecture] = []
    for _ in range(n):
        for _ in range(1 + _TRIES):
            row = _balanced_row(numbering, pairs, rng)
            if budget is not None and not budget.allows(row):
                rarity = rng.random(numbering.n_candidates) - pairs.diagonal()
                row = tuple(relaxed(space, rarity[None], budget)[1][0].tolist())
            if row not in design:
                break
        if budget is not None and not budget.allows(row):  # by its further condition
            row = best_architecture(space, -pairs.diagonal(), budget=budget)
        design.append(row)
        pairs[np.ix_(row, row)] += 1.0
    return design


def _balanced_row(
    numbering: Layout, pairs: npt.NDArray[np.float64], rng: np.random.Generator
) -> Architecture:
    """Return an architecture of the least frequent candidates, whose pairs occurred as rarely as possible."""
    count = pairs.diagonal()
    load = np.bincount(numbering.edge, weights=count, minlength=numbering.n_candidates)[numbering.edge]
    row: list[int] = []
    parts = numbering.parts()
    for index in rng.permutation(len(parts)):
        part, free = parts[index], np.ones(parts[index].stop - parts[index].start, dtype=bool)
        for _ in range(numbering.decisions[index].sparsity):
            own = np.arange(part.start, part.stop)[free]
            pairs_before = pairs[own][:, row].sum(1)
            # The last key is the first to sort by. Ties are broken by how often the edge occurred, so that edges
            # occur equally often where one candidate of each may be kept.
            best = own[np.lexsort((rng.random(len(own)), pairs_before, load[own], count[own]))[0]]
            row.append(int(best))
            free &= numbering.edge[part] != numbering.edge[best]
    return tuple(sorted(row))
