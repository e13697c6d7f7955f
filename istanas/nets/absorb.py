"""Absorption: the edge weights of a finished one-stage supernet become part of its target network's batch norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from istanas.errors import ConfigError
from istanas.nets.operations import final_batchnorm
from istanas.nets.supernet import NodeState, Supernet
from istanas.nets.target import TargetNet
from istanas.space import CELLS


def absorb_into_batchnorm(supernet: Supernet) -> TargetNet:
    """Return the target network that computes the same function as a finished one-stage supernet.

    alpha (gamma x + beta) = (alpha gamma) x + alpha beta: the edge weight of a kept operation scales the affine part of
    the batch norm at the end of the operation. Operations that are not kept are left out.

    Args:
        supernet: A supernet with `op_batchnorm` whose nodes are all FROZEN; it is not changed.

    Returns:
        A new network in eval mode, on the supernet's device, with an auxiliary head if the supernet has one. In eval
        mode its logits equal the supernet's up to rounding.

    Raises:
        ConfigError: If a node is still ACTIVE, or the operations do not end in batch norm.

    Example:
        >>> from istanas.nets import NodeCode
        >>> from istanas.space import CellSpace
        >>> net = Supernet(CellSpace(n_nodes=1, sparsity=1), 2, 3, 10, n_measurements=2, op_batchnorm=True)
        >>> code = NodeCode(torch.ones(2, 14).double(), torch.zeros(14).double(), support=(3,))
        >>> frozen = {"normal": [NodeState.FROZEN], "reduce": [NodeState.FROZEN]}
        >>> net.install_codes({"normal": [code], "reduce": [code]}, frozen)
        >>> x = torch.zeros(1, 3, 8, 8)
        >>> torch.allclose(absorb_into_batchnorm(net)(x), net.eval()(x))
        True

    Source:
        Yang et al., ISTA-NAS, NeurIPS 2020, section 3.4 (one-stage framework).
    """
    if not supernet.arguments["op_batchnorm"]:
        raise ConfigError(
            "false, so that no batch norm can absorb the edge weights",
            field="op_batchnorm",
            remedy="search with method: one_stage",
        )
    for cell in CELLS:
        for node, state in enumerate(supernet.node_states[cell]):
            if state is not NodeState.FROZEN:
                raise ConfigError(
                    f"node {node} of the {cell} cell is still {state.name}, not FROZEN",
                    field="supernet",
                    remedy="finish the search first",
                )
    net = TargetNet(supernet.genotype(), **supernet.arguments, auxiliary=supernet.auxiliary_head is not None)
    first = supernet.classifier.weight
    net.to(first.device, first.dtype)
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (net.stem, supernet.stem),
        (net.classifier, supernet.classifier),
    ]
    if net.auxiliary_head is not None and supernet.auxiliary_head is not None:
        pairs.append((net.auxiliary_head, supernet.auxiliary_head))
    with torch.no_grad():
        edge_weights = supernet.edge_weights()
        for ours, theirs in zip(net.cells, supernet.cells, strict=True):
            kind = str(theirs.kind)
            pairs += [(ours.preprocess0, theirs.preprocess0), (ours.preprocess1, theirs.preprocess1)]  # type: ignore[list-item]
            kept = [(edge, op) for node in supernet.plan(kind) for _, edge, op in node]
            for position, ((edge, op), alpha) in enumerate(
                zip(kept, edge_weights[kind].flatten(), strict=True)
            ):
                operation: nn.Module = ours.ops[position]  # type: ignore[index, assignment]
                operation.load_state_dict(theirs.ops[edge][op].state_dict())  # type: ignore[index, union-attr]
                _scale(operation, alpha)
        for ours, theirs in pairs:
            ours.load_state_dict(theirs.state_dict())
    return net.eval()


def _scale(operation: nn.Module, alpha: Tensor) -> None:
    norm = final_batchnorm(operation)
    assert norm is not None, "with op_batchnorm, every operation ends in batch norm"
    norm.weight.mul_(alpha)
    norm.bias.mul_(alpha)
