"""NAS-Bench-201: the benchmark's strings, its numbering, its published sizes, and searches in its space."""

import dataclasses
import json
import random
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from istanas.data import Augmentation, batches, load_dataset
from istanas.distributed import Ranks
from istanas.errors import ConfigError, GenotypeError
from istanas.nets import absorb_into_batchnorm
from istanas.nets.operations import Zero
from istanas.search import OneStageSearch, OneStageSettings, TwoStageSearch, TwoStageSettings
from istanas.space import Genotype, NasBench201Space, NetworkSize, genotype_from_text
from istanas.space.nas_bench_201 import OPERATIONS, genotype_at, index_of
from istanas.training import Compute
from tests.ranks import Outcome, run_ranks

SPACE = NasBench201Space()
PUBLISHED = NetworkSize(16, 17, 10)
TINY = NetworkSize(4, 5, 10, in_channels=1)
CPU = Compute(torch.device("cpu"))


def cell(*ops: str) -> Genotype:
    """Return the cell with these operations, in the order of the edges."""
    a, b, c, d, e, f = ops
    return genotype_from_text(f"|{a}~0|+|{b}~0|{c}~1|+|{d}~0|{e}~1|{f}~2|")


def everywhere(op: str) -> Genotype:
    return cell(*[op] * 6)


# ---------- strings and numbers
@pytest.mark.parametrize(
    ("index", "text"),
    [
        # The benchmark's code checks these three.
        (
            0,
            "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|",
        ),
        (9, "|avg_pool_3x3~0|+|none~0|none~1|+|skip_connect~0|none~1|nor_conv_3x3~2|"),
        (123, "|avg_pool_3x3~0|+|avg_pool_3x3~0|nor_conv_1x1~1|+|none~0|avg_pool_3x3~1|nor_conv_3x3~2|"),
        # The best cell on CIFAR-10 in the benchmark, whose number is in many papers.
        (
            6111,
            "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_1x1~2|",
        ),
    ],
)
def test_indices_are_those_of_the_benchmark(index: int, text: str) -> None:
    genotype = genotype_at(index)
    assert str(genotype) == text
    assert index_of(genotype) == index
    assert genotype.reference == f"nas_bench_201:{index}"
    assert SPACE.parse(f" {genotype.reference}\n") == SPACE.parse(f"{text}\n") == genotype


def test_all_cells_have_a_string_and_an_index() -> None:
    genotypes = [genotype_at(index) for index in range(15_625)]
    assert len({str(genotype) for genotype in genotypes}) == 15_625
    assert len({genotype.digest() for genotype in genotypes}) == 15_625
    for index in range(0, 15_625, 97):
        assert index_of(genotypes[index]) == index
        assert genotype_from_text(str(genotypes[index])) == genotypes[index]


