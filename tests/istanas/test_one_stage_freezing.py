"""One-stage search: when a node freezes, which proposals the limits reject, and the first architecture."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from istanas.errors import ConfigError
from istanas.measure import Cost, target_cost
from istanas.nets import Supernet, absorb_into_batchnorm
from istanas.search import OneStageSearch
from istanas.search.one_stage import CLOSING_EPOCHS, MAX_REDRAWS, Freezing
from istanas.search.sparse_coding import Place
from istanas.space import CellSpace, Genotype
from tests.istanas.one_stage_searches import (
    ACTIVE,
    CPU,
    FIRST,
    FROZEN,
    SECOND,
    SMALL,
    TOO_MANY,
    Size,
    batch,
    change,
    epoch_without_batches,
    freeze,
    make_search,
    move,
    totals,
)


def supports(search: OneStageSearch) -> dict[Place, tuple[int, ...]]:
    return {place: code.support for place, code in search.codes_by_place().items()}


# --- freezing ---


def test_a_node_freezes_by_the_tolerance_and_the_others_by_the_limit() -> None:
    search = make_search(change(max_search_epochs=3, termination_tol=1e-6))
    move(search, [p for p in search.places if p != SECOND])
    epoch_without_batches(search)
    assert search.freezings == [Freezing("reduce", 1, 1, "tolerance")]
    move(search, search.active_places())
    epoch_without_batches(search)
    assert len(search.freezings) == 1
    assert search.is_searching
    move(search, [p for p in search.active_places() if p != FIRST])
    epoch_without_batches(search)
    assert search.freezings[1:] == [
        Freezing("normal", 0, 3, "tolerance"),  # Within the tolerance in the last epoch.
        Freezing("normal", 1, 3, "limit"),
        Freezing("reduce", 0, 3, "limit"),
    ]
    assert not search.is_searching
    assert search.search_epochs == 3 + CLOSING_EPOCHS


@pytest.mark.parametrize("factor", [0.999, 1.0, 1.001])
def test_the_tolerance_includes_itself(factor: float) -> None:
    """The node freezes if and only if its distance, as reported, is at most the tolerance."""
    probe = make_search()
    move(probe, probe.places, 0.01)
    distance = {(n.cell, n.node): n.distance for n in epoch_without_batches(probe).nodes}[FIRST]
    assert distance > 1e-4
    search = make_search(change(termination_tol=distance * factor))
    move(search, search.places, 0.01)
    epoch_without_batches(search)
    assert (search.supernet.node_states["normal"][0] is FROZEN) == (factor >= 1.0)


def test_the_distance_is_that_to_the_last_accepted_code() -> None:
    """It grows over rejected epochs, and starts from 0 after an acceptance."""
    size = Size()
    search = make_search(change(max_search_epochs=9, termination_tol=1e-6), size=size)
    accepted = search.codes_by_place()
    size.now = TOO_MANY
    distances = []
    for _ in range(2):
        move(search, search.places, 0.1)
        report = epoch_without_batches(search)
        for node in report.nodes:
            z, *_ = search.recover_codes([(node.cell, node.node)])
            old = accepted[node.cell, node.node].sparse_code
            assert node.distance == pytest.approx(float((z.code.sparse_code - old).norm()), rel=1e-6)
        distances.append({(n.cell, n.node): n.distance for n in report.nodes})
    assert distances[1][FIRST] > distances[0][FIRST] > 1e-3
    # b does not move, but no node freezes, because the accepted codes are far from it.
    size.now = Cost(1, 1)
    report = epoch_without_batches(search)
    assert [n.distance for n in report.nodes] == pytest.approx(list(distances[1].values()), rel=1e-6)
    assert not search.freezings
    report = epoch_without_batches(search)
    assert max(n.distance for n in report.nodes) <= 1e-6
    assert [f.reason for f in search.freezings] == ["tolerance"] * 4


@given(data=st.data(), max_search_epochs=st.integers(1, 5))
@settings(max_examples=20)
def test_any_search_ends(data: st.DataObject, max_search_epochs: int) -> None:
    """After max_search_epochs every node has frozen exactly once, whatever moves or is rejected."""
    size = Size()
    space = CellSpace(n_nodes=2, ops=("skip_connect", "max_pool_3x3", "dil_conv_3x3"), sparsity=1)
    search = make_search(
        change(max_search_epochs=max_search_epochs, termination_tol=0.01), size=size, space=space
    )
    rejected = 0
    while search.is_searching:
        assert search.epoch < max_search_epochs
        scales = st.sampled_from([0.0, 1e-3, 0.1, 10.0])
        for place in search.active_places():
            move(search, [place], data.draw(scales))
        size.now = TOO_MANY if data.draw(st.booleans()) else Cost(1, 1)
        resting = {p: search.codes[p[0]][p[1]] for p in search.places if p not in search.active_places()}
        before = supports(search)
        report = epoch_without_batches(search)
        rejected += report.rejection is not None
        frozen_now = {(f.cell, f.node): f.reason for f in search.freezings if f.epoch == search.epoch}
        for node in report.nodes:
            place = (node.cell, node.node)
            rests = node.recovered and node.distance <= 0.01
            is_last = node.recovered and search.epoch == max_search_epochs
            assert (place in frozen_now) == (rests or is_last)
            assert frozen_now.get(place, "") == ("tolerance" if rests else "limit" if is_last else "")
        assert all(search.codes[p[0]][p[1]] is code for p, code in resting.items())
        if report.rejection is not None:
            assert supports(search) == before
    assert search.n_rejected == rejected
    assert sorted((f.cell, f.node) for f in search.freezings) == sorted(search.places)
    assert search.search_epochs == search.epoch + CLOSING_EPOCHS
    assert search.epoch <= max_search_epochs
    assert absorb_into_batchnorm(search.supernet)(torch.zeros(1, 1, 8, 8)).shape == (1, 5)


# --- limits ---


@pytest.mark.parametrize(
    ("cost", "limits", "message"),
    [
        (Cost(1001, 1), {"max_params": 1000}, "1,001 parameters are above max_params = 1,000"),
        (
            Cost(1, 2001),
            {"max_params": None, "max_macs": 2000},
            "2,001 multiply-adds are above max_macs = 2,000",
        ),
    ],
)
def test_a_proposal_above_a_limit_is_rejected_and_counted(
    cost: Cost, limits: dict[str, Any], message: str
) -> None:
    """The previous codes are kept, and b is not restored."""
    size = Size()
    search = make_search(change(max_search_epochs=9, **limits), size=size)
    codes, genotype = search.codes_by_place(), search.supernet.genotype()
    size.now = cost
    move(search, search.places)
    b = [p.detach().clone() for p in search.alphas]
    report = epoch_without_batches(search)
    assert report.rejection == message
    assert search.n_rejected == 1
    assert all(search.codes_by_place()[place] is code for place, code in codes.items())
    assert search.supernet.genotype() == genotype
    assert size.asked[-1] != genotype  # The rejected architecture was another one.
    assert all(torch.equal(p, old) for p, old in zip(search.alphas, b, strict=True))
    assert not search.freezings
    assert len(search.active_places()) == 4
    # An architecture exactly at the limit is accepted, and b continues from where it was.
    size.now = Cost(1000, 2000)
    proposal = size.asked[-1]
    assert epoch_without_batches(search).rejection is None
    assert search.supernet.genotype() == proposal
    assert search.n_rejected == 1


def test_a_node_at_rest_freezes_even_if_the_proposal_is_rejected() -> None:
    """As published, it keeps its last accepted code, and the nodes that moved stay ACTIVE with theirs."""
    size = Size()
    search = make_search(change(max_search_epochs=9, termination_tol=1e-3), size=size)
    codes = search.codes_by_place()
    move(search, [FIRST], 1e-7)  # Its code moves by less than the tolerance.
    move(search, [p for p in search.places if p != FIRST])
    size.now = TOO_MANY
    report = epoch_without_batches(search)
    assert report.rejection is not None
    distances = {(n.cell, n.node): n.distance for n in report.nodes}
    assert 0.0 < distances.pop(FIRST) <= 1e-3 < min(distances.values())
    assert search.freezings == [Freezing(*FIRST, 1, "tolerance")]
    assert all(search.codes_by_place()[place] is code for place, code in codes.items())
    assert [n.state for n in report.nodes if (n.cell, n.node) == FIRST] == ["FROZEN"]
    # From now on the node is not recovered.
    size.now = Cost(1, 1)
    move(search, search.active_places())
    assert epoch_without_batches(search).rejection is None
    assert search.codes["normal"][0] is codes[FIRST]


def test_no_limit_is_no_limit() -> None:
    size = Size()
    size.now = Cost(10**12, 10**12)
    search = make_search(change(max_params=None, max_macs=None), size=size)
    move(search, search.places)
    assert epoch_without_batches(search).rejection is None


def test_the_last_epoch_freezes_all_even_if_its_proposal_is_rejected() -> None:
    size = Size()
    search = make_search(change(max_search_epochs=2), size=size)
    move(search, search.places)
    epoch_without_batches(search)
    before = search.codes_by_place()
    size.now = TOO_MANY
    move(search, search.places)
    report = epoch_without_batches(search)
    assert report.rejection is not None
    assert not search.is_searching
    assert [(f.epoch, f.reason) for f in search.freezings] == [(2, "limit")] * 4
    assert all(search.codes_by_place()[place] is code for place, code in before.items())
    assert [n.state for n in report.nodes] == ["FROZEN"] * 4
    # Frozen nodes are not recovered again.
    size.now = Cost(1, 1)
    assert epoch_without_batches(search).rejection is None
    assert search.n_rejected == 1


def test_a_proposal_is_both_cells_with_the_frozen_nodes_as_they_are() -> None:
    size = Size()
    search = make_search(change(max_search_epochs=9), size=size)
    freeze(search, [FIRST])
    frozen = search.supernet.genotype().normal[0]
    size.now = TOO_MANY
    move(search, search.active_places())
    n_asked = len(size.asked)
    epoch_without_batches(search)
    (proposal,) = size.asked[n_asked:]
    assert proposal.normal[0] == frozen
    new = search.recover_codes(search.active_places())
    for recovered in new:
        cell, node = recovered.place
        picks = [search.supernet.space.split(c) for c in recovered.code.support]
        ops = search.supernet.space.ops
        assert proposal.picks(cell)[node] == tuple((ops[op], state) for state, op in picks)


def test_limits_by_the_real_formula() -> None:
    """With a limit between the sizes of architectures some epochs are rejected, and no accepted one is too large."""

    def cost(genotype: Genotype) -> Cost:
        return target_cost(
            genotype, init_channels=2, layers=3, num_classes=5, shape=(1, 8, 8), op_batchnorm=True
        )

    sizes = [cost(make_search(size=Size(), seed=seed).supernet.genotype()).params for seed in range(5)]
    limit = sorted(sizes)[2]
    search = make_search(change(max_search_epochs=12, max_params=limit), size=cost)
    rejections = []
    while search.is_searching:
        move(search, search.active_places(), 0.3)
        rejections.append(epoch_without_batches(search).rejection is not None)
        assert cost(search.supernet.genotype()).params <= limit
    assert search.n_rejected == sum(rejections)
    assert 0 < sum(rejections) < len(rejections)


# --- the first architecture ---


def firsts(n_rejected: int, seed: int = 0) -> tuple[OneStageSearch, Size]:
    size = Size(*[TOO_MANY] * n_rejected)
    space = CellSpace(n_nodes=1, sparsity=1)
    return make_search(size=size, seed=seed, space=space), size


def test_a_first_architecture_above_the_limit_is_drawn_again() -> None:
    """The redraws are the same every time."""
    starts = {}
    for n in (0, 1, 2, MAX_REDRAWS):
        (search, size), (twin, _) = firsts(n), firsts(n)
        assert len(size.asked) == n + 1
        assert size.asked[-1] == search.supernet.genotype()
        assert all(torch.equal(a, b) for a, b in zip(search.alphas, twin.alphas, strict=True))
        assert search.n_rejected == 0  # Only epochs count, not the first architectures.
        assert search.first_recovery.rejection is None
        starts[n] = torch.cat([b.detach() for b in search.alphas])
        search.step(batch(0), totals())  # The gradients are those of the b that was drawn last.
        assert all(b.grad is not None for b in search.alphas)
    values = list(starts.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    other = torch.cat([b.detach() for b in firsts(1, seed=1)[0].alphas])
    assert not torch.equal(other, starts[1])


def test_a_limit_that_no_start_keeps_is_an_error() -> None:
    size = Size()
    size.now = TOO_MANY
    with pytest.raises(ConfigError) as caught:
        make_search(size=size, space=CellSpace(n_nodes=1, sparsity=1))
    assert str(caught.value) == (
        "max_params: 11 parameters are above max_params = 10, and 100 other random first architectures exceed the "
        "limits, too; raise it, or lower init_channels or layers"
    )
    assert len(size.asked) == 1 + MAX_REDRAWS == 101
    assert len(set(size.asked)) > 10


def test_a_node_that_no_live_cell_has_trained_does_not_freeze_by_tolerance() -> None:
    """Normal cells of six cells read only their first input, so that the reductions are dead: b gets no gradient."""
    torch.manual_seed(0)
    net = Supernet(SMALL, 2, 6, 5, in_channels=1, op_batchnorm=True)
    search = OneStageSearch(net, change(termination_tol=1e9), CPU, 0, cost=Size())
    codes = search.codes_by_place()
    for node in range(SMALL.n_nodes):
        on_first = [i for i in range(SMALL.n_candidates(node)) if SMALL.split(i)[0] == 0]
        codes["normal", node] = dataclasses.replace(codes["normal", node], support=tuple(on_first[:2]))
    search.install(codes)
    search.train_epoch([batch(0)], None, n_steps=1)
    assert all(b.grad is None for b in net.node_alphas("reduce"))
    search.recover()
    assert net.node_states == {"normal": [FROZEN] * 2, "reduce": [ACTIVE] * 2}
    assert {(f.cell, f.reason) for f in search.freezings} == {("normal", "tolerance")}
