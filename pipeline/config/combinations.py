"""Checks for settings that are valid individually but cannot be combined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from istanas.checks import check_dataset_arguments, check_stem
from istanas.errors import ConfigError
from pipeline.config.errors import ConflictError
from pipeline.config.schema import Config


def conflicts_of(config: Config) -> Iterator[ConflictError]:
    """Yield every conflict of a configuration. A sweep's space is checked by `pipeline.sweeps.space`."""
    for name in ("search", "retrain"):
        section = getattr(config, name)
        if section.lr_min > section.lr:
            yield ConflictError(
                f"{section.lr_min} is above {name}.lr = {section.lr}",
                fields=(f"{name}.lr_min", f"{name}.lr"),
                remedy="lower it",
            )
        if section.stem != "auto":
            try:
                check_stem(section.stem, section.init_channels)
            except ConfigError as error:
                fields = (f"{name}.{error.field}", f"{name}.stem")
                yield ConflictError(error.problem, fields=fields, remedy=error.remedy)
    if (
        config.runtime.address is not None
        and config.runtime.worker_range.maximum == 0
        and config.search.trials_at_once == 1
        and config.sweep is None
    ):
        yield ConflictError(
            "0 runs the job in this process, not on the cluster at runtime.address",
            fields=("runtime.workers", "runtime.address"),
            remedy="give --workers N",
        )
    yield from _warmup_conflicts(config)
    yield from _latency_conflicts(config)
    at_once, workers = config.search.trials_at_once, config.runtime.worker_range.maximum
    if at_once > 1 and workers > 1:
        yield ConflictError(
            f"{at_once} architectures are trained at a time, each in one process, and runtime.workers is {workers}",
            fields=("search.max_concurrent", "runtime.workers"),
            remedy="set one of them to 1",
        )
    if config.retrain.nesterov and config.retrain.momentum == 0:
        yield ConflictError(
            "true requires momentum, and retrain.momentum is 0",
            fields=("retrain.nesterov", "retrain.momentum"),
            remedy="set retrain.momentum above 0",
        )
    data = config.data
    try:
        check_dataset_arguments(
            data.name,
            data.entry,
            root=data.root,
            image_size=data.image_size,
            test_fraction=data.test_fraction,
        )
    except ConfigError as error:
        yield ConflictError(error.problem, fields=(str(error.field), "data.name"), remedy=error.remedy)
    runs = config.tracking.name
    if runs is not None and (runs.strip() in ("", ".", "..") or any(c in runs for c in "/\\\0")):
        yield ConflictError(
            f"{runs!r:.60} cannot name a folder in runtime.runs_dir",
            fields=("tracking.name",),
            remedy="give a name that is not blank and has no slashes",
        )
    yield from _sweep_conflicts(config)
    if config.runtime.device == "cpu" and config.runtime.precision == "bf16":
        yield ConflictError(
            "bf16 is slow and unsafe on runtime.device cpu",
            fields=("runtime.precision", "runtime.device"),
            remedy="choose fp32",
        )


def check_batch_sizes(config: Config, jobs: Sequence[str]) -> None:
    """Check that every worker gets two pictures of each batch, which batch norm requires.

    Args:
        config: The configuration.
        jobs: "search", "retrain" or both.

    Raises:
        ConfigError: A batch is too small for the number of workers.
    """
    workers = config.runtime.worker_range.maximum
    for job in jobs:
        batch_size = getattr(config, job).batch_size
        if batch_size < 2 * workers:
            raise ConfigError(
                f"{batch_size} is too small for {workers} workers",
                field=f"{job}.batch_size",
                remedy=f"use at least {2 * workers}, or lower runtime.workers",
            )


def _warmup_conflicts(config: Config) -> Iterator[ConflictError]:
    lengths = [
        ("retrain.warmup_epochs", config.retrain.warmup_epochs, "retrain.epochs", config.retrain.epochs)
    ]
    lengths += [
        (f"search.{key}", getattr(config.search, key), f"search.{other}", getattr(config.search, other))
        for key, other in config.search.settings_class.shorter
    ]
    for key, warmup, other, epochs in lengths:
        if warmup >= epochs:
            yield ConflictError(
                f"{warmup} is not less than {other} = {epochs}", fields=(key, other), remedy="lower it"
            )


