"""Training compared with direct computations: schedules, seeds, totals, evaluation, loss, clipping."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from istanas.data import Batch
from istanas.errors import DivergedError, IstanasError
from istanas.nets import TargetNet
from istanas.space import PUBLISHED
from istanas.training import (
    SCHEDULES,
    TOP5_ABOVE,
    Compute,
    Metrics,
    Totals,
    check_finite,
    clip_gradients,
    derive_seed,
    evaluate,
    learning_rate,
    set_learning_rate,
    train_target_epoch,
    without_gradients,
)

CPU = Compute(torch.device("cpu"))


# --- learning rate ---


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0.0, 2.0])
@given(base=st.floats(1e-3, 1.0), share=st.floats(0.0, 1.0), epoch=st.floats(0.0, 20.0))
def test_learning_rate_ends_and_bounds(
    schedule: str, warmup: float, base: float, share: float, epoch: float
) -> None:
    minimum = share * base

    def at(t: float) -> float:
        return learning_rate(base, minimum, t, 20, schedule=schedule, warmup_epochs=warmup)

    assert at(20.0) == pytest.approx(minimum)
    assert at(warmup) == pytest.approx(base)
    assert at(0.0) == pytest.approx(0.0 if warmup else base)
    assert at((20.0 + warmup) / 2) == pytest.approx((base + minimum) / 2)  # Half-way the two schedules agree.
    lowest = 0.0 if epoch < warmup else minimum
    assert lowest - 1e-12 <= at(epoch) <= base + 1e-12


def test_cosine_and_linear_by_formula() -> None:
    cosine = 0.001 + 0.099 * (1 + math.cos(math.pi / 4)) / 2
    assert learning_rate(0.1, 0.001, 25, 100) == pytest.approx(cosine)
    assert learning_rate(0.5, 0.0, 25, 100, schedule="linear") == pytest.approx(0.375)
    assert learning_rate(0.5, 0.0, 2, 100, schedule="linear", warmup_epochs=10) == pytest.approx(0.1)
    assert learning_rate(0.5, 0.1, 55, 100, schedule="linear", warmup_epochs=10) == pytest.approx(0.3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rate_rises_then_falls(schedule: str) -> None:
    values = [learning_rate(1.0, 0.0, t / 10, 20, schedule=schedule, warmup_epochs=2.0) for t in range(201)]
    assert values[:20] == sorted(values[:20])
    assert values[20:] == sorted(values[20:], reverse=True)
    assert values[-1] == 0.0
    assert values[20] > 0.8


@pytest.mark.parametrize("epochs", [1, 2, 3, 9, 10, 11, 40])
def test_linear_by_epoch_keeps_its_rate_within_an_epoch(epochs: int) -> None:
    """For every length of a run the rates fall from the base and are above 0 in the last epoch."""
    rates = [learning_rate(0.5, 0.0, e, epochs, schedule="linear_by_epoch") for e in range(epochs + 1)]
    assert rates[0] == 0.5
    assert rates == sorted(rates, reverse=True)
    assert rates[-2] > rates[-1] == 0.0
    for e in range(epochs):
        assert learning_rate(0.5, 0.0, e + 0.99, epochs, schedule="linear_by_epoch") == rates[e]


def test_learning_rate_goes_to_every_group() -> None:
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))]},
        {"params": [nn.Parameter(torch.zeros(1))], "lr": 9.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


# --- seeds ---


def test_seeds_differ_by_every_part_and_fit_a_generator() -> None:
    streams = [(s, p, e) for s in range(5) for p in ("augment", "shuffle", "alphas") for e in range(20)]
    seeds = [derive_seed(*stream) for stream in streams]
    assert len(set(seeds)) == len(streams)
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))
    assert max(seeds) > 2**60  # All bits are used.


def test_seeds_are_the_same_in_another_process(repo_root: Path) -> None:
    """Python's salted hashes are not used."""
    code = "from istanas.training import derive_seed; print(derive_seed(3, 'augment', 7))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=repo_root,
        env=os.environ | {"PYTHONHASHSEED": "1"},
    )
    assert int(other.stdout) == derive_seed(3, "augment", 7)


# --- totals and evaluation ---


def batches_of(sizes: list[int], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes
    ]


def test_totals_weigh_by_pictures_and_start_empty() -> None:
    totals = Totals(torch.device("cpu"))
    empty = totals.metrics()
    assert math.isnan(empty.loss)
    assert math.isnan(empty.top1)
    assert empty.count == 0
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    totals.add(torch.tensor(1.0), logits, torch.tensor([0, 1, 1]))
    totals.add(torch.tensor(5.0), logits[:1], torch.tensor([1]))
    assert totals.metrics() == Metrics(loss=2.0, top1=0.5, count=4)


