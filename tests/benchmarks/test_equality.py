"""Ours and the reference, which the benchmarks compare, agree in float64 within 1e-9 in relative norm."""

from collections.abc import Callable, Iterable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from istanas.nets import NodeState
from istanas.nets.operations import final_batchnorm
from istanas.search.sparse_coding import draw_matrices
from istanas.space import CELLS, PRIMITIVES, PUBLISHED, CellSpace, genotype_from_supports
from istanas.sparse import recover_nodes, top_support
from tests.benchmarks import reference
from tests.benchmarks.pairs import Pair, TargetPair, codes_of, ours_of, random_batch, random_supports

TOLERANCE = 1e-9
Gradients = dict[str, Tensor]
# Random mixtures, and each kind of operation alone: even the first node has two edges for its two picks.
MIXTURES = [pytest.param(None, seed, id=f"mixture{seed}") for seed in range(4)]
ALONE = [pytest.param((i,), i, id=name) for i, name in enumerate(PRIMITIVES)]


def relative(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """Return ||ours - theirs|| / ||theirs|| over all tensors, of which there must be some."""
    a = torch.cat([t.detach().flatten() for t in ours])
    b = torch.cat([t.detach().flatten() for t in theirs])
    assert b.norm() > 0
    return float((a - b).norm() / b.norm())


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Compare tensors by name; weights and alphas separately, since their scales differ too much for one norm."""
    assert ours.keys() == theirs.keys()
    alphas = {name for name in ours if name.startswith("compressed_alphas")}
    for names in (alphas, ours.keys() - alphas):
        if names:
            assert relative((ours[n] for n in names), (theirs[n] for n in names)) < TOLERANCE


def gradients(net: nn.Module) -> Gradients:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    """Compare gradients by name; those that ours lacks must be zero in the reference."""
    mine, its = gradients(ours), gradients(theirs)
    assert_close(mine, {name: its[name] for name in mine})
    assert not [name for name in its.keys() - mine.keys() if its[name].any()]


@cache
def shared_pair(one_stage: bool) -> Pair:
    """Return a cached pair: creating one takes a second, installing other codes in it takes milliseconds."""
    return Pair(2, 4, one_stage=one_stage, dtype=torch.float64)


def pair_with(
    one_stage: bool,
    kinds: tuple[int, ...] | None,
    seed: int,
    states: dict[str, list[NodeState]] | None = None,
) -> Pair:
    """Return the shared pair with these active sets, and with the same weights, statistics and codes."""
    pair = shared_pair(one_stage)
    codes = codes_of(CellSpace(), random_supports(CellSpace(), seed, kinds), seed)
    active = {cell: [NodeState.ACTIVE] * 4 for cell in CELLS}
    pair.search.install({(c, n): codes[c][n] for c, n in pair.search.places}, states or active)
    pair.reference.load_state_dict(pair.net.state_dict())
    pair.reference.codes = codes
    trained = {name: p.requires_grad for name, p in pair.net.named_parameters()}
    for name, p in pair.reference.named_parameters():
        p.requires_grad_(trained[name])
    return pair


def assert_same_pass(pair: Pair | TargetPair, size: int, seed: int) -> None:
    """Compare logits in training and evaluation, and all gradients."""
    for net in (pair.net, pair.reference):
        net.zero_grad()
        net.train()
    batch = random_batch(3, size, seed, torch.float64)
    torch.manual_seed(seed)  # drop path draws the same
    ours = pair.net(ours_of(batch)[0])
    torch.manual_seed(seed)
    theirs = pair.reference(batch[0])[0]
    assert relative([ours], [theirs]) < TOLERANCE
    for logits in (ours, theirs):
        reference.loss((logits, None), batch[1]).backward()
    assert_same_gradients(pair.net, pair.reference)
    pair.net.eval()
    pair.reference.eval()
    with torch.no_grad():
        assert relative([pair.net(ours_of(batch)[0])], [pair.reference(batch[0])[0]]) < TOLERANCE


@pytest.mark.parametrize("one_stage", [False, True], ids=["two_stage", "one_stage"])
@pytest.mark.parametrize(("kinds", "seed"), [*MIXTURES, *ALONE])
def test_logits_and_gradients_of_a_supernet(
    kinds: tuple[int, ...] | None, seed: int, one_stage: bool
) -> None:
    pair = pair_with(one_stage, kinds, seed)
    for size in (16, 9):
        assert_same_pass(pair, size, seed)


@pytest.mark.parametrize("n_frozen", [2, 4])
def test_frozen_nodes_and_drop_path_of_a_one_stage_supernet(n_frozen: int) -> None:
    """After the search, alphas are fixed and the batch norms behind the operations are trained."""
    states = {cell: [NodeState.FROZEN] * n_frozen + [NodeState.ACTIVE] * (4 - n_frozen) for cell in CELLS}
    pair = pair_with(True, None, n_frozen, states)
    pair.net.drop_path_prob = pair.reference.drop_path_prob = 0.3
    try:
        assert_same_pass(pair, 16, n_frozen)
    finally:
        pair.net.drop_path_prob = pair.reference.drop_path_prob = 0.0
    trained = [name for name in gradients(pair.net) if name.startswith("compressed_alphas")]
    assert len(trained) == 2 * (4 - n_frozen)
    ends = {
        node
        for cell in pair.net.cells
        for node, picks in enumerate(pair.net.plan(cell.kind))
        for _, edge, op in picks
        if final_batchnorm(cell.ops[edge][op]).weight.grad is not None
    }
    assert ends == set(range(n_frozen))


def values(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def assert_same_movement(ours: nn.Module, theirs: nn.Module, steps: Callable[[], None]) -> None:
    """Check that parameters with a gradient, and their statistics, change alike, and that nothing else of ours changes.

    In the reference, decay and momentum also change parameters whose gradient is zero.
    """
    before = values(ours)
    steps()
    after, its = values(ours), values(theirs)
    moved = {name for name, old in before.items() if not torch.equal(after[name], old)}
    assert moved == gradients(ours).keys()
    assert len(moved) > 50
    mine, other = ({n: new[n] - before[n] for n in moved} for new in (after, its))
    assert_close(mine, other)
    assert_close({n: after[n] for n in moved}, {n: its[n] for n in moved})
    live = {id(b) for b in ours.active_buffers()}  # type: ignore[operator]
    statistics = {name: b for name, b in ours.named_buffers() if id(b) in live}
    assert_close(statistics, {name: theirs.get_buffer(name) for name in statistics})


@pytest.mark.parametrize("one_stage", [False, True], ids=["two_stage", "one_stage"])
@pytest.mark.parametrize("seed", range(2))
def test_two_whole_steps_of_a_search(one_stage: bool, seed: int) -> None:
    pair = Pair(2, 4, one_stage=one_stage, auxiliary=one_stage, seed=seed, dtype=torch.float64)
    size = 32 if one_stage else 16  # the auxiliary head needs 8x8 at two thirds of the depth

    def steps() -> None:
        for step in range(2):
            batches = [
                random_batch(3, size, 10 * step + i, torch.float64) for i in range(1 if one_stage else 2)
            ]
            pair.our_step(*[ours_of(batch) for batch in batches])
            pair.their_step(*batches)

    assert_same_movement(pair.net, pair.reference, steps)
    assert any(name.startswith("compressed_alphas") for name in gradients(pair.net))


@pytest.mark.parametrize(("drop_path", "op_batchnorm"), [(0.0, False), (0.3, True)])
@pytest.mark.parametrize("seed", ["published", 0, 1])
def test_two_whole_steps_of_a_retraining(seed: str | int, drop_path: float, op_batchnorm: bool) -> None:
    space = CellSpace()
    genotype = (
        PUBLISHED["ISTA_twostage"]
        if isinstance(seed, str)
        else genotype_from_supports(space, random_supports(space, seed))
    )
    pair = TargetPair(genotype, 2, 4, drop_path=drop_path, op_batchnorm=op_batchnorm, dtype=torch.float64)

    def steps() -> None:
        for step in range(2):
            batch = random_batch(4, 32, step, torch.float64)
            torch.manual_seed(step)  # drop path draws the same
            pair.our_step(ours_of(batch))
            torch.manual_seed(step)
            pair.their_step(batch)

    assert_same_movement(pair.net, pair.reference, steps)


@pytest.mark.parametrize(("kinds", "seed"), [*MIXTURES[:2], *ALONE])
def test_logits_and_gradients_of_a_target(kinds: tuple[int, ...] | None, seed: int) -> None:
    genotype = genotype_from_supports(CellSpace(), random_supports(CellSpace(), seed, kinds))
    for op_batchnorm in (False, True):
        pair = TargetPair(
            genotype, 2, 4, auxiliary=False, op_batchnorm=op_batchnorm, drop_path=0.3, dtype=torch.float64
        )
        assert_same_pass(pair, 9, seed)


def test_a_dense_supernet_takes_a_step() -> None:
    torch.manual_seed(0)
    net = reference.DenseSupernet(2, 3)
    batch = random_batch(2, 16, 0)
    before = values(net)
    reference.two_stage_step(reference.Optimizers(net), batch, batch)
    after = values(net)
    still = [name for name, old in before.items() if torch.equal(after[name], old)]
    assert not still, "first-order DARTS trains every candidate"


@pytest.mark.parametrize(("scale", "tolerance"), [(0.3, 1e-6), (1e-3, 1e-3)])
def test_recovery_finds_what_cvxpy_finds(scale: float, tolerance: float) -> None:
    """At the start of a search, b of order 1e-3, the interior point method's code is not as close."""
    generator = np.random.default_rng(0)
    for matrices in draw_matrices(CellSpace(), 7, "uniform", 0).values():
        vectors = [generator.normal(0, scale, 7) for _ in matrices]
        exact = recover_nodes([A.numpy() for A in matrices], vectors)
        for A, b, ours in zip(matrices, vectors, exact, strict=True):
            theirs, _ = reference.recover_with_cvxpy(A.numpy(), b, 1e-5)
            assert ours.converged
            assert np.array_equal(top_support(ours.z, 2), top_support(theirs, 2))
            assert np.linalg.norm(ours.z - theirs) < tolerance * np.linalg.norm(ours.z)


def test_cells_are_all_compared() -> None:
    """The supports of these tests have every operation in both kinds of cell."""
    space = CellSpace()
    for cell in CELLS:
        kinds = {
            c % space.n_ops for seed in range(4) for node in random_supports(space, seed)[cell] for c in node
        }
        assert kinds == set(range(len(PRIMITIVES)))
