"""Checks of a sweep before it starts: settings that would make all, or some, of its trials fail."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from istanas.data import ImageDataset
from istanas.errors import ConfigError
from istanas.training import derive_seed
from pipeline.config.schema import Config
from pipeline.jobs.lifecycle import check_data
from pipeline.jobs.search import check_solver
from pipeline.sweeps.space import (
    N_CHECKED,
    Settings,
    check_space,
    extreme_settings,
    random_settings,
    readable,
    sweep_of,
    trial_config,
)
from pipeline.tracking.store import public_uri
from pipeline.training.data_checks import warnings_of_trials
from pipeline.training.pictures import check_fit

# Settings on which the checks against the pictures depend.
FIT_THE_PICTURES = {"cutout", "batch_size", "max_pictures", "alpha_fraction", "image_size"}


def check_sweep(config: Config, dataset: ImageDataset) -> None:
    """Check a sweep before it starts.

    Args:
        config: The sweep's configuration.
        dataset: The sweep's pictures.

    Raises:
        ConfigError: If the sweep is invalid, with one line for each mistake.
        IstanasError: If a solver is missing.
    """
    check_space(config)
    solvers = sweep_of(config).space.get("space.solver")
    chosen = [config.space.solver] if solvers is None else solvers.value
    for solver in [chosen] if isinstance(chosen, str) else chosen:
        check_solver(solver)
    if config.tracking.uri is not None and public_uri(config.tracking.uri) != config.tracking.uri:
        raise ConfigError(
            "contains a password, which would be sent to the process of every trial",
            field="tracking.uri",
            remedy="remove it from the address, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        )
    in_process = config.runtime.model_copy(update={"workers": 0, "address": None})
    # No jobs are checked here: the space may replace their settings. `check_space_fits` checks those of trials.
    check_data(config.model_copy(update={"runtime": in_process}), dataset, ())
    check_space_fits(config, dataset, jobs_of_trials(config))


def jobs_of_trials(config: Config) -> tuple[str, ...]:
    """Return the jobs that make up a trial."""
    return ("search", "retrain") if sweep_of(config).objective == "retrained" else ("search",)


def check_space_fits(config: Config, dataset: ImageDataset, jobs: Sequence[str]) -> None:
    """Check the bounds of the space, and some random settings, against the pictures.

    Raises:
        ConfigError: If settings do not fit the pictures.
    """
    drawn = [random_settings(config, derive_seed(config.seed, "check", n)) for n in range(N_CHECKED)]
    checked: set[str] = set()
    for settings, trial in _valid_trials(config, [*extreme_settings(config), *drawn]):
        sizes = {"data": trial.data, **{job: getattr(trial, job) for job in jobs}}
        decisive = str({name: part.model_dump(include=FIT_THE_PICTURES) for name, part in sizes.items()})
        if decisive in checked:
            continue
        checked.add(decisive)
        in_process = trial.runtime.model_copy(update={"workers": 0})
        try:
            check_fit(trial.model_copy(update={"runtime": in_process}), dataset, jobs)
        except ConfigError as error:
            raise error.in_source(f"sweep.space allows {readable(settings)}") from None


def warnings_of_space(config: Config, dataset: ImageDataset) -> list[str]:
    """Return a warning for each setting of the sweep, or value of its space, that makes no sense.

    Args:
        config: A configuration that `check_sweep` accepts.
        dataset: The sweep's pictures.
    """
    trials = (trial for _, trial in _valid_trials(config, extreme_settings(config)))
    return warnings_of_trials(trials, dataset, jobs_of_trials(config), sweep_of(config).space)


def _valid_trials(config: Config, candidates: Iterable[Settings]) -> Iterator[tuple[Settings, Config]]:
    """Yield the settings, with their configuration, that make a valid trial with the sweep's own pictures.

    Contradictory settings are skipped, because they fail only their own trial. Trials with another picture size are
    skipped, because they open another data set.
    """
    for settings in candidates:
        try:
            trial = trial_config(config, settings)
        except ConfigError:
            continue
        if trial.data.image_size == config.data.image_size:
            yield settings, trial
