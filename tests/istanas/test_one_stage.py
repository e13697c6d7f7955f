"""One-stage search: a step, affine parts and alphas, the two phases, reports, resumption, and several ranks."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from istanas.data import Batch
from istanas.distributed import Ranks
from istanas.errors import CheckpointError
from istanas.measure import Cost
from istanas.nets import Supernet, absorb_into_batchnorm
from istanas.nets.operations import SepConv
from istanas.search import OneStageSearch, OneStageSettings, RecoveryReport, TwoStageSearch, TwoStageSettings
from istanas.search.one_stage import CLOSING_EPOCHS
from istanas.search.sparse_coding import Place
from istanas.training import Totals, learning_rate
from tests.istanas.one_stage_searches import (
    CPU,
    FAST,
    FIRST,
    SECOND,
    SMALL,
    TOO_MANY,
    Size,
    b_of,
    batch,
    change,
    epoch_without_batches,
    freeze,
    make_search,
    move,
    totals,
)
from tests.istanas.test_distributed import freeze_batchnorm, gradients, loader
from tests.ranks import CountingRanks, Outcome, run_ranks


def run_epoch(search: OneStageSearch, n: int = 2) -> RecoveryReport:
    epoch = search.epoch
    torch.manual_seed(epoch)  # Seeds drop path, as the pipeline does.
    search.train_epoch([batch(100 * epoch + i) for i in range(n)], None, n)
    return search.recover()


# --- one step ---


def by_hand(search: OneStageSearch, one: Batch) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Return the gradients of the loss, that of the auxiliary head included, on a copy of the network."""
    net = copy.deepcopy(search.supernet).train()
    net.zero_grad()
    logits, auxiliary = net.forward_with_auxiliary(one.images)
    loss = F.cross_entropy(logits, one.labels)
    if auxiliary is not None:
        loss = loss + search.settings.auxiliary_weight * F.cross_entropy(auxiliary, one.labels)
    (one.weight * loss).backward()
    return [p.grad for p in net.weights()], [b.grad for b in net.alphas()]


@pytest.mark.parametrize("grad_clip", [None, 0.5])
def test_a_batch_updates_weights_by_sgd_and_alphas_by_adam(
    grad_clip: float | None,
) -> None:
    """Two steps follow the formulas with momentum, decay and bias correction. Alphas are not clipped."""
    s = change(grad_clip=grad_clip, weight_decay=0.01, auxiliary_weight=0.4)
    search = make_search(s, dtype=torch.float64, auxiliary=True)
    search.supernet.train()
    momentum: dict[int, Tensor] = {}
    m, v = ([torch.zeros_like(b) for b in search.alphas] for _ in range(2))
    for t, weight in ((1, 1.0), (2, 0.75)):
        one = batch(t, dtype=torch.float64)._replace(weight=weight)
        of_weights, of_alphas = by_hand(search, one)
        norm = torch.cat([g.flatten() for g in of_weights if g is not None]).norm()
        factor = 1.0 if grad_clip is None else float(grad_clip / (norm + 1e-6))
        assert factor <= 1.0
        expected_weights, expected_alphas = [], []
        for i, (p, g) in enumerate(zip(search.weights, of_weights, strict=True)):
            value = p.detach().clone()
            if g is not None:
                g = factor * g + s.weight_decay * value
                momentum[i] = s.momentum * momentum[i] + g if i in momentum else g
                value -= s.lr * momentum[i]
            expected_weights.append(value)
        for i, (b, g) in enumerate(zip(search.alphas, of_alphas, strict=True)):
            assert g is not None
            assert g.norm() > 0
            value = b.detach().clone()
            g = g + s.arch_weight_decay * value
            first, second = s.arch_betas
            m[i], v[i] = first * m[i] + (1 - first) * g, second * v[i] + (1 - second) * g * g
            unbiased = m[i] / (1 - first**t), v[i] / (1 - second**t)
            expected_alphas.append(value - s.arch_lr * unbiased[0] / (unbiased[1].sqrt() + 1e-8))
        search.step(one, totals())
        for ours, expected in ((search.weights, expected_weights), (search.alphas, expected_alphas)):
            for p, value in zip(ours, expected, strict=True):
                torch.testing.assert_close(p.detach(), value, rtol=1e-9, atol=1e-12)
    assert len(momentum) == len(search.supernet.active_parameters())


