"""The observer that records each epoch of a job: metrics, tables, MLflow and console."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from istanas.space import SearchSpace
from istanas.training import Metrics
from pipeline.base.text import count
from pipeline.jobs.opening import metrics_line
from pipeline.jobs.progress import EpochBar
from pipeline.jobs.search_tables import SearchTables, restored
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import CHECKPOINTS
from pipeline.tracking.tracker import Tracker
from pipeline.training.epoch_record import EpochRecord, Progress, read_progress, read_records


class RunObserver:
    """An observer that writes a job's events to the run directory first, then to MLflow and the console.

    Args:
        run: The run directory.
        tracker: The mirror in MLflow.
        bar: The progress bar.
        space: The space, for the tables of a search.
        describe: Returns the console's line about an epoch.
        on_epoch: Called after every epoch, and for every finished epoch when the run resumes.
        unit: What an epoch of the run is called.
    """

    def __init__(
        self,
        run: RunDir,
        tracker: Tracker,
        bar: EpochBar,
        space: SearchSpace,
        describe: Callable[[EpochRecord], str],
        on_epoch: Callable[[Progress], None] | None = None,
        unit: str = "epoch",
    ) -> None:
        self._run, self._tracker, self._bar, self._describe = run, tracker, bar, describe
        self._on_epoch, self._tables, self._unit = on_epoch, SearchTables(run.path, space), unit

    def note(self, text: str) -> None:
        self._bar.line(text)

    def resumed(self, progress: Progress, workers: int) -> None:
        # The epochs up to the checkpoint are kept; later ones are trained and measured again.
        lines = []

        def records() -> Iterator[EpochRecord]:
            for record in self._records(progress):
                lines.append(metrics_line(record))
                yield record

        self._restore_tables(records())
        self._run.replace_metrics(lines)
        self._tracker.deliver()
        if progress.last is not None:
            self._bar.line(f"resumed after {self._unit} {progress.epochs}")
            before = progress.last.workers
            if workers != before:
                self._bar.line(
                    f"{count(workers, 'worker')} instead of {before}: the global batch and the schedule stay the "
                    "same, but the result is no longer identical to that of an undisturbed run"
                )
            if self._on_epoch is not None:
                for earlier in read_progress(self._run.path / CHECKPOINTS, progress):
                    self._on_epoch(earlier)
        self._bar.begin(progress.epochs)

    def step(self, epoch: int, step: int, n_steps: int, read: Callable[[], Metrics | None]) -> None:
        self._bar.step(epoch, step, n_steps, read)

    def epoch_done(self, progress: Progress) -> None:
        new = progress.newest
        self._run.append_metrics(new.epoch, new.metrics, new.timestamp_ms)
        if not self._tables.append(new):
            self._restore_tables(self._records(progress))
        self._bar.epoch_line(self._describe(new), new.epoch)
        self._tracker.deliver()
        self._run.push()
        if self._on_epoch is not None:
            self._on_epoch(progress)

    def should_continue(self) -> bool:
        return True

    def trial_done(self, text: str, done: int, seconds_left: float) -> None:
        """Write the line of an ended trial, with the number of ended trials and the estimated time of the others."""
        self._bar.epoch_line(text, done, seconds_left)

    def deliver(self) -> None:
        """Deliver new contents of the run directory to MLflow."""
        self._tracker.deliver()

    def _restore_tables(self, records: Iterable[EpochRecord]) -> None:
        for file in self._tables.replace(records):
            self._bar.line(restored(file))

    def _records(self, progress: Progress) -> Iterator[EpochRecord]:
        return read_records(self._run.path / CHECKPOINTS, progress)
