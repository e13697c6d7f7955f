"""Choices of command-line options. The module imports nothing, so that shells complete them quickly."""

KINDS = ("sweep", "search", "retrain")
"""Kinds of runs, from the outermost to the innermost."""

HIGHER = ("valid/top1", "test/top1", "valid/top5", "test/top5")
LOWER = ("valid/loss", "test/loss", "target/params", "target/macs")
METRICS = (*HIGHER, *LOWER)
"""Metrics by which a champion can be chosen. Higher values are better in `HIGHER`, lower values in `LOWER`."""

DEFAULT_METRIC = "valid/top1"

JPEG_QUALITY = 92
"""Quality of the pictures that `istanas pack --resize` reduces, unless another one is given."""

TOLERANCE_POINTS = 1.0
"""Default of the largest accepted loss of top-1 accuracy by a quantisation, in percentage points."""
