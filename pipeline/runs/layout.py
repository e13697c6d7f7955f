"""Names of the files and folders in a run directory."""

from __future__ import annotations

RECORD_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
ENVIRONMENT_FILE = "environment.json"
LOCK_FILE = ".run.lock"
OWNER_FILE = ".run.lock.owner"
LINK_FILE = "mlflow.json"
LOG_FOLDER = "ray"  # in the run directory
CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.yaml"
GENOTYPE_FILE = "genotype.json"
TRAJECTORY_FILE = "trajectory.csv"
CODES_FILE = "codes.csv"
CELL_FIGURES = ("cells/normal.svg", "cells/normal.png", "cells/reduce.svg", "cells/reduce.png")
