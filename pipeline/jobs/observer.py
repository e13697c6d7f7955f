"""What a job does with each epoch: metrics, trajectory, MLflow and a line on the console."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from istanas.space import CellSpace
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
    """Writes what the worker reports: metrics to the run directory first, to MLflow second, a line to the console."""

    def __init__(
        self,
        run: RunDir,
        tracker: Tracker,
        bar: EpochBar,
        space: CellSpace,
        describe: Callable[[EpochRecord], str],
        tell: Callable[[Progress], None] | None = None,
    ) -> None:
        self._run, self._tracker, self._bar, self._describe = run, tracker, bar, describe
        self._tell, self._tables = tell, SearchTables(run.path, space)

    def note(self, text: str) -> None:
        self._bar.line(text)

    def resumed(self, progress: Progress, workers: int) -> None:
        # The checkpoint decides: what was measured after it will be measured again, what it holds is not lost.
        lines = []

        def records() -> Iterator[EpochRecord]:
            for record in self._records(progress):
                lines.append(metrics_line(record))
                yield record

        self._restore_tables(records())
        self._run.replace_metrics(lines)
        self._tracker.deliver()
        if progress.last is not None:
            self._bar.line(f"resumed after epoch {progress.epochs}")
            before = progress.last.workers
            if workers != before:
                self._bar.line(
                    f"{count(workers, 'worker')} instead of {before}: the same global batch and schedule, but no "
                    "longer bit for bit the run that it would have been"
                )
            if self._tell is not None:
                for then in read_progress(self._run.path / CHECKPOINTS, progress):
                    self._tell(then)
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
        if self._tell is not None:
            self._tell(progress)

    def go_on(self) -> bool:
        return True

    def trial_done(self, text: str, done: int, seconds_left: float) -> None:
        """Write the line of a trial that has ended, the last of `done`, with the time that the others will take."""
        self._bar.epoch_line(text, done, seconds_left)

    def deliver(self) -> None:
        """Bring MLflow up to date with what else was written to the run directory."""
        self._tracker.deliver()

    def _restore_tables(self, records: Iterable[EpochRecord]) -> None:
        for file in self._tables.replace(records):
            self._bar.line(restored(file))

    def _records(self, progress: Progress) -> Iterator[EpochRecord]:
        return read_records(self._run.path / CHECKPOINTS, progress)
