"""The space: indices of a cell; reading, checking, comparing and drawing random genotypes."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from istanas.errors import ConfigError, GenotypeError
from istanas.nets import Supernet
from istanas.space import (
    CELLS,
    PRIMITIVES,
    PUBLISHED,
    CellSpace,
    Genotype,
    Picks,
    genotype_from_supports,
    random_genotype,
)
from istanas.sparse import measurement_matrix, recover, top_support


@st.composite
def cells(draw: st.DrawFn, first_concat: int) -> tuple[Picks, tuple[int, ...]]:
    """Draw a cell of 1 to 5 nodes with 1 to 4 picks each, and a concatenation of some of its states."""
    n_nodes = draw(st.integers(1, 5))
    nodes = []
    for node in range(n_nodes):
        pick = st.tuples(st.sampled_from(PRIMITIVES), st.integers(0, node + 1))
        nodes.append(tuple(draw(st.lists(pick, min_size=1, max_size=4))))
    states = st.integers(first_concat, n_nodes + 1)
    return tuple(nodes), tuple(draw(st.lists(states, min_size=1, unique=True)))


@st.composite
def genotypes(draw: st.DrawFn) -> Genotype:
    (normal, normal_concat), (reduce, reduce_concat) = draw(cells(0)), draw(cells(2))
    return Genotype(normal, reduce, normal_concat, reduce_concat)


spaces = st.builds(
    CellSpace,
    n_nodes=st.integers(1, 7),
    ops=st.lists(st.sampled_from(PRIMITIVES), min_size=1, unique=True).map(tuple),
    sparsity=st.integers(1, 2),
    one_op_per_edge=st.booleans(),
)


# --- topology ---


def test_default_space_is_the_published_one() -> None:
    space = CellSpace()
    assert space.ops == (
        "max_pool_3x3",
        "avg_pool_3x3",
        "skip_connect",
        "sep_conv_3x3",
        "sep_conv_5x5",
        "dil_conv_3x3",
        "dil_conv_5x5",
    )
    assert (space.n_nodes, space.sparsity, space.one_op_per_edge) == (4, 2, False)
    assert [space.n_candidates(i) for i in range(4)] == [14, 21, 28, 35]


def groups_of(space: CellSpace, node: int) -> Any:
    return space.decisions["normal"][node].groups


@given(spaces)
def test_candidates_and_edges_are_bijections(space: CellSpace) -> None:
    edges = []
    for node in range(space.n_nodes):
        pairs = list(itertools.product(range(node + 2), range(space.n_ops)))
        flat = [space.candidate(node, state, op) for state, op in pairs]
        assert flat == list(range(space.n_candidates(node)))
        assert [space.split(c) for c in flat] == pairs
        edges += [space.edge(node, state) for state in range(space.n_node_edges(node))]
    assert edges == list(range(space.n_edges))


@pytest.mark.parametrize(("state", "op"), [(-1, 0), (3, 0), (0, -1), (0, 7)])
def test_candidate_out_of_range(state: int, op: int) -> None:
    with pytest.raises(IndexError, match="node 1 has no candidate"):
        CellSpace().candidate(1, state, op)


def test_groups_name_the_edge_of_every_candidate() -> None:
    space = CellSpace(one_op_per_edge=True)
    for node in range(space.n_nodes):
        groups = groups_of(space, node)
        assert groups is not None
        assert groups.tolist() == [space.split(c)[0] for c in range(space.n_candidates(node))]
    assert groups_of(CellSpace(), 0) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_nodes": 0}, "space.nodes: 0 is too small"),
        ({"ops": ()}, r"space.ops: \[\] is empty"),
        ({"ops": ("skip_connect", "skip_connect")}, "give each operation once"),
        ({"ops": ("none",)}, "space.ops: 'none' is not a registered operation; choose from max_pool_3x3"),
        ({"sparsity": 0}, "space.sparsity: 0 .*; choose 1 to 14"),
        ({"sparsity": 15}, "space.sparsity: 15 .*; choose 1 to 14"),
        ({"ops": ("skip_connect",), "sparsity": 3}, "space.sparsity: 3 .*; choose 1 to 2"),
        ({"sparsity": 3, "one_op_per_edge": True}, "space.sparsity: 3 .*edges.*; choose 1 to 2"),
    ],
)
def test_space_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        CellSpace(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sparsity", [1, 2, 14])
def test_sparsity_from_one_to_all_candidates_of_the_first_node(sparsity: int) -> None:
    genotype = random_genotype(0, CellSpace(sparsity=sparsity))
    assert {len(node) for cell in CELLS for node in genotype.picks(cell)} == {sparsity}


@pytest.mark.parametrize("m", [1, 7, 50])
@pytest.mark.parametrize("sparsity", [1, 3])
def test_any_number_of_measurements(m: int, sparsity: int) -> None:
    """Recovery and supernet accept m below, between and above the numbers of candidates, 14 .. 35."""
    space = CellSpace(sparsity=sparsity)
    b = np.random.default_rng(m).normal(size=m)
    for node in range(space.n_nodes):
        A = measurement_matrix("uniform", m, space.n_candidates(node), seed=node)
        result = recover(A, b, l1_weight=1e-2)
        assert result.converged
        assert len(top_support(result.z, sparsity)) == sparsity
    net = Supernet(space, 2, 2, 3, n_measurements=m)
    assert [tuple(p.shape) for p in net.alphas()] == [(m,)] * 8


@given(st.integers(0, 3), st.integers(1, 2), st.integers(0, 2**32 - 1))
def test_one_op_per_edge_never_shares_an_edge(node: int, sparsity: int, seed: int) -> None:
    """The rule holds for any z, such as codes with few, clustered or tied nonzeros."""
    space = CellSpace(sparsity=sparsity, one_op_per_edge=True)
    rng = np.random.default_rng(seed)
    z = rng.integers(-2, 3, space.n_candidates(node)) * rng.random(space.n_candidates(node)).round(1)
    support = top_support(z, sparsity, groups=groups_of(space, node))
    states = [space.split(int(c))[0] for c in support]
    assert len(set(states)) == sparsity
    best = sorted((-np.abs(z).reshape(-1, space.n_ops).max(1)).tolist())[:sparsity]
    assert sorted((-np.abs(z[support])).tolist()) == best  # The best operations of the best edges.


def test_without_the_rule_two_picks_may_share_an_edge() -> None:
    z = np.zeros(14)
    z[[8, 9]] = 1.0, 2.0
    assert top_support(z, 2, groups=groups_of(CellSpace(), 0)).tolist() == [8, 9]
    assert top_support(z, 2, groups=groups_of(CellSpace(one_op_per_edge=True), 0)).tolist() == [0, 9]


# --- genotypes ---


def test_published_cells(golden_dir: Path) -> None:
    golden = json.loads((golden_dir / "published.json").read_text())
    assert {name: g.to_dict() for name, g in PUBLISHED.items()} == golden
    assert {name: Genotype.from_dict(value) for name, value in golden.items()} == PUBLISHED


@given(genotypes())
def test_json_round_trip(genotype: Genotype) -> None:
    back = Genotype.from_json(genotype.to_json())
    assert back == genotype
    assert back.to_json() == genotype.to_json()
    assert back.digest() == genotype.digest()
    assert Genotype.from_json(genotype.to_json().encode()) == genotype


@given(genotypes(), st.randoms(use_true_random=False))
def test_digest_ignores_the_order_of_picks(genotype: Genotype, random: Any) -> None:
    def shuffled(picks: Picks) -> Picks:
        return tuple(tuple(random.sample(node, len(node))) for node in picks)

    other = Genotype(
        shuffled(genotype.normal),
        shuffled(genotype.reduce),
        genotype.normal_concat,
        genotype.reduce_concat,
    )
    assert other.digest() == genotype.digest()
    assert (other == genotype) == (other.to_dict() == genotype.to_dict())  # The stored order is kept.


def test_equality_sees_the_order_that_the_digest_ignores() -> None:
    picks: Picks = ((("skip_connect", 0), ("sep_conv_3x3", 1)),)
    swapped: Picks = ((("sep_conv_3x3", 1), ("skip_connect", 0)),)
    a, b = Genotype(picks, picks), Genotype(swapped, picks)
    assert a != b
    assert a.digest() == b.digest()


def test_digests_tell_networks_apart() -> None:
    base = PUBLISHED["ISTA_twostage"]
    others = [
        Genotype(base.reduce, base.normal),
        Genotype(tuple(reversed(base.normal[:1])) + base.normal[:1], base.reduce),
        Genotype(base.normal, base.reduce, (2, 3, 4)),
        Genotype(((("skip_connect", 1), ("dil_conv_3x3", 0)), *base.normal[1:]), base.reduce),
    ]
    digests = {g.digest() for g in [base, *others, *PUBLISHED.values()]}
    assert len(digests) == 7
    assert all(len(d) == 64 and set(d) <= set("0123456789abcdef") for d in digests)


def test_digest_is_sha256_of_the_canonical_json() -> None:
    """The digest must not change, because runs on disk and in MLflow are found by it."""
    g = Genotype(((("skip_connect", 1), ("avg_pool_3x3", 0)),), ((("max_pool_3x3", 1),),))
    canonical = (
        '{"normal":[[["avg_pool_3x3",0],["skip_connect",1]]],"normal_concat":[2],'
        '"reduce":[[["max_pool_3x3",1]]],"reduce_concat":[2],"version":1}'
    )
    assert g.digest() == hashlib.sha256(canonical.encode()).hexdigest()


@pytest.mark.parametrize("n_picks", [1, 2, 3, 14])
def test_any_number_of_inputs_per_node(n_picks: int) -> None:
    node = tuple(itertools.islice(itertools.cycle((op, s) for op in PRIMITIVES for s in (0, 1)), n_picks))
    g = Genotype(normal=(node, (("skip_connect", 2),)), reduce=(node,))
    assert [len(node) for node in Genotype.from_json(g.to_json()).normal] == [n_picks, 1]
    assert g.normal_concat == (2, 3)
    assert g.reduce_concat == (2,)


def edited(**fields: Any) -> dict[str, Any]:
    """Return a valid one-node genotype as a JSON object, with some fields replaced."""
    good = {
        "version": 1,
        "normal": [[["skip_connect", 0]]],
        "normal_concat": [2],
        "reduce": [[["max_pool_3x3", 1]]],
        "reduce_concat": [2],
    }
    return good | fields


def test_the_genotype_that_is_edited_below_is_good() -> None:
    assert Genotype.from_dict(edited()).normal == ((("skip_connect", 0),),)


BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    (
        {"normal": [[["none", 0]]]},
        "normal",
        "node 0: 'none' is not a registered operation; choose from max_pool_3x3",
    ),
    ({"reduce": [[["__import__('os')", 0]]]}, "reduce", "node 0: .* is not a registered operation"),
    ({"normal": [[["skip_connect", 2]]]}, "normal", "state 2 of node 0 is out of range; choose 0 to 1"),
    ({"normal": [[["skip_connect", -1]]]}, "normal", "state -1 of node 0 is out of range"),
    ({"normal": [[["skip_connect", True]]]}, "normal", "True.* of node 0"),
    ({"normal": [[["skip_connect", 1.0]]]}, "normal", r"1\.0.* of node 0"),
    ({"normal": [[["skip_connect", "0"]]]}, "normal", "of node 0"),
    ({"normal": [[["skip_connect"]]]}, "normal", "of node 0"),
    ({"normal": [[["skip_connect", 0, 1]]]}, "normal", "of node 0"),
    ({"normal": [["skip_connect", 0]]}, "normal", "'skip_connect' of node 0 is not a pick"),
    ({"normal": [[[0, "skip_connect"]]]}, "normal", "of node 0"),
    ({"normal": []}, "normal", "no nodes"),
    ({"normal": [[]]}, "normal", "node 0 has no input"),
    ({"normal": None}, "normal", "not a list of nodes"),
    ({"reduce": {"0": []}}, "reduce", "not a list of nodes"),
    ({"normal_concat": []}, "normal_concat", r"\[\] is not a list of states"),
    ({"normal_concat": [3]}, "normal_concat", r"\[3\] .*from 0 to 2"),
    ({"normal_concat": [2, 2]}, "normal_concat", r"\[2, 2\] has a repeated or invalid state; give distinct"),
    ({"normal_concat": [True]}, "normal_concat", r"\[True\] is not"),
    ({"normal_concat": [2.0]}, "normal_concat", r"\[2.0\] is not"),
    ({"reduce_concat": "2"}, "reduce_concat", "'2' is not"),
    ({"reduce_concat": [1, 2]}, "reduce_concat", r"\[1, 2\] .*from 2 to 2"),
    ({"version": 2}, "version", "unknown version 2; use version 1"),
    ({"version": 0}, "version", "unknown version 0"),
    ({"version": "1"}, "version", "unknown version '1'"),
    ({"version": True}, "version", "unknown version True"),
    ({"version": 1.0}, "version", "unknown version 1.0"),
    ({"version": None}, "version", "unknown version None"),
]


@pytest.mark.parametrize(("fields", "field", "message"), BAD_FIELDS)
def test_bad_field_is_named_in_one_line(fields: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(GenotypeError, match=message) as caught:
        Genotype.from_json(json.dumps(edited(**fields)))
    assert "\n" not in str(caught.value)
    assert caught.value.field == f"genotype.{field}"
    assert caught.value.remedy


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(GenotypeError, match=r"^genotype: unknown field 'extra'; remove it$"):
        Genotype.from_json(json.dumps(edited(extra=1)))


@pytest.mark.parametrize("field", ["version", "normal", "normal_concat", "reduce", "reduce_concat"])
def test_missing_field_is_named(field: str) -> None:
    data = edited()
    del data[field]
    with pytest.raises(GenotypeError, match=field):
        Genotype.from_dict(data)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "1",
        "null",
        "NaN",
        '"genotype"',
        "[" * 100_000,
        "9" * 5000,
        b"\xff\xfe\xff",
        '{"version": 1e999}',
    ],
)
def test_text_that_is_no_genotype(text: str | bytes) -> None:
    with pytest.raises(GenotypeError, match="genotype") as caught:
        Genotype.from_json(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


DEEP: Any = 0
for _ in range(600):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    "value", ["x\ny" * 100_000, DEEP, [0] * 100_000, 10**1000], ids=["long", "deep", "wide", "int"]
)
@pytest.mark.parametrize(
    "place",
    [
        lambda v: {"version": v},
        lambda v: {"normal": v},
        lambda v: {"normal": [[v]]},
        lambda v: {"normal": [[["skip_connect", v]]]},
        lambda v: {"normal": [[[v, 0]]]},
        lambda v: {"reduce_concat": v},
        lambda v: {"reduce_concat": [v]},
        lambda v: {str(v): 0},
    ],
    ids=["version", "cell", "pick", "state", "op", "concat", "concat-state", "name"],
)
def test_huge_values_give_short_errors(place: Callable[[Any], dict[str, Any]], value: Any) -> None:
    with pytest.raises(GenotypeError, match="genotype") as caught:
        Genotype.from_json(json.dumps(edited(**place(value))))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("state", [True, 1.0, "0", None])
def test_a_state_is_an_integer_in_python_too(state: Any) -> None:
    with pytest.raises(GenotypeError, match=r"state .* is out of range"):
        Genotype(normal=((("skip_connect", state),),), reduce=((("skip_connect", 0),),))


def test_skip_ratio() -> None:
    # In ISTA_twostage, two of the eight normal picks are skips, and none of the eight others.
    assert PUBLISHED["ISTA_twostage"].skip_ratio() == 2 / 16


def test_genotype_from_supports_orders_by_candidate() -> None:
    space = CellSpace(n_nodes=2)
    g = genotype_from_supports(space, {"normal": [[9, 0], [20, 3]], "reduce": [[1, 2], [7, 6]]})
    assert g.normal == (
        (("max_pool_3x3", 0), ("skip_connect", 1)),
        (("sep_conv_3x3", 0), ("dil_conv_5x5", 2)),
    )
    assert g.reduce[1] == (("dil_conv_5x5", 0), ("max_pool_3x3", 1))


# --- random genotypes ---


@given(st.integers(0, 2**63 - 1), spaces)
def test_random_genotype_is_seeded_and_of_the_space(seed: int, space: CellSpace) -> None:
    if space.sparsity > space.n_candidates(0):
        return
    g = random_genotype(seed, space)
    assert g == random_genotype(seed, space)
    for cell in CELLS:
        assert len(g.picks(cell)) == space.n_nodes
        for node in g.picks(cell):
            assert len(set(node)) == len(node) == space.sparsity
            assert {op for op, _ in node} <= set(space.ops)
            if space.one_op_per_edge:
                assert len({state for _, state in node}) == space.sparsity


def test_random_genotypes_differ_by_seed_and_cell() -> None:
    draws = [random_genotype(seed, CellSpace()) for seed in range(20)]
    assert len({g.digest() for g in draws}) == 20
    assert all(g.normal != g.reduce for g in draws)


@pytest.mark.parametrize("one_op_per_edge", [False, True])
def test_random_genotype_is_uniform(one_op_per_edge: bool) -> None:
    """All allowed pairs of candidates of node 1 are equally frequent: chi-squared is within 5 deviations."""
    space = CellSpace(n_nodes=2, ops=PRIMITIVES[:3], one_op_per_edge=one_op_per_edge)
    counts = Counter(frozenset(random_genotype(seed, space).normal[1]) for seed in range(3000))
    n_pairs = 27 if one_op_per_edge else 36
    assert len(counts) == n_pairs
    expected = 3000 / n_pairs
    statistic = sum((c - expected) ** 2 / expected for c in counts.values())
    assert statistic < n_pairs - 1 + 5 * (2 * (n_pairs - 1)) ** 0.5
