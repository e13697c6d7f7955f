"""The retraining job: a genotype's network trained from scratch and measured on the test split."""

from __future__ import annotations

from typing import Any, cast

from rich.console import Console

from istanas.data import ImageDataset
from istanas.space import Genotype
from pipeline import summary
from pipeline.cluster import Runtime
from pipeline.config import run_hash
from pipeline.jobs.job import (
    CELL_FIGURES,
    CHECKPOINTS,
    CONFIG_FILE,
    GENOTYPE_FILE,
    JobSpec,
    Outcome,
    RunObserver,
    check_data,
    console_line,
    execute,
    settled,
)
from pipeline.jobs.results import RetrainResult, accuracies
from pipeline.jobs.search import describe_figures, write_genotype
from pipeline.launch import prepare_workers, run_job
from pipeline.models import NETWORK_FILE, WEIGHTS_FILE, save_network
from pipeline.outcome import ORIGIN_TAG
from pipeline.pictures import datasets_used
from pipeline.record import EpochRecord
from pipeline.rundir import RunDir
from pipeline.schema import Config
from pipeline.worker import trained_network

SECTIONS = ("data", "retrain")


def run_retrain(
    config: Config,
    genotype: Genotype,
    *,
    name: str,
    parent: str | None,
    origin: str | None = None,
    fresh: bool,
    console: Console,
    runtime: Runtime,
    wait: float = 0,
) -> RetrainResult:
    """Train the network of a genotype from scratch.

    Args:
        config: the whole configuration.
        genotype: the cells.
        name: of the run.
        parent: run directory of the search that found it, or None.
        origin: how the user named a random or published cell, or None.
        fresh: start over.
        console: for people.
        runtime: Ray, if there are workers.
        wait: see `execute`.

    Returns:
        See `RetrainResult`.
    """
    config = settled(config, console)
    spec = JobSpec(
        kind="retrain",
        name=f"{name}-retrain",
        digits=run_hash(config, "retrain", genotype=genotype.to_json()),
        config=config,
        sections=SECTIONS,
        epochs=config.retrain.epochs,
        parent=parent,
        tags={"istanas.genotype": genotype.digest(), **({} if origin is None else {ORIGIN_TAG: origin})},
    )

    def prepare(dataset: ImageDataset) -> ImageDataset:
        check_data(config, dataset, ("retrain",))
        prepare_workers(config, spec.path, runtime, console_line(console))
        return dataset

    def body(run: RunDir, observer: RunObserver, dataset: ImageDataset) -> Outcome:
        write_genotype(run.path, genotype)
        folder = run.path / CHECKPOINTS
        progress = run_job("retrain", config, dataset, folder, observer, runtime, genotype)
        net = trained_network(config, genotype, dataset, folder)
        save_network(run.path, net, genotype, config.retrain, dataset)
        m = progress.newest.metrics
        result: dict[str, Any] = {
            "digest": genotype.digest(),
            "genotype": genotype.to_dict(),
            **accuracies(m, "test", "valid"),
            "params": int(m["target/params"]),
            "macs": int(m["target/macs"]),
            "seconds": progress.seconds,
            **({"rollbacks": progress.rollbacks} if progress.rollbacks else {}),
        }
        return Outcome(
            result=result,
            artifacts=(CONFIG_FILE, GENOTYPE_FILE, *CELL_FIGURES, NETWORK_FILE, WEIGHTS_FILE),
            tags={},
            description=summary.of_retraining(dataset.name, progress.epochs, result, genotype),
        )

    result = execute(
        spec,
        prepare,
        body,
        describe=describe_epoch,
        fresh=fresh,
        console=console,
        datasets=lambda dataset: datasets_used(config, dataset, "retrain"),
        wait=wait,
    )
    return cast(RetrainResult, result)


def describe_epoch(record: EpochRecord) -> str:
    """One line for people about an epoch."""
    return f"{describe_figures(record)}, {record.seconds:.1f} s"
