"""Searches in which all candidates are mixed: a softmax over the operations of each edge gives the edge weights.

`darts` and `pc_darts` derive their searches from `SoftmaxSearch`. The network that is trained has all candidates, while
`genotype` is the architecture that the top-2 rule keeps: in general, the `sparsity` strongest edges of each decision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from istanas.search.alternating import AlternatingSearch
from istanas.search.base import RecoveryReport
from istanas.search.limits import CandidateCosts
from istanas.search.selection import strongest_supports
from istanas.settings import AlternatingSettings, CostSettings
from istanas.space import Decision, Genotype
from istanas.training import derive_seed

Settings = TypeVar("Settings", bound=AlternatingSettings)
Strengths = dict[str, list[Tensor]]
"""For each kind the strengths of each decision's candidates, float64 on the CPU."""

ALPHAS_SCALE = 1e-3
"""Standard deviation of the initial alphas, as published for DARTS and PC-DARTS."""


@dataclass(frozen=True)
class Edges:
    """The edges of all decisions of one kind, numbered one decision after another.

    Args:
        sizes: Number of candidates of each decision.
        edge_of: The edge of each candidate, int64 (candidates,).
        candidates: Whether a candidate lies on an edge, bool (edges, candidates).
        decisions: Whether an edge belongs to a decision, bool (decisions, edges).
    """

    sizes: list[int]
    edge_of: Tensor
    candidates: Tensor
    decisions: Tensor

    @classmethod
    def of(cls, decisions: Sequence[Decision], device: torch.device) -> Edges:
        """Return the edges of these decisions."""
        owners = [(d.index, edge) for d in decisions for edge in sorted(set(d.edges))]
        edge_of = torch.tensor(
            [owners.index((d.index, edge)) for d in decisions for edge in d.edges], device=device
        )
        decision_of = torch.tensor([index for index, _ in owners], device=device)
        return cls(
            [d.n_candidates for d in decisions],
            edge_of,
            edge_of == torch.arange(len(owners), device=device)[:, None],
            decision_of == torch.arange(len(decisions), device=device)[:, None],
        )


def grouped_softmax(values: Tensor, groups: Tensor) -> Tensor:
    """Return the softmax within each group: exp(v_i) / sum of exp(v_j) over the group of i.

    Args:
        values: (n,).
        groups: Whether a value belongs to a group, bool (groups, n). Each value belongs to exactly one.

    Returns:
        (n,), differentiable in `values`. The values of a group are at least 0 and add up to 1.

    Example:
        >>> groups = torch.tensor([[True, True, False], [False, False, True]])
        >>> grouped_softmax(torch.tensor([0.0, 0.0, 5.0]), groups).tolist()
        [0.5, 0.5, 1.0]
    """
    return values.expand(groups.shape).masked_fill(~groups, -torch.inf).softmax(1).sum(0)


