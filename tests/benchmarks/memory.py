"""Peak memory of two-stage steps in this process, which must be fresh: `python -m tests.benchmarks.memory KIND`."""

import json
import re
import sys
from pathlib import Path

import psutil
import torch

from tests.benchmarks.pairs import Pair, ours_of, random_batch

MIB = 2**20


def main(kind: str, c: int = 16, layers: int = 8, n: int = 64) -> None:
    """Print MiB at the peak, and above what was there before the first step."""
    torch.set_num_threads(1)
    pair = Pair(c, layers)
    pair.net.activation_checkpointing = kind == "checkpointing"
    theirs = [random_batch(n, 32, i) for i in range(2)]
    ours = [ours_of(batch) for batch in theirs]
    before = psutil.Process().memory_info().rss
    for _ in range(2):
        if kind == "reference":
            pair.their_step(*theirs)
        else:
            pair.our_step(*ours)
    peak = peak_bytes()
    print(json.dumps({"step_mib": (peak - before) / MIB, "peak_mib": peak / MIB}))


def peak_bytes() -> int:
    """The most memory that this process has held.

    Not `getrusage`: there, a process begins with the peak of the one that started it.
    """
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main(sys.argv[1])
