"""Settings of the built-in search methods. The defaults are the published ones, if there are any.

A settings class is a dataclass whose fields are the keys of the section `search` of a configuration. Its annotations
hold types and ranges, and its docstring describes each field: the schema, `istanas config --describe` and the reference
are generated from them. This module does not import torch, because the command line must start quickly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen

Matrix = Literal["uniform", "gaussian"]
"""Distributions of a measurement matrix, see `istanas.sparse.measurement_matrix`."""

Solver = Literal["homotopy", "ista", "fista", "clarabel", "mosek"]
"""Solvers of the LASSO, see `istanas.sparse.recover`."""

Schedule = Literal["cosine", "linear", "linear_by_epoch"]
"""Schedules of the learning rate, see `istanas.training.learning_rate`."""

Stem = Literal["auto", "cifar", "imagenet"]
"""First layers of a network, see `istanas.nets.skeleton.Stem`."""

Statistics = Literal["batch", "recalibrated", "running"]
"""Statistics that batch norm uses to measure an architecture, see `RandomNasSettings`."""

LEAST_LAYERS = 3  # With fewer, the DARTS space would have no normal cell.
CLOSING_EPOCHS = 1
"""Epochs of a one-stage search after its last node has frozen.

The published loop notices the end of its search only after it has trained the next epoch, at the search's learning rate
and without drop path.
"""


@dataclass(frozen=True)
class Unit:
    """The unit of a number, which descriptions show beside its range."""

    name: str


PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Epochs = Annotated[int, Ge(1), Unit("epochs")]
EpochsFromZero = Annotated[int, Ge(0), Unit("epochs")]
Pixels = Annotated[int, Ge(0), Unit("pixels")]
BatchSize = Annotated[int, Ge(2), Unit("pictures")]
Stage = Annotated[tuple[PositiveInt, ...], MinLen(2), MaxLen(3)]
"""Measurements, epochs and, optionally, layers, see `MeasuredSettings.stages`."""


@dataclass(frozen=True)
class SearchSettings:
    """Settings that all searches have: the size and the training of the supernet.

    Args:
        batch_size: Number of pictures in a batch, over all workers together.
        init_channels: Number of channels of the first cell.
        layers: Number of cells. With fewer than 3 there would be no normal cell.
        stem: First layers of the network. auto chooses cifar for pictures of at most 64x64 pixels and imagenet for
            larger ones.
        lr: Initial learning rate of SGD on the weights.
        lr_min: Learning rate of the weights at the end.
        momentum: Momentum of SGD on the weights.
        weight_decay: Weight decay of the weights.
        grad_clip: Largest norm of the weights' gradient; longer ones are scaled down. null disables clipping. The
            published code of ISTA-NAS includes the gradients of the alphas in the norm and clips them, too.
        arch_lr: Learning rate of Adam on the alphas.
        arch_betas: Betas of Adam on the alphas.
        arch_weight_decay: Weight decay of the alphas.
        max_pictures: Largest number of training pictures to search on, chosen stratified by class. null uses all.
        cutout: Side of the square that is masked in each training picture. 0 disables it.
    """

    trains_target: ClassVar[bool] = False
    """Whether the search also trains the network that it finds, so that no retraining is needed.

    All decisions of its finished supernet are then FROZEN, see `istanas.nets.absorb_into_batchnorm`.
    """

    validates: ClassVar[bool] = True
    """Whether the search measures the validation accuracy of its result if there are pictures for it."""

    shorter: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Pairs (field, other field). The value of the field must be less than that of the other one."""

    trains: ClassVar[bool] = True
    """Whether the search trains anything. A search that does not costs nothing, and its result depends on chance."""

    batch_size: BatchSize = 256
    init_channels: PositiveInt = 16
    layers: Annotated[int, Ge(LEAST_LAYERS)] = 8
    stem: Stem = "auto"
    lr: PositiveFloat = 0.1
    lr_min: NonNegativeFloat = 0.001
    momentum: Fraction = 0.9
    weight_decay: NonNegativeFloat = 3e-4
    grad_clip: PositiveFloat | None = 5.0
    arch_lr: PositiveFloat = 6e-4
    arch_betas: tuple[Fraction, Fraction] = (0.5, 0.999)
    arch_weight_decay: NonNegativeFloat = 1e-3
    max_pictures: Annotated[int, Ge(2), Unit("pictures")] | None = None
    cutout: Pixels = 0

    @property
    def max_epochs(self) -> int:
        """Largest number of epochs that a search may take."""
        raise NotImplementedError

    def lasting(self, epochs: int, n_architectures: int | None = None) -> Self | None:
        """Return the settings of a search that is the same except for its length.

        `istanas versus` uses them to give another method the same cost. Schedules depend on the number of epochs, so a
        shorter search still runs through its whole schedule.

        Args:
            epochs: Number of epochs, >= 1. A method that cannot last exactly as long comes close to it.
            n_architectures: Number of architectures of the space, which may limit the length; `None` if it is unknown.

        Returns:
            None if the method does not let its length be chosen.
        """
        return None

    @property
    def trials_at_once(self) -> int:
        """Largest number of independent trainings at a time, each in a process of its own; 1 if the search is one job.

        A search of more than one trial is a `istanas.search.measured.MeasuredSearch`.
        """
        return 1


