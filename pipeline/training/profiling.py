"""Measurements of training steps: seconds, FLOPs and, with torch's profiler, the time of each kind of operation."""

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
"""Trains the given number of steps and calls back after each."""

DATA_RANGE, STEP_RANGE = "istanas.data", "istanas.step"  # names of the ranges in a profile and in a trace
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
    """The time that one kind of operation takes.

    Args:
        kind: Name of the kind.
        share: Share of the time of all kinds, in [0, 1].
        seconds_per_step: Time under the profiler, which slows down small operations.
        calls_per_step: Number of operations, without those that they call themselves.
    """

    kind: str
    share: float
    seconds_per_step: float
    calls_per_step: float


@dataclass
class Waiting:
    """The time that this process has waited for batches.

    Args:
        seconds: The sum so far.
    """

    seconds: float = 0.0


def as_data(batches: Iterable[T], waiting: Waiting | None = None) -> Iterator[T]:
    """Yield the same batches; in a profile, the time for producing them counts as data and augmentation.

    Args:
        batches: The batches.
        waiting: The sum to which this time is added.
    """
    iterator = iter(batches)
    while True:
        start = time.perf_counter()
        with record_function(DATA_RANGE):
            try:
                batch = next(iterator)
            except StopIteration:
                return
        if waiting is not None:
            waiting.seconds += time.perf_counter() - start
        yield batch


def step_seconds(train: Train, steps: int, device: torch.device) -> list[float]:
    """Return the seconds of each step.

    Args:
        train: See `Train`.
        steps: Number of steps, >= 1.
        device: The device. A GPU records the times itself, because synchronising after each step would delay the next.
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
    """Return the seconds of a call, including the work that it enqueues on the device."""
    _wait_for(device)
    start = time.perf_counter()
    call()
    _wait_for(device)
    return time.perf_counter() - start


def interleaved_seconds(
    calls: Sequence[Callable[[], object]], runs: int, device: torch.device
) -> list[list[float]]:
    """Return the seconds of each run of each call. The calls take turns, so that all see the same state of the machine.

    Each measured run follows an unmeasured one of the same call, which loads its data into the caches. A GPU records
    the times itself, beginning with an empty queue.

    Args:
        calls: The calls.
        runs: Number of measured runs of each call.
        device: The device on which they compute.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(runs):
        for call, times in zip(calls, seconds, strict=True):
            call()
            times.append(_run_seconds(call, device))
    return seconds


def _run_seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        return seconds_of(call, device)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    before.record()
    call()
    after.record()
    torch.cuda.synchronize(device)
    return before.elapsed_time(after) / 1000


def count_flops(call: Callable[[], object]) -> int:
    """Count the floating-point operations of convolutions and matrix products in a call, including backward passes.

    A multiply-add counts as two. Each of a convolution's two gradients costs as much as its forward pass:
    2 |out| |weight| / C_out.

    Args:
        call: The call to measure.

    Example:
        >>> weight = torch.ones(6, 1, 3, 3, requires_grad=True)
        >>> image = torch.ones(1, 6, 4, 4)
        >>> count_flops(lambda: torch.nn.functional.conv2d(image, weight, padding=1, groups=6).sum().backward())
        3456
    """
    # Torch's formula treats the weight gradient of a grouped convolution as an ungrouped one, with C times the cost.
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops}
    )
    with counter:
        call()
    return int(counter.get_total_flops())


def _convolution_backward_flops(
    grad_shape: Sequence[int], _: Sequence[int], weight_shape: Sequence[int], *settings: Any, **__: Any
) -> int:
    output_mask: Sequence[bool] = settings[-1]  # which gradients are computed: input, weight, bias
    return sum(output_mask[:2]) * 2 * prod(grad_shape) * prod(weight_shape[1:])


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s that this machine reaches with its threads: the best of several large matrix products.

    Args:
        device: The device.
        dtype: Type of the matrices.
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
    """Profile some steps, and add up the self times by kind of operation; on a GPU, those of its kernels.

    Args:
        train: See `Train`; called once per step, and once more for a warm-up.
        steps: Number of steps, >= 1.
        device: The device.
        trace: File for a Chrome trace of the last step.

    Returns:
        The kinds that occur, longest first, with shares that add up to 1; and which times were measured, "cpu" or
        "cuda" ("cpu" also on a GPU whose kernels cannot be observed).

    Raises:
        IstanasError: If the trace could not be written.
    """
    seconds: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)
    clock = "cpu"
    # The profiler's records prevent the reuse of memory, so steps that are profiled together take twice their time.
    # Steps are therefore profiled one by one. The first of them is still slow, so it is not counted.
    for step in range(steps + 1):
        profiler = _profile_step(train, device)
        if step > 0:
            # Kernels are also listed separately, but their time is attributed to the operations that launch them.
            events = [event for event in profiler.events() or [] if event.device_type == DeviceType.CPU]
            if any(event.self_device_time_total for event in events):
                clock = device.type
            for kind, (kind_seconds, kind_calls) in sums_by_kind(events, clock).items():
                seconds[kind] += kind_seconds
                calls[kind] += kind_calls
            del events
        if step == steps and trace is not None:
            profiler.export_chrome_trace(str(trace))
            if not trace.is_file():  # torch only logs the failure
                raise IstanasError(
                    f"{trace} could not be written", field="trace", remedy="free space or give another file"
                )
        del profiler
        gc.collect()  # the recorded operations form reference cycles
    total = sum(seconds.values())
    kinds = [KindTime(k, s / total, s / steps, calls[k] / steps) for k, s in seconds.items() if s > 0]
    return sorted(kinds, key=lambda kind: -kind.share), clock


def _profile_step(train: Train, device: torch.device) -> profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise, the library logs to stderr
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        with record_function(STEP_RANGE):
            train(1, lambda: None)
        _wait_for(device)
    return profiler


def sums_by_kind(events: Sequence[Any], clock: str) -> dict[str, tuple[float, int]]:
    """Add up the self times of profiled operations by kind; operations that an operation calls belong to its kind.

    Args:
        events: The profiler's operations on the CPU.
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
    """Return the kind of an operation; None if the operations that it calls determine it.

    Args:
        name: The profiler's name of the operation.
        shapes: Shapes of its arguments.

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
    """Return the kind of a convolution of shapes (B, C, H, W) and (C_out, C / groups, k, k)."""
    if image[1] != weight[1]:
        return "depthwise convolution"
    return "1x1 convolution" if prod(weight[2:]) == 1 else "other convolution"


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
