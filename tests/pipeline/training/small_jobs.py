"""Small jobs on a few digits, run in this process, for the tests of the training loop."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from istanas.data import ArrayPictures, ImageDataset
from istanas.space import CellSpace, Genotype, random_genotype
from istanas.training import Metrics
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.training.epoch_record import (
    EpochRecord,
    FolderStore,
    Progress,
    read_records,
)
from pipeline.training.loop import retrain_worker, search_worker, trained_network

TINY = [
    "space.nodes=2",
    "search={epochs: 2, batch_size: 64, init_channels: 2, layers: 3}",
    "retrain={epochs: 2, batch_size: 64, init_channels: 2, layers: 2, auxiliary_weight: 0.4, cutout: 2}",
    "data.crop_padding=1",
    "runtime={threads: 1, device: cpu}",
]

GENOTYPE = random_genotype(1, CellSpace(n_nodes=2))


def tiny(*overrides: str) -> Config:
    return load(None, [*TINY, *overrides])


def with_train(dataset: ImageDataset, images: torch.Tensor, labels: torch.Tensor) -> ImageDataset:
    return dataclasses.replace(dataset, train=ArrayPictures(images, labels))


class Watcher:
    """An observer that remembers, and may stop the job in the middle of an epoch or have it end after one."""

    def __init__(self, stop_at: tuple[int, int] | None = None, leave_after: tuple[int, ...] = ()) -> None:
        self.stop_at, self.leave_after = stop_at, leave_after
        self.done: list[int] = []
        self.last: EpochRecord | None = None
        self.notes: list[str] = []
        self.resumed_with: list[tuple[int, int]] = []
        self.steps: list[tuple[int, int, int]] = []
        self.counts: dict[int, int] = {}

    def note(self, text: str) -> None:
        self.notes.append(text)

    def resumed(self, progress: Progress, workers: int) -> None:
        self.resumed_with.append((progress.epochs, workers))

    def step(self, epoch: int, step: int, n_steps: int, read: Callable[[], Metrics | None]) -> None:
        self.steps.append((epoch, step, n_steps))
        if (metrics := read()) is not None:
            self.counts[epoch] = metrics.count
        if (epoch, step) == self.stop_at:
            raise KeyboardInterrupt

    def epoch_done(self, progress: Progress) -> None:
        self.done.append(progress.epochs)
        self.last = progress.last

    def should_continue(self) -> bool:
        return self.done[-1] not in self.leave_after


def search(
    config: Config, dataset: ImageDataset, folder: Path, watcher: Watcher | None = None
) -> list[EpochRecord]:
    """Run a search with its checkpoints in a folder; returns the records of all its epochs."""
    return all_records(folder, search_worker(config, dataset, FolderStore(folder), watcher or Watcher()))


def retrain(
    config: Config,
    dataset: ImageDataset,
    folder: Path,
    watcher: Watcher | None = None,
    genotype: Genotype = GENOTYPE,
) -> list[EpochRecord]:
    """Run a retraining with its checkpoints in a folder; returns the records of all its epochs."""
    done = retrain_worker(config, dataset, FolderStore(folder), watcher or Watcher(), genotype)
    return all_records(folder, done)


def all_records(folder: Path, progress: Progress) -> list[EpochRecord]:
    """The records of all epochs, with which what the worker returns agrees."""
    records = list(read_records(folder, progress))
    assert progress.newest.to_json() == records[-1].to_json()  # as text, in which nan is nan
    assert progress.epochs == len(records)
    assert progress.seconds == sum(record.seconds for record in records)
    assert progress.rollbacks == sum(len(record.rollbacks) for record in records)
    return records


def decided(history: list[EpochRecord]) -> list[EpochRecord]:
    """Records without what the clock decides."""
    return [
        dataclasses.replace(
            record,
            timestamp_ms=0,
            seconds=0.0,
            metrics={k: v for k, v in record.metrics.items() if k != "images_per_second"},
        )
        for record in history
    ]


def weights_of(net: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in net.state_dict().items():
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def moving(job: str) -> Config:
    """Three epochs in which the architecture changes."""
    return tiny(f"{job}.epochs=3", "search.max_pictures=300", "search.arch_lr=0.1", "search.batch_size=32")


def result_of(
    job: str, dataset: ImageDataset, folder: Path, watcher: Watcher
) -> tuple[list[EpochRecord], Genotype | str]:
    """Run a job that moves to its end: its history without times, what it found."""
    config = moving(job)
    if job == "search":
        history = search(config, dataset, folder, watcher)
        assert sum(r.metrics["recovery/support_changes"] for r in history) > 0, "no change to be lost"
        return decided(history), history[-1].found().genotype
    history = retrain(config, dataset, folder, watcher)
    return decided(history), weights_of(trained_network(config, GENOTYPE, dataset, folder))


class Nobody:
    """Store and observer of a rank that is not the first: whatever is called fails."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def fail(*_: Any) -> Any:
            raise AssertionError(f"{name} was called on a rank that is not the first")

        return fail
