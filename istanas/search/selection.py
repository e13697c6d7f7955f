"""The choice of the kept candidates of a decision from the strengths of its operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from istanas.space import Decision
from istanas.space.operations import NONE

if TYPE_CHECKING:
    from torch import Tensor


def strongest(decision: Decision, strengths: Sequence[float]) -> tuple[int, ...]:
    """Return the candidates that the top-2 rule keeps, in ascending order.

    Each edge is represented by its strongest operation other than `none`, and the `sparsity` edges with the strongest
    representatives are kept. If there are fewer edges, the next strongest candidates follow; `none` comes last.

    Args:
        decision: The decision.
        strengths: The strength of each candidate. Of equal ones, the first is kept.

    Example:
        >>> ops = [(op, state) for state in (0, 1, 2) for op in ("none", "skip", "conv")]
        >>> strongest(Decision("cell", 1, tuple(ops), 2), [0.8, 0.1, 0.1, 0.2, 0.3, 0.5, 0.0, 0.6, 0.4])
        (5, 7)

    Source:
        Liu et al., DARTS: Differentiable Architecture Search, ICLR 2019, section 2.4.
    """

    def is_none(candidate: int) -> bool:
        return decision.candidates[candidate][0] == NONE

    best: dict[int, int] = {}  # the strongest candidate of each edge, strongest first
    others: list[int] = []
    for c in sorted(range(decision.n_candidates), key=lambda c: (is_none(c), -strengths[c])):
        if best.setdefault(decision.edges[c], c) != c and not decision.one_per_edge:
            others.append(c)
    ranked = sorted([*best.values(), *others], key=is_none)
    return tuple(sorted(ranked[: decision.sparsity]))


def strongest_supports(
    decisions: Mapping[str, Sequence[Decision]], strengths: Mapping[str, Sequence[Tensor]]
) -> dict[str, list[tuple[int, ...]]]:
    """Return the candidates that `strongest` keeps, for each kind those of each decision.

    Args:
        decisions: The decisions of each kind.
        strengths: For each kind the strengths of each decision's candidates.
    """
    return {
        kind: [strongest(d, s.tolist()) for d, s in zip(each, strengths[kind], strict=True)]
        for kind, each in decisions.items()
    }