def test_the_auxiliary_loss_is_in_the_gradient_and_not_in_the_metrics() -> None:
    figures, norms = [], []
    for weight in (0.0, 0.4):
        search = make_search(change(auxiliary_weight=weight, grad_clip=None), auxiliary=True)
        seen = totals()
        search.supernet.train()
        search.step(batch(0), seen)
        figures.append(seen.metrics())
        head = search.supernet.auxiliary_head
        assert head is not None
        norms.append(float(head.classifier.weight.grad.norm()))
    assert figures[0] == figures[1]
    assert norms[0] == 0.0 < norms[1]


def test_an_operation_that_is_not_active_is_left_alone() -> None:
    """They have no gradient and no optimiser state, and therefore neither decay nor momentum."""
    search = make_search(change(weight_decay=0.1))
    search.supernet.train()
    before = [p.detach().clone() for p in search.weights]
    search.step(batch(0), totals())
    active = {id(p) for p in search.supernet.active_parameters()}
    assert 0 < len(active) < len(before) / 2
    for p, old in zip(search.weights, before, strict=True):
        assert (p.grad is not None) == (p in search.weight_optimizer.state) == (id(p) in active)
        if id(p) not in active:
            assert torch.equal(p, old)


# --- affine parts and alphas, before a node freezes and after ---


def inner_norms(search: OneStageSearch, place: Place) -> list[tuple[bool, nn.BatchNorm2d]]:
    """Return (whether it is active, a batch norm) for every candidate of a node in every cell of its kind."""
    net, (kind, node) = search.supernet, place
    active = {(edge, op) for _, edge, op in net.plan(kind)[node]}
    first = net.space.first_edge(node)
    found = []
    for cell in net.cells:
        for edge in range(first, first + net.space.n_node_edges(node)) if cell.kind == kind else ():
            for op, operation in enumerate(cell.ops[edge]):
                norms = [m for m in operation.modules() if isinstance(m, nn.BatchNorm2d)]
                assert len(norms) == (2 if isinstance(operation, SepConv) else 1)
                found += [((edge, op) in active, norm) for norm in norms]
    return found


def is_start(norm: nn.BatchNorm2d) -> bool:
    return bool((norm.weight == 1).all() and (norm.bias == 0).all())


def test_affine_parts_wait_at_1_and_0_until_their_node_freezes() -> None:
    search = make_search(change(max_search_epochs=9, weight_decay=0.1))
    for _ in range(2):
        run_epoch(search)
    for place in search.places:
        for _, norm in inner_norms(search, place):
            assert is_start(norm)
            assert norm.weight.grad is norm.bias.grad is None
            assert not norm.weight.requires_grad
            assert not norm.bias.requires_grad
    freeze(search, [FIRST])
    run_epoch(search)
    for place in search.places:
        for is_active, norm in inner_norms(search, place):
            trains = place == FIRST and is_active
            assert is_start(norm) != trains
            assert (norm.weight.grad is not None) == (norm.bias.grad is not None) == trains
            assert norm.weight.requires_grad == (place == FIRST)
    names = {id(p): name for name, p in search.supernet.named_parameters()}
    active = {names[id(p)] for p in search.supernet.active_parameters()}
    affine = {id(p) for is_active, norm in inner_norms(search, FIRST) if is_active for p in norm.parameters()}
    assert {names[i] for i in affine} <= active


