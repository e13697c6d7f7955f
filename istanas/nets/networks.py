"""The base classes of the networks of all search spaces: `SearchNetwork` and `TargetNetwork`.

A search network has the weights of all candidates, and a vector of alphas for each decision of its space. A search
installs the candidates that are computed, and a function that returns their edge weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from istanas.errors import ConfigError
from istanas.space import Decision, Genotype, NetworkSize, SearchSpace, kind_title

Support = tuple[int, ...]
EdgeWeights = Mapping[str, Sequence[Tensor] | Tensor]
"""For each kind, the weights of each decision's active candidates: a tensor (decisions, s), or one (s,) for each."""
Weigh = Callable[[str, Sequence[Tensor]], Sequence[Tensor] | Tensor]
"""Returns the edge weights of one kind, given the kind and its alphas, in which they are differentiable."""


class NodeState(Enum):
    """Whether the search still changes a decision.

    The code of an ACTIVE node is recovered from its b in every epoch. The b, the code and the edge weights of a FROZEN
    node are fixed (one-stage search only).
    """

    ACTIVE = "active"
    FROZEN = "frozen"


@dataclass(frozen=True)
class NodeCode:
    """The code of one decision.

    Args:
        measurement_matrix: A, (m, n) float64.
        sparse_code: z, (n,) float64, before its truncation to the support.
        support: The kept candidates in ascending order.
    """

    measurement_matrix: Tensor
    sparse_code: Tensor
    support: Support


class TargetNetwork(nn.Module):
    """The network of a genotype.

    Attributes:
        drop_path_prob: Drop-path probability in training.
        activation_checkpointing: Whether activations are computed again in the backward pass.
        auxiliary_head: The auxiliary head, or `None`.
    """

    drop_path_prob: float = 0.0
    activation_checkpointing: bool = False
    auxiliary_head: Any  # A subclass sets it. A default here would hide a registered module.

    def forward_with_auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (logits, auxiliary logits). The latter are `None` in eval mode or without an auxiliary head."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, classes) of pictures (B, C, H, W)."""
        return self.forward_with_auxiliary(x)[0]

    def active_parameters(self) -> list[nn.Parameter]:
        """Return the weights that get a gradient in a training step."""
        raise NotImplementedError

    def active_buffers(self) -> list[Tensor]:
        """Return the running statistics that a training step changes."""
        raise NotImplementedError


