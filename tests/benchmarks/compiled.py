"""A retraining step with `runtime.compile` against one without, and the difference of their losses."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from istanas.nets import TargetNet, to_channels_last
from istanas.optimizers import SGD
from istanas.space import PUBLISHED
from istanas.training import Compute, Totals, train_target_step
from tests.benchmarks.harness import Row, compare
from tests.benchmarks.pairs import ours_of, random_batch

CPU = Compute(torch.device("cpu"))
LARGEST_DIFFERENCE = 1e-5  # relative to the loss
STEPS = 3  # whose losses are compared; after the first, the weights differ, too


def step(
    net: TargetNet, forward: Callable[..., object], batch: tuple[torch.Tensor, ...]
) -> Callable[[], float]:
    """Return a training step, which returns its loss."""
    optimizer = SGD(net.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)

    def run() -> float:
        totals = Totals(CPU.device)
        train_target_step(
            forward,  # type: ignore[arg-type]
            optimizer,
            batch,  # type: ignore[arg-type]
            CPU,
            totals,
            auxiliary_weight=0,
            label_smoothing=0.0,
            grad_clip=5.0,
        )
        return totals.metrics().loss

    return run


def retraining(channels: int, layers: int, n: int, rounds: int) -> Row:
    """Compare a step of the published cell, compiled and as it is, after the same steps from the same weights."""

    def make() -> TargetNet:
        torch.manual_seed(0)
        net = TargetNet(PUBLISHED["ISTA_twostage"], channels, layers, 10)
        to_channels_last(net)
        return net.train()

    batch = ours_of(random_batch(n, 32, 0))
    one, other = make(), make()
    as_it_is = step(one, one.forward_with_auxiliary, batch)
    compiled = step(other, torch.compile(other.forward_with_auxiliary), batch)
    start = time.perf_counter()
    losses = [compiled()]
    seconds = time.perf_counter() - start
    losses += [compiled() for _ in range(STEPS - 1)]
    references = [as_it_is() for _ in losses]
    differences = [abs(loss - reference) for loss, reference in zip(losses, references, strict=True)]
    relative = [difference / reference for difference, reference in zip(differences, references, strict=True)]
    assert max(relative) <= LARGEST_DIFFERENCE, relative
    row = compare(
        f"retraining step, {channels} / {layers} / {n}, runtime.compile against none",
        compiled,
        as_it_is,
        None,
        rounds=rounds,
    )
    found = f"losses of {STEPS} steps differ by at most {max(relative):.1e} of their value ({max(differences):.1e})"
    return replace(row, counted=f"{found}; the first step took {seconds:.0f} s")
