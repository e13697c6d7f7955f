"""Reports on runs: HTML pages, pandas frames and terminal tables.

One frame for each question: `results_frame` (everything), `searches_frame`, `epochs_frame`, `genotypes_frame`,
`sweeps_frame`, `weights_frame` (one-stage weights against retrained ones). All take `tracking_uri=` and
`experiment=`, and most the conditions of `Filters`; accuracies are fractions, times aware (UTC), what is missing
is NA, and a store without such runs gives an empty frame of the same types. `pipeline.report.trials.read_table` has
the trials of one sweep, `pipeline.report.terminal` prints.
"""

from pipeline.report.frames import (
    COLUMNS,
    EPOCHS_COLUMNS,
    GENOTYPES_COLUMNS,
    METRICS,
    SEARCHES_COLUMNS,
    SWEEPS_COLUMNS,
    WEIGHTS_COLUMNS,
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
