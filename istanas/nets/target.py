"""`TargetNet`, the network of a genotype: retrained after a two-stage search, or the result of a one-stage search."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count

import torch
from torch import Tensor, nn

from istanas.nets.networks import TargetNetwork
from istanas.nets.operations import (
    DilConv,
    FactorizedReduce,
    Normalized,
    RectifiedBlock,
    dense_gradient,
    make_operation,
)
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
from istanas.space import N_CELL_INPUTS, Genotype


class TargetCell(nn.Module):
    """A cell of a genotype. Each node sums the outputs of its picks."""

    def __init__(self, genotype: Genotype, place: CellPlace, op_batchnorm: bool) -> None:
        super().__init__()
        self.kind = place.kind
        self.preprocess0, self.preprocess1 = make_preprocess(place, affine=True)
        picks = genotype.picks(place.kind)
        self.concat = genotype.concat(place.kind)
        self.live = live_states([[state for _, state in node] for node in picks], self.concat)
        position = count()
        terms = [[(next(position), state) for _, state in node] for node in picks]
        # For each live node its state, and the (position in ops, state) of its picks.
        self.plan = [(i, node) for i, node in enumerate(terms, N_CELL_INPUTS) if i in self.live]
        self.ops = nn.ModuleList(
            make_operation(
                op,
                place.channels,
                place.stride if state < N_CELL_INPUTS else 1,
                affine=True,
                batchnorm=op_batchnorm,
                identity_batchnorm=op_batchnorm,
            )
            for node in picks
            for op, state in node
        )

    def forward(self, s0: Tensor | None, s1: Tensor | None, drop_path_prob: float) -> Tensor:
        states = live_inputs((self.preprocess0, self.preprocess1), (s0, s1), self.live)
        reads = SharedReads(states)
        for node, picks in self.plan:
            terms = []
            for position, state in picks:
                op = self.ops[position]
                terms.append(drop_path(apply_operation(op, states, reads, state), op, drop_path_prob))
            states[node] = sum_terms(terms)
        return torch.cat([states[i] for i in self.concat], dim=1)


class TargetNet(CellNetwork, TargetNetwork):
    """The network of a genotype.

    Args:
        genotype: The two cells.
        init_channels: Channels of the first cells, >= 1 (published: 36 for CIFAR, 48 for ImageNet).
        layers: Number of cells, >= 1 (published: 20 for CIFAR, 14 for ImageNet).
        num_classes: Number of classes, >= 1.
        stem: "cifar" (one convolution) or "imagenet" (three of stride 2).
        auxiliary: Whether the network has an auxiliary head, which is used only in training.
        op_batchnorm: Whether every operation ends in batch norm, as after a one-stage search.
        in_channels: Channels of the pictures, >= 1.

    Raises:
        ConfigError: If a size is too small or the stem is unknown.

    Example:
        >>> from istanas.space import PUBLISHED
        >>> net = TargetNet(PUBLISHED["ISTA_twostage"], init_channels=4, layers=2, num_classes=10)
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Source:
        DARTS (Liu et al., ICLR 2019), whose evaluation network ISTA-NAS uses.
    """

    def __init__(
        self,
        genotype: Genotype,
        init_channels: int,
        layers: int,
        num_classes: int,
        *,
        stem: str = "cifar",
        auxiliary: bool = False,
        op_batchnorm: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, in_channels=in_channels)
        n_concat = {"normal": len(genotype.normal_concat), "reduce": len(genotype.reduce_concat)}
        places = cell_places(init_channels, layers, stem, n_concat)
        self.drop_path_prob = 0.0
        self.stem = Stem(stem, in_channels, init_channels)
        cells = [TargetCell(genotype, place, op_batchnorm) for place in places]
        self.cells = nn.ModuleList(cells)
        widths = [n_concat[place.kind] * place.channels for place in places]
        self.auxiliary_head = (
            AuxiliaryHead(stem, widths[auxiliary_position(layers)], num_classes) if auxiliary else None
        )
        self.classifier = nn.Linear(widths[-1], num_classes)
        self._set_live({cell.kind: cell.live for cell in cells})

    def _live_operations(self, cell: nn.Module) -> list[nn.Module]:
        return [cell.ops[position] for _, picks in cell.plan for position, _ in picks]  # type: ignore[index,misc,union-attr]

    def forward_with_auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (logits, auxiliary logits). The latter are `None` in eval mode or without an auxiliary head."""
        arguments = (self.drop_path_prob if self.training else 0.0,)
        return self._logits(x, {"normal": arguments, "reduce": arguments})


def apply_operation(
    op: nn.Module,
    states: Mapping[int, Tensor],
    reads: SharedReads,
    state: int,
    scale: Tensor | None = None,
) -> Tensor:
    """Apply `op` to a state of the cell and multiply by `scale`. Operations share their inputs through `reads`."""
    if isinstance(op, DilConv) and op.stride == 2:
        return op.on_even(reads.phases(state, (0,))[0], scale)
    if isinstance(op, FactorizedReduce):
        return op.on_phases(reads.phases(state, (0, 1)), scale)
    if isinstance(op, RectifiedBlock):
        return op.after_relu(reads.rectified(state), scale)
    out: Tensor
    if isinstance(op, Normalized):
        out = op(states[state], scale)
        return out
    out = op(states[state])
    return out if scale is None else scale * out


def sum_terms(terms: list[Tensor]) -> Tensor:
    """Return the sum of a node's inputs."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return dense_gradient(total)


def drop_path(x: Tensor, operation: nn.Module, probability: float) -> Tensor:
    """Zero an operation's output for a random part of the batch, and scale the rest by 1 / (1 - probability).

    An identity without batch norm is never dropped, so that every picture keeps a path through the node.
    """
    if probability == 0 or isinstance(operation, nn.Identity):
        return x
    keep = torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device)
    if torch.compiler.is_compiling():
        # `bernoulli_` would make the probability a constant of the graph, which would then be compiled in each epoch.
        keep = (keep.uniform_() < 1.0 - probability).to(x.dtype)
    else:
        keep.bernoulli_(1.0 - probability)
    return x * (keep / (1.0 - probability))