class SearchNetwork(nn.Module):
    """The network of a search.

    A subclass builds the candidates, calls `set_alphas` at the end of its construction, and computes the candidates
    that `activate` has received, with the edge weights that `forward_with_auxiliary` receives.

    Attributes:
        space: The search space.
        size: The size of the network. A target network of the same size has the same shapes.
        drop_path_prob: Drop-path probability in training.
        activation_checkpointing: Whether activations are computed again in the backward pass.
        auxiliary_head: The auxiliary head, or `None`.
        node_states: The state of each decision.
    """

    space: SearchSpace
    size: NetworkSize
    drop_path_prob: float = 0.0
    activation_checkpointing: bool = False
    auxiliary_head: Any  # A subclass sets it. A default here would hide a registered module.
    node_states: dict[str, list[NodeState]]
    _weigh: Weigh | None = None
    _supports: Mapping[str, Sequence[Support]]
    _active_alphas: Sequence[nn.Parameter] = ()

    def set_alphas(self, alpha_size: Callable[[Decision], int]) -> None:
        """Create the alphas of every decision, as zeros.

        There is one parameter per decision, so that optimiser steps and all-reduce leave out those of FROZEN ones.

        Args:
            alpha_size: Returns the number of alphas of a decision.
        """
        self.compressed_alphas = nn.ModuleDict(
            {
                kind: nn.ParameterList([nn.Parameter(torch.zeros(alpha_size(decision))) for decision in each])
                for kind, each in self.space.decisions.items()
            }
        )
        self.node_states = {
            kind: [NodeState.ACTIVE] * len(each) for kind, each in self.space.decisions.items()
        }
        self._supports = {}

    def weights(self) -> list[nn.Parameter]:
        """Return all parameters except the alphas. SGD trains them."""
        alphas = {id(b) for b in self.alphas()}
        return [p for p in self.parameters() if id(p) not in alphas]

    def alphas(self) -> list[nn.Parameter]:
        """Return the alphas of all decisions, one vector each. Adam trains them."""
        return [b for kind in self.space.kinds for b in self.node_alphas(kind)]

    def node_alphas(self, kind: str) -> list[nn.Parameter]:
        """Return the alphas of the decisions of one kind."""
        return list(self.compressed_alphas[kind].parameters())

    def install(
        self,
        supports: Mapping[str, Sequence[Support]],
        weigh: Weigh,
        states: Mapping[str, Sequence[NodeState]] | None = None,
    ) -> None:
        """Make these candidates active until the next call.

        Args:
            supports: For each kind the active candidates of each decision, in ascending order.
            weigh: Returns the edge weights of one kind's active candidates.
            states: For each kind one state per decision; `None` makes all ACTIVE. The alphas of a FROZEN decision are
                not trained, but the affine parts of the batch norms in its operations are.
        """
        self._weigh = weigh
        self._supports = {kind: list(supports[kind]) for kind in self.space.kinds}
        self.node_states = {
            kind: list(states[kind]) if states is not None else [NodeState.ACTIVE] * len(each)
            for kind, each in self.space.decisions.items()
        }
        for kind in self.space.kinds:
            for b, state in zip(self.node_alphas(kind), self.node_states[kind], strict=True):
                b.requires_grad_(state is NodeState.ACTIVE)
        live = self.activate(self._supports)
        self._active_alphas = [
            b for kind in self.space.kinds if kind in live for b in self.node_alphas(kind) if b.requires_grad
        ]

    def activate(self, supports: Mapping[str, Sequence[Support]]) -> set[str]:
        """Compute only these candidates from now on, and train the affine parts of FROZEN decisions.

        Returns:
            The kinds of decisions on which the output depends.
        """
        raise NotImplementedError

    def install_codes(
        self,
        codes: Mapping[str, Sequence[NodeCode]],
        states: Mapping[str, Sequence[NodeState]] | None = None,
    ) -> None:
        """Make the candidates that sparse codes keep active until the next call.

        Args:
            codes: For each kind, such as "normal", one `NodeCode` per decision.
            states: See `install`.

        Raises:
            ConfigError: If the number of codes or of kept candidates does not match the space.
        """
        for kind, decisions in self.space.decisions.items():
            if len(codes[kind]) != len(decisions):
                raise ConfigError(
                    f"{len(codes[kind])} codes for the {len(decisions)} nodes of the {kind_title(kind)}",
                    field="codes",
                    remedy="give one for each node",
                )
            sparsity = decisions[0].sparsity
            sizes = {len(node.support) for node in codes[kind]} - {sparsity}
            if sizes:
                raise ConfigError(
                    f"a node of the {kind_title(kind)} keeps {sizes.pop()} operations",
                    field="codes",
                    remedy=f"keep {sparsity}, the sparsity of the space",
                )
        like = self.alphas()[0]
        kept = {kind: kept_columns(codes[kind], like) for kind in self.space.kinds}

        def weigh(kind: str, alphas: Sequence[Tensor]) -> Tensor:
            return sparse_edge_weights(alphas, kept[kind])

        self.install({kind: [node.support for node in codes[kind]] for kind in codes}, weigh, states)

    def genotype(self) -> Genotype:
        """Return the active architecture."""
        return self.space.genotype(self._supports)

    def edge_weights(self) -> EdgeWeights:
        """Return, for each kind, the weights of its active candidates, differentiable in the alphas."""
        if self._weigh is None:
            raise ConfigError("no active operations", field="supernet", remedy="call install_codes first")
        return {kind: self._weigh(kind, self.node_alphas(kind)) for kind in self.space.kinds}

    def active_alphas(self) -> list[nn.Parameter]:
        """Return the alphas that get a gradient: those of ACTIVE decisions on which the output depends."""
        return list(self._active_alphas)

    def active_parameters(self) -> list[nn.Parameter]:
        """Return the weights that get a gradient in a training step."""
        raise NotImplementedError

    def active_buffers(self) -> list[Tensor]:
        """Return the running statistics that a training step changes."""
        raise NotImplementedError

    def forward_with_auxiliary(
        self, x: Tensor, weights: EdgeWeights | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return (logits, auxiliary logits). The latter are `None` in eval mode or without an auxiliary head.

        Args:
            x: Pictures (B, C, H, W).
            weights: The result of `edge_weights`; `None` computes it.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, weights: EdgeWeights | None = None) -> Tensor:
        """Return the logits (B, classes). `weights` is the result of `edge_weights`; `None` computes it."""
        return self.forward_with_auxiliary(x, weights)[0]

    def copy_weights(self, target: Any) -> list[tuple[nn.Module, Tensor]]:
        """Copy the weights of the active candidates and of everything around them to a target network of this size.

        Returns:
            The operations of the target network, each with its edge weight.
        """
        raise NotImplementedError


