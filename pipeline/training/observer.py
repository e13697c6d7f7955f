"""The events of a training job, and the protocol that receives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from istanas.training import Metrics
from pipeline.training.epoch_record import Progress


class Observer(Protocol):
    """A receiver of a job's progress events."""

    def note(self, text: str) -> None:
        """Receive a line for the user."""

    def resumed(self, progress: Progress, workers: int) -> None:
        """Receive the progress in the checkpoint, before the first epoch of these `workers` workers."""

    def step(self, epoch: int, step: int, n_steps: int, read: Callable[[], Metrics | None]) -> None:
        """Receive the number of a finished training step (epochs count from 0, steps from 1).

        `read` returns the epoch's metrics so far; on a GPU it returns None, because reading them would synchronise.
        """

    def epoch_done(self, progress: Progress) -> None:
        """Receive the progress after an epoch, whose record is `progress.last` and whose checkpoint is written."""

    def should_continue(self) -> bool:
        """Return whether these workers continue after an epoch; otherwise, other workers resume the job."""


class Silent:
    """An observer that ignores all events, for every rank but the first."""

    def note(self, text: str) -> None:
        pass

    def resumed(self, progress: Progress, workers: int) -> None:
        pass

    def step(self, epoch: int, step: int, n_steps: int, read: Callable[[], Metrics | None]) -> None:
        pass

    def epoch_done(self, progress: Progress) -> None:
        pass

    def should_continue(self) -> bool:
        return True
