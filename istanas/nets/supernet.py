"""`Supernet`, the network of the search, which computes only the operations that the sparse codes keep.

Its parameters are the weights of all candidates and the compressed parameters b of all nodes. In every epoch,
`install_codes` installs the recovered codes, which define the active operations. The others take part in neither the
forward pass nor the backward pass nor the optimiser step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from istanas.errors import ConfigError
from istanas.nets.operations import make_operation
from istanas.nets.pixel_phases import SharedReads
from istanas.nets.skeleton import (
    AuxiliaryHead,
    CellNetwork,
    CellPlace,
    Stem,
    auxiliary_position,
    cell_places,
    check_sizes,
    live_inputs,
    live_states,
    make_preprocess,
)
from istanas.nets.target import apply_operation, drop_path, sum_terms
from istanas.space import CELLS, N_CELL_INPUTS, CellSpace, Genotype, genotype_from_supports

Support = tuple[int, ...]


class NodeState(Enum):
    """Whether the search still changes a node.

    The code of an ACTIVE node is recovered from its b in every epoch. The b, the code and the edge weights of a FROZEN
    node are fixed (one-stage search only).
    """

    ACTIVE = "active"
    FROZEN = "frozen"


@dataclass(frozen=True)
class NodeCode:
    """The code of one node.

    Args:
        measurement_matrix: A, (m, n) float64.
        sparse_code: z, (n,) float64, before its truncation to the support.
        support: The kept candidates in ascending order.
    """

    measurement_matrix: Tensor
    sparse_code: Tensor
    support: Support


@dataclass(frozen=True)
class _KeptColumns:
    """The constants in the edge weights of a cell, float64 on b's device, so that steps need not copy them."""

    columns: Tensor  # A_S, (nodes, m, s).
    codes: Tensor  # z_S, (nodes, s).
    measured: Tensor  # A_S z_S, (nodes, m).


def _kept_columns(nodes: Sequence[NodeCode], like: Tensor) -> _KeptColumns:
    supports = [list(node.support) for node in nodes]
    columns = torch.stack([n.measurement_matrix[:, S] for n, S in zip(nodes, supports, strict=True)])
    codes = torch.stack([n.sparse_code[S] for n, S in zip(nodes, supports, strict=True)])
    # They are rounded to the network's precision, which is that of b. Only a float64 network has exact values.
    columns, codes = (t.to(like.device, like.dtype).double() for t in (columns, codes))
    return _KeptColumns(columns, codes, torch.einsum("nms,ns->nm", columns, codes))


class SearchCell(nn.Module):
    """A cell with every candidate operation on every edge: `ops[edge][op]`."""

    def __init__(self, space: CellSpace, place: CellPlace, op_batchnorm: bool) -> None:
        super().__init__()
        self.kind = place.kind
        self.n_nodes = space.n_nodes
        # In a two-stage search the edge weight is the scale, and batch norms have no affine part. In a one-stage search
        # the affine parts of an operation are trained only after its node has frozen (see `train_affine`).
        affine = op_batchnorm
        self.preprocess0, self.preprocess1 = make_preprocess(place, affine)
        self.ops = nn.ModuleList(
            nn.ModuleList(
                make_operation(
                    op,
                    place.channels,
                    place.stride if state < N_CELL_INPUTS else 1,
                    affine=affine,
                    batchnorm=True,
                    identity_batchnorm=op_batchnorm,
                )
                for op in space.ops
            )
            for node in range(space.n_nodes)
            for state in range(space.n_node_edges(node))
        )

    def forward(
        self,
        s0: Tensor | None,
        s1: Tensor | None,
        live: Collection[int],
        plan: Plan,
        weights: Tensor,
        drop_path_prob: float,
    ) -> Tensor:
        states = live_inputs((self.preprocess0, self.preprocess1), (s0, s1), live)
        reads = SharedReads(states)
        for i, (node, alphas) in enumerate(zip(plan, weights, strict=True)):
            terms = []
            for (state, edge, op), alpha in zip(node, alphas.unbind(), strict=True):
                operation: nn.Module = self.ops[edge][op]  # type: ignore[index]
                out = apply_operation(operation, states, reads, state, alpha)
                terms.append(drop_path(out, operation, drop_path_prob))
            states[N_CELL_INPUTS + i] = sum_terms(terms)
        return torch.cat([states[N_CELL_INPUTS + i] for i in range(self.n_nodes)], dim=1)

    def train_affine(self, states: Sequence[NodeState]) -> None:
        """Train the affine parts of all batch norms in the operations of FROZEN nodes, and no others.

        As published, this includes the batch norm in the middle of a separable convolution.
        """
        edge = 0
        for node, state in enumerate(states):
            for _ in range(N_CELL_INPUTS + node):
                for norm in self.ops[edge].modules():
                    if isinstance(norm, nn.BatchNorm2d) and norm.affine:
                        norm.weight.requires_grad_(state is NodeState.FROZEN)
                        norm.bias.requires_grad_(state is NodeState.FROZEN)
                edge += 1


