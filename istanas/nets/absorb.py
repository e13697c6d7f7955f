"""Absorption: the edge weights of a finished one-stage supernet become part of its target network's batch norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from istanas.errors import ConfigError
from istanas.nets.networks import NodeState, SearchNetwork, TargetNetwork
from istanas.nets.operations import Zero, final_batchnorm
from istanas.space import kind_title


def absorb_into_batchnorm(supernet: SearchNetwork) -> TargetNetwork:
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
        >>> from istanas.nets import NodeCode, Supernet
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
    if not supernet.size.op_batchnorm:
        raise ConfigError(
            "false, so that no batch norm can absorb the edge weights",
            field="op_batchnorm",
            remedy="search with method: one_stage",
        )
    for kind, states in supernet.node_states.items():
        for node, state in enumerate(states):
            if state is not NodeState.FROZEN:
                raise ConfigError(
                    f"node {node} of the {kind_title(kind)} is still {state.name}, not FROZEN",
                    field="supernet",
                    remedy="finish the search first",
                )
    auxiliary = supernet.auxiliary_head is not None
    net = supernet.space.target(supernet.genotype(), supernet.size, auxiliary=auxiliary)
    first = next(supernet.parameters())
    net.to(first.device, first.dtype)
    with torch.no_grad():
        for operation, alpha in supernet.copy_weights(net):
            _scale(operation, alpha)
    return net.eval()


def _scale(operation: nn.Module, alpha: Tensor) -> None:
    if isinstance(operation, Zero):
        return
    norm = final_batchnorm(operation)
    assert norm is not None, "with op_batchnorm, every operation ends in batch norm"
    norm.weight.mul_(alpha)
    norm.bias.mul_(alpha)
