"""DARTS against literal implementations of its mixed operation, its top-2 rule and its second-order gradient."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from istanas.data import Batch
from istanas.nets import Supernet
from istanas.search import darts
from istanas.search.darts import DartsSearch, restore
from istanas.search.selection import strongest
from istanas.settings import DartsSettings
from istanas.space import CellSpace, Decision
from istanas.training import Compute, Totals

CPU = Compute(torch.device("cpu"))
SPACE = CellSpace(n_nodes=2)


def make_search(space: CellSpace = SPACE, **settings: Any) -> DartsSearch:
    torch.manual_seed(0)
    net = Supernet(space, 2, 3, 5, in_channels=1, alpha_size=lambda decision: decision.n_candidates).double()
    return DartsSearch(net, DartsSettings(epochs=3, **settings), CPU, 0)


def batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.float64)
    return Batch(images, torch.randint(5, (4,), generator=generator))


def spread_alphas(search: DartsSearch) -> None:
    """Give the alphas values that differ clearly."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for alphas in search.alphas:
            alphas.copy_(torch.randn(len(alphas), generator=generator, dtype=torch.float64))


def literal_logits(net: Supernet, x: Tensor) -> Tensor:
    """Return the logits of the published search network: every edge is a mixed operation."""
    n_ops = net.space.n_ops
    s0 = s1 = net.stem.stem(x)
    for cell in net.cells:
        states = [cell.preprocess0(s0), cell.preprocess1(s1)]
        edge = 0
        for alphas in net.node_alphas(cell.kind):
            weights = alphas.view(-1, n_ops).softmax(-1)
            node = 0.0
            for j, row in enumerate(weights):
                node = node + sum(w * op(states[j]) for w, op in zip(row, cell.ops[edge + j], strict=True))
            edge += len(weights)
            states.append(node)
        s0, s1 = s1, torch.cat(states[2:], 1)
    return net.classifier(s1.mean((2, 3)))


def test_the_network_mixes_operations_by_the_softmax_of_each_edge() -> None:
    search = make_search()
    spread_alphas(search)
    net = search.supernet
    x, labels, _ = batch(0)
    ours, literal = net(x), literal_logits(net, x)
    torch.testing.assert_close(ours, literal, rtol=1e-10, atol=1e-12)
    parameters = list(net.parameters())
    gradients = [torch.autograd.grad(F.cross_entropy(y, labels), parameters) for y in (ours, literal)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-12)


def test_validation_measures_the_mixed_network() -> None:
    search = make_search()
    spread_alphas(search)
    one = batch(5)
    found = search.validate([one])
    with torch.no_grad():
        loss = F.cross_entropy(literal_logits(search.supernet.eval(), one.images), one.labels)
    assert found.loss == pytest.approx(loss.item(), rel=1e-9)


def test_initial_alphas_are_small_and_follow_from_the_seed() -> None:
    values = torch.cat([alphas.detach() for alphas in make_search(CellSpace()).alphas])
    assert values.std().item() == pytest.approx(1e-3, rel=0.2)
    assert torch.equal(values, torch.cat([alphas.detach() for alphas in make_search(CellSpace()).alphas]))


# ---------- the second-order gradient


def loss_of(net: Supernet, one: Batch) -> Tensor:
    return F.cross_entropy(net(one.images), one.labels)


def literal_second_order(search: DartsSearch, train: Batch, valid: Batch, xi: float) -> list[Tensor]:
    """Return the gradient of the alphas as the published `Architect` computes it, r = 1e-2."""
    s, net = search.settings, copy.deepcopy(search.supernet)
    net.install(net._supports, search.weigh)
    weights, alphas = net.weights(), net.alphas()
    state = search.weight_optimizer.state
    moments = [s.momentum * state[w]["momentum_buffer"] for w in search.weights]
    gradients = torch.autograd.grad(loss_of(net, train), weights)
    with torch.no_grad():
        moved = [
            w - xi * (m + g + s.weight_decay * w) for w, m, g in zip(weights, moments, gradients, strict=True)
        ]
    unrolled = copy.deepcopy(net)
    unrolled.install(unrolled._supports, search.weigh)
    with torch.no_grad():
        for w, value in zip(unrolled.weights(), moved, strict=True):
            w.copy_(value)
    unrolled_loss = loss_of(unrolled, valid)
    vector = torch.autograd.grad(unrolled_loss, unrolled.weights(), retain_graph=True)
    first = torch.autograd.grad(unrolled_loss, unrolled.alphas())
    eps = 1e-2 / torch.cat([v.flatten() for v in vector]).norm()

    def gradient_at(sign: int) -> Sequence[Tensor]:
        with torch.no_grad():
            for w, v in zip(weights, vector, strict=True):
                w.add_(sign * eps * v)
        found = torch.autograd.grad(loss_of(net, train), alphas)
        with torch.no_grad():
            for w, v in zip(weights, vector, strict=True):
                w.sub_(sign * eps * v)
        return found

    plus, minus = gradient_at(1), gradient_at(-1)
    return [f - xi * (p - m) / (2 * eps) for f, p, m in zip(first, plus, minus, strict=True)]


