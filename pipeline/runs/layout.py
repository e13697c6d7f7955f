"""Names of the files and folders in a run directory.

Records, MLflow runs and documents contain these names, so they must not change.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# ----- Every run.
RECORD_FILE = "run.json"  # identity, settings and status of the run: `runs.record.RunRecord`
METRICS_FILE = "metrics.jsonl"  # one line of metrics per epoch, or per trial
CONFIG_FILE = "config.yaml"  # the resolved configuration
ENVIRONMENT_FILE = "environment.json"  # versions, commit, hardware and command line
LINK_FILE = "mlflow.json"  # the MLflow run that mirrors this run, and what was sent to it
REPORT_PAGE = "report.html"  # the report of a finished run
LOG_FOLDER = "ray"  # log files of Ray and of its workers
LOCK_FILE = ".run.lock"  # locked by the process that works on the run
OWNER_FILE = ".run.lock.owner"  # host and id of that process, for error messages
DELIVERY_LOCK = ".mlflow.lock"  # locked while the run is sent to MLflow
OWNER_OBJECT = ".owner.json"  # in a bucket: the lease of the process that works on the run
CLEARING_FILE = ".clearing"  # exists while --fresh deletes the run

# ----- Checkpoints.
CHECKPOINTS = "checkpoints"  # folder of the checkpoints and of the epoch log
CHECKPOINT_MANIFEST = re.compile(r"epoch-([0-9]+)\.json")  # a checkpoint's checksum, beside its `.pt`
EPOCH_LOGS = ("epochs", "epochs-copy")  # folders with the two copies of the epoch log

# ----- Searches, genotypes and trained networks.
GENOTYPE_FILE = "genotype.json"  # the architecture that a run found or retrained, or the best of a sweep
CELLS_FOLDER = (
    "cells"  # drawings of the kept operations: two files for each kind, such as normal.svg and normal.png
)
TRAJECTORY_FILE = "trajectory.csv"  # the selected edges after every epoch
CODES_FILE = "codes.csv"  # the recovered codes after every epoch
MEASUREMENTS_FILE = "measurements.csv"  # the measured architectures of a search by measurements
EFFECTS_FILE = "effects.csv"  # the effects of the candidates after these measurements
TRAJECTORY_PAGE = "trajectory.html"  # both tables as a page
FREEZING_FIGURES = ("freezing.svg", "freezing.png")  # one-stage: when each node was frozen
WEIGHTS_FILE = "model.safetensors"  # weights of the trained network
NETWORK_FILE = "network.json"  # how to build that network and what to feed it
EVALUATION_FILE = "evaluation.json"  # measurements of the trained network on the test split
EVALUATION_PAGE = (
    "evaluation.html"  # the same as a page, for other pictures; those of the test split are in the report
)
MISTAKES_FIGURE = "mistakes.png"  # the worst mistakes of the evaluation
EXPORT_FOLDER = "export"  # the network in other formats
PROGRAM_FILE = "model.pt2"  # in the export folder: the network as a program of torch.export
ONNX_FILE = "model.onnx"  # in the export folder: the network in ONNX format
INT8_FILE = "model.int8.onnx"  # the same with 8-bit integers
INT8_REPORT = "int8.json"  # size, latency and accuracy of both

# ----- Sweeps.
TRIALS_TABLE = "trials.csv"  # all trials with their settings and figures
FRONT_TABLE = "front.csv"  # accuracy and cost for each weight of the costs, with intervals
SWEEP_PAGE = "sweep.html"  # interactive figures and the table of trials
PLOTS_FOLDER = "plots"  # the same figures as PNG
BEST_FOLDER = "best"  # configuration and genotype of the best trial
STUDY_FILE = "optuna.db"  # the Optuna study of a sweep in a bucket
TRIAL_LOG = "trial.log"  # in a trial's run directory: the output of its process
RUN_FOLDER = re.compile(r".+-(search|retrain)-[0-9a-f]{10}")  # run directory of a trial or of its retraining

# ----- Benchmarks.
BENCHMARK_TABLE = "benchmark.csv"  # all searches with their true accuracies and ranks
BENCHMARK_EPOCHS = "benchmark_epochs.csv"  # true accuracy and rank after each epoch of each search
BENCHMARK_PAGE = "benchmark.html"  # both tables and the comparisons as a page

# ----- Comparisons of judges.
RANK_TABLE = "rank.csv"  # the score of each cell by each judge
RANK_PAGE = "rank.html"  # how well each judge ranks, with a scatter plot
# ----- Comparisons at equal cost.
VERSUS_TABLE = "versus.csv"  # the result of each method and seed, with its cost
VERSUS_CELLS = "versus_cells.csv"  # all cells that were retrained
VERSUS_PAGE = "versus.html"  # both tables and the comparisons as a page


def measurement_folder(number: str) -> str:
    """Return the name of the run directory of a measurement; "*" gives the pattern of all names.

    Example:
        >>> measurement_folder("0003")
        'measurement-0003'
    """
    return f"measurement-{number}"


def checkpoint_file(epoch: int) -> str:
    """Return the name of an epoch's checkpoint.

    Example:
        >>> checkpoint_file(3)
        'epoch-0003.pt'
    """
    return f"epoch-{epoch:04d}.pt"


def cell_figures(kinds: Iterable[str]) -> tuple[str, ...]:
    """Return the drawings of a genotype with these kinds of decisions.

    Example:
        >>> cell_figures(["normal"])
        ('cells/normal.svg', 'cells/normal.png')
    """
    return tuple(f"{CELLS_FOLDER}/{kind}.{suffix}" for kind in kinds for suffix in ("svg", "png"))