@dataclass(frozen=True)
class AlternatingSettings(SearchSettings):
    """Settings of a search that trains weights and alphas in turn, each on its own part of the pictures.

    Args:
        epochs: Number of epochs of the search. The learning rate of the weights falls from lr to lr_min over them
            (cosine, updated in every step).
        alpha_fraction: Fraction of the training pictures that trains the alphas; the rest trains the weights.
    """

    epochs: Epochs = 50
    alpha_fraction: Annotated[float, Gt(0), Lt(1)] = 0.5

    @property
    def max_epochs(self) -> int:
        """Largest number of epochs that a search may take."""
        return self.epochs

    def lasting(self, epochs: int, n_architectures: int | None = None) -> Self:
        """Return the settings with another number of epochs; fields that must be less become so in proportion.

        Example:
            >>> changed = PcDartsSettings(epochs=50, warmup_epochs=15).lasting(20)
            >>> changed.epochs, changed.warmup_epochs
            (20, 6)
        """
        parts = {
            name: getattr(self, name) * epochs // self.epochs
            for name, other in self.shorter
            if other == "epochs"
        }
        return replace(self, epochs=epochs, **parts)


@dataclass(frozen=True)
class SparseCodingSettings:
    """Settings of the sparse codes. A configuration has them in its section `space`.

    Args:
        n_measurements: Rows m of the measurement matrices, >= 1.
        matrix: Distribution of their entries.
        matrix_seed: Seed of the measurement matrices, >= 0.
        alphas_scale: Standard deviation of the initial compressed alphas, >= 0.
        l1_weight: Weight l1 of the LASSO, > 0.
        solver: Solver of the LASSO.
    """

    n_measurements: int = 7
    matrix: Matrix = "uniform"
    matrix_seed: int = 0
    alphas_scale: float = 1e-3
    l1_weight: float = 1e-5
    solver: Solver = "homotopy"


CountedUnit = Literal["macs", "params"]
"""A cost that is counted on modules: multiply-adds of one picture, or parameters, see `istanas.candidates`."""

CostUnit = Literal[CountedUnit, "latency"]
"""What a candidate costs: what is counted, or measured milliseconds, see `istanas.latency`."""


@dataclass(frozen=True)
class LimitSettings:
    """Limits of the target network of the architecture that a search finds.

    Args:
        max_params: Largest number of parameters of an architecture, without the auxiliary head. null disables the
            limit.
        max_macs: Largest number of multiply-adds of an architecture for one picture. null disables the limit.
        max_latency_ms: Largest predicted latency of an architecture. null disables the limit. It requires
            latency_table.
        latency_table: File of measured latencies, which istanas latency writes for this configuration.
    """

    max_params: Annotated[int, Ge(1), Unit("parameters")] | None = None
    max_macs: Annotated[int, Ge(1), Unit("multiply-adds")] | None = None
    max_latency_ms: Annotated[float, Gt(0), Unit("ms")] | None = None
    latency_table: Annotated[str, MinLen(1)] | None = None


