"""The schema of a configuration: every section and key with type, range and default; `config` reads and checks it."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from istanas.errors import ConfigError
from istanas.limits import SMALL_SIDE
from istanas.space import PRIMITIVES, CellSpace
from pipeline import storage
from pipeline.redaction import without_secrets
from pipeline.resources import WorkerRange, parse_workers

Primitive = Literal[
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
]
DatasetName = Literal["digits", "cifar10", "cifar100", "mnist", "fashion_mnist", "kmnist", "svhn", "folder"]
Stem = Literal["auto", "cifar", "imagenet"]
Schedule = Literal["cosine", "linear", "linear_by_epoch"]  # of the learning rate, see `istanas.training`
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AbovePositive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _checked_workers(value: Any) -> Any:
    try:
        parse_workers(value)
    except ConfigError as error:
        raise ValueError(str(error).partition(" is none, ")[2]) from None
    return value


def _checked_colour(value: str) -> str:
    if not re.fullmatch(r"#[0-9a-f]{6}", value):
        from PIL import ImageColor

        try:
            red, green, blue, *alpha = ImageColor.getrgb(value)
        except ValueError:
            raise ValueError("name a colour, such as white, or give one as #rrggbb") from None
        if alpha:
            raise ValueError("a background is opaque, give its colour without alpha, as #rrggbb")
        value = f"#{red:02x}{green:02x}{blue:02x}"
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)


class DataSettings(_Section):
    """Which pictures, and how they are varied in training."""

    name: DatasetName = Field("digits", description="registered data set, or `folder` for a picture folder")
    root: str | None = Field(
        None, description="folder with the data (train/CLASS/*, test/CLASS/* for `folder`)"
    )
    download: bool = Field(False, description="let torchvision download the data set into data.root")
    image_size: Annotated[int, Field(ge=8)] | None = Field(None, description="resize pictures to this side")
    background: Annotated[str, pydantic.AfterValidator(_checked_colour)] = Field(
        "#ffffff", description="colour that transparent pictures of a folder are composited over"
    )
    allow_left_out: bool = Field(
        False,
        description="leave out more than a hundredth of a class: sub-folders, suffixes that are not read",
    )
    cache_dir: str | None = Field(
        None, description="where decoded pictures are cached (default ~/.cache/istanas)"
    )
    holdout: Fraction = Field(0.0, description="stratified share of the training pictures kept for choosing")
    crop_padding: Annotated[int, Field(ge=0)] = Field(
        0, description="random crop after padding by so many pixels, of small pictures"
    )
    horizontal_flip: bool = Field(False, description="mirror half of the training pictures")

    @property
    def known_side(self) -> int | None:
        """An upper bound of the pictures' side that holds whatever lies in data.root; None if only that tells."""
        return SMALL_SIDE if self.name != "folder" else self.image_size


class SpaceSettings(_Section):
    """What a cell may be, and how its sparse code is measured and recovered."""

    nodes: Annotated[int, Field(ge=1, le=16)] = 4
    ops: list[Primitive] = Field(default_factory=lambda: list(get_args(Primitive)))
    sparsity: Positive = Field(2, description="operations that a node keeps")
    one_op_per_edge: bool = False
    n_measurements: Annotated[int, Field(ge=1, le=1024)] = Field(
        7, description="m, length of the compressed alphas b"
    )
    matrix: Literal["uniform", "gaussian"] = "uniform"
    matrix_seed: Annotated[int, Field(ge=0)] | None = Field(
        None, description="seed of A; the run's seed if not given"
    )
    l1_weight: AbovePositive = 1e-5
    solver: Literal["homotopy", "ista", "fista", "clarabel", "mosek"] = "homotopy"

    def cell_space(self) -> CellSpace:
        """The space as the algorithms take it."""
        return CellSpace(self.nodes, tuple(self.ops), self.sparsity, self.one_op_per_edge)


