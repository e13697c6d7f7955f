"""The schema of a configuration: every section and key with its type, range and default."""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, cast

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field

from istanas.data.registry import DATASET_ALIASES, DATASETS, DatasetEntry
from istanas.errors import ConfigError
from istanas.limits import MIN_IMAGE_SIZE
from istanas.methods import DEFAULT_METHOD, METHODS
from istanas.settings import (
    Matrix,
    Schedule,
    SearchSettings,
    Solver,
    SparseCodingSettings,
    Stem,
    TwoStageSettings,
)
from istanas.space import DEFAULT_SPACE, OPERATIONS, SPACES, SearchSpace
from pipeline.base.addresses import checked_address, is_remote
from pipeline.base.redaction import without_secrets
from pipeline.base.text import shown_value
from pipeline.config.sections import (
    NameIn,
    Section,
    checked,
    found_by,
    in_words,
    section_from,
    settings_from,
    unit,
    with_values,
)
from pipeline.config.workers import WorkerRange, parse_workers

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Epochs = Annotated[PositiveInt, unit("epochs")]
EpochsFromZero = Annotated[NonNegativeInt, unit("epochs")]
WarmupEpochs = Annotated[NonNegativeFloat, unit("epochs")]
Pixels = Annotated[NonNegativeInt, unit("pixels")]
BatchSize = Annotated[int, Field(ge=2), unit("pictures")]


def _checked_workers(value: Any) -> Any:
    parse_workers(value)
    return value


def _checked_colour(value: str) -> str:
    if not re.fullmatch(r"#[0-9a-f]{6}", value):
        from PIL import ImageColor

        try:
            red, green, blue, *alpha = ImageColor.getrgb(value)
        except ValueError:
            raise ConfigError(
                f"{value!r:.40} is not a colour",
                remedy="name a colour, such as white, or give one as #rrggbb",
            ) from None
        if alpha:
            raise ConfigError(
                f"{value!r:.40} has an alpha channel, and a background is opaque",
                remedy="give its colour as #rrggbb",
            )
        value = f"#{red:02x}{green:02x}{blue:02x}"
    return value


def _checked_alpha(alpha: float) -> float:
    if alpha != 0 and not 0.001 <= alpha <= 100:  # torch draws NaN, or shares that do not differ
        raise ConfigError(
            f"{alpha:g} is no usual parameter of a Beta distribution",
            remedy="use 0 to disable it, or 0.001 to 100",
        )
    return alpha


def _checked_root(root: str) -> str:
    return checked_address(root) if is_remote(root) else root


def _without_password(address: str) -> str:
    shown = without_secrets(address)
    if shown != address:
        raise ConfigError(
            f"{shown!r:.60} contains a password",
            remedy="leave it out: Ray's token comes from RAY_AUTH_TOKEN or ~/.ray/auth_token",
        )
    return address


def _without_alias(name: str) -> str:
    return DATASET_ALIASES.get(name, name)


