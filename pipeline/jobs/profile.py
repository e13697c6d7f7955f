"""A profile of a job's training steps: time by operation, share of peak performance, and the duration of a run.

The steps run in this process on the real pictures. Nothing is written to a run directory or to MLflow.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
from rich.console import Console
from rich.table import Table

from istanas.data import Batch, ImageDataset
from istanas.data.mixing import mixing
from istanas.distributed import Ranks
from istanas.space import Genotype
from istanas.training import Compute, Totals, derive_seed, evaluate, set_learning_rate, train_target_step
from pipeline.base.files import writable_file
from pipeline.base.text import duration
from pipeline.config.keys import value_at
from pipeline.config.schema import Config
from pipeline.jobs.context import say_pictures, say_to
from pipeline.jobs.lifecycle import check_data, load_data, settled
from pipeline.runs.record import data_label
from pipeline.training.build import build_retraining, build_search, ema_model
from pipeline.training.compute import compiled, compute_for, describe_place
from pipeline.training.data_checks import warnings_of
from pipeline.training.data_workers import report_lost_workers
from pipeline.training.pictures import (
    Batches,
    describe_pictures,
    retrain_augmentation,
    search_augmentation,
)
from pipeline.training.profiling import (
    Train,
    Waiting,
    as_data,
    count_flops,
    peak_flops,
    seconds_of,
    step_seconds,
    time_by_kind,
)
from pipeline.training.splits import splits_of

WARM_UP = 2  # unmeasured steps, which allocate memory and choose kernels


@dataclass(frozen=True)
class Plan:
    """The amounts of work in a whole run.

    Args:
        epochs: Number of training epochs.
        steps_per_epoch: Number of training steps in an epoch.
        recoveries: Number of recoveries of all nodes' codes.
        measured_pictures: Number of forward passes in evaluation mode, over all epochs.
        upper_bound: Whether the run may be shorter.
    """

    epochs: int
    steps_per_epoch: int
    recoveries: int
    measured_pictures: int
    upper_bound: bool

    def seconds(self, per_step: float, per_recovery: float, per_picture: float) -> float:
        """Return the duration of the run.

        epochs * steps_per_epoch * per_step + recoveries * per_recovery + measured_pictures * per_picture

        Example:
            >>> Plan(2, 10, 3, 100, False).seconds(0.5, 0.1, 0.001)
            10.4
        """
        training = self.epochs * self.steps_per_epoch * per_step
        return training + self.recoveries * per_recovery + self.measured_pictures * per_picture


@dataclass(frozen=True)
class Work:
    """The parts of a job that are measured.

    Args:
        train: See `pipeline.training.profiling.Train`.
        waiting: The time that `train` has waited for pictures.
        pictures_per_step: Number of pictures in the forward and backward pass of a step.
        measure: Evaluates one batch of training pictures.
        pictures_measured: Number of pictures in that batch.
        recover: Recovers the codes of all nodes; None for a retraining.
        plan: The amounts of work in the whole run.
    """

    train: Train
    waiting: Waiting
    pictures_per_step: int
    measure: Callable[[], object]
    pictures_measured: int
    recover: Callable[[], object] | None
    plan: Plan


class MeasuredSteps(NamedTuple):
    """The times of a job's steps.

    Args:
        seconds: Seconds of a training step, the median.
        waiting_share: Share of the training steps' time in which this process waits for the next batch (data time), in
            [0, 1]. It includes augmentation in this process.
        seconds_per_picture: Seconds of an evaluated picture.
    """

    seconds: float
    waiting_share: float
    seconds_per_picture: float


class ProjectionResult(TypedDict):
    """The terms of `Plan.seconds` and their sum, without the time of checkpoints, figures and MLflow."""

    epochs: int
    steps_per_epoch: int
    seconds_per_step: float
    recoveries: int
    seconds_per_recovery: float
    measured_pictures: int
    seconds_per_measured_picture: float
    seconds: float
    upper_bound: bool


class ProfileResult(TypedDict):
    """What `--json` prints. FLOPs count convolutions and matrix products; a multiply-add is two."""

    job: str
    method: str
    dataset: str
    device: str
    dtype: str
    threads: int
    steps: int
    seconds_per_step: float
    waiting_share: float  # see `MeasuredSteps`
    pictures_per_step: int
    pictures_per_second: float
    flops_per_step: int
    flops_per_second: float
    peak_flops_per_second: float
    peak_share: float
    clock: str  # clock of the kinds' times: cpu or cuda
    kinds: list[dict[str, Any]]  # see `pipeline.training.profiling.KindTime`
    projection: ProjectionResult
    trace: NotRequired[str]


def run_profile(
    config: Config, *, genotype: Genotype | None, steps: int, trace: Path | None, console: Console
) -> ProfileResult:
    """Measure a few steps of a search, or of the retraining of a genotype.

    Args:
        config: The whole configuration; its method selects the search. Workers and address are not used.
        genotype: The cells to retrain; None profiles a search.
        steps: Number of steps that are timed, and of steps that are profiled; >= 1.
        trace: File for the Chrome trace of the last profiled step.
        console: Where lines for the user are written.

    Returns:
        See `ProfileResult`.

    Raises:
        ConfigError: The trace cannot be written, or the settings do not fit the pictures or this machine.
    """
    target = None if trace is None else writable_file(trace, "trace")
    job = "search" if genotype is None else "retrain"
    say = say_to(console)
    at_once = config.search.trials_at_once
    config = settled(_one_at_a_time(config), console)
    dataset = load_data(config, console)
    check_data(config, dataset, (job,))
    say_pictures(
        [*describe_pictures(config, dataset, (), (job,)), *warnings_of(config, dataset, (job,))], say
    )
    compute = compute_for(config.runtime)
    work = make_work(config, dataset, compute, genotype)
    say(f"{describe_place(compute, Ranks())}: {WARM_UP} + {2 * steps + 2} training steps")
    if config.runtime.worker_range.maximum > 0:
        say(
            f"measured and projected for one process; runtime.workers is {config.runtime.workers}: "
            "workers share each step"
        )
    if genotype is None and at_once > 1:
        say(
            f"measured and projected for one process; search.max_concurrent is {at_once}: "
            "that many architectures are trained at the same time"
        )
    torch.manual_seed(derive_seed(config.seed, "epoch", 0))
    device = compute.device

    with report_lost_workers(config.runtime.data_workers):
        per_step, waiting_share, per_picture = measure_steps(work, steps, device)
        flops = count_flops(lambda: work.train(1, lambda: None))
        dtype = compute.autocast_dtype or torch.float32
        peak = peak_flops(device, dtype)
        kinds, clock = time_by_kind(work.train, steps, device, target)
    result: ProfileResult = {
        "job": job,
        "method": config.method,
        "dataset": data_label(config.data.name, config.data.root),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "steps": steps,
        "seconds_per_step": per_step,
        "waiting_share": waiting_share,
        "pictures_per_step": work.pictures_per_step,
        "pictures_per_second": work.pictures_per_step / per_step,
        "flops_per_step": flops,
        "flops_per_second": flops / per_step,
        "peak_flops_per_second": peak,
        "peak_share": flops / per_step / peak,
        "clock": clock,
        "kinds": [asdict(kind) for kind in kinds],
        "projection": projection_of(work, per_step, per_picture, device),
    }
    return {**result, "trace": str(trace)} if trace is not None else result


def measure_steps(work: Work, steps: int, device: torch.device) -> MeasuredSteps:
    """Measure training steps and the evaluation of pictures, after a warm-up of both.

    Args:
        work: The job.
        steps: Number of steps to measure, >= 1.
        device: Its device.
    """
    work.train(WARM_UP, lambda: None)
    work.waiting.seconds = 0.0
    seconds = step_seconds(work.train, steps, device)
    waiting_share = min(work.waiting.seconds / sum(seconds), 1.0)
    work.measure()
    per_picture = seconds_of(work.measure, device) / work.pictures_measured
    return MeasuredSteps(statistics.median(seconds), waiting_share, per_picture)


def projection_of(work: Work, per_step: float, per_picture: float, device: torch.device) -> ProjectionResult:
    """Return the projection of the whole run. A recovery is measured last, because it changes the supernet.

    Args:
        work: The job, which has not recovered any code yet.
        per_step, per_picture: See `measure_steps`.
        device: Its device.
    """
    # Called once: building the search was the warm-up, and a second call would start from the supports of the first.
    per_recovery = 0.0 if work.recover is None else seconds_of(work.recover, device)
    return {
        **asdict(work.plan),  # type: ignore[typeddict-item]
        "seconds_per_step": per_step,
        "seconds_per_recovery": per_recovery,
        "seconds_per_measured_picture": per_picture,
        "seconds": work.plan.seconds(per_step, per_recovery, per_picture),
    }


def make_work(
    config: Config, dataset: ImageDataset, compute: Compute, genotype: Genotype | None = None
) -> Work:
    """Build a job in its initial state.

    Args:
        config: The whole configuration.
        dataset: The data set, as `open_dataset` returns it.
        compute: Device and precision.
        genotype: The cells to retrain; None builds a search.

    Raises:
        ConfigError: The settings do not fit the pictures.
    """
    if genotype is not None:
        return _retraining(config, dataset, compute, genotype)
    return _search(config, dataset, compute)


def _one_at_a_time(config: Config) -> Config:
    """Return the configuration of a search whose trainings all run in this process."""
    if config.search.trials_at_once == 1:
        return config
    return config.model_copy(update={"search": config.search.model_copy(update={"max_concurrent": 1})})


def _search(config: Config, dataset: ImageDataset, compute: Compute) -> Work:
    """Build a search; epochs that train the found network are projected with the time of a search step."""
    s, splits = config.search, splits_of(config, dataset, "search")
    training, alphas = splits.training, splits.alphas
    search = build_search(config, dataset, compute, Ranks())
    batches = Batches(config, dataset, compute, Ranks(), s.batch_size, search_augmentation(config))
    waiting = Waiting()
    for_weights = _endless(batches, "weights", training, s.batch_size, waiting)
    for_alphas = (
        itertools.repeat(None)
        if alphas is None
        else _endless(batches, "alphas", alphas, s.batch_size, waiting)
    )

    def train(steps: int, done: Callable[[], None]) -> None:
        _to_training_mode(search.supernet)
        for _ in range(steps):
            search.train_step(next(for_weights), next(for_alphas))
            done()

    measured = training if alphas is None else alphas
    sample = measured[: _measuring_size(s.batch_size)]
    n_epochs = s.max_epochs
    return Work(
        train=train,
        waiting=waiting,
        pictures_per_step=sum(
            min(s.batch_size, len(part)) for part in (training, alphas) if part is not None
        ),
        measure=lambda: search.validate(batches.measuring("train", sample)),
        pictures_measured=len(sample),
        recover=search.finish_epoch,
        plan=Plan(
            epochs=n_epochs,
            steps_per_epoch=len(batches.training("weights", training, 0)),
            recoveries=value_at(config, "search.max_search_epochs") or n_epochs,
            measured_pictures=(
                _measured(
                    config, dataset, n_epochs, value_at(config, "search.train_epochs") or 0, s.test_interval
                )
                if alphas is None
                else n_epochs * len(alphas)
            ),
            # The search may end earlier.
            upper_bound=value_at(config, "search.termination_tol") is not None,
        ),
    )


def _retraining(config: Config, dataset: ImageDataset, compute: Compute, genotype: Genotype) -> Work:
    r, indices = config.retrain, splits_of(config, dataset, "retrain").training
    net, optimizer = build_retraining(config, genotype, dataset, compute)
    net.drop_path_prob = r.drop_path / 2  # its mean over the run
    batches = Batches(config, dataset, compute, Ranks(), r.batch_size, retrain_augmentation(config))
    waiting = Waiting()
    stream = _endless(batches, "retrain", indices, r.batch_size, waiting)
    totals, mix = Totals(compute.device), mixing(r.mixup, r.cutmix, dataset.num_classes)
    ema = ema_model(net, r.ema_decay) if r.ema_decay > 0 else None
    forward = compiled(config.runtime, compute, net.forward_with_auxiliary)
    set_learning_rate(optimizer, r.lr)

    def train(steps: int, done: Callable[[], None]) -> None:
        _to_training_mode(net)
        for _ in range(steps):
            train_target_step(
                forward,
                optimizer,
                next(stream),
                compute,
                totals,
                auxiliary_weight=r.auxiliary_weight,
                label_smoothing=r.label_smoothing,
                grad_clip=r.grad_clip,
                mix=mix,
            )
            if ema is not None:
                ema.update_parameters(net)
            done()

    sample = indices[: _measuring_size(r.batch_size)]
    return Work(
        train=train,
        waiting=waiting,
        pictures_per_step=min(r.batch_size, len(indices)),
        measure=lambda: evaluate(net.eval(), batches.measuring("train", sample), compute),
        pictures_measured=len(sample),
        recover=None,
        plan=Plan(
            epochs=r.epochs,
            steps_per_epoch=len(batches.training("retrain", indices, 0)),
            recoveries=0,
            measured_pictures=_measured(config, dataset, r.epochs, r.epochs, r.test_every),
            upper_bound=False,
        ),
    )


def _to_training_mode(net: torch.nn.Module) -> None:
    """Switch to training mode if needed. A real job does so once an epoch, not in every step."""
    if not net.training:
        net.train()


def _endless(
    batches: Batches, purpose: str, indices: torch.Tensor, size: int, waiting: Waiting | None = None
) -> Iterator[Batch]:
    """Yield full batches, epoch after epoch, so that the times of the steps are comparable."""
    full = indices[: max(len(indices) // size * size, min(size, len(indices)))]
    passes = (batches.training(purpose, full, epoch) for epoch in itertools.count())
    return as_data(itertools.chain.from_iterable(passes), waiting)


def _measuring_size(batch_size: int) -> int:
    """Return the number of pictures in one batch of `Batches.measuring`."""
    return max(batch_size, 256)


def _measured(config: Config, dataset: ImageDataset, epochs: int, tested_epochs: int, test_every: int) -> int:
    """Return how many pictures a run measures: the hold-out in each epoch, the test split every `test_every` epochs."""
    holdout = splits_of(config, dataset, "retrain").holdout  # that of a search is the same
    n_tests = max(math.ceil(tested_epochs / test_every), 1) if test_every > 0 else 0
    return epochs * (0 if holdout is None else len(holdout)) + n_tests * len(dataset.test)


def print_profile(result: ProfileResult, console: Console) -> None:
    """Print two tables: the kinds of operation, and the figures."""
    kinds = Table(title=f"{result['steps']} profiled steps, {result['clock']} time")
    kinds.add_column("kind of operation")
    for heading in ("share", "ms per step", "calls per step"):
        kinds.add_column(heading, justify="right")
    for kind in result["kinds"]:
        milliseconds = f"{1000 * kind['seconds_per_step']:.2f}"
        kinds.add_row(kind["kind"], f"{kind['share']:.1%}", milliseconds, f"{kind['calls_per_step']:.0f}")
    console.print(kinds)

    p = result["projection"]
    measured = p["measured_pictures"] * p["seconds_per_measured_picture"]
    recovered = p["recoveries"] * p["seconds_per_recovery"]
    figures = Table("figure", "value")
    for label, value in (
        ("seconds per step (median)", f"{result['seconds_per_step']:.4g}"),
        ("pictures/s", f"{result['pictures_per_second']:,.1f}"),
        ("share of a step that waits for pictures", f"{result['waiting_share']:.1%}"),
        ("FLOPs per step", _scaled(result["flops_per_step"], "FLOP")),
        ("achieved", _scaled(result["flops_per_second"], "FLOP/s")),
        (
            f"matrix product, {result['dtype']}, {result['device']}",
            _scaled(result["peak_flops_per_second"], "FLOP/s"),
        ),
        ("share of the matrix product", f"{result['peak_share']:.1%}"),
        ("training steps of the run", f"{p['epochs']:,} epochs x {p['steps_per_epoch']:,}"),
        ("its validation and tests", duration(measured)),
        *([("its recoveries", duration(recovered))] if p["recoveries"] else []),
        (f"the whole run{', at most' if p['upper_bound'] else ''}", duration(p["seconds"])),
    ):
        figures.add_row(label, value)
    console.print(figures)
    if "trace" in result:
        say_to(console)(f"trace: {result['trace']}")


def _scaled(value: float, unit: str) -> str:
    """Return a number with an SI prefix.

    Example:
        >>> _scaled(3.2e9, "FLOP"), _scaled(12, "FLOP/s")
        ('3.2 GFLOP', '12 FLOP/s')
    """
    power = min(max(int(math.log10(max(value, 1)) // 3), 0), 5)
    return f"{value / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P')[power]}{unit}"
