"""Measurements of training steps: seconds, FLOPs, and by torch's profiler where the time goes by kind of operation."""

from __future__ import annotations

import gc
import itertools
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from istanas.errors import IstanasError

T = TypeVar("T")
Train = Callable[[int, Callable[[], None]], object]
"""Trains so many steps and calls back after each."""

DATA_RANGE, STEP_RANGE = "istanas.data", "istanas.step"  # what the profile calls them, in a trace too
PYTHON, OTHER = "Python between operations", "other"

_FORWARD_CONVOLUTIONS = frozenset({"conv2d", "convolution", "_convolution"})
_KINDS = {
    "batch norm": r"(native_|cudnn_)?batch_norm\w*",
    "pooling": r"(adaptive_)?(max|avg)_pool2d\w*|_adaptive_avg_pool2d\w*",
    "optimiser and clipping": r"_foreach_\w+|linalg_vector_norm|_fused_\w+",
    "elementwise and copies": (
        r"(relu|threshold|threshold_backward|clamp|clamp_min|add|sub|mul|div|sqrt|neg|where|bernoulli|cat|stack|"
        r"clone|contiguous|copy|_to_copy|to|fill|zero|zeros|ones|zeros_like|ones_like|constant_pad_nd|"
        r"slice_backward|select_backward|reshape|sum|mean)_?"
    ),
}
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in _KINDS.items()}


@dataclass(frozen=True)
class KindTime:
    """What one kind of operation takes.

    Args:
        kind: for people.
        share: of the time of all kinds, in [0, 1].
        seconds_per_step: under the profiler, which slows small operations down.
        calls_per_step: operations, those that they call themselves not counted.
    """

    kind: str
    share: float
    seconds_per_step: float
    calls_per_step: float


def as_data(batches: Iterable[T]) -> Iterator[T]:
    """The same batches; what making them costs is data and augmentation in a profile."""
    iterator = iter(batches)
    while True:
        with record_function(DATA_RANGE):
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


def step_seconds(train: Train, steps: int, device: torch.device) -> list[float]:
    """Seconds of each step.

    Args:
        train: see `Train`.
        steps: >= 1.
        device: a GPU keeps the time itself: waiting for it after each step would hold the next one up.
    """
    if device.type != "cuda":
        times = [time.perf_counter()]
        train(steps, lambda: times.append(time.perf_counter()))
        return [after - before for before, after in itertools.pairwise(times)]
    events: list[Any] = []

    def mark() -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        events.append(event)

    mark()
    train(steps, mark)
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(events)]


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call and all that it puts on the device take."""
    _wait_for(device)
    start = time.perf_counter()
    call()
    _wait_for(device)
    return time.perf_counter() - start


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of convolutions and matrix products in a call, backward passes included.

    A multiply-add is two. Both gradients of a convolution cost what its forward pass does: 2 |out| |weight| / C_out.

    Args:
        call: what to run.

    Example:
        >>> weight = torch.ones(6, 1, 3, 3, requires_grad=True)
        >>> image = torch.ones(1, 6, 4, 4)
        >>> count_flops(lambda: torch.nn.functional.conv2d(image, weight, padding=1, groups=6).sum().backward())
        3456
    """
    # The library's own formula takes the weight gradient of a grouped convolution for an ungrouped one: C times more.
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops}
    )
    with counter:
        call()
    return int(counter.get_total_flops())