def _latency_conflicts(config: Config) -> Iterator[ConflictError]:
    """Yield the settings that require a table of latencies if there is none."""
    search = config.search
    if getattr(search, "latency_table", None) is not None:
        return
    for key, given in (
        ("cost", getattr(search, "cost", None) == "latency"),
        ("max_latency_ms", getattr(search, "max_latency_ms", None) is not None),
    ):
        if given:
            yield ConflictError(
                f"{getattr(search, key)} requires a table of latencies, and search.latency_table is null",
                fields=(f"search.{key}", "search.latency_table"),
                remedy="measure one with istanas latency, and set search.latency_table",
            )


def _sweep_conflicts(config: Config) -> Iterator[ConflictError]:
    sweep = config.sweep
    if sweep is None:
        return
    if len(set(sweep.objectives)) < len(sweep.objectives) or "top1" not in sweep.objectives:
        yield ConflictError(
            f"{sweep.objectives} lacks top1, or names an objective twice",
            fields=("sweep.objectives",),
            remedy="give top1, and each other objective at most once",
        )
    if len(sweep.objectives) > 1:
        if sweep.scheduler != "none":
            yield ConflictError(
                "asha cannot rank trials by several sweep.objectives",
                fields=("sweep.scheduler", "sweep.objectives"),
                remedy="set none",
            )
    elif sweep.searcher == "nsga2":
        yield ConflictError(
            "nsga2 requires several sweep.objectives",
            fields=("sweep.searcher", "sweep.objectives"),
            remedy="choose tpe, or add an objective",
        )
    learns = {"nsga2": "learns only from its own trials", "grid": "learns from no trials"}.get(sweep.searcher)
    if sweep.start_from is not None and learns is not None:
        yield ConflictError(
            f"sweep.searcher {sweep.searcher} {learns}",
            fields=("sweep.start_from", "sweep.searcher"),
            remedy="leave it out, or choose another searcher",
        )
    if sweep.points and sweep.searcher == "grid":
        yield ConflictError(
            "sweep.searcher grid has all its points",
            fields=("sweep.points", "sweep.searcher"),
            remedy="leave it out, or choose another searcher",
        )
    if sweep.objective == "valid" and not config.search.settings_class.validates:
        yield ConflictError(
            f"method {config.method} measures no validation accuracy of its result",
            fields=("sweep.objective", "method"),
            remedy="set sweep.objective=retrained and data.holdout=0.1",
        )
    elif config.data.holdout == 0 and (sweep.objective == "retrained" or config.trains_target):
        yield ConflictError(
            "0 leaves no pictures to measure the objective on",
            fields=("data.holdout", "sweep.objective"),
            remedy="set data.holdout=0.1",
        )
    if config.search.trials_at_once > 1:
        yield ConflictError(
            f"{config.search.trials_at_once}, but the trials of a sweep train one architecture at a time",
            fields=("search.max_concurrent", "sweep"),
            remedy="set it to 1; sweep.max_concurrent is the number of concurrent trials",
        )
    yield from _resource_conflicts(config)


def _resource_conflicts(config: Config) -> Iterator[ConflictError]:
    """Yield the conflicts between a sweep's resources and those of its trials."""
    assert config.sweep is not None
    workers, gpus, device = config.runtime.worker_range, config.sweep.gpus_per_trial, config.runtime.device
    if workers.elastic:
        yield ConflictError(
            f"{config.runtime.workers} is a range, and trials require a fixed number",
            fields=("runtime.workers",),
            remedy="give a number, such as 2",
        )
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        yield ConflictError(
            f"{gpus} is neither a whole number nor a fraction below 1",
            fields=("sweep.gpus_per_trial",),
            remedy="give one of them",
        )
    if gpus and device == "cpu":
        yield ConflictError(
            f"{gpus} cannot be used on runtime.device cpu",
            fields=("sweep.gpus_per_trial", "runtime.device"),
            remedy="set 0, or runtime.device=auto",
        )
    if gpus == 0 and device == "cuda":
        yield ConflictError(
            "0 leaves no GPU for runtime.device cuda",
            fields=("sweep.gpus_per_trial", "runtime.device"),
            remedy="give each trial a GPU or a fraction of one",
        )
    if workers.maximum > 1 and "gpus_per_trial" in config.sweep.model_fields_set:
        yield ConflictError(
            "cannot be set with several workers, each of which has one GPU",
            fields=("sweep.gpus_per_trial", "runtime.workers"),
            remedy="leave it out",
        )