class DataSettings(Section):
    """The pictures, and their augmentation during training."""

    name: Annotated[str, NameIn(DATASETS), AfterValidator(_without_alias)] = Field(
        "digits",
        description="Name of the data set. `folder` reads a picture folder from data.root; `webdataset` (or `shards`) "
        "reads tar files that `istanas pack` has made from one.",
    )
    root: Annotated[str, AfterValidator(checked(_checked_root))] | None = Field(
        None,
        description="Folder that holds the data. A picture folder has the form train/CLASS/*, test/CLASS/*, or CLASS/* "
        "with data.test_fraction; shards lie in a folder or in a bucket (s3://BUCKET/PREFIX, gs://BUCKET/PREFIX); "
        "`digits` needs none.",
    )
    test_fraction: Fraction = Field(
        0.0,
        description="Fraction of each class of a picture folder CLASS/* that becomes its test split, which is the same "
        "for every seed. 0 requires a folder train/CLASS/*, test/CLASS/*.",
    )
    download: bool = Field(False, description="Whether torchvision may download the data set into data.root.")
    image_size: Annotated[int, Field(ge=MIN_IMAGE_SIZE), unit("pixels")] | None = Field(
        None,
        description="Side to which pictures are resized. null keeps small pictures as they are, and uses 224 for large "
        "ones.",
    )
    background: Annotated[str, AfterValidator(checked(_checked_colour)), in_words("colour")] = Field(
        "#ffffff",
        description="Colour behind the transparent pictures of a folder: a name such as white, or #rrggbb.",
    )
    allow_left_out: bool = Field(
        False,
        description="Whether a job may start although more than 1 % of a class's files cannot be read (sub-folders, "
        "unsupported suffixes).",
    )
    cache_dir: str | None = Field(
        None, description="Folder of the cache of decoded pictures. null uses ~/.cache/istanas."
    )
    holdout: Fraction = Field(
        0.0,
        description="Fraction of the training pictures that is kept for choosing between networks, stratified by "
        "class. Nothing is trained on it.",
    )
    crop_padding: Pixels = Field(
        0,
        description="Padding on each side before the random crop of small training pictures. 0 disables the crop.",
    )
    horizontal_flip: bool = Field(
        False, description="Whether each training picture is mirrored with probability 1/2."
    )

    reduced_decoding: bool = Field(
        False,
        description="Whether large JPEG files are decoded at 1/2, 1/4 or 1/8 of their size where the random crop of a "
        "training picture does not need more pixels. This is faster and changes the pixels slightly; measured pictures "
        "are always decoded in full.",
    )

    @property
    def known_side(self) -> int | None:
        """Largest possible side of the pictures; None if it is known only from the pictures."""
        if self.image_size is not None and self.entry.max_image_size is None:
            return self.image_size
        return self.entry.side

    @property
    def entry(self) -> DatasetEntry:
        """What is registered under the name."""
        return DATASETS.find(self.name)


class _SparseCodingKeys(Section):
    """The keys of the section `space` about sparse codes, which every search space has."""

    n_measurements: Annotated[int, Field(ge=1, le=1024)] = Field(
        TwoStageSettings.n_measurements,
        description="Number of rows m of the measurement matrix A, and length of the compressed alphas b.",
    )
    matrix: Matrix = Field(
        TwoStageSettings.matrix,
        description="Distribution of the entries of A: uniform in [0, 1), as published, or Gaussian with columns of "
        "norm 1.",
    )
    matrix_seed: NonNegativeInt | None = Field(None, description="Seed of A. null uses the run's seed.")
    l1_weight: PositiveFloat = Field(
        TwoStageSettings.l1_weight, description="Weight of the l1 norm in the LASSO problem."
    )
    solver: Solver = Field(
        TwoStageSettings.solver,
        description="Solver of the LASSO problem. homotopy is exact; ista and fista are iterative; mosek requires a "
        "licence.",
    )


class SpaceSection(Section):
    """The architectures that a search may find, and how their sparse codes are measured and recovered."""

    space_class: ClassVar[type[SearchSpace]]

    if TYPE_CHECKING:  # Every subclass has these keys.
        name: str
        n_measurements: int
        matrix_seed: int | None
        solver: Solver

    def build(self) -> SearchSpace:
        """Return the search space.

        Raises:
            ConfigError: If its settings are impossible.
        """
        space = settings_from(self.space_class, self)
        _ = space.decisions  # checks them
        return space

    def operations(self) -> list[str]:
        """Return the registered operations among the candidates of the space."""
        decisions = self.build().all_decisions()
        names = dict.fromkeys(op for decision in decisions for op, _ in decision.candidates)
        return [name for name in names if name in OPERATIONS]


class SearchSection(Section):
    """The supernet of a search and its training. A subclass has the keys of its method."""

    settings_class: ClassVar[type[SearchSettings]]

    if TYPE_CHECKING:  # Every subclass has the keys of `istanas.settings.SearchSettings`, these among them.
        batch_size: int
        init_channels: int
        layers: int
        stem: Stem
        lr: float
        lr_min: float
        cutout: int
        max_pictures: int | None

    @property
    def max_epochs(self) -> int:
        """Largest number of epochs that a search may take."""
        return settings_from(self.settings_class, self).max_epochs

    @property
    def trials_at_once(self) -> int:
        """Largest number of concurrent trials of the search; 1 if the search is one job."""
        return settings_from(self.settings_class, self).trials_at_once

    @property
    def trains_target(self) -> bool:
        """Whether the search also trains the network that it finds."""
        return self.settings_class.trains_target

    @property
    def trains(self) -> bool:
        """Whether the search trains anything."""
        return self.settings_class.trains

    def lasting(self, epochs: int, n_architectures: int | None = None) -> Self | None:
        """Return the section of a search with about this number of epochs; None if its length cannot be chosen."""
        changed = settings_from(self.settings_class, self).lasting(epochs, n_architectures)
        return None if changed is None else with_values(self, changed)

    @property
    def op_batchnorm(self) -> bool:
        """Whether every candidate operation ends in batch norm, which the training of the found network requires."""
        return self.trains_target

    @property
    def alpha_fraction_or_none(self) -> float | None:
        """Fraction of the training pictures that trains the alphas; None if the method does not divide them."""
        fraction: float | None = getattr(self, "alpha_fraction", None)
        return fraction

    @property
    def test_interval(self) -> int:
        """Interval in epochs at which the test split is measured; 0 if the method has no key for it."""
        interval: int = getattr(self, "test_every", 0)
        return interval