def test_an_edge_reads_the_node_that_its_string_names() -> None:
    genotype = cell("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3", "none")
    assert genotype.picks("cell") == (
        (("none", 0),),
        (("skip_connect", 0),),
        (("nor_conv_1x1", 1),),
        (("nor_conv_3x3", 0),),
        (("avg_pool_3x3", 1),),
        (("none", 2),),
    )
    assert json.loads(genotype.to_json())["space"] == "nas_bench_201"
    edges = [(source, target) for source, target, *_ in SPACE.drawing(genotype)["cell"].edges]
    assert edges == [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("|none~0|", "has 1 nodes, not 3"),
        ("|none~0|+|none~0|none~1|+|none~0|none~1|none~2|+", "has 4 nodes, not 3"),
        ("|none~0|+|none~0|none~1|+|none~0|none~1|", "node 3 is "),
        ("|none~0|+none~0|none~1+|none~0|none~1|none~2|", "node 2 is "),
        ("||+|none~0|none~1|+|none~0|none~1|none~2|", r"'' of node 1 is not OPERATION~0"),
        ("|none~1|+|none~0|none~1|+|none~0|none~1|none~2|", r"'none~1' of node 1 is not OPERATION~0"),
        ("|none~0|+|none~1|none~0|+|none~0|none~1|none~2|", r"'none~1' of node 2 is not OPERATION~0"),
        (
            "|none ~0|+|none~0|none~1|+|none~0|none~1|none~2|",
            r"unknown operation 'none ' \(did you mean none\?\)",
        ),
        (
            "|conv_3x3~0|+|none~0|none~1|+|none~0|none~1|none~2|",
            r"did you mean nor_conv_3x3\?\); choose from none",
        ),
        ("|none~0|\n+|none~0|none~1|+|none~0|none~1|none~2|", "node 1 is "),
        ("|" + "x" * 50_000, "has 1 nodes, not 3"),
        ("nas_bench_201:15625", "'15625' is not an index of nas_bench_201; choose 0 to 15624"),
        ("nas_bench_201:-1", "'-1' is not an index"),
        ("nas_bench_201:1_0", "'1_0' is not an index"),
        ("nas_bench_201:\N{ARABIC-INDIC DIGIT ONE}", "is not an index"),
        ("nas_bench_201:", "'' is not an index"),
    ],
)
def test_other_texts_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(GenotypeError, match=message) as caught:
        genotype_from_text(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_damaged_strings_are_refused_or_mean_what_they_say() -> None:
    draw, refused = random.Random(0), 0
    for _ in range(2000):
        text = list(str(genotype_at(draw.randrange(15_625))))
        for _ in range(draw.randint(1, 2)):
            at = draw.randrange(1, len(text))  # It still begins with |.
            text[at : at + draw.randint(0, 2)] = draw.choice(
                ["", "|", "~", "+", "0", "2", " ", "x", "none", "\0"]
            )
        damaged = "".join(text)
        try:
            assert str(SPACE.parse(damaged)) == damaged.strip()
        except GenotypeError:
            refused += 1
    assert 1000 < refused < 2000


@pytest.mark.parametrize("text", ["nor_conv_3x3~0", "nas_bench_301:1", "{}", "ISTA_twostage", ""])
def test_texts_of_another_form_are_left_to_others(text: str) -> None:
    assert SPACE.parse(text) is None


def test_a_genotype_that_is_not_in_the_benchmark_has_no_string() -> None:
    whole = genotype_at(9)
    short = dataclasses.replace(whole, choices=(("cell", whole.picks("cell")[:5]),))
    assert short.reference is None
    assert "|" not in str(short)
    long = dataclasses.replace(whole, choices=(*whole.choices, ("stem", whole.picks("cell"))))
    assert long.reference is None
    with pytest.raises(
        GenotypeError, match="'stem' is no kind of decision of the space nas_bench_201; give cell only"
    ):
        SPACE.check(long)
    with pytest.raises(GenotypeError, match="5 decisions of kind cell"):
        index_of(short)


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ((), "empty or names an operation twice"),
        (("none", "none"), "names an operation twice"),
        (("nor_conv_3", "none"), r"unknown operation 'nor_conv_3' \(did you mean nor_conv_3x3\?\)"),
    ],
)
def test_unusable_operations_are_refused(ops: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        NasBench201Space(ops=ops)
    assert caught.value.field == "space.ops"


def test_a_part_of_the_operations_is_a_part_of_the_space() -> None:
    part = NasBench201Space(ops=("skip_connect", "nor_conv_3x3"))
    part.check(part.random(3))
    SPACE.check(part.random(3))
    with pytest.raises(GenotypeError, match=r"\('none', 0\) is no candidate of cell 1"):
        part.check(cell("skip_connect", "none", *["skip_connect"] * 4))


# ---------- the network
@pytest.mark.parametrize(
    ("genotype", "params", "published_macs"),
    [
        (everywhere("nor_conv_3x3"), 1_531_546, 220.12),
        (everywhere("skip_connect"), 73_306, 7.78),
        (cell(*["nor_conv_3x3"] * 4, "nor_conv_1x1", "skip_connect"), 1_073_466, 153.27),
    ],
)
def test_the_sizes_are_those_of_the_benchmark(genotype: Genotype, params: int, published_macs: float) -> None:
    """Both count the multiply-adds of convolutions and the classifier, and nothing else."""
    cost = SPACE.cost(genotype, PUBLISHED, (3, 32, 32))
    assert cost.params == params
    assert round(cost.macs / 1e6, 2) == published_macs


def test_operations_without_weights_cost_nothing() -> None:
    skip = SPACE.cost(everywhere("skip_connect"), PUBLISHED, (3, 32, 32))
    for op in ("none", "avg_pool_3x3"):
        assert SPACE.cost(everywhere(op), PUBLISHED, (3, 32, 32)) == skip


@pytest.mark.parametrize(
    ("layers", "choices"), [(1, "5"), (4, "5"), (6, "5 or 8"), (10, "8 or 11"), (16, "14 or 17")]
)
def test_other_numbers_of_layers_are_refused(layers: int, choices: str) -> None:
    with pytest.raises(ConfigError, match=f"{layers} is not 3 N .* choose {choices}$") as caught:
        SPACE.check_size(dataclasses.replace(PUBLISHED, layers=layers))
    assert caught.value.field == "layers"


def test_only_the_stem_for_small_pictures_exists() -> None:
    with pytest.raises(ConfigError, match="imagenet is not a stem") as caught:
        SPACE.check_size(dataclasses.replace(PUBLISHED, stem="imagenet"))
    assert caught.value.field == "stem"


def test_average_pooling_leaves_out_the_border() -> None:
    """A constant picture stays constant, so that only the operation's own pixels count."""
    net = SPACE.target(everywhere("avg_pool_3x3"), TINY)
    pooled = net.network.layers[0].edges[0](torch.ones(1, 4, 8, 8))
    assert torch.equal(pooled, torch.ones(1, 4, 8, 8))


@pytest.mark.parametrize("side", [8, 15, 30])
def test_a_residual_block_is_a_published_one_at_any_size(side: int) -> None:
    net = SPACE.target(everywhere("skip_connect"), TINY).double().eval()
    block, x = net.network.layers[1], torch.randn(2, 4, side, side).double()
    (a, b), (_, shortcut) = block.convolutions, block.shortcut
    inner = a.op[2](F.conv2d(F.relu(x), a.op[1].weight, stride=2, padding=1))
    inner = b.op[2](F.conv2d(F.relu(inner), b.op[1].weight, padding=1))
    even = F.pad(x, (0, side % 2, 0, side % 2), mode="replicate") if side % 2 else x
    expected = inner + F.conv2d(F.avg_pool2d(even, 2), shortcut.weight)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)
    assert net(torch.randn(2, 1, side, side).double()).shape == (2, 10)


