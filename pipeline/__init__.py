"""Everything around the algorithms of `istanas`: configuration, runs, tracking, Ray, reports and the command line.

No usage statistics leave the machine by default. Ray and MLflow read these variables when they are first imported, so
they are set here; other values in the environment are kept.
"""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
