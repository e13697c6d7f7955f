"""Checks of a sweep before it starts: what no trial, or not every trial, could be."""

from __future__ import annotations

from collections.abc import Sequence

from istanas.data import ImageDataset
from istanas.errors import ConfigError
from istanas.training import derive_seed
from pipeline.config.schema import Config
from pipeline.jobs.lifecycle import check_data
from pipeline.jobs.search import check_solver
from pipeline.sweep.space import (
    N_CHECKED,
    check_space,
    extreme_settings,
    random_settings,
    readable,
    sweep_of,
    trial_config,
)
from pipeline.tracking.store import public_uri
from pipeline.training.pictures import check_fit

FIT_THE_PICTURES = {"cutout", "batch_size", "max_pictures", "alpha_fraction", "image_size"}


def check_sweep(config: Config, dataset: ImageDataset) -> None:
    """Refuse before anything starts what no trial, or not every trial, could be.

    Args:
        config: of the sweep.
        dataset: its pictures.

    Raises:
        ConfigError: one line per mistake.
        IstanasError: if a solver is missing.
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
    # Of the sweep's own settings only what no key of the space replaces is a trial's.
    check_data(config.model_copy(update={"runtime": in_process}), dataset, ())
    check_space_fits(config, dataset, jobs_of_trials(config))


def jobs_of_trials(config: Config) -> tuple[str, ...]:
    """Return the jobs that a trial consists of."""
    return ("search", "retrain") if sweep_of(config).objective == "retrained" else ("search",)


def check_space_fits(config: Config, dataset: ImageDataset, jobs: Sequence[str]) -> None:
    """Check against the pictures what the space allows: its bounds, and some settings drawn at random.

    Raises:
        ConfigError: for settings that do not fit.
    """
    drawn = (random_settings(config, derive_seed(config.seed, "check", n)) for n in range(N_CHECKED))
    checked: set[str] = set()
    for settings in (*extreme_settings(config), *drawn):
        try:
            trial = trial_config(config, settings)
        except ConfigError:  # two bounds that do not fit together: such a trial fails, the others do not
            continue
        sizes = {"data": trial.data, **{job: getattr(trial, job) for job in jobs}}
        decisive = str({name: part.model_dump(include=FIT_THE_PICTURES) for name, part in sizes.items()})
        # Pictures of another size are another data set, which its trial opens.
        if decisive in checked or trial.data.image_size != config.data.image_size:
            continue
        checked.add(decisive)
        in_process = trial.runtime.model_copy(update={"workers": 0})
        try:
            check_fit(trial.model_copy(update={"runtime": in_process}), dataset, jobs)
        except ConfigError as error:
            raise error.in_source(f"sweep.space allows {readable(settings)}") from None
