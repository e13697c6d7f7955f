"""SGD and Adam of torch, without the import of torch's compiler.

In torch 2, the methods of an optimiser are decorated for `torch.compile`. The decorators import the compiler on the
first call, which takes about 2 s of CPU time in every process (the command, each worker, each trial of a sweep).
This project compiles nothing, so these classes call the undecorated methods. Their
updates and their state dictionaries are those of torch.

Example:
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = SGD([weight], lr=0.5)
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> weight.tolist()
    [0.5, 0.5]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


def _eager(method: Callable[..., Any]) -> Any:
    """Return a method without its decorators (a method that has none is returned as it is)."""
    return inspect.unwrap(method)


class _Eager(Optimizer):
    """The methods that all optimisers inherit."""

    add_param_group = _eager(Optimizer.add_param_group)
    zero_grad = _eager(Optimizer.zero_grad)
    state_dict = _eager(Optimizer.state_dict)
    load_state_dict = _eager(Optimizer.load_state_dict)


class SGD(_Eager, torch.optim.SGD):
    """`torch.optim.SGD`, except that its steps cannot be differentiated (`differentiable=True`)."""

    # The decorator that `_eager` removes also disables gradients.
    step = torch.no_grad()(_eager(torch.optim.SGD.step))


class Adam(_Eager, torch.optim.Adam):
    """`torch.optim.Adam`, except that its steps cannot be differentiated (`differentiable=True`)."""

    step = torch.no_grad()(_eager(torch.optim.Adam.step))
