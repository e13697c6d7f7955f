"""The study in the space of NAS-Bench-201: one core-hour a run, scored by the table of true accuracies.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.study --table TABLE --root DIR --work WORK [--row METHOD:SEED ...]

DIR is CIFAR-10 as a picture folder. `PLAN` lists the runs. Each finished run adds a row to RESULTS, and the ranks of
its architectures over time to RANKS; both files are committed. Runs with a row are not repeated, so that the study can
continue anywhere. WORK has the run directories: a run that was interrupted continues there. `--row` chooses runs, for
several processes at a time. `--summary` prints the means and runs nothing.

The methods are those of the configurations beside this file. The policies share the short trainings of `measured` (its
first fidelity, 3 epochs on 10,000 pictures), as many as fit into a core-hour, and keep the best measured architecture.
The table is read only when a run has finished.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import json
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from istanas.effects import Architecture, supports_of
from istanas.space import Genotype, NasBench201Space
from istanas.statistics import mean_interval
from pipeline.config.yaml_files import dump, read_file
from pipeline.jobs.truth import check_table, read_truth
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import CHECKPOINTS
from pipeline.training.epoch_record import load_progress, read_records
from tests.benchmarks.effects_policies import POLICIES
from tests.benchmarks.judges import measure

HERE = Path(__file__).resolve().parent
COMMON = HERE / "nas_bench_201_measured.yaml"
RESULTS = HERE.parent / "results" / "study_nas_bench_201.csv"
RANKS = HERE.parent / "results" / "study_nas_bench_201_ranks.csv"
SHORT_TRAINING = ("search.stages=[[1,3]]",)
SHORT_TRAININGS = 94  # 282 epochs; `measured` trains 284
POLICY_ROWS = {
    "best of random": "random, best measured",
    "evolution": "evolution, best measured",
    "tpe": "tpe, best measured",
}


@dataclass(frozen=True)
class Row:
    """A run of the study."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.method.replace(' ', '_')}-{self.seed}"


@dataclass(frozen=True)
class Point:
    """The best architecture by what a run knew after some seconds."""

    genotype: Genotype
    seconds: float


def plan() -> list[Row]:
    """Return all runs; those of the most seeds of all methods first."""
    seeds = {"measured": 6, "two_stage": 4, "random_nas": 2, "darts": 2, "pc_darts": 2, "gdas": 2}
    seeds |= dict.fromkeys(POLICY_ROWS, 2)
    return [Row(name, 100 + i) for i in range(max(seeds.values())) for name, n in seeds.items() if i < n]


PLAN = plan()


def search(row: Row, root: Path, work: Path) -> dict[str, Any]:
    """Run `istanas search`, and return what it prints with `--json`."""
    config = read_file(COMMON) | read_file(HERE / f"nas_bench_201_{row.method}.yaml") | {"seed": row.seed}
    config["data"] |= {"root": str(root)}
    config["runtime"] |= {"runs_dir": str(work / "runs")}
    config["tracking"] = {"enabled": False}
    file = work / f"{row.name}.yaml"
    file.write_text(dump(config))
    command = [sys.executable, "-m", "pipeline.cli", "search", "--config", str(file), "--json"]
    with file.with_suffix(".log").open("a") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{row.name}: exit code {done.returncode}, see {log.name}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def search_by_policy(row: Row, root: Path, work: Path) -> list[Point]:
    """Return the best architecture after each short training; those that `work` has are not repeated."""
    space, file = NasBench201Space(), work / f"{row.name}.csv"
    done = list(csv.DictReader(file.open())) if file.exists() else []
    replayed = iter(list(done))
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, ("kept", "loss", "seconds"), lineterminator="\n")
        if not done:
            writer.writeheader()

        def measured(kept: Architecture) -> float:
            shown = " ".join(map(str, kept))
            if (known := next(replayed, None)) is not None:
                assert known["kept"] == shown, f"{file} is of another policy"
                return float(known["loss"])
            figures = measure(COMMON, root, SHORT_TRAINING, kept, 1000 * row.seed + len(done))
            done.append({"kept": shown, "loss": figures["loss"], "seconds": figures["seconds"]})
            writer.writerow(done[-1])
            stream.flush()
            return figures["loss"]

        at = range(1, SHORT_TRAININGS + 1)
        best = POLICIES[POLICY_ROWS[row.method]](space, measured, at, row.seed)
    seconds = pd.Series([float(each["seconds"]) for each in done]).cumsum()
    found = (space.genotype(supports_of(space, kept)) for kept in best)
    return [Point(*pair) for pair in zip(found, seconds, strict=True)]