def _convolution_backward_flops(
    grad_shape: Sequence[int], _: Sequence[int], weight_shape: Sequence[int], *settings: Any, **__: Any
) -> int:
    asked_for: Sequence[bool] = settings[-1]  # gradients of input, weight, bias
    return sum(asked_for[:2]) * 2 * prod(grad_shape) * prod(weight_shape[1:])


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of some: what this machine can do with the threads it has.

    Args:
        device: where.
        dtype: of the matrices.
    """
    n, repeats = (8192, 10) if device.type == "cuda" else (1536, 1)
    matrix = torch.ones(n, n, device=device, dtype=dtype)
    out = torch.empty_like(matrix)

    def multiply() -> None:
        for _ in range(repeats):
            torch.mm(matrix, matrix, out=out)

    multiply()
    return repeats * 2 * n**3 / min(seconds_of(multiply, device) for _ in range(4))


def time_by_kind(
    train: Train, steps: int, device: torch.device, trace: Path | None = None
) -> tuple[list[KindTime], str]:
    """Profile some steps: self times by kind of operation, on a GPU those of its kernels.

    Args:
        train: see `Train`; called once a step, and once more at first.
        steps: >= 1.
        device: where they run.
        trace: file for a Chrome trace of the last step.

    Returns:
        The kinds that occur, longest first, their shares adding up to 1; and whose time it is, "cpu" or "cuda"
        ("cpu" on a GPU too, where its kernels can't be seen).

    Raises:
        IstanasError: if the trace could not be written.
    """
    seconds: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)
    clock = "cpu"
    # What the profiler remembers keeps the memory around it from being used again, so that steps profiled together
    # take twice their time, all of it in large operations. One by one, only the first does: it does not count.
    for step in range(steps + 1):
        profiler = _profile_step(train, device)
        if step > 0:
            # Kernels are listed beside the operations that launch them, and count there.
            events = [event for event in profiler.events() or [] if event.device_type == DeviceType.CPU]
            if any(event.self_device_time_total for event in events):
                clock = device.type
            for kind, (kind_seconds, kind_calls) in sums_by_kind(events, clock).items():
                seconds[kind] += kind_seconds
                calls[kind] += kind_calls
            del events
        if step == steps and trace is not None:
            profiler.export_chrome_trace(str(trace))
            if not trace.is_file():  # the library only logs it
                raise IstanasError(f"trace: {trace} could not be written, free space or give another file")
        del profiler
        gc.collect()  # operations and those that they call refer to each other
    total = sum(seconds.values())
    kinds = [KindTime(k, s / total, s / steps, calls[k] / steps) for k, s in seconds.items() if s > 0]
    return sorted(kinds, key=lambda kind: -kind.share), clock


def _profile_step(train: Train, device: torch.device) -> profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the library talks about itself on stderr
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        with record_function(STEP_RANGE):
            train(1, lambda: None)
        _wait_for(device)
    return profiler


def sums_by_kind(events: Sequence[Any], clock: str) -> dict[str, tuple[float, int]]:
    """Add up the self times of profiled operations by kind; what an operation calls belongs to its kind.

    Args:
        events: the profiler's operations on the CPU.
        clock: "cpu", or "cuda" for the time of the kernels that they launch.

    Returns:
        Kind -> (seconds, calls), see `KindTime`.
    """
    decided: dict[int, str | None] = {}

    def decide(event: Any) -> str | None:
        if id(event) not in decided:
            above = None if event.cpu_parent is None else decide(event.cpu_parent)
            decided[id(event)] = above or kind_of(event.name, event.input_shapes)
        return decided[id(event)]

    seconds: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)
    for event in events:
        kind = decide(event) or (PYTHON if event.name == STEP_RANGE else OTHER)
        microseconds = event.self_cpu_time_total if clock == "cpu" else event.self_device_time_total
        seconds[kind] += microseconds / 1e6
        calls[kind] += kind != PYTHON and (event.cpu_parent is None or decide(event.cpu_parent) is None)
    return {kind: (seconds[kind], calls[kind]) for kind in seconds}


def kind_of(name: str, shapes: Sequence[Sequence[int]]) -> str | None:
    """The kind of an operation; None for what is told by the operations that it calls.

    Args:
        name: as the profiler gives it.
        shapes: of its arguments.

    Example:
        >>> kind_of("aten::conv2d", [[8, 16, 4, 4], [16, 1, 3, 3]])
        'depthwise convolution, forward'
        >>> kind_of("aten::convolution_backward", [[8, 4, 4, 4], [8, 16, 4, 4], [4, 16, 1, 1]])
        '1x1 convolution, backward'
        >>> kind_of("aten::add_", [[8], [8]])
        'elementwise and copies'
    """
    if name == DATA_RANGE:
        return "data and augmentation"
    if name.startswith("Optimizer."):
        return "optimiser and clipping"
    op = name.removeprefix("aten::")
    if op == name:  # a range, or a part of autograd
        return None
    if op in _FORWARD_CONVOLUTIONS:
        return f"{_convolution(shapes[0], shapes[1])}, forward"
    if op == "convolution_backward":
        return f"{_convolution(shapes[1], shapes[2])}, backward"
    return next((kind for kind, pattern in _PATTERNS.items() if pattern.fullmatch(op)), None)


def _convolution(image: Sequence[int], weight: Sequence[int]) -> str:
    """Of (B, C, H, W) and (C_out, C / groups, k, k)."""
    if image[1] != weight[1]:
        return "depthwise convolution"
    return "1x1 convolution" if prod(weight[2:]) == 1 else "other convolution"


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