def test_a_frozen_b_leaves_adam_and_its_weights_stay_a_factor() -> None:
    search = make_search(change(max_search_epochs=9))
    run_epoch(search)
    freeze(search, [FIRST])
    b, other = b_of(search, FIRST), b_of(search, SECOND)
    value, moving = b.detach().clone(), other.detach().clone()
    state = copy.deepcopy(search.alpha_optimizer.state[b])
    factors = search.supernet.edge_weights()["normal"][0].detach().clone()
    code = search.codes["normal"][0]
    assert search.active_places() == [p for p in search.places if p != FIRST]
    assert [id(p) for p in search.supernet.active_alphas()] == [id(p) for p in search.alphas if p is not b]
    for _ in range(2):
        run_epoch(search)
    assert b.grad is None
    assert torch.equal(b, value)
    after = search.alpha_optimizer.state[b]
    assert state.keys() == after.keys()
    assert all(torch.equal(state[key], after[key]) for key in state)
    assert search.alpha_optimizer.state[other]["step"] == state["step"] + 4
    assert not torch.equal(other, moving)
    assert search.codes["normal"][0] is code
    weights = search.supernet.edge_weights()["normal"]
    assert torch.equal(weights[0], factors)
    A, z = code.measurement_matrix[:, list(code.support)], code.sparse_code[list(code.support)]
    torch.testing.assert_close(factors.double(), z + A.T @ (value.double() - A @ z), rtol=1e-5, atol=1e-7)
    # The factors have an effect: other factors give other logits.
    one = batch(0).images
    logits = search.supernet.eval()(one)
    weights = search.supernet.edge_weights()
    weights["normal"][0].zero_()
    assert not torch.allclose(search.supernet(one, weights), logits)


# --- the two phases ---


def test_schedules_of_both_phases() -> None:
    """After the closing epoch the rate falls from its constant (cosine), and drop path rises linearly from 0."""
    s = change(max_search_epochs=2, train_epochs=4, lr_min=0.001, drop_path=0.2)
    search = make_search(s)
    rates: list[float] = []
    drops: list[float] = []

    def observe(step: int, _: Totals) -> None:
        rates.append(search.weight_optimizer.param_groups[0]["lr"])
        drops.append(search.supernet.drop_path_prob)

    while not search.is_done:
        assert search.is_searching == (search.epoch < 2)
        assert search.search_epochs == (None if search.is_searching else 3)
        search.train_epoch([batch(0), batch(1)], None, 2, observe)
        search.recover()
    assert search.epoch == 7
    cosine = [learning_rate(s.lr, s.lr_min, i / 2, 4) for i in range(8)]
    assert rates == pytest.approx([s.lr] * 6 + cosine, rel=1e-12)
    assert rates[6] == s.lr
    assert drops == pytest.approx([0.0] * 6 + [d for d in (0.0, 0.05, 0.1, 0.15) for _ in range(2)])
    assert search.alpha_optimizer.param_groups[0]["lr"] == s.arch_lr


def test_the_schedule_starts_an_epoch_after_the_last_freeze() -> None:
    """If the search ends early, the training begins early and has the same length."""
    search = make_search(change(max_search_epochs=50, train_epochs=4))
    freeze(search, [p for p in search.places if p != SECOND])
    assert search.trained_epochs(search.epoch) == 0.0
    freeze(search, [SECOND])
    assert (search.epoch, search.search_epochs) == (2, 3)
    assert [search.trained_epochs(2 + e) for e in (0, 0.5, 1, 2, 3.5, 5)] == [0.0, 0.0, 0.0, 1.0, 2.5, 4.0]
    for _ in range(5):
        assert not search.is_done
        run_epoch(search)
    assert search.is_done


