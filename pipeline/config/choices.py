"""Values that options of the command line choose from. It imports nothing, so that the shell completes them at once."""

KINDS = ("sweep", "search", "retrain")
"""Kinds of runs, the outer ones first."""

METHODS = ("two_stage", "one_stage")
"""Search methods; each has its schema in `pipeline.config.schema`."""

HIGHER = ("valid/top1", "test/top1", "valid/top5", "test/top5")
LOWER = ("valid/loss", "test/loss", "target/params", "target/macs")
METRICS = (*HIGHER, *LOWER)
"""Metrics that a champion can be chosen by: `HIGHER` are better if higher, `LOWER` if lower."""

DEFAULT_METRIC = "valid/top1"
