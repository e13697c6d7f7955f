"""The schema of a configuration: every section and key with its type, range and default."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from istanas.data.registry import DATASETS, DatasetEntry
from istanas.errors import ConfigError
from istanas.limits import MIN_IMAGE_SIZE
from istanas.registry import Registry
from istanas.settings import CLOSING_EPOCHS, Matrix, OneStageSettings, Schedule, Solver, TwoStageSettings
from istanas.space import PRIMITIVES, CellSpace, Primitive
from pipeline.base.addresses import checked_address
from pipeline.base.redaction import without_secrets
from pipeline.base.text import shown_value
from pipeline.config.choices import METHODS
from pipeline.config.workers import WorkerRange, parse_workers

Stem = Literal["auto", "cifar", "imagenet"]


def _unit(name: str) -> Any:
    """Attach the unit of a number, which `istanas config --describe` and the reference show beside its range."""
    return Field(json_schema_extra={UNIT: name})


def _in_words(type_: str) -> Any:
    """Attach a description of the type that is more precise than the JSON schema."""
    return Field(json_schema_extra={WORDS: type_})


UNIT, WORDS = "x-unit", "x-type"  # extensions of a key's JSON schema
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Epochs = Annotated[PositiveInt, _unit("epochs")]
EpochsFromZero = Annotated[NonNegativeInt, _unit("epochs")]
WarmupEpochs = Annotated[NonNegativeFloat, _unit("epochs")]
Pixels = Annotated[NonNegativeInt, _unit("pixels")]
BatchSize = Annotated[int, Field(ge=2), _unit("pictures")]


def _checked(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a validator that converts a ConfigError of `check` to a ValueError, which pydantic requires."""

    def validate(value: Any) -> Any:
        try:
            return check(value)
        except ConfigError as error:
            raise ValueError(error) from None

    return validate


def _registered_in(registry: Registry[Any]) -> Callable[[str], str]:
    """Return a check that a registry, which plugins extend, has an entry of a name."""

    def check(name: str) -> str:
        try:
            registry.find(name)
        except ConfigError as error:
            remedy = f"{error.remedy}, or name the plugin that registers it with --plugin FILE"
            raise ConfigError(error.problem, remedy=remedy) from None
        return name

    return check


def _names_of(registry: Registry[Any]) -> Any:
    """Attach the names of a registry, as they are when the JSON schema is written."""

    def list_names(schema: dict[str, Any]) -> None:
        schema["enum"] = list(registry)

    return Field(json_schema_extra=list_names)


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


def _without_password(address: str) -> str:
    shown = without_secrets(address)
    if shown != address:
        raise ConfigError(
            f"{shown!r:.60} contains a password",
            remedy="leave it out: Ray's token comes from RAY_AUTH_TOKEN or ~/.ray/auth_token",
        )
    return address


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)


