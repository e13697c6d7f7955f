"""Tags of runs and registered models in MLflow: their names, and the values that a run's record determines.

`tracking.tracker` sends the tags from `tags_of` and the commit; `tracking.lineage` adds tags that link runs. The
tags of registered versions are set in `tracking.model_registry` and `tracking.promote`.
"""

from __future__ import annotations

from pipeline.config.schema import Config
from pipeline.runs.record import RunRecord


class Tag:
    """The names of all tags."""

    # ----- Every run.
    KIND = "istanas.kind"  # search, retrain, sweep, benchmark or measurement
    METHOD = "istanas.method"  # the search method
    DATASET = "istanas.dataset"  # name of the data set
    FOLDER = "istanas.data_folder"  # label of a data set whose pictures data.root decides, such as "folder"
    MISSING_CLASSES = "istanas.missing_classes"  # classes without pictures in a part of the data set
    GENOTYPE = "istanas.genotype"  # digest of the genotype
    ORIGIN = "istanas.genotype_from"  # origin of the genotype: a run, a file, or a random or published cell
    SEED = "istanas.seed"  # seed of the run
    WORKERS = "istanas.workers"  # configured number of workers
    SECONDS = "istanas.seconds"  # seconds of training, without interruptions
    OUTCOME = "istanas.outcome"  # how the run ended, if MLflow's status cannot express it
    KEY = "istanas.key"  # key by which the MLflow run of a run directory is found
    RUN_DIR = "istanas.run_dir"  # the run directory, or its address

    # ----- Trials of a sweep.
    SWEEP = "istanas.sweep"  # name of the sweep's run directory
    TRIAL = "istanas.trial"  # number of the trial
    TRIAL_STATE = "istanas.trial_state"  # Optuna's state of the trial
    NODE = "istanas.node"  # node of the cluster on which the trial, or the measurement of a search, ran
    REASON = "istanas.reason"  # why the trial failed, or a measurement has no loss

    # ----- Searches of a benchmark.
    BENCHMARK = "istanas.benchmark"  # name of the run directory of the benchmark that started the search

    # ----- Registered versions.
    PROMOTED = "istanas.promoted"  # why this version became the champion
    CHAMPION_BEFORE = "istanas.champion_before"  # the champion that this version replaced


def tags_of(record: RunRecord, run_dir: str) -> dict[str, str]:
    """Return the tags of a run: those that its record determines, and those that its job has added.

    Args:
        record: The record of the run.
        run_dir: The run directory, absolute, or its address.
    """
    tags = {
        Tag.KIND: record.kind,
        Tag.METHOD: record.method,
        Tag.DATASET: record.dataset,
        **({Tag.FOLDER: record.data_label} if record.data_label != record.dataset else {}),
        Tag.KEY: record.key,
        Tag.RUN_DIR: run_dir,
        **record.tags,
    }
    if isinstance(record.result.get("seconds"), int | float):
        tags[Tag.SECONDS] = str(record.result["seconds"])
    return tags


def common_tags(config: Config) -> dict[str, str]:
    """Return the tags that every job adds to its record."""
    return {Tag.SEED: str(config.seed), Tag.WORKERS: str(config.runtime.workers)}
