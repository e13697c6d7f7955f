"""Supernet: the network in search, of which only the operations that the sparse codes keep are computed.

Parameters are the weights of every candidate and the compressed parameters b of every node. Once an epoch the
recovered codes are installed (`install_codes`); from then on a plan of active operations is followed, and
everything outside it costs nothing: no forward, no gradient, no optimiser step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from istanas.errors import ConfigError
from istanas.nets.cell import (
    CellNetwork,
    CellPlace,
    Stem,
    cell_places,
    check_sizes,
    live_inputs,
    live_states,
    make_preprocess,
)
from istanas.nets.operations import make_operation
from istanas.nets.target import apply_operation, sum_terms
from istanas.space import CELLS, N_CELL_INPUTS, CellSpace, Genotype, genotype_from_supports

Support = tuple[int, ...]


@dataclass(frozen=True)
class NodeCode:
    """What one node holds between two recoveries.

    Args:
        measurement_matrix: A, (m, n) float64.
        sparse_code: z, (n,) float64, as recovered (before truncation).
        support: the candidates that are kept, ascending.
    """

    measurement_matrix: Tensor
    sparse_code: Tensor
    support: Support


@dataclass(frozen=True)
class _KeptColumns:
    """What the edge weights of a cell need beside b, float64 on b's device: a step then copies nothing there."""

    columns: Tensor  # A_S, (nodes, m, s)
    codes: Tensor  # z_S, (nodes, s)
    measured: Tensor  # A_S z_S, (nodes, m)


def _kept_columns(nodes: Sequence[NodeCode], b: Tensor) -> _KeptColumns:
    supports = [list(node.support) for node in nodes]
    columns = torch.stack([n.measurement_matrix[:, S] for n, S in zip(nodes, supports, strict=True)])
    codes = torch.stack([n.sparse_code[S] for n, S in zip(nodes, supports, strict=True)])
    # First in b's precision, the network's, so that a float64 network computes with the exact values.
    columns, codes = (t.to(b.device, b.dtype).double() for t in (columns, codes))
    return _KeptColumns(columns, codes, torch.einsum("nms,ns->nm", columns, codes))


class SearchCell(nn.Module):
    """A cell with every candidate operation on every edge: `ops[edge][op]`."""

    def __init__(self, space: CellSpace, place: CellPlace, op_batchnorm: bool) -> None:
        super().__init__()
        self.kind = place.kind
        self.n_nodes = space.n_nodes
        # Two-stage: no affine part, the edge weight is the scale. One-stage: it is trained once nodes freeze.
        affine = op_batchnorm
        self.preprocess0, self.preprocess1 = make_preprocess(place, affine)
        self.ops = nn.ModuleList(
            nn.ModuleList(
                make_operation(
                    op,
                    place.channels,
                    place.stride if state < N_CELL_INPUTS else 1,
                    affine=affine,
                    pool_batchnorm=True,
                    skip_batchnorm=op_batchnorm,
                )
                for op in space.ops
            )
            for node in range(space.n_nodes)
            for state in range(space.n_node_edges(node))
        )

    def forward(
        self, s0: Tensor | None, s1: Tensor | None, live: Collection[int], plan: Plan, weights: Tensor
    ) -> Tensor:
        states = live_inputs((self.preprocess0, self.preprocess1), (s0, s1), live)
        rectified: dict[int, Tensor] = {}
        for i, (node, alphas) in enumerate(zip(plan, weights, strict=True)):
            terms = [
                alpha * apply_operation(self.ops[edge][op], states, rectified, state)  # type: ignore[index]
                for (state, edge, op), alpha in zip(node, alphas.unbind(), strict=True)
            ]
            states[N_CELL_INPUTS + i] = sum_terms(terms)
        return torch.cat([states[N_CELL_INPUTS + i] for i in range(self.n_nodes)], dim=1)


Plan = list[list[tuple[int, int, int]]]  # per node the active (state, edge of the cell, op)
EdgeWeights = dict[str, Tensor]  # per cell the weights (nodes, s) of the active operations


