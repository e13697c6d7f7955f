"""The columns of the pandas frames that `pipeline.report` exports, with their types."""

COLUMNS: dict[str, str] = {
    "run_id": "string",
    "name": "string",
    "kind": "string",
    "method": "string",
    "dataset": "string",
    "status": "string",
    "genotype": "string",
    "test_top1": "Float64",
    "test_top5": "Float64",
    "valid_top1": "Float64",
    "valid_top5": "Float64",
    "params": "Int64",
    "macs": "Int64",
    "seconds": "Float64",
    "started": "datetime64[ms, UTC]",
    "parent_run_id": "string",
    "run_dir": "string",
    "outcome": "string",
    "origin": "string",
}
"""Column -> pandas dtype of `results_frame`.

- Accuracies are fractions; top-5 is NA with 10 classes or fewer.
- `dataset` is the name of the data set or, for own pictures, that of their folder. `genotype` is the digest.
- `seconds` is the time spent working.
- `outcome` is MLflow's status, or INTERRUPTED or PRUNED instead of its FAILED or KILLED.
- `origin` is the source of a retrained cell: a run, a file, a random or a published cell. It is NA for other runs.
"""

SEARCHES_COLUMNS: dict[str, str] = {
    "run_id": "string",
    "name": "string",
    "method": "string",
    "dataset": "string",
    "status": "string",
    "seed": "Int64",
    "genotype": "string",
    "valid_top1": "Float64",
    "valid_top5": "Float64",
    "test_top1": "Float64",
    "test_top5": "Float64",
    "retrainings": "Int64",
    "retrain_run_id": "string",
    "retrained_valid_top1": "Float64",
    "retrained_valid_top5": "Float64",
    "retrained_test_top1": "Float64",
    "retrained_test_top5": "Float64",
    "params": "Int64",
    "macs": "Int64",
    "seconds": "Float64",
    "started": "datetime64[ms, UTC]",
    "parent_run_id": "string",
    "run_dir": "string",
}
"""Column -> pandas dtype of `searches_frame`.

- `valid_*` and `test_*` are the accuracies of the search itself; only a one-stage search has `test_*`.
- `retrainings` counts the finished retrainings of the cell that the search found. `retrain_run_id` is the newest of
  them, and `retrained_*` are its accuracies.
- `parent_run_id` is the run id of the sweep. Top-5 is NA with 10 classes or fewer.
"""

METRICS = (
    "train/loss",
    "train/top1",
    "train/top5",
    "train/rollbacks",
    "valid/loss",
    "valid/top1",
    "valid/top5",
    "test/loss",
    "test/top1",
    "test/top5",
    "recovery/gap",
    "recovery/truncation",
    "recovery/margin",
    "recovery/distance",
    "recovery/support_changes",
    "recovery/fallbacks",
    "arch/skip_ratio",
    "arch/frozen_nodes",
    "arch/rejected",
    "arch/entropy",
    "target/params",
    "target/macs",
    "images_per_second",
)
"""The metrics of an epoch by their MLflow names; each kind of run has some of them."""

EPOCHS_KEYS: dict[str, str] = {
    "run_id": "string",
    "name": "string",
    "kind": "string",
    "method": "string",
    "dataset": "string",
    "epoch": "Int64",
}
EPOCHS_COLUMNS: dict[str, str] = {**EPOCHS_KEYS, **dict.fromkeys(METRICS, "Float64")}
"""Column -> pandas dtype of `epochs_frame`. Epochs count from 1; a metric that was not measured is NA."""

GENOTYPES_COLUMNS: dict[str, str] = {
    "genotype": "string",
    "dataset": "string",
    "searches": "Int64",
    "found_by": "string",
    "retrainings": "Int64",
    "best_retrained_test_top1": "Float64",
    "mean_retrained_test_top1": "Float64",
    "best_retrained_valid_top1": "Float64",
    "params": "Int64",
    "macs": "Int64",
    "genotype_json": "string",
}
"""Column -> pandas dtype of `genotypes_frame`.

- `genotype` is the digest. `found_by` are the run ids, separated by spaces, of the `searches` that found it.
- The best of several retrainings is an optimistic estimate; the mean is not.
- `params` and `macs` are those of the newest retraining or, without one, of the newest search.
- `genotype_json` is the text that `Genotype.from_json` reads; NA if the store has no such artifact.
"""

SWEEPS_COLUMNS: dict[str, str] = {
    "run_id": "string",
    "name": "string",
    "method": "string",
    "dataset": "string",
    "status": "string",
    "searcher": "string",
    "scheduler": "string",
    "objective": "string",
    "objectives": "string",
    "space": "string",
    "trials": "Int64",
    "complete": "Int64",
    "pruned": "Int64",
    "failed": "Int64",
    "best_top1": "Float64",
    "genotype": "string",
    "seconds": "Float64",
    "started": "datetime64[ms, UTC]",
    "run_dir": "string",
}
"""Column -> pandas dtype of `sweeps_frame`.

- `trials` is the planned number; `complete`, `pruned` and `failed` count the trials that have ended.
- `best_top1` is the top-1 of the objective: "valid", or "retrained", which is measured on the hold-out.
- `objectives`, and the swept keys in `space`, are separated by commas.
"""

WEIGHTS_COLUMNS: dict[str, str] = {
    "run_id": "string",
    "name": "string",
    "dataset": "string",
    "genotype": "string",
    "one_stage_top1": "Float64",
    "one_stage_params": "Int64",
    "one_stage_epochs": "Int64",
    "one_stage_seconds": "Float64",
    "retrain_run_id": "string",
    "retrain_name": "string",
    "retrained_top1": "Float64",
    "retrained_params": "Int64",
    "retrained_epochs": "Int64",
    "retrained_seconds": "Float64",
    "difference": "Float64",
}
"""Column -> pandas dtype of `weights_frame`.

- Top-1 accuracies are fractions, measured on the test split; `difference` is the gain of retraining.
- Epochs and seconds of a one-stage search include its training phase.
"""

SPACE_PREFIX = "sweep.space."
"""Prefix of the parameters of a run that describe the space of a sweep."""