class SearchSettings(_Section):
    """What the supernets of both methods have; the defaults of each are in its own class."""

    batch_size: Annotated[int, Field(ge=2)] = 256
    init_channels: Positive = 16
    layers: Annotated[int, Field(ge=3)] = Field(8, description="fewer than 3 would hold no normal cell")
    stem: Stem = Field("auto", description="cifar for pictures up to 64x64 pixels, imagenet for larger ones")
    lr: AbovePositive = 0.1
    lr_min: NonNegative = 0.001
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 3e-4
    grad_clip: AbovePositive | None = 5.0
    arch_lr: AbovePositive = 6e-4
    arch_betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = Field(
        default_factory=lambda: [0.5, 0.999]
    )
    arch_weight_decay: NonNegative = 1e-3
    max_pictures: Annotated[int, Field(ge=2)] | None = Field(
        None, description="search on a stratified part of so many training pictures"
    )
    cutout: Annotated[int, Field(ge=0)] = 0

    @property
    def max_epochs(self) -> int:
        """The most epochs that a search may take."""
        raise NotImplementedError

    @property
    def op_batchnorm(self) -> bool:
        """Whether every candidate operation ends in batch norm."""
        return False


class TwoStageSearchSettings(SearchSettings):
    """The two-stage supernet and its training; defaults as published."""

    epochs: Positive = 50
    alpha_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="share of the pictures for the alphas"
    )
    termination_tol: NonNegative | None = Field(
        None, description="stop when every code moves by at most this"
    )

    @property
    def max_epochs(self) -> int:
        """The most epochs that a search may take."""
        return self.epochs


class OneStageSearchSettings(SearchSettings):
    """The one-stage supernet, which is the target network, and its training; defaults as published for CIFAR-10."""

    max_search_epochs: Positive = Field(600, description="nodes still active after so many epochs freeze")
    train_epochs: Annotated[int, Field(ge=0)] = Field(
        600, description="after the search, which ends one epoch after the last node has frozen"
    )
    batch_size: Annotated[int, Field(ge=2)] = 96
    init_channels: Positive = 36
    layers: Annotated[int, Field(ge=3)] = Field(20, description="fewer than 3 would hold no normal cell")
    lr: AbovePositive = 0.025
    lr_min: NonNegative = 0.001
    schedule: Schedule = Field("cosine", description="how the learning rate falls in the training epochs")
    warmup_epochs: NonNegative = Field(
        0.0, description="first epochs of the search, in which the learning rate rises to lr"
    )
    arch_lr: AbovePositive = 3e-4
    cutout: Annotated[int, Field(ge=0)] = 16
    auxiliary_weight: NonNegative = Field(0.4, description="weight of the auxiliary head's loss; 0: no head")
    drop_path: Fraction = Field(0.2, description="drop-path probability, rising from 0 to this in training")
    label_smoothing: Fraction = 0.0
    termination_tol: NonNegative = Field(
        1e-3, description="a node freezes when its code moves by at most this"
    )
    max_params: Positive | None = Field(
        3_700_000, description="largest architecture; auxiliary head left out"
    )
    max_macs: Positive | None = Field(None, description="most multiply-adds of an architecture")
    test_every: Annotated[int, Field(ge=0)] = Field(
        1, description="measure the test split every so many training epochs, and after the last; 0: never"
    )

    @property
    def max_epochs(self) -> int:
        """The most epochs that a search may take."""
        # Between the two comes one closing epoch: istanas.search.CLOSING_EPOCHS, whose import loads torch.
        return self.max_search_epochs + 1 + self.train_epochs

    @property
    def op_batchnorm(self) -> bool:
        """Whether every candidate operation ends in batch norm."""
        return True


class RetrainSettings(_Section):
    """Training of the found network from scratch; defaults as published for CIFAR-10."""

    epochs: Positive = 600
    batch_size: Annotated[int, Field(ge=2)] = 96
    init_channels: Positive = 36
    layers: Positive = 20
    stem: Stem = Field("auto", description="cifar for pictures up to 64x64 pixels, imagenet for larger ones")
    lr: AbovePositive = 0.025
    lr_min: NonNegative = 0.0
    schedule: Schedule = Field(
        "cosine", description="linear_by_epoch: one rate an epoch, as in the published ImageNet retraining"
    )
    warmup_epochs: NonNegative = 0.0
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 3e-4
    grad_clip: AbovePositive | None = 5.0
    auxiliary_weight: NonNegative = Field(0.4, description="weight of the auxiliary head's loss; 0: no head")
    drop_path: Fraction = Field(0.2, description="drop-path probability, rising linearly from 0 to this")
    label_smoothing: Fraction = 0.0
    cutout: Annotated[int, Field(ge=0)] = 16
    op_batchnorm: bool = Field(
        False, description="batch norm after pooling and identity (cells of a one-stage search)"
    )
    test_every: Annotated[int, Field(ge=0)] = Field(
        1, description="measure the test split every so many epochs, and after the last; 0: never"
    )


