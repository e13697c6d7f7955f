"""Dead parts of a network, on which its output does not depend: they are found, do not run and do not train."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from istanas.nets import NodeCode, Supernet, TargetNet, to_channels_last
from istanas.nets.operations import SepConv
from istanas.nets.skeleton import live_places, live_states
from istanas.search.sparse_coding import draw_matrices
from istanas.space import CELLS, CellSpace, Genotype, Picks
from tests.istanas.supernets import SUPPORTS, TWO_STAGE, counted, install, rand, supernet


@pytest.mark.parametrize(
    ("reads", "concat", "live"),
    [
        ([[0, 1]], [2], {0, 1, 2}),
        ([[1, 1], [2, 2]], [2, 3], {1, 2, 3}),  # No operation reads input 0.
        ([[0], [1], [2]], [4], {0, 2, 4}),  # Node 1 is dead, and therefore input 1.
        ([[0], [2], [3]], [2], {0, 2}),  # A chain of dead nodes.
        ([[0], [2], [3]], [4], {0, 2, 3, 4}),
        ([[0]], [2, 1], {0, 1, 2}),  # An input that is concatenated.
        ([[0]], [1], {1}),
    ],
)
def test_live_states_of_a_cell(reads: list[list[int]], concat: list[int], live: set[int]) -> None:
    assert live_states(reads, concat) == live


BOTH, FIRST, SECOND = {0, 1, 2}, {0, 2}, {1, 2}


@pytest.mark.parametrize(
    ("normal", "reduce", "auxiliary", "live"),
    [
        (BOTH, BOTH, None, "11111111"),
        (SECOND, BOTH, None, "01111111"),
        (FIRST, BOTH, None, "01010101"),  # Every other cell, and no reduction.
        (FIRST, FIRST, 4, "11111111"),  # The cells before the head and before the last cell.
        (FIRST, SECOND, 4, "01010111"),
        (SECOND, SECOND, None, "01111111"),
        (SECOND, FIRST, None, "01101011"),
    ],
)
def test_live_places_in_depth(normal: set[int], reduce: set[int], auxiliary: int | None, live: str) -> None:
    """Six cells with reductions at 2 and 4, computed by hand from the last cell backwards."""
    kinds = ["normal", "normal", "reduce", "normal", "reduce", "normal"]
    found = live_places(kinds, {"normal": normal, "reduce": reduce}, auxiliary)
    assert "".join(str(int(place)) for place in found) == live


def test_a_network_of_one_cell() -> None:
    assert live_places(["reduce"], {"reduce": FIRST}) == (True, False, True)
    assert live_places(["reduce"], {"reduce": SECOND}, auxiliary=0) == (False, True, True)


CellForward = Callable[[nn.Module], list[list[tuple[int, nn.Module, Any]]]]


def everything(net: Any, x: Tensor, terms: CellForward) -> tuple[Tensor, Tensor | None]:
    """Compute the network with its dead parts. `terms` has a cell's (state, operation, factor) for each node."""
    if net.stem.kind == "cifar":
        s0 = s1 = net.stem.stem(x)
    else:
        s0 = net.stem.stem0(x)
        s1 = net.stem.stem1(s0)
    auxiliary = None
    for i, cell in enumerate(net.cells):
        states = [cell.preprocess0(s0), cell.preprocess1(s1)]
        for node in terms(cell):
            first, *others = [factor * op(states[state]) for state, op, factor in node]
            states.append(sum(others, start=first))
        concat = getattr(cell, "concat", range(2, len(states)))
        s0, s1 = s1, torch.cat([states[state] for state in concat], 1)
        if net.auxiliary_head is not None and net.training and i == 2 * len(net.cells) // 3:
            auxiliary = net.auxiliary_head(s1)
    return net.classifier(s1.mean((2, 3))), auxiliary


def target_terms(genotype: Genotype) -> CellForward:
    def terms(cell: Any) -> list[list[tuple[int, nn.Module, Any]]]:
        ops = iter(cell.ops)
        return [[(state, next(ops), 1.0) for _, state in node] for node in genotype.picks(cell.kind)]

    return terms


