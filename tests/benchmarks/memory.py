"""Peak memory of a two-stage step of the published size, as the peak RSS of a fresh process.

    python -m tests.benchmarks.memory KIND

runs the step and prints its memory; `peaks` starts such processes, each of which has only the network under test.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from tests.benchmarks import reference
from tests.benchmarks.pairs import (
    make_reference,
    make_search,
    ours_of,
    random_batch,
    random_codes,
    two_stage_step,
)

MIB = 2**20
CHANNELS, LAYERS, BATCH = 16, 8, 256
KINDS = ("ours", "checkpointing", "reference")


def peaks(runs: int) -> dict[str, list[dict[str, float]]]:
    """Return the output of `main` for each kind in each run; the kinds run in turn."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(runs):
        for kind in KINDS:
            done = subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.memory", kind],
                cwd=Path(__file__).resolve().parents[2],
                capture_output=True,
                text=True,
                check=True,
            )
            found[kind].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def make_step(kind: str) -> Callable[[], None]:
    """Return a step of one of `KINDS`, with its network and batches."""
    batch, alpha_batch = (random_batch(BATCH, 32, i) for i in range(2))
    if kind == "reference":
        optimizers = make_reference(CHANNELS, LAYERS, random_codes(0))
        return lambda: reference.two_stage_step(optimizers, batch, alpha_batch)
    search = make_search(CHANNELS, LAYERS, random_codes(0))
    search.supernet.activation_checkpointing = kind == "checkpointing"
    batch, alpha_batch = ours_of(batch), ours_of(alpha_batch)
    return lambda: two_stage_step(search, batch, alpha_batch)


def main(kind: str) -> None:
    """Print MiB: "peak", and "step", the peak above the memory before the step.

    One step, of two forward and backward passes, is enough: the gradients and momentum that remain for the next one
    have the size of the weights, at most 7 MiB. In single runs, a second step had a peak 4 % higher (ours), 6 % higher
    (checkpointing) and 1 % lower (reference), from malloc's fragmentation.
    """
    torch.set_num_threads(1)
    step = make_step(kind)
    before = psutil.Process().memory_info().rss
    step()
    peak = peak_bytes()
    print(json.dumps({"peak": peak / MIB, "step": (peak - before) / MIB}))


def peak_bytes() -> int:
    """Return the peak memory of this process.

    `getrusage` does not serve, since a process inherits the peak of its parent there.
    """
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main(sys.argv[1])
