"""The progress of a job: one bar with loss, accuracies and time left, and a line for each epoch.

A log file has no bar. Its lines include the progress, and a long epoch writes a line every few minutes.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from istanas.training import Metrics
from pipeline.base.text import duration

# Reading the figures in the bar at every step would slow down training.
SECONDS_BETWEEN_READINGS = 0.5
SECONDS_BETWEEN_SIGNS = 120.0  # between two lines in a log file during a long epoch


def draws_bars(console: Console) -> bool:
    """Return whether a console can draw a progress bar: a terminal, or a notebook in which ipywidgets is installed."""
    return console.is_terminal or (console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None)


class EpochBar:
    """A progress bar over all steps of a job; in a pipe or a log file, it writes lines instead.

    Args:
        console: Where to draw.
        label: "search", "retrain", "sweep", "benchmark", "rank" or "versus".
        epochs: Number of epochs, or trials, of the whole job.
        unit: What is counted.
        clock: Returns the time in seconds.
        seconds_between_readings: Shortest time between two readings of the figures in the bar.
    """

    def __init__(
        self,
        console: Console,
        label: str,
        epochs: int,
        unit: str = "epoch",
        *,
        clock: Callable[[], float] = time.monotonic,
        seconds_between_readings: float = SECONDS_BETWEEN_READINGS,
    ) -> None:
        self._console, self._label, self._epochs, self._unit = console, label, epochs, unit
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            transient=True,
            disable=not draws_bars(console),
        )
        self._task = self._progress.add_task(label, total=None, figures="")
        self._clock, self._seconds_between_readings = clock, seconds_between_readings
        self._read = 0.0
        self._start = self._last_line = clock()
        self._before: int | None = None  # epochs that were done when this process started

    def __enter__(self) -> EpochBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, done: int) -> None:
        """Start the estimate of the time left. It is called after the setup of the job, when `done` epochs are done."""
        self._before, self._start = done, self._clock()

    def step(self, epoch: int, step: int, n_steps: int, read: Callable[[], Metrics | None]) -> None:
        """Advance the bar; `epoch` counts from 0, `step` from 1. `read` returns the epoch's figures so far, or None."""
        if self._before is None:
            self._before = epoch
        if self._progress.disable:
            self._sign_of_life(epoch, step, n_steps, read)
            return
        update: dict[str, object] = {}
        now = self._clock()
        if now - self._read > self._seconds_between_readings:
            self._read = now
            if (m := read()) is not None:
                top5 = "" if m.top5 is None else f"  top-5 {100 * m.top5:.1f} %"
                update["figures"] = f"loss {m.loss:.3f}  top-1 {100 * m.top1:.1f} %{top5}"
        self._progress.update(
            self._task,
            description=f"{self._label} {self._unit} {epoch + 1}/{self._epochs}",
            total=self._epochs * n_steps,
            completed=epoch * n_steps + step,
            **update,  # type: ignore[arg-type]
        )

    def epoch_line(self, text: str, done: int, seconds_left: float | None = None) -> None:
        """Write the line of an ended epoch or trial; in a log file, it includes the progress of the job.

        Args:
            text: The line; further lines may follow it.
            done: How many epochs or trials have ended.
            seconds_left: Estimated time of the others; None estimates it from the epochs of this process.
        """
        if self._before is None:
            self._before = done - 1
        if self._progress.disable:
            first, newline, rest = text.partition("\n")
            left = self._left(done) if seconds_left is None else f"about {duration(seconds_left)}"
            left = "" if done >= self._epochs else f", {left} left"
            text = f"{first} ({self._unit} {done}/{self._epochs}{left}){newline}{rest}"
        self.line(text)

    def _sign_of_life(self, epoch: int, step: int, n_steps: int, read: Callable[[], Metrics | None]) -> None:
        """Write a line to the log file during a long epoch."""
        if self._clock() - self._last_line < SECONDS_BETWEEN_SIGNS or step == n_steps:
            return
        m = read()
        figures = "" if m is None else f", loss {m.loss:.3f}, top-1 {100 * m.top1:.1f} %"
        left = self._left(epoch + step / n_steps)
        self.line(
            f"{self._unit} {epoch + 1}/{self._epochs}: step {step} of {n_steps}{figures}, about {left} left"
        )

    def _left(self, done: float) -> str:
        """Return the estimated time left, from the epochs of this process."""
        assert self._before is not None
        seconds = (self._clock() - self._start) / max(done - self._before, 1e-9) * (self._epochs - done)
        return duration(seconds)

    def line(self, text: str) -> None:
        """Write a permanent line."""
        self._last_line = self._clock()
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)