def test_the_second_order_gradient_is_the_published_one() -> None:
    search = make_search(second_order=True)
    spread_alphas(search)
    search.supernet.train()
    search.weight_step(batch(0), Totals(CPU.device))  # The momentum is not zero from now on.
    train, valid, xi = batch(1), batch(2), search.weight_optimizer.param_groups[0]["lr"]
    expected = literal_second_order(search, train, valid, xi)
    weights = [w.detach().clone() for w in search.weights]
    search.unrolled_alpha_step(valid, train)
    assert all(torch.equal(w, old) for w, old in zip(search.weights, weights, strict=True))
    for alphas, gradient in zip(search.alphas, expected, strict=True):
        assert alphas.grad is not None
        torch.testing.assert_close(alphas.grad, gradient, rtol=1e-6, atol=1e-10)
    # It differs from the first-order gradient, and by more than the tolerance.
    first = torch.autograd.grad(loss_of(search.supernet, valid), search.alphas)
    assert max((a - b).abs().max() for a, b in zip(first, expected, strict=True)) > 1e-5


def test_the_finite_difference_is_the_mixed_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed derivatives are symmetric: the same number follows from the weights' gradients at two values of the alphas.

    With the published step, kinks of ReLU and max pooling lie between both sides, so that the test uses a shorter one.
    """
    monkeypatch.setattr(darts, "FINITE_DIFFERENCE", 1e-5)
    search = make_search(second_order=True)
    spread_alphas(search)
    net, train, weights, alphas = search.supernet.train(), batch(1), search.weights, search.alphas
    generator = torch.Generator().manual_seed(2)
    along_w, along_a = (
        [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in each]
        for each in (weights, alphas)
    )

    def slope_at(shift: float) -> float:
        """Return the derivative of the loss along the weights' directions, with shifted alphas."""
        values = [a.detach().clone() for a in alphas]
        restore(alphas, [a + shift * u for a, u in zip(values, along_a, strict=True)])
        gradients = torch.autograd.grad(loss_of(net, train), weights)
        restore(alphas, values)
        return sum((g * d).sum().item() for g, d in zip(gradients, along_w, strict=True))

    found = search._second_derivatives(weights, [w.detach().clone() for w in weights], along_w, train)
    ours = sum((f * u).sum().item() for f, u in zip(found, along_a, strict=True))
    assert ours == pytest.approx((slope_at(1e-6) - slope_at(-1e-6)) / 2e-6, rel=1e-6)


