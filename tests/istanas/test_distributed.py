"""Several ranks act as one: equal gradients and architectures, only active bytes sent, one genotype or an error."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from istanas.data import Augmentation, Batch, batches, load_dataset
from istanas.distributed import Ranks
from istanas.errors import DivergedError, IstanasError, SolverError
from istanas.nets import Supernet, TargetNet
from istanas.search import TwoStageSearch, TwoStageSettings
from istanas.space import CellSpace, random_genotype
from istanas.training import Compute, Metrics, Totals, check_finite, evaluate, train_target_epoch
from tests.ranks import CountingRanks, Outcome, run_ranks

CPU = Compute(torch.device("cpu"))
EPOCHS, BATCH, PICTURES = 3, 16, 72  # 72 = 4 * 16 + 8, so that the last batch is smaller.
SPACE = CellSpace(n_nodes=3)
# The alphas move fast, so that the architecture changes within an epoch of a few steps.
SETTINGS = TwoStageSettings(epochs=EPOCHS, arch_lr=0.05, alphas_scale=0.1, termination_tol=None)


def freeze_batchnorm(net: nn.Module) -> None:
    """Keep batch norm in eval mode, so that its output does not depend on the other pictures of the batch."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign,misc]


def make_search(ranks: Ranks, *, frozen: bool = True, dtype: torch.dtype = torch.float64) -> TwoStageSearch:
    torch.manual_seed(0)
    net = Supernet(SPACE, 4, 3, 10, in_channels=1).to(dtype)
    if frozen:
        freeze_batchnorm(net)
    return TwoStageSearch(net, SETTINGS, CPU, 0, ranks)


def loader(purpose: int, epoch: int, n: int, ranks: Ranks, dtype: torch.dtype = torch.float64) -> Any:
    return batches(
        load_dataset("digits"),
        "train",
        torch.arange(purpose * 200, purpose * 200 + n),
        batch_size=BATCH,
        augmentation=Augmentation(),
        device=torch.device("cpu"),
        seed=purpose,
        epoch=epoch,
        shuffle=True,
        rank=ranks.rank,
        world_size=ranks.size,
        dtype=dtype,
    )


def gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    return torch.cat([torch.zeros(0).double(), *(p.grad.flatten() for p in parameters if p.grad is not None)])


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[Outcome]]:
    """What every function below returned or raised on each of two ranks, which are started once for all tests."""
    functions = [
        search_for_three_epochs,
        retrain_for_two_epochs,
        bytes_per_step,
        recover_with_a_corrupt_rank,
        each_primitive,
        finish_with_one_diverged_rank,
        count_top5,
        count_top5_where_a_rank_has_no_batch,
    ]
    return dict(zip([f.__name__ for f in functions], run_ranks(functions, 2), strict=True))


