"""The study in the DARTS space: cells of searches against random cells, all retrained alike, on CIFAR-10 pictures.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.study.darts_space --root DIR --work WORK [--part PART ...]

DIR is CIFAR-10 as a picture folder; WORK receives copies of its first 1,000 training pictures of each class, all test
pictures, and the run directories. The parts are, in this order:

- `chance`: each of 12 random cells is retrained with two seeds, to measure the share of the variance between cells;
- `searches`: `measured`, `two_stage` and `darts` with three seeds each;
- `retrainings`: what the searches found, each with two seeds.

Each finished search adds its genotype to SEARCHES, and each retraining adds its accuracy to RETRAININGS. Both files
are committed, and what has a line is not repeated. `--summary` prints what is known and runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from istanas.statistics import compare, describe_comparison, kendall
from pipeline.config.yaml_files import read_file
from tests.benchmarks.methods_cifar10 import copy_pictures
from tests.benchmarks.scored_runs import Row, append, check_paths, cpu_seconds, finished, parser, run_command

PATHS = {"root": "CIFAR-10 as a picture folder", "work": "folder of the pictures and run directories"}
HERE = Path(__file__).resolve().parent
COMMON = HERE / "darts_measured.yaml"
SEARCHES = HERE.parent / "results" / "study_darts_searches.csv"
RETRAININGS = HERE.parent / "results" / "study_darts_retrainings.csv"
PARTS = ("chance", "searches", "retrainings")
METHODS = ("measured", "two_stage", "darts")
SEARCH_SEEDS, RETRAIN_SEEDS, RANDOM_CELLS = (100, 101, 102), (0, 1), 12
PICTURES_PER_CLASS = 1000


def retrain(cell: str, genotype: str, seed: int, root: Path, work: Path) -> None:
    """Retrain a cell, unless it has a line.

    Args:
        cell: Its name in the tables.
        genotype: The value of `--genotype`.
        seed: Seed of the retraining.
        root, work: The folders of pictures and runs.
    """
    row = Row(cell, seed)
    if row in finished(RETRAININGS):
        return
    used = cpu_seconds()
    result = run_command("retrain", row, configured("measured", root), work, "--genotype", genotype)
    line = {"method": cell, "seed": seed, "test_top1": result["test_top1"], "digest": result["digest"]}
    line |= {"params": result["params"], "macs": result["macs"]}
    append(RETRAININGS, [line | {"cpu_seconds": round(cpu_seconds() - used)}])


def search(row: Row, root: Path, work: Path) -> None:
    """Search, unless the search has a line."""
    if row in finished(SEARCHES):
        return
    used = cpu_seconds()
    result = run_command("search", row, configured(row.method, root), work)
    line = {"method": row.method, "seed": row.seed, "valid_top1": result.get("valid_top1")}
    line |= {"cpu_seconds": round(cpu_seconds() - used), "genotype": json.dumps(result["genotype"])}
    append(SEARCHES, [line])


def configured(method: str, root: Path) -> dict[str, Any]:
    """Return the configuration of a method."""
    config = read_file(COMMON) | read_file(HERE / f"darts_{method}.yaml")
    return config | {"data": config["data"] | {"root": str(root)}}


def found_cells(work: Path) -> Iterator[tuple[str, str]]:
    """Write the genotypes of all searches that have a line, and yield their names and files."""
    if SEARCHES.exists():
        for line in pd.read_csv(SEARCHES).to_dict("records"):
            name = f"{line['method']}-{line['seed']}"
            file = work / f"{name}.genotype.json"
            file.write_text(line["genotype"])
            yield name, str(file)


def execute(part: str, root: Path, work: Path) -> None:
    """Run what has no line."""
    if part == "chance":
        for seed in RETRAIN_SEEDS:
            for number in range(RANDOM_CELLS):
                retrain(f"random-{number}", f"random:{number}", seed, root, work)
    elif part == "searches":
        for seed in SEARCH_SEEDS:
            for method in METHODS:
                search(Row(method, seed), root, work)
    else:
        for seed in RETRAIN_SEEDS:
            for name, file in found_cells(work):
                retrain(name, file, seed, root, work)


def share_of_the_cell(accuracies: pd.DataFrame) -> float:
    """Return the share of the variance of a single retraining that is between cells (intraclass correlation ICC(1)).

    Args:
        accuracies: One row for each cell, one column for each seed.

    Source:
        Shrout and Fleiss, Intraclass correlations: uses in assessing rater reliability, Psychological Bulletin 1979.
    """
    values = accuracies.to_numpy()
    k = values.shape[1]
    between = k * values.mean(axis=1).var(ddof=1)
    within = values.var(axis=1, ddof=1).mean()
    return float((between - within) / (between + (k - 1) * within))


def summary() -> None:
    """Print the variance of the random cells, and each method against them."""
    if not RETRAININGS.exists():
        print(f"no retraining has finished: {RETRAININGS} does not exist")
        return
    table = pd.read_csv(RETRAININGS).pivot_table(index="method", columns="seed", values="test_top1")
    group = table.index.str.rpartition("-").get_level_values(0)
    random = table[group == "random"].dropna()
    print(f"random cells: {len(random)}, mean {100 * np.mean(random.to_numpy()):.2f} %")
    if len(random) > 3:
        print(f"share of the cell in the variance of a retraining: {share_of_the_cell(random):.2f}")
        print(f"Kendall's tau between the seeds: {kendall(*random.to_numpy().T)}")
    means: Mapping[str, list[float]] = {
        name: (100 * own.mean(axis=1)).tolist() for name, own in table.groupby(group) if len(own) > 1
    }
    if pairs := [(name, "random") for name in means if name != "random" and "random" in means]:
        for each in compare(means, pairs, paired=False):
            print(describe_comparison(each, unit="points of test accuracy"))


def main() -> None:
    """Run the parts."""
    made = parser(str(__doc__), **PATHS)
    made.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="only these parts")
    options = made.parse_args()
    if options.summary:
        summary()
        return
    check_paths(made, options, *PATHS)
    work = options.work.resolve()
    copy_pictures(options.root.resolve(), work / "pictures", PICTURES_PER_CLASS)
    for part in options.part:
        execute(part, work / "pictures", work)


if __name__ == "__main__":
    main()
