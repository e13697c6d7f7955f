"""Runs whose architectures a table of true accuracies scores, and a table of results that grows by a row for each run.

The scripts `study` and `exploration` share it. A run with a row in the results is not repeated, so that a study can
continue on another machine, where the run directories are not.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from istanas.space import Genotype, NasBench201Space
from istanas.statistics import mean_interval
from pipeline.config.yaml_files import dump
from pipeline.jobs.truth import check_table, read_truth
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import CHECKPOINTS
from pipeline.training.epoch_record import load_progress, read_records

ARCHITECTURES = 15_625


@dataclass(frozen=True)
class Row:
    """A run: what is run (a method, a variant or a cell), and its seed."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.method.replace(', ', '-').replace(' ', '_')}-{self.seed}"


@dataclass(frozen=True)
class Point:
    """The best architecture by what a run knew after some seconds."""

    genotype: Genotype
    seconds: float


@dataclass(frozen=True)
class Found:
    """What a run has found over time, and the accuracy that it measured itself.

    Args:
        points: The best architecture after each epoch or measurement.
        valid_top1: The accuracy; `None` if it measures none.
        was_interrupted: Whether an earlier process did a part, so that the CPU time is not known.
    """

    points: Sequence[Point]
    valid_top1: float | None = None
    was_interrupted: bool = False


def run_command(
    command: str, row: Row, config: Mapping[str, Any], work: Path, *options: str
) -> dict[str, Any]:
    """Run a command with a configuration, and return what it prints with `--json`. Its run directory is in `work`."""
    tree = {**config, "seed": row.seed, "tracking": {"enabled": False}}
    tree["runtime"] = {**config["runtime"], "runs_dir": str(work / "runs")}
    file = work / f"{row.name}.yaml"
    file.write_text(dump(tree))
    words = [sys.executable, "-m", "pipeline.cli", command, "--config", str(file), "--json", *options]
    with file.with_suffix(".log").open("a") as log:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=log, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{row.name}: exit code {done.returncode}, see {log.name}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def search(row: Row, config: Mapping[str, Any], work: Path, *options: str) -> Found:
    """Run `istanas search`, and return its architectures after each epoch."""
    was_interrupted = (work / f"{row.name}.log").exists()
    result = run_command("search", row, config, work, *options)
    folder, seconds = RunDir(Path(result["run_dir"])).path / CHECKPOINTS, 0.0
    points = []
    for record in read_records(folder, load_progress(folder)):
        seconds += record.seconds
        points.append(Point(Genotype.from_json(record.found().genotype), seconds))
    assert points[-1].genotype == Genotype.from_dict(result["genotype"])
    return Found(points, result.get("valid_top1"), was_interrupted)


def execute(row: Row, run: Callable[[], Found], table: Path, results: Path, ranks: Path) -> None:
    """Execute a run without a row in `results`, score it, and add it to both tables.

    Args:
        row: The run.
        run: Executes it.
        table: The table of true accuracies, which is read when the run has finished.
        results: Table of the results.
        ranks: Table of the ranks over time: lines for the first step, each change and the last step.
    """
    if row in finished(results):
        return
    used = cpu_seconds()
    found = run()
    used = cpu_seconds() - used
    space = NasBench201Space()
    truth = read_truth(table, space, check_table(table, space))
    scores = [truth.score(point.genotype) for point in found.points]
    named = {"method": row.method, "seed": row.seed}
    result = {
        "architecture": space.text(found.points[-1].genotype),
        "rank": scores[-1].rank,
        "true_accuracy": scores[-1].accuracy,
        "valid_top1": found.valid_top1,
        "seconds": round(found.points[-1].seconds),
        "cpu_seconds": None if found.was_interrupted else round(used),
    }
    changes = [
        named | {"step": step, "seconds": round(point.seconds), "rank": score.rank}
        for step, (point, score) in enumerate(zip(found.points, scores, strict=True), 1)
        if step in (1, len(scores)) or score.rank != scores[step - 2].rank
    ]
    if row not in finished(ranks):  # a process may have been killed between the two tables
        append(ranks, changes)
    append(results, [named | result])


def parser(description: str, **paths: str) -> argparse.ArgumentParser:
    """Return the arguments of a study: its paths, each with its help, and --summary."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, text in paths.items():
        made.add_argument(f"--{name}", type=Path, help=text)
    made.add_argument("--summary", action="store_true", help="print what is known, and run nothing")
    return made


def check_paths(made: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    """Exit with a usage error if a path is missing; make the last one, the folder of the runs."""
    if missing := [name for name in names if getattr(options, name) is None]:
        made.error(f"--{missing[0]} is required")
    getattr(options, names[-1]).mkdir(parents=True, exist_ok=True)


def cpu_seconds() -> float:
    """Return the CPU time of this process and of the processes that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def append(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a table while no other process does."""
    with file.open("a", newline="") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        if stream.seek(0, 2) == 0:
            writer.writeheader()
        writer.writerows(rows)


def finished(results: Path) -> set[Row]:
    """Return the runs that have a row in the results."""
    if not results.exists():
        return set()
    with results.open(newline="") as stream:
        return {Row(each["method"], int(each["seed"])) for each in csv.DictReader(stream)}


def summary(results: Path) -> str:
    """Return each method's ranks, their mean with its 95 % interval (of two runs or more), and its mean seconds."""
    if not results.exists():
        return f"no run has finished: {results} does not exist"
    rows = []
    for method, own in pd.read_csv(results).groupby("method"):
        row = {"method": method, "ranks": " ".join(map(str, own["rank"])), "mean": own["rank"].mean()}
        if len(own) > 1:
            interval = mean_interval(own["rank"].astype(float).tolist(), low=1, high=ARCHITECTURES)
            row |= {"low": interval.low, "high": interval.high}
        rows.append(row | {"seconds": own["seconds"].mean(), "cpu_seconds": own["cpu_seconds"].mean()})
    return pd.DataFrame(rows).sort_values("mean").round(0).to_string(index=False)
