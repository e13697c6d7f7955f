"""A two-stage search on a GPU: pictures per second, GPU-days of the published run, the GPU's share of the time.

    python -m tests.benchmarks.gpu

The data set (random pictures, with CIFAR-10's size) is on the device; precision, layout and optimisers are a job's.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from istanas.data import ArrayPictures, Batch, ImageDataset
from istanas.distributed import Ranks
from istanas.search import TwoStageSearch
from istanas.training import Compute
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.training.build import build_search
from pipeline.training.compute import compute_for
from pipeline.training.pictures import Batches, search_augmentation
from pipeline.training.splits import splits_of

# The published run: epochs, and pictures for the weights per epoch; there are as many for the alphas.
EPOCHS, PICTURES = 50, 25_000
PAPER_SECONDS = 4320  # on a GTX 1080 Ti: Yang et al., NeurIPS 2020
PROFILED_STEPS = 10


@dataclass(frozen=True)
class Speed:
    """The speed of a search on a device.

    Args:
        pictures_per_second: Pictures in training, for weights and alphas together.
        validated_per_second: Pictures in validation.
        recovery_seconds: Seconds of one recovery of all codes.
        computing_share: Seconds in the device's kernels over seconds of a training step, in [0, 1] on a GPU; on a CPU,
            seconds in operators, which the profiler slows.
    """

    pictures_per_second: float
    validated_per_second: float
    recovery_seconds: float
    computing_share: float

    @property
    def projected_seconds(self) -> float:
        """Seconds of the published run, in which every epoch trains on all pictures, validates and recovers.

        >>> Speed(25_000.0, 25_000.0, 1.0, 0.5).projected_seconds
        200.0
        """
        epoch = 2 * PICTURES / self.pictures_per_second + PICTURES / self.validated_per_second
        return EPOCHS * (epoch + self.recovery_seconds)


def random_pictures(n: int, side: int = 32, classes: int = 10) -> ImageDataset:
    """Return a data set of n random training pictures, (3, side, side) bytes, in classes of equal size."""
    images = torch.randint(
        256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    pictures = ArrayPictures(images, torch.arange(n) % classes)
    return ImageDataset(
        name="random",
        class_names=tuple(map(str, range(classes))),
        train=pictures,
        test=ArrayPictures(images[:classes], torch.arange(classes)),
        channels=3,
        height=side,
        width=side,
        mean=(0.5,) * 3,
        std=(0.29,) * 3,
        digest="",
    )


class Loop:
    """A job's search and batches, without reports and files.

    Args:
        config: The search's configuration.
        dataset: The loaded data set.
        compute: The result of `compute_for`.
    """

    def __init__(self, config: Config, dataset: ImageDataset, compute: Compute) -> None:
        ranks = Ranks()
        self.compute, self.batch_size = compute, config.search.batch_size
        self.search: TwoStageSearch = build_search(config, dataset, compute, ranks)
        self.splits = splits_of(config, dataset, "search")
        self.batches = Batches(config, dataset, compute, ranks, self.batch_size, search_augmentation(config))

    def train(self, n_steps: int | None = None) -> int:
        """An epoch's first steps (None: all with a full batch); returns how many pictures they took."""
        epoch = self.search.epoch
        batches: Iterable[Batch] = self.batches.training("weights", self.splits.training, epoch)
        steps = len(self.splits.training) // self.batch_size if n_steps is None else n_steps
        metrics = self.search.train_epoch(
            itertools.islice(batches, steps),
            lambda: self.batches.training("alphas", self.splits.alpha_half(), epoch),
            steps,
        )
        return 2 * metrics.count

    def validate(self) -> int:
        """The alpha half; returns how many pictures it has."""
        return self.search.validate(self.batches.measuring("train", self.splits.alpha_half())).count

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.compute.device.type == "cuda":
            torch.cuda.synchronize()


def computing_seconds(events: Sequence[FunctionEvent], device: torch.device) -> float:
    """Return the profiled seconds in kernels (GPU, where all run in one stream) or operators (CPU)."""
    if device.type == "cpu":
        return 1e-6 * sum(e.self_cpu_time_total for e in events)
    # Annotations, such as an optimiser's step, span kernels that are already counted.
    return 1e-6 * sum(
        e.self_device_time_total
        for e in events
        if e.device_type == DeviceType.CUDA and not e.is_user_annotation
    )


def measure(loop: Loop) -> Speed:
    """Measure training and validation after a warm-up, then profiled steps, then a recovery.

    The architecture is the same up to the recovery, so that cuDNN's benchmarks for it are part of the warm-up.
    """

    def rate(work: Callable[[], int]) -> float:
        loop.synchronize()
        start = time.perf_counter()
        pictures = work()
        loop.synchronize()
        return pictures / (time.perf_counter() - start)

    loop.train(PROFILED_STEPS)
    loop.validate()
    trained, validated = rate(loop.train), rate(loop.validate)

    gpu = [ProfilerActivity.CUDA] if loop.compute.device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *gpu]) as profiled:
        pictures = loop.train(PROFILED_STEPS)
        loop.synchronize()
    # The profiler slows everything except kernels, so their time is divided by the unprofiled wall time.
    share = computing_seconds(profiled.events() or (), loop.compute.device) / (pictures / trained)

    recovered = rate(lambda: len(loop.search.recover().nodes))
    return Speed(trained, validated, len(loop.search.places) / recovered, share)


def published(batch_size: int) -> Config:
    """Return the published search's configuration: 16 channels, 8 layers, 50 epochs; crop and flip."""
    settings = [f"search.batch_size={batch_size}", "data.crop_padding=4", "data.horizontal_flip=true"]
    config = load(None, settings)
    assert config.method == "two_stage"
    return config


def main() -> None:
    """Print the figures for a batch of 64, as in the table of `make bench`, and for the published batch."""
    if not torch.cuda.is_available():
        print("tests.benchmarks.gpu: skipped, torch finds no CUDA device here")
        return
    dataset = random_pictures(2 * PICTURES)
    for batch_size in (64, 256):
        config = published(batch_size)
        compute = compute_for(config.runtime)
        torch.cuda.reset_peak_memory_stats()
        speed = measure(Loop(config, dataset, compute))
        seconds = speed.projected_seconds
        print(
            f"{torch.cuda.get_device_name()}, {config.search.init_channels} channels, {config.search.layers} layers, "
            f"batch {batch_size}, {compute.autocast_dtype or torch.float32}:\n"
            f"  training    {speed.pictures_per_second:,.0f} pictures/s\n"
            f"  validation  {speed.validated_per_second:,.0f} pictures/s\n"
            f"  recovery    {1e3 * speed.recovery_seconds:.1f} ms\n"
            f"  published run of {EPOCHS} epochs: {seconds:,.0f} s, {seconds / 86_400:.4f} GPU-days "
            f"(paper: {PAPER_SECONDS:,} s, {PAPER_SECONDS / 86_400:.4f}, on a GTX 1080 Ti)\n"
            f"  the GPU computes {100 * speed.computing_share:.0f} % of the time\n"
            f"  peak memory {torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
