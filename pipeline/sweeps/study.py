"""The Optuna study of a sweep: its only persistent state, in a database."""

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
from pipeline.cluster.tune import FAILED
from pipeline.config.schema import OBJECTIVES, Config, SweepSettings
from pipeline.runs.bucket import fetch_parts, local, named, shown
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import STUDY_FILE
from pipeline.sweeps.space import distribution, encoded, first_points, sweep_of
from pipeline.tracking.store import database_lock, public_uri

# Keys of the reports that a trial sends, in addition to those of `pipeline.cluster.tune`.
EPOCH, TOP1 = "epoch", "valid/top1"  # after each epoch
# Instead of FINISHED and FAILED, if a full disk or an unreachable storage stops the sweep.
BLOCKED = "blocked"
WARNED = "warned"  # the warnings of the trial
HOME, MEANING = "run_dir", "objectives"  # user attributes of the study
SETTINGS = "settings"  # user attribute of a trial
# Keys of a trial's last report that become user attributes of the trial.
FIGURES = (
    "digest",
    "valid_top1",
    "retrained_top1",
    "params",
    "macs",
    "latency_ms",
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
LOCK_SECONDS = 60.0  # how long to wait for another writer of a SQLite file


def storage_uri(config: Config, name: str) -> str:
    """Return the address of a study's database: `sweep.storage`, or one file for all sweeps in the runs folder.

    If runs are kept in a bucket, it is a local file, which `save_study` copies into the run directory.
    """
    given, folder = sweep_of(config).storage, local(config.runtime.runs_dir).absolute()
    if given is not None:
        return given
    if not _is_saved_in_bucket(config):
        return f"sqlite:///{folder / STUDY_FILE}"
    return f"sqlite:///{folder / '.studies' / hashlib.sha256(name.encode()).hexdigest()[:16]}.db"


def _is_saved_in_bucket(config: Config) -> bool:
    """Return whether the study is saved in a bucket, where a database cannot be opened in place."""
    return is_remote(config.runtime.runs_dir) and sweep_of(config).storage is None


def save_study(config: Config, run_dir: Path) -> None:
    """Copy the study into the run directory, if that is in a bucket and `sweep.storage` is not set."""
    if not _is_saved_in_bucket(config):
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
    """Replace the local database with the copy from the bucket.

    Local entries that the copy lacks had no effect, because the study is saved before a trial depends on it.
    """
    for file in database.parent.glob(f"{database.name}*"):
        file.unlink()
    if (run_dir / STUDY_FILE).is_file():
        shutil.copyfile(run_dir / STUDY_FILE, database)


def open_study(
    config: Config,
    name: str,
    *,
    fresh: bool,
    run_dir: Path | None = None,
    lock_seconds: float = LOCK_SECONDS,
) -> Study:
    """Open the study of a sweep. A new study starts with `sweep.points` and the trials of `sweep.start_from`.

    Args:
        config: The sweep's configuration.
        name: The name of the study.
        fresh: Whether to delete an existing study.
        run_dir: The sweep's run directory, to which the study belongs.
        lock_seconds: How long to wait for another writer of a SQLite file.

    Raises:
        IstanasError: If the database cannot be used.
        ConfigError: If `sweep.start_from` names no suitable study, or the study belongs to another directory.
    """
    home = "" if run_dir is None else named(run_dir)
    sweep, uri = sweep_of(config), storage_uri(config, name)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    if _is_saved_in_bucket(config) and run_dir is not None:
        _restore(Path(uri.removeprefix("sqlite:///")), run_dir)
    options = {"connect_args": {"timeout": lock_seconds}} if uri.startswith("sqlite:") else None
    try:
        with database_lock(uri):
            storage = RDBStorage(uri, engine_kwargs=options)
        known = optuna.get_all_study_names(storage)
        if name in known and not fresh:
            _check_home(optuna.load_study(study_name=name, storage=storage), home)
        # A study cannot be resumed without its run directory, which has the checkpoints of the trials.
        deleted = run_dir is not None and not RunDir(run_dir).exists()
        if name in known and (fresh or deleted):
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
    except Exception as error:  # Each database driver has its own errors.
        raise IstanasError(
            f"cannot use the database {public_uri(uri)} ({one_line(error)})",
            field="sweep.storage",
            remedy="start the database, install its driver, or correct the address",
        ) from None
    enqueue_points(config, study)
    return study


def enqueue_points(config: Config, study: Study) -> None:
    """Enqueue the first trials: `sweep.points` or the whole grid."""
    for point in first_points(config):
        study.enqueue_trial({key: encoded(value) for key, value in point.items()})


def _check_home(study: Study, home: str) -> None:
    """Check that the study belongs to this run directory: two sweeps must not share one.

    Raises:
        ConfigError: If it belongs to another directory.
    """
    other = study.user_attrs.get(HOME, "")
    if other != home:
        raise ConfigError(
            f"the study {study.study_name} in this database belongs to {other or 'no run directory'}",
            field="sweep.storage",
            remedy="resume the sweep there, set tracking.name for another sweep, or delete the study with --fresh",
        )


def _earlier_trials(config: Config, storage: RDBStorage, known: Sequence[str]) -> list[FrozenTrial]:
    """Return the finished trials of `sweep.start_from` that lie in this sweep's space."""
    sweep = sweep_of(config)
    if sweep.start_from is None:
        return []
    if _is_saved_in_bucket(config):
        study = _saved_study(config, sweep.start_from)
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
        except ValueError:  # A value is outside this space's bounds.
            continue
    return fitting


def _saved_study(config: Config, name: str) -> Study:
    """Load the study of a sweep in the same bucket into memory.

    Raises:
        ConfigError: If there is no such study.
    """
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
    """Load the existing study of a sweep that has ended.

    Raises:
        IstanasError: If there is no such study, or its database cannot be used.
    """
    if _is_saved_in_bucket(config):
        return _saved_study(config, name)
    uri = storage_uri(config, name)
    file = uri.removeprefix("sqlite:///")
    if file != uri and not Path(file).is_file():
        raise IstanasError("no such file", field=file)
    try:
        return optuna.load_study(study_name=name, storage=uri)
    except Exception as error:  # Each database driver has its own errors.
        raise IstanasError(
            f"cannot use the database {public_uri(uri)} ({one_line(error)})", field="sweep.storage"
        ) from None


def _meaning(sweep: SweepSettings) -> list[str]:
    """Return the objectives of a study's values; studies with different objectives cannot be combined."""
    return [sweep.objective, *sweep.objectives]


def own_trials(study: Study) -> list[FrozenTrial]:
    """Return the trials that this sweep has started, in order, without those of `sweep.start_from`."""
    trials = study.get_trials(deepcopy=False)
    return [t for t in trials if t.state != TrialState.WAITING and "start_from" not in t.user_attrs]


def own_study(study: Study) -> Study:
    """Copy this sweep's own trials into a study in memory, where they are numbered from 0.

    Raises:
        optuna.exceptions.OptunaError: If the database cannot be read.
    """
    copy = optuna.create_study(
        study_name=study.study_name, directions=study.directions, sampler=RandomSampler()
    )
    copy.add_trials(own_trials(study))
    return copy


def first_number(study: Study) -> int:
    """Return the number of this sweep's first trial; the trials of `sweep.start_from` come before it in the study."""
    return sum("start_from" in t.user_attrs for t in study.get_trials(deepcopy=False))


def n_failed(study: Study) -> int:
    """Return the number of failed trials."""
    return sum(t.state == TrialState.FAIL for t in own_trials(study))


def make_sampler(sweep: SweepSettings, seed: int) -> BaseSampler:
    """Return the Optuna sampler of a sweep."""
    seed %= 2**32
    if sweep.searcher in ("random", "grid"):  # All trials of a grid are enqueued, so that none is sampled.
        return RandomSampler(seed=seed)
    if sweep.searcher == "nsga2":
        return NSGAIISampler(seed=seed, population_size=min(50, max(2, sweep.trials // 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # The constant liar keeps concurrent trials apart; without concurrency, it is not needed.
        concurrent = sweep.max_concurrent != 1
        return TPESampler(seed=seed, multivariate=True, group=True, constant_liar=concurrent)


def best_trial(own: Study) -> FrozenTrial | None:
    """Return the best finished trial (on a Pareto front, the one with the best top-1), or `None` without one.

    Args:
        own: The study that `own_study` returns.
    """
    done = own.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not done:
        return None
    if len(own.directions) == 1:
        return max(done, key=lambda t: (t.values[0], -t.number))
    place = next(i for i, d in enumerate(own.directions) if d == StudyDirection.MAXIMIZE)
    return max(own.best_trials, key=lambda t: (t.values[place], -t.number))
