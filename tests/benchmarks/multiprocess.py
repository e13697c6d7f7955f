"""Costs of two processes: all-reduced bytes of a step, and Ray Train against plain torchrun.

python -m tests.benchmarks.multiprocess prints every figure; `make bench` takes them as rows of its table.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from istanas.distributed import Ranks
from istanas.nets import Supernet, to_channels_last
from istanas.search import TwoStageSearch, TwoStageSettings
from istanas.space import CELLS, PUBLISHED, CellSpace, Genotype
from istanas.training import Totals
from tests.benchmarks import reference
from tests.benchmarks.harness import Row, ratio_of_medians
from tests.benchmarks.pairs import CPU, Supports, codes_of
from tests.ranks import CountingRanks, run_ranks

ROOT = Path(__file__).resolve().parents[2]
CHANNELS, LAYERS = 16, 8
# Epochs take seconds, so that a report's share of the time is that of a real run. The architectures follow from the
# seed, so that both sides do the same work.
CONFIG = """
seed: 0
data: {name: digits, crop_padding: 1}
search: {epochs: 4, batch_size: 32, init_channels: 8, layers: 8, arch_lr: 0.003}
runtime: {threads: 1, device: cpu, workers: 0}
tracking: {enabled: false}
"""
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # ports on 127.0.0.1 only
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
SECONDS = 120  # longest time of a run


# ---------- bytes
def supports_of(space: CellSpace, genotype: Genotype) -> Supports:
    """Return the candidates that a genotype picks, per cell and node."""
    return {
        cell: [
            tuple(sorted(space.candidate(i, state, space.ops.index(op)) for op, state in node))
            for i, node in enumerate(genotype.picks(cell))
        ]
        for cell in CELLS
    }


def _bytes_of_a_step() -> tuple[int, int]:
    """Return the bytes in DDP's hook on this rank for our step and for dense first-order DARTS: weights and alphas.

    Few and small pictures suffice, since gradients have the size of the parameters.
    """
    current, space = Ranks.current(CPU.device), CellSpace()
    ranks = CountingRanks(current.rank, current.size)
    batch = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])

    def counted(step: Callable[[], Any]) -> int:
        CountingRanks.counted.clear()
        step()
        return sum(CountingRanks.counted)

    net = to_channels_last(Supernet(space, CHANNELS, LAYERS, 10)).train()
    search = TwoStageSearch(net, TwoStageSettings(), CPU, 0, ranks)
    codes = codes_of(space, supports_of(space, PUBLISHED["ISTA_twostage"]), 0)
    search.install({(cell, node): codes[cell][node] for cell, node in search.places})
    ours = counted(lambda: search.alpha_step(batch)) + counted(
        lambda: search.weight_step(batch, Totals(CPU.device))
    )

    dense = reference.DenseSupernet(CHANNELS, LAYERS)
    # One backward pass for both steps: every weight and every alpha is sent once.
    forward = ranks.data_parallel(lambda x: dense(x)[0], list(dense.parameters()))
    theirs = counted(lambda: F.cross_entropy(forward(batch[0]), batch[1]).backward())
    return ours, theirs


def measure_bytes() -> dict[str, float]:
    """Return the all-reduced bytes of a step of the published genotype and of the dense supernet, and their ratio."""
    (outcomes,) = run_ranks([_bytes_of_a_step], 2)
    (ours, theirs), other = (outcome.value for outcome in outcomes)
    assert (ours, theirs) == other, "the ranks sent different numbers of bytes"
    return {"bytes": ours, "dense_bytes": theirs, "ratio": ours / theirs}


def bytes_all_reduced() -> Row:
    """Return `measure_bytes` as a row."""
    found = measure_bytes()
    ratio = found["ratio"]
    return Row(
        f"bytes all-reduced a step, published cell against the dense supernet, {CHANNELS} / {LAYERS}",
        ratio,
        (ratio, ratio),
        0.2,
        found["bytes"] / 1e6,
        found["dense_bytes"] / 1e6,
        "MB",
        "at most",
        f"{found['bytes']:,.0f} / {found['dense_bytes']:,.0f} bytes, by DDP's hook",
    )


# ---------- Ray Train against torchrun
def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=folder,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{command[0]}: not done after {SECONDS} s, look for other work here") from error
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed with code {done.returncode}:\n{done.stdout}{done.stderr}")


def _on_ray(folder: Path) -> list[dict[str, Any]]:
    _run(["pipeline.cli", "search", "--config", "bench.yaml", "--workers", "2"], folder)
    (file,) = (folder / "runs").glob("bench-search-*/metrics.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def _on_torchrun(folder: Path) -> list[dict[str, Any]]:
    _run(
        [
            "torch.distributed.run",
            *("--nproc-per-node", "2"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
            *("-m", "tests.benchmarks.torchrun_search", "bench.yaml", str(folder)),
        ],
        folder,
    )
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def steady_rate(history: list[dict[str, Any]]) -> float:
    """Return the loops' pictures per second in all epochs except the first, all with the same number of pictures.

    >>> steady_rate([{"metrics": {"images_per_second": r}} for r in (1.0, 20.0, 30.0)])
    24.0
    """
    return statistics.harmonic_mean([epoch["metrics"]["images_per_second"] for epoch in history[1:]])


def epoch_seconds(history: list[dict[str, Any]]) -> float:
    """Return the mean seconds between epochs' ends, with validation, recovery, checkpoint and report.

    >>> epoch_seconds([{"timestamp_ms": t} for t in (1000, 2500, 5000)])
    2.0
    """
    last, first = history[-1]["timestamp_ms"], history[0]["timestamp_ms"]
    return float((last - first) / 1000 / (len(history) - 1))


SIDES = {"ray": _on_ray, "torchrun": _on_torchrun}
Figures = dict[str, dict[str, list[float]]]


def measure_ray(runs: int) -> Figures:
    """Measure Ray Train and torchrun on two workers: "epoch" and "run" in seconds, "rate" in pictures per second.

    Args:
        runs: Number of runs of each; the first of a pair alternates.

    Returns:
        Figure -> side -> value in each run.
    """
    figures: Figures = {what: {side: [] for side in SIDES} for what in ("epoch", "rate", "run")}
    found: dict[str, set[str]] = {side: set() for side in SIDES}
    for i in range(runs):
        for side in SIDES if i % 2 == 0 else reversed(SIDES):
            with tempfile.TemporaryDirectory(prefix="bench") as folder:
                (Path(folder) / "bench.yaml").write_text(CONFIG)
                start = time.perf_counter()
                history = SIDES[side](Path(folder))
            figures["run"][side].append(time.perf_counter() - start)
            figures["rate"][side].append(steady_rate(history))
            figures["epoch"][side].append(epoch_seconds(history))
            found[side].add(json.dumps([record["metrics"]["train/loss"] for record in history]))
    assert found["ray"] == found["torchrun"], "the two did not do the same work"
    return figures


def ray_against_torchrun(runs: int) -> Row:
    """Return `measure_ray` as a row: torchrun's seconds per epoch over Ray's, with all overheads."""
    figures = measure_ray(runs)
    ratio, spread = ratio_of_medians(figures["epoch"]["torchrun"], figures["epoch"]["ray"])
    medians = {
        what: {side: statistics.median(values) for side, values in sides.items()}
        for what, sides in figures.items()
    }
    loops = " / ".join(f"{medians['rate'][side]:.0f}" for side in SIDES)
    whole = " / ".join(f"{medians['run'][side]:.0f}" for side in SIDES)
    return Row(
        f"Ray Train against torchrun, 2 workers, an epoch with checkpoint and report, median of {runs}",
        ratio,
        spread,
        0.95,
        medians["epoch"]["ray"],
        medians["epoch"]["torchrun"],
        counted=f"the loops alone {loops} pictures/s, whole runs {whole} s",
    )


def main() -> None:
    """Print all figures."""
    torch.set_num_threads(1)
    print(json.dumps(measure_bytes()), flush=True)
    start = time.perf_counter()
    print(json.dumps(measure_ray(5), indent=2))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