class RetrainSettings(Section):
    """Training of the found network from scratch. The defaults are published for CIFAR-10."""

    epochs: Epochs = Field(600, description="Number of epochs of the retraining.")
    batch_size: BatchSize = Field(96, description="Number of pictures in a batch, over all workers together.")
    init_channels: PositiveInt = Field(36, description="Number of channels of the first cell.")
    layers: PositiveInt = Field(20, description="Number of cells.")
    stem: Stem = Field(
        "auto",
        description="First layers of the network. auto chooses cifar for pictures of at most 64x64 pixels and imagenet "
        "for larger ones.",
    )
    lr: PositiveFloat = Field(0.025, description="Initial learning rate.")
    lr_min: NonNegativeFloat = Field(0.0, description="Learning rate at the end.")
    schedule: Schedule = Field(
        "cosine",
        description="How the learning rate falls. linear_by_epoch keeps one rate for each epoch, as in the published "
        "ImageNet retraining.",
    )
    warmup_epochs: WarmupEpochs = Field(
        0.0, description="Epochs at the beginning during which the learning rate rises to lr."
    )
    momentum: Fraction = Field(0.9, description="Momentum of SGD.")
    nesterov: bool = Field(False, description="Whether SGD uses Nesterov momentum.")
    weight_decay: NonNegativeFloat = Field(3e-4, description="Weight decay.")
    grad_clip: PositiveFloat | None = Field(
        5.0, description="Largest norm of the gradient; longer ones are scaled down. null disables clipping."
    )
    auxiliary_weight: NonNegativeFloat = Field(
        0.4, description="Weight of the auxiliary head's loss. 0 builds no auxiliary head."
    )
    drop_path: Fraction = Field(
        0.2, description="Drop-path probability at the end; it rises linearly from 0 over the epochs."
    )
    label_smoothing: Fraction = Field(0.0, description="Label smoothing of the loss. 0 disables it.")
    cutout: Pixels = Field(
        16, description="Side of the square that is masked in each training picture. 0 disables it."
    )
    color_jitter: bool = Field(
        True,
        description="Whether brightness, contrast, saturation and hue of large training pictures are changed, as in "
        "the published ImageNet retraining.",
    )
    rand_augment: Annotated[int, Field(ge=0, le=30)] = Field(
        0,
        description="Magnitude of RandAugment, two random operations on each training picture. 0 disables it.",
    )
    random_erasing: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Probability that a random rectangle of a training picture is masked. 0 disables it."
    )
    mixup: Annotated[NonNegativeFloat, AfterValidator(checked(_checked_alpha))] = Field(
        0.0,
        description="Alpha of mixup, which adds the training pictures of a batch in pairs. 0 disables it. With cutmix, "
        "each batch is mixed by one of the two.",
    )
    cutmix: Annotated[NonNegativeFloat, AfterValidator(checked(_checked_alpha))] = Field(
        0.0,
        description="Alpha of CutMix, which replaces a rectangle of a training picture by that of another one. 0 "
        "disables it.",
    )
    ema_decay: Fraction = Field(
        0.0,
        description="Decay per step of an exponential moving average of the weights, which is then measured and "
        "exported. 0 disables it.",
    )
    op_batchnorm: bool = Field(
        False,
        description="Whether pooling and identity operations end in batch norm. Cells of a one-stage search require "
        "it.",
    )
    test_every: EpochsFromZero = Field(
        1,
        description="Interval at which the test split is measured, and after the last epoch. 0 disables it.",
    )


