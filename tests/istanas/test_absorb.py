"""Absorption: a finished one-stage supernet and its target network compute the same function and share no tensor."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from istanas.errors import ConfigError
from istanas.measure import count_params
from istanas.nets import NodeCode, NodeState, Supernet, TargetNet, absorb_into_batchnorm
from istanas.nets.operations import final_batchnorm
from istanas.search.sparse_coding import draw_matrices
from istanas.space import CELLS, PRIMITIVES, PUBLISHED, CellSpace

Supports = dict[str, list[tuple[int, ...]]]
ACTIVE, FROZEN = NodeState.ACTIVE, NodeState.FROZEN


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def spread(space: CellSpace, shift: int) -> Supports:
    """Supports that use all operations and states in turn. With 3 picks of 2 states or more, two share an edge."""
    supports: Supports = {cell: [] for cell in CELLS}
    for k, cell in enumerate(CELLS, shift):
        for node in range(space.n_nodes):
            ops = [(k + node * space.sparsity + pick) % space.n_ops for pick in range(space.sparsity)]
            states = [(k + pick) % space.n_node_edges(node) for pick in range(space.sparsity)]
            picks = [space.candidate(node, state, op) for state, op in zip(states, ops, strict=True)]
            supports[cell].append(tuple(sorted(picks)))
    return supports


def codes_of(space: CellSpace, supports: Supports, n_measurements: int = 7) -> dict[str, list[NodeCode]]:
    return {
        cell: [
            NodeCode(A, 0.3 * rand(A.shape[1], seed=node), supports[cell][node])
            for node, A in enumerate(matrices)
        ]
        for cell, matrices in draw_matrices(space, n_measurements, "uniform", 0).items()
    }


def states(space: CellSpace, state: NodeState) -> dict[str, list[NodeState]]:
    return {cell: [state] * space.n_nodes for cell in CELLS}


def trained(
    supports: Supports,
    space: CellSpace | None = None,
    *,
    channels: int = 2,
    layers: int = 3,
    **options: Any,
) -> Supernet:
    """A finished supernet after SGD steps on random pictures, with every node first ACTIVE, then FROZEN."""
    space = space or CellSpace()
    torch.manual_seed(0)
    net = Supernet(space, channels, layers, 5, op_batchnorm=True, **options).double()
    with torch.no_grad():
        for b in net.alphas():
            b.normal_()
    started = [b.detach().clone() for b in net.alphas()]
    weights = torch.optim.SGD(net.weights(), 0.05, momentum=0.9)
    alphas = torch.optim.Adam(net.alphas(), 0.02)
    codes = codes_of(space, supports)
    for state in (ACTIVE, FROZEN):
        net.install_codes(codes, states(space, state))
        for step in range(3):
            seed = 10 * step + (state is FROZEN)
            target = torch.randint(5, (6,), generator=torch.Generator().manual_seed(seed))
            outputs = net.forward_with_auxiliary(1.0 + rand(6, 3, 8, 8, seed=seed))
            loss = sum(F.cross_entropy(out, target) for out in outputs if out is not None)
            for optimizer in (weights, alphas):
                optimizer.zero_grad()
            loss.backward()
            weights.step()
            alphas.step()
    active = {kind for cell in net._live_cells() if (kind := cell.kind)}
    for cell, b, start in zip(
        [c for c in CELLS for _ in range(space.n_nodes)], net.alphas(), started, strict=True
    ):
        assert torch.equal(b, start) == (cell not in active)
    return net


def kept(net: Supernet) -> list[tuple[Any, nn.Module]]:
    """Return (cell, kept operation) for all live cells."""
    return [
        (cell, cell.ops[edge][op])
        for cell in net._live_cells()
        for node in net.plan(cell.kind)
        for _, edge, op in node
    ]


def largest_difference(net: Supernet, absorbed: TargetNet) -> tuple[float, float]:
    """Return (max |difference|, norm of the difference / norm) of the logits in eval mode, on new pictures."""
    x = 1.0 + rand(5, 3, 8, 8, seed=99, dtype=net.classifier.weight.dtype)
    with torch.no_grad():
        theirs, ours = net.eval()(x), absorbed.eval()(x)
    assert theirs.std(0).min() > 1e-3, "every picture gets the same logits"
    difference = ours - theirs
    return float(difference.abs().max()), float(difference.norm() / theirs.norm())


# --- invariant 5 ---

CASES = [(sparsity, shift) for sparsity in (1, 2, 3) for shift in (0, 4)]


@pytest.mark.parametrize(("sparsity", "shift"), CASES)
def test_the_absorbed_network_gives_the_logits_of_the_supernet(sparsity: int, shift: int) -> None:
    space = CellSpace(sparsity=sparsity)
    net = trained(spread(space, shift), space)
    for _, operation in kept(net):
        norm = final_batchnorm(operation)
        assert norm is not None
        assert norm.running_mean.abs().min() > 0  # Its statistics have changed.
        assert norm.bias.abs().min() > 0  # Its shift was trained, which the factor must scale, too.
        assert not torch.equal(norm.weight, torch.ones_like(norm.weight))
    absorbed = absorb_into_batchnorm(net)
    assert largest_difference(net, absorbed)[1] <= 1e-9
    net.float()
    assert largest_difference(net, absorb_into_batchnorm(net))[0] <= 1e-5


def test_the_cases_above_keep_every_operation_strided_and_not() -> None:
    seen, shared = set(), set()
    for sparsity, shift in CASES:
        space = CellSpace(sparsity=sparsity)
        for cell, supports in spread(space, shift).items():
            for support in supports:
                picks = [space.split(candidate) for candidate in support]
                strided = [cell == "reduce" and state < 2 for state, _ in picks]
                seen |= {(cell, s, space.ops[op]) for s, (_, op) in zip(strided, picks, strict=True)}
                if len({state for state, _ in picks}) < len(picks):
                    shared.add(cell)
    assert {op for cell, _, op in seen if cell == "normal"} == set(PRIMITIVES)
    assert {op for cell, strided, op in seen if cell == "reduce" and strided} == set(PRIMITIVES)
    assert {op for cell, strided, op in seen if cell == "reduce" and not strided} == set(PRIMITIVES)
    assert shared == set(CELLS)


def test_two_operations_on_every_edge_that_is_read() -> None:
    """Two picks on the same edge keep their own weights, in order."""
    pairs = [(2, 3), (8, 9), (16, 19), (21, 26)]
    net = trained({"normal": pairs, "reduce": [(2, 3), (0, 1), (4, 5), (23, 24)]})
    genotype = net.genotype()
    assert all(len({s for _, s in node}) == 1 for cell in CELLS for node in genotype.picks(cell))
    assert largest_difference(net, absorb_into_batchnorm(net))[1] <= 1e-9


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_both_stems_with_and_without_the_auxiliary_head(stem: str, auxiliary: bool) -> None:
    net = trained(spread(CellSpace(), 0), stem=stem, auxiliary=auxiliary, channels=4)
    absorbed = absorb_into_batchnorm(net)
    assert (absorbed.auxiliary_head is not None) == auxiliary
    assert largest_difference(net, absorbed)[1] <= 1e-9


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_the_auxiliary_head_agrees_in_training_mode(stem: str) -> None:
    """Batch statistics and both outputs in training mode are the same, too."""
    net = trained(spread(CellSpace(), 2), stem=stem, auxiliary=True, channels=4)
    absorbed = absorb_into_batchnorm(net)
    x = rand(5, 3, 8, 8, seed=99)
    with torch.no_grad():
        theirs, ours = net.train().forward_with_auxiliary(x), absorbed.train().forward_with_auxiliary(x)
    for a, b in zip(ours, theirs, strict=True):
        assert a is not None
        assert b is not None
        assert float((a - b).norm() / b.norm()) <= 1e-9


def test_dead_cells_stay_dead_and_come_along() -> None:
    """If normal cells do not read their second input, no reduction cell of six cells is live."""
    space = CellSpace(n_nodes=2, sparsity=1)
    net = trained({"normal": [(3,), (2,)], "reduce": [(4,), (12,)]}, space, layers=6)
    assert net._live_in_eval.count(False) > 2
    absorbed = absorb_into_batchnorm(net)
    assert absorbed._live_in_eval == net._live_in_eval
    assert largest_difference(net, absorbed)[1] <= 1e-9
    for ours, theirs in zip(absorbed.cells, net.cells, strict=True):
        expected = theirs.preprocess0.state_dict()
        assert all(torch.equal(v, expected[name]) for name, v in ours.preprocess0.state_dict().items())


def test_other_sizes() -> None:
    """One measurement, one channel of odd width, a network of a single cell."""
    net = trained(spread(CellSpace(), 1), channels=3, layers=1)
    assert largest_difference(net, absorb_into_batchnorm(net))[1] <= 1e-9
    net = trained(
        spread(CellSpace(n_nodes=1, sparsity=2), 1), CellSpace(n_nodes=1, sparsity=2), channels=1, layers=4
    )
    assert largest_difference(net, absorb_into_batchnorm(net))[1] <= 1e-9


# --- the result ---


def test_the_weight_of_an_operation_scales_gamma_and_beta_and_nothing_else() -> None:
    net = trained(spread(CellSpace(), 0))
    absorbed = absorb_into_batchnorm(net)
    position = 0
    cell, ours = net.cells[1], absorbed.cells[1]
    alphas = net.edge_weights()[cell.kind].detach()
    assert alphas.abs().min() > 1e-3
    assert (alphas < 0).any(), "no weight is negative"
    for node, weights in zip(net.plan(cell.kind), alphas, strict=True):
        for (_, edge, op), alpha in zip(node, weights, strict=True):
            theirs, mine = cell.ops[edge][op], ours.ops[position]
            scaled = copy.deepcopy(theirs)
            norm = final_batchnorm(scaled)
            assert norm is not None
            with torch.no_grad():
                norm.weight *= alpha
                norm.bias *= alpha
            expected = scaled.state_dict()
            assert expected.keys() == mine.state_dict().keys()
            for name, value in mine.state_dict().items():
                torch.testing.assert_close(value, expected[name], rtol=1e-15, atol=0)
            position += 1
    assert position == len(ours.ops) == 8  # No other operation is kept.


def test_it_is_an_ordinary_target_network() -> None:
    """Its weights load strictly into a network of the genotype. It is in eval mode and can be trained."""
    net = trained(spread(CellSpace(), 0), auxiliary=True)
    absorbed = absorb_into_batchnorm(net.train())
    assert not any(module.training for module in absorbed.modules())
    fresh = TargetNet(net.genotype(), 2, 3, 5, op_batchnorm=True, auxiliary=True).double()
    fresh.load_state_dict(absorbed.state_dict())
    x = rand(2, 3, 8, 8)
    assert torch.equal(fresh.eval()(x), absorbed(x))
    assert all(p.requires_grad for p in absorbed.parameters())
    assert absorbed.drop_path_prob == 0.0


def test_the_supernet_is_not_changed_and_shares_no_memory() -> None:
    net = trained(spread(CellSpace(), 0), auxiliary=True).train()
    before = copy.deepcopy(net.state_dict())
    asks = [p.requires_grad for p in net.parameters()]
    absorbed = absorb_into_batchnorm(net)
    for _ in range(2):  # The second time after all tensors of the result have been overwritten.
        after = net.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert [p.requires_grad for p in net.parameters()] == asks
        assert net.training
        assert net.node_states == states(net.space, FROZEN)
        with torch.no_grad():
            for value in absorbed.state_dict().values():
                value.zero_()
    storages = {value.untyped_storage().data_ptr() for value in net.state_dict().values()}
    assert storages.isdisjoint(value.untyped_storage().data_ptr() for value in absorbed.state_dict().values())


def test_parameters_of_the_published_cell_at_cifar_settings() -> None:
    """3,371,806 for the published cell with batch norm after every pooling and identity."""
    genotype, space = PUBLISHED["ISTA_onestage"], CellSpace()
    supports = {
        cell: [
            tuple(sorted(space.candidate(node, state, space.ops.index(op)) for op, state in picks))
            for node, picks in enumerate(genotype.picks(cell))
        ]
        for cell in CELLS
    }
    net = Supernet(space, 36, 20, 10, op_batchnorm=True, auxiliary=True)
    net.install_codes(codes_of(space, supports), states(space, FROZEN))
    assert net.genotype().digest() == genotype.digest()
    assert count_params(absorb_into_batchnorm(net)) == 3_371_806


# --- errors ---


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("node", [0, 3])
def test_a_node_that_is_still_active_is_refused(cell: str, node: int) -> None:
    space = CellSpace()
    net = Supernet(space, 2, 3, 5, op_batchnorm=True)
    nodes = states(space, FROZEN)
    nodes[cell][node] = ACTIVE
    net.install_codes(codes_of(space, spread(space, 0)), nodes)
    message = rf"node {node} of the {cell} cell is still ACTIVE, not FROZEN; finish the search first"
    with pytest.raises(ConfigError, match=message) as caught:
        absorb_into_batchnorm(net)
    assert "\n" not in str(caught.value)


def test_a_supernet_whose_operations_end_in_no_batch_norm_is_refused() -> None:
    space = CellSpace()
    net = Supernet(space, 2, 3, 5)
    net.install_codes(codes_of(space, spread(space, 0)), states(space, FROZEN))
    with pytest.raises(ConfigError, match=r"op_batchnorm: false, .*method: one_stage") as caught:
        absorb_into_batchnorm(net)
    assert "\n" not in str(caught.value)


def test_a_supernet_without_codes_is_refused() -> None:
    with pytest.raises(ConfigError, match="still ACTIVE"):
        absorb_into_batchnorm(Supernet(CellSpace(), 2, 3, 5, op_batchnorm=True))