# ---------- equality
def search_for_three_epochs() -> dict[str, Any]:
    """Run a search on this process's share; return all gradients of both steps, the metrics and the genotypes."""
    ranks = Ranks.current(torch.device("cpu"))
    search = make_search(ranks)
    seen: dict[str, Any] = {"alphas": [], "weights": [], "metrics": [], "genotypes": []}

    def observe(step: int, totals: Totals) -> None:
        seen["alphas"].append(gradients(search.alphas))
        seen["weights"].append(gradients(search.weights))

    for epoch in range(EPOCHS):
        # The alpha half is shorter than the weight half, and its last batch is uneven for three ranks.
        weight_batches, n_alpha = loader(0, epoch, PICTURES, ranks), 35
        train = search.train_epoch(
            weight_batches,
            lambda epoch=epoch, n=n_alpha: loader(1, epoch, n, ranks),  # type: ignore[misc]
            len(weight_batches),
            observe,
        )
        valid = search.validate(loader(1, 0, n_alpha, ranks))
        seen["metrics"].append((train, valid))
        search.recover()
        seen["genotypes"].append(search.supernet.genotype().to_json())
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_with_shares_of_a_batch_equal_one_process_with_the_whole(
    size: int, request: pytest.FixtureRequest
) -> None:
    alone = search_for_three_epochs()
    if size == 2:
        found = request.getfixturevalue("outcomes")["search_for_three_epochs"]
    else:
        (found,) = run_ranks([search_for_three_epochs], size)
    together = [outcome.value for outcome in found]
    assert len(set(alone["genotypes"])) > 1, "the architecture never changed"
    n_steps = -(-PICTURES // BATCH)
    assert len(alone["weights"]) == EPOCHS * n_steps
    for seen in together:
        assert seen["genotypes"] == alone["genotypes"]
        for kind in ("alphas", "weights"):
            for own, whole in zip(seen[kind], alone[kind], strict=True):
                assert whole.norm() > 1e-6
                torch.testing.assert_close(own, whole, rtol=0, atol=1e-9)
        # Metrics are over all pictures, each counted once.
        assert [train.count for train, _ in seen["metrics"]] == [PICTURES] * EPOCHS
        assert [valid.count for _, valid in seen["metrics"]] == [35] * EPOCHS
        torch.testing.assert_close(
            [dataclasses.astuple(m) for epoch in seen["metrics"] for m in epoch],
            [dataclasses.astuple(m) for epoch in alone["metrics"] for m in epoch],
            rtol=0,
            atol=1e-9,
        )


def retrain_for_two_epochs() -> tuple[dict[str, Tensor], list[Metrics]]:
    ranks = Ranks.current(torch.device("cpu"))
    torch.manual_seed(0)
    net = TargetNet(random_genotype(0, SPACE), 4, 3, 10, in_channels=1, auxiliary=True).double()
    freeze_batchnorm(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    metrics = []
    for epoch in range(2):
        train = train_target_epoch(
            net,
            optimizer,
            loader(0, epoch, 35, ranks),
            CPU,
            lr_at=lambda step: 0.1,
            auxiliary_weight=0.4,
            label_smoothing=0.1,
            grad_clip=1.0,
            ranks=ranks,
        )
        metrics += [train, evaluate(net.eval(), loader(1, 0, 35, ranks), CPU, ranks)]
    return net.state_dict(), metrics


@pytest.mark.slow
def test_retraining_on_ranks_equals_one_process(outcomes: dict[str, list[Outcome]]) -> None:
    weights, metrics = retrain_for_two_epochs()
    for outcome in outcomes["retrain_for_two_epochs"]:
        other, other_metrics = outcome.value
        torch.testing.assert_close(other, weights, rtol=0, atol=1e-9)
        assert [m.count for m in other_metrics] == [35] * 4
        torch.testing.assert_close(
            [m.loss for m in other_metrics], [m.loss for m in metrics], rtol=0, atol=1e-9
        )


def count_top5() -> list[Metrics]:
    """Return metrics of a pass over pictures of 12 classes, and of one with 10, on this process's share."""
    ranks = Ranks.current(torch.device("cpu"))
    found = []
    for classes in (12, 10):
        torch.manual_seed(0)
        images, target = torch.randn(35, 4, dtype=torch.float64), torch.randint(classes, (35,))
        net = nn.Linear(4, classes).double()
        shares = [range(start + ranks.rank, min(start + 16, 35), ranks.size) for start in (0, 16, 32)]
        found.append(evaluate(net, [(images[share], target[share]) for share in shares], CPU, ranks))
    return found


@pytest.mark.slow
def test_top5_on_ranks_equals_one_process(outcomes: dict[str, list[Outcome]]) -> None:
    many, few = count_top5()
    assert many.top5 is not None
    assert 0 < many.top1 < many.top5 < 1
    assert few.top5 is None
    for outcome in outcomes["count_top5"]:
        other, other_few = outcome.value
        assert (other.count, other.top1, other.top5) == (35, many.top1, many.top5)
        assert (other_few.count, other_few.top1, other_few.top5) == (35, few.top1, None)


def count_top5_where_a_rank_has_no_batch() -> tuple[list[Metrics], float]:
    ranks = Ranks.current(torch.device("cpu"))
    found = []
    for classes in (12, 10):
        totals = Totals(torch.device("cpu"))
        if ranks.is_first:
            target = torch.tensor([0, classes - 1])
            totals.add(torch.tensor(2.0), -torch.arange(2 * classes).reshape(2, classes).float(), target)
        found.append(totals.metrics(ranks))
    return found, ranks.sum([1.0])[0]  # The ranks have made the same calls.


@pytest.mark.slow
def test_a_rank_without_a_batch_knows_the_top5_of_the_others(outcomes: dict[str, list[Outcome]]) -> None:
    expected = [Metrics(2.0, 0.5, 2, 0.5), Metrics(2.0, 0.5, 2, None)]
    found = [outcome.value for outcome in outcomes["count_top5_where_a_rank_has_no_batch"]]
    assert found == [(expected, 2.0)] * 2


# ---------- bytes
def bytes_per_step() -> list[dict[str, Any]]:
    ranks = Ranks.current(torch.device("cpu"))
    search = make_search(CountingRanks(ranks.rank, ranks.size), frozen=False, dtype=torch.float32)
    seen = []
    for epoch in range(EPOCHS):
        for step in range(3):
            for batch in list(loader(0, 10 * epoch + step, 8, ranks, torch.float32)):
                CountingRanks.counted.clear()
                search.alpha_step(batch)
                alphas = sum(CountingRanks.counted)
                CountingRanks.counted.clear()
                search.weight_step(batch, Totals(torch.device("cpu")))
                seen.append(
                    {
                        "alphas": alphas,
                        "weights": sum(CountingRanks.counted),
                        "active": sum(4 * p.numel() for p in search.supernet.active_parameters()),
                        "all": sum(4 * p.numel() for p in search.weights),
                        "b": sum(4 * b.numel() for b in search.supernet.active_alphas()),
                        "genotype": search.supernet.genotype().digest(),
                    }
                )
        search.recover()
    return seen


@pytest.mark.slow
def test_only_the_active_parameters_gradients_travel_to_the_byte(outcomes: dict[str, list[Outcome]]) -> None:
    for seen in (outcome.value for outcome in outcomes["bytes_per_step"]):
        assert len({s["genotype"] for s in seen}) > 1, "the active set never changed"
        assert len({s["active"] for s in seen}) > 1
        for step in seen:
            assert step["weights"] == step["active"] < step["all"]
            assert step["alphas"] == step["b"]


# ---------- one architecture
def recover_with_a_corrupt_rank() -> str:
    ranks = Ranks.current(torch.device("cpu"))
    search = make_search(ranks)
    before = search.supernet.genotype().digest()
    if ranks.rank == 1:
        install = search.supernet.install_codes

        def corrupt(codes: Any, states: Any) -> None:
            code = codes["normal"][0]
            other = tuple(i for i in range(14) if i not in code.support)[:2]
            normal = [dataclasses.replace(code, support=other), *codes["normal"][1:]]
            install({**codes, "normal": normal}, states)

        search.supernet.install_codes = corrupt  # type: ignore[method-assign]
    search.recover()
    return before


@pytest.mark.slow
def test_ranks_with_different_architectures_stop(
    outcomes: dict[str, list[Outcome]],
) -> None:
    """The error names both digests and their ranks."""
    sound = make_search(Ranks()).supernet.genotype().digest()
    errors = [outcome.error for outcome in outcomes["recover_with_a_corrupt_rank"]]
    assert errors[0] == errors[1], "a rank continued"
    assert errors[0].startswith("IstanasError: genotype: differs between the workers (")
    assert f"{sound} on rank 0; " in errors[0]
    assert " on rank 1)" in errors[0]
    assert len(set(re.findall("[0-9a-f]{64}", errors[0]))) == 2
    assert "\n" not in errors[0]


# ---------- other operations of several ranks
def each_primitive() -> dict[str, Any]:
    ranks = Ranks.current(torch.device("cpu"))
    running = [torch.full((2,), float(ranks.rank)), torch.tensor(10.0 * ranks.rank)]
    ranks.average(running)

    def first() -> str:
        assert ranks.rank == 0, "only rank 0 computes"
        return "of rank 0"

    def fail() -> str:
        raise SolverError("no licence: get one")

    ranks.check_same("word", "same")
    try:
        ranks.from_first(fail)
        error = ""
    except IstanasError as caught:
        error = f"{type(caught).__name__}: {caught}"
    return {
        "size": ranks.size,
        "sum": ranks.sum([1.0, ranks.rank]),
        "average": [t.tolist() for t in running],
        "first": ranks.from_first(first),
        "error": error,
    }


@pytest.mark.slow
def test_sums_averages_and_the_word_of_rank_0_reach_every_rank(outcomes: dict[str, list[Outcome]]) -> None:
    expected = {
        "size": 2,
        "sum": [2.0, 1.0],
        "average": [[0.5, 0.5], 5.0],
        "first": "of rank 0",
        "error": "SolverError: no licence: get one",
    }
    assert [outcome.value for outcome in outcomes["each_primitive"]] == [expected] * 2


def finish_with_one_diverged_rank() -> float:
    ranks = Ranks.current(torch.device("cpu"))
    check_finite(Metrics(1.0, 0.5, 1), [torch.zeros(2)], 3, ranks=ranks)
    parameter = torch.tensor([1.0, math.inf if ranks.rank == 1 else 1.0])
    with pytest.raises(DivergedError, match="training loss is nan in epoch 4"):
        check_finite(Metrics(1.0, 0.5, 1), [parameter], 4, ranks=ranks)
    return ranks.sum([1.0])[0]


@pytest.mark.slow
def test_divergence_on_one_rank_stops_all_ranks_together(
    outcomes: dict[str, list[Outcome]],
) -> None:
    assert [outcome.value for outcome in outcomes["finish_with_one_diverged_rank"]] == [2.0, 2.0]


def test_alone_everything_is_the_identity() -> None:
    ranks = Ranks.current(torch.device("cpu"))
    assert ranks == Ranks(0, 1)
    net = nn.Linear(2, 2)
    assert ranks.data_parallel(net, list(net.parameters())) is net
    statistics = torch.ones(3)
    ranks.average([statistics])
    assert torch.equal(statistics, torch.ones(3))
    batch = Batch(torch.zeros(1), torch.zeros(1))
    assert batch.weight == 1.0
