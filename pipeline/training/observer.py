"""Who is told how the training goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from istanas.training import Metrics
from pipeline.training.epoch_record import Progress


class Observer(Protocol):
    """Who wants to know how a job goes."""

    def note(self, text: str) -> None:
        """Called with a line for people."""

    def resumed(self, progress: Progress, workers: int) -> None:
        """Called before the first epoch of `workers` workers, with what the checkpoint says is done."""

    def step(self, epoch: int, step: int, n_steps: int, read: Callable[[], Metrics | None]) -> None:
        """Called after every training step (epochs from 0, steps from 1).

        `read` gives the epoch's figures so far, or None where that would make the device wait: on a GPU.
        """

    def epoch_done(self, progress: Progress) -> None:
        """Called after every epoch, its checkpoint written; the last record is the epoch's."""

    def go_on(self) -> bool:
        """Called after every epoch; False ends these workers' part of the job here, for others to go on."""


class Silent:
    """The observer of every rank but the first."""

    def note(self, text: str) -> None:
        pass

    def resumed(self, progress: Progress, workers: int) -> None:
        pass

    def step(self, epoch: int, step: int, n_steps: int, read: Callable[[], Metrics | None]) -> None:
        pass

    def epoch_done(self, progress: Progress) -> None:
        pass

    def go_on(self) -> bool:
        return True
