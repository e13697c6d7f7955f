"""A diverged epoch stops the job, or rolls it back with a lower learning rate."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from istanas.data import ImageDataset
from istanas.errors import DivergedError, IstanasError
from istanas.training import Metrics
from pipeline.config.schema import Config
from pipeline.training.epoch_record import (
    EpochRecord,
    load_latest,
    load_progress,
    read_records,
)
from pipeline.training.loop import search_worker
from tests.pipeline.training.small_jobs import (
    Nobody,
    Watcher,
    decided,
    retrain,
    search,
    tiny,
)
from tests.ranks import run_ranks


@pytest.mark.parametrize("job", ["search", "retrain"])
def test_a_diverged_epoch_stops_the_job_and_leaves_no_checkpoint(
    few: ImageDataset, tmp_path: Path, job: str
) -> None:
    config = tiny(f"{job}.lr=1e30", f"{job}.grad_clip=null")
    with pytest.raises(IstanasError, match=r"the run diverged; .*; lower the learning rate") as caught:
        (search if job == "search" else retrain)(config, few, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("epoch-*"))


# One diverges in its second epoch, one in its third, one at once; all of them go on with a lower learning rate.
DIVERGING = {
    "search": ["search.epochs=3", "search.lr=64.0", "search.grad_clip=null", "runtime.max_loss=20"],
    "one_stage": [
        "method=one_stage",
        "search={max_search_epochs: 2, train_epochs: 2, batch_size: 64, init_channels: 2, layers: 3}",
        "search.lr=32.0",
        "search.grad_clip=null",
        "runtime.max_loss=30",
    ],
    "retrain": ["retrain.epochs=1", "retrain.lr=1e4", "retrain.grad_clip=null", "runtime.max_loss=null"],
}

LAST_GOOD = {"search": 1, "one_stage": 2, "retrain": 0}


def diverging(job: str, *overrides: str) -> Config:
    return tiny(*DIVERGING[job], *overrides)


def run_diverging(
    job: str, dataset: ImageDataset, folder: Path, watcher: Watcher | None = None, *overrides: str
) -> list[EpochRecord]:
    config = diverging(job, *(overrides or ("runtime.on_nan=rollback", "runtime.max_rollbacks=9")))
    return (retrain if job == "retrain" else search)(config, dataset, folder, watcher)


def exact(history: list[EpochRecord]) -> list[str]:
    """What is decided in each epoch, as text: a diverged run has figures that are nan."""
    return [record.to_json() for record in decided(history)]


def newest(folder: Path) -> list[Any]:
    """All that is in the newest checkpoint but for what the clock decides, tensors as bytes."""
    found = load_latest(folder)
    assert found is not None
    records = decided(list(read_records(folder, load_progress(folder))))
    return flat({**found.state, "progress": [dataclasses.asdict(record) for record in records]})


def flat(tree: Any) -> list[Any]:
    if isinstance(tree, torch.Tensor):
        return [tree.numpy().tobytes()]
    if isinstance(tree, dict):
        tree = [*tree, *tree.values()]
    return [leaf for part in tree for leaf in flat(part)] if isinstance(tree, list | tuple) else [repr(tree)]


@pytest.mark.slow
@pytest.mark.parametrize("job", DIVERGING)
def test_a_diverged_run_stops_and_the_same_command_with_rollback_goes_on(
    few: ImageDataset, tmp_path: Path, job: str
) -> None:
    epoch = LAST_GOOD[job]
    with pytest.raises(DivergedError) as caught:
        run_diverging(job, few, tmp_path / "stopped", None, "runtime.on_nan=stop")
    line = str(caught.value)
    assert "\n" not in line
    assert f" in epoch {epoch + 1}" in line
    last = (
        f"the last good checkpoint is of epoch {epoch}; " if epoch else "there is no checkpoint before it; "
    )
    assert last in line
    assert "at half the rate with --set runtime.on_nan=rollback" in line
    assert load_progress(tmp_path / "stopped").epochs == epoch

    watcher = Watcher()
    history = run_diverging(job, few, tmp_path / "whole", watcher)
    told = [note for note in watcher.notes if "rolled back" in note]
    assert 1 <= len(told) == sum(len(record.rollbacks) for record in history) <= 9
    to = f"to the end of epoch {epoch}" if epoch else "to the start"
    assert f"{to}, with half the learning rate (0.5 of the configured one; rollback 1 of 9)" in told[0]
    assert [record.epoch for record in history] == list(range(1, len(history) + 1)), "an epoch is doubled"
    after = [record.metrics.get("train/rollbacks") for record in history]
    assert after[:epoch] == [None] * epoch
    assert after[epoch] == len(history[epoch].rollbacks) > 0
    assert [undone.lr_factor for undone in history[epoch].rollbacks] == [
        0.5 ** (n + 1) for n in range(len(history[epoch].rollbacks))
    ]

    # The stopped run goes on, and so does one that is stopped in an attempt after the rollback, bit for bit.
    assert exact(run_diverging(job, few, tmp_path / "stopped")) == exact(history)
    assert newest(tmp_path / "stopped") == newest(tmp_path / "whole")
    stop_at = (epoch, 1) if job == "search" else (len(history) - 1, 2)
    with pytest.raises(KeyboardInterrupt):
        run_diverging(job, few, tmp_path / "interrupted", StopsAfterRollback(stop_at))
    assert exact(run_diverging(job, few, tmp_path / "interrupted")) == exact(history)
    assert newest(tmp_path / "interrupted") == newest(tmp_path / "whole")


class StopsAfterRollback(Watcher):
    """Stops at a step, but not before the run was rolled back."""

    def step(self, epoch: int, step: int, n_steps: int, read: Callable[[], Metrics | None]) -> None:
        if any("rolled back" in note for note in self.notes):
            super().step(epoch, step, n_steps, read)


def test_a_run_is_rolled_back_so_often_and_then_stops(few: ImageDataset, tmp_path: Path) -> None:
    watcher = Watcher()
    config = tiny("search.lr=1e30", "search.grad_clip=null", "runtime={on_nan: rollback, max_rollbacks: 2}")
    with pytest.raises(DivergedError, match=r"rolled back 2 times; .*; raise runtime\.max_rollbacks"):
        search(config, few, tmp_path, watcher)
    assert [note.partition("(")[2] for note in watcher.notes if "rolled" in note] == [
        "0.5 of the configured one; rollback 1 of 2)",
        "0.25 of the configured one; rollback 2 of 2)",
    ]
    assert not list(tmp_path.glob("epoch-*"))


def roll_back_on_a_rank(dataset: ImageDataset, folder: Path) -> tuple[list[EpochRecord], list[str]]:
    if torch.distributed.get_rank() > 0:
        nobody: Any = Nobody()
        config = diverging("search", "runtime.on_nan=rollback")
        return [search_worker(config, dataset, nobody, nobody).newest], []
    watcher = Watcher()
    return run_diverging("search", dataset, folder, watcher), watcher.notes


@pytest.mark.slow
def test_ranks_roll_back_together(few: ImageDataset, tmp_path: Path) -> None:
    ((first, second),) = run_ranks([partial(roll_back_on_a_rank, few, tmp_path)], 2)
    history, notes = first.value
    assert decided(second.value[0]) == decided(history[-1:])
    assert (
        sum(len(record.rollbacks) for record in history)
        == sum("rolled back to the end of epoch" in note for note in notes)
        > 0
    )