class RuntimeSettings(Section):
    """Where and how a job runs. These keys are not part of the configuration's hash."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Device to compute on. auto uses a GPU if there is one."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Numerical precision. auto uses bf16 and TF32 on GPUs and float32 on CPUs; fp32 uses float32 "
        "throughout, without TF32, as published.",
    )
    threads: PositiveInt | None = Field(
        None,
        description=(
            "CPU threads of each worker. null divides the cores among the workers; a job in one process then has "
            "OMP_NUM_THREADS threads, at most one for each core, or without this variable one for each core."
        ),
    )
    activation_checkpointing: bool = Field(
        False,
        description="Whether each cell is computed again in the backward pass. This takes about half the memory and "
        "more time, and does not change the result.",
    )
    compile: bool = Field(
        False,
        description="Whether torch.compile translates the network of a retraining at the start, which takes "
        "minutes. Losses differ by rounding, and drop path draws other masks.",
    )
    data_workers: Annotated[NonNegativeInt, unit("processes")] = Field(
        0,
        description="Processes of each worker that decode large pictures. 0 decodes them in the worker itself.",
    )
    workers: Annotated[
        int | str, BeforeValidator(checked(_checked_workers)), in_words("integer, at least 0, or MIN:MAX")
    ] = Field(
        0,
        description="Ray Train workers: a number, or MIN:MAX for a number that follows the cluster. 0 runs the job in "
        "this process, without Ray.",
    )
    address: Annotated[str, Field(min_length=1), AfterValidator(checked(_without_password))] | None = Field(
        None,
        description="Address of a Ray cluster. null uses RAY_ADDRESS, and without it starts Ray on this machine.",
    )
    wait_minutes: Annotated[NonNegativeFloat, unit("minutes")] = Field(
        10.0, description="Longest time to wait for a cluster's resources."
    )
    max_failures: NonNegativeInt = Field(
        5, description="Number of times that lost workers are replaced before the job fails."
    )
    on_nan: Literal["stop", "rollback"] = Field(
        "stop",
        description="What happens when training diverges. rollback returns to the last good checkpoint and continues "
        "with half the learning rate of the weights.",
    )
    max_rollbacks: NonNegativeInt = Field(
        3, description="Number of rollbacks after which a run that diverges again stops."
    )
    max_loss: PositiveFloat | None = Field(
        1000.0,
        description="Mean training loss of an epoch above which training counts as diverged. null accepts every finite "
        "loss.",
    )
    runs_dir: Annotated[str, AfterValidator(checked(checked_address))] = Field(
        "runs",
        description="Where run directories are kept: a folder, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or file:///PATH.",
    )

    @property
    def worker_range(self) -> WorkerRange:
        """Smallest and largest number of workers."""
        return parse_workers(self.workers)


class TrackingSettings(Section):
    """Tracking in MLflow. These keys are not part of the configuration's hash."""

    enabled: bool = Field(True, description="Whether the run is tracked in MLflow.")
    uri: str | None = Field(
        None,
        description="MLflow tracking URI. null uses MLFLOW_TRACKING_URI, and without it sqlite:///mlflow.db.",
    )
    experiment: str = Field("istanas", description="Name of the MLflow experiment.")
    name: str | None = Field(
        None, description="Name of the run. null uses the name of the configuration file."
    )
    models: bool = Field(
        True,
        description="Whether trained networks are logged and registered. The networks of a sweep's trials never are.",
    )
    registered_model: Annotated[str, Field(min_length=1, pattern=r"^[^/:]*$")] | None = Field(
        None,
        description="Name of the registered model of trained networks. null uses istanas-DATASET.",
    )


Value = Annotated[  # the value of a swept key
    bool | int | float | str | list[bool | int | float | str] | None, in_words("plain value or list of them")
]