def supernet_terms(net: Supernet, supports: dict[str, list[tuple[int, ...]]]) -> CellForward:
    def terms(cell: Any) -> list[list[tuple[int, nn.Module, Any]]]:
        nodes = []
        for node, (support, alphas) in enumerate(
            zip(supports[cell.kind], net.edge_weights()[cell.kind], strict=True)
        ):
            picks = [divmod(candidate, net.space.n_ops) for candidate in support]
            ops = [cell.ops[sum(range(2, node + 2)) + state][op] for state, op in picks]
            nodes.append([(s, op, a) for (s, _), op, a in zip(picks, ops, alphas, strict=True)])
        return nodes

    return terms


def names_of(net: nn.Module, tensors: list[Any]) -> set[str]:
    """Return the names of parameters or buffers, each of which must occur once and belong to the network."""
    names = {id(t): name for name, t in [*net.named_parameters(), *net.named_buffers()]}
    assert len({id(t) for t in tensors}) == len(tensors)
    return {names[id(t)] for t in tensors}


def with_gradient(net: nn.Module) -> set[str]:
    return {name for name, p in net.named_parameters() if p.grad is not None}


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Compare up to the rounding of an edge weight inside or outside of the batch norm's factor."""
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def check_live_parts(net: Any, terms_of: Callable[[Any], CellForward]) -> None:
    """Values are those of the whole computation, and exactly the active parts get gradients or change."""
    x = rand(3, 3, 8, 8)
    with torch.no_grad():
        for buffer in net.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(
                    0.5, 2.0, generator=torch.Generator().manual_seed(0)
                )  # Any batch changes them.
    whole = copy.deepcopy(net)
    with torch.no_grad():
        expected = everything(whole.eval(), x, terms_of(whole))[0]
        assert_same(net.eval()(x), expected)

    before = {name: value.clone() for name, value in net.named_buffers()}
    is_target = isinstance(net.train(), TargetNet)
    ours = net.forward_with_auxiliary(x) if is_target else (net(x), None)
    theirs = everything(whole.train(), x, terms_of(whole))
    for outputs in (ours, theirs):
        sum(out.logsumexp(1).sum() for out in outputs if out is not None).backward()
    assert_same(ours[0], theirs[0])
    if theirs[1] is not None:
        assert_same(ours[1], theirs[1])
    alphas = [] if is_target else net.active_alphas()
    assert with_gradient(net) == with_gradient(whole) == names_of(net, [*net.active_parameters(), *alphas])

    moved = {name for name, value in net.named_buffers() if not torch.equal(value, before[name])}
    counters = {name for name in moved if name.endswith("num_batches_tracked")}
    assert moved - counters == names_of(net, net.active_buffers())
    assert {name.rpartition(".")[0] for name in counters} == {n.rpartition(".")[0] for n in moved - counters}


def check_target(genotype: Genotype, layers: int, **options: Any) -> TargetNet:
    torch.manual_seed(0)
    net = TargetNet(genotype, 2, layers, 5, **options).double()
    check_live_parts(net, lambda _: target_terms(genotype))
    return net


FEW_OPS = ("skip_connect", "max_pool_3x3", "dil_conv_3x3")


def check_supernet(supports: dict[str, list[tuple[int, ...]]], layers: int, **options: Any) -> Supernet:
    space = CellSpace(len(supports["normal"]), FEW_OPS, len(supports["normal"][0]))
    net = supernet(supports, space=space, layers=layers, **options)
    check_live_parts(net, lambda network: supernet_terms(network, supports))
    return net


@st.composite
def cells(draw: st.DrawFn, n_nodes: int, n_picks: int) -> list[tuple[int, ...]]:
    """Draw, for each node, distinct candidates of FEW_OPS in rising order."""
    return [
        tuple(
            sorted(
                draw(
                    st.sets(st.integers(0, (node + 2) * len(FEW_OPS) - 1), min_size=n_picks, max_size=n_picks)
                )
            )
        )
        for node in range(n_nodes)
    ]


