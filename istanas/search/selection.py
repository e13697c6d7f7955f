"""The choice of the kept candidates of a decision from the strengths of its operations."""

from __future__ import annotations

from collections.abc import Sequence

from istanas.space import Decision
from istanas.space.operations import NONE


def strongest(decision: Decision, strengths: Sequence[float]) -> tuple[int, ...]:
    """Return the candidates that the top-2 rule keeps, in ascending order.

    These are the `sparsity` edges whose strongest operation is strongest, each with that operation. The operation
    `none` does not count. If too few edges are left, the next strongest candidates follow, `none` at the end.

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