class Parameter(Section):
    """One dimension of a sweep's space: exactly one of the five kinds, and the conditions under which it applies."""

    uniform: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        None, description="Range [low, high] of a uniform distribution; both ends are included."
    )
    loguniform: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        None,
        description="Range [low, high] of a distribution that is uniform in the logarithm; both ends are included.",
    )
    int_: Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(
        None, alias="int", description="Range [low, high] of whole numbers; both ends are included."
    )
    choice: Annotated[list[Value], Field(min_length=1)] | None = Field(
        None, description="List of values to choose from."
    )
    fixed: Value = Field(None, description="Value of the key in every trial; null is a value, too.")
    when: dict[str, Value] = Field(
        default_factory=dict,
        description="Keys and values that a trial must have for this dimension to apply.",
    )

    @pydantic.model_validator(mode="after")
    def _one_kind(self) -> Parameter:
        try:
            self._check()
        except ConfigError as error:
            raise ValueError(error) from None
        return self

    def _check(self) -> None:
        given = self._given
        if len(given) != 1:
            found = f"{' and '.join(given)} are given" if given else "no kind of range is given"
            raise ConfigError(found, remedy=f"give exactly one of {', '.join(PARAMETER_KINDS)}")
        if self.kind in ("uniform", "loguniform", "int"):
            low, high = self.value
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ConfigError(
                    f"{self.kind}: [{low}, {high}] is not a range",
                    remedy="give [low, high] with low below high",
                )
            if self.kind == "loguniform" and low <= 0:
                raise ConfigError(f"loguniform: {low} has no logarithm", remedy="give a low end above 0")
        if self.choice is not None and len({json.dumps(value) for value in self.choice}) < len(self.choice):
            raise ConfigError("choice: a value is given twice", remedy="give each value once")

    @property
    def _given(self) -> list[str]:
        """The kinds that are set."""
        return [
            kind
            for kind, field in PARAMETER_KINDS.items()
            if field in self.model_fields_set and (kind == "fixed" or getattr(self, field) is not None)
        ]

    @property
    def kind(self) -> str:
        """Name of the kind."""
        return self._given[0]

    @property
    def value(self) -> Any:
        """The bounds, the choices or the fixed value."""
        return getattr(self, PARAMETER_KINDS[self.kind])

    def __str__(self) -> str:
        value = self.value
        if self.kind in ("uniform", "loguniform", "int"):
            text = f"{self.kind} {value[0]:g} .. {value[1]:g}"
        elif self.kind == "choice":
            text = f"choice {', '.join(map(shown_value, value))}"
        else:
            text = f"fixed {shown_value(value)}"
        conditions = " and ".join(f"{key} = {shown_value(wanted)}" for key, wanted in self.when.items())
        return f"{text} (when {conditions})" if conditions else text


Objective = Literal["top1", "params", "macs"]
PARAMETER_KINDS = {
    "uniform": "uniform",
    "loguniform": "loguniform",
    "int": "int_",
    "choice": "choice",
    "fixed": "fixed",
}
OBJECTIVES: dict[str, Literal["maximize", "minimize"]] = {
    "top1": "maximize",
    "params": "minimize",
    "macs": "minimize",
}


class SweepSettings(Section):
    """A sweep: the space of settings, the sampler, early stopping, and the objectives."""

    space: Annotated[dict[str, Parameter], Field(min_length=1)] = Field(
        description="Configuration keys that the sweep varies, each with one of the five kinds of range."
    )
    trials: PositiveInt = Field(20, description="Number of trials, failed ones included.")
    objective: Literal["valid", "retrained"] = Field(
        "valid",
        description="Accuracy by which trials are compared. valid is the validation accuracy of the searched network; "
        "retrained is that of the found cell after a retraining, on the hold-out.",
    )
    objectives: Annotated[list[Objective], Field(min_length=1)] = Field(
        default_factory=lambda: list[Objective](["top1"]),
        description="Quantities to optimise. More than one gives a Pareto front.",
    )
    searcher: Literal["tpe", "nsga2", "random", "grid"] = Field(
        "tpe",
        description="Sampler that proposes settings: multivariate TPE, NSGA-II (for several objectives), random, or "
        "grid, which tries every combination of the choices once.",
    )
    scheduler: Literal["asha", "none"] = Field(
        "asha", description="Whether ASHA stops unpromising trials early. Several objectives require none."
    )
    grace_epochs: Epochs = Field(1, description="Number of epochs before ASHA may stop a trial.")
    reduction_factor: Annotated[int, Field(ge=2)] = Field(
        3, description="At each rung, ASHA continues about one trial in this number."
    )
    points: list[dict[str, Value]] = Field(
        default_factory=list, description="Settings to try first, each a mapping of keys to values."
    )
    start_from: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Study of an earlier sweep whose trials the sampler learns from: the name of that sweep's run "
        "directory.",
    )
    storage: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="URL of Optuna's database. null uses SQLite in runtime.runs_dir."
    )
    max_concurrent: PositiveInt | None = Field(
        None, description="Largest number of trials at once. null runs as many as fit."
    )
    cpus_per_trial: Annotated[PositiveInt, unit("cores")] = Field(
        1, description="CPU cores, and threads, of a trial that runs in its own process."
    )
    gpus_per_trial: Annotated[NonNegativeFloat, unit("GPUs")] | None = Field(
        None,
        description="GPUs of a trial; a fraction shares one. null uses 1 where there are GPUs.",
    )
    max_failures: NonNegativeInt = Field(
        3, description="Number of failed trials after which the sweep stops."
    )
    max_restarts: NonNegativeInt = Field(
        2, description="Number of times that a trial whose process was lost resumes from its checkpoint."
    )