def test_the_weights_of_one_step_ahead_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their forward pass does not change the running statistics, apart from the count of batches, which is not used."""
    search = make_search(second_order=True)
    twin = make_search()
    for each in (search, twin):
        each.supernet.train()
    zeros = [torch.zeros_like(alphas) for alphas in search.alphas]
    monkeypatch.setattr(
        search, "_second_derivatives", lambda weights, before, *_: restored(weights, before, zeros)
    )
    train, valid = batch(1), batch(2)
    search.unrolled_alpha_step(valid, train)
    twin.supernet(train.images)
    for ours, others in zip(search.weights, twin.weights, strict=True):
        assert torch.equal(ours, others)
    for ours, others in zip(search.supernet.active_buffers(), twin.supernet.active_buffers(), strict=True):
        assert torch.equal(ours, others)
    twin.supernet(valid.images)
    found, moved = (s.supernet.stem.stem[1].running_mean for s in (search, twin))
    assert not torch.equal(found, moved), "the pass would have left a trace"


def restored(weights: Sequence[Tensor], before: Sequence[Tensor], result: list[Tensor]) -> list[Tensor]:
    restore(weights, before)
    return result


# ---------- the top-2 rule


def published_rule(weights: np.ndarray, ops: Sequence[str], keep: int) -> set[tuple[int, int]]:
    """Return the (edge, operation) of the published `genotype` for one node, given its weights (edges, ops)."""

    def best(row: np.ndarray) -> float:
        return max(row[k] for k in range(len(ops)) if ops[k] != "none")

    edges = sorted(range(len(weights)), key=lambda x: -best(weights[x]))[:keep]
    chosen = set()
    for j in edges:
        k_best = None
        for k in range(len(ops)):
            if ops[k] != "none" and (k_best is None or weights[j][k] > weights[j][k_best]):
                k_best = k
        assert k_best is not None
        chosen.add((j, k_best))
    return chosen


@pytest.mark.parametrize("ops", [("none", "skip", "conv", "pool"), ("skip", "conv", "none"), ("a", "b")])
def test_the_rule_is_the_published_one(ops: tuple[str, ...]) -> None:
    generator = np.random.default_rng(0)
    for case in range(200):
        n_edges, keep = 2 + case % 4, 1 + case % 2
        decision = Decision("cell", 0, tuple((op, j) for j in range(n_edges) for op in ops), keep)
        weights = generator.dirichlet(np.ones(len(ops)), n_edges)
        found = strongest(decision, weights.flatten().tolist())
        assert {divmod(c, len(ops)) for c in found} == published_rule(weights, ops, keep)
        assert list(found) == sorted(found)


@pytest.mark.parametrize(
    ("candidates", "keep", "one_per_edge", "strengths", "kept"),
    [
        # Two are kept of a single edge: the next strongest one follows, and `none` comes last.
        ((("none", 0), ("skip", 0), ("conv", 0)), 2, False, [0.8, 0.05, 0.15], (1, 2)),
        ((("none", 0), ("skip", 0), ("conv", 0)), 3, False, [0.8, 0.05, 0.15], (0, 1, 2)),
        # An edge that has nothing but `none` is used only if there is no other.
        ((("none", 0), ("skip", 1), ("conv", 1)), 2, False, [0.8, 0.05, 0.15], (1, 2)),
        ((("none", 0), ("skip", 1), ("conv", 1)), 2, True, [0.8, 0.05, 0.15], (0, 2)),
        # Of equal candidates the first is kept.
        ((("skip", 0), ("conv", 0), ("pool", 0)), 1, False, [0.2, 0.4, 0.4], (1,)),
    ],
)
def test_the_rule_where_edges_are_few(
    candidates: Any, keep: int, one_per_edge: bool, strengths: list[float], kept: tuple[int, ...]
) -> None:
    decision = Decision("block", 0, candidates, keep, one_per_edge=one_per_edge)
    assert strongest(decision, strengths) == kept


def test_the_architecture_changes_only_at_the_end_of_an_epoch() -> None:
    search = make_search()
    before = search.genotype()
    with torch.no_grad():
        for alphas in search.alphas:
            alphas.zero_()
            alphas[-1] = 3.0
            alphas[0] = 2.0
    assert search.genotype() == before
    old = [torch.tensor(node.magnitudes) for node in search.first_recovery.nodes]
    report = search.finish_epoch()
    last = SPACE.n_ops - 1
    for node, magnitudes in zip(report.nodes, old, strict=True):
        edges = SPACE.n_node_edges(node.node)
        expected = [f"{SPACE.ops[0]}<-0", f"{SPACE.ops[last]}<-{edges - 1}"]
        assert node.picks == expected
        assert node.changed
        assert node.distance == pytest.approx((torch.tensor(node.magnitudes) - magnitudes).norm().item())
        assert node.edge_weights == [node.magnitudes[0], node.magnitudes[-1]]
    assert search.genotype() != before
    assert search.finish_epoch().metrics() == {"recovery/distance": 0.0, "recovery/support_changes": 0.0}


def test_entropy_is_the_mean_over_the_edges() -> None:
    search = make_search()
    with torch.no_grad():
        for alphas in search.alphas:
            alphas.zero_()
    assert search.metrics()["arch/entropy"] == pytest.approx(math.log(SPACE.n_ops))
    with torch.no_grad():
        search.alphas[0][0] = 100.0  # one of the 10 edges of both cells is certain
    assert search.metrics()["arch/entropy"] == pytest.approx(0.9 * math.log(SPACE.n_ops))
