"""A search of seconds, for tests of its files."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.load import load
from pipeline.jobs.context import JobContext
from pipeline.jobs.search import run_search
from pipeline.runs.directory import RunDir
from pipeline.training.epoch_record import Progress

SETTINGS = [
    "space.nodes=2",
    "search={epochs: 3, batch_size: 64, init_channels: 4, layers: 3, max_pictures: 200, arch_lr: 0.1}",
    "runtime={threads: 1, device: cpu}",
    "tracking.enabled=false",
]


def search(
    folder: Path, *overrides: str, on_epoch: Any = None, fresh: bool = False
) -> tuple[dict[str, Any], str]:
    config = load(None, [*SETTINGS, f"runtime.runs_dir={folder}", *overrides])
    out = io.StringIO()
    with Runtime(config.runtime) as runtime:
        console = Console(file=out, width=200)
        found = run_search(JobContext(config, "tiny", console, runtime, fresh, on_epoch=on_epoch))
    return dict(found), out.getvalue()


def stop_after_two(progress: Progress) -> None:
    if progress.epochs == 2:
        raise KeyboardInterrupt


def search_stopped_after_two(folder: Path, *overrides: str) -> Path:
    """Run a search that is interrupted after two of its three epochs, and return the folder."""
    with pytest.raises(KeyboardInterrupt):
        search(folder, *overrides, on_epoch=stop_after_two)
    return folder


def decided(run_dir: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in line.metrics.items() if name != "images_per_second"}
        for line in RunDir(run_dir).metrics()
    ]