class Config(Section):
    """A configuration. Each method and each search space have their own subclass, see `config_class`."""

    method: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Seed of everything that is random in a run."
    )
    data: DataSettings = Field(default_factory=DataSettings)
    space: SpaceSection
    search: SearchSection
    retrain: RetrainSettings = Field(default_factory=RetrainSettings)
    runtime: RuntimeSettings = Field(default_factory=RuntimeSettings)
    tracking: TrackingSettings = Field(default_factory=TrackingSettings)
    sweep: SweepSettings | None = Field(
        None, description="Settings of `istanas sweep`; null if there is none."
    )

    @property
    def matrix_seed(self) -> int:
        """The seed of the measurement matrices."""
        return self.seed if self.space.matrix_seed is None else self.space.matrix_seed

    @property
    def trains_target(self) -> bool:
        """Whether the search also trains the network that it finds, so that it needs no retraining."""
        return self.search.trains_target


def search_section(method: str) -> type[SearchSection]:
    """Return the section `search` of a method.

    Raises:
        ConfigError: If the method is not registered.
    """
    settings: Any = METHODS.find(method).settings_class
    section: type[SearchSection] = _search_section(method, settings)
    return section


def space_section(name: str) -> type[SpaceSection]:
    """Return the section `space` of a search space.

    Raises:
        ConfigError: If the space is not registered.
    """
    return _space_section(name, SPACES.find(name))


# The caches depend on the registered classes, because a name may be registered again by another plugin.
@functools.cache
def _search_section(method: str, settings: type[SearchSettings]) -> type[SearchSection]:
    has_codes = issubclass(settings, SparseCodingSettings)  # their keys are in the section `space`
    coding = {field.name for field in fields(SparseCodingSettings)} if has_codes else set()
    section = section_from(settings, SearchSection, locator=("search_section", method), exclude=coding)
    section.settings_class = settings
    return section


@functools.cache
def _space_section(name: str, space: type[SearchSpace]) -> type[SpaceSection]:
    words = "Search space: the kinds of cells, their decisions, and the networks that are built from them."
    section = section_from(
        space,
        SpaceSection,
        locator=("space_section", name),
        before={"name": (Literal[name], Field(name, description=words))},
        after={key: (field.annotation, field) for key, field in _SparseCodingKeys.model_fields.items()},
    )
    section.space_class = space
    return section


def config_class(method: str = DEFAULT_METHOD, space: str = DEFAULT_SPACE) -> type[Config]:
    """Return the schema of a method and a search space.

    Raises:
        ConfigError: If the method or the space is not registered.

    Example:
        >>> config_class("one_stage").model_fields["method"].default, config_class("one_stage")().search.layers
        ('one_stage', 20)
    """
    return _config_class(method, search_section(method), space_section(space), _describe_methods())


@functools.cache
def _config_class(
    method: str, search: type[SearchSection], of_space: type[SpaceSection], methods: str
) -> type[Config]:
    locator = ("config_class", method, of_space.space_class.name)
    schema = pydantic.create_model(
        "-".join(locator),
        __base__=Config,
        __module__=__name__,
        __doc__=Config.__doc__,
        method=(cast(Any, Literal[method]), Field(method, description=methods)),
        space=(of_space, Field(default_factory=of_space)),
        search=(search, Field(default_factory=search)),
    )
    schema.locator = locator
    return schema


for _find in (search_section, space_section, config_class):
    found_by(_find)


def _describe_methods() -> str:
    return "; ".join(["Search method", *(f"{name} {each.summary}" for name, each in METHODS.items())]) + "."


def considers_costs(config: Config) -> bool:
    """Return whether a search considers what its target network costs, see `istanas.settings.CostSettings`."""
    keys = ("cost_weight", "max_params", "max_macs", "max_latency_ms", "latency_table")
    return any(getattr(config.search, key, None) for key in keys)
