"""The choice of the kept candidates of a decision from the strengths of its operations."""

from __future__ import annotations

from collections.abc import Sequence

from istanas.nets.networks import Support
from istanas.space import Decision


def strongest(probabilities: Sequence[float], decision: Decision) -> Support:
    """Return the candidates that a decision keeps: on the edges with the strongest operations, one operation each.

    Each edge offers its operation of the largest probability, and the `sparsity` edges whose offers are largest are
    kept. If there are fewer edges, the largest of the other candidates are kept, too. Of equal probabilities, the one
    with the smallest index counts as larger.

    Args:
        probabilities: The probability of each candidate, in the order of `Decision.candidates`. On each edge they sum
            to 1.
        decision: The decision.

    Returns:
        The kept candidates in ascending order.

    Example:
        >>> edges = Decision("normal", 0, (("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)), sparsity=2)
        >>> strongest([0.6, 0.4, 0.1, 0.9, 0.3, 0.7], edges)
        (3, 5)

    Source:
        Liu et al., DARTS, ICLR 2019, section 2.4, for edges from different nodes.
    """
    order = sorted(range(decision.n_candidates), key=lambda c: (-float(probabilities[c]), c))
    offers: dict[int, int] = {}
    for candidate in order:
        offers.setdefault(decision.edges[candidate], candidate)
    first = list(offers.values())  # in the order of their probabilities
    rest = [candidate for candidate in order if candidate not in first]
    return tuple(sorted([*first, *rest][: decision.sparsity]))
