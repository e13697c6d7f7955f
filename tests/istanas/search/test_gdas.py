"""GDAS: its formulas against literal ones, and what a step computes and trains."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from istanas.nets import Supernet
from istanas.search.gdas import EdgeTable, GdasSearch, GdasSettings, gumbel_softmax, temperature
from istanas.search.selection import strongest
from istanas.space import CellSpace, Decision
from istanas.training import Compute, Totals

CPU = Compute(torch.device("cpu"))
SPACE = CellSpace(n_nodes=2, ops=("skip_connect", "sep_conv_3x3", "max_pool_3x3"))
FAST = GdasSettings(epochs=3, arch_lr=0.1, alphas_scale=0.1)


def make_search(settings: GdasSettings = FAST, dtype: torch.dtype = torch.float64) -> GdasSearch:
    torch.manual_seed(0)
    net = Supernet(SPACE, 2, 3, 5, in_channels=1, alpha_size=lambda d: d.n_candidates).to(dtype)
    return GdasSearch(net, settings, CPU, seed=0)


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 1, 8, 8, generator=generator).to(dtype), torch.arange(4)


def test_the_gumbel_softmax_is_equation_5_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    a, o, tau = rng.standard_normal(5), rng.gumbel(size=5), 0.7
    p = np.exp(a) / np.exp(a).sum()
    literal = np.exp((np.log(p) + o) / tau) / np.exp((np.log(p) + o) / tau).sum()
    found = gumbel_softmax(torch.as_tensor(a), torch.as_tensor(o), tau)
    np.testing.assert_allclose(found.numpy(), literal, rtol=1e-12)


def test_operations_are_sampled_with_the_probabilities_of_the_softmax() -> None:
    """The argmax of a + o has the distribution softmax(a), whatever the temperature."""
    a, rng = torch.tensor([0.0, 1.0, -1.0]), np.random.default_rng(1)
    noise = torch.as_tensor(rng.gumbel(size=(20000, 3)))
    for tau in (0.1, 10.0):
        counts = torch.bincount(gumbel_softmax(a, noise, tau).argmax(-1), minlength=3) / 20000
        torch.testing.assert_close(counts, a.softmax(0), rtol=0, atol=0.015)


def test_the_temperature_falls_linearly_from_10_to_a_tenth() -> None:
    taus = [temperature(e, 240, GdasSettings().tau_max, GdasSettings().tau_min) for e in range(240)]
    np.testing.assert_allclose(taus, np.linspace(10.0, 0.1, 240), rtol=1e-12)
    assert temperature(0, 1, 10.0, 0.1) == 10.0


def literal_alpha_gradients(search: GdasSearch, seed: int) -> dict[tuple[str, int], torch.Tensor]:
    """Return the gradients of the alphas, with one-hot weights 1 - h.detach() + h on the sampled operations."""
    net, (x, t) = search.supernet, batch(7)
    rng = np.random.Generator(np.random.PCG64(seed))
    weights: dict[str, list[torch.Tensor]] = {}
    supports: dict[str, list[tuple[int, ...]]] = {}
    n = len(SPACE.ops)
    alphas = {(k, i): net.node_alphas(k)[i] for k, i in search.places}
    for kind in SPACE.kinds:
        noise = torch.as_tensor(rng.gumbel(size=(SPACE.n_edges, n)))
        weights[kind], supports[kind], edge = [], [], 0
        for node in range(SPACE.n_nodes):
            kept, hard = [], []
            for state in range(node + 2):
                a = alphas[kind, node][state * n : (state + 1) * n]
                h = ((a.log_softmax(0) + noise[edge]) / search.tau).softmax(0)
                chosen = int(h.argmax())
                one_hot = F.one_hot(torch.tensor(chosen), n).to(h.dtype)
                hard.append((one_hot - h.detach() + h)[chosen])
                kept.append(state * n + chosen)
                edge += 1
            supports[kind].append(tuple(kept))
            weights[kind].append(torch.stack(hard))
    net.install(supports, lambda kind, _: weights[kind])
    gradients = torch.autograd.grad(F.cross_entropy(net(x).float(), t), list(alphas.values()))
    return dict(zip(alphas, gradients, strict=True))


def test_the_alphas_gradient_is_straight_through_the_sampled_operations() -> None:
    search = make_search()
    search.supernet.train()
    literal = literal_alpha_gradients(search, seed=5)
    search._install(5)
    weights = search.supernet.edge_weights()
    assert all(torch.equal(w, torch.ones_like(w)) for each in weights.values() for w in each)
    search.alpha_optimizer.zero_grad()
    F.cross_entropy(search.supernet(batch(7)[0]).float(), batch(7)[1]).backward()
    assert sum(float(g.abs().sum()) for g in literal.values()) > 1e-4
    for (kind, index), expected in literal.items():
        found = search.supernet.node_alphas(kind)[index].grad
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)


def test_a_step_computes_one_operation_per_edge_and_trains_only_those() -> None:
    search = make_search()
    before = {name: p.detach().clone() for name, p in search.supernet.named_parameters()}
    ran: set[str] = set()
    for name, module in search.supernet.named_modules():
        if ".ops." in name and name.count(".") == 4:
            module.register_forward_hook(lambda *_, name=name: ran.add(name))
    search.weight_step(batch(0), Totals(torch.device("cpu")))
    sampled = set()
    for i, cell in enumerate(search.supernet.cells):
        picks = [pick for node in search.supernet.plan(cell.kind) for pick in node]
        assert [edge for _, edge, _ in picks] == list(range(SPACE.n_edges))
        sampled |= {f"cells.{i}.ops.{edge}.{op}" for _, edge, op in picks}
    assert ran
    assert ran <= sampled
    trained = {
        name for name, p in search.supernet.named_parameters() if p.grad is not None and ".ops." in name
    }
    assert trained
    for name in before:
        if ".ops." in name and name not in trained:
            assert torch.equal(before[name], search.supernet.get_parameter(name))
    assert {".".join(name.split(".")[:5]) for name in trained} <= sampled


def test_both_steps_of_a_step_sample_their_own_architecture_by_its_number() -> None:
    search, seen = make_search(), []
    for step in (0, 1, 0):
        search.begin_step(step, 2)
        search._install(search.step_seed("alphas"))
        alphas = search.supernet.genotype()
        search._install(search.step_seed("weights"))
        seen.append((alphas, search.supernet.genotype()))
    assert seen[0] == seen[2]
    assert len({genotype for pair in seen for genotype in pair}) == 4


def test_the_table_of_edges_pads_and_sorts_candidates_of_any_order() -> None:
    mixed = Decision("block", 0, (("a", 1), ("a", 0), ("b", 1)), sparsity=1)
    table = EdgeTable([mixed], torch.device("cpu"))
    assert table.rows([torch.tensor([1.0, 2.0, 3.0])]).tolist() == [[2.0, -torch.inf], [1.0, 3.0]]
    # Edge 0 offers candidate 1, edge 1 candidate 0 or 2; the rows follow the ascending candidates.
    assert table.choice([0, 0]) == ([(0, 1)], [1, 0])
    assert table.choice([0, 1]) == ([(1, 2)], [0, 1])


@pytest.mark.parametrize(("sparsity", "kept"), [(1, (4,)), (2, (0, 4)), (3, (0, 3, 4)), (4, (0, 2, 3, 4))])
def test_the_strongest_edges_are_kept_and_then_other_operations(sparsity: int, kept: tuple[int, ...]) -> None:
    candidates = (("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2))
    decision = Decision("normal", 0, candidates, sparsity)
    assert strongest(decision, [0.6, 0.4, 0.48, 0.52, 0.9, 0.1]) == kept


def test_its_architecture_is_the_literal_top_two_rule() -> None:
    search = make_search()
    rng, n = np.random.default_rng(3), len(SPACE.ops)
    for b in search.alphas:
        b.data.copy_(torch.as_tensor(rng.standard_normal(len(b))))
    for kind in SPACE.kinds:
        for node, picks in enumerate(search.genotype().picks(kind)):
            rows = search.supernet.node_alphas(kind)[node].detach().view(-1, n).softmax(1).numpy()
            edges = sorted(range(len(rows)), key=lambda e: -rows[e].max())[: SPACE.sparsity]
            assert set(picks) == {(SPACE.ops[int(rows[e].argmax())], e) for e in edges}


def test_decay_and_momentum_leave_operations_that_are_not_sampled() -> None:
    search = make_search()
    for step in range(3):
        search.begin_step(step, 3)
        search.weight_step(batch(step), Totals(torch.device("cpu")))
    trained = set(search.weight_optimizer.state)
    untouched = [p for p in search.weights if p not in trained]
    assert untouched
    assert all(isinstance(p, nn.Parameter) and p.grad is None for p in untouched)
