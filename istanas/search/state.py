"""What a recovery leaves and a checkpoint keeps of it: matrices, codes, and the reports of an epoch.

The rest of what must survive a crash (weights, compressed alphas, optimisers, epoch) is gathered by the
`state_dict` of the search.

Generators need no place here: all randomness of an epoch follows from (seed, purpose, epoch), see
`istanas.training.derive_seed`; and the learning rate follows from the epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from istanas.errors import CheckpointError
from istanas.nets import NodeCode
from istanas.space import CELLS, CellSpace
from istanas.sparse import measurement_matrix
from istanas.training import derive_seed

Codes = dict[str, list[NodeCode]]
STATE_VERSION = 1


@dataclass(frozen=True)
class NodeReport:
    """One node after a recovery: what it keeps and how sure that is."""

    cell: str
    node: int
    picks: list[str]  # "op<-state"
    edge_weights: list[float]
    distance: float  # ||z_t - z_(t-1)||_2
    gap: float  # relative duality gap
    truncation: float  # ||z - z_S||_2
    changed: bool  # whether the kept set changed
    converged: bool


@dataclass(frozen=True)
class RecoveryReport:
    """All nodes after a recovery."""

    nodes: list[NodeReport]

    def metrics(self) -> dict[str, float]:
        """The figures of an epoch, by their names in MLflow (largest over the nodes; changes are counted)."""
        return {
            "recovery/gap": max(n.gap for n in self.nodes),
            "recovery/truncation": max(n.truncation for n in self.nodes),
            "recovery/distance": max(n.distance for n in self.nodes),
            "recovery/support_changes": float(sum(n.changed for n in self.nodes)),
        }

    def to_rows(self) -> list[dict[str, Any]]:
        """One plain dict a node."""
        return [asdict(node) for node in self.nodes]


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
