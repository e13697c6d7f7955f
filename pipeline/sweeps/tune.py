"""The trials of a sweep in Ray Tune."""

from __future__ import annotations

from pathlib import Path

from optuna.exceptions import OptunaError
from optuna.study import Study

from istanas.errors import IstanasError
from pipeline.base.text import last_line
from pipeline.cluster.places import Plan
from pipeline.cluster.tune import LossReasons, TuneJob, run_tune
from pipeline.config.keys import known_methods
from pipeline.config.schema import Config, SearchSection, config_class
from pipeline.jobs.observer import RunObserver
from pipeline.sweeps.bookkeeping import TrialRuns
from pipeline.sweeps.searcher import StudySearcher, make_scheduler
from pipeline.sweeps.space import methods_of, sweep_of, values_of
from pipeline.sweeps.trial import run_trial

EPOCH_KEYS = ("search.epochs", "search.max_search_epochs", "search.train_epochs")


def run_trials_of_sweep(
    config: Config, plan: Plan, folder: Path, study: Study, trials: TrialRuns, observer: RunObserver
) -> None:
    """Run Ray Tune until no trial of a sweep is left.

    Raises:
        IstanasError: If Ray Tune fails or a trial cannot continue.
    """
    losses = LossReasons(
        observer.note, "the process of a trial was lost, and the trial resumes in another one"
    )
    searcher = StudySearcher(config, study, trials, losses.reason, trials.warm_ups())
    scheduler = make_scheduler(config, study, max_epochs(config))
    job = TuneJob("sweep", run_trial, plan, sweep_of(config).max_restarts, folder)
    try:
        run_tune(job, searcher, losses, scheduler)
    except (IstanasError, OptunaError, OSError):
        raise
    except Exception as error:
        raise IstanasError(
            f"failed ({last_line(error)})",
            field="sweep",
            remedy="run the same command again to resume",
        ) from error


def max_epochs(config: Config) -> int:
    """Return the largest number of epochs that a trial may report, over all values of the space."""
    space = sweep_of(config).space

    def most(method: str) -> int:
        settings: SearchSection = config.search if method == config.method else config_class(method)().search  # type: ignore[call-arg]
        swept = [key for key in space if key.startswith("search.") and method in known_methods(key)]
        highest = {
            key.partition(".")[2]: max(map(int, values_of(space[key]))) for key in swept if key in EPOCH_KEYS
        }
        return settings.model_copy(update=highest).max_epochs

    return max(map(most, methods_of(config)))
