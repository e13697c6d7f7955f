"""The optimisers: torch's updates bit for bit, without torch's compiler."""

import subprocess
import sys

import pytest
import torch

from istanas.optimizers import SGD, Adam

PAIRS = {
    "SGD": (SGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 3e-4, "nesterov": True}),
    "Adam": (Adam, torch.optim.Adam, {"betas": (0.5, 0.999), "weight_decay": 1e-3}),
}


def train(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        # The last weight gets no gradient in odd steps.
        sum((weight * (step + 1)).sin().sum() for weight in weights[: 2 - step % 2]).backward()
        optimizer.step()


@pytest.mark.parametrize("name", PAIRS)
def test_updates_and_states_are_those_of_torch(name: str) -> None:
    ours, theirs, settings = PAIRS[name]
    trained = []
    for kind in (ours, theirs):
        generator = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(3, 4, generator=generator)) for _ in range(2)]
        first = kind(weights, lr=0.1, **settings)
        train(first, weights, range(5))
        second = kind([{"params": weights[:1]}, {"params": weights[1:]}], lr=0.5, **settings)
        third = kind(weights, lr=0.5, **settings)
        third.load_state_dict(first.state_dict())
        train(third, weights, range(5, 9))
        trained.append((weights, third.state_dict(), len(second.param_groups)))
    (weights, state, groups), (expected, expected_state, expected_groups) = trained
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    assert groups == expected_groups == 2
    assert state["param_groups"] == expected_state["param_groups"]
    assert str(state["state"]) == str(expected_state["state"])
    assert not torch.equal(weights[0], torch.zeros(3, 4))


def test_a_step_does_not_record_gradients() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = SGD([weight], lr=0.5, momentum=0.9)
    (2 * weight).sum().backward()
    optimizer.step()
    assert weight.tolist() == [0.0, 0.0]
    assert weight.is_leaf
    assert not optimizer.state[weight]["momentum_buffer"].requires_grad


def test_neither_optimizer_imports_torchs_compiler() -> None:
    program = """
import sys, torch
from istanas.optimizers import SGD, Adam
for kind in (SGD, Adam):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = kind([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules)
torch.optim.SGD([weight], lr=0.1)
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # The second line shows that the test would notice the import.
    assert done.stdout.split() == ["False", "True"]