class ArchitectureNetwork(SearchNetwork):
    """The network of a search without shared weights: that of one architecture at a time, or none.

    Args:
        space: The search space.
        size: The size of the networks.

    Attributes:
        network: The network that `replace_network` has received last, or `None`.
    """

    network: Any  # A default here would hide the registered module.

    def __init__(self, space: SearchSpace, size: NetworkSize) -> None:
        super().__init__()
        self.space, self.size, self.auxiliary_head = space, size, None
        self.node_states = {}
        self.network = None

    def replace_network(self, network: TargetNetwork) -> None:
        """Use the network of another architecture from now on."""
        network.activation_checkpointing = self.activation_checkpointing
        self.network = network

    def alphas(self) -> list[nn.Parameter]:
        return []

    def node_alphas(self, kind: str) -> list[nn.Parameter]:
        return []

    def install(
        self,
        supports: Mapping[str, Sequence[Support]],
        weigh: Weigh,
        states: Mapping[str, Sequence[NodeState]] | None = None,
    ) -> None:
        self._supports, self._weigh = {kind: list(supports[kind]) for kind in self.space.kinds}, weigh

    def edge_weights(self) -> EdgeWeights:
        return {}

    def active_parameters(self) -> list[nn.Parameter]:
        return [] if self.network is None else self.network.active_parameters()

    def active_buffers(self) -> list[Tensor]:
        return [] if self.network is None else self.network.active_buffers()

    def forward_with_auxiliary(
        self, x: Tensor, weights: EdgeWeights | None = None
    ) -> tuple[Tensor, Tensor | None]:
        logits: tuple[Tensor, Tensor | None] = self.network.forward_with_auxiliary(x)
        return logits


@dataclass(frozen=True)
class _KeptColumns:
    """The constants in the edge weights of one kind, float64 on b's device, so that steps need not copy them."""

    columns: Tensor  # A_S, (decisions, m, s).
    codes: Tensor  # z_S, (decisions, s).
    measured: Tensor  # A_S z_S, (decisions, m).


def kept_columns(nodes: Sequence[NodeCode], like: Tensor) -> _KeptColumns:
    """Return the constants in the edge weights of these codes, on the device of `like` and rounded to its precision."""
    supports = [list(node.support) for node in nodes]
    columns = torch.stack([n.measurement_matrix[:, S] for n, S in zip(nodes, supports, strict=True)])
    codes = torch.stack([n.sparse_code[S] for n, S in zip(nodes, supports, strict=True)])
    # They are rounded to the network's precision, which is that of b. Only a float64 network has exact values.
    columns, codes = (t.to(like.device, like.dtype).double() for t in (columns, codes))
    return _KeptColumns(columns, codes, torch.einsum("nms,ns->nm", columns, codes))


def sparse_edge_weights(alphas: Sequence[Tensor], kept: _KeptColumns) -> Tensor:
    """Return the edge weights (decisions, s) of sparse codes, differentiable in b.

    alpha_S = z_S + A_S^T (b - A_S z_S), in float64: `istanas.sparse.edge_weights` for all decisions at once.
    """
    b = torch.stack([*alphas])
    weights = kept.codes + torch.einsum("nms,nm->ns", kept.columns, b.double() - kept.measured)
    return weights.to(b.dtype)
