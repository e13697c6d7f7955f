"""A sweep's memory: an Optuna study in a database, which alone says which trials there were, are and will be."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sqlite3
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from istanas.errors import ConfigError, IstanasError
from pipeline.base.addresses import is_remote
from pipeline.base.text import one_line
from pipeline.config.schema import OBJECTIVES, Config, SweepSettings
from pipeline.runs.bucket import fetch_parts, local, named, shown
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import STUDY_FILE
from pipeline.sweep.space import distribution, encoded, settings_of_point, sweep_of
from pipeline.tracking.store import database_lock, public_uri

EPOCH, TOP1 = "epoch", "valid/top1"  # in what a trial reports after an epoch
FINISHED, FAILED = "finished", "failed"  # in its last report: its figures, or the reason
BLOCKED = "blocked"  # instead of either: a full disk, a storage that is away; the whole sweep waits for them
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


def storage_uri(config: Config, name: str) -> str:
    """The database of a sweep's study: the one that is set, else one for all in the folder of runs.

    Of runs in a storage it is one of this machine, for a sitting: see `keep_study`.
    """
    given, folder = sweep_of(config).storage, local(config.runtime.runs_dir).absolute()
    if given is not None:
        return given
    if not _is_kept(config):
        return f"sqlite:///{folder / STUDY_FILE}"
    return f"sqlite:///{folder / '.studies' / hashlib.sha256(name.encode()).hexdigest()[:16]}.db"


def _is_kept(config: Config) -> bool:
    """Whether the study is a file of a run directory in a storage, where no database can be worked on."""
    return is_remote(config.runtime.runs_dir) and sweep_of(config).storage is None


def keep_study(config: Config, run_dir: Path) -> None:
    """Copy the study into the run directory as it is now, if that lies in a storage and no database is set."""
    if not _is_kept(config):
        return
    database = storage_uri(config, run_dir.name).removeprefix("sqlite:///")
    with tempfile.TemporaryDirectory(dir=run_dir, prefix=".study-") as folder:
        copy = Path(folder) / STUDY_FILE
        with (
            contextlib.closing(sqlite3.connect(database)) as source,
            contextlib.closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
        copy.replace(run_dir / STUDY_FILE)


def _restore(database: Path, run_dir: Path) -> None:
    """Begin a sitting with what the storage has: what this machine knows beyond that was told to nobody."""
    for file in database.parent.glob(f"{database.name}*"):
        file.unlink()
    if (run_dir / STUDY_FILE).is_file():
        shutil.copyfile(run_dir / STUDY_FILE, database)


def open_study(
    config: Config, name: str, *, fresh: bool, run_dir: Path | None = None, lock_seconds: float = 60
) -> Study:
    """The study of a sweep, made if it is not there, with the points that are to be tried first.

    Args:
        config: of the sweep.
        name: of the study.
        fresh: forget an earlier one.
        run_dir: the sweep's run directory, which a study belongs to.
        lock_seconds: how long another writer may lock a SQLite file.

    Raises:
        IstanasError: if the database can't be used.
        ConfigError: if `sweep.start_from` names no study that fits, or the study belongs to another directory.
    """
    home = "" if run_dir is None else named(run_dir)
    sweep, uri = sweep_of(config), storage_uri(config, name)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    if _is_kept(config) and run_dir is not None:
        _restore(Path(uri.removeprefix("sqlite:///")), run_dir)
    options = {"connect_args": {"timeout": lock_seconds}} if uri.startswith("sqlite:") else None
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
            f"cannot use the database {public_uri(uri)} ({one_line(error)})",
            field="sweep.storage",
            remedy="start the database, install its driver, or correct the address",
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
            f"the study {study.study_name} in this database belongs to {other or 'no run directory'}",
            field="sweep.storage",
            remedy="resume the sweep there, set tracking.name for another sweep, or delete the study with --fresh",
        )


def _earlier_trials(config: Config, storage: RDBStorage, known: Sequence[str]) -> list[FrozenTrial]:
    """The trials of `sweep.start_from` that lie in this space, to be learnt from."""
    sweep = sweep_of(config)
    if sweep.start_from is None:
        return []
    if _is_kept(config):
        study = _kept_study(config, sweep.start_from)
    elif sweep.start_from not in known:
        remedy = f"choose one of: {', '.join(known)}" if known else "leave it out: the database has no study"
        raise ConfigError(f"no such study: {sweep.start_from!r}", field="sweep.start_from", remedy=remedy)
    else:
        study = optuna.load_study(study_name=sweep.start_from, storage=storage)
    same = [d.name for d in study.directions] == [OBJECTIVES[o].upper() for o in sweep.objectives]
    if not same or study.user_attrs.get(MEANING, _meaning(sweep)) != _meaning(sweep):
        raise ConfigError(
            f"the study {sweep.start_from!r} has other objectives",
            field="sweep.start_from",
            remedy="leave it out, or name a study with the same objectives",
        )
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


def _kept_study(config: Config, name: str) -> Study:
    """The study of another sweep of the same storage, in memory."""
    run_dir = local(config.runtime.runs_dir) / name
    is_name = "/" not in name and name not in ("", ".", "..")
    if is_name:
        fetch_parts(run_dir, lambda file: file == STUDY_FILE)
    if not is_name or not (run_dir / STUDY_FILE).is_file():
        raise ConfigError(
            f"no such study: {name!r}",
            field="sweep.start_from",
            remedy=f"name the run directory of a sweep in {shown(local(config.runtime.runs_dir))}",
        )
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copyfile(run_dir / STUDY_FILE, Path(folder) / STUDY_FILE)
        memory = optuna.storages.InMemoryStorage()
        optuna.copy_study(
            from_study_name=name, from_storage=RDBStorage(f"sqlite:///{copy}"), to_storage=memory
        )
    return optuna.load_study(study_name=name, storage=memory)


def ended_study(config: Config, name: str) -> Study:
    """The study of a sweep that has ended; it is not made if it has gone.

    Raises:
        IstanasError: there is none, or its database can't be used.
    """
    if _is_kept(config):
        return _kept_study(config, name)
    uri = storage_uri(config, name)
    file = uri.removeprefix("sqlite:///")
    if file != uri and not Path(file).is_file():
        raise IstanasError("no such file", field=file)
    try:
        return optuna.load_study(study_name=name, storage=uri)
    except Exception as error:  # every database fails in its own way
        raise IstanasError(
            f"cannot use the database {public_uri(uri)} ({one_line(error)})", field="sweep.storage"
        ) from None


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
