"""Sparse coding, which both ISTA-NAS searches share: A, b and z of every decision, and the recovery of z from b.

`SparseCodingSearch` recovers codes from b, installs them in the supernet and reports them. `two_stage` and `one_stage`
add the algorithms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from istanas.nets import NodeCode, NodeState
from istanas.search.base import NodeReport, Place, Search
from istanas.search.limits import Excess
from istanas.settings import OneStageSettings, TwoStageSettings
from istanas.space import Decision, SearchSpace
from istanas.sparse import (
    RecoveryResult,
    cost_weights,
    initial_compressed_alphas,
    measurement_matrix,
    recover_certified,
    support_margin,
    top_support,
    truncation_error,
)
from istanas.sparse.lasso import Array
from istanas.training import derive_seed

FIRST_WEIGHT = 0.1  # of the costs, where an architecture exceeds a limit
LARGEST_WEIGHT = 1e6
WEIGHT_TOLERANCE = 0.01  # relative difference at which the bisection of the weight ends

Codes = dict[str, list[NodeCode]]
States = dict[str, list[NodeState]]
Settings = TypeVar("Settings", bound=TwoStageSettings | OneStageSettings)


@dataclass(frozen=True)
class Recovered:
    """A node's new code before it is installed."""

    place: Place
    code: NodeCode
    before: NodeCode | None
    result: RecoveryResult

    @property
    def distance(self) -> float:
        """||z_t - z_(t-1)||_2, or 0 at the first recovery."""
        if self.before is None:
            return 0.0
        return float((self.code.sparse_code - self.before.sparse_code).norm())