def published_rates(search_epochs: int, train_epochs: int, lr: float, lr_min: float) -> list[float]:
    """Return the learning rate of every epoch as the published loop sets it.

    It steps torch's scheduler after an epoch of the training alone, and trains one epoch after all nodes have frozen
    before it leaves the search.
    """
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, train_epochs, eta_min=lr_min)
    rates = [lr] * (search_epochs + 1)
    for _ in range(train_epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_learning_rates_of_a_whole_published_run() -> None:
    """The last node freezes at epoch 118: 119 epochs at 0.025, then 600 that fall to 0.001."""
    published = OneStageSettings(termination_tol=0.0, max_params=10)
    search = make_search(dataclasses.replace(published, max_search_epochs=118))
    rates = []
    while not search.is_done:
        rates.append(search.learning_rate(search.epoch))
        move(search, search.active_places())
        epoch_without_batches(search)
    assert {freezing.epoch for freezing in search.freezings} == {118}
    assert len(rates) == 118 + 1 + 600 == 719
    assert rates == pytest.approx(published_rates(118, 600, 0.025, 0.001), rel=1e-9)
    assert rates[:120] == [0.025] * 120
    pinned = {120: 0.024999836, 269: 0.021485281, 419: 0.013, 569: 0.004514719, 718: 0.001000164}
    assert {epoch: round(rates[epoch], 9) for epoch in pinned} == pinned
    assert search.learning_rate(719) == pytest.approx(0.001, rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "linear_by_epoch"])
def test_warm_up_at_the_start_and_another_schedule_at_the_end(schedule: str) -> None:
    """The rate rises over the first epochs, whether or not the search has ended, and falls over the training epochs."""
    s = change(max_search_epochs=6, train_epochs=20, warmup_epochs=4.0, lr=0.4, lr_min=0.0, schedule=schedule)
    search = make_search(s)
    at_start = search.learning_rate
    if schedule == "linear":
        assert [at_start(e) for e in (0, 0.5, 2, 4, 5)] == pytest.approx([0.0, 0.05, 0.2, 0.4, 0.4])
    else:
        assert [at_start(e) for e in (0, 0.5, 2, 3, 4, 5)] == pytest.approx([0.1, 0.1, 0.3, 0.4, 0.4, 0.4])
    while search.is_searching:
        move(search, search.active_places())
        epoch_without_batches(search)
    rates = [search.learning_rate(6 + e) for e in range(21)]
    expected = [learning_rate(0.4, 0.0, e, 20, schedule=schedule) for e in range(20)]
    assert rates == pytest.approx([0.4, *expected])


