"""Architectures as rows of a measurement matrix: which candidates of the decisions of a space they keep.

The candidates of all decisions are numbered consecutively, in the order of the decisions: these are the N unknowns of
the model. An architecture keeps `sparsity` candidates of each decision.

The model is additive, score = offset + sum of the effects of the kept candidates. A constant that is added to all
effects of a decision moves the offset only, so the effects of a decision are defined as deviations from their mean:
they sum to zero. There are two codings of this. A basis of contrasts (treatment, Helmert, deviation) has K - 1 columns
for K candidates, but it treats the candidates differently, so that a LASSO or a prior on its coefficients depends on
the order of the candidates. This module uses the over-complete coding, one column for each candidate, with

    x_c = 1 - s / K if the candidate c is kept, else -s / K    (s candidates are kept of K),

that is, the rows of zeros and ones times the projection I - 1 1^T / K of each decision. All candidates are alike. The
sum of the columns of a decision is 0, hence X z does not depend on the mean of z within a decision, and `sum_to_zero`
changes no prediction. A ridge prior has its mean exactly at zero sum. The LASSO chooses, among all codes with the same
predictions, the one with the smallest l1 norm, whose *median* in each decision is 0: most candidates are typical, and
few stand out, which is the sparse description. `sum_to_zero` then turns the code into deviations from the mean.

Source: Scheffe, The Analysis of Variance, 1959 (side conditions); Kruschke, Doing Bayesian Data Analysis, 2015,
chapter 19 (over-parametrised deflections and their sum-to-zero form).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from istanas.errors import ConfigError
from istanas.space.base import Decision, SearchSpace, Supports

Array: TypeAlias = npt.NDArray[np.float64]
Architecture: TypeAlias = tuple[int, ...]
"""The kept candidates of all decisions, numbered consecutively, in ascending order."""


class Layout(NamedTuple):
    """The candidates of a space, numbered consecutively.

    Args:
        decisions: The decisions in order.
        first: Number of the first candidate of each decision, and at the end the number N of candidates.
        decision: The decision of each candidate, (N,).
        edge: The edge of each candidate where at most one of an edge may be kept, else a number of its own, (N,).
        share: The share s / K of candidates that its decision keeps, (N,).
    """

    decisions: tuple[Decision, ...]
    first: tuple[int, ...]
    decision: npt.NDArray[np.int64]
    edge: npt.NDArray[np.int64]
    share: Array

    @property
    def n_candidates(self) -> int:
        """Number N of candidates, which is the number of unknowns."""
        return self.first[-1]

    def parts(self) -> list[slice]:
        """Return the candidates of each decision as a slice."""
        return [slice(start, stop) for start, stop in zip(self.first, self.first[1:], strict=False)]


@lru_cache(maxsize=16)
def layout(space: SearchSpace) -> Layout:
    """Return how the candidates of a space are numbered.

    Example:
        >>> from istanas.space import CellSpace, NasBench201Space
        >>> layout(NasBench201Space()).first
        (0, 5, 10, 15, 20, 25, 30)
        >>> layout(CellSpace()).n_candidates
        196
    """
    decisions = tuple(space.all_decisions())
    first = (0, *np.cumsum([d.n_candidates for d in decisions]).tolist())
    decision = np.repeat(np.arange(len(decisions)), [d.n_candidates for d in decisions])
    share = np.repeat([d.sparsity / d.n_candidates for d in decisions], [d.n_candidates for d in decisions])
    return Layout(decisions, first, decision.astype(np.int64), _numbered_through(decisions), share)


def architecture(space: SearchSpace, supports: Supports) -> Architecture:
    """Return the kept candidates of all decisions, numbered consecutively.

    Args:
        space: The search space.
        supports: For each kind the kept candidates of each decision.

    Raises:
        ConfigError: If the supports are not those of an architecture of the space.

    Example:
        >>> from istanas.space import NasBench201Space
        >>> architecture(NasBench201Space(), {"cell": [[3], [0], [1], [2], [3], [4]]})
        (3, 5, 11, 17, 23, 29)
    """
    numbering = layout(space)
    chosen = [support for kind in space.kinds for support in supports.get(kind, ())]
    if len(chosen) != len(numbering.decisions):
        raise ConfigError(
            f"{len(chosen)} decisions, and the space {space.name} has {len(numbering.decisions)}",
            field="supports",
            remedy="give the kept candidates of every decision",
        )
    kept: list[int] = []
    for decision, start, support in zip(numbering.decisions, numbering.first, chosen, strict=False):
        own = sorted({int(c) for c in support})
        edges = {decision.edges[c] for c in own if 0 <= c < decision.n_candidates}
        in_range = all(0 <= c < decision.n_candidates for c in own)
        apart = not decision.one_per_edge or len(edges) == len(own)
        if not (in_range and apart and len(own) == len(support) == decision.sparsity):
            raise ConfigError(
                f"{list(support)} are not candidates that {decision.kind} {decision.index} can keep",
                field="supports",
                remedy=f"give {decision.sparsity} of the candidates 0 to {decision.n_candidates - 1}"
                + (", on different edges" if decision.one_per_edge else ""),
            )
        kept += [start + c for c in own]
    return tuple(kept)


def supports_of(space: SearchSpace, kept: Architecture) -> dict[str, list[tuple[int, ...]]]:
    """Return the kept candidates of each decision, the inverse of `architecture`.

    Example:
        >>> from istanas.space import NasBench201Space
        >>> supports_of(NasBench201Space(), (3, 5, 11, 17, 23, 29))
        {'cell': [(3,), (0,), (1,), (2,), (3,), (4,)]}
    """
    numbering = layout(space)
    supports: dict[str, list[tuple[int, ...]]] = {kind: [] for kind in space.kinds}
    for decision, part in zip(numbering.decisions, numbering.parts(), strict=True):
        supports[decision.kind].append(tuple(c - part.start for c in kept if part.start <= c < part.stop))
    return supports


def incidence(space: SearchSpace, architectures: Sequence[Architecture]) -> Array:
    """Return which candidates the architectures keep, as zeros and ones, (M, N).

    Example:
        >>> from istanas.space import NasBench201Space
        >>> incidence(NasBench201Space(("none", "skip_connect")), [(1, 2, 4, 6, 8, 10)])[0, :4]
        array([0., 1., 1., 0.])
    """
    rows = np.zeros((len(architectures), layout(space).n_candidates))
    for row, kept in zip(rows, architectures, strict=True):
        row[list(kept)] = 1.0
    return rows


def coded(space: SearchSpace, architectures: Sequence[Architecture]) -> Array:
    """Return the rows of the model, 1 - s / K for the kept candidates of a decision and -s / K for the others, (M, N).

    Each decision's entries of a row sum to 0.

    Example:
        >>> from istanas.space import NasBench201Space
        >>> coded(NasBench201Space(("none", "skip_connect")), [(1, 2, 4, 6, 8, 10)])[0, :4]
        array([-0.5,  0.5,  0.5, -0.5])
    """
    return incidence(space, architectures) - layout(space).share


def sum_to_zero(space: SearchSpace, effects: Array) -> Array:
    """Return effects as deviations from the mean of their decision; `coded` rows times them stay the same.

    Args:
        space: The search space.
        effects: Effects of all candidates, (..., N).

    Example:
        >>> from istanas.space import NasBench201Space
        >>> sum_to_zero(NasBench201Space(("none", "skip_connect")), np.arange(12.0))[:4]
        array([-0.5,  0.5, -0.5,  0.5])
    """
    centred = np.array(effects, dtype=np.float64)
    for part in layout(space).parts():
        centred[..., part] -= centred[..., part].mean(-1, keepdims=True)
    return centred


def heaviest(numbering: Layout, effects: Array) -> npt.NDArray[np.int64]:
    """Return the architecture with the largest effects; of equal effects, candidates with lower numbers.

    Args:
        numbering: The candidates of the space.
        effects: Effects of all candidates, (..., N).

    Returns:
        The kept candidates in ascending order, (..., kept).
    """
    kept = []
    for decision, part in zip(numbering.decisions, numbering.parts(), strict=True):
        left = np.array(effects[..., part], dtype=np.float64)
        edge = numbering.edge[part]
        own = []
        for _ in range(decision.sparsity):
            best = left.argmax(-1)
            own.append(best)
            left[edge == edge[best][..., None]] = -np.inf
        kept.append(part.start + np.sort(np.stack(own, -1), -1))
    return np.concatenate(kept, -1)


def _numbered_through(decisions: Sequence[Decision]) -> npt.NDArray[np.int64]:
    """Return the edge of every candidate; without the constraint of one per edge, each candidate has its own edge."""
    numbers: list[int] = []
    for decision in decisions:
        start = len(numbers)
        numbers += [
            start + (decision.edges.index(edge) if decision.one_per_edge else c)
            for c, edge in enumerate(decision.edges)
        ]
    return np.array(numbers, dtype=np.int64)
