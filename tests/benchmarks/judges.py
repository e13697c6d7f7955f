"""How well short trainings of different kinds order architectures whose true accuracies are known.

    python -m tests.benchmarks.judges --table TABLE --config FILE --root DIR --out OUT.csv

FILE is a configuration with `method: measured`. `JUDGES` are settings of a measurement, each of which measures the same
architectures: by turns one that is drawn from all architectures of the table, and one from its best fifth, where a
search measures after its first stage; with `--top`, architectures of the best fiftieth. A line is written after each
measurement, and the same command continues after the last one. `--summary` prints what is known so far and measures
nothing.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from istanas.distributed import Ranks
from istanas.effects import Architecture
from istanas.search.measured import MeasuredSearch
from istanas.statistics import kendall
from pipeline.config.load import load
from pipeline.training.compute import compute_for
from pipeline.training.epochs import SearchJob
from pipeline.training.pictures import open_dataset, settle_stems
from tests.benchmarks.effects_simulation import Table, read_table

FEW, MANY = (
    ("search.max_pictures=15000", "search.alpha_fraction=0.333333"),  # 10,000 for training, 5,000 measure
    ("search.max_pictures=25000", "search.alpha_fraction=0.2"),  # 20,000 and 5,000
)
SMALL = ("data.image_size=16", "data.crop_padding=2")
SHALLOW = ("search.layers=5",)  # one cell per stage
JUDGES: dict[str, tuple[str, ...]] = {
    "32px-3": (*FEW, *SHALLOW, "search.stages=[[1,3]]"),
    "16px-12": (*FEW, *SMALL, *SHALLOW, "search.stages=[[1,12]]"),
    "16px-20k-6": (*MANY, *SMALL, *SHALLOW, "search.stages=[[1,6]]"),
    "32px-8": (*FEW, *SHALLOW, "search.stages=[[1,8]]"),
    # Two cells per stage.
    "32px-8layers-3": (*FEW, "search.layers=8", "search.stages=[[1,3]]"),
    "32px-8layers-8": (*FEW, "search.layers=8", "search.stages=[[1,8]]"),
    # Three and five cells per stage, with a quarter of the pixels.
    "16px-11layers-8": (*FEW, *SMALL, "search.layers=11", "search.stages=[[1,8]]"),
    "16px-17layers-5": (*FEW, *SMALL, "search.layers=17", "search.stages=[[1,5]]"),
}
FIELDS = (
    "index",
    "stratum",
    "kept",
    "true_score",
    "judge",
    "seconds",
    "loss",
    "top1",
    "train_loss",
    "sum_train_loss",
)


STRATA = ("all", "best fifth")
TOP_STRATA = ("best fiftieth",)
FIRST_OF_TOP = 1000  # Index of the first architecture with --top, so that one file can have both draws.


def drawn(
    table: Table, count: int, seed: int, strata: tuple[str, ...] = STRATA
) -> Iterator[tuple[str, Architecture]]:
    """Yield architectures and their stratum, by turns from each stratum."""
    rng = np.random.default_rng(seed)
    ordered = sorted(table.rank, key=lambda kept: table.rank[kept])
    pools = {
        "all": ordered,
        "best fifth": ordered[: len(ordered) // 5],
        "best fiftieth": ordered[: len(ordered) // 50],
    }
    taken: set[Architecture] = set()
    for number in range(count):
        stratum = strata[number % len(strata)]
        kept = pools[stratum][int(rng.integers(len(pools[stratum])))]
        while kept in taken:
            kept = pools[stratum][int(rng.integers(len(pools[stratum])))]
        taken.add(kept)
        yield stratum, kept


def measure(
    config_file: Path, root: Path, settings: tuple[str, ...], kept: Architecture, seed: int
) -> dict[str, float]:
    """Train and measure one architecture, and return its figures with the seconds of CPU time."""
    config = settle_stems(load(config_file, [f"data.root={root}", f"seed={seed}", *settings]))
    dataset = open_dataset(config, ("search",))
    compute = compute_for(config.runtime)
    job = SearchJob(config, dataset, compute, Ranks.current(compute.device))
    search = job.search
    assert isinstance(search, MeasuredSearch)
    torch.manual_seed(seed)
    search.hold(replace(search.current, kept=kept))
    start, losses = time.process_time(), []
    for epoch in range(config.search.max_epochs):
        result = job.run_epoch(epoch, lambda *_: None, 1.0)
        losses.append(result.metrics.get("train/loss", float("inf")))
    (measured,) = search.measurements
    return {
        "seconds": round(time.process_time() - start, 2),
        "loss": measured.loss,
        "top1": measured.top1,
        "train_loss": losses[-1],
        "sum_train_loss": sum(losses),
    }


def summary(file: Path) -> pd.DataFrame:
    """Return the tau of each judge with the truth in each stratum, and its mean seconds."""
    frame, rows = pd.read_csv(file), []
    for (judge, stratum), own in frame.groupby(["judge", "stratum"]):
        row = {"judge": judge, "stratum": stratum, "n": len(own), "seconds": own["seconds"].mean()}
        for name, sign in (("loss", -1), ("top1", 1), ("train_loss", -1), ("sum_train_loss", -1)):
            if len(own) > 3:
                row[name] = kendall((sign * own[name]).tolist(), own["true_score"].tolist()).estimate
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    """Measure what has no line yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge", nargs="+", choices=JUDGES, default=list(JUDGES))
    parser.add_argument("--top", action="store_true", help="architectures of the best fiftieth")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    if options.summary:
        print(summary(options.out).round(3).to_string(index=False))
        return
    table = read_table(options.table)
    done = set()
    if options.out.exists():
        done = {(int(row["index"]), row["judge"]) for row in csv.DictReader(options.out.open())}
    with options.out.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        if options.out.stat().st_size == 0:
            writer.writeheader()
        first, strata = (FIRST_OF_TOP, TOP_STRATA) if options.top else (0, STRATA)
        for index, (stratum, kept) in enumerate(drawn(table, options.count, options.seed, strata), first):
            for judge in options.judge:
                if (index, judge) in done:
                    continue
                figures = measure(options.config, options.root, JUDGES[judge], kept, options.seed)
                named = {"index": index, "stratum": stratum, "kept": " ".join(map(str, kept))}
                writer.writerow(named | {"true_score": table.score[kept], "judge": judge} | figures)
                stream.flush()


if __name__ == "__main__":
    main()
