"""What two processes cost: bytes all-reduced of a step, and Ray Train against plain torchrun.

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
from tests.benchmarks.harness import Row
from tests.benchmarks.pairs import CPU, Supports, codes_of
from tests.ranks import CountingRanks, run_ranks

ROOT = Path(__file__).resolve().parents[2]
CHANNELS, LAYERS = 16, 8
# Steps of some 0.1 s, and epochs whose architectures follow from the seed: both sides do the same work.
CONFIG = """
seed: 0
data: {name: digits, crop_padding: 1}
search: {epochs: 6, batch_size: 64, init_channels: 8, layers: 5, arch_lr: 0.003}
runtime: {threads: 1, device: cpu, workers: 0}
tracking: {enabled: false}
"""
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # ports on 127.0.0.1 only
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
SECONDS = 120  # after which a run counts as stuck


# ---------- bytes
def supports_of(space: CellSpace, genotype: Genotype) -> Supports:
    """The candidates that a genotype picks, per cell and node."""
    return {
        cell: [
            tuple(sorted(space.candidate(i, state, space.ops.index(op)) for op, state in node))
            for i, node in enumerate(genotype.picks(cell))
        ]
        for cell in CELLS
    }


def _bytes_of_a_step() -> tuple[int, int]:
    """Bytes that DDP's hook sees on this rank, of our step and of dense first-order DARTS's: weights and alphas.

    Pictures are few and small: gradients have the size of the parameters.
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
    codes = codes_of(space, supports_of(space, PUBLISHED["ISTA_twostage"]), 7, 0)
    search.install({(cell, node): codes[cell][node] for cell, node in search.places})
    ours = counted(lambda: search.alpha_step(batch)) + counted(
        lambda: search.weight_step(batch, Totals(CPU.device))
    )

    dense = reference.DenseSupernet(CHANNELS, LAYERS)
    # One backward pass for both steps: every weight and every alpha travels once.
    forward = ranks.data_parallel(lambda x: dense(x)[0], list(dense.parameters()))
    theirs = counted(lambda: F.cross_entropy(forward(batch[0]), batch[1]).backward())
    return ours, theirs


def measure_bytes() -> dict[str, float]:
    """Bytes all-reduced a step: the published genotype's active set, the dense supernet, and their ratio."""
    (outcomes,) = run_ranks([_bytes_of_a_step], 2)
    (ours, theirs), other = (outcome.value for outcome in outcomes)
    assert (ours, theirs) == other, "the ranks sent different numbers of bytes"
    return {"bytes": ours, "dense_bytes": theirs, "ratio": ours / theirs}


def bytes_all_reduced() -> Row:
    """`measure_bytes` as a row."""
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
    history: list[dict[str, Any]] = json.loads((folder / "history.json").read_text())
    return history


def steady_rate(history: list[dict[str, Any]]) -> float:
    """Pictures per second over all epochs but the first: each has the same number of pictures.

    >>> steady_rate([{"metrics": {"images_per_second": r}} for r in (1.0, 20.0, 30.0)])
    24.0
    """
    return statistics.harmonic_mean([epoch["metrics"]["images_per_second"] for epoch in history[1:]])


def epoch_seconds(history: list[dict[str, Any]]) -> float:
    """Seconds from one epoch's end to the next, checkpoint and report included: what the rate leaves out.

    >>> epoch_seconds([{"timestamp_ms": t} for t in (1000, 2500, 5000)])
    2.0
    """
    last, first = history[-1]["timestamp_ms"], history[0]["timestamp_ms"]
    return float((last - first) / 1000 / (len(history) - 1))


def measure_ray(runs: int = 5) -> dict[str, Any]:
    """Steady-state pictures per second on two workers, Ray Train and torchrun in turn, and the ratio of medians.

    Args:
        runs: of each.
    """
    rates: dict[str, list[float]] = {"ray": [], "torchrun": []}
    epochs: dict[str, list[float]] = {"ray": [], "torchrun": []}
    seconds: dict[str, list[float]] = {"ray": [], "torchrun": []}
    found: dict[str, set[str]] = {"ray": set(), "torchrun": set()}
    for _ in range(runs):
        for name, search in (("ray", _on_ray), ("torchrun", _on_torchrun)):
            with tempfile.TemporaryDirectory(prefix="bench") as folder:
                (Path(folder) / "bench.yaml").write_text(CONFIG)
                start = time.perf_counter()
                history = search(Path(folder))
            seconds[name].append(time.perf_counter() - start)
            rates[name].append(steady_rate(history))
            epochs[name].append(epoch_seconds(history))
            found[name].add(json.dumps([record["metrics"]["train/loss"] for record in history]))
    assert found["ray"] == found["torchrun"], "the two did not do the same work"
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "ratio": medians["ray"] / medians["torchrun"],
        "ratios": [r / t for r, t in zip(rates["ray"], rates["torchrun"], strict=True)],
        "pictures_per_second": rates,
        "medians": medians,
        "seconds_of_an_epoch": epochs,
        "seconds_of_a_run": seconds,
    }


def ray_against_torchrun(runs: int = 5) -> Row:
    """`measure_ray` as a row."""
    found = measure_ray(runs)
    ratios = sorted(found["ratios"])
    low, _, high = statistics.quantiles(ratios, n=4) if runs > 1 else (ratios[0],) * 3
    epoch, whole = (
        {name: statistics.median(values) for name, values in found[f"seconds_of_{what}"].items()}
        for what in ("an_epoch", "a_run")
    )
    return Row(
        f"Ray Train against torchrun, 2 workers, steady state, median of {runs}",
        found["ratio"],
        (low, high),
        0.95,
        found["medians"]["ray"],
        found["medians"]["torchrun"],
        "pictures/s",
        counted=f"epochs with checkpoint and report {epoch['ray']:.2f} / {epoch['torchrun']:.2f} s, "
        f"whole runs {whole['ray']:.0f} / {whole['torchrun']:.0f} s",
    )


def main() -> None:
    """Print all figures."""
    torch.set_num_threads(1)
    print(json.dumps(measure_bytes()), flush=True)
    start = time.perf_counter()
    print(json.dumps(measure_ray(), indent=2))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
