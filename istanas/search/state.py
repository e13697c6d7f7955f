"""What both searches hold and must survive a crash: A, b, z, node states, optimisers, epochs; and how codes change.

`SearchState` recovers codes from b, installs them in the supernet, reports them, and turns itself into plain
tensors and back; `two_stage` and `one_stage` are the algorithms on top.

Generators need no place here: all randomness of an epoch follows from (seed, purpose, epoch), see
`istanas.training.derive_seed`; and the learning rate follows from the epoch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from istanas.distributed import Ranks
from istanas.errors import CheckpointError
from istanas.nets import NodeCode, NodeState, Supernet
from istanas.settings import SearchSettings
from istanas.space import CELLS, CellSpace
from istanas.sparse import (
    RecoveryResult,
    initial_compressed_alphas,
    measurement_matrix,
    recover_certified,
    support_margin,
    top_support,
    truncation_error,
)
from istanas.training import Compute, derive_seed

Codes = dict[str, list[NodeCode]]
States = dict[str, list[NodeState]]
Place = tuple[str, int]  # (cell, node)
STATE_VERSION = 2


@dataclass(frozen=True)
class NodeReport:
    """One node after a recovery: what it keeps and how sure that is.

    Distance, gap, truncation and margin are of the code that was recovered now; of a FROZEN node, which is recovered
    no more, the first two are 0.
    """

    cell: str
    node: int
    picks: list[str]  # "op<-state"
    edge_weights: list[float]
    distance: float  # ||z_t - z_(t-1)||_2, to the last accepted code
    gap: float  # relative duality gap, an upper bound that includes rounding
    truncation: float  # ||z - z_S||_2
    changed: bool  # whether the kept set changed
    converged: bool
    recovered: bool = True  # False: it was FROZEN before
    state: str = NodeState.ACTIVE.name  # after the recovery
    # |z| of every candidate, in the order of `CellSpace.candidate`; of a node that was not recovered, none
    magnitudes: list[float] = field(default_factory=list)
    solver: str = ""  # whose code it is; of a node that was not recovered, none
    fallback: bool = False  # whether the solver that was asked for had failed on it
    margin: float | None = None  # of the recovered code, see `support_margin`; None: nothing is left out


@dataclass(frozen=True)
class RecoveryReport:
    """All nodes after a recovery, and why it was rejected if it was (one-stage search only)."""

    nodes: list[NodeReport]
    rejection: str | None = None

    def metrics(self) -> dict[str, float]:
        """The figures of an epoch, by their names in MLflow.

        Over the recovered nodes: the smallest margin, the largest of the others, and the number of changes.
        """
        nodes = [n for n in self.nodes if n.recovered]
        if not nodes:
            return {}
        fallbacks = sum(n.fallback for n in nodes)
        margins = [n.margin for n in nodes if n.margin is not None]
        return {
            **({"recovery/fallbacks": float(fallbacks)} if fallbacks else {}),
            "recovery/gap": max(n.gap for n in nodes),
            "recovery/truncation": max(n.truncation for n in nodes),
            **({"recovery/margin": min(margins)} if margins else {}),
            "recovery/distance": max(n.distance for n in nodes),
            "recovery/support_changes": float(sum(n.changed for n in nodes)),
        }


@dataclass(frozen=True)
class Recovered:
    """A node's new code, not yet installed."""

    place: Place
    code: NodeCode
    before: NodeCode | None
    result: RecoveryResult

    @property
    def distance(self) -> float:
        """||z_t - z_(t-1)||_2; 0 at the first recovery."""
        if self.before is None:
            return 0.0
        return float((self.code.sparse_code - self.before.sparse_code).norm())