class DataSettings(_Section):
    """The pictures, and their augmentation during training."""

    name: Annotated[str, AfterValidator(_checked(_registered_in(DATASETS))), _names_of(DATASETS)] = Field(
        "digits", description="Name of the data set. `folder` reads a picture folder from data.root."
    )
    root: str | None = Field(
        None,
        description="Folder that holds the data. A picture folder has the form train/CLASS/*, test/CLASS/*; `digits` "
        "needs none.",
    )
    download: bool = Field(False, description="Whether torchvision may download the data set into data.root.")
    image_size: Annotated[int, Field(ge=MIN_IMAGE_SIZE), _unit("pixels")] | None = Field(
        None,
        description="Side to which pictures are resized. null keeps small pictures as they are, and uses 224 for large "
        "ones.",
    )
    background: Annotated[str, AfterValidator(_checked(_checked_colour)), _in_words("colour")] = Field(
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

    @property
    def known_side(self) -> int | None:
        """Largest possible side of the pictures; None if only the pictures tell."""
        if self.image_size is not None and self.entry.max_image_size is None:
            return self.image_size
        return self.entry.side

    @property
    def entry(self) -> DatasetEntry:
        """What is registered under the name."""
        return DATASETS.find(self.name)


class SpaceSettings(_Section):
    """The cells that a search may find, and how their sparse codes are measured and recovered."""

    nodes: Annotated[int, Field(ge=1, le=16)] = Field(
        CellSpace.n_nodes, description="Number of intermediate nodes of a cell."
    )
    ops: list[Primitive] = Field(
        default_factory=lambda: list(PRIMITIVES),
        description="Candidate operations on each edge, each named once.",
    )
    sparsity: PositiveInt = Field(
        CellSpace.sparsity, description="Number of operations that each node keeps."
    )
    one_op_per_edge: bool = Field(
        CellSpace.one_op_per_edge,
        description="Whether the operations that a node keeps must lie on different edges. The published code does "
        "not require it.",
    )
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

    def cell_space(self) -> CellSpace:
        """Return the space in the form that the algorithms take."""
        return CellSpace(self.nodes, tuple(self.ops), self.sparsity, self.one_op_per_edge)


class SearchSettings(_Section):
    """Settings of the supernet that both methods share. A subclass has the defaults of its method."""

    batch_size: BatchSize = Field(
        256, description="Number of pictures in a batch, over all workers together."
    )
    init_channels: PositiveInt = Field(16, description="Number of channels of the first cell.")
    layers: Annotated[int, Field(ge=3)] = Field(
        8, description="Number of cells. With fewer than 3 there would be no normal cell."
    )
    stem: Stem = Field(
        "auto",
        description="First layers of the network. auto chooses cifar for pictures of at most 64x64 pixels and imagenet "
        "for larger ones.",
    )
    lr: PositiveFloat = Field(TwoStageSettings.lr, description="Initial learning rate of the weights.")
    lr_min: NonNegativeFloat = Field(
        TwoStageSettings.lr_min, description="Learning rate of the weights at the end."
    )
    momentum: Fraction = Field(TwoStageSettings.momentum, description="Momentum of SGD on the weights.")
    weight_decay: NonNegativeFloat = Field(
        TwoStageSettings.weight_decay, description="Weight decay of the weights."
    )
    grad_clip: PositiveFloat | None = Field(
        TwoStageSettings.grad_clip,
        description="Largest norm of the weights' gradient; longer ones are scaled down. null disables clipping.",
    )
    arch_lr: PositiveFloat = Field(
        TwoStageSettings.arch_lr, description="Learning rate of Adam on the compressed alphas."
    )
    arch_betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = Field(
        default_factory=lambda: list(TwoStageSettings.arch_betas),
        description="Betas of Adam on the compressed alphas.",
    )
    arch_weight_decay: NonNegativeFloat = Field(
        TwoStageSettings.arch_weight_decay, description="Weight decay of the compressed alphas."
    )
    max_pictures: Annotated[int, Field(ge=2), _unit("pictures")] | None = Field(
        None,
        description="Largest number of training pictures to search on, chosen stratified by class. null uses all.",
    )
    cutout: Pixels = Field(
        0, description="Side of the square that is masked in each training picture. 0 disables it."
    )

    @property
    def max_epochs(self) -> int:
        """Largest number of epochs that a search may take."""
        raise NotImplementedError

    @property
    def op_batchnorm(self) -> bool:
        """Whether every candidate operation ends in batch norm."""
        return False


class TwoStageSearchSettings(SearchSettings):
    """The two-stage supernet and its training. The defaults are the published settings."""

    epochs: Epochs = Field(TwoStageSettings.epochs, description="Number of epochs of the search.")
    alpha_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5,
        description="Fraction of the training pictures that trains the compressed alphas; the rest trains the weights.",
    )
    termination_tol: NonNegativeFloat | None = Field(
        TwoStageSettings.termination_tol,
        description="The search stops early after an epoch in which every sparse code moved by at most this (Euclidean "
        "distance). null disables early stopping.",
    )

    @property
    def max_epochs(self) -> int:
        """Largest number of epochs that a search may take."""
        return self.epochs


class OneStageSearchSettings(SearchSettings):
    """The one-stage supernet, which becomes the trained network. The defaults are published for CIFAR-10."""

    max_search_epochs: Epochs = Field(
        OneStageSettings.max_search_epochs,
        description="Epochs after which the nodes that are still active freeze.",
    )
    train_epochs: EpochsFromZero = Field(
        OneStageSettings.train_epochs,
        description="Number of epochs of training after the search, which ends one epoch after the last node has "
        "frozen.",
    )
    batch_size: BatchSize = Field(96, description="Number of pictures in a batch, over all workers together.")
    init_channels: PositiveInt = Field(36, description="Number of channels of the first cell.")
    layers: Annotated[int, Field(ge=3)] = Field(
        20, description="Number of cells. With fewer than 3 there would be no normal cell."
    )
    lr: PositiveFloat = Field(OneStageSettings.lr, description="Initial learning rate of the weights.")
    lr_min: NonNegativeFloat = Field(
        OneStageSettings.lr_min, description="Learning rate of the weights at the end."
    )
    schedule: Schedule = Field(
        OneStageSettings.schedule,
        description="How the learning rate falls during the training epochs. linear_by_epoch keeps one rate for each "
        "epoch.",
    )
    warmup_epochs: WarmupEpochs = Field(
        OneStageSettings.warmup_epochs,
        description="Epochs at the beginning of the search during which the learning rate rises to lr.",
    )
    arch_lr: PositiveFloat = Field(
        OneStageSettings.arch_lr, description="Learning rate of Adam on the compressed alphas."
    )
    cutout: Pixels = Field(
        16, description="Side of the square that is masked in each training picture. 0 disables it."
    )
    auxiliary_weight: NonNegativeFloat = Field(
        OneStageSettings.auxiliary_weight,
        description="Weight of the auxiliary head's loss. 0 builds no auxiliary head.",
    )
    drop_path: Fraction = Field(
        OneStageSettings.drop_path,
        description="Drop-path probability at the end of training; it rises linearly from 0 in the training epochs.",
    )
    label_smoothing: Fraction = Field(
        OneStageSettings.label_smoothing, description="Label smoothing of the loss. 0 disables it."
    )
    termination_tol: NonNegativeFloat = Field(
        OneStageSettings.termination_tol,
        description="A node freezes after an epoch in which its sparse code moved by at most this (Euclidean "
        "distance).",
    )
    max_params: Annotated[PositiveInt, _unit("parameters")] | None = Field(
        OneStageSettings.max_params,
        description="Largest number of parameters of an architecture, without the auxiliary head; larger ones are "
        "rejected. null disables the limit.",
    )
    max_macs: Annotated[PositiveInt, _unit("multiply-adds")] | None = Field(
        OneStageSettings.max_macs,
        description="Largest number of multiply-adds of an architecture; larger ones are rejected. null disables the "
        "limit.",
    )
    test_every: EpochsFromZero = Field(
        1,
        description="Interval at which the test split is measured during training, and after the last epoch. 0 "
        "disables it.",
    )

    @property
    def max_epochs(self) -> int:
        """Largest number of epochs that a search may take."""
        return self.max_search_epochs + CLOSING_EPOCHS + self.train_epochs

    @property
    def op_batchnorm(self) -> bool:
        """Whether every candidate operation ends in batch norm."""
        return True