def test_label_smoothing_is_in_both_losses_of_a_step() -> None:
    search = make_search(
        change(label_smoothing=0.2, auxiliary_weight=0.4, grad_clip=None), dtype=torch.float64, auxiliary=True
    )
    one = batch(0, dtype=torch.float64)
    net = copy.deepcopy(search.supernet).train()
    logits, auxiliary = net.forward_with_auxiliary(one.images)
    assert auxiliary is not None
    smoothed = torch.full_like(logits, 0.2 / 5).scatter(1, one.labels[:, None], 0.8 + 0.2 / 5)
    (
        -(smoothed * logits.log_softmax(1)).sum(1).mean()
        - 0.4 * (smoothed * auxiliary.log_softmax(1)).sum(1).mean()
    ).backward()
    search.supernet.train()
    search.step(one, totals())
    for ours, theirs in zip(search.supernet.parameters(), net.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_no_training_epochs_at_all() -> None:
    """The closing epoch still runs, at the full learning rate."""
    search = make_search(change(max_search_epochs=1, train_epochs=0))
    for _ in range(1 + CLOSING_EPOCHS):
        assert not search.is_done
        assert search.learning_rate(search.epoch) == FAST.lr
        run_epoch(search)
    assert search.is_done
    assert search.supernet.drop_path_prob == 0.0


def test_drop_path_acts_on_the_supernet_in_training_only() -> None:
    net = make_search(dtype=torch.float64).supernet
    one = batch(0, dtype=torch.float64).images
    whole = net.eval()(one)
    net.drop_path_prob = 1.0 - 1e-12
    assert torch.equal(net(one), whole)
    torch.testing.assert_close(net.train()(one), net.classifier.bias.expand(4, 5), rtol=0, atol=1e-12)


def test_momentum_is_kept_across_the_switch() -> None:
    s = change(max_search_epochs=1, grad_clip=None, drop_path=0.0)
    search = make_search(s, dtype=torch.float64)
    search.train_epoch([batch(i, dtype=torch.float64) for i in range(2)], None, 2)
    optimizer = search.weight_optimizer
    search.recover()
    assert not search.is_searching
    kept = {p: optimizer.state[p]["momentum_buffer"].clone() for p in search.weights if p in optimizer.state}
    before = {p: p.detach().clone() for p in search.weights}
    search.train_epoch([batch(9, dtype=torch.float64)], None, 1)
    continued = started = 0
    for p in search.supernet.active_parameters():
        assert p.grad is not None
        expected = p.grad + s.weight_decay * before[p]
        if p in kept:
            assert kept[p].norm() > 0
            expected = expected + s.momentum * kept[p]
            continued += 1
        else:
            started += 1  # Affine parts, and operations that became active at the end of the search.
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(p.detach(), before[p] - s.lr * expected, rtol=1e-12, atol=1e-14)
    assert continued > 10
    assert started > 0


def test_no_alpha_moves_while_the_fixed_architecture_trains() -> None:
    search = make_search(change(max_search_epochs=1))
    run_epoch(search)
    b = [p.detach().clone() for p in search.alphas]
    genotype = search.supernet.genotype()
    asked = len(search.cost.asked)  # type: ignore[attr-defined]
    while not search.is_done:
        report = run_epoch(search)
        assert report.metrics() == {}
        assert report.rejection is None
        assert not any(n.recovered for n in report.nodes)
    assert all(torch.equal(p, old) for p, old in zip(search.alphas, b, strict=True))
    assert all(p.grad is None for p in search.alphas)
    assert search.supernet.genotype() == genotype
    assert len(search.freezings) == len(search.places)
    assert set(search.cost.asked[asked:]) <= {genotype}  # type: ignore[attr-defined]


# --- reports ---


def test_reports_of_active_frozen_and_just_frozen_nodes() -> None:
    search = make_search(change(max_search_epochs=9, termination_tol=1e-6))
    assert [(n.state, n.recovered, n.distance) for n in search.first_recovery.nodes] == [
        ("ACTIVE", True, 0.0)
    ] * 4
    move(search, [p for p in search.places if p != FIRST])
    just = epoch_without_batches(search)
    move(search, search.active_places())
    later = epoch_without_batches(search)
    for report, recovered in ((just, True), (later, False)):
        assert [(n.cell, n.node) for n in report.nodes] == search.places
        assert [n.state for n in report.nodes] == ["FROZEN", "ACTIVE", "ACTIVE", "ACTIVE"]
        node = report.nodes[0]
        assert node.recovered == recovered
        assert node.converged
        assert not node.changed
        assert node.distance <= 1e-6
        assert report.metrics()["recovery/distance"] == max(n.distance for n in report.nodes) > 1e-3
        assert report.metrics()["recovery/support_changes"] == sum(n.changed for n in report.nodes) > 0
    frozen = later.nodes[0]
    assert frozen.distance == frozen.gap == 0.0
    assert frozen.truncation == just.nodes[0].truncation > 0
    assert frozen.margin == just.nodes[0].margin
    assert later.metrics()["recovery/margin"] == min(n.margin or 0.0 for n in later.nodes if n.recovered)
    assert frozen.picks == just.nodes[0].picks
    assert frozen.edge_weights == just.nodes[0].edge_weights
    space = search.supernet.space
    for n in later.nodes:
        picks = map(space.split, search.codes[n.cell][n.node].support)
        assert n.picks == [f"{space.ops[op]}<-{state}" for state, op in picks]


def test_the_report_of_a_rejection() -> None:
    """It has the kept operations and the certificates of the rejected codes."""
    size = Size()
    search = make_search(change(max_search_epochs=9), size=size)
    before = search.first_recovery
    size.now = TOO_MANY
    move(search, search.places)
    report = epoch_without_batches(search)
    assert [n.picks for n in report.nodes] == [n.picks for n in before.nodes]
    assert not any(n.changed for n in report.nodes)
    assert all(n.recovered and n.state == "ACTIVE" for n in report.nodes)
    for node, new in zip(report.nodes, search.recover_codes(search.places), strict=True):
        assert node.gap <= 1e-9
        assert node.distance == pytest.approx(new.distance, rel=1e-6)
        rest = new.code.sparse_code.clone()
        rest[list(new.code.support)] = 0.0
        assert node.truncation == pytest.approx(float(rest.norm()), rel=1e-6)
    assert report.metrics()["recovery/support_changes"] == 0.0


def test_metrics_are_means_over_pictures_and_validation_changes_nothing() -> None:
    search = make_search()
    metrics = search.train_epoch([batch(0), batch(1, n=2)], None, 2)
    assert metrics.count == 6
    assert math.isnan(search.train_epoch([], None, 0).loss)
    before = copy.deepcopy(search.supernet.state_dict())
    one = search.validate([batch(8)])
    assert all(torch.equal(v, before[k]) for k, v in search.supernet.state_dict().items())
    with torch.no_grad():
        logits = search.supernet.eval()(batch(8).images)
    assert one.loss == pytest.approx(F.cross_entropy(logits, batch(8).labels).item(), rel=1e-5)
    assert one.top1 == float((logits.argmax(1) == batch(8).labels).float().mean())


def test_search_and_training_learn() -> None:
    """On a repeated batch the loss falls in the search, and further with the fixed architecture."""
    s = change(
        max_search_epochs=4, train_epochs=6, lr=0.05, arch_lr=1e-3, drop_path=0.0, auxiliary_weight=0.4
    )
    search = make_search(s, auxiliary=True)
    losses = []
    while not search.is_done:
        losses.append(search.train_epoch([batch(0, n=10)] * 4, None, 4).loss)
        search.recover()
    assert losses[3] < 0.9 * losses[0]
    assert losses[-1] < 0.6 * losses[3]


# --- resuming ---


def leaves(state: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = (
        state.items()
        if isinstance(state, dict)
        else enumerate(state)
        if isinstance(state, list | tuple)
        else None
    )
    if items is None:
        yield prefix, state
    else:
        for key, value in items:
            yield from leaves(value, f"{prefix}/{key}")


def assert_identical(a: Any, b: Any) -> None:
    ours, theirs = dict(leaves(a)), dict(leaves(b))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if isinstance(value, Tensor):
            assert value.dtype == theirs[key].dtype, key
            assert torch.equal(value, theirs[key]), key
        else:
            assert value == theirs[key], key


def while_searching(search: OneStageSearch, size: Size) -> None:
    size.now = TOO_MANY
    move(search, search.places)
    run_epoch(search)
    size.now = Cost(1, 1)
    assert len(search.active_places()) == 4
    assert search.n_rejected == 1


def with_some_nodes_frozen(search: OneStageSearch, _: Size) -> None:
    run_epoch(search)
    freeze(search, [FIRST, SECOND])
    run_epoch(search)
    assert search.is_searching
    assert len(search.freezings) == 2


def while_training(search: OneStageSearch, _: Size) -> None:
    while search.epoch < 7:
        run_epoch(search)
    assert not search.is_searching
    assert search.trained_epochs(search.epoch) > 0


@pytest.mark.parametrize("phase", [while_searching, with_some_nodes_frozen, while_training])
def test_a_resumed_search_is_bit_identical(
    phase: Callable[[OneStageSearch, Size], None], tmp_path: Path
) -> None:
    """The state passes through a file into an object of other seeds, which runs to the end of the training."""
    s = change(max_search_epochs=5, train_epochs=3, drop_path=0.3)
    size = Size()
    stopped = make_search(s, size=size, auxiliary=True)
    phase(stopped, size)
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = dataclasses.replace(s, matrix_seed=9)
    resumed = make_search(other, seed=9, weights_seed=9, auxiliary=True)
    resumed.load_state_dict(state)
    assert_identical(resumed.state_dict(), stopped.state_dict())
    assert resumed.active_places() == stopped.active_places()
    assert resumed.supernet.genotype() == stopped.supernet.genotype()
    asks = [[p.requires_grad for p in search.supernet.parameters()] for search in (stopped, resumed)]
    assert asks[0] == asks[1]
    while not stopped.is_done:
        reports = run_epoch(stopped), run_epoch(resumed)
        assert reports[0] == reports[1]
        assert_identical(resumed.state_dict(), stopped.state_dict())
    assert resumed.is_done
    assert resumed.freezings == stopped.freezings
    assert resumed.n_rejected == stopped.n_rejected
    one = batch(8).images
    nets = [absorb_into_batchnorm(search.supernet) for search in (stopped, resumed)]
    assert torch.equal(nets[0](one), nets[1](one))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"kind": "two_stage"}, "'two_stage' version 2 is not 'one_stage' version 2"),
        ({"version": 1}, "checkpoint: 'one_stage' version 1 is not"),
        ({"kind": None}, "checkpoint: None version"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused_untouched(other: dict[str, Any], message: str) -> None:
    search = make_search()
    before = copy.deepcopy(search.state_dict())
    with pytest.raises(CheckpointError, match=message) as caught:
        search.load_state_dict(make_search(seed=1).state_dict() | other)
    assert "\n" not in str(caught.value)
    assert_identical(search.state_dict(), before)


def test_the_two_searches_refuse_each_others_checkpoints() -> None:
    one = make_search()
    two = TwoStageSearch(Supernet(SMALL, 2, 3, 5, in_channels=1), TwoStageSettings(), CPU, 0)
    for search, state in ((one, two.state_dict()), (two, one.state_dict())):
        with pytest.raises(CheckpointError, match=f" is not '{search.kind}' version 2, which this job needs"):
            search.load_state_dict(state)


# --- several ranks ---


RANKED = OneStageSettings(
    max_search_epochs=3,
    train_epochs=2,
    arch_lr=0.05,
    alphas_scale=0.1,
    termination_tol=0.05,  # A node freezes before the last epoch.
    drop_path=0.0,  # Every rank draws for its own pictures.
    max_params=None,
)

PICTURES = 40  # 2 * 16 + 8, so that the last batch is smaller.


def ranked_search(
    ranks: Ranks, settings: OneStageSettings, dtype: torch.dtype, *, eval_norms: bool
) -> OneStageSearch:
    torch.manual_seed(0)
    net = Supernet(SMALL, 2, 3, 10, in_channels=1, op_batchnorm=True, auxiliary=True).to(dtype)
    if eval_norms:
        freeze_batchnorm(net)
    return OneStageSearch(net, settings, CPU, 0, ranks, Size())


def whole_run() -> dict[str, Any]:
    """Run a search on this process's share; return all gradients, metrics, genotypes and freezings."""
    ranks = Ranks.current(torch.device("cpu"))
    search = ranked_search(ranks, RANKED, torch.float64, eval_norms=True)
    seen: dict[str, Any] = {"alphas": [], "weights": [], "metrics": [], "genotypes": [], "active": []}

    def observe(step: int, _: Totals) -> None:
        seen["alphas"].append(gradients(search.alphas))
        seen["weights"].append(gradients(search.weights))

    while not search.is_done:
        batches = loader(0, search.epoch, PICTURES, ranks)
        train = search.train_epoch(batches, None, len(batches), observe)
        valid = search.validate(loader(1, 0, 11, ranks))
        seen["metrics"].append(dataclasses.astuple(train) + dataclasses.astuple(valid))
        search.recover()
        seen["genotypes"].append(search.supernet.genotype().to_json())
        seen["active"].append(len(search.active_places()))
    seen["freezings"] = search.freezings
    seen["weights at the end"] = [p.detach() for p in search.supernet.parameters()]
    return seen


def bytes_per_step() -> dict[str, Any]:
    """Record what a step sends with all, some or no nodes ACTIVE, and what is sent at the end of an epoch."""
    ranks = Ranks.current(torch.device("cpu"))
    counting = CountingRanks(ranks.rank, ranks.size)
    search = ranked_search(counting, change(max_search_epochs=9), torch.float32, eval_norms=False)
    seen = []
    for frozen in ([], [FIRST, SECOND], [("normal", 1), ("reduce", 0)]):
        if frozen:
            epoch_without_batches(search)  # Installs the codes of the last step.
            freeze(search, frozen)
        search.supernet.train()
        (one,) = loader(0, 0, 8, ranks, torch.float32)
        CountingRanks.counted.clear()
        search.step(one, totals())
        affine = [
            p
            for place in search.places
            for active, norm in inner_norms(search, place)
            if active
            for p in norm.parameters()
        ]
        seen.append(
            {
                "sent": sum(CountingRanks.counted),
                "weights": sum(4 * p.numel() for p in search.supernet.active_parameters()),
                "alphas": sum(4 * b.numel() for b in search.alphas if b.grad is not None),
                "affine": sum(4 * p.numel() for p in affine if p.grad is not None),
                "all": sum(4 * p.numel() for p in [*search.weights, *search.alphas]),
                "active": len(search.active_places()),
            }
        )
    statistics = []
    for end_epoch in (False, True):
        if end_epoch:
            search.train_epoch([], None, 0)
        statistics.append(torch.cat([b.flatten() for b in search.supernet.active_buffers()]))
    return {"steps": seen, "statistics": statistics}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[Outcome]]:
    functions = [whole_run, bytes_per_step]
    return dict(zip([f.__name__ for f in functions], run_ranks(functions, 2), strict=True))


