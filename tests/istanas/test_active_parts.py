"""Active parts of a supernet: an inactive operation costs nothing, and the others are weighted by the codes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from istanas.nets import Supernet
from istanas.nets.operations import FactorizedReduce
from istanas.space import PRIMITIVES
from tests.istanas.supernets import SUPPORTS, counted, rand, supernet


def active_prefixes(net: Supernet, supports: dict[str, list[tuple[int, ...]]]) -> list[str]:
    """Return the names of the active operations, derived from the supports alone."""
    names = []
    for i, cell in enumerate(net.cells):
        for node, support in enumerate(supports[cell.kind]):
            first_edge = sum(range(2, node + 2))
            for candidate in support:
                state, op = divmod(candidate, net.space.n_ops)
                names.append(f"cells.{i}.ops.{first_edge + state}.{op}.")
    return names


def test_forward_runs_exactly_the_active_modules() -> None:
    net = supernet(SUPPORTS)
    active = active_prefixes(net, SUPPORTS)
    assert len(active) == 3 * 8
    with counted(net) as calls:
        net(rand(2, 3, 16, 16))
    # The ReLU at the beginning of a block never runs, because the rectified state is shared.
    ops = {n: c for n, c in calls.items() if ".ops." in n and not n.endswith(".op.0")}
    for name, n_calls in ops.items():
        assert n_calls == any(f"{name}.".startswith(prefix) for prefix in active), name
    fixed = {n for n in calls if n.startswith(("stem.", "cells.", "classifier")) and ".ops." not in n}
    assert {calls[n] for n in fixed if not n.endswith(".op.0")} == {1}


def test_profiler_counts_only_the_active_convolutions() -> None:
    """torch's profiler counts the convolutions and pools that ran, forward and backward."""
    net = supernet(SUPPORTS)
    convolutions = {"sep_conv_3x3": 4, "sep_conv_5x5": 4, "dil_conv_3x3": 2, "dil_conv_5x5": 2}
    expected_convs, expected_pools = 1, 0  # The stem.
    for cell in net.cells:
        expected_convs += 3 if cell.preprocess0.__class__ is FactorizedReduce else 2
        for support in SUPPORTS[cell.kind]:
            for candidate in support:
                state, op = divmod(candidate, 7)
                name = PRIMITIVES[op]
                expected_pools += name.endswith("pool_3x3")
                expected_convs += convolutions.get(name, 0)
                if name == "skip_connect" and cell.kind == "reduce" and state < 2:
                    expected_convs += 2
    x = rand(2, 3, 16, 16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        net(x).sum().backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::convolution"] == expected_convs
    assert counts["aten::convolution_backward"] == expected_convs
    pools = sum(counts.get(key, 0) for key in ("aten::max_pool2d", "aten::avg_pool2d"))
    assert pools == expected_pools


def test_supernet_is_the_weighted_sum_of_its_active_operations() -> None:
    """state_j is the sum over its picks of alpha_e op_e(state_i)."""
    net = supernet(SUPPORTS).eval()
    cell, weights = net.cells[0], net.edge_weights()["normal"]
    s = rand(2, 6, 8, 8)
    states = [cell.preprocess0(s), cell.preprocess1(s)]
    for node, support in enumerate(SUPPORTS["normal"]):
        total = torch.zeros_like(states[0])
        for alpha, candidate in zip(weights[node], support, strict=True):
            state, op = divmod(candidate, 7)
            total = total + alpha * cell.ops[sum(range(2, node + 2)) + state][op](states[state])
        states.append(total)
    ours = cell(F.relu(s), F.relu(s), range(6), net._plans["normal"], weights, 0.0)
    torch.testing.assert_close(ours, torch.cat(states[2:], 1), rtol=1e-12, atol=1e-12)


def test_supernet_genotype_follows_the_codes() -> None:
    g = supernet(SUPPORTS).genotype()
    assert g.normal[0] == (("skip_connect", 0), ("sep_conv_3x3", 1))
    assert g.normal[3] == (("dil_conv_3x3", 3), ("dil_conv_3x3", 4))
    assert g.reduce[2] == (("dil_conv_3x3", 1), ("dil_conv_5x5", 1))  # Two picks on one edge.


def test_gradient_of_compressed_alphas_by_finite_differences() -> None:
    """Compute d loss / d b in float64 in training mode. The code z is a constant, as published."""
    net = supernet(SUPPORTS).train()
    x, target = rand(3, 3, 8, 8), torch.tensor([0, 1, 4])

    def loss() -> Tensor:
        return F.cross_entropy(net(x), target)

    loss().backward()
    step = 1e-6
    for b in net.alphas():
        assert b.grad is not None
        numeric = torch.zeros_like(b)
        with torch.no_grad():
            for i in range(b.numel()):
                original = b.view(-1)[i].item()
                values = []
                for sign in (1, -1):
                    b.view(-1)[i] = original + sign * step
                    values.append(loss().item())
                b.view(-1)[i] = original
                numeric.view(-1)[i] = (values[0] - values[1]) / (2 * step)
        assert float((numeric - b.grad).norm() / b.grad.norm()) < 1e-6