@pytest.mark.parametrize("classes", [11, 12, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top5_is_the_share_of_pictures_with_few_larger_logits(classes: int, dtype: torch.dtype) -> None:
    """A picture counts if fewer than five logits are larger than that of its class."""
    generator = torch.Generator().manual_seed(classes)
    totals, hits, n = Totals(torch.device("cpu")), 0, 0
    for size in (64, 1, 35):
        # No two logits of a picture are equal, not even in bfloat16, so that there are no ties.
        logits = torch.stack([torch.randperm(classes, generator=generator) for _ in range(size)]).to(dtype)
        target = torch.randint(classes, (size,), generator=generator)
        totals.add(torch.tensor(1.0), logits, target)
        for row, own in zip(logits.tolist(), target.tolist(), strict=True):
            hits += sum(value > row[own] for value in row) < 5
        n += size
    found = totals.metrics()
    assert found.top5 == hits / n
    assert 0 < found.top1 < found.top5 < 1


def test_of_equal_logits_five_count() -> None:
    totals = Totals(torch.device("cpu"))
    totals.add(torch.tensor(1.0), torch.zeros(12, 12), torch.arange(12))
    assert totals.metrics().top5 == 5 / 12


def test_ten_classes_have_no_top5_and_eleven_have_one() -> None:
    assert TOP5_ABOVE == 10
    for classes in (3, 10, 11):
        net = nn.Linear(4, classes)
        found = evaluate(net, batches_of([5, 2]), CPU)
        assert (found.top5 is None) == (classes <= 10)
        assert found.count == 7


@pytest.mark.parametrize("sizes", [[5], [4, 4, 1], [1, 7, 2]])
def test_evaluate_is_the_mean_over_pictures(sizes: list[int]) -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    batches = batches_of(sizes)
    images, target = (torch.cat(part) for part in zip(*batches, strict=True))
    found = evaluate(net, batches, CPU)
    with torch.no_grad():
        losses = [float(-net(x).log_softmax(0)[t]) for x, t in zip(images, target, strict=True)]
        hits = [int(net(x).argmax()) == int(t) for x, t in zip(images, target, strict=True)]
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found.top1 == sum(hits) / len(hits)
    assert found.count == sum(sizes)
    assert net.weight.grad is None


def test_evaluate_in_low_precision_keeps_the_loss_in_float32() -> None:
    compute = Compute(torch.device("cpu"), torch.bfloat16)
    net, dtypes = nn.Linear(4, 3), []

    def forward(x: Tensor) -> Tensor:
        out: Tensor = net(x)
        dtypes.append(out.dtype)
        return out

    batches = batches_of([64, 3])
    low, full = evaluate(forward, batches, compute), evaluate(net, batches, CPU)
    assert dtypes == [torch.bfloat16] * 2
    assert low.loss != full.loss
    assert low.loss == pytest.approx(full.loss, rel=2e-2)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_diverged_epoch_is_refused(loss: float) -> None:
    with pytest.raises(
        IstanasError, match=f"training loss is {loss} in epoch 3: .*; lower the learning rate"
    ) as caught:
        check_finite(Metrics(loss, 0.1, 10), [torch.zeros(1)], 3)
    assert "\n" not in str(caught.value)


def test_a_finite_epoch_is_accepted() -> None:
    check_finite(Metrics(1e30, 0.0, 1), [torch.zeros(1)], 0)
    check_finite(Metrics(10.0, 0.0, 1), [torch.zeros(1)], 1, max_loss=10.0)
    with pytest.raises(
        DivergedError, match=r"loss is 10.5 in epoch 1, above max_loss = 10: the run diverged"
    ):
        check_finite(Metrics(10.5, 0.0, 1), [torch.zeros(1)], 1, max_loss=10.0)
    with pytest.raises(IstanasError, match="training loss is nan in epoch 1"):
        check_finite(Metrics(1.0, 0.5, 1), [torch.zeros(1), torch.tensor([0.0, torch.inf])], 1)


# --- gradients ---


def test_clipping_scales_the_joint_norm() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    clip_gradients([a, b], None)
    assert a.grad.tolist() == [3.0, 0.0]
    clip_gradients([a, b], 10.0)
    assert a.grad.tolist() == [3.0, 0.0]
    clip_gradients([a, b], 1.0)
    torch.testing.assert_close(torch.cat([a.grad, b.grad]), torch.tensor([0.6, 0.0, 0.8]), rtol=1e-5, atol=0)


def test_without_gradients_restores_after_errors_and_keeps_frozen_ones() -> None:
    trained, frozen = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1), requires_grad=False)
    with without_gradients([trained, frozen]):
        assert not (trained * 2).requires_grad
    assert trained.requires_grad
    assert not frozen.requires_grad

    def fail() -> None:
        with without_gradients([trained]):
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fail()
    assert trained.requires_grad


# --- an epoch of the target network ---


