"""Activation checkpointing gives the same bits with less memory."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from istanas.space import PUBLISHED
from tests.benchmarks.pairs import Pair, TargetPair, ours_of, random_batch


def searching(one_stage: bool) -> tuple[Any, Callable[[int], None]]:
    pair = Pair(2, 4, one_stage=one_stage, auxiliary=one_stage, dtype=torch.float64)
    pair.net.drop_path_prob = 0.3 * one_stage

    def step(i: int) -> None:
        pair.our_step(
            *(ours_of(random_batch(3, 32, 2 * i + j, torch.float64)) for j in range(1 if one_stage else 2))
        )

    return pair.net, step


def retraining() -> tuple[Any, Callable[[int], None]]:
    pair = TargetPair(PUBLISHED["ISTA_twostage"], 2, 4, drop_path=0.3, dtype=torch.float64)
    return pair.net, lambda i: pair.our_step(ours_of(random_batch(3, 32, i, torch.float64)))


def trained(make: Callable[[], tuple[Any, Callable[[int], None]]], on: bool) -> tuple[dict[str, Tensor], int]:
    """Return parameters, statistics and gradients after two steps, and the bytes that autograd stored."""
    net, step = make()
    net.activation_checkpointing = on
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    for i in range(2):
        torch.manual_seed(i)  # So that drop path draws the same values.
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step(i)
    left = copy.deepcopy(net.state_dict())
    left |= {f"gradient of {n}": p.grad for n, p in net.named_parameters() if p.grad is not None}
    return left, kept


@pytest.mark.parametrize(
    "make",
    [lambda: searching(False), lambda: searching(True), retraining],
    ids=["two_stage", "one_stage", "retraining"],
)
def test_two_steps_are_the_same_to_the_bit(make: Callable[[], Any]) -> None:
    (plain, kept), (checkpointed, less) = trained(make, False), trained(make, True)
    assert less < 0.6 * kept  # Stem, auxiliary head and classifier are not checkpointed.
    assert plain.keys() == checkpointed.keys()
    assert any(name.endswith("num_batches_tracked") and value in (2, 4) for name, value in plain.items())
    different = [name for name, value in plain.items() if not torch.equal(value, checkpointed[name])]
    assert not different
