"""The search job: a genotype, its figures and its trajectory, from a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
from rich.console import Console

from istanas.data import ImageDataset
from istanas.draw import save_genotype_figures
from istanas.space import CELLS, Genotype
from istanas.sparse import recover
from pipeline.cluster import Runtime
from pipeline.config import Config, run_hash
from pipeline.jobs.job import (
    CELL_FIGURES,
    CHECKPOINTS,
    CONFIG_FILE,
    GENOTYPE_FILE,
    TRAJECTORY_FILE,
    JobSpec,
    Outcome,
    RunObserver,
    console_line,
    execute,
    prepare_data,
)
from pipeline.jobs.results import SearchResult
from pipeline.launch import prepare_workers, run_job
from pipeline.rundir import RunDir, atomic_write
from pipeline.worker import Record, search_split

SECTIONS = ("data", "space", "search")


def run_search(
    config: Config,
    *,
    name: str,
    fresh: bool,
    console: Console,
    runtime: Runtime,
    jobs: tuple[str, ...] = ("search",),
) -> SearchResult:
    """Search an architecture.

    Args:
        config: the whole configuration.
        name: of the run.
        fresh: start over.
        console: for people.
        runtime: Ray, if there are workers.
        jobs: whose settings to check against the data before any work; `run` adds "retrain".

    Returns:
        See `SearchResult`.
    """
    spec = JobSpec(
        kind="search",
        name=f"{name}-search",
        digits=run_hash(config, "search"),
        config=config,
        sections=SECTIONS,
        epochs=config.search.epochs,
    )

    def prepare() -> ImageDataset:
        check_solver(config.space.solver)
        dataset = prepare_data(config, jobs, console)
        search_split(config, dataset)
        prepare_workers(config, spec.path, runtime, console_line(console))
        return dataset

    def body(run: RunDir, observer: RunObserver, dataset: ImageDataset) -> Outcome:
        history = run_job("search", config, dataset, run.path / CHECKPOINTS, observer, runtime)
        return _finish(run, history, dataset)

    result = execute(spec, prepare, body, describe=describe_epoch, fresh=fresh, console=console)
    return cast(SearchResult, result)


def describe_epoch(history: list[Record]) -> str:
    """One line for people about the last epoch."""
    record = history[-1]
    m = record["metrics"]
    changes = int(m["recovery/support_changes"])
    return (
        f"epoch {record['epoch']}: loss {m['train/loss']:.3f}, top-1 {100 * m['train/top1']:.1f} % "
        f"(alpha half {100 * m['valid/top1']:.1f} %), {changes} of {len(record['nodes'])} nodes changed, "
        f"{record['seconds']:.1f} s"
    )


def check_solver(solver: str) -> None:
    """Recover one small problem: a solver that cannot run here (no licence) says so before any work.

    Raises:
        SolverError: with the remedy.
    """
    recover(np.eye(2), np.ones(2), l1_weight=0.5, solver=solver)


def _finish(run: RunDir, history: list[Record], dataset: ImageDataset) -> Outcome:
    last = history[-1]
    genotype = Genotype.from_json(last["genotype"])
    weights = {cell: [n["edge_weights"] for n in last["nodes"] if n["cell"] == cell] for cell in CELLS}
    write_genotype(run.path, genotype, weights)
    m = last["metrics"]
    result = {
        "digest": genotype.digest(),
        "genotype": genotype.to_dict(),
        "valid_top1": m["valid/top1"],
        "params": int(m["target/params"]),
        "macs": int(m["target/macs"]),
        "seconds": sum(record["seconds"] for record in history),
    }
    description = (
        f"Two-stage search on {dataset.name}, {len(history)} epochs.\n\n"
        f"- top-1 on the alpha half: {100 * m['valid/top1']:.2f} %\n"
        f"- target network: {result['params']:,} parameters, {result['macs']:,} multiply-adds\n"
        f"- digest `{genotype.digest()[:12]}`\n\n```\n{genotype}\n```\n"
    )
    return Outcome(
        result=result,
        artifacts=(CONFIG_FILE, GENOTYPE_FILE, *CELL_FIGURES, TRAJECTORY_FILE),
        tags={"istanas.genotype": genotype.digest()},
        description=description,
    )


def write_genotype(
    folder: Path, genotype: Genotype, weights: dict[str, list[list[float]]] | None = None
) -> None:
    """genotype.json and the four cell figures."""
    atomic_write(folder / GENOTYPE_FILE, genotype.to_json() + "\n")
    weights = weights or {}
    save_genotype_figures(
        genotype, folder / "cells", weights_normal=weights.get("normal"), weights_reduce=weights.get("reduce")
    )
