"""A sweep's memory: an Optuna study in a database, which alone says which trials there were, are and will be."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from istanas.errors import ConfigError, IstanasError
from pipeline.rundir import RunDir
from pipeline.schema import OBJECTIVES, Config, SweepSettings
from pipeline.storage import local
from pipeline.sweep_space import distribution, encoded, settings_of_point, sweep_of
from pipeline.tracking import database_lock, one_line, public_uri

STUDY_FILE = "optuna.db"
EPOCH, TOP1 = "epoch", "valid/top1"  # in what a trial reports after an epoch
FINISHED, FAILED = "finished", "failed"  # in its last report: its figures, or the reason
FULL = "full"  # instead of either: a disk without room, which the whole sweep waits for
WARNED = "warned"  # what a trial has warned of
NODE = "node"  # of the cluster, in every report
HOME, MEANING = "run_dir", "objectives"  # attributes of the study
SETTINGS = "settings"  # attribute of the study's trials
# What else the study's trials keep of a trial's last report.
FIGURES = (
    "digest",
    "valid_top1",
    "retrained_top1",
    "params",
    "macs",
    "epochs",
    "seconds",
    "retrain_seconds",
    "run_dir",
    "retrain_dir",
    "reused",
    "frozen_epochs",
    "rollbacks",
    WARNED,
    FAILED,
)
SECONDS_FOR_A_LOCK = 60  # that another writer of a SQLite file may hold


def storage_uri(config: Config) -> str:
    """The database of the sweep's study."""
    given = sweep_of(config).storage
    if given is not None:
        return given
    return f"sqlite:///{local(config.runtime.runs_dir).absolute() / STUDY_FILE}"


def open_study(config: Config, name: str, *, fresh: bool, run_dir: Path | None = None) -> Study:
    """The study of a sweep, made if it is not there, with the points that are to be tried first.

    Args:
        config: of the sweep.
        name: of the study.
        fresh: forget an earlier one.
        run_dir: the sweep's run directory, which a study belongs to.

    Raises:
        IstanasError: if the database can't be used.
        ConfigError: if `sweep.start_from` names no study that fits, or the study belongs to another directory.
    """
    home = "" if run_dir is None else str(run_dir.resolve())
    sweep, uri = sweep_of(config), storage_uri(config)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    options = {"connect_args": {"timeout": SECONDS_FOR_A_LOCK}} if uri.startswith("sqlite:") else None
    try:
        with database_lock(uri):
            storage = RDBStorage(uri, engine_kwargs=options)
        known = optuna.get_all_study_names(storage)
        if name in known and not fresh:
            _check_home(optuna.load_study(study_name=name, storage=storage), home)
        # What a study remembers can't be gone on with when its run directory was deleted.
        gone = run_dir is not None and not RunDir(run_dir).exists()
        if name in known and (fresh or gone):
            optuna.delete_study(study_name=name, storage=storage)
            known.remove(name)
        if name in known:
            return optuna.load_study(study_name=name, storage=storage, sampler=RandomSampler())
        earlier = _earlier_trials(config, storage, known)
        study = optuna.create_study(
            study_name=name, storage=storage, directions=[OBJECTIVES[o] for o in sweep.objectives]
        )
        study.set_user_attr(HOME, home)
        study.set_user_attr(MEANING, _meaning(sweep))
        study.add_trials(earlier)
    except IstanasError:
        raise
    except Exception as error:  # every database fails in its own way
        raise IstanasError(
            f"sweep.storage is {public_uri(uri)}: can't be used ({one_line(error)}), start it, install its driver, or "
            "correct the address"
        ) from None
    enqueue_points(config, study)
    return study


def enqueue_points(config: Config, study: Study) -> None:
    """Have `sweep.points` tried first; what a point leaves open is drawn."""
    for point in sweep_of(config).points:
        settings = settings_of_point(config, point)
        study.enqueue_trial({key: encoded(value) for key, value in settings.items() if key in point})


