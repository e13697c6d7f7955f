"""Cheap measurements of architectures in this process: with a search's shared weights, or by short trainings."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

from istanas.data import ImageDataset
from istanas.distributed import Ranks
from istanas.effects.coding import architecture
from istanas.search.judging import STATISTICS, measure_with_shared_weights
from istanas.search.measured import Planned
from istanas.settings import MeasuredSettings
from istanas.space import Genotype
from pipeline.config.schema import Config
from pipeline.training.build import settings_of
from pipeline.training.compute import compute_for
from pipeline.training.loop import searched_job
from pipeline.training.measurements import MeasurementJob

CALIBRATION_BATCHES = 20

Score = tuple[str, float, float]
"""Name of a judge, score (higher is better), and seconds."""


class SharedWeights:
    """The network of a finished search, which measures any architecture of the space.

    Args:
        config: The configuration of the search.
        dataset: Its pictures.
        folder: Folder of its checkpoints.
        epochs: Number of its epochs.

    Raises:
        CheckpointError: The last epoch's checkpoint is missing, damaged, or of another search.
    """

    names = tuple(f"shared weights, {statistics} statistics" for statistics in STATISTICS)

    def __init__(self, config: Config, dataset: ImageDataset, folder: Path, epochs: int) -> None:
        self._job = searched_job(config, dataset, folder, epochs)
        self._space = config.space.build()

    def measure(self, genotype: Genotype) -> Iterator[Score]:
        """Yield minus the loss with each kind of batch-norm statistics."""
        choosing = self._job.choosing()
        assert choosing is not None, "the caller has checked that there are pictures for choosing"
        measured = measure_with_shared_weights(
            self._job.search,
            self._space.supports(genotype),
            choosing,
            calibration_batches=CALIBRATION_BATCHES,
        )
        names, start = dict(zip(STATISTICS, self.names, strict=True)), time.perf_counter()
        for statistics, metrics in measured:
            now = time.perf_counter()
            yield names[statistics], -metrics.loss, now - start
            start = time.perf_counter()


class ShortTrainings:
    """The measurements of a search by measurements, at each of its fidelities.

    Args:
        config: A configuration with `method: measured`.
        dataset: The pictures.
    """

    def __init__(self, config: Config, dataset: ImageDataset) -> None:
        self._config, self._dataset = config, dataset
        self._compute = compute_for(config.runtime)
        settings = settings_of(config)
        assert isinstance(settings, MeasuredSettings)
        self._fidelities = sorted(set(settings.schedule(config.search.layers)))
        self.names = tuple(f"measurement of {fidelity}" for fidelity in self._fidelities)

    def measure(self, genotype: Genotype) -> Iterator[Score]:
        """Yield minus the loss after a training of each fidelity."""
        space = self._config.space.build()
        kept = architecture(space, space.supports(genotype))
        for name, fidelity in zip(self.names, self._fidelities, strict=True):
            job = MeasurementJob(self._config, self._dataset, self._compute, Ranks())
            start = time.perf_counter()
            metrics = job.measure(Planned(0, kept, fidelity))
            yield name, -metrics["valid/loss"] if metrics else -math.inf, time.perf_counter() - start