@dataclass(frozen=True)
class CostSettings(LimitSettings):
    """Settings of a search that prefers architectures of low cost. The cost is that of the target network.

    Args:
        cost: Cost of a candidate: multiply-adds (macs), parameters (params) or measured milliseconds (latency, which
            requires latency_table), averaged over the cells of the target network.
        cost_weight: Weight mu of the costs; 0 ignores them, as published. In searches by sparse coding, the l1 norm of
            the codes weighs each candidate by 1 + mu cost / mean cost. In the other searches, mu times the expected
            cost, in units of that of equal probabilities, is added to the loss of the alphas.
    """

    cost: CostUnit = "macs"
    cost_weight: NonNegativeFloat = 0.0


@dataclass(frozen=True)
class TwoStageSettings(AlternatingSettings, CostSettings, SparseCodingSettings):
    """Two-stage search. The defaults are the published settings, which have no costs and no limits.

    While an architecture exceeds a limit, the weight of the costs is raised to the smallest value that keeps the limit.

    Args:
        termination_tol: The search stops early after an epoch in which every sparse code moved by at most this
            (Euclidean distance). null disables early stopping.

    Example:
        >>> TwoStageSettings().epochs, TwoStageSettings(lr=0.05).lr
        (50, 0.05)
    """

    termination_tol: NonNegativeFloat | None = None


@dataclass(frozen=True)
class OneStageSettings(SearchSettings, CostSettings, SparseCodingSettings):
    """One-stage search, whose supernet becomes the trained network. The defaults are published for CIFAR-10.

    Args:
        max_search_epochs: Epochs after which the nodes that are still active freeze.
        train_epochs: Number of epochs of training after the search, which ends one epoch after the last node has
            frozen. The learning rate of the weights is lr during the search and falls to lr_min over these epochs.
        schedule: How the learning rate falls during the training epochs. linear_by_epoch keeps one rate for each epoch.
        warmup_epochs: Epochs at the beginning of the search during which the learning rate rises to lr. The warm-up
            continues in the training if the search ends earlier.
        auxiliary_weight: Weight of the auxiliary head's loss. 0 builds no auxiliary head.
        drop_path: Drop-path probability at the end of training; it rises linearly from 0 in the training epochs.
        label_smoothing: Label smoothing of the loss. 0 disables it.
        termination_tol: A node freezes after an epoch in which its sparse code moved by at most this (Euclidean
            distance).
        over_limit: What happens to an architecture that exceeds a limit. reject keeps the previous one, as published.
            reweigh raises the weight of the costs to the smallest value that keeps the limit.
        test_every: Interval at which the test split is measured during training, and after the last epoch. 0 disables
            it.

    Example:
        >>> OneStageSettings().lr, OneStageSettings().momentum
        (0.025, 0.9)
    """

    trains_target: ClassVar[bool] = True
    shorter: ClassVar[tuple[tuple[str, str], ...]] = (("warmup_epochs", "max_search_epochs"),)

    max_search_epochs: Epochs = 600
    train_epochs: EpochsFromZero = 600
    batch_size: BatchSize = 96
    init_channels: PositiveInt = 36
    layers: Annotated[int, Ge(LEAST_LAYERS)] = 20
    lr: PositiveFloat = 0.025
    lr_min: NonNegativeFloat = 0.001
    schedule: Schedule = "cosine"
    warmup_epochs: Annotated[float, Ge(0), Unit("epochs")] = 0.0
    arch_lr: PositiveFloat = 3e-4
    cutout: Pixels = 16
    auxiliary_weight: NonNegativeFloat = 0.4
    drop_path: Fraction = 0.2
    label_smoothing: Fraction = 0.0
    termination_tol: NonNegativeFloat = 1e-3
    max_params: Annotated[int, Ge(1), Unit("parameters")] | None = 3_700_000
    over_limit: Literal["reject", "reweigh"] = "reject"
    test_every: EpochsFromZero = 1

    @property
    def max_epochs(self) -> int:
        """Largest number of epochs that a search may take."""
        return self.max_search_epochs + CLOSING_EPOCHS + self.train_epochs


