"""The configuration: one validated schema for YAML files and `--set key.path=value`. It fails here or never.

Unknown keys, wrong types and impossible combinations are `ConfigError`s that name file, field and remedy.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from ruamel.yaml import YAML, YAMLError

from istanas.errors import ConfigError
from istanas.space import PRIMITIVES, CellSpace
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
Stem = Literal["cifar", "imagenet"]
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
    cache_dir: str | None = Field(
        None, description="where decoded pictures are cached (default ~/.cache/istanas)"
    )
    holdout: Fraction = Field(0.0, description="stratified share of the training pictures kept for choosing")
    crop_padding: Annotated[int, Field(ge=0)] = Field(
        0, description="random crop after padding by so many pixels, of small pictures"
    )
    horizontal_flip: bool = Field(False, description="mirror half of the training pictures")


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
    stem: Stem = "cifar"
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

    max_search_epochs: Positive = Field(120, description="nodes still active after so many epochs freeze")
    train_epochs: Annotated[int, Field(ge=0)] = Field(600, description="of the fixed architecture")
    batch_size: Annotated[int, Field(ge=2)] = 96
    init_channels: Positive = 36
    layers: Annotated[int, Field(ge=3)] = Field(20, description="fewer than 3 would hold no normal cell")
    lr: AbovePositive = 0.025
    lr_min: NonNegative = 0.0
    arch_lr: AbovePositive = 3e-4
    cutout: Annotated[int, Field(ge=0)] = 16
    auxiliary_weight: NonNegative = Field(0.4, description="weight of the auxiliary head's loss; 0: no head")
    drop_path: Fraction = Field(0.2, description="drop-path probability, rising from 0 to this in training")
    termination_tol: NonNegative = Field(
        1e-3, description="a node freezes when its code moves by at most this"
    )
    max_params: Positive | None = Field(
        3_700_000, description="largest architecture; auxiliary head left out"
    )
    max_macs: Positive | None = Field(None, description="most multiply-adds of an architecture")
    test_every: Positive = Field(
        1, description="measure the test split every so many training epochs, and after the last"
    )

    @property
    def max_epochs(self) -> int:
        """The most epochs that a search may take."""
        return self.max_search_epochs + self.train_epochs

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
    stem: Stem = "cifar"
    lr: AbovePositive = 0.025
    lr_min: NonNegative = 0.0
    schedule: Literal["cosine", "linear"] = "cosine"
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
    test_every: Positive = Field(
        1, description="measure the test split every so many epochs, and after the last"
    )


class RuntimeSettings(_Section):
    """Where a job runs; never part of the configuration's hash."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on GPUs, fp32 on CPUs")
    threads: Positive | None = Field(None, description="of each worker; cores / workers if not given")
    activation_checkpointing: bool = Field(
        False,
        description="computes each cell again in the backward pass: about half the memory, more time, same bits",
    )
    data_workers: Annotated[int, Field(ge=0)] = Field(0, description="processes that decode large pictures")
    workers: Annotated[int | str, BeforeValidator(_checked_workers)] = Field(
        0, description="Ray Train workers, a number or MIN:MAX (elastic); 0: in this process, without Ray"
    )
    address: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="of a Ray cluster; RAY_ADDRESS if not given, else Ray is started on this machine"
    )
    wait_minutes: NonNegative = Field(10.0, description="how long to wait for a cluster's resources")
    max_failures: Annotated[int, Field(ge=0)] = Field(
        5, description="how often lost workers are replaced before the job fails"
    )
    runs_dir: str = "runs"

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
    registered_model: Annotated[str, Field(min_length=1, pattern=r"^[^/:]*$")] | None = Field(
        None, description="under which trained networks are registered; istanas-DATASET if not given"
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


_CLASSES: dict[str, type[Config]] = {"two_stage": TwoStageConfig, "one_stage": OneStageConfig}

_HASHED = {
    "search": ("method", "seed", "data", "space", "search"),
    "retrain": ("seed", "data", "retrain"),
}
_NOT_HASHED_DATA = ("download", "cache_dir")


def default_file() -> Path:
    """The configuration that job commands use when none is named: the digits that scikit-learn ships."""
    return Path(__file__).resolve().parent.parent / "tune_configs" / "digits_quickstart.yaml"


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides, validate.

    Args:
        path: the file; None for the schema's defaults.
        overrides: "key.path=value" each, the value in YAML.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: one line per mistake, each with file, field, value, remedy.
    """
    source = "command line" if path is None else str(path)
    tree = {} if path is None else _read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    method = tree.get("method", "two_stage")
    schema = _CLASSES.get(method, TwoStageConfig) if isinstance(method, str) else TwoStageConfig
    try:
        config = schema.model_validate(tree)
    except pydantic.ValidationError as error:
        errors = [
            e for e in error.errors() if e["loc"] == ("method",)
        ] or error.errors()  # it decides the schema
        given = {override.partition("=")[0]: override for override in overrides}
        raise ConfigError("\n".join(_explain(source, e, given, schema) for e in errors)) from None
    # Which of file and overrides is to blame cannot be told from a combination.
    _check_combinations(f"{source} with --set" if overrides else source, config)
    return config


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML, defaults included; `load` reads it back to an equal one."""
    buffer = io.StringIO()
    _yaml().dump(config.model_dump(mode="json"), buffer)
    return buffer.getvalue()


def run_hash(config: Config, job: str, **extra: str) -> str:
    """Ten hex digits that stand for everything that decides a job's result.

    Args:
        config: the configuration.
        job: "search" or "retrain".
        extra: what else decides it (the genotype of a retraining).
    """
    decisive = config.model_dump(mode="json", include=set(_HASHED[job]))
    for key in _NOT_HASHED_DATA:
        del decisive["data"][key]
    if decisive["data"]["root"] is not None:
        decisive["data"]["root"] = str(Path(decisive["data"]["root"]).expanduser().resolve())
    text = json.dumps({"job": job, **decisive, **extra}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def flat_params(config: Config, sections: Sequence[str]) -> dict[str, Any]:
    """Short flat settings for MLflow: "section.key" -> value."""
    tree = config.model_dump(mode="json")
    params: dict[str, Any] = {"seed": config.seed, "method": config.method}
    for section in sections:
        for key, value in tree[section].items():
            params[f"{section}.{key}"] = ",".join(map(str, value)) if isinstance(value, list) else value
    return params


def _yaml() -> YAML:
    # YAML 1.2: 1e-3 is a number; duplicate keys are errors; tags are not objects.
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    return yaml


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = _yaml().load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}), give an existing YAML file") from None
    except (YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: holds a {type(tree).__name__}, give sections such as `search:` with their keys"
        )
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {override!r}: write key.path=value, such as search.epochs=10")
    try:
        value = _yaml().load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"--set {override!r}: the value is not YAML: {' '.join(str(error).split())}"
        ) from None
    *parents, last = key.split(".")
    for name in parents:
        child = tree.setdefault(name, {})
        if child is None:
            child = tree[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {_printable(name)} is a value, not a section")
        tree = child
    tree[last] = value


def _explain(source: str, error: Any, given: dict[str, str], schema: type[Config]) -> str:
    """One line for one of pydantic's errors; `given` maps the keys of --set to what was written."""
    path = ".".join(str(part) for part in error["loc"])
    for key, override in given.items():
        if path == key or path.startswith(f"{key}."):
            source = f"--set {override!r:.80}"
    field = ".".join(
        _printable(part) for part in error["loc"] if not str(part).startswith(("function-", "constrained-"))
    )
    if error["type"] == "extra_forbidden":
        known = _known_keys(schema, error["loc"][:-1])
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        others = [name for name, other in _CLASSES.items() if other is not schema]
        hint = next((f"it belongs to method: {m}" for m in others if _knows(_CLASSES[m], error["loc"])), hint)
        return f"{source}: {field}: unknown key, {hint}"
    if error["loc"] == ("method",):
        error = {**error, "msg": f"choose {' or '.join(_CLASSES)}"}
    value = error.get("input")
    reason = error["msg"].removeprefix("Value error, ")
    return f"{source}: {field}: {value!r:.60} is refused: {reason[:1].lower()}{reason[1:]}"


def _printable(key: Any) -> str:
    """A key as it was written, or escaped if it would break the line of the message."""
    return str(key) if str(key).isprintable() else repr(key)


def _known_keys(schema: type[Config], location: Sequence[Any]) -> list[str]:
    model: Any = schema
    for part in location:
        model = model.model_fields[part].annotation
    return list(model.model_fields)


def _knows(schema: type[Config], location: Sequence[Any]) -> bool:
    *sections, key = location
    return key in _known_keys(schema, sections)


def _check_combinations(source: str, config: Config) -> None:
    try:
        config.space.cell_space()
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    problems = []
    for name in ("search", "retrain"):
        section = getattr(config, name)
        if section.lr_min > section.lr:
            problems.append(f"{name}.lr_min is {section.lr_min}, above {name}.lr = {section.lr}: lower it")
        if section.stem == "imagenet" and section.init_channels < 2:
            problems.append(
                f"{name}.init_channels is {section.init_channels}: stem imagenet needs at least 2"
            )
    if config.runtime.address is not None and config.runtime.worker_range.maximum == 0:
        problems.append("runtime.address is set and runtime.workers is 0: give --workers N")
    if config.retrain.warmup_epochs >= config.retrain.epochs:
        problems.append(
            f"retrain.warmup_epochs is {config.retrain.warmup_epochs}: choose less than retrain.epochs = "
            f"{config.retrain.epochs}"
        )
    if config.retrain.nesterov and config.retrain.momentum == 0:
        problems.append("retrain.nesterov is true: it needs retrain.momentum above 0")
    if config.data.name != "folder" and config.data.image_size is not None:
        from istanas.data.datasets import SMALL_SIDE  # imports torch, which most commands can do without

        if config.data.image_size > SMALL_SIDE:
            problems.append(
                f"data.image_size is {config.data.image_size}: {config.data.name} takes at most {SMALL_SIDE}"
            )
    if config.data.name == "folder" and config.data.root is None:
        problems.append("data.root is missing: name the picture folder, --set data.root=DIR")
    if config.runtime.device == "cpu" and config.runtime.precision == "bf16":
        problems.append(
            "runtime.precision is bf16 on runtime.device cpu: slower and unsafe there, choose fp32"
        )
    if problems:
        raise ConfigError("\n".join(f"{source}: {problem}" for problem in problems))


assert get_args(Primitive) == PRIMITIVES, "the schema's operations are those of istanas.space"
