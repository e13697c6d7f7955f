"""The state that both searches share and that checkpoints store: A, b, z, node states, optimisers and epochs.

`SearchState` recovers codes from b, installs them in the supernet, reports them, and converts itself to plain tensors
and back. `two_stage` and `one_stage` add the algorithms.

The state has no random generators, because all randomness of an epoch is derived from (seed, purpose, epoch), see
`istanas.training.derive_seed`. It has no learning rate either, because that is a function of the epoch.
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
Place = tuple[str, int]  # (cell, node).
STATE_VERSION = 2


@dataclass(frozen=True)
class NodeReport:
    """One node after a recovery: its kept operations and the certificate of its code.

    Args:
        cell: "normal" or "reduce".
        node: Index of the node in its cell, >= 0.
        picks: The kept operations, each as "op<-state".
        edge_weights: Their edge weights.
        distance: ||z_t - z_(t-1)||_2 to the last accepted code, >= 0; 0 if the node was not recovered.
        gap: Relative duality gap, >= 0, an upper bound that includes rounding; 0 if the node was not recovered.
        truncation: ||z - z_S||_2, >= 0.
        changed: Whether the kept operations changed.
        converged: Whether the code is certified.
        recovered: Whether the node was recovered. Nodes that were already FROZEN are not.
        state: Name of the node's state after the recovery.
        magnitudes: |z| of every candidate, in the order of `CellSpace.candidate`; empty if the node was not recovered.
        solver: The solver that found the code; empty if the node was not recovered.
        fallback: Whether the requested solver failed on the node, so that another one found the code.
        margin: `support_margin` of the code; `None` if no other candidate could be kept.
    """

    cell: str
    node: int
    picks: list[str]
    edge_weights: list[float]
    distance: float
    gap: float
    truncation: float
    changed: bool
    converged: bool
    recovered: bool = True
    state: str = NodeState.ACTIVE.name
    magnitudes: list[float] = field(default_factory=list)
    solver: str = ""
    fallback: bool = False
    margin: float | None = None


@dataclass(frozen=True)
class RecoveryReport:
    """All nodes after a recovery.

    Args:
        nodes: The reports of the nodes of both cells.
        rejection: Why the new architecture was rejected, or `None` if it was accepted (one-stage search only).
    """

    nodes: list[NodeReport]
    rejection: str | None = None

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the epoch by their names in MLflow.

        Over the recovered nodes, they give the smallest margin, the numbers of changes and fallbacks, and the largest
        values of the gap, the truncation and the distance.
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


class SearchState:
    """The state of a search, and the recovery of its codes.

    Args:
        supernet: The network, on its device. Its compressed alphas are initialised here.
        settings: Hyperparameters of the search.
        compute: Device and precision.
        seed: Seed of the compressed alphas.
        ranks: The processes that search together; `None` means only this one. All make the same calls, each with its
            share of every batch, and have the same network and codes after each call.
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
        self.epoch = 0  # Number of completed epochs.
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
        """Recover new codes of these nodes from their b, on rank 0 for all ranks."""
        space = self.supernet.space
        before = [self.codes[cell][node] if self.codes else None for cell, node in places]
        results = self.ranks.from_first(lambda: self._solve(places, before))
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
        """Make the operations of these codes active, and average the gradients of their parameters from now on.

        Raises:
            IstanasError: If the ranks have different architectures.
        """
        self.codes = {cell: [codes[c, n] for c, n in self.places if c == cell] for cell in CELLS}
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
                    fallback=new.result.solver != self._coding.solver,
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
        """Return the state from which `load_state_dict` resumes the search bit for bit."""
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
        """Restore the state of `state_dict`.

        Raises:
            CheckpointError: If the state is of another kind or version.
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
    """Draw the measurement matrices A of both cells, for each node an (m, candidates of the node) float64 matrix.

    They have their own seed, so that the same matrices can be used with other weights and pictures.

    Args:
        space: The search space of a cell.
        n_measurements: m, >= 1.
        kind: As in `measurement_matrix`.
        seed: Any integer >= 0.

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
    """Convert codes to plain containers and tensors, which `torch.load` reads with `weights_only=True`."""
    return {
        cell: [
            {"A": node.measurement_matrix, "z": node.sparse_code, "support": list(node.support)}
            for node in codes[cell]
        ]
        for cell in CELLS
    }


def codes_from_state(state: Mapping[str, list[dict[str, Any]]]) -> Codes:
    """Convert plain containers and tensors to codes, the inverse of `codes_to_state`."""
    return {cell: [NodeCode(n["A"], n["z"], tuple(n["support"])) for n in state[cell]] for cell in CELLS}


def check_state_version(state: Mapping[str, Any], kind: str) -> None:
    """Check the kind and the version of a state.

    Raises:
        CheckpointError: If the state is of another kind or version.
    """
    found = (state.get("kind"), state.get("version"))
    if found != (kind, STATE_VERSION):
        raise CheckpointError(
            f"{found[0]!r} version {found[1]!r} is not {kind!r} version {STATE_VERSION}, which this job needs",
            field="checkpoint",
            remedy="use another run directory or --fresh",
        )