class RetrainSettings(_Section):
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
    op_batchnorm: bool = Field(
        False,
        description="Whether pooling and identity operations end in batch norm. Cells of a one-stage search require "
        "it.",
    )
    test_every: EpochsFromZero = Field(
        1,
        description="Interval at which the test split is measured, and after the last epoch. 0 disables it.",
    )


class RuntimeSettings(_Section):
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
        None, description="CPU threads of each worker. null divides the cores among the workers."
    )
    activation_checkpointing: bool = Field(
        False,
        description="Whether each cell is computed again in the backward pass. This takes about half the memory and "
        "more time, and does not change the result.",
    )
    data_workers: Annotated[NonNegativeInt, _unit("processes")] = Field(
        0,
        description="Processes of each worker that decode large pictures. 0 decodes them in the worker itself.",
    )
    workers: Annotated[
        int | str, BeforeValidator(_checked(_checked_workers)), _in_words("integer, at least 0, or MIN:MAX")
    ] = Field(
        0,
        description="Ray Train workers: a number, or MIN:MAX for a number that follows the cluster. 0 runs the job in "
        "this process, without Ray.",
    )
    address: Annotated[str, Field(min_length=1), AfterValidator(_checked(_without_password))] | None = Field(
        None,
        description="Address of a Ray cluster. null uses RAY_ADDRESS, and without it starts Ray on this machine.",
    )
    wait_minutes: Annotated[NonNegativeFloat, _unit("minutes")] = Field(
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
    runs_dir: Annotated[str, AfterValidator(_checked(checked_address))] = Field(
        "runs",
        description="Where run directories are kept: a folder, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or file:///PATH.",
    )

    @property
    def worker_range(self) -> WorkerRange:
        """Smallest and largest number of workers."""
        return parse_workers(self.workers)


class TrackingSettings(_Section):
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
    bool | int | float | str | list[bool | int | float | str] | None, _in_words("plain value or list of them")
]


class Parameter(_Section):
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


class SweepSettings(_Section):
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
    searcher: Literal["tpe", "nsga2", "random"] = Field(
        "tpe",
        description="Sampler that proposes settings: multivariate TPE, NSGA-II (for several objectives), or random.",
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
    cpus_per_trial: Annotated[PositiveInt, _unit("cores")] = Field(
        1, description="CPU cores, and threads, of a trial that runs in its own process."
    )
    gpus_per_trial: Annotated[NonNegativeFloat, _unit("GPUs")] | None = Field(
        None,
        description="GPUs of a trial; a fraction shares one. null uses 1 where there are GPUs.",
    )
    max_failures: NonNegativeInt = Field(
        3, description="Number of failed trials after which the sweep stops."
    )
    max_restarts: NonNegativeInt = Field(
        2, description="Number of times that a trial whose process was lost resumes from its checkpoint."
    )


METHOD = (
    "Search method. two_stage searches a cell and retrains its network from scratch; one_stage searches and trains the "
    "network in one run."
)


class Config(_Section):
    """A configuration. Each method has its own subclass."""

    method: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Seed of everything that is random in a run."
    )
    data: DataSettings = Field(default_factory=DataSettings)
    space: SpaceSettings = Field(default_factory=SpaceSettings)
    search: SearchSettings
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


class TwoStageConfig(Config):
    """Search, then train the found network from scratch."""

    method: Literal["two_stage"] = Field("two_stage", description=METHOD)
    search: TwoStageSearchSettings = Field(default_factory=TwoStageSearchSettings)


class OneStageConfig(Config):
    """Search and train the target network in one run."""

    method: Literal["one_stage"] = Field("one_stage", description=METHOD)
    search: OneStageSearchSettings = Field(default_factory=OneStageSearchSettings)


SCHEMAS: dict[str, type[Config]] = {"two_stage": TwoStageConfig, "one_stage": OneStageConfig}
DEFAULT_METHOD = "two_stage"


assert tuple(SCHEMAS) == METHODS, "every method has its schema"
