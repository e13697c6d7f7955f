"""Loading of a command's configuration from its file and options, or from the run that it names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from istanas.errors import CheckpointError, ConfigError
from pipeline.base.redaction import without_secrets
from pipeline.runs.layout import CONFIG_FILE

if TYPE_CHECKING:
    from rich.console import Console

    from istanas.space import Genotype
    from pipeline.config.schema import Config
    from pipeline.runs.directory import RunDir
    from pipeline.tracking.references import Origin


SHORT = {
    "workers": "runtime.workers",
    "address": "runtime.address",
    "max_concurrent": "sweep.max_concurrent",
    "device": "runtime.device",
    "threads": "runtime.threads",
}
"""Option -> the setting that it sets."""


def load_config(
    file: str | None, overrides: tuple[str, ...], **short: str | int | None
) -> tuple[Config, str]:
    """Return the configuration of a command, and the name of its runs.

    Args:
        file: The configuration file, or the name of one that the package contains; None for the default one.
        overrides: The values of --set.
        short: The values of options that set a single key, see `SHORT`.
    """
    from pipeline.config.load import configuration_file, load
    from pipeline.tracking.references import load_of_run, run_of_config

    if file is not None and "://" in file:
        raise ConfigError(
            "an address",
            field=f"--config {without_secrets(file)!r:.80}",
            remedy="give a file on this machine",
        )
    path = configuration_file(file)
    given, run = _with_short(overrides, short), run_of_config(path)
    config = load(path, given) if run is None else load_of_run(path, run, given)
    return config, config.tracking.name or _name_of(path, run)


def overrides_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return settings as the values of --set.

    Example:
        >>> overrides_of({"seed": 1, "search.lr": 0.1, "retrain": {"epochs": 3}, "data.root": "pictures"})
        ('seed=1', 'search.lr=0.1', 'retrain={"epochs": 3}', 'data.root="pictures"')

    Raises:
        ConfigError: A value is not a number, a text, a truth value, None, or a list or dictionary of them.
    """
    given = []
    for key, value in settings.items():
        try:
            given.append(
                f"{key}={json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)}"
            )
        except (TypeError, ValueError):
            raise ConfigError(
                f"{value!r:.80} cannot be written to a configuration file",
                field=key,
                remedy="give a number, a text, True, False, None, or a list or dictionary of them",
            ) from None
    return tuple(given)


def keywords_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keyword arguments of a Python function as overrides, whose mistakes name the keyword.

    Raises:
        ConfigError: See `overrides_of`.
    """
    from pipeline.config.validation import Keyword

    return tuple(map(Keyword, overrides_of(settings)))


def find_run(reference: str, config: Config) -> RunDir:
    """Return the run that a reference names, see `pipeline.tracking.references.resolve_run`.

    Args:
        reference: A run directory or its address, an MLflow run id, or a name.
        config: The configuration, which names the folder of runs and the MLflow store.

    Raises:
        ConfigError: No run or more than one run matches.
    """
    from pipeline.runs import bucket
    from pipeline.tracking.references import resolve_run

    runs_dir = bucket.local(config.runtime.runs_dir)
    return resolve_run(reference, runs_dir=runs_dir, tracking_uri=config.tracking.uri)


def run_and_config(reference: str, file: str | None, overrides: tuple[str, ...]) -> tuple[RunDir, Config]:
    """Return a run, and the configuration that names its MLflow store.

    The configuration comes from the given file or, without a file, from the run.
    """
    from pipeline.tracking.references import load_of_run

    config, _ = load_config(file, overrides)
    run = find_run(reference, config)
    if file is None and (run.path / CONFIG_FILE).exists():
        config = load_of_run(run.path / CONFIG_FILE, run, overrides)
    return run, config


def config_of_search(
    reference: str, file: str | None, overrides: tuple[str, ...], **short: str | int | None
) -> tuple[Config, str]:
    """Return the configuration of a search, and the name of its runs.

    Raises:
        ConfigError: There is also a configuration file, or the run is no search.
    """
    if file is not None:
        raise ConfigError(
            f"{reference!r:.80} has its own configuration",
            field="--config",
            remedy="give a run or --config, not both",
        )
    run, _ = run_and_config(reference, None, overrides)
    kind = run.read().kind
    if kind != "search":
        raise ConfigError(f"is a {kind}", field=f"run {reference!r:.80}", remedy="name a search")
    config, name = load_config(str(run.path / CONFIG_FILE), overrides, **short)
    return config, name.removesuffix("-search")  # the kind, which each job adds to its name


def load_for_genotype(
    reference: str, console: Console, file: str | None, overrides: tuple[str, ...], **short: str | int | None
) -> tuple[Genotype, str | None, Config, str]:
    """Return the genotype and the settings of a retraining.

    Returns:
        The genotype, the directory of the run that found it, the configuration, and the name of the runs.
    """
    from pipeline.config.load import default_file, load
    from pipeline.runs import bucket
    from pipeline.tracking.references import check_to_train, resolve_genotype, resolve_origin

    config, name = load_config(file, overrides, **short)
    runs_dir = bucket.local(config.runtime.runs_dir)
    uri = config.tracking.uri
    cells, parent = resolve_genotype(
        reference, space=config.space.build(), runs_dir=runs_dir, tracking_uri=uri
    )
    origin = resolve_origin(reference, runs_dir=runs_dir, tracking_uri=uri) if file is None else None
    if origin is not None:
        sections = {
            section: getattr(origin.config, section).model_dump(mode="json")
            for section in ("data", "space", "tracking")
        }
        config = load(default_file(), _with_short(overrides, short), sections)
        _check_store_of(origin, config)
        name = config.tracking.name or origin.name
        root = f" in {config.data.root}" if config.data.root is not None else ""
        console.print(
            f"data ({config.data.name}{root}), space and tracking settings are those of {origin.run}; the others are "
            f"those of {default_file().name}; --config replaces them",
            highlight=False,
            soft_wrap=True,
        )
    check_to_train(reference, cells, parent, config, tracking_uri=uri)
    return cells, parent, config, name


def _check_store_of(origin: Origin, config: Config) -> None:
    """Check that a store from another run's settings still exists. In a copied project, it may be missing.

    Raises:
        ConfigError: Its folder is missing, and a new store there would be overlooked.
    """
    from pipeline.tracking.store import folder_is_missing, public_uri

    uri = config.tracking.uri
    if (
        config.tracking.enabled
        and uri is not None
        and uri == origin.config.tracking.uri
        and folder_is_missing(uri)
    ):
        raise ConfigError(
            f"the folder of {public_uri(uri)}, a setting of {origin.run}, no longer exists",
            field="tracking.uri",
            remedy="name a store with --set tracking.uri=URI",
        )


def _with_short(overrides: tuple[str, ...], short: Mapping[str, str | int | None]) -> tuple[str, ...]:
    """Return the overrides, followed by those that the options set."""
    return overrides + overrides_of(
        {SHORT[option]: value for option, value in short.items() if value is not None}
    )


def _name_of(path: Path, run: RunDir | None) -> str:
    """Return the name of a configuration's runs: its file's name, or the name of the run that saved it."""
    if run is None:
        return path.stem
    try:
        name = run.read().name
    except CheckpointError:  # the configuration can be read without the run's record
        return path.stem
    return name if run.path == path.absolute().parent else f"{name}-best"