class Supernet(CellNetwork):
    """The network in search.

    Args:
        space: the cell space.
        init_channels, layers: width and depth (published two-stage search: 16, 8).
        num_classes: size of the output.
        n_measurements: m, rows of A and length of each b, >= 1 (published: 7).
        stem: "cifar" or "imagenet".
        in_channels: channels of the pictures.
        op_batchnorm: batch norm with affine part at the end of every candidate, as one-stage search needs.

    Raises:
        ConfigError: for a size below 1 or an unknown stem.

    Example:
        >>> net = Supernet(CellSpace(n_nodes=2), init_channels=2, layers=2, num_classes=10)
        >>> net.compressed_alphas["normal"].shape
        torch.Size([2, 7])

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
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, in_channels=in_channels, n_measurements=n_measurements)
        self.space = space
        places = cell_places(init_channels, layers, stem, dict.fromkeys(CELLS, space.n_nodes))
        self.stem = Stem(stem, in_channels, init_channels)
        self.cells = nn.ModuleList(SearchCell(space, place, op_batchnorm) for place in places)
        self.auxiliary_head = None
        self.classifier = nn.Linear(space.n_nodes * places[-1].channels, num_classes)
        self.compressed_alphas = nn.ParameterDict(
            {cell: nn.Parameter(torch.zeros(space.n_nodes, n_measurements)) for cell in CELLS}
        )
        self._codes: dict[str, list[NodeCode]] = {}
        self._kept: dict[str, _KeptColumns] = {}
        self._plans: dict[str, Plan] = {}
        self._states: dict[str, frozenset[int]] = {}
        self._active_alphas: Sequence[nn.Parameter] = ()

    def weights(self) -> list[nn.Parameter]:
        """Every parameter but the compressed alphas: what SGD trains."""
        alphas = {id(b) for b in self.alphas()}
        return [p for p in self.parameters() if id(p) not in alphas]

    def alphas(self) -> list[nn.Parameter]:
        """The compressed alphas b, (nodes, m) for the normal and the reduction cell: what Adam trains."""
        return [self.compressed_alphas[cell] for cell in CELLS]

    def install_codes(self, codes: Mapping[str, Sequence[NodeCode]]) -> None:
        """Make the kept candidates the active ones, until the next call.

        Args:
            codes: for "normal" and "reduce", one `NodeCode` a node.
        """
        for cell in CELLS:
            if len(codes[cell]) != self.space.n_nodes:
                raise ConfigError(
                    f"{cell} cell has {len(codes[cell])} codes: its {self.space.n_nodes} nodes need one each"
                )
            sizes = {len(node.support) for node in codes[cell]} - {self.space.sparsity}
            if sizes:
                raise ConfigError(
                    f"{cell} cell has a node that keeps {sizes.pop()} operations: "
                    f"the space's sparsity is {self.space.sparsity}"
                )
        self._codes = {cell: list(codes[cell]) for cell in CELLS}
        self._kept = {cell: _kept_columns(codes[cell], self.compressed_alphas[cell]) for cell in CELLS}
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
        self._set_live(self._states)
        kinds = {cell.kind for cell in self._live_cells()}
        self._active_alphas = [self.compressed_alphas[cell] for cell in CELLS if cell in kinds]

    def genotype(self) -> Genotype:
        """The architecture that is active now."""
        supports = {cell: [node.support for node in self._codes[cell]] for cell in CELLS}
        return genotype_from_supports(self.space, supports)

    def edge_weights(self) -> EdgeWeights:
        """Per cell the weights (nodes, s) of the active operations, differentiable in b.

        alpha_S = z_S + A_S^T (b - A_S z_S) in float64: `istanas.sparse.edge_weights` on the support, all nodes of
        a cell at once, from tensors that wait on the device.
        """
        weights: EdgeWeights = {}
        for cell, kept in self._kept.items():
            b = self.compressed_alphas[cell]
            alphas = kept.codes + torch.einsum("nms,nm->ns", kept.columns, b.double() - kept.measured)
            weights[cell] = alphas.to(b.dtype)
        return weights

    def active_alphas(self) -> list[nn.Parameter]:
        """The compressed alphas that get a gradient: those of the kinds that have a live cell."""
        return list(self._active_alphas)

    def _live_operations(self, cell: nn.Module) -> list[nn.Module]:
        return [cell.ops[edge][op] for node in self._plans[str(cell.kind)] for _, edge, op in node]  # type: ignore[index,misc]

    def forward(self, x: Tensor, weights: EdgeWeights | None = None) -> Tensor:
        """Logits (B, classes); `weights` as `edge_weights()` gives them, computed here if None."""
        if not self._plans:
            raise ConfigError("the supernet has no active operations: call install_codes first")
        weights = self.edge_weights() if weights is None else weights
        arguments = {cell: (self._states[cell], self._plans[cell], weights[cell]) for cell in CELLS}
        return self._logits(x, arguments)[0]