def literal_smoothed(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Return the cross-entropy with the target distribution (1 - e) one-hot + e / K."""
    goal = (1 - smoothing) * F.one_hot(target, logits.shape[1]) + smoothing / logits.shape[1]
    return -(goal * logits.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("auxiliary_weight", [0.0, 0.4])
@pytest.mark.parametrize("grad_clip", [None, 0.5])
@pytest.mark.parametrize("auxiliary", [True, False])
def test_one_epoch_is_the_literal_computation(
    smoothing: float, auxiliary_weight: float, grad_clip: float | None, auxiliary: bool
) -> None:
    """Two explicit steps of SGD with momentum and decay give the same weights and means."""
    torch.manual_seed(0)
    net = TargetNet(PUBLISHED["ISTA_twostage"], 2, 2, 5, auxiliary=auxiliary).double().eval()
    start, literal = copy.deepcopy(net), copy.deepcopy(net).train()
    batches = [(torch.randn(n, 3, 8, 8, dtype=torch.float64), torch.randint(5, (n,))) for n in (4, 2)]
    rates = [0.1, 0.03]
    observed: list[tuple[int, int]] = []
    found = train_target_epoch(
        net,
        torch.optim.SGD(net.parameters(), 99.0, momentum=0.9, weight_decay=3e-4),
        batches,
        CPU,
        lr_at=lambda step: rates[step],
        auxiliary_weight=auxiliary_weight,
        label_smoothing=smoothing,
        grad_clip=grad_clip,
        observe=lambda step, totals: observed.append((step, totals.metrics().count)),
    )
    velocity: dict[str, Tensor] = {}
    losses, hits = [], 0
    for rate, (x, t) in zip(rates, batches, strict=True):
        literal.zero_grad()
        logits, extra = literal.forward_with_auxiliary(x)
        loss = literal_smoothed(logits, t, smoothing)
        total = loss if extra is None else loss + auxiliary_weight * literal_smoothed(extra, t, smoothing)
        total.backward()
        norm = torch.cat([p.grad.flatten() for p in literal.parameters() if p.grad is not None]).norm()
        scale = 1.0 if grad_clip is None else min(1.0, grad_clip / (float(norm) + 1e-6))
        assert grad_clip is None or scale < 1.0  # Clipping has an effect.
        with torch.no_grad():
            for name, p in literal.named_parameters():
                if p.grad is None:
                    continue
                step = scale * p.grad + 3e-4 * p
                velocity[name] = 0.9 * velocity[name] + step if name in velocity else step
                p -= rate * velocity[name]
        losses.append((loss.item(), len(t)))
        hits += int((logits.argmax(1) == t).sum())
    first, ours, theirs = (
        nn.utils.parameters_to_vector(n.parameters()).detach() for n in (start, net, literal)
    )
    # torch's smoothed loss agrees with the formula less closely than the plain one.
    tolerance = 1e-4 if smoothing else 1e-9
    assert (ours - theirs).norm() < tolerance * (theirs - first).norm()
    assert net.training
    assert found.count == 6
    assert found.top1 == hits / 6
    assert found.loss == pytest.approx(sum(loss * n for loss, n in losses) / 6, rel=1e-6)
    assert observed == [(1, 4), (2, 6)]


def test_a_batchs_weight_scales_its_gradient_and_not_its_figures() -> None:
    def trained(*weight: float) -> tuple[Tensor, Metrics]:
        torch.manual_seed(0)
        net = TargetNet(PUBLISHED["ISTA_twostage"], 2, 2, 5, auxiliary=True).double()
        start = nn.utils.parameters_to_vector(net.parameters()).detach()
        batch = Batch(torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4), *weight)
        found = train_target_epoch(
            net,
            torch.optim.SGD(net.parameters(), 0.1),
            [batch],
            CPU,
            lr_at=lambda _: 0.1,
            auxiliary_weight=0.4,
            label_smoothing=0.0,
            grad_clip=None,
        )
        return nn.utils.parameters_to_vector(net.parameters()).detach() - start, found

    (whole, metrics), (part, part_metrics) = trained(), trained(0.25)
    assert whole.norm() > 1e-3
    torch.testing.assert_close(part, 0.25 * whole, rtol=1e-9, atol=1e-15)
    assert part_metrics == metrics


def test_an_epoch_learns() -> None:
    """In ten passes over one batch the loss falls by half."""
    torch.manual_seed(0)
    net = TargetNet(PUBLISHED["ISTA_onestage"], 4, 2, 4, in_channels=1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    batch = (torch.randn(16, 1, 8, 8), torch.arange(16) % 4)
    losses = [
        train_target_epoch(
            net,
            optimizer,
            [batch],
            CPU,
            lr_at=lambda _: 0.1,
            auxiliary_weight=0.0,
            label_smoothing=0.0,
            grad_clip=5.0,
        ).loss
        for _ in range(10)
    ]
    assert losses[-1] < losses[0] / 2