@dataclass(frozen=True)
class DartsSettings(AlternatingSettings, CostSettings):
    """DARTS. The defaults are published for CIFAR-10.

    Args:
        second_order: Whether the gradient of the alphas includes its second-order part, through one step of the
            weights. A step then has five forward and backward passes instead of two.

    Example:
        >>> DartsSettings().lr, DartsSettings().second_order
        (0.025, False)
    """

    batch_size: BatchSize = 64
    lr: PositiveFloat = 0.025
    arch_lr: PositiveFloat = 3e-4
    second_order: bool = False


@dataclass(frozen=True)
class PcDartsSettings(AlternatingSettings, CostSettings):
    """PC-DARTS. The defaults are published for CIFAR-10.

    Args:
        warmup_epochs: Number of epochs at the beginning in which only the weights are trained.
        partial: The operations run on 1 / partial of the channels. It must divide the number of channels.

    Example:
        >>> PcDartsSettings().batch_size, PcDartsSettings().partial
        (256, 4)
    """

    shorter: ClassVar[tuple[tuple[str, str], ...]] = (("warmup_epochs", "epochs"),)

    lr_min: NonNegativeFloat = 0.0
    warmup_epochs: EpochsFromZero = 15
    partial: Annotated[int, Ge(2)] = 4


@dataclass(frozen=True)
class GdasSettings(AlternatingSettings, CostSettings):
    """GDAS. The defaults are the published settings for CIFAR-10.

    Args:
        tau_max: Temperature of the Gumbel-softmax in the first epoch.
        tau_min: Temperature in the last epoch. The temperature falls linearly from epoch to epoch.
        alphas_scale: Standard deviation of the initial alphas.
    """

    epochs: Epochs = 240
    batch_size: BatchSize = 64
    lr: PositiveFloat = 0.025
    arch_lr: PositiveFloat = 3e-4
    tau_max: PositiveFloat = 10.0
    tau_min: PositiveFloat = 0.1
    alphas_scale: NonNegativeFloat = 1e-3


@dataclass(frozen=True)
class RandomNasSettings(AlternatingSettings, LimitSettings):
    """Random search with weight sharing. Except for `statistics`, the defaults are those of the published code.

    No alphas are trained: the keys arch_lr, arch_betas and arch_weight_decay have no effect, and the pictures of
    alpha_fraction are used only to choose an architecture.

    Args:
        candidates: Number of random architectures (candidates) that are measured after the last epoch.
        candidate_pictures: Number of pictures on which each candidate is measured, stratified by class. null uses all.
        finalists: Number of the best candidates that are then measured on all pictures of alpha_fraction.
        statistics: Mean and variance that batch norm uses to measure an architecture. batch uses those of each batch.
            recalibrated uses those of calibration_batches training batches, which are first passed through the
            architecture. running uses the running statistics of the training, as published; they mix all architectures.
        calibration_batches: Number of training batches for the statistics of each architecture (recalibrated only).
    """

    epochs: Epochs = 100
    batch_size: BatchSize = 64
    lr: PositiveFloat = 0.025
    candidates: PositiveInt = 1000
    candidate_pictures: Annotated[int, Ge(2), Unit("pictures")] | None = 640
    finalists: PositiveInt = 10
    statistics: Statistics = "batch"
    calibration_batches: PositiveInt = 20


class Fidelity(NamedTuple):
    """Size and length of the training of a measurement. Fidelities are ordered by layers, then by epochs.

    Example:
        >>> Fidelity(layers=5, epochs=8) < Fidelity(layers=17, epochs=3)
        True
        >>> str(Fidelity(layers=17, epochs=3))
        '3 epochs of 17 layers'
    """

    layers: int
    epochs: int

    def __str__(self) -> str:
        return f"{self.epochs} epoch{'' if self.epochs == 1 else 's'} of {self.layers} layers"