def test_a_cell_without_any_path_learns_only_the_classes_frequencies() -> None:
    net = SPACE.target(everywhere("none"), TINY).train()
    x, y = torch.randn(8, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    F.cross_entropy(net(x), y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert net.network.classifier.bias.grad.abs().max() > 0
    assert net.network.stem[0].weight.grad.abs().max() == 0
    logits = net.eval()(x)
    assert torch.equal(logits, logits[:1].expand_as(logits))


# ---------- searches
def loader(purpose: int, epoch: int, ranks: Ranks) -> Any:
    return batches(
        load_dataset("digits"),
        "train",
        torch.arange(purpose * 200, purpose * 200 + 72),
        batch_size=16,
        augmentation=Augmentation(),
        device=torch.device("cpu"),
        seed=purpose,
        epoch=epoch,
        shuffle=True,
        rank=ranks.rank,
        world_size=ranks.size,
        dtype=torch.float64,
    )


def two_stage(ranks: Ranks, space: NasBench201Space = SPACE) -> TwoStageSearch:
    settings = TwoStageSettings(epochs=3, arch_lr=0.05, alphas_scale=0.1, n_measurements=3)
    torch.manual_seed(0)
    net = space.supernet(TINY, lambda decision: 3).double()
    for module in net.modules():  # The shares of a batch would have other statistics than the batch.
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign,misc]
    return TwoStageSearch(net, settings, CPU, 0, ranks)


def search_for_three_epochs() -> dict[str, Any]:
    ranks = Ranks.current(torch.device("cpu"))
    search = two_stage(ranks)
    genotypes, losses = [str(search.genotype())], []
    for epoch in range(3):
        weight_batches = loader(0, epoch, ranks)
        metrics = search.train_epoch(
            weight_batches,
            lambda epoch=epoch: loader(1, epoch, ranks),
            len(weight_batches),  # type: ignore[misc]
        )
        losses.append(metrics.loss)
        search.finish_epoch()
        genotypes.append(str(search.genotype()))
    return {"genotypes": genotypes, "losses": losses, "weights": search.supernet.state_dict()}


def train_without_any_path() -> dict[str, float]:
    """Run one step of a supernet whose edges all have the operation `none`."""
    ranks = Ranks.current(torch.device("cpu"))
    search = two_stage(ranks, NasBench201Space(ops=("none",)))
    weight_batches = loader(0, 0, ranks)
    metrics = search.train_epoch(weight_batches, lambda: loader(1, 0, ranks), len(weight_batches))
    return {"loss": metrics.loss, "top1": metrics.top1}


@pytest.fixture(scope="module")
def outcomes() -> list[list[Outcome]]:
    return run_ranks([search_for_three_epochs, train_without_any_path], 2)


@pytest.mark.slow
def test_two_ranks_search_as_one_process(outcomes: list[list[Outcome]]) -> None:
    alone = search_for_three_epochs()
    assert len(set(alone["genotypes"])) > 1, "the architecture never changed"
    for outcome in outcomes[0]:
        together = outcome.value
        assert together["genotypes"] == alone["genotypes"]
        torch.testing.assert_close(together["losses"], alone["losses"], rtol=0, atol=1e-9)
        torch.testing.assert_close(together["weights"], alone["weights"], rtol=0, atol=1e-9)


@pytest.mark.slow
def test_two_ranks_train_a_supernet_without_any_path(outcomes: list[list[Outcome]]) -> None:
    alone = train_without_any_path()
    assert alone["top1"] < 0.3
    for outcome in outcomes[1]:
        assert outcome.value == pytest.approx(alone, abs=1e-9)


@pytest.mark.parametrize("ops", [OPERATIONS, ("none", "skip_connect"), ("none",)])
def test_a_one_stage_search_absorbs_its_edge_weights(ops: Any) -> None:
    settings = OneStageSettings(
        max_search_epochs=2, train_epochs=2, n_measurements=3, arch_lr=0.05, alphas_scale=0.1, max_params=None
    )
    space = NasBench201Space(ops=ops)
    torch.manual_seed(0)
    net = space.supernet(dataclasses.replace(TINY, op_batchnorm=True), lambda decision: 3).double()
    search = OneStageSearch(net, settings, CPU, 0)
    while not search.is_done:
        weight_batches = loader(0, search.epoch, Ranks())
        search.train_epoch(weight_batches, None, len(weight_batches))
        search.finish_epoch()
    target = absorb_into_batchnorm(net.eval())
    x = torch.randn(8, 1, 8, 8).double()
    with torch.no_grad():
        assert (net(x) - target(x)).abs().max() <= 1e-5
    kept = [op for ((op, _),) in search.genotype().picks("cell")]
    assert sum(isinstance(m, Zero) for m in target.modules()) == 3 * kept.count("none")


@pytest.mark.parametrize("choices", [{"x": [[["none", 0]]]}, {"cell": [[["none", 0]], [["none", 0]]]}])
def test_a_genotype_of_another_form_is_not_drawn(choices: Any) -> None:
    genotype = Genotype.from_dict({"version": 1, "space": "nas_bench_201", "choices": choices})
    with pytest.raises(GenotypeError, match=r"is no kind of decision|and the space nas_bench_201 has 6"):
        SPACE.drawing(genotype)


@pytest.mark.parametrize("kind", ["../cell", 'cell" onload="', "", "a b"])
def test_a_kind_that_could_not_name_a_file_is_refused(kind: str) -> None:
    with pytest.raises(GenotypeError, match="cannot name a kind of decision"):
        Genotype(space="nas_bench_201", choices=((kind, ((("none", 0),),)),))
