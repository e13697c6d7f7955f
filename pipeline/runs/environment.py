"""The environment of a run: versions, git commit, hardware and the command that reproduces it (`environment.json`).

The file holds no secrets: no environment variables, and no passwords in addresses on the command line.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

import istanas
from pipeline.base.files import atomic_write
from pipeline.base.redaction import without_secrets
from pipeline.config.plugins import plugin_options, recorded
from pipeline.config.threads import usable_cores
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import CONFIG_FILE, ENVIRONMENT_FILE, GENOTYPE_FILE

_PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "cvxpy",
    "ray",
    "optuna",
    "mlflow",
    "matplotlib",
    "pandas",
)
CHECKOUT = Path(istanas.__file__).resolve().parent.parent


def collect_environment(folder: Path, kind: str) -> dict[str, Any]:
    """Return the environment of this process, and the command that reproduces the run.

    Args:
        folder: The run directory.
        kind: The kind of the run: "search", "retrain" or "sweep".
    """
    return {
        "istanas": istanas.__version__,
        "git": git_state(),
        "python": platform.python_version(),
        "packages": _versions(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": _gpus(),
        "command": reproducing_command(folder, kind),
        **({"plugins": plugins} if (plugins := recorded()) else {}),
    }


def write_environment(run: RunDir, kind: str) -> None:
    """Write `environment.json`; earlier environments of a resumed run are kept under "earlier".

    Args:
        run: The run directory.
        kind: See `collect_environment`.
    """
    new, before = collect_environment(run.path, kind), run.environment()
    earlier = before.pop("earlier", [])
    if before not in ({}, new):
        earlier.append(before)
    atomic_write(run.path / ENVIRONMENT_FILE, json.dumps({**new, "earlier": earlier}, indent=2) + "\n")


def reproducing_command(folder: Path, kind: str) -> str:
    """Return a command that reproduces the run: the command line without secrets, if `istanas` was called.

    Otherwise, the command uses the files of the run directory.

    Args:
        folder, kind: See `collect_environment`.
    """
    program = Path(sys.argv[0])
    if program.stem == "istanas" or program.parts[-3:] == ("pipeline", "cli", "__main__.py"):
        typed = [argument.encode("utf-8", "backslashreplace").decode() for argument in sys.argv[1:]]
        return shlex.join(["istanas", *map(without_secrets, typed)])
    genotype = ["--genotype", str(folder / GENOTYPE_FILE)] if kind == "retrain" else []
    config = ["--config", str(folder / CONFIG_FILE)]
    return shlex.join(["istanas", kind, *genotype, *plugin_options(), *config])


@functools.cache
def git_state(checkout: Path = CHECKOUT) -> dict[str, Any] | None:
    """Return the commit of istanas' git checkout, and whether files were changed; None without a checkout."""
    if not (checkout / ".git").exists():  # an installation may lie inside an unrelated checkout
        return None
    commit, changes = (
        _git(checkout, "rev-parse", "HEAD"),
        _git(checkout, "status", "--porcelain", "--untracked-files=no"),
    )
    return None if commit is None or changes is None else {"commit": commit, "dirty": changes != ""}


def _git(checkout: Path, *arguments: str) -> str | None:
    """Return the output of a git command in the checkout; None if git is missing or fails."""
    # Variables such as GIT_DIR would select another repository.
    elsewhere = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments],
            env=elsewhere,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def _versions() -> dict[str, str]:
    installed = {}
    for name in _PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def cpu_model() -> str:
    """Return the name of the processor, as far as the system reports it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices]