NEEDS_OP_BATCHNORM = (
    "comes from a one-stage search, whose network has batch norm after pooling and identity, and retrain.op_batchnorm "
    "is false: set retrain.op_batchnorm=true"
)  # of a cell that is to be retrained


def _without_password(address: str) -> str:
    if without_secrets(address) != address:
        raise ValueError(
            "no password belongs in it; Ray's token comes from RAY_AUTH_TOKEN or ~/.ray/auth_token"
        )
    return address


class RuntimeSettings(_Section):
    """Where a job runs; never part of the configuration's hash."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="auto: bf16 (and TF32) on GPUs, fp32 on CPUs; fp32: float32 throughout, as published",
    )
    threads: Positive | None = Field(None, description="of each worker; cores / workers if not given")
    activation_checkpointing: bool = Field(
        False,
        description="computes each cell again in the backward pass: about half the memory, more time, same bits",
    )
    data_workers: Annotated[int, Field(ge=0)] = Field(0, description="processes that decode large pictures")
    workers: Annotated[int | str, BeforeValidator(_checked_workers)] = Field(
        0, description="Ray Train workers, a number or MIN:MAX (elastic); 0: in this process, without Ray"
    )
    address: Annotated[str, Field(min_length=1), pydantic.AfterValidator(_without_password)] | None = Field(
        None, description="of a Ray cluster; RAY_ADDRESS if not given, else Ray is started on this machine"
    )
    wait_minutes: NonNegative = Field(10.0, description="how long to wait for a cluster's resources")
    max_failures: Annotated[int, Field(ge=0)] = Field(
        5, description="how often lost workers are replaced before the job fails"
    )
    on_nan: Literal["stop", "rollback"] = Field(
        "stop", description="rollback: to the last good checkpoint, with half the learning rate from there on"
    )
    max_rollbacks: Annotated[int, Field(ge=0)] = Field(
        3, description="how often a run is rolled back before it stops all the same"
    )
    max_loss: AbovePositive | None = Field(
        1000.0,
        description="an epoch's mean training loss above this counts as NaN; null: any finite one is fine",
    )
    runs_dir: Annotated[str, pydantic.AfterValidator(storage.checked_address)] = Field(
        "runs", description="a folder, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or file:///PATH"
    )

    @property
    def worker_range(self) -> WorkerRange:
        """How many workers, at least and at most."""
        return parse_workers(self.workers)


class TrackingSettings(_Section):
    """MLflow; never part of the configuration's hash."""

    enabled: bool = True
    uri: str | None = Field(None, description="MLFLOW_TRACKING_URI if not given, else sqlite:///mlflow.db")
    experiment: str = "istanas"
    name: str | None = Field(None, description="name of the run; the configuration file's if not given")
    models: bool = Field(True, description="log and register trained networks; trials of a sweep do not")
    registered_model: Annotated[str, Field(min_length=1, pattern=r"^[^/:]*$")] | None = Field(
        None, description="under which trained networks are registered; istanas-DATASET if not given"
    )


Value = bool | int | float | str | list[bool | int | float | str] | None  # of a swept key


def shown_value(value: Any) -> str:
    """A swept key's value for people, as YAML has it.

    Example:
        >>> shown_value(None), shown_value(["skip_connect", "sep_conv_3x3"]), shown_value(0.5)
        ('null', '[skip_connect, sep_conv_3x3]', '0.5')
    """
    if isinstance(value, list):
        return f"[{', '.join(map(shown_value, value))}]"
    return "null" if value is None else str(value)


