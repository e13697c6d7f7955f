"""The cost of every registered search method, beside that of two-stage search: time of a step and epoch, peak memory.

    python -m tests.benchmarks.methods METHOD

runs a step and prints the memory of its process; `memory` starts such processes, each of which has only one search.
"""

import dataclasses
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from istanas.data import load_dataset
from istanas.distributed import Ranks
from istanas.errors import ConfigError
from istanas.methods import DEFAULT_METHOD, METHODS
from pipeline.config.load import load
from pipeline.training.build import build_search
from pipeline.training.profiling import count_flops
from tests.benchmarks import harness
from tests.benchmarks.harness import Row
from tests.benchmarks.memory import MIB, peak_bytes
from tests.benchmarks.pairs import CPU, ours_of, random_batch

Size = tuple[int, int, int]  # channels, layers, batch
SPEED, MEMORY = (8, 5, 32), (16, 8, 64)


def make_step(method: str, size: Size) -> Callable[[], None]:
    """Return a step of a method on pictures of 32x32, with the method's default settings and this size.

    The search is in the middle of its epochs, so that every warm-up is over.
    """
    channels, layers, batch = size
    config = load(None, [f"method={method}", f"search.init_channels={channels}", f"search.layers={layers}"])
    pictures = dataclasses.replace(load_dataset("digits"), channels=3, height=32, width=32)
    search = build_search(config, pictures, CPU, Ranks())
    search.epoch = config.search.max_epochs // 2
    search.supernet.train()
    batches = [ours_of(random_batch(batch, 32, seed)) for seed in range(2)]
    return lambda: search.train_step(*batches)


def steps_of_an_epoch(method: str, batch: int) -> int:
    """Return the number of steps of an epoch on 50,000 pictures, of which a part may choose the architecture.

    Example:
        >>> steps_of_an_epoch("two_stage", 32), steps_of_an_epoch("one_stage", 32)
        (782, 1563)
    """
    choosing = getattr(METHODS[method].settings_class, "alpha_fraction", 0.0)
    return math.ceil(50_000 * (1 - choosing) / batch)


def with_steps() -> list[str]:
    """Return the methods that train something, the one that the others are compared with first."""
    found = []
    for method in sorted(METHODS, key=lambda name: name != DEFAULT_METHOD):
        try:
            make_step(method, (4, 3, 2))()
            found.append(method)
        except ConfigError as error:
            print(f"{method} is left out: {error.problem}")
    return found


def costs(rounds: int, speed: Size = SPEED, memory_size: Size = MEMORY) -> list[Row]:
    """Return the rows of all methods, without bounds: seconds of a step, then peak memory.

    Args:
        rounds: Number of measurements of each, >= 2.
        speed: Size of the networks whose steps are timed.
        memory_size: Size of the networks whose memory is measured.
    """
    methods = with_steps()
    return seconds(methods, rounds, speed) + memory(methods, rounds, memory_size)


def seconds(methods: list[str], rounds: int, size: Size) -> list[Row]:
    """Return each method's seconds of a step, and their ratio to those of the first method."""
    steps = [make_step(method, size) for method in methods]
    measured = harness.interleaved(steps, rounds)
    rows = []
    for method, step, own in zip(methods, steps, measured, strict=True):
        ratio, spread = harness.ratio_of_medians(own, measured[0])
        rows.append(
            Row(
                f"{method} step, {' / '.join(map(str, size))}, against {methods[0]}",
                ratio,
                spread,
                None,
                statistics.median(own),
                statistics.median(measured[0]),
                counted=f"{count_flops(step) / 1e9:.2f} GFLOP; an epoch of 50,000 pictures: "
                f"{steps_of_an_epoch(method, size[2]) * statistics.median(own) / 60:.1f} min",
            )
        )
    return rows


def memory(methods: list[str], runs: int, size: Size) -> list[Row]:
    """Return each method's peak memory of a process with one step, and its ratio to that of the first method."""
    found: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for _ in range(runs):
        for method in methods:
            done = subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.methods", method, *map(str, size)],
                cwd=Path(__file__).resolve().parents[2],
                capture_output=True,
                text=True,
                check=True,
            )
            found[method].append(json.loads(done.stdout.splitlines()[-1]))
    first, rows = [run["peak"] for run in found[methods[0]]], []
    for method, measured in found.items():
        peaks = [run["peak"] for run in measured]
        ratio, spread = harness.ratio_of_medians(peaks, first)
        above = statistics.median(run["step"] for run in measured)
        rows.append(
            Row(
                f"peak memory of a {method} step, {' / '.join(map(str, size))}",
                ratio,
                spread,
                None,
                statistics.median(peaks),
                statistics.median(first),
                "MiB",
                counted=f"above what was there before the step: {above:,.0f} MiB",
            )
        )
    return rows


def main(method: str, *size: str) -> None:
    """Print MiB: "peak", and "step", the peak above the memory before the step."""
    torch.set_num_threads(1)
    channels, layers, batch = map(int, size)
    step = make_step(method, (channels, layers, batch))
    before = psutil.Process().memory_info().rss
    step()
    peak = peak_bytes()
    print(json.dumps({"peak": peak / MIB, "step": (peak - before) / MIB}))


if __name__ == "__main__":
    main(*sys.argv[1:])