def found_over_time(row: Row, root: Path, work: Path) -> tuple[list[Point], float | None]:
    """Run a row. Return the best architecture after each epoch or measurement, and the search's own accuracy."""
    if row.method in POLICY_ROWS:
        return search_by_policy(row, root, work), None
    result = search(row, root, work)
    run = RunDir(Path(result["run_dir"]))
    points, seconds = [], 0.0
    for record in read_records(run.path / CHECKPOINTS, load_progress(run.path / CHECKPOINTS)):
        seconds += record.seconds
        points.append(Point(Genotype.from_json(record.found().genotype), seconds))
    assert points[-1].genotype == Genotype.from_dict(result["genotype"])
    return points, result["valid_top1"]


def execute(row: Row, table: Path, root: Path, work: Path) -> None:
    """Run a row, score it, and add it to the tables."""
    used = cpu_seconds()
    points, valid = found_over_time(row, root, work)
    used = cpu_seconds() - used
    space = NasBench201Space()
    truth = read_truth(table, space, check_table(table, space))
    scores = [truth.score(point.genotype) for point in points]
    named = {"method": row.method, "seed": row.seed}
    append(
        RESULTS,
        [
            named
            | {
                "architecture": space.text(points[-1].genotype),
                "rank": scores[-1].rank,
                "true_accuracy": scores[-1].accuracy,
                "valid_top1": valid,
                "seconds": round(points[-1].seconds),
                "cpu_seconds": round(used),
            }
        ],
    )
    changes = [
        named | {"step": step, "seconds": round(point.seconds), "rank": score.rank}
        for step, (point, score) in enumerate(zip(points, scores, strict=True), 1)
        if step in (1, len(points)) or score.rank != scores[step - 2].rank
    ]
    append(RANKS, changes)


def cpu_seconds() -> float:
    """Return the CPU time of this process and of the processes that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def append(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a table, while no other process does."""
    with file.open("a", newline="") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        if stream.seek(0, 2) == 0:
            writer.writeheader()
        writer.writerows(rows)


def finished() -> set[Row]:
    """Return the runs that have a row in the results."""
    if not RESULTS.exists():
        return set()
    return {Row(each["method"], int(each["seed"])) for each in csv.DictReader(RESULTS.open())}


def summary() -> pd.DataFrame:
    """Return the mean rank, its 95 % interval and the mean seconds of each method with at least two runs."""
    rows = []
    for method, own in pd.read_csv(RESULTS).groupby("method"):
        row = {"method": method, "runs": len(own), "ranks": " ".join(map(str, own["rank"]))}
        row |= {"mean": own["rank"].mean(), "seconds": own["seconds"].mean()}
        if len(own) > 1:
            interval = mean_interval(own["rank"].astype(float).tolist(), low=1, high=15625)
            row |= {"low": interval.low, "high": interval.high}
        rows.append(row)
    return pd.DataFrame(rows).sort_values("mean")


def main() -> None:
    """Execute the runs that have no row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, help="table of true accuracies")
    parser.add_argument("--root", type=Path, help="CIFAR-10 as a picture folder")
    parser.add_argument("--work", type=Path, help="folder of the run directories")
    parser.add_argument("--row", nargs="+", metavar="METHOD:SEED", help="only these runs, in this order")
    parser.add_argument("--summary", action="store_true", help="print the means")
    options = parser.parse_args()
    if options.summary:
        print(summary().round(1).to_string(index=False))
        return
    if None in (options.table, options.root, options.work):
        parser.error("--table, --root and --work are required")
    rows = PLAN
    if options.row:
        named = {f"{row.method}:{row.seed}": row for row in PLAN}
        if unknown := [name for name in options.row if name not in named]:
            parser.error(f"no run {unknown[0]!r}; the plan has {', '.join(named)}")
        rows = [named[name] for name in options.row]
    options.work.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if row not in finished():
            execute(row, options.table, options.root.resolve(), options.work.resolve())


if __name__ == "__main__":
    main()
