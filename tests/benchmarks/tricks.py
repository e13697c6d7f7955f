"""Speed-ups of the fast operations in `istanas/nets`: the plain form against ours, forward and backward, one thread.

    python -m tests.benchmarks.tricks

prints the figures of their docstrings: for 64 pictures of 32x32 in channels-last memory, and for whole two-stage
steps with and without them.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from istanas.nets import depthwise, target
from istanas.nets.depthwise import depthwise_conv2d
from istanas.nets.operations import ScaledBatchNorm2d, dense_gradient
from istanas.nets.pixel_phases import pixel_phases
from istanas.search import TwoStageSearch
from tests.benchmarks import harness
from tests.benchmarks.pairs import make_search, ours_of, random_batch, random_codes, two_stage_step

Form = Callable[[Tensor], Tensor | tuple[Tensor, ...]]


def states(channels: int) -> Tensor:
    x = torch.randn(64, channels, 32, 32).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_()


def passes(form: Form, x: Tensor, weights: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
    """Run a forward pass and compute the gradients of `x` and the weights."""
    outputs = form(x)
    torch.autograd.grad(outputs, (x, *weights), gradients)


def report(name: str, x: Tensor, plain: Form, ours: Form, *weights: Tensor, part: bool = False) -> None:
    """Print both times; with `part`, the gradient is a slice of one four times as wide, as behind a `cat`."""
    out = plain(x)
    gradients = []
    for o in out if isinstance(out, tuple) else (out,):
        wide = torch.randn(len(o), 4 * o.shape[1] if part else o.shape[1], *o.shape[2:])
        gradients.append(wide.contiguous(memory_format=torch.channels_last)[:, : o.shape[1]])
    calls = [lambda f=form: passes(f, x, weights, tuple(gradients)) for form in (plain, ours)]
    seconds = harness.interleaved(calls, 15)
    ratio, (low, high) = harness.ratio_of_medians(*seconds)
    before, after = (1e3 * statistics.median(times) for times in seconds)
    print(f"{name}: {before:.1f} -> {after:.1f} ms, {ratio:.1f} times ({low:.1f} to {high:.1f})")


def multiplied(self: ScaledBatchNorm2d, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Apply batch norm, then multiply."""
    out = nn.BatchNorm2d.forward(self, x)
    return out if scale is None else scale * out


def library_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Of dilation 2."""
    return F.conv2d(x, weight, None, 1, 2 * (weight.shape[-1] // 2), 2, len(weight))


def report_step(name: str, c: int, layers: int, n: int, without: Sequence[Any]) -> None:
    """Print the times of a step, without a trick and with it, of two active sets."""
    batches = [ours_of(random_batch(n, 32, i)) for i in range(2)]
    for seed in range(2):
        search = make_search(c, layers, random_codes(seed), seed=seed)

        def ours(search: TwoStageSearch = search) -> None:
            two_stage_step(search, *batches)

        def plain(ours: Callable[[], None] = ours) -> None:
            with ExitStack() as patched:
                for replacement in without:
                    patched.enter_context(replacement)
                ours()

        before, after = harness.interleaved([plain, ours], 5)
        ratio, (low, high) = harness.ratio_of_medians(before, after)
        print(f"{name}, set {seed}: {ratio:.2f} times ({low:.2f} to {high:.2f})", flush=True)


def main() -> None:
    """Print all figures."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = states(16)

    def slices(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(x[:, :, o::2, o::2].contiguous(memory_format=torch.channels_last) for o in (0, 1))

    report("pixel phases", x, slices, lambda x: pixel_phases(x, (0, 1)))
    report(
        "ReLU behind the phases",
        x,
        lambda x: pixel_phases(F.relu(x), (0, 1)),
        lambda x: tuple(F.relu(phase) for phase in pixel_phases(x, (0, 1))),
    )
    for channels, stride in ((16, 1), (32, 2)):
        wide = states(channels)
        for kernel in (3, 5):
            weight = torch.randn(channels, 1, kernel, kernel, requires_grad=True)
            report(
                f"depthwise, dilated, {channels} channels, stride {stride}, {kernel}x{kernel}",
                wide,
                lambda x, w=weight, s=stride: F.conv2d(x, w, None, s, 2 * (w.shape[-1] // 2), 2, len(w)),
                lambda x, w=weight, s=stride: depthwise_conv2d(x, w, s, 2),
                weight,
            )
    norm, scale = ScaledBatchNorm2d(16, affine=False), torch.tensor(0.5, requires_grad=True)
    report("batch norm times a weight", x, lambda x: scale * norm(x), lambda x: norm(x, scale), scale)
    report(
        "dense gradient for it",
        x,
        lambda x: norm(x, scale),
        lambda x: dense_gradient(norm(x, scale)),
        scale,
        part=True,
    )
    behind = nn.BatchNorm2d(16, affine=False)
    report("ReLU in place behind batch norm", x, lambda x: F.relu(behind(x)), lambda x: F.relu_(behind(x)))

    folded = patch.object(ScaledBatchNorm2d, "forward", multiplied)
    dense = patch.object(target, "dense_gradient", lambda x: x)
    for c, layers, n in ((8, 5, 32), (16, 8, 64)):
        for name, without in (
            ("dilated convolutions by phases", [patch.object(depthwise, "_by_phases", library_convolution)]),
            ("weights in batch norm", [folded]),
            ("weights in batch norm, dense gradients", [folded, dense]),
        ):
            report_step(f"two-stage step, {c} / {layers} / {n}, {name}", c, layers, n, without)


if __name__ == "__main__":
    main()