NETWORKS = {
    "n_nodes": st.integers(1, 3),
    "n_picks": st.integers(1, 2),
    "layers": st.integers(3, 8),
    "stem": st.sampled_from(["cifar", "imagenet"]),
    "op_batchnorm": st.booleans(),
    "data": st.data(),
}


@given(auxiliary=st.booleans(), **NETWORKS)
@settings(max_examples=40, deadline=None)
def test_any_target_net_runs_and_trains_exactly_its_live_parts(
    n_nodes: int,
    n_picks: int,
    layers: int,
    stem: str,
    op_batchnorm: bool,
    auxiliary: bool,
    data: st.DataObject,
) -> None:
    def picks() -> Picks:
        supports = data.draw(cells(n_nodes, n_picks))
        return tuple(
            tuple((FEW_OPS[c % len(FEW_OPS)], c // len(FEW_OPS)) for c in support) for support in supports
        )

    def concat(first: int) -> tuple[int, ...]:
        return tuple(data.draw(st.lists(st.integers(first, n_nodes + 1), min_size=1, unique=True)))

    genotype = Genotype(picks(), picks(), concat(0), concat(2))
    check_target(genotype, layers, stem=stem, auxiliary=auxiliary, op_batchnorm=op_batchnorm)


@given(**NETWORKS)
@settings(max_examples=40, deadline=None)
def test_any_supernet_runs_and_trains_exactly_its_live_parts(
    n_nodes: int, n_picks: int, layers: int, stem: str, op_batchnorm: bool, data: st.DataObject
) -> None:
    supports = {cell: data.draw(cells(n_nodes, n_picks)) for cell in CELLS}
    check_supernet(supports, layers, stem=stem, op_batchnorm=op_batchnorm)


CONVOLUTION = 2  # In FEW_OPS; the candidates 2, 5, 8 read the states 0, 1, 2.

ON_FIRST, ON_SECOND, ON_BOTH = [(CONVOLUTION,), (8,)], [(5,), (8,)], [(CONVOLUTION,), (5,)]


def executed(net: Any) -> set[str]:
    """Return the parts that run in a forward pass: stems, and the preprocessing and operations of cells."""
    with counted(net) as calls:
        net(rand(2, 3, 8, 8))
    return {".".join(name.split(".")[:3]) for name, n_calls in calls.items() if n_calls}


def test_a_normal_cell_that_never_reads_its_first_input() -> None:
    net = check_supernet({"normal": ON_SECOND, "reduce": ON_BOTH}, 4)
    kinds = [cell.kind for cell in net.cells]
    ran = executed(net)
    assert kinds == ["normal", "reduce", "reduce", "normal"]
    assert [f"cells.{i}.preprocess0" in ran for i in range(4)] == [False, True, True, False]
    assert all(f"cells.{i}.preprocess1" in ran for i in range(4))
    assert net.active_alphas() == net.alphas()


def test_normal_cells_without_second_input_kill_every_reduction() -> None:
    """Six cells: the last reads cell 3, which reads cell 1, which reads the second stem."""
    for stem in ("cifar", "imagenet"):
        net = check_supernet({"normal": ON_FIRST, "reduce": ON_BOTH}, 6, stem=stem)
        assert [cell.kind for cell in net.cells] == [
            "normal",
            "normal",
            "reduce",
            "normal",
            "reduce",
            "normal",
        ]
        ran = executed(net)
        assert {int(name.split(".")[1]) for name in ran if name.startswith("cells.")} == {1, 3, 5}
        assert net.active_alphas() == net.node_alphas("normal")
        assert all(b.grad is None for b in net.node_alphas("reduce"))


def test_a_dead_second_stem_does_not_run() -> None:
    """Five cells: the last reads cell 2, which reads cell 0, which reads the first stem."""
    net = check_supernet({"normal": ON_FIRST, "reduce": ON_BOTH}, 5, stem="imagenet")
    assert {name.split(".")[1] for name in executed(net) if name.startswith("stem.")} == {"stem0"}
    assert not any(name.startswith("stem.stem1") for name in names_of(net, net.active_parameters()))
    # The reductions are live again, and therefore the stem.
    install(net, {"normal": ON_BOTH, "reduce": ON_BOTH})
    assert {name.split(".")[1] for name in executed(net) if name.startswith("stem.")} == {"stem0", "stem1"}
    assert net.active_alphas() == net.alphas()


def test_a_dead_node_does_not_run() -> None:
    """Node 1 (state 3) is neither concatenated nor read. Drop path draws only for operations that run."""
    picks: Picks = (
        (("sep_conv_3x3", 0),),
        (("sep_conv_5x5", 1), ("dil_conv_3x3", 2)),
        (("dil_conv_5x5", 2), ("avg_pool_3x3", 1)),
    )
    genotype = Genotype(picks, picks, (2, 4), (4,))
    net = check_target(genotype, 3)
    assert {name.split(".")[3] for name in names_of(net, net.active_parameters()) if ".ops." in name} == {
        "0",
        "3",
    }
    with counted(net) as calls:
        net.train()(rand(2, 3, 8, 8))
    assert {name.split(".")[3] for name, n in calls.items() if n and ".ops." in name} == {"0", "3", "4"}
    net.drop_path_prob = 0.5
    torch.manual_seed(1)
    net(rand(4, 3, 8, 8))
    after = torch.rand(1)
    torch.manual_seed(1)
    for _ in range(3 * 3):  # Three cells with three live operations.
        torch.empty(4, 1, 1, 1, dtype=torch.float64).bernoulli_(0.5)
    assert torch.equal(torch.rand(1), after)


def test_the_auxiliary_head_keeps_its_cell_alive_in_training() -> None:
    first: Picks = ((("dil_conv_3x3", 0),),)
    genotype = Genotype(first, first)
    with_head = check_target(genotype, 6, auxiliary=True)
    without = check_target(genotype, 6)

    def parts(net: TargetNet) -> set[int]:
        return {int(name.split(".")[1]) for name in names_of(net, net.active_parameters()) if "cells" in name}

    assert parts(with_head) == {0, 1, 2, 3, 4, 5}
    assert parts(without) == {1, 3, 5}
    assert any("auxiliary_head" in name for name in names_of(with_head, with_head.active_parameters()))
    assert executed(with_head.eval()) == executed(without.eval())


@pytest.mark.parametrize("sparsity", [1, 2, 3])
def test_of_the_whole_space_only_the_active_part_is_trained(sparsity: int) -> None:
    net = supernet(space=CellSpace(sparsity=sparsity))
    net(rand(2, 3, 16, 16)).logsumexp(1).sum().backward()
    assert with_gradient(net) == names_of(net, [*net.active_parameters(), *net.active_alphas()])
    assert len(net.active_parameters()) < len(net.weights())


def test_active_parts_are_the_networks_own_after_copy_or_change_of_type() -> None:
    for net in (TargetNet(TWO_STAGE, 2, 3, 10, auxiliary=True), supernet(SUPPORTS)):
        n_parameters, n_buffers = len(net.active_parameters()), len(net.active_buffers())
        for other in (copy.deepcopy(net), net.float(), to_channels_last(net)):
            assert len(names_of(other, other.active_parameters())) == n_parameters > 0  # type: ignore[operator]
            assert len(names_of(other, other.active_buffers())) == n_buffers > 0  # type: ignore[operator]


def test_no_batch_norm_inside_the_operations_is_trained_at_first() -> None:
    """At the published size of the one-stage search; 96,768 values are in the middle of separable convolutions."""
    net = Supernet(CellSpace(), 36, 20, 10, op_batchnorm=True)
    codes = {
        cell: [NodeCode(A, torch.zeros(A.shape[1]).double(), (0, 3)) for A in matrices]
        for cell, matrices in draw_matrices(CellSpace(), 7, "uniform", 0).items()
    }
    net.install_codes(codes)
    operations = [op for cell in net.cells for op in cell.ops.modules()]
    norms = [op for op in operations if isinstance(op, nn.BatchNorm2d)]
    middle = [op.op[3] for op in operations if isinstance(op, SepConv)]
    assert not any(p.requires_grad for norm in norms for p in norm.parameters())
    assert sum(p.numel() for norm in middle for p in norm.parameters()) == 96_768