class CostPenalty:
    """The penalty of the alphas for the expected cost of the candidates.

        mu sum_e sum_o p_(e,o) cost_(e,o) / sum_e mean_o cost_(e,o),    p_e = softmax(alpha_e),

    over the edges e and the operations o on them: mu times the expected cost, in units of that of equal probabilities.

    Args:
        decisions: The decisions of each kind.
        costs: The costs of their candidates, summed over the cells.
        weight: mu >= 0.
        device: The device of the alphas.

    Source:
        Cai, Zhu, Han, ProxylessNAS, ICLR 2019, section 3.3 (the expected latency as a differentiable penalty).
    """

    def __init__(
        self,
        decisions: Mapping[str, Sequence[Decision]],
        costs: CandidateCosts,
        weight: float,
        device: torch.device,
    ) -> None:
        self._edges = {kind: Edges.of(each, device) for kind, each in decisions.items()}
        flat = {
            kind: torch.as_tensor(np.concatenate(costs[kind]), dtype=torch.float64, device=device)
            for kind in decisions
        }
        equal = sum(
            float((flat[kind] * edges.candidates / edges.candidates.sum(1, keepdim=True)).sum())
            for kind, edges in self._edges.items()
        )
        self._weight, self._costs = weight, {kind: each / (equal or 1.0) for kind, each in flat.items()}

    def expected(self, alphas: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """Return the expected cost, in units of that of equal probabilities; differentiable, float64."""
        total = torch.zeros((), dtype=torch.float64, device=next(iter(self._costs.values())).device)
        for kind, edges in self._edges.items():
            values = torch.cat([a[:n] for a, n in zip(alphas[kind], edges.sizes, strict=True)])
            total = total + (grouped_softmax(values.double(), edges.candidates) * self._costs[kind]).sum()
        return total

    def add_gradients(self, alphas: Mapping[str, Sequence[Tensor]]) -> None:
        """Add the gradient of the penalty to that of the alphas."""
        if self._weight == 0:
            return
        trained = [b for each in alphas.values() for b in each if b.requires_grad]
        with torch.enable_grad():
            gradients = torch.autograd.grad(self._weight * self.expected(alphas), trained)
        for b, gradient in zip(trained, gradients, strict=True):
            b.grad = gradient if b.grad is None else b.grad + gradient


class SoftmaxSearch(AlternatingSearch[Settings]):
    """A search that trains the network of all candidates. For the arguments see `Search`.

    Attributes:
        edges: The edges of each kind.
        supports: For each kind the candidates that the top-2 rule keeps.
    """

    def begin(self) -> RecoveryReport:
        """Prepare the search, and report its decisions before any training."""
        decisions = self.supernet.space.decisions
        self.edges = {kind: Edges.of(each, self.compute.device) for kind, each in decisions.items()}
        self.limits.check()
        self._penalty = cost_penalty(self)
        self._draw_alphas()
        everything = {kind: [tuple(range(d.n_candidates)) for d in each] for kind, each in decisions.items()}
        self.supernet.install(everything, self.weigh)
        self._wrap()
        return self._choose(None)

    def _draw_alphas(self) -> None:
        """Draw the alphas of every decision from a normal distribution."""
        with torch.no_grad():
            for kind, index in self.places:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, "alphas", kind, index))
                alphas = self.supernet.node_alphas(kind)[index]
                drawn = torch.randn(len(alphas), generator=generator, dtype=torch.float64)
                alphas.copy_(ALPHAS_SCALE * drawn)

    # ---------- the formula

    def probabilities(self, kind: str, alphas: Sequence[Tensor]) -> Tensor:
        """Return the softmax over the operations of each edge, for the candidates of all decisions of a kind."""
        edges = self.edges[kind]
        candidates = [a[:n] for a, n in zip(alphas, edges.sizes, strict=True)]
        return grouped_softmax(torch.cat(candidates), edges.candidates)

    def weigh(self, kind: str, alphas: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the edge weights of all candidates of each decision of a kind. By default they are the softmax."""
        return torch.split(self.probabilities(kind, alphas), self.edges[kind].sizes)

    def before_alpha_update(self) -> None:
        """Add the gradient of the expected cost."""
        if self._penalty is not None:
            self._penalty.add_gradients(alphas_of(self))

    # ---------- the end of an epoch

    def genotype(self) -> Genotype:
        """Return the architecture that the top-2 rule has kept at the end of the last epoch."""
        return self.supernet.space.genotype(self.supports)

    def finish_epoch(self) -> RecoveryReport:
        """Apply the top-2 rule to the edge weights, and report how far they have moved.

        Raises:
            IstanasError: If the ranks have different architectures.
        """
        report = self._choose(self._strengths)
        # The forward functions are created again for each epoch, because torch reorders their gradient buckets after
        # the first step. A resumed search begins with new ones, and must add gradients in the same order.
        self._wrap()
        return report

    def _choose(self, before: Strengths | None) -> RecoveryReport:
        """Apply the top-2 rule, and report each decision, compared with its strengths of the last epoch."""
        old = None if before is None else self.supports
        with torch.no_grad():
            weights = self.supernet.edge_weights()
        self._set_strengths({kind: [w.double().cpu() for w in each] for kind, each in weights.items()})
        self.ranks.check_same("genotype", self.genotype().digest())
        nodes = []
        for kind, index in self.places:
            strengths, kept = self._strengths[kind][index], self.supports[kind][index]
            nodes.append(
                self.uncertified_report(
                    (kind, index),
                    kept,
                    strengths[list(kept)].tolist(),
                    distance=0.0 if before is None else float((strengths - before[kind][index]).norm()),
                    changed=old is not None and old[kind][index] != kept,
                    magnitudes=strengths.tolist(),
                )
            )
        return RecoveryReport(nodes, certified=False)

    def _set_strengths(self, strengths: Strengths) -> None:
        self._strengths = strengths
        strongest = strongest_supports(self.supernet.space.decisions, strengths)
        self.supports = self.limits.within(strongest, strengths)

    def metrics(self) -> dict[str, float]:
        """Return the mean entropy of the softmax over the edges, in nats."""
        entropies = []
        with torch.no_grad():
            for kind, edges in self.edges.items():
                p = self.probabilities(kind, self.supernet.node_alphas(kind)).double()
                entropies.append((torch.special.entr(p) * edges.candidates).sum(1))
        return {"arch/entropy": float(torch.cat(entropies).mean()), **cost_metrics(self, self._penalty)}

    # ---------- the state

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which `load_state_dict` resumes the search bit for bit."""
        return {**super().state_dict(), "strengths": self._strengths}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`.

        Raises:
            CheckpointError: If the state is of another kind or version.
        """
        super().load_state_dict(state)
        self._set_strengths({kind: [s.cpu() for s in each] for kind, each in state["strengths"].items()})
        self._wrap()


def cost_penalty(search: AlternatingSearch[Any]) -> CostPenalty | None:
    """Return the penalty of a search; `None` if its settings ignore the costs."""
    s = search.settings
    if not isinstance(s, CostSettings) or s.cost_weight == 0:  # A plugin's settings may know no costs.
        return None
    decisions, costs = search.supernet.space.decisions, search.limits.costs_in(s.cost, total=True)
    return CostPenalty(decisions, costs, s.cost_weight, search.alphas[0].device)


def alphas_of(search: AlternatingSearch[Any]) -> dict[str, Sequence[Tensor]]:
    """Return the alphas of each kind."""
    return {kind: search.supernet.node_alphas(kind) for kind in search.supernet.space.kinds}


def cost_metrics(search: AlternatingSearch[Any], penalty: CostPenalty | None) -> dict[str, float]:
    """Return the expected cost, in units of that of equal probabilities, if the search considers it."""
    if penalty is None:
        return {}
    with torch.no_grad():
        return {"arch/expected_cost": float(penalty.expected(alphas_of(search)))}
