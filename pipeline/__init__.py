"""Jobs around `istanas`: configuration, command line, worker loop, MLflow. Nothing reports home by default.

The three variables are read when Ray and MLflow are first imported, so they are set before either can be;
who wants the statistics sets them to something else.
"""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
