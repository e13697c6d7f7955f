"""The search job: searches for an architecture and writes its genotype, figures and trajectory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import torch

from istanas.data import ImageDataset
from istanas.distributed import Ranks
from istanas.draw import save_freezing_figure
from istanas.methods import validates
from istanas.nets.operations import check_plugin_operations
from istanas.search import CLOSING_EPOCHS, Freezing
from istanas.search.limits import Limits
from istanas.space import Genotype
from istanas.sparse import recover
from istanas.training import Compute
from pipeline.base.text import count
from pipeline.cluster.launch import prepare_workers, run_job
from pipeline.config.keys import value_at
from pipeline.config.load import run_hash
from pipeline.config.schema import Config, considers_costs
from pipeline.jobs.context import JobContext
from pipeline.jobs.effects import write_effects
from pipeline.jobs.evaluation import evaluate_trained
from pipeline.jobs.lifecycle import (
    JobSteps,
    Outcome,
    check_data,
    execute,
    own_warnings,
    settled_spec,
    write_page,
)
from pipeline.jobs.observer import RunObserver
from pipeline.jobs.opening import JobSpec
from pipeline.jobs.results import OneStageResult, SearchResult, accuracies
from pipeline.report import mlflow_note
from pipeline.report.trajectory_page import write_trajectory_page
from pipeline.runs.directory import RunDir
from pipeline.runs.genotype_file import write_genotype
from pipeline.runs.layout import (
    CHECKPOINTS,
    CODES_FILE,
    CONFIG_FILE,
    EFFECTS_FILE,
    FREEZING_FIGURES,
    GENOTYPE_FILE,
    MEASUREMENTS_FILE,
    NETWORK_FILE,
    TRAJECTORY_FILE,
    TRAJECTORY_PAGE,
    WEIGHTS_FILE,
    cell_figures,
)
from pipeline.runs.network_files import save_network
from pipeline.runs.tags import Tag
from pipeline.training.build import build_search
from pipeline.training.epoch_record import EpochRecord, FolderStore, Progress, SearchRecord, read_records
from pipeline.training.loop import searched_network
from pipeline.training.pictures import datasets_used

SECTIONS = ("data", "space", "search")
TRAJECTORY = (TRAJECTORY_FILE, CODES_FILE)


def search_spec(
    config: Config, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None
) -> JobSpec:
    """Return the search that a configuration describes.

    Args:
        config: The whole configuration.
        name: Name of the run.
        parent: Run directory of the sweep that the search belongs to, or None.
        tags: MLflow tags.
    """
    return JobSpec(
        kind="search",
        name=f"{name}-search",
        digits=run_hash(config, "search"),
        config=config,
        sections=SECTIONS,
        epochs=config.search.max_epochs,
        unit="epoch" if config.search.trials_at_once == 1 else "measurement",
        parent=parent,
        tags=tags or {},
    )


def run_search(context: JobContext, *, jobs: tuple[str, ...] = ("search",)) -> SearchResult | OneStageResult:
    """Search for an architecture.

    Args:
        context: The context of the job; the method in its configuration selects the search.
        jobs: The jobs whose settings are checked against the pictures before any work; `run` adds "retrain".

    Returns:
        See `SearchResult` and `OneStageResult`.
    """
    spec = settled_spec(
        context.config,
        context.console,
        lambda config: search_spec(config, context.name, parent=context.parent, tags=context.tags),
    )
    config = spec.config

    def prepare(dataset: ImageDataset) -> ImageDataset:
        check_solver(config.space.solver)
        for job in jobs:
            check_plugin_operations(config.space.operations(), getattr(config, job).init_channels)
        check_data(config, dataset, jobs)
        if config.trains_target or considers_costs(config):
            _limits(config, dataset)
        if config.search.trials_at_once > 1:
            from pipeline.jobs.measurements import prepare_trials  # imports Ray

            prepare_trials(config, spec.path, context.runtime, context.say)
        else:
            prepare_workers(config, spec.path, context.runtime, context.say)
        return dataset

    def train(run: RunDir, observer: RunObserver, dataset: ImageDataset) -> Outcome:
        store = FolderStore(run.path / CHECKPOINTS, run.push)
        if config.search.trials_at_once > 1:
            from pipeline.jobs.measurements import run_measurements  # imports Ray

            progress = run_measurements(config, dataset, run, store, observer)
        else:
            progress = run_job("search", config, dataset, store, observer, context.runtime)
        if config.trains_target:
            return _finish_trained(run, progress, dataset, config, observer.note)
        return _finish_searched(run, progress, dataset, config, observer.note)

    steps = JobSteps(
        datasets=lambda dataset: datasets_used(config, dataset, "search"),
        prepare=prepare,
        warn=own_warnings(spec),
        run=train,
        describe=(
            describe_trained_epoch
            if config.trains_target
            else lambda record: describe_epoch(record, unit=spec.unit)
        ),
    )
    result = execute(context.with_config(config), spec, steps)
    return cast(OneStageResult, result) if config.trains_target else cast(SearchResult, result)


def describe_epoch(record: EpochRecord, *, unit: str = "epoch") -> str:
    """Return one line for the user about an epoch of a search that does not train the network that it finds.

    Args:
        record: The record of the epoch.
        unit: What the epochs of the search are called.
    """
    m, found = record.metrics, record.found()
    if "train/loss" not in m:
        what = "the training has diverged" if "measured/count" in m else "nothing is trained"
        return f"{unit} {record.epoch}: {what}, {record.seconds:.1f} s"
    changes = int(m["recovery/support_changes"])
    text = f"{unit} {record.epoch}: loss {m['train/loss']:.3f}, top-1 {_describe_tops(m, 'train')}"
    if "valid/top1" in m:
        text += f" (validation {_describe_tops(m, 'valid')})"
    text += f", {changes} of {len(found.nodes)} nodes changed{_describe_weight(m)}, {record.seconds:.1f} s"
    return text + _describe_fallbacks(found)


def describe_trained_epoch(record: EpochRecord) -> str:
    """Return lines for the user about an epoch of a search that also trains the network that it finds."""
    m, found = record.metrics, record.found()
    frozen = found.frozen or ()
    text = describe_figures(record)
    if found.searching:
        text += (
            f", distance {m['recovery/distance']:.2g}, {count(int(m['recovery/support_changes']), 'node')} changed, "
            f"{len(frozen)} of {len(found.nodes)} frozen{_describe_weight(m)}"
        )
    text += f", {record.seconds:.1f} s{_describe_fallbacks(found)}"
    if found.rejection is not None:
        text += f"\nrejected the new architecture, {found.rejection}: the previous one is kept"
    if found.searching and len(frozen) == len(found.nodes):
        reasons = Counter(freezing.reason for freezing in frozen)
        how = ", ".join(f"{n} by {reason}" for reason, n in sorted(reasons.items()))
        text += f"\narchitecture fixed after {count(record.epoch, 'epoch')} ({how})"
    return text


def describe_figures(record: EpochRecord) -> str:
    """Return the number, loss and accuracies of an epoch of a one-stage search or a retraining, for the user."""
    m = record.metrics
    text = f"epoch {record.epoch}: loss {m['train/loss']:.3f}, top-1 {_describe_tops(m, 'train')}"
    for split, word in (("valid", "validation"), ("test", "test")):
        if f"{split}/top1" in m:
            text += f", {word} {_describe_tops(m, split)}"
    return text


def _describe_weight(metrics: Mapping[str, float]) -> str:
    """Return the weight of the costs, if the search considers costs."""
    weight = metrics.get("arch/cost_weight")
    return "" if weight is None else f", cost weight {weight:.3g}"


def _describe_tops(metrics: Mapping[str, float], split: str) -> str:
    """Return the top-1 of a split, and its top-5 if it was measured."""
    text = f"{100 * metrics[f'{split}/top1']:.1f} %"
    top5 = metrics.get(f"{split}/top5")
    return text if top5 is None else f"{text}, top-5 {100 * top5:.1f} %"


def _describe_fallbacks(found: SearchRecord) -> str:
    """Return a line about the nodes that were recovered by another solver than the configured one, or ""."""
    by_solver: dict[str, list[str]] = {}
    for node in (*found.start_nodes, *found.nodes):
        name = f"{node.cell} node {node.node}"
        if node.fallback and name not in by_solver.setdefault(node.solver, []):
            by_solver[node.solver].append(name)
    lines = [f"{', '.join(names)} by {solver}" for solver, names in by_solver.items() if names]
    return f"\nspace.solver failed, recovered {'; '.join(lines)}" if lines else ""


def check_solver(solver: str) -> None:
    """Solve one small problem, to reject a solver that cannot run here (no licence) before any work.

    Raises:
        SolverError: The solver cannot run.
    """
    recover(np.eye(2), np.ones(2), l1_weight=0.5, solver=solver)


def _limits(config: Config, dataset: ImageDataset) -> Limits:
    """Return the limits of a search.

    Raises:
        ConfigError: If no architecture is within them.
    """
    return build_search(config, dataset, Compute(torch.device("cpu")), Ranks()).limits


def _finish_searched(
    run: RunDir,
    progress: Progress,
    dataset: ImageDataset,
    config: Config,
    say: Callable[[str], None],
) -> Outcome:
    genotype, record = _write_last_genotype(run, progress.newest), run.read()
    valid = accuracies(progress.newest.metrics, "valid") if validates(record.method) else {}
    records = read_records(run.path / CHECKPOINTS, progress)
    effects = write_effects(
        run.path, records, config.space.build(), config.seed, lambda: _limits(config, dataset).budget()
    )
    result = {**_figures(genotype, progress), **valid, **({} if effects is None else {"effects": effects})}
    return Outcome(
        result=result,
        artifacts=(
            CONFIG_FILE,
            GENOTYPE_FILE,
            *cell_figures(genotype.kinds),
            *TRAJECTORY,
            *(name for name in (MEASUREMENTS_FILE, EFFECTS_FILE) if (run.path / name).is_file()),
            *_trajectory_page(run, say),
        ),
        tags={Tag.GENOTYPE: genotype.digest()},
        description=mlflow_note.of_search(
            record.method, record.data_label, progress.epochs, result, genotype
        ),
    )


def _finish_trained(
    run: RunDir,
    progress: Progress,
    dataset: ImageDataset,
    config: Config,
    say: Callable[[str], None],
) -> Outcome:
    net = searched_network(config, dataset, run.path / CHECKPOINTS, progress.epochs)
    genotype, record = _write_last_genotype(run, progress.newest), run.read()
    save_network(run.path, net, genotype, config.search, dataset, config.space.build())
    m, frozen = progress.newest.metrics, progress.newest.found().frozen or ()
    evaluated: tuple[str, ...] = ()
    if config.search.test_interval > 0:
        label = f"the test split of {record.data_label}"
        evaluated = evaluate_trained(run.path, net, dataset, label, int(m["target/macs"]), say)
    figures: tuple[str, ...] = ()
    result = {**_figures(genotype, progress), **accuracies(m, "test", "valid")}
    if frozen:
        _draw_freezing(run, progress, frozen, config)
        figures = FREEZING_FIGURES
        search_epochs = max(freezing.epoch for freezing in frozen) + CLOSING_EPOCHS
        result |= {
            "search_epochs": search_epochs,
            "train_epochs": progress.epochs - search_epochs,
            "rejected": int(m["arch/rejected"]),
            "frozen": [asdict(freezing) for freezing in frozen],
        }
    return Outcome(
        result=result,
        artifacts=(
            CONFIG_FILE,
            GENOTYPE_FILE,
            *cell_figures(genotype.kinds),
            *TRAJECTORY,
            *_trajectory_page(run, say),
            *figures,
            NETWORK_FILE,
            WEIGHTS_FILE,
            *evaluated,
        ),
        tags={Tag.GENOTYPE: genotype.digest()},
        description=mlflow_note.of_trained_search(
            record.method, record.data_label, progress.epochs, result, genotype
        ),
    )


def _draw_freezing(run: RunDir, progress: Progress, frozen: Sequence[Freezing], config: Config) -> None:
    """Draw the nodes' distances over the epochs of the search."""
    distances: dict[tuple[str, int], list[tuple[int, float]]] = {}
    rejected = []
    for record in read_records(run.path / CHECKPOINTS, progress):
        found = record.found()
        if not found.searching:
            break
        if found.rejection is not None:
            rejected.append(record.epoch)
        for node in found.nodes:
            if node.recovered:
                distances.setdefault((node.cell, node.node), []).append((record.epoch, node.distance))
    save_freezing_figure(
        run.path,
        distances,
        tolerance=value_at(config, "search.termination_tol"),
        rejected=rejected,
        frozen={(f.cell, f.node): (f.epoch, f.reason) for f in frozen},
    )


def _figures(genotype: Genotype, progress: Progress) -> dict[str, Any]:
    """Return the figures that every search has."""
    m = progress.newest.metrics
    return {
        "digest": genotype.digest(),
        "genotype": genotype.to_dict(),
        "params": int(m["target/params"]),
        "macs": int(m["target/macs"]),
        **({"latency_ms": m["target/latency_ms"]} if "target/latency_ms" in m else {}),
        "seconds": progress.seconds,
        **({"rollbacks": progress.rollbacks} if progress.rollbacks else {}),
    }


def _trajectory_page(run: RunDir, say: Callable[[str], None]) -> tuple[str, ...]:
    """Write the trajectory page, and return its file; empty if the page failed."""
    return write_page(TRAJECTORY_PAGE, lambda: write_trajectory_page(run), say)


def _write_last_genotype(run: RunDir, last: EpochRecord) -> Genotype:
    """Write the genotype of the last epoch and its figures, and return it."""
    found = last.found()
    genotype = Genotype.from_json(found.genotype)
    weights = {kind: [n.edge_weights for n in found.nodes if n.cell == kind] for kind in genotype.kinds}
    write_genotype(run.path, genotype, weights)
    return genotype