class SearchState:
    """What a search holds, and the recovery of its codes.

    Args:
        supernet: on its device; its compressed alphas are initialised here.
        settings: of the search.
        compute: device and precision.
        seed: of the compressed alphas.
        ranks: who searches with this process; None: nobody. All make the same calls, each with its share of
            every batch, and hold the same network and codes after each.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        supernet: Supernet,
        settings: SearchSettings,
        compute: Compute,
        seed: int,
        ranks: Ranks | None,
    ) -> None:
        self.supernet = supernet
        self.ranks = ranks or Ranks()
        self.compute = compute
        self.epoch = 0  # epochs done
        self.places: list[Place] = [(c, n) for c in CELLS for n in range(supernet.space.n_nodes)]
        self.weights = supernet.weights()
        self.alphas = supernet.alphas()
        self._coding = settings
        self.draw_alphas(seed)
        fused = compute.device.type == "cuda"
        self.weight_optimizer = torch.optim.SGD(
            self.weights,
            settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=fused,
        )
        self.alpha_optimizer = torch.optim.Adam(
            self.alphas,
            settings.arch_lr,
            betas=settings.arch_betas,
            weight_decay=settings.arch_weight_decay,
            fused=fused,
        )
        self._matrices = draw_matrices(
            supernet.space, settings.n_measurements, settings.matrix, settings.matrix_seed
        )
        self.codes: Codes = {}

    def draw_alphas(self, seed: int, *attempt: int) -> None:
        """Draw every node's b."""
        s = self._coding
        with torch.no_grad():
            for cell, node in self.places:
                stream = derive_seed(seed, "alphas", cell, node, *attempt)
                b = initial_compressed_alphas(s.n_measurements, stream, s.alphas_scale)
                self.supernet.node_alphas(cell)[node].copy_(torch.as_tensor(b))

    def recover_codes(self, places: Sequence[Place]) -> list[Recovered]:
        """New codes of these nodes, each from its b: recovered by rank 0, for all."""
        space = self.supernet.space
        before = [self.codes[cell][node] if self.codes else None for cell, node in places]
        results = self.ranks.from_first(lambda: self._solve(places, before))  # its SolverError, too
        recovered = []
        for (cell, node), old, result in zip(places, before, results, strict=True):
            z = torch.as_tensor(result.z)
            support = tuple(int(i) for i in top_support(z, space.sparsity, groups=space.edge_groups(node)))
            code = NodeCode(self._matrices[cell][node], z, support)
            recovered.append(Recovered((cell, node), code, old, result))
        return recovered

    def _solve(self, places: Sequence[Place], before: Sequence[NodeCode | None]) -> list[RecoveryResult]:
        alphas = {cell: self.supernet.node_alphas(cell) for cell in CELLS}
        return recover_certified(
            [self._matrices[cell][node] for cell, node in places],
            [alphas[cell][node].detach().double().cpu() for cell, node in places],
            l1_weight=self._coding.l1_weight,
            solver=self._coding.solver,
            supports=[None if old is None else old.sparse_code.nonzero().flatten().numpy() for old in before],
            names=[f"{cell} node {node}" for cell, node in places],
        )

    def install(self, codes: Mapping[Place, NodeCode], states: States | None = None) -> None:
        """Make the codes' operations the active ones, on every rank the same.

        What is active has changed, so gradients are averaged over other parameters from here on.

        Raises:
            IstanasError: if the ranks hold different architectures.
        """
        self.codes = {cell: [codes[c, n] for c, n in self.places if c == cell] for cell in CELLS}
        self.supernet.install_codes(self.codes, states or self.supernet.node_states)
        self.ranks.check_same("genotype", self.supernet.genotype().digest())
        self._wrap()

    def _wrap(self) -> None:
        """Make the forward functions whose gradients are averaged over what is active now."""
        raise NotImplementedError

    def codes_by_place(self) -> dict[Place, NodeCode]:
        """The installed codes."""
        return {(cell, node): self.codes[cell][node] for cell, node in self.places}

    def report(self, recovered: Sequence[Recovered]) -> list[NodeReport]:
        """What the recovered nodes keep now, and the certificates of their new codes (installed or not)."""
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
                    fallback=new.result.solver != self._coding.solver,
                    magnitudes=new.code.sparse_code.abs().tolist(),
                )
            )
        return reports

    def report_resting(self, places: Sequence[Place]) -> list[NodeReport]:
        """What FROZEN nodes keep."""
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
        space = self.supernet.space
        with torch.no_grad():
            edge_weights = self.supernet.edge_weights()[cell][node].tolist()
        margin = support_margin(code.sparse_code, space.sparsity, groups=space.edge_groups(node))
        return NodeReport(
            cell=cell,
            node=node,
            picks=[f"{space.ops[op]}<-{s}" for s, op in map(space.split, self.codes[cell][node].support)],
            edge_weights=edge_weights,
            truncation=float(truncation_error(code.sparse_code, list(code.support))),
            margin=margin if math.isfinite(margin) else None,
            state=self.supernet.node_states[cell][node].name,
            **figures,
        )

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on bit for bit."""
        return {
            "kind": self.kind,
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "supernet": self.supernet.state_dict(),
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
            "codes": codes_to_state(self.codes),
            "node_states": {c: [s.name for s in states] for c, states in self.supernet.node_states.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            CheckpointError: for a checkpoint of another kind or version.
        """
        check_state_version(state, self.kind)
        self.supernet.load_state_dict(state["supernet"])
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])
        self.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
        codes = codes_from_state(state["codes"])
        self._matrices = {cell: [node.measurement_matrix for node in codes[cell]] for cell in CELLS}
        self.epoch = int(state["epoch"])
        self.install(
            {(cell, node): codes[cell][node] for cell, node in self.places},
            {c: [NodeState[name] for name in names] for c, names in state["node_states"].items()},
        )


def draw_matrices(space: CellSpace, n_measurements: int, kind: str, seed: int) -> dict[str, list[Tensor]]:
    """The measurement matrices A of both cells, one a node, (m, candidates of the node) float64.

    They have a seed of their own, so that the same matrices can be used with other weights and pictures.

    Example:
        >>> [tuple(A.shape) for A in draw_matrices(CellSpace(), 7, "uniform", 0)["normal"]]
        [(7, 14), (7, 21), (7, 28), (7, 35)]
    """
    return {
        cell: [
            torch.as_tensor(
                measurement_matrix(
                    kind,
                    n_measurements,
                    space.n_candidates(node),
                    derive_seed(seed, "measurement", cell, node),
                )
            )
            for node in range(space.n_nodes)
        ]
        for cell in CELLS
    }


def codes_to_state(codes: Codes) -> dict[str, list[dict[str, Any]]]:
    """Codes as plain containers and tensors (loadable with `weights_only=True`)."""
    return {
        cell: [
            {"A": node.measurement_matrix, "z": node.sparse_code, "support": list(node.support)}
            for node in codes[cell]
        ]
        for cell in CELLS
    }


def codes_from_state(state: Mapping[str, list[dict[str, Any]]]) -> Codes:
    """Inverse of `codes_to_state`."""
    return {cell: [NodeCode(n["A"], n["z"], tuple(n["support"])) for n in state[cell]] for cell in CELLS}


def check_state_version(state: Mapping[str, Any], kind: str) -> None:
    """Refuse a checkpoint of another kind or version.

    Raises:
        CheckpointError: naming both.
    """
    found = (state.get("kind"), state.get("version"))
    if found != (kind, STATE_VERSION):
        raise CheckpointError(
            f"checkpoint holds {found[0]!r} version {found[1]!r}: this job needs {kind!r} version {STATE_VERSION}, "
            "use another run directory or --fresh"
        )