@pytest.mark.slow
def test_two_ranks_with_half_batches_equal_one_with_the_whole(outcomes: dict[str, list[Outcome]]) -> None:
    alone = whole_run()
    assert len(set(alone["genotypes"])) > 1, "the architecture never changed"
    assert 0 < alone["active"][1] < 4, "no epoch with some nodes frozen"
    assert {f.reason for f in alone["freezings"]} == {"tolerance", "limit"}
    for outcome in outcomes["whole_run"]:
        seen = outcome.value
        for exact in ("genotypes", "freezings", "active"):
            assert seen[exact] == alone[exact]
        for close in ("alphas", "weights", "metrics", "weights at the end"):
            torch.testing.assert_close(seen[close], alone[close], rtol=0, atol=1e-9)
    n_search = alone["active"].index(0) + 1
    assert all(g.norm() > 1e-6 for g in alone["weights"])
    assert all(g.norm() > 0 for g in alone["alphas"][: 3 * n_search])
    assert all(g.numel() == 0 for g in alone["alphas"][3 * n_search :])
    assert [m[2] for m in alone["metrics"]] == [PICTURES] * len(alone["metrics"])


@pytest.mark.slow
def test_frozen_alphas_and_inactive_operations_do_not_travel(outcomes: dict[str, list[Outcome]]) -> None:
    for outcome in outcomes["bytes_per_step"]:
        seen = outcome.value["steps"]
        assert [s["active"] for s in seen] == [4, 2, 0]
        assert [s["alphas"] for s in seen] == [4 * 7 * 4, 2 * 7 * 4, 0]
        assert all(s["sent"] == s["weights"] + s["alphas"] < s["all"] for s in seen)
        # After a node has frozen, its affine parts are sent instead.
        assert seen[0]["affine"] == 0 < seen[1]["affine"] < seen[2]["affine"]


@pytest.mark.slow
def test_running_statistics_are_the_mean_over_the_ranks_after_an_epoch(
    outcomes: dict[str, list[Outcome]],
) -> None:
    (own, after), (other, after_other) = (o.value["statistics"] for o in outcomes["bytes_per_step"])
    assert not torch.allclose(own, other), "each rank has seen other pictures"
    assert torch.equal(after, after_other)
    torch.testing.assert_close(after, (own + other) / 2, rtol=1e-5, atol=1e-7)
