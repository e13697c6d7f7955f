"""The retraining job: trains the network of a genotype from scratch and measures it on the test split."""

from __future__ import annotations

from typing import Any, cast

from istanas.data import ImageDataset
from istanas.nets.operations import check_plugin_operations
from istanas.space import Genotype
from pipeline.cluster.launch import prepare_workers, run_job
from pipeline.config.load import run_hash
from pipeline.config.schema import Config
from pipeline.jobs.context import JobContext
from pipeline.jobs.evaluation import evaluate_trained
from pipeline.jobs.lifecycle import JobSteps, Outcome, check_data, execute, own_warnings, settled_spec
from pipeline.jobs.observer import RunObserver
from pipeline.jobs.opening import JobSpec
from pipeline.jobs.results import RetrainResult, accuracies
from pipeline.jobs.search import describe_figures
from pipeline.report import mlflow_note
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.genotype_file import write_genotype
from pipeline.runs.layout import (
    CHECKPOINTS,
    CONFIG_FILE,
    GENOTYPE_FILE,
    NETWORK_FILE,
    WEIGHTS_FILE,
    cell_figures,
)
from pipeline.runs.network_files import save_network
from pipeline.runs.tags import Tag
from pipeline.training.epoch_record import EpochRecord, FolderStore
from pipeline.training.loop import trained_network
from pipeline.training.pictures import datasets_used

SECTIONS = ("data", "retrain")


def run_retrain(context: JobContext, genotype: Genotype, *, origin: str | None = None) -> RetrainResult:
    """Train the network of a genotype from scratch.

    Args:
        context: The context of the job; its parent is the run directory of the search that found the genotype, or None.
        genotype: The cells.
        origin: Source of a genotype that no run has found: a file, a random or a published cell.

    Returns:
        See `RetrainResult`.
    """
    if context.parent is not None:
        origin = _run_name(context.parent)
    tags = {Tag.GENOTYPE: genotype.digest(), **({} if origin is None else {Tag.ORIGIN: origin})}

    def describe(config: Config) -> JobSpec:
        return JobSpec(
            kind="retrain",
            name=f"{context.name}-retrain",
            digits=run_hash(config, "retrain", genotype=genotype.to_json()),
            config=config,
            sections=SECTIONS,
            epochs=config.retrain.epochs,
            parent=context.parent,
            tags={**context.tags, **tags},
        )

    spec = settled_spec(context.config, context.console, describe)
    config = spec.config

    def prepare(dataset: ImageDataset) -> ImageDataset:
        check_plugin_operations(sorted(set(genotype.operations())), config.retrain.init_channels)
        check_data(config, dataset, ("retrain",))
        prepare_workers(config, spec.path, context.runtime, context.say)
        return dataset

    def train(run: RunDir, observer: RunObserver, dataset: ImageDataset) -> Outcome:
        write_genotype(run.path, genotype)
        store = FolderStore(run.path / CHECKPOINTS, run.push)
        progress = run_job("retrain", config, dataset, store, observer, context.runtime, genotype)
        net = trained_network(config, genotype, dataset, store.folder)
        save_network(run.path, net, genotype, config.retrain, dataset, config.space.build())
        m = progress.newest.metrics
        macs = int(m["target/macs"])
        evaluated: tuple[str, ...] = ()
        if config.retrain.test_every > 0:
            label = f"the test split of {run.read().data_label}"
            evaluated = evaluate_trained(run.path, net, dataset, label, macs, context.say)
        result: dict[str, Any] = {
            "digest": genotype.digest(),
            "genotype": genotype.to_dict(),
            **accuracies(m, "test", "valid"),
            "params": int(m["target/params"]),
            "macs": macs,
            "seconds": progress.seconds,
            **({"rollbacks": progress.rollbacks} if progress.rollbacks else {}),
        }
        return Outcome(
            result=result,
            artifacts=(
                CONFIG_FILE,
                GENOTYPE_FILE,
                *cell_figures(genotype.kinds),
                NETWORK_FILE,
                WEIGHTS_FILE,
                *evaluated,
            ),
            tags={},
            description=mlflow_note.of_retraining(
                run.read().data_label, progress.epochs, result, genotype, origin
            ),
        )

    steps = JobSteps(
        datasets=lambda dataset: datasets_used(config, dataset, "retrain"),
        prepare=prepare,
        warn=own_warnings(spec),
        run=train,
        describe=describe_epoch,
    )
    return cast(RetrainResult, execute(context.with_config(config), spec, steps))


def _run_name(run_dir: str) -> str:
    """Return the name of a run's directory; for a trial, it starts with the name of the sweep."""
    path = bucket.local(run_dir)
    return f"{path.parent.name}/{path.name}" if RunDir(path.parent).exists() else path.name


def describe_epoch(record: EpochRecord) -> str:
    """Return one line for the user about an epoch."""
    return f"{describe_figures(record)}, {record.seconds:.1f} s"
