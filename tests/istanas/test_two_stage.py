"""Two-stage search: what a step changes, what recovery certifies, and resuming."""

import copy
import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from istanas.data import Batch
from istanas.errors import CheckpointError, ConfigError, DataError
from istanas.nets import NodeCode, Supernet
from istanas.search import NodeReport, RecoveryReport, TwoStageSearch, TwoStageSettings
from istanas.search.alternating import endless
from istanas.search.sparse_coding import codes_from_state, codes_to_state, draw_matrices
from istanas.space import CELLS, CellSpace
from istanas.sparse import duality_gap, recover, top_support
from istanas.training import Compute, Totals, learning_rate

CPU = Compute(torch.device("cpu"))
# The alphas move fast, so that an epoch of a few steps changes the architecture.
FAST = TwoStageSettings(epochs=3, arch_lr=0.02, alphas_scale=0.1)


def make_search(
    settings: TwoStageSettings = FAST,
    *,
    space: CellSpace | None = None,
    seed: int = 0,
    weights_seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> TwoStageSearch:
    torch.manual_seed(weights_seed)
    net = Supernet(space or CellSpace(), 2, 3, 5, n_measurements=settings.n_measurements, in_channels=1).to(
        dtype
    )
    return TwoStageSearch(net, settings, CPU, seed)


def batch(seed: int, n: int = 4, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return Batch(images, torch.randint(5, (n,), generator=generator))


def batches(epoch: int, n: int = 3) -> list[Batch]:
    return [batch(100 * epoch + i) for i in range(n)]


def run_epoch(search: TwoStageSearch, n_alpha: int = 3) -> RecoveryReport:
    epoch = search.epoch
    search.train_epoch(batches(epoch), lambda: batches(50 + epoch, n_alpha), n_steps=3)
    return search.recover()


def totals() -> Totals:
    return Totals(torch.device("cpu"))


def parts(net: Supernet) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return copies of (weights and buffers of inactive operations, all others except the alphas)."""
    plans = net._plans
    active = {
        f"cells.{i}.ops.{edge}.{op}."
        for i, cell in enumerate(net.cells)
        for node in plans[cell.kind]
        for _, edge, op in node
    }
    inactive, rest = {}, {}
    for name, value in net.state_dict().items():
        if name.startswith("compressed_alphas"):
            continue
        is_active = ".ops." not in name or any(name.startswith(prefix) for prefix in active)
        (rest if is_active else inactive)[name] = value.clone()
    return inactive, rest


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def codes_for(search: TwoStageSearch, supports: list[tuple[int, ...]]) -> dict[str, list[NodeCode]]:
    """Return the search's codes with these supports in both cells."""
    return {
        cell: [
            dataclasses.replace(code, support=s) for code, s in zip(search.codes[cell], supports, strict=True)
        ]
        for cell in CELLS
    }


# --- the two steps ---


def test_weight_step_leaves_inactive_operations_bit_for_bit() -> None:
    """They have no gradient and no optimiser state, and no decay, momentum or running statistics change them."""
    search = make_search(dataclasses.replace(FAST, weight_decay=0.1))
    inactive, rest = parts(search.supernet)
    for i in range(3):
        search.weight_step(batch(i), totals())
    after_inactive, after_rest = parts(search.supernet)
    assert len(inactive) > 100
    assert equal(inactive, after_inactive)
    assert not equal(rest, after_rest)
    active = {id(p) for p in search.supernet.active_parameters()}
    for p in search.weights:
        assert (p.grad is not None) == (id(p) in active)
        assert (p in search.weight_optimizer.state) == (id(p) in active)


def test_weights_that_become_inactive_get_neither_decay_nor_momentum() -> None:
    """Neither its momentum nor weight decay changes an operation that has become inactive."""
    search = make_search(dataclasses.replace(FAST, weight_decay=0.1))
    a = [(3, 10), (3, 10), (3, 10), (3, 10)]
    b = [(4, 12), (4, 12), (4, 12), (4, 12)]
    net = search.supernet
    net.install_codes(codes_for(search, a))
    search.weight_step(batch(0), totals())
    net.install_codes(codes_for(search, b))
    inactive, _ = parts(net)
    buffers = {id(p): state["momentum_buffer"].clone() for p, state in search.weight_optimizer.state.items()}
    in_b = {id(p) for p in net.active_parameters()}
    left = [p for p in search.weights if id(p) in buffers and id(p) not in in_b]
    assert left
    search.weight_step(batch(1), totals())
    assert equal(inactive, parts(net)[0])
    for p in left:
        assert p.grad is None
        assert torch.equal(search.weight_optimizer.state[p]["momentum_buffer"], buffers[id(p)])


def test_optimiser_state_of_an_op_that_comes_back_is_used() -> None:
    """When an operation becomes active again, its first step uses the momentum of its last one."""
    s = dataclasses.replace(FAST, grad_clip=None)
    search = make_search(s, dtype=torch.float64)
    net, optimizer = search.supernet, search.weight_optimizer
    a, b = [(3, 10)] * 4, [(4, 12)] * 4
    net.install_codes(codes_for(search, a))
    search.weight_step(batch(0, dtype=torch.float64), totals())
    net.install_codes(codes_for(search, b))
    search.weight_step(batch(1, dtype=torch.float64), totals())
    net.install_codes(codes_for(search, a))
    p = net.cells[0].ops[0][3].op[2].weight  # sep_conv_3x3 on the first edge, candidate 3 of node 0.
    before, buffer = p.detach().clone(), optimizer.state[p]["momentum_buffer"].clone()
    assert buffer.abs().sum() > 0
    search.weight_step(batch(2, dtype=torch.float64), totals())
    expected = s.momentum * buffer + p.grad + s.weight_decay * before
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(p.detach(), before - s.lr * expected, rtol=1e-12, atol=1e-14)


def test_weight_step_touches_no_alpha() -> None:
    search = make_search()
    search.weight_step(batch(0), totals())
    assert all(b.grad is None for b in search.alphas)
    search.alpha_step(batch(1))
    values = [b.detach().clone() for b in search.alphas]
    gradients = [b.grad for b in search.alphas]
    copies = [g.clone() for g in gradients if g is not None]
    search.weight_step(batch(2), totals())
    assert all(torch.equal(b, v) for b, v in zip(search.alphas, values, strict=True))
    for b, g, c in zip(search.alphas, gradients, copies, strict=True):
        assert b.grad is g  # The same tensor: no gradient was accumulated.
        assert torch.equal(b.grad, c)


def test_alpha_step_touches_no_weight() -> None:
    search = make_search()
    weights = [p.detach().clone() for p in search.weights]
    values = [b.detach().clone() for b in search.alphas]
    search.alpha_step(batch(0))
    assert all(p.grad is None for p in search.weights)
    assert not search.weight_optimizer.state
    assert all(torch.equal(p, w) for p, w in zip(search.weights, weights, strict=True))
    assert all(not torch.equal(b, v) for b, v in zip(search.alphas, values, strict=True))
    assert all(p.requires_grad for p in search.weights)
    search.weight_step(batch(1), totals())
    gradients = {p: p.grad.clone() for p in search.weights if p.grad is not None}
    search.alpha_step(batch(2))  # Gradients of the previous step are neither added to nor erased.
    assert gradients
    assert all(p.grad is not None and torch.equal(p.grad, g) for p, g in gradients.items())


def test_a_batchs_weight_scales_both_gradients_and_not_the_metrics() -> None:
    gradients, figures = [], []
    for weight in (1.0, 0.25):
        search = make_search(dataclasses.replace(FAST, grad_clip=None), dtype=torch.float64)
        seen = totals()
        one = batch(0, dtype=torch.float64)._replace(weight=weight)
        search.weight_step(one, seen)
        found = [p.grad for p in search.weights if p.grad is not None]
        search = make_search(dtype=torch.float64)
        search.alpha_step(one)
        found += [b.grad for b in search.alphas if b.grad is not None]
        gradients.append(torch.cat([g.flatten() for g in found]))
        figures.append(seen.metrics())
    assert gradients[0].norm() > 1e-3
    torch.testing.assert_close(gradients[1], 0.25 * gradients[0], rtol=1e-9, atol=1e-15)
    assert figures[0] == figures[1]


def test_steps_compute_no_unused_gradient() -> None:
    """torch's profiler shows that in an alpha step convolutions compute only input gradients."""
    search = make_search()

    def masks(step: Any) -> list[list[bool]]:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
            step()
        events = [e for e in profile.events() if e.name == "aten::convolution_backward"]
        return [e.concrete_inputs[-1] for e in events]

    alpha = masks(lambda: search.alpha_step(batch(0)))
    weight = masks(lambda: search.weight_step(batch(0), totals()))
    assert alpha
    assert all(mask == [True, False, False] for mask in alpha)
    assert all(mask[1] for mask in weight)


def test_alpha_step_is_adam_by_the_formula() -> None:
    """The first step with betas 0.5, 0.999 and decay 1e-3 gives b - lr g / (|g| + eps), where g includes decay."""
    settings = TwoStageSettings(epochs=1, alphas_scale=0.1)
    search = make_search(settings, dtype=torch.float64)
    net = search.supernet.train()
    before = [b.detach().clone() for b in search.alphas]
    x, t, _ = batch(0, dtype=torch.float64)
    reference = copy.deepcopy(net)
    reference.install_codes(search.codes)
    F.cross_entropy(reference(x).float(), t).backward()
    search.alpha_step((x, t))
    assert search.alpha_optimizer.defaults["betas"] == (0.5, 0.999)
    for b, old, ref in zip(search.alphas, before, reference.alphas(), strict=True):
        assert ref.grad is not None
        g = ref.grad + 1e-3 * old
        torch.testing.assert_close(b.detach(), old - 6e-4 * g / (g.abs() + 1e-8), rtol=1e-9, atol=1e-12)


def test_weights_are_clipped_by_their_own_norm() -> None:
    """Gradients of the alphas are not part of the norm."""
    clip = 0.01
    search = make_search(dataclasses.replace(FAST, grad_clip=clip))
    search.alpha_step(batch(0))
    for b in search.alphas:
        b.grad = torch.full_like(b, 1e6)
    search.weight_step(batch(1), totals())
    gradients = [p.grad.flatten() for p in search.weights if p.grad is not None]
    assert torch.cat(gradients).norm().item() == pytest.approx(clip, rel=1e-3)


def test_learning_rate_falls_step_by_step() -> None:
    search = make_search()
    seen: list[float] = []

    def observe(step: int, _: Totals) -> None:
        seen.append(search.weight_optimizer.param_groups[0]["lr"])

    for epoch in range(3):
        search.train_epoch(batches(epoch), lambda: batches(9), n_steps=3, observe=observe)
    assert seen == pytest.approx([learning_rate(FAST.lr, FAST.lr_min, i / 3, 3) for i in range(9)], rel=1e-12)
    assert seen[0] == FAST.lr
    assert search.alpha_optimizer.param_groups[0]["lr"] == FAST.arch_lr


# --- epochs ---


@pytest.mark.parametrize("n_alpha", [1, 2, 3, 5])
def test_alpha_half_of_another_length(n_alpha: int) -> None:
    """Every weight step has one alpha step. A shorter alpha half starts a new pass; a longer one is not used up."""
    search = make_search()
    passes = []

    def alpha_batches() -> Iterable[Batch]:
        passes.append(0)
        for b in batches(7, n_alpha):
            passes[-1] += 1
            yield b

    metrics = search.train_epoch(batches(0), alpha_batches, n_steps=3)
    assert metrics.count == 12
    assert sum(passes) == 3
    assert len(passes) == -(-3 // n_alpha)
    steps = [search.alpha_optimizer.state[b]["step"].item() for b in search.alphas]
    assert steps == [3] * 8
    assert search.epoch == 1


def test_endless_goes_round() -> None:
    a, b = batch(0), batch(1)
    assert list(itertools.islice(endless(lambda: [a, b]), 5)) == [a, b, a, b, a]


def test_alpha_half_without_batches_is_an_error_not_a_hang() -> None:
    with pytest.raises(DataError, match="alpha half has 0 batches; give"):
        make_search().train_epoch(batches(0), list, n_steps=3)


def test_epoch_metrics_are_the_means_of_the_weight_steps() -> None:
    search, twin = make_search(), make_search()
    found = search.train_epoch(batches(0), lambda: batches(50), n_steps=3)
    sums = [0.0, 0, 0]
    twin.supernet.train()
    for i, ((x, t, _), alpha_batch) in enumerate(zip(batches(0), batches(50), strict=True)):
        twin.alpha_step(alpha_batch)
        logits = copy.deepcopy(twin.supernet)(
            x
        )  # A copy, because the forward pass changes running statistics.
        sums[0] += F.cross_entropy(logits, t, reduction="sum").item()
        sums[1] += int((logits.argmax(1) == t).sum())
        sums[2] += len(t)
        for group in twin.weight_optimizer.param_groups:
            group["lr"] = learning_rate(FAST.lr, FAST.lr_min, i / 3, 3)
        twin.weight_step((x, t), totals())  # A pair has the weight 1.
    assert found.loss == pytest.approx(sums[0] / 12, rel=1e-5)
    assert found.top1 == sums[1] / 12
    assert found.count == sums[2] == 12


def test_validation_is_in_eval_mode_and_changes_nothing() -> None:
    search = make_search()
    search.train_epoch(batches(0), lambda: batches(50), n_steps=3)
    before = {k: v.clone() for k, v in search.supernet.state_dict().items()}
    one = search.validate(batches(8))
    assert equal(before, dict(search.supernet.state_dict()))
    x, t = (torch.cat(part) for part in zip(*(b[:2] for b in batches(8)), strict=True))
    with torch.no_grad():
        logits = search.supernet.eval()(x)
    assert one.loss == pytest.approx(F.cross_entropy(logits, t).item(), rel=1e-5)
    assert one.top1 == int((logits.argmax(1) == t).sum()) / 12


# --- recovery ---


@pytest.mark.parametrize("solver", ["homotopy", "clarabel"])
def test_recovery_is_certified_and_equals_an_independent_one(solver: str) -> None:
    search = make_search(dataclasses.replace(FAST, solver=solver))
    report = run_epoch(search)
    assert len(report.nodes) == 8
    for r in report.nodes:
        code = search.codes[r.cell][r.node]
        A, z = code.measurement_matrix.numpy(), code.sparse_code.numpy()
        b = search.supernet.compressed_alphas[r.cell][r.node].detach().double().numpy()
        assert r.gap <= 1e-9
        assert r.converged
        # With padding, sums are rounded differently, by about 1e-15 of P(0).
        assert float(duality_gap(A, b, z)) == pytest.approx(r.gap, rel=1e-3, abs=1e-14)
        other = recover(A, b, solver="clarabel" if solver == "homotopy" else "homotopy")
        np.testing.assert_allclose(z, other.z, atol=1e-4 * np.linalg.norm(z))
        support = top_support(other.z, 2)
        assert code.support == tuple(support.tolist())
        rest = np.delete(z, support)
        assert r.truncation == pytest.approx(np.linalg.norm(rest))
        assert r.margin == np.abs(z[support]).min() - np.abs(rest).max() > 0
        expected = (A.T @ b - (A.T @ A - np.eye(A.shape[1])) @ (z - _outside(z, support)))[support]
        np.testing.assert_allclose(r.edge_weights, expected, rtol=1e-5, atol=1e-6)
        space = search.supernet.space
        assert r.picks == [f"{space.ops[op]}<-{state}" for state, op in map(space.split, code.support)]


def _outside(z: Any, support: Any) -> Any:
    rest = z.copy()
    rest[support] = 0.0
    return rest


def test_support_changes_and_distances_are_those_of_the_codes() -> None:
    search = make_search()
    assert search.first_recovery.metrics()["recovery/support_changes"] == 0.0
    assert search.first_recovery.metrics()["recovery/distance"] == 0.0
    changes = []
    for _ in range(3):
        before, genotype = search.codes, search.supernet.genotype()
        report = run_epoch(search)
        for r in report.nodes:
            old, new = before[r.cell][r.node], search.codes[r.cell][r.node]
            assert r.changed == (set(old.support) != set(new.support))
            assert r.distance == pytest.approx((new.sparse_code - old.sparse_code).norm().item())
        metrics = report.metrics()
        assert metrics["recovery/support_changes"] == sum(r.changed for r in report.nodes)
        assert metrics["recovery/distance"] == max(r.distance for r in report.nodes)
        assert metrics["recovery/gap"] == max(r.gap for r in report.nodes)
        assert metrics["recovery/truncation"] == max(r.truncation for r in report.nodes)
        assert metrics["recovery/margin"] == min(r.margin for r in report.nodes if r.margin is not None)
        assert (search.supernet.genotype() != genotype) == (metrics["recovery/support_changes"] > 0)
        changes.append(metrics["recovery/support_changes"])
    assert sum(changes) > 0  # The codes of this search change.


def test_recovering_twice_changes_nothing() -> None:
    search = make_search()
    run_epoch(search)
    genotype = search.supernet.genotype()
    again = search.recover()
    assert search.supernet.genotype() == genotype
    assert again.metrics()["recovery/distance"] <= 1e-8
    assert again.metrics()["recovery/support_changes"] == 0


@pytest.mark.parametrize("one_op_per_edge", [True, False])
def test_one_op_per_edge_holds_through_a_search(one_op_per_edge: bool) -> None:
    shared = 0
    for seed in range(3):
        search = make_search(space=CellSpace(one_op_per_edge=one_op_per_edge), seed=seed)
        run_epoch(search)
        for cell in CELLS:
            for node in search.supernet.genotype().picks(cell):
                shared += len(node) - len({state for _, state in node})
    assert (shared == 0) == one_op_per_edge  # The rule has an effect here.


@pytest.mark.parametrize(("sparsity", "m"), [(1, 7), (3, 7), (2, 1), (2, 40)])
def test_other_sparsities_and_measurements(sparsity: int, m: int) -> None:
    search = make_search(dataclasses.replace(FAST, n_measurements=m), space=CellSpace(sparsity=sparsity))
    run_epoch(search)
    genotype = search.supernet.genotype()
    assert {len(node) for cell in CELLS for node in genotype.picks(cell)} == {sparsity}


def test_termination() -> None:
    def report(*distances: float) -> RecoveryReport:
        nodes = [
            NodeReport("normal", i, ["a<-0"], [0.1], d, 0.0, 0.0, False, True)
            for i, d in enumerate(distances)
        ]
        return RecoveryReport(nodes)

    never = make_search()
    stops = make_search(dataclasses.replace(FAST, termination_tol=1e-3))
    assert stops.has_converged(report(0.0, 1e-3))
    assert not stops.has_converged(report(0.0, 1.01e-3))
    assert not never.has_converged(report(0.0, 0.0))


def test_a_search_whose_alphas_stand_still_stops_and_another_does_not() -> None:
    still = make_search(dataclasses.replace(FAST, arch_lr=0.0, termination_tol=1e-3))
    assert still.has_converged(run_epoch(still))
    moving = make_search(dataclasses.replace(FAST, termination_tol=1e-3))
    assert not moving.has_converged(run_epoch(moving))


# --- seeds ---


def matrices(search: TwoStageSearch) -> list[Tensor]:
    return [code.measurement_matrix for cell in CELLS for code in search.codes[cell]]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_matrices_follow_their_own_seed_and_alphas_the_search_s() -> None:
    base = make_search()
    other_seed = make_search(seed=1)
    other_matrix = make_search(dataclasses.replace(FAST, matrix_seed=1))
    other_weights = make_search(weights_seed=1)
    assert same(matrices(base), matrices(other_seed))
    assert same(matrices(base), matrices(other_weights))
    assert not any(torch.equal(a, b) for a, b in zip(matrices(base), matrices(other_matrix), strict=True))
    assert same(base.alphas, other_matrix.alphas)
    assert same(base.alphas, other_weights.alphas)
    assert not any(torch.equal(a, b) for a, b in zip(base.alphas, other_seed.alphas, strict=True))
    assert same(matrices(base), matrices(make_search()))


def test_every_node_has_a_matrix_and_alphas_of_its_own() -> None:
    drawn = draw_matrices(CellSpace(ops=("skip_connect",), n_nodes=4, sparsity=1), 7, "uniform", 0)
    firsts = [A[:, 0] for cell in CELLS for A in drawn[cell]]
    rows = [row for b in make_search().alphas for row in b.detach()]
    for group in (firsts, rows):
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(group, 2))


def test_published_start() -> None:
    """A is uniform in [0, 1) with 7 rows, and b has the scale 1e-3."""
    search = make_search(TwoStageSettings())
    values = torch.cat([A.flatten() for A in matrices(search)])
    assert 0.0 <= values.min() < 0.01
    assert 0.99 < values.max() < 1.0
    assert [A.shape for A in matrices(search)[:4]] == [(7, 14), (7, 21), (7, 28), (7, 35)]
    deviation = torch.cat([b.detach().flatten() for b in search.alphas]).std().item()
    assert 0.6e-3 < deviation < 1.5e-3


# --- resuming ---


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """Return every leaf of nested containers by its path."""
    if isinstance(state, dict):
        items: Iterable[tuple[Any, Any]] = state.items()
    elif isinstance(state, list | tuple):
        items = enumerate(state)
    else:
        return {prefix: state}
    return {k: v for key, value in items for k, v in flat(value, f"{prefix}/{key}").items()}


def assert_identical(a: Any, b: Any) -> None:
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, Tensor):
            assert value.dtype == b[key].dtype, key
            assert torch.equal(value, b[key]), key
        else:
            assert value == b[key], key


def test_resumed_search_is_bit_identical(tmp_path: Path) -> None:
    """Two epochs equal one epoch, loaded with weights_only into an object of other seeds, and another one."""
    straight, stopped = make_search(), make_search()
    run_epoch(straight)
    run_epoch(stopped)
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    # Weights, alphas and matrices differ, so that all of them must be restored.
    resumed = make_search(dataclasses.replace(FAST, matrix_seed=9), seed=9, weights_seed=9)
    resumed.load_state_dict(state)
    assert_identical(resumed.state_dict(), stopped.state_dict())
    assert resumed.supernet.genotype() == stopped.supernet.genotype()
    reports = run_epoch(straight), run_epoch(resumed)
    assert reports[0] == reports[1]
    assert_identical(straight.state_dict(), resumed.state_dict())
    assert straight.validate(batches(8)) == resumed.validate(batches(8))
    assert straight.epoch == resumed.epoch == 2


def test_codes_round_trip() -> None:
    codes = make_search().codes
    back = codes_from_state(codes_to_state(codes))
    for cell in CELLS:
        for a, b in zip(codes[cell], back[cell], strict=True):
            assert torch.equal(a.measurement_matrix, b.measurement_matrix)
            assert torch.equal(a.sparse_code, b.sparse_code)
            assert a.support == b.support


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "one_stage"}, "'one_stage' version 2 is not 'two_stage' version 2"),
        ({"kind": None}, "checkpoint: None version"),
        ({"version": 1}, "checkpoint: 'two_stage' version 1"),
    ],
)
def test_state_of_another_kind_is_refused_untouched(change: dict[str, Any], message: str) -> None:
    search = make_search()
    before = copy.deepcopy(search.state_dict())
    other = make_search(seed=1).state_dict() | change
    with pytest.raises(CheckpointError, match=message) as caught:
        search.load_state_dict(other)
    assert "\n" not in str(caught.value)
    assert_identical(search.state_dict(), before)


def test_search_refuses_a_matrix_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="unknown matrix 'bernoulli'; choose from uniform, gaussian"):
        make_search(dataclasses.replace(FAST, matrix="bernoulli"))


@pytest.mark.parametrize("matrix", ["uniform", "gaussian"])
def test_search_learns(matrix: str) -> None:
    """In eight epochs on one batch the loss falls although the architecture changes."""
    search = make_search(TwoStageSettings(epochs=8, lr=0.05, matrix=matrix, alphas_scale=0.1))
    one = batch(0, n=10)
    losses = []
    for _ in range(8):
        losses.append(search.train_epoch([one] * 4, lambda: [one], n_steps=4).loss)
        search.recover()
    assert losses[-1] < 0.8 * losses[0]


def test_names_in_checkpoints() -> None:
    """A renamed layer would make every checkpoint unreadable."""
    names = make_search().supernet.state_dict().keys()
    assert {"stem.stem.0.weight", "cells.0.ops.0.3.op.1.weight", "compressed_alphas.normal.0"} <= names