class SparseCodingSearch(Search[Settings]):
    """The sparse codes of a search, and their recovery. For the arguments see `Search`.

    The seed is that of the compressed alphas, which are initialised here.
    """

    @classmethod
    def alpha_size(cls, settings: Settings, decision: Decision) -> int:
        """Return m, the length of b."""
        return settings.n_measurements

    def begin_coding(self) -> None:
        """Draw b and the measurement matrices. There are no codes yet."""
        s = self.settings
        self.draw_alphas(self.seed)
        self._matrices = draw_matrices(self.supernet.space, s.n_measurements, s.matrix, s.matrix_seed)
        self.codes: Codes = {}
        self.cost_weight = s.cost_weight  # of the last recovery

    def cost_metrics(self) -> dict[str, float]:
        """Return the weight of the costs in the last recovery, if the search considers costs."""
        considers = self.settings.cost_weight > 0 or self.limits.exist
        return {"arch/cost_weight": self.cost_weight} if considers else {}

    def draw_alphas(self, seed: int, *attempt: int) -> None:
        """Draw every node's b."""
        s = self.settings
        with torch.no_grad():
            for cell, node in self.places:
                stream = derive_seed(seed, "alphas", cell, node, *attempt)
                b = initial_compressed_alphas(s.n_measurements, stream, s.alphas_scale)
                self.supernet.node_alphas(cell)[node].copy_(torch.as_tensor(b))

    def recover_codes(self, places: Sequence[Place]) -> list[Recovered]:
        """Recover new codes of these nodes from their b, with the configured weight of the costs."""
        if places:
            self.cost_weight = self.settings.cost_weight
        return self._recover_with(places, self.settings.cost_weight)

    def recover_within_limits(self, places: Sequence[Place]) -> list[Recovered]:
        """Recover new codes of these nodes whose architecture keeps the limits.

        If the configured weight mu of the costs does not keep them, mu is raised. It is doubled until they are kept,
        and then bisected, so that a value that is smaller by `WEIGHT_TOLERANCE` exceeds a limit. (The cost does not
        always fall with mu, so a still smaller value may keep the limits, too.) With many costs of 0 there may be no
        such mu, because a code needs other candidates to represent b. The codes of the largest mu are then kept, and
        candidates are exchanged for cheaper ones, see `Limits.within`.
        """
        recovered = self.recover_codes(places)
        if not places or self.excess(recovered) is None:
            return recovered
        low, high = self.cost_weight, max(2 * self.cost_weight, FIRST_WEIGHT)
        within = None
        while high <= LARGEST_WEIGHT:
            recovered = self._recover_with(places, high)
            if self.excess(recovered) is None:
                within = recovered
                break
            low, high = high, 2 * high
        if within is None:
            self.cost_weight = low
            return self._exchanged(recovered)
        while high - low > WEIGHT_TOLERANCE * high:
            middle = (low + high) / 2
            recovered = self._recover_with(places, middle)
            if self.excess(recovered) is None:
                within, high = recovered, middle
            else:
                low = middle
        self.cost_weight = high
        return within

    def excess(self, recovered: Sequence[Recovered]) -> Excess | None:
        """Return a limit that the architecture with these new codes exceeds, or `None`."""
        return self.limits.excess(self._supports_with(recovered))

    def _supports_with(self, recovered: Sequence[Recovered]) -> dict[str, list[tuple[int, ...]]]:
        """Return the architecture with these new codes, and the installed codes of the other nodes."""
        space = self.supernet.space
        supports = {cell: [code.support for code in codes] for cell, codes in self.codes.items()}
        if not supports:
            supports = {kind: [()] * len(each) for kind, each in space.decisions.items()}
        for new in recovered:
            cell, node = new.place
            supports[cell][node] = new.code.support
        return supports

    def _weights(self, cost_weight: float) -> dict[Place, Array] | None:
        """Return the weights of the l1 norm of each node; `None` for 1."""
        if cost_weight == 0:
            return None
        costs = self.limits.costs_in(self.settings.cost, total=False)
        weights = cost_weights([costs[cell][node] for cell, node in self.places], cost_weight)
        return dict(zip(self.places, weights, strict=True))

    def _exchanged(self, recovered: Sequence[Recovered]) -> list[Recovered]:
        """Exchange kept candidates of these nodes for cheaper ones until the limits are kept, see `Limits.within`.

        If other nodes are FROZEN, the result may still exceed a limit, and a one-stage search rejects it.
        """
        magnitudes: dict[str, list[list[float]]] = {
            kind: [[0.0] * d.n_candidates for d in each]
            for kind, each in self.supernet.space.decisions.items()
        }
        for new in recovered:
            cell, node = new.place
            magnitudes[cell][node] = new.code.sparse_code.abs().tolist()
        places = [new.place for new in recovered]
        kept = self.limits.within(self._supports_with(recovered), magnitudes, places)
        return [_with_support(new, kept[new.place[0]][new.place[1]]) for new in recovered]

    def _recover_with(self, places: Sequence[Place], cost_weight: float) -> list[Recovered]:
        """Recover new codes of these nodes with a weight of the costs, on rank 0 for all ranks."""
        decisions = self.supernet.space.decisions
        before = [self.codes[cell][node] if self.codes else None for cell, node in places]
        weights = self._weights(cost_weight)
        results = self.ranks.from_first(lambda: self._solve(places, before, weights))
        recovered = []
        for (cell, node), old, result in zip(places, before, results, strict=True):
            z = torch.as_tensor(result.z)
            decision = decisions[cell][node]
            support = tuple(int(i) for i in top_support(z, decision.sparsity, groups=decision.groups))
            code = NodeCode(self._matrices[cell][node], z, support)
            recovered.append(Recovered((cell, node), code, old, result))
        return recovered

    def _solve(
        self,
        places: Sequence[Place],
        before: Sequence[NodeCode | None],
        weights: Mapping[Place, Array] | None,
    ) -> list[RecoveryResult]:
        alphas = {kind: self.supernet.node_alphas(kind) for kind in self.supernet.space.kinds}
        return recover_certified(
            [self._matrices[cell][node] for cell, node in places],
            [alphas[cell][node].detach().double().cpu() for cell, node in places],
            l1_weight=self.settings.l1_weight,
            solver=self.settings.solver,
            supports=[None if old is None else old.sparse_code.nonzero().flatten().numpy() for old in before],
            costs=None if weights is None else [weights[place] for place in places],
            names=[f"{cell} node {node}" for cell, node in places],
        )

    def install(self, codes: Mapping[Place, NodeCode], states: States | None = None) -> None:
        """Make the operations of these codes active, and average the gradients of their parameters from now on.

        Raises:
            IstanasError: If the ranks have different architectures.
        """
        self.codes = {
            kind: [codes[c, n] for c, n in self.places if c == kind] for kind in self.supernet.space.kinds
        }
        self.supernet.install_codes(self.codes, states or self.supernet.node_states)
        self.ranks.check_same("genotype", self.supernet.genotype().digest())
        self._wrap()

    def _wrap(self) -> None:
        """Create the forward functions that average the gradients of the active parameters over the ranks."""
        raise NotImplementedError

    def codes_by_place(self) -> dict[Place, NodeCode]:
        """Return the installed codes."""
        return {(cell, node): self.codes[cell][node] for cell, node in self.places}

    def report(self, recovered: Sequence[Recovered]) -> list[NodeReport]:
        """Report the kept operations of recovered nodes, and the certificates of their new codes.

        The new codes need not be installed.
        """
        reports = []
        for new in recovered:
            cell, node = new.place
            kept = self.codes[cell][node].support
            reports.append(
                self._node_report(
                    new.place,
                    new.code,
                    distance=new.distance,
                    gap=float(new.result.gap),
                    changed=new.before is not None and new.before.support != kept,
                    converged=bool(new.result.converged),
                    solver=new.result.solver,
                    fallback=new.result.solver != self.settings.solver,
                    magnitudes=new.code.sparse_code.abs().tolist(),
                )
            )
        return reports

    def report_frozen(self, places: Sequence[Place]) -> list[NodeReport]:
        """Report the kept operations of FROZEN nodes."""
        return [
            self._node_report(
                (cell, node),
                self.codes[cell][node],
                distance=0.0,
                gap=0.0,
                changed=False,
                converged=True,
                recovered=False,
            )
            for cell, node in places
        ]

    def _node_report(self, place: Place, code: NodeCode, **figures: Any) -> NodeReport:
        cell, node = place
        decision = self.supernet.space.decisions[cell][node]
        with torch.no_grad():
            edge_weights = self.supernet.edge_weights()[cell][node].tolist()
        margin = support_margin(code.sparse_code, decision.sparsity, groups=decision.groups)
        return NodeReport(
            cell=cell,
            node=node,
            picks=self.describe_picks(place, self.codes[cell][node].support),
            edge_weights=edge_weights,
            truncation=float(truncation_error(code.sparse_code, list(code.support))),
            margin=margin if math.isfinite(margin) else None,
            state=self.supernet.node_states[cell][node].name,
            **figures,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which `load_state_dict` resumes the search bit for bit."""
        return {
            **super().state_dict(),
            "codes": codes_to_state(self.codes),
            "node_states": {c: [s.name for s in states] for c, states in self.supernet.node_states.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`.

        Raises:
            CheckpointError: If the state is of another kind or version.
        """
        super().load_state_dict(state)
        codes = codes_from_state(state["codes"])
        self._matrices = {
            kind: [node.measurement_matrix for node in codes[kind]] for kind in self.supernet.space.kinds
        }
        self.install(
            {(cell, node): codes[cell][node] for cell, node in self.places},
            {c: [NodeState[name] for name in names] for c, names in state["node_states"].items()},
        )


def _with_support(new: Recovered, support: Sequence[int]) -> Recovered:
    """Return a recovered code that keeps other candidates."""
    code = NodeCode(new.code.measurement_matrix, new.code.sparse_code, tuple(support))
    return replace(new, code=code)


def draw_matrices(space: SearchSpace, n_measurements: int, kind: str, seed: int) -> dict[str, list[Tensor]]:
    """Draw the measurement matrices A, for each decision an (m, candidates) float64 matrix.

    They have their own seed, so that the same matrices can be used with other weights and pictures.

    Args:
        space: The search space.
        n_measurements: m, >= 1.
        kind: As in `measurement_matrix`.
        seed: Any integer >= 0.

    Example:
        >>> from istanas.space import CellSpace
        >>> [tuple(A.shape) for A in draw_matrices(CellSpace(), 7, "uniform", 0)["normal"]]
        [(7, 14), (7, 21), (7, 28), (7, 35)]
    """
    return {
        each: [
            torch.as_tensor(
                measurement_matrix(
                    kind,
                    n_measurements,
                    decision.n_candidates,
                    derive_seed(seed, "measurement", each, decision.index),
                )
            )
            for decision in decisions
        ]
        for each, decisions in space.decisions.items()
    }


def codes_to_state(codes: Codes) -> dict[str, list[dict[str, Any]]]:
    """Convert codes to plain containers and tensors, which `torch.load` reads with `weights_only=True`."""
    return {
        kind: [
            {"A": node.measurement_matrix, "z": node.sparse_code, "support": list(node.support)}
            for node in each
        ]
        for kind, each in codes.items()
    }


def codes_from_state(state: Mapping[str, list[dict[str, Any]]]) -> Codes:
    """Convert plain containers and tensors to codes, the inverse of `codes_to_state`."""
    return {
        kind: [NodeCode(n["A"], n["z"], tuple(n["support"])) for n in nodes] for kind, nodes in state.items()
    }
