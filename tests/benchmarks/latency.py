"""How well the latencies of networks are predicted from a table of the latencies of their candidates.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.latency --config FILE --out OUT.csv

For the target network of the configuration a table is measured, as `istanas latency` does. In the same interleaved runs
the networks of 30 random architectures are measured, which are not the references of the table. A line of OUT has the
name of the configuration and the backend, an architecture's seed, its predicted and its measured latency, and the
quartiles of the latter; an existing file is continued. The last line of the output summarises what was measured. The
bounds are a rank correlation of at least 0.9 and a median relative error of at most 10 %.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from scipy.stats import spearmanr

from istanas.latency import latency_predictor
from pipeline.config.load import load
from pipeline.training.build import network_size, shape_of, target_sizes
from pipeline.training.compute import compute_for
from pipeline.training.latency_measurement import measure_latencies
from pipeline.training.pictures import open_dataset, settle_stems

FIELDS = ("network", "seed", "predicted_ms", "measured_ms", "lower_ms", "upper_ms")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--backend", choices=("torch", "onnxruntime"), default="torch")
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    config = settle_stems(load(options.config, [*options.set, "runtime.threads=1"]))
    dataset = open_dataset(config, ("search",))
    compute = compute_for(config.runtime)
    space, size, shape = config.space.build(), network_size(target_sizes(config), dataset), shape_of(dataset)
    start = time.perf_counter()
    table = measure_latencies(
        space, size, shape, compute, backend=options.backend, checks=options.count, say=print
    )
    seconds = time.perf_counter() - start
    print(f"table: {seconds:.0f} s, fixed parts {table.fixed_ms:.3g} ms, scale {table.scale:.3g}")
    predict = latency_predictor(table, space, size, shape).predict
    predicted = [predict(space.random(each.seed)) for each in table.checks]
    network = f"{options.config.stem}, {options.backend}"
    is_new = not options.out.exists()
    with options.out.open("a", newline="") as stream:
        writer = csv.writer(stream)
        if is_new:
            writer.writerow(FIELDS)
        for guess, each in zip(predicted, table.checks, strict=True):
            numbers = (guess, each.median_ms, each.lower_ms, each.upper_ms)
            writer.writerow((network, each.seed, *(f"{number:.4f}" for number in numbers)))
    print(summary(predicted, [each.median_ms for each in table.checks]))


def summary(predicted: Sequence[float], measured: Sequence[float]) -> str:
    """Return the rank correlation, and the median and the largest relative error, in words."""
    errors = [abs(p - m) / m for p, m in zip(predicted, measured, strict=True)]
    return (
        f"Spearman {spearmanr(predicted, measured).statistic:.3f}, median error {statistics.median(errors):.1%}, "
        f"largest error {max(errors):.1%}, measured {min(measured):.3g} to {max(measured):.3g} ms"
    )


if __name__ == "__main__":
    main()
