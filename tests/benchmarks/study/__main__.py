"""The study in the space of NAS-Bench-201: one core-hour a run, scored by the table of true accuracies.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.study --table TABLE --root DIR --work WORK [--row METHOD:SEED ...]

DIR is CIFAR-10 as a picture folder. `PLAN` lists the runs. Each finished run adds a row to RESULTS, and the ranks of
its architectures over time to RANKS; both files are committed. Runs with a row are not repeated, so that the study can
continue anywhere. WORK has the run directories: a run that was interrupted continues there. `--row` chooses runs, for
several processes at a time. `--summary` prints the means and runs nothing.

The methods are those of the configurations beside this file. The policies share the short trainings of `measured` (its
first fidelity, 3 epochs on 10,000 pictures), as many as fit into a core-hour, and keep the best measured architecture.
Their seconds are CPU seconds, those of the methods the wall-clock time of their epochs.
"""

from __future__ import annotations

import csv
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from istanas.effects import Architecture, supports_of
from istanas.space import NasBench201Space
from pipeline.config.yaml_files import read_file
from tests.benchmarks.effects_policies import POLICIES
from tests.benchmarks.judges import measure
from tests.benchmarks.scored_runs import Found, Point, Row, check_paths, execute, parser, search, summary

PATHS = {
    "table": "table of true accuracies",
    "root": "CIFAR-10 as a picture folder",
    "work": "folder of the run directories",
}
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
SEEDS = {"measured": 6, "two_stage": 4, "random_nas": 2, "darts": 2, "pc_darts": 2, "gdas": 2}
SEEDS |= dict.fromkeys(POLICY_ROWS, 2)
# All methods with their first seed come first.
PLAN = [Row(method, 100 + i) for i in range(max(SEEDS.values())) for method, n in SEEDS.items() if i < n]


def run(row: Row, root: Path, work: Path) -> Found:
    """Run a row."""
    if row.method in POLICY_ROWS:
        return search_by_policy(row, root, work)
    config = read_file(COMMON) | read_file(HERE / f"nas_bench_201_{row.method}.yaml")
    config["data"] |= {"root": str(root)}
    return search(row, config, work)


def search_by_policy(row: Row, root: Path, work: Path) -> Found:
    """Return the best architecture after each short training; those that `work` has are not repeated."""
    space, file = NasBench201Space(), work / f"{row.name}.csv"
    done: list[dict[str, Any]] = []
    if file.exists():
        with file.open(newline="") as stream:
            done = [
                each for each in csv.DictReader(stream) if each["seconds"]
            ]  # without a line that a kill has cut
    replayed, was_interrupted = iter(list(done)), bool(done)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ("kept", "loss", "seconds"), lineterminator="\n")
        writer.writeheader()
        writer.writerows(done)
        stream.flush()

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
    seconds = accumulate(float(each["seconds"]) for each in done)
    genotypes = (space.genotype(supports_of(space, kept)) for kept in best)
    points = [Point(*pair) for pair in zip(genotypes, seconds, strict=True)]
    return Found(points, was_interrupted=was_interrupted)


def main() -> None:
    """Execute the runs that have no row."""
    made = parser(str(__doc__), **PATHS)
    made.add_argument("--row", nargs="+", metavar="METHOD:SEED", help="only these runs, in this order")
    options = made.parse_args()
    if options.summary:
        print(summary(RESULTS))
        return
    check_paths(made, options, *PATHS)
    named = {f"{row.method}:{row.seed}": row for row in PLAN}
    if unknown := [name for name in options.row or () if name not in named]:
        made.error(f"no run {unknown[0]!r}; the plan has {', '.join(named)}")
    work, root = options.work.resolve(), options.root.resolve()
    for row in [named[name] for name in options.row or named]:
        execute(row, partial(run, row, root, work), options.table, RESULTS, RANKS)


if __name__ == "__main__":
    main()