def _check_home(study: Study, home: str) -> None:
    """Refuse to go on with trials whose runs lie elsewhere, or to let two sweeps share a study."""
    other = study.user_attrs.get(HOME, "")
    if other != home:
        raise ConfigError(
            f"sweep.storage has a study {study.study_name} that belongs to {other or 'no directory'}: go on there, set "
            "tracking.name for another sweep, or --fresh, which deletes it"
        )


def _earlier_trials(config: Config, storage: RDBStorage, known: Sequence[str]) -> list[FrozenTrial]:
    """The trials of `sweep.start_from` that lie in this space, to be learnt from."""
    sweep = sweep_of(config)
    if sweep.start_from is None:
        return []
    if sweep.start_from not in known:
        names = ", ".join(known) or "none"
        raise ConfigError(f"sweep.start_from is {sweep.start_from!r}: no such study, there are: {names}")
    study = optuna.load_study(study_name=sweep.start_from, storage=storage)
    same = [d.name for d in study.directions] == [OBJECTIVES[o].upper() for o in sweep.objectives]
    if not same or study.user_attrs.get(MEANING, _meaning(sweep)) != _meaning(sweep):
        raise ConfigError(f"sweep.start_from is {sweep.start_from!r}: it has other objectives, leave it out")
    done = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
    space = {key: d for key, parameter in sweep.space.items() if (d := distribution(parameter)) is not None}
    fitting = []
    for trial in done:
        if not set(trial.params) <= set(space):
            continue
        try:
            fitting.append(
                optuna.create_trial(
                    state=trial.state,
                    values=trial.values,
                    params=trial.params,
                    distributions={key: space[key] for key in trial.params},
                    intermediate_values=trial.intermediate_values,
                    user_attrs={"start_from": sweep.start_from},
                )
            )
        except ValueError:  # outside this space's bounds
            continue
    return fitting


def _meaning(sweep: SweepSettings) -> list[str]:
    """What the values of a study's trials are."""
    return [sweep.objective, *sweep.objectives]


def own_trials(study: Study) -> list[FrozenTrial]:
    """The trials of this sweep that were begun, in order: without what was learnt from an earlier one."""
    trials = study.get_trials(deepcopy=False)
    return [t for t in trials if t.state != TrialState.WAITING and "start_from" not in t.user_attrs]


def own_study(study: Study) -> Study:
    """A copy in memory with this sweep's trials only, whose numbers are their places in the sweep.

    Raises:
        optuna.exceptions.OptunaError: if the database can't be read.
    """
    copy = optuna.create_study(
        study_name=study.study_name, directions=study.directions, sampler=RandomSampler()
    )
    copy.add_trials(own_trials(study))
    return copy


def first_number(study: Study) -> int:
    """The study's number of this sweep's first trial: what was learnt from an earlier sweep stands before it."""
    return sum("start_from" in t.user_attrs for t in study.get_trials(deepcopy=False))


def n_failed(study: Study) -> int:
    """How many trials have failed."""
    return sum(t.state == TrialState.FAIL for t in own_trials(study))


def make_sampler(sweep: SweepSettings, seed: int) -> BaseSampler:
    """Who chooses the next settings."""
    seed %= 2**32
    if sweep.searcher == "random":
        return RandomSampler(seed=seed)
    if sweep.searcher == "nsga2":
        return NSGAIISampler(seed=seed, population_size=min(50, max(2, sweep.trials // 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # for years
        # With one trial at a time there is no other to stay away from.
        liar = sweep.max_concurrent != 1
        return TPESampler(seed=seed, multivariate=True, group=True, constant_liar=liar)


def best_trial(own: Study) -> FrozenTrial | None:
    """The best finished trial; of a Pareto front the one with the best top-1. None if no trial has finished.

    Args:
        own: as `own_study` gives it.
    """
    done = own.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not done:
        return None
    if len(own.directions) == 1:
        return max(done, key=lambda t: (t.values[0], -t.number))
    place = next(i for i, d in enumerate(own.directions) if d == StudyDirection.MAXIMIZE)
    return max(own.best_trials, key=lambda t: (t.values[place], -t.number))
