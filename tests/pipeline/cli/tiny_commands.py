"""The commands, a tiny configuration for them, and how the tests of the command line run them."""

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.warm import warm_program

TINY = """
space: {nodes: 2}
search: {epochs: 2, batch_size: 64, init_channels: 2, layers: 3, max_pictures: 200}
retrain: {epochs: 2, batch_size: 256, init_channels: 2, layers: 2, auxiliary_weight: 0, cutout: 0}
runtime: {threads: 1, device: cpu}
tracking: {enabled: false}
"""


COMMANDS = (
    "benchmark",
    "versus",
    "rank",
    "search",
    "retrain",
    "run",
    "predict",
    "evaluate",
    "export",
    "draw",
    "results",
    "ui",
    "doctor",
    "sweep",
    "sync",
    "new",
    "pack",
    "config",
    "profile",
    "latency",
    "promote",
    "compare",
    "submit",
    "jobs",
    "stop",
)

SERVED = ("submit", "jobs", "stop")  # these use a cluster's job server, and have no configuration

WITHOUT_SET = (*SERVED, "pack")

WITHOUT_CONFIG = (*WITHOUT_SET, "new")  # which writes one


KEYS = {
    "search": {"run_dir", "mlflow_run_id", "digest", "genotype", "params", "macs", "seconds"},
    "retrain": {"run_dir", "mlflow_run_id", "digest", "genotype", "test_top1", "params", "macs", "seconds"},
    "run": {
        "run_dir",
        "mlflow_run_id",
        "retrain_run_id",
        "digest",
        "genotype",
        "test_top1",
        "params",
        "macs",
        "seconds",
    },
}

Outcome = tuple[int, str, str]

Command = Callable[..., Outcome]


def as_process(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a command line in a process of its own."""
    return subprocess.run(
        [*warm_program(), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def error_lines(err: str) -> list[str]:
    """Return the lines of an error, none of which belongs to a traceback."""
    lines = err.splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines), err
    return lines


def unignore_sigint() -> Any:
    """Restore the handlers, which background jobs of a shell (SIGINT) and of nohup (SIGHUP) ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
