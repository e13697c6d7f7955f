"""The measurements of a search that trains several architectures at a time, each in the process of a trial."""

from __future__ import annotations

import json
import time
from typing import NamedTuple

from istanas.data import ImageDataset
from istanas.distributed import Ranks
from istanas.errors import CheckpointError
from istanas.search.measured import MeasuredSearch, Planned
from istanas.training import Metrics
from pipeline.config.schema import Config
from pipeline.training.compute import compute_for
from pipeline.training.data_workers import report_lost_workers
from pipeline.training.epochs import EpochResult, SearchJob
from pipeline.training.loop import seed_epoch
from pipeline.training.pictures import check_fit


class Measured(NamedTuple):
    """The result of a trial.

    Args:
        metrics: The metrics of the last epoch of the training, as in an epoch's record; empty if it has diverged.
        seconds: Duration of the training and the validation.
    """

    metrics: dict[str, float]
    seconds: float

    def to_json(self) -> str:
        """Return the result as text with exact numbers.

        Example:
            >>> Measured.from_json(Measured({"valid/loss": 0.1}, 2.5).to_json())
            Measured(metrics={'valid/loss': 0.1}, seconds=2.5)
        """
        return json.dumps(self)

    @classmethod
    def from_json(cls, text: str) -> Measured:
        """Return the result from the text that `to_json` has written."""
        return cls(*json.loads(text))


class MeasurementJob(SearchJob):
    """A search whose measurements are made by trials.

    In a trial's process it makes one, and in the search's own process it receives those that are finished.
    """

    search: MeasuredSearch

    def measure(self, planned: Planned) -> dict[str, float]:
        """Train and measure an architecture, and return the metrics of its last epoch; {} if it has diverged."""
        self.search.hold(planned)
        metrics: dict[str, float] = {}
        while not self.search.is_measured:
            epoch = self.search.picture_epoch(self.search.epoch)
            seed_epoch(self._config, epoch, self._ranks)
            metrics = self._train_and_validate(epoch, lambda *_: None, 1.0)
        return metrics

    def receive(self, epoch: int, planned: Planned, metrics: dict[str, float]) -> EpochResult:
        """Add a measurement to the search, and return the result of this epoch of the search.

        Args:
            epoch: Number of measurements before.
            planned: The measurement.
            metrics: What `measure` has returned for it.

        Raises:
            DivergedError: If all measurements of the balanced design have diverged.
        """
        measured = Metrics(metrics["valid/loss"], metrics["valid/top1"], 0) if metrics else None
        report = self.search.receive(planned, measured)
        return self._result(epoch, metrics, self.search.trained_genotype(), report, searching=True)


def measure(config: Config, dataset: ImageDataset, digest: str, planned: Planned) -> Measured:
    """Make a measurement in this process.

    Args:
        config: The configuration of the search, with the resources of this process.
        dataset: The data set.
        digest: Digest of the training pictures of the search.
        planned: The measurement.

    Raises:
        CheckpointError: If this process has other pictures than the search.
        ConfigError: If the settings do not fit them.
    """
    if dataset.train_digest != digest:
        raise CheckpointError(
            f"data set {dataset.name} differs from that of the search",
            remedy="copy the same data to all nodes",
        )
    check_fit(config, dataset, ("search",))
    compute = compute_for(config.runtime)
    job = MeasurementJob(config, dataset, compute, Ranks())
    start = time.perf_counter()
    with report_lost_workers(config.runtime.data_workers):
        metrics = job.measure(planned)
    return Measured(metrics, time.perf_counter() - start)