@dataclass(frozen=True)
class MeasuredSettings(SearchSettings, LimitSettings):
    """Search by measurements, which trains architectures one after the other, or several at a time.

    No alphas are trained: the keys arch_lr, arch_betas and arch_weight_decay have no effect. All architectures that are
    measured are within the limits.

    Args:
        stages: Stages in their order, each [measurements, epochs] or [measurements, epochs, layers]. A measurement
            trains a network of one architecture for this number of epochs, during which the learning rate falls from lr
            to lr_min (cosine, updated in every step). The network of a stage without layers has those of the key
            layers.
        max_concurrent: Largest number of architectures that are trained at the same time, each as a trial of Ray Tune
            in a process of its own, on this machine or a cluster. The result then depends on the order in which they
            finish. 1 trains them one after the other, without Ray.
        balanced: Fraction of the measurements, beginning with the first, that form a balanced design, at least two of
            them. Thompson sampling draws the others.
        alpha_fraction: Fraction of the training pictures that measures the architectures; the rest trains them.
        calibration_batches: Number of training batches from which the statistics of batch norm are computed again
            before an architecture is measured. After a few steps, running statistics are still close to their initial
            values. 0 measures with running statistics.
        stop_probability: The search stops early, in any stage after the balanced design, when the probability that an
            architecture is better than the best one by more than stop_margin falls below this. null disables early
            stopping.
        stop_margin: Smallest improvement that counts for stop_probability, in standard deviations of the measured
            architectures.

    Example:
        >>> MeasuredSettings(stages=((100, 3), (20, 8))).max_epochs
        460
    """

    validates: ClassVar[bool] = False  # The measured architectures are validated, but the result is not.

    batch_size: BatchSize = 64
    init_channels: PositiveInt = 8
    stages: Annotated[tuple[Stage, ...], MinLen(1)] = ((120, 3), (30, 8))
    max_concurrent: PositiveInt = 1
    balanced: Annotated[float, Ge(0), Le(1)] = 0.3
    alpha_fraction: Annotated[float, Gt(0), Lt(1)] = 0.5
    calibration_batches: NonNegativeInt = 20
    stop_probability: Annotated[float, Gt(0), Lt(1)] | None = None
    stop_margin: NonNegativeFloat = 0.25

    @property
    def max_epochs(self) -> int:
        """Sum of the epochs of all measurements; with several at a time, the number of measurements."""
        concurrent = self.trials_at_once > 1
        return sum(measurements * (1 if concurrent else epochs) for measurements, epochs, *_ in self.stages)

    def fidelities(self, layers: int) -> list[Fidelity]:
        """Return the fidelity of each stage.

        Args:
            layers: Number of layers of the stages that give none.

        Example:
            >>> MeasuredSettings(stages=((100, 3), (20, 8, 17))).fidelities(layers=5)
            [Fidelity(layers=5, epochs=3), Fidelity(layers=17, epochs=8)]
        """
        return [Fidelity(own[0] if own else layers, epochs) for _, epochs, *own in self.stages]

    def schedule(self, layers: int) -> list[Fidelity]:
        """Return the fidelity of each measurement, in their order; `layers` as in `fidelities`."""
        stages = zip(self.stages, self.fidelities(layers), strict=True)
        return [fidelity for (measurements, *_), fidelity in stages for _ in range(measurements)]

    @property
    def trials_at_once(self) -> int:
        """The setting `max_concurrent`."""
        return self.max_concurrent

    def lasting(self, epochs: int, n_architectures: int | None = None) -> Self:
        """Return the settings with other numbers of measurements, at least 2 in each stage, and the same fidelities.

        Example:
            >>> MeasuredSettings(stages=((100, 3), (20, 8))).lasting(230).stages
            ((50, 3), (10, 8))
            >>> MeasuredSettings(stages=((100, 3), (20, 8))).lasting(230, n_architectures=40).stages
            ((40, 3), (10, 8))
        """
        share, stages = epochs / self.max_epochs, list[tuple[int, ...]]()
        fidelities = self.fidelities(self.layers)
        for (count, *given), fidelity in zip(self.stages, fidelities, strict=True):
            wanted = max(2, round(share * count))
            # No architecture is measured twice at the same fidelity.
            if n_architectures is not None:
                wanted = min(wanted, max(1, n_architectures // fidelities.count(fidelity)))
            stages.append((wanted, *given))
        return replace(self, stages=tuple(stages))


@dataclass(frozen=True)
class RandomSettings(SearchSettings, LimitSettings):
    """A random architecture, drawn again until it is within the limits.

    The other keys of `search` have no effect, because nothing is trained.
    """

    validates: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    @property
    def max_epochs(self) -> int:
        """One epoch, which trains nothing."""
        return 1
