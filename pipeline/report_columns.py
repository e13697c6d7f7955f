"""Columns and pandas dtypes of the frames of `pipeline.report`."""

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
"""Column -> pandas dtype: accuracies are fractions, top-5 NA with 10 classes or fewer, `genotype` is the digest,
`seconds` the time worked, `outcome` the status with INTERRUPTED and PRUNED told apart, which MLflow calls FAILED or
KILLED, `origin` where the cell that a retraining trained comes from: a run, a file, a random or a
published cell; NA of other runs. `dataset` is the data set's name, of own pictures what their folder is called."""

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
"""Column -> pandas dtype of `searches_frame`: `valid_*` and `test_*` are the search's own (test of a one-stage
search only), `retrainings` counts the finished ones of what it found, `retrain_run_id` is the newest of them and
`retrained_*` are its accuracies, `parent_run_id` is the sweep's; top-5 is NA with 10 classes or fewer."""

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
    "target/params",
    "target/macs",
    "images_per_second",
)
"""What is measured in an epoch, as MLflow calls it; each kind of run has some of it."""

EPOCHS_KEYS: dict[str, str] = {
    "run_id": "string",
    "name": "string",
    "kind": "string",
    "method": "string",
    "dataset": "string",
    "epoch": "Int64",
}
EPOCHS_COLUMNS: dict[str, str] = {**EPOCHS_KEYS, **dict.fromkeys(METRICS, "Float64")}
"""Column -> pandas dtype of `epochs_frame`: epochs count from 1; a metric that was not measured is NA."""

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
"""Column -> pandas dtype of `genotypes_frame`: `genotype` is the digest, `found_by` the run ids of the `searches` that
ended with it, with spaces between; the best of several retrainings flatters, the mean does not; `params` and `macs`
are those of the newest retraining, else search; `genotype_json` is what `Genotype.from_json` reads, NA where the store
has no such artifact."""

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
"""Column -> pandas dtype of `sweeps_frame`: `trials` are planned, the next three have ended; `best_top1` is of the
objective, "valid" or "retrained" (on the hold-out); `objectives` and the swept keys in `space` have commas between."""

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
"""Column -> pandas dtype of `weights_frame`: top-1 are fractions of the test split, `difference` is what
retraining gains, epochs and seconds of a search hold its training too."""
