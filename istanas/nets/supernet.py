"""`Supernet`, the network of a search in the DARTS space, which computes only the active operations.

Its parameters are the weights of all candidates and the alphas of all nodes (in ISTA-NAS the compressed parameters b).
In every epoch, `install_codes` installs the recovered codes, which define the active operations. The others take part
in neither the forward pass nor the backward pass nor the optimiser step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from istanas.nets.networks import EdgeWeights, NodeState, SearchNetwork, Support
from istanas.nets.operations import make_operation, train_affine
from istanas.nets.partial import PartialStates, partial_width
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
from istanas.nets.target import TargetNet, apply_operation, drop_path, sum_terms
from istanas.space import CELLS, N_CELL_INPUTS, CellSpace, Decision, NetworkSize


class SearchCell(nn.Module):
    """A cell with every candidate operation on every edge: `ops[edge][op]`."""

    def __init__(self, space: CellSpace, place: CellPlace, op_batchnorm: bool, partial: int = 1) -> None:
        super().__init__()
        self.kind = place.kind
        self.n_nodes = space.n_nodes
        self.stride = place.stride
        self.partial = partial
        # In a two-stage search the edge weight is the scale, and batch norms have no affine part. In a one-stage search
        # the affine parts of an operation are trained only after its node has frozen (see `train_affine`).
        affine = op_batchnorm
        self.preprocess0, self.preprocess1 = make_preprocess(place, affine)
        self.ops = nn.ModuleList(
            nn.ModuleList(
                make_operation(
                    op,
                    partial_width(place.channels, partial),
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
        weights: Sequence[Tensor] | Tensor,
        drop_path_prob: float,
    ) -> Tensor:
        states = live_inputs((self.preprocess0, self.preprocess1), (s0, s1), live)
        parts = PartialStates(states, self.partial, self.stride) if self.partial > 1 else None
        read = states if parts is None else parts.first
        reads = SharedReads(read)
        for i, (node, alphas) in enumerate(zip(plan, weights, strict=True)):
            terms, edges = [], []
            for (state, edge, op), alpha in zip(node, alphas.unbind(), strict=True):
                operation: nn.Module = self.ops[edge][op]  # type: ignore[index]
                out = apply_operation(operation, read, reads, state, alpha)
                terms.append(drop_path(out, operation, drop_path_prob))
                edges.append((state, alpha))
            total = sum_terms(terms)
            states[N_CELL_INPUTS + i] = total if parts is None else parts.join(total, edges)
            if parts is not None:
                parts.add(N_CELL_INPUTS + i, states[N_CELL_INPUTS + i])
        return torch.cat([states[N_CELL_INPUTS + i] for i in range(self.n_nodes)], dim=1)

    def train_affine(self, states: Sequence[NodeState]) -> None:
        """Train the affine parts of all batch norms in the operations of FROZEN nodes, and no others.

        As published, this includes the batch norm in the middle of a separable convolution.
        """
        edge = 0
        for node, state in enumerate(states):
            for _ in range(N_CELL_INPUTS + node):
                train_affine(self.ops[edge], is_trained=state is NodeState.FROZEN)
                edge += 1


Plan = list[list[tuple[int, int, int]]]  # For each node the active (state, edge of the cell, op).


class Supernet(CellNetwork, SearchNetwork):
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
        alpha_size: Returns the number of alphas of a decision; `None` returns m.
        partial: The operations run on 1 / `partial` of the channels of a node; 1 for all.

    Raises:
        ConfigError: If a size is too small, the stem is unknown, or `partial` does not divide the channels.

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
        alpha_size: Callable[[Decision], int] | None = None,
        partial: int = 1,
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, in_channels=in_channels, n_measurements=n_measurements)
        self.space: CellSpace = space
        self.size = NetworkSize(init_channels, layers, num_classes, stem, in_channels, op_batchnorm)
        self.drop_path_prob = 0.0
        places = cell_places(init_channels, layers, stem, dict.fromkeys(CELLS, space.n_nodes))
        self.stem = Stem(stem, in_channels, init_channels)
        self.cells = nn.ModuleList(SearchCell(space, place, op_batchnorm, partial) for place in places)
        widths = [space.n_nodes * place.channels for place in places]
        self.auxiliary_head = (
            AuxiliaryHead(stem, widths[auxiliary_position(layers)], num_classes) if auxiliary else None
        )
        self.classifier = nn.Linear(widths[-1], num_classes)
        self.set_alphas(alpha_size or (lambda decision: n_measurements))
        self._plans: dict[str, Plan] = {}
        self._states: dict[str, frozenset[int]] = {}
        self._affine_states: dict[str, list[NodeState]] = {}  # the states of the last call of `train_affine`

    def activate(self, supports: Mapping[str, Sequence[Support]]) -> set[str]:
        self._plans = {
            cell: [
                [(state, self.space.edge(i, state), op) for state, op in map(self.space.split, support)]
                for i, support in enumerate(supports[cell])
            ]
            for cell in CELLS
        }
        nodes = range(N_CELL_INPUTS, N_CELL_INPUTS + self.space.n_nodes)
        self._states = {
            cell: live_states([[state for state, _, _ in node] for node in plan], concat=nodes)
            for cell, plan in self._plans.items()
        }
        if self._affine_states != self.node_states:
            for module in self.cells:
                module.train_affine(self.node_states[str(module.kind)])  # type: ignore[operator]
            self._affine_states = dict(self.node_states)
        self._set_live(self._states)
        return {str(module.kind) for module in self._live_cells()}

    def plan(self, cell: str) -> Plan:
        """Return, for each node of a cell, its active (state, edge of the cell, op)."""
        return self._plans[cell]

    def _live_operations(self, cell: nn.Module) -> list[nn.Module]:
        return [cell.ops[edge][op] for node in self._plans[str(cell.kind)] for _, edge, op in node]  # type: ignore[index,misc]

    def forward_with_auxiliary(
        self, x: Tensor, weights: EdgeWeights | None = None
    ) -> tuple[Tensor, Tensor | None]:
        weights = self.edge_weights() if weights is None else weights
        drop = self.drop_path_prob if self.training else 0.0
        arguments = {cell: (self._states[cell], self._plans[cell], weights[cell], drop) for cell in CELLS}
        return self._logits(x, arguments)

    def copy_weights(self, target: TargetNet) -> list[tuple[nn.Module, Tensor]]:
        pairs: list[tuple[nn.Module, nn.Module]] = [
            (target.stem, self.stem),
            (target.classifier, self.classifier),
        ]
        if target.auxiliary_head is not None and self.auxiliary_head is not None:
            pairs.append((target.auxiliary_head, self.auxiliary_head))
        edge_weights, scaled = self.edge_weights(), []
        for ours, theirs in zip(target.cells, self.cells, strict=True):
            kind = str(theirs.kind)
            pairs += [(ours.preprocess0, theirs.preprocess0), (ours.preprocess1, theirs.preprocess1)]  # type: ignore[list-item]
            kept = [(edge, op) for node in self.plan(kind) for _, edge, op in node]
            alphas = [alpha for node in edge_weights[kind] for alpha in node]
            for position, ((edge, op), alpha) in enumerate(zip(kept, alphas, strict=True)):
                operation: nn.Module = ours.ops[position]  # type: ignore[index, assignment]
                pairs.append((operation, theirs.ops[edge][op]))  # type: ignore[index, arg-type]
                scaled.append((operation, alpha))
        for mine, other in pairs:
            mine.load_state_dict(other.state_dict())
        return scaled
