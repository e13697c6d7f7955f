"""Reports on runs: HTML pages, pandas frames and terminal tables.

The frames are `results_frame` (all runs), `searches_frame`, `epochs_frame`, `genotypes_frame`, `sweeps_frame` and
`weights_frame` (weights of one-stage searches compared with retrained ones). All take `tracking_uri=` and
`experiment=`, and most take the conditions of `Filters`. Accuracies are fractions, times have the time zone UTC,
missing values are NA, and a store without matching runs gives an empty frame with the same types.

`pipeline.report.trials.read_table` returns the trials of a sweep; `pipeline.report.terminal` formats frames as text.
"""

from pipeline.report.columns import (
    COLUMNS,
    EPOCHS_COLUMNS,
    GENOTYPES_COLUMNS,
    METRICS,
    SEARCHES_COLUMNS,
    SWEEPS_COLUMNS,
    WEIGHTS_COLUMNS,
)
from pipeline.report.frames import (
    Filters,
    epochs_frame,
    genotypes_frame,
    results_frame,
    searches_frame,
    sweeps_frame,
    weights_frame,
)

__all__ = [
    "COLUMNS",
    "EPOCHS_COLUMNS",
    "GENOTYPES_COLUMNS",
    "METRICS",
    "SEARCHES_COLUMNS",
    "SWEEPS_COLUMNS",
    "WEIGHTS_COLUMNS",
    "Filters",
    "epochs_frame",
    "genotypes_frame",
    "results_frame",
    "searches_frame",
    "sweeps_frame",
    "weights_frame",
]
