"""The retraining job: a genotype's network trained from scratch and measured on the test split."""

from __future__ import annotations

from typing import Any, cast

from rich.console import Console

from istanas.data import ImageDataset
from istanas.space import Genotype
from pipeline.cluster.launch import prepare_workers, run_job
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.load import run_hash
from pipeline.config.schema import Config
from pipeline.jobs.lifecycle import Outcome, check_data, console_line, execute, settled_spec
from pipeline.jobs.observer import RunObserver
from pipeline.jobs.opening import JobSpec
from pipeline.jobs.results import RetrainResult, accuracies
from pipeline.jobs.search import describe_figures
from pipeline.report import mlflow_note
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.genotype_file import write_genotype
from pipeline.runs.layout import (
    CELL_FIGURES,
    CHECKPOINTS,
    CONFIG_FILE,
    GENOTYPE_FILE,
    NETWORK_FILE,
    WEIGHTS_FILE,
)
from pipeline.runs.network_files import save_network
from pipeline.runs.outcome import ORIGIN_TAG
from pipeline.training.epoch_record import EpochRecord, FolderStore
from pipeline.training.loop import trained_network
from pipeline.training.pictures import datasets_used

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
        origin: where the genotype comes from if no run has found it: a file, a random or a published cell.
        fresh: start over.
        console: for people.
        runtime: Ray, if there are workers.
        wait: see `execute`.

    Returns:
        See `RetrainResult`.
    """
    origin = _run_name(parent) if parent is not None else origin

    def describe(config: Config) -> JobSpec:
        return JobSpec(
            kind="retrain",
            name=f"{name}-retrain",
            digits=run_hash(config, "retrain", genotype=genotype.to_json()),
            config=config,
            sections=SECTIONS,
            epochs=config.retrain.epochs,
            parent=parent,
            tags={"istanas.genotype": genotype.digest(), **({} if origin is None else {ORIGIN_TAG: origin})},
        )

    spec = settled_spec(config, console, describe)
    config = spec.config

    def prepare(dataset: ImageDataset) -> ImageDataset:
        check_data(config, dataset, ("retrain",))
        prepare_workers(config, spec.path, runtime, console_line(console))
        return dataset

    def body(run: RunDir, observer: RunObserver, dataset: ImageDataset) -> Outcome:
        write_genotype(run.path, genotype)
        store = FolderStore(run.path / CHECKPOINTS, run.push)
        progress = run_job("retrain", config, dataset, store, observer, runtime, genotype)
        net = trained_network(config, genotype, dataset, store.folder)
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
            description=mlflow_note.of_retraining(
                run.read().data_label, progress.epochs, result, genotype, origin
            ),
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


def _run_name(run_dir: str) -> str:
    """The name of a run's directory; of a sweep's trial after the name of the sweep's."""
    path = bucket.local(run_dir)
    return f"{path.parent.name}/{path.name}" if RunDir(path.parent).exists() else path.name


def describe_epoch(record: EpochRecord) -> str:
    """One line for people about an epoch."""
    return f"{describe_figures(record)}, {record.seconds:.1f} s"