Plan = list[list[tuple[int, int, int]]]  # For each node the active (state, edge of the cell, op).
EdgeWeights = dict[str, Tensor]  # For each cell the weights (nodes, s) of the active operations.


class Supernet(CellNetwork):
    """The network of a search.

    Args:
        space: The search space of a cell.
        init_channels: Channels of the first cells, >= 1 (published two-stage search: 16).
        layers: Number of cells, >= 1 (published two-stage search: 8).
        num_classes: Number of classes, >= 1.
        n_measurements: m, the number of rows of A and the length of each b, >= 1 (published: 7).
        stem: "cifar" (one convolution) or "imagenet" (three of stride 2).
        in_channels: Channels of the pictures, >= 1.
        op_batchnorm: Whether every candidate ends in batch norm with an affine part, as one-stage search requires.
        auxiliary: Whether the network has an auxiliary head, which is used only in training (one-stage search).

    Raises:
        ConfigError: If a size is too small or the stem is unknown.

    Example:
        >>> net = Supernet(CellSpace(n_nodes=2), init_channels=2, layers=2, num_classes=10)
        >>> net.compressed_alphas["normal"][0].shape
        torch.Size([7])

    Source:
        Yang et al., ISTA-NAS, NeurIPS 2020, section 3.
    """

    def __init__(
        self,
        space: CellSpace,
        init_channels: int,
        layers: int,
        num_classes: int,
        *,
        n_measurements: int = 7,
        stem: str = "cifar",
        in_channels: int = 3,
        op_batchnorm: bool = False,
        auxiliary: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, in_channels=in_channels, n_measurements=n_measurements)
        self.space = space
        # The arguments of a `TargetNet` of the same size, except genotype and auxiliary.
        self.arguments: dict[str, Any] = {
            "init_channels": init_channels,
            "layers": layers,
            "num_classes": num_classes,
            "stem": stem,
            "op_batchnorm": op_batchnorm,
            "in_channels": in_channels,
        }
        self.drop_path_prob = 0.0
        places = cell_places(init_channels, layers, stem, dict.fromkeys(CELLS, space.n_nodes))
        self.stem = Stem(stem, in_channels, init_channels)
        self.cells = nn.ModuleList(SearchCell(space, place, op_batchnorm) for place in places)
        widths = [space.n_nodes * place.channels for place in places]
        self.auxiliary_head = (
            AuxiliaryHead(stem, widths[auxiliary_position(layers)], num_classes) if auxiliary else None
        )
        self.classifier = nn.Linear(widths[-1], num_classes)
        # One parameter per node, so that optimiser steps and all-reduce leave out the b of a frozen node.
        self.compressed_alphas = nn.ModuleDict(
            {
                cell: nn.ParameterList(
                    [nn.Parameter(torch.zeros(n_measurements)) for _ in range(space.n_nodes)]
                )
                for cell in CELLS
            }
        )
        self.node_states = {cell: [NodeState.ACTIVE] * space.n_nodes for cell in CELLS}
        self._codes: dict[str, list[NodeCode]] = {}
        self._kept: dict[str, _KeptColumns] = {}
        self._plans: dict[str, Plan] = {}
        self._states: dict[str, frozenset[int]] = {}
        self._active_alphas: Sequence[nn.Parameter] = ()

    def weights(self) -> list[nn.Parameter]:
        """Return all parameters except the compressed alphas. SGD trains them."""
        alphas = {id(b) for b in self.alphas()}
        return [p for p in self.parameters() if id(p) not in alphas]

    def alphas(self) -> list[nn.Parameter]:
        """Return the compressed alphas b, (m,) each, of the normal and the reduction cell. Adam trains them."""
        return [b for cell in CELLS for b in self.node_alphas(cell)]

    def node_alphas(self, cell: str) -> list[nn.Parameter]:
        """Return the compressed alphas of one cell's nodes."""
        return list(self.compressed_alphas[cell].parameters())

    def install_codes(
        self,
        codes: Mapping[str, Sequence[NodeCode]],
        states: Mapping[str, Sequence[NodeState]] | None = None,
    ) -> None:
        """Make the kept candidates active until the next call.

        Args:
            codes: For "normal" and "reduce", one `NodeCode` per node.
            states: For "normal" and "reduce", one state per node; `None` makes all nodes ACTIVE. The b of a FROZEN node
                is not trained, but the affine parts of the batch norms in its operations are.

        Raises:
            ConfigError: If the number of codes or of kept candidates does not match the space.
        """
        for cell in CELLS:
            if len(codes[cell]) != self.space.n_nodes:
                raise ConfigError(
                    f"{len(codes[cell])} codes for the {self.space.n_nodes} nodes of the {cell} cell",
                    field="codes",
                    remedy="give one for each node",
                )
            sizes = {len(node.support) for node in codes[cell]} - {self.space.sparsity}
            if sizes:
                raise ConfigError(
                    f"a node of the {cell} cell keeps {sizes.pop()} operations",
                    field="codes",
                    remedy=f"keep {self.space.sparsity}, the sparsity of the space",
                )
        self._codes = {cell: list(codes[cell]) for cell in CELLS}
        self._kept = {cell: _kept_columns(codes[cell], self.node_alphas(cell)[0]) for cell in CELLS}
        self._plans = {
            cell: [
                [(state, self.space.edge(i, state), op) for state, op in map(self.space.split, node.support)]
                for i, node in enumerate(codes[cell])
            ]
            for cell in CELLS
        }
        nodes = range(N_CELL_INPUTS, N_CELL_INPUTS + self.space.n_nodes)
        self._states = {
            cell: live_states([[state for state, _, _ in node] for node in plan], concat=nodes)
            for cell, plan in self._plans.items()
        }
        self.node_states = {
            cell: list(states[cell]) if states is not None else [NodeState.ACTIVE] * self.space.n_nodes
            for cell in CELLS
        }
        for kind in CELLS:
            for b, state in zip(self.node_alphas(kind), self.node_states[kind], strict=True):
                b.requires_grad_(state is NodeState.ACTIVE)
        for module in self.cells:
            module.train_affine(self.node_states[str(module.kind)])  # type: ignore[operator]
        self._set_live(self._states)
        kinds = {str(module.kind) for module in self._live_cells()}
        self._active_alphas = [
            b for kind in CELLS if kind in kinds for b in self.node_alphas(kind) if b.requires_grad
        ]

    def plan(self, cell: str) -> Plan:
        """Return, for each node of a cell, its active (state, edge of the cell, op)."""
        return self._plans[cell]

    def genotype(self) -> Genotype:
        """Return the active architecture."""
        supports = {cell: [node.support for node in self._codes[cell]] for cell in CELLS}
        return genotype_from_supports(self.space, supports)

    def edge_weights(self) -> EdgeWeights:
        """Return, for each cell, the weights (nodes, s) of its active operations, differentiable in b.

        alpha_S = z_S + A_S^T (b - A_S z_S), in float64: `istanas.sparse.edge_weights` for all nodes of a cell at once.
        """
        weights: EdgeWeights = {}
        for cell, kept in self._kept.items():
            b = torch.stack([*self.node_alphas(cell)])
            alphas = kept.codes + torch.einsum("nms,nm->ns", kept.columns, b.double() - kept.measured)
            weights[cell] = alphas.to(b.dtype)
        return weights

    def active_alphas(self) -> list[nn.Parameter]:
        """Return the compressed alphas that get a gradient: those of ACTIVE nodes of kinds that have a live cell."""
        return list(self._active_alphas)

    def _live_operations(self, cell: nn.Module) -> list[nn.Module]:
        return [cell.ops[edge][op] for node in self._plans[str(cell.kind)] for _, edge, op in node]  # type: ignore[index,misc]

    def forward(self, x: Tensor, weights: EdgeWeights | None = None) -> Tensor:
        """Return the logits (B, classes). `weights` is the result of `edge_weights`; `None` computes it."""
        return self.forward_with_auxiliary(x, weights)[0]

    def forward_with_auxiliary(
        self, x: Tensor, weights: EdgeWeights | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return (logits, auxiliary logits). The latter are `None` in eval mode or without an auxiliary head."""
        if not self._plans:
            raise ConfigError("no active operations", field="supernet", remedy="call install_codes first")
        weights = self.edge_weights() if weights is None else weights
        drop = self.drop_path_prob if self.training else 0.0
        arguments = {cell: (self._states[cell], self._plans[cell], weights[cell], drop) for cell in CELLS}
        return self._logits(x, arguments)