class Parameter(_Section):
    """One dimension of a sweep's space: exactly one of the five kinds, and when it applies."""

    uniform: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        None, description="[low, high], both included"
    )
    loguniform: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        None, description="[low, high], both included, even in the logarithm"
    )
    int_: Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(
        None, alias="int", description="[low, high], both included"
    )
    choice: Annotated[list[Value], Field(min_length=1)] | None = Field(
        None, description="one of these values"
    )
    fixed: Value = Field(None, description="this value, in every trial; null is one")
    when: dict[str, Value] = Field(
        default_factory=dict, description="only in trials where these keys have these values"
    )

    @pydantic.model_validator(mode="after")
    def _one_kind(self) -> Parameter:
        kinds = ", ".join(PARAMETER_KINDS)
        given = self._given
        if len(given) != 1:
            raise ValueError(f"give exactly one of {kinds}, not {len(given)}")
        if self.kind in ("uniform", "loguniform", "int"):
            low, high = self.value
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"{self.kind}: give [low, high] with low below high")
            if self.kind == "loguniform" and low <= 0:
                raise ValueError("loguniform: low must be above 0")
        if self.choice is not None and len({json.dumps(value) for value in self.choice}) < len(self.choice):
            raise ValueError("choice: a value stands in it twice")
        return self

    @property
    def _given(self) -> list[str]:
        """The kinds that were given."""
        return [
            kind
            for kind, field in PARAMETER_KINDS.items()
            if field in self.model_fields_set and (kind == "fixed" or getattr(self, field) is not None)
        ]

    @property
    def kind(self) -> str:
        """Which of the five kinds it is."""
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
    """Many runs with other settings: the space, who chooses in it, who stops early, what counts as good."""

    space: Annotated[dict[str, Parameter], Field(min_length=1)]
    trials: Positive = Field(20, description="how many settings are tried, failed ones included")
    objective: Literal["valid", "retrained"] = Field(
        "valid",
        description="top-1: of the searched network on its validation pictures, or of the found cell after a "
        "retraining, on the hold-out",
    )
    objectives: Annotated[list[Objective], Field(min_length=1)] = Field(
        default_factory=lambda: list[Objective](["top1"]),
        description="several: a Pareto front",
    )
    searcher: Literal["tpe", "nsga2", "random"] = "tpe"
    scheduler: Literal["asha", "none"] = "asha"
    grace_epochs: Positive = Field(1, description="epochs that ASHA leaves every trial")
    reduction_factor: Annotated[int, Field(ge=2)] = Field(
        3, description="ASHA lets about one in so many trials go on, at every rung"
    )
    points: list[dict[str, Value]] = Field(default_factory=list, description="settings that are tried first")
    start_from: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="an earlier sweep's study, whose trials the searcher knows from the start"
    )
    storage: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Optuna's database; sqlite in runtime.runs_dir if not given"
    )
    max_concurrent: Positive | None = Field(None, description="trials at once; as many as fit if not given")
    cpus_per_trial: Positive = Field(1, description="and threads, of a trial in its own process")
    gpus_per_trial: NonNegative | None = Field(
        None, description="a fraction shares a GPU; 1 where there are GPUs if not given"
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        3, description="failed trials after which the sweep stops"
    )
    max_restarts: Annotated[int, Field(ge=0)] = Field(
        2, description="how often a trial whose process was lost goes on from its checkpoint"
    )


class Config(_Section):
    """A whole configuration: one of the classes below, by its method."""

    method: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: DataSettings = Field(default_factory=DataSettings)
    space: SpaceSettings = Field(default_factory=SpaceSettings)
    search: SearchSettings
    retrain: RetrainSettings = Field(default_factory=RetrainSettings)
    runtime: RuntimeSettings = Field(default_factory=RuntimeSettings)
    tracking: TrackingSettings = Field(default_factory=TrackingSettings)
    sweep: SweepSettings | None = None

    @property
    def matrix_seed(self) -> int:
        """The seed of the measurement matrices."""
        return self.seed if self.space.matrix_seed is None else self.space.matrix_seed


class TwoStageConfig(Config):
    """Search, then train the found network from scratch."""

    method: Literal["two_stage"] = "two_stage"
    search: TwoStageSearchSettings = Field(default_factory=TwoStageSearchSettings)


class OneStageConfig(Config):
    """Search and train the target network in one run."""

    method: Literal["one_stage"] = "one_stage"
    search: OneStageSearchSettings = Field(default_factory=OneStageSearchSettings)


assert get_args(Primitive) == PRIMITIVES, "the schema's operations are those of istanas.space"
