"""The searcher through which Ray Tune asks and tells a sweep's study, and the scheduler that stops trials early.

The searcher keeps nothing that it can't read in the study, so that whatever dies, the next sitting goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from ray.tune import Callback
from ray.tune.result import EXPR_ERROR_FILE
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from istanas.errors import ConfigError, IstanasError
from istanas.training import derive_seed
from pipeline.base.text import last_line, one_line
from pipeline.config.schema import OBJECTIVES, Config
from pipeline.sweep.space import Settings, suggest, sweep_of
from pipeline.sweep.study import (
    BLOCKED,
    EPOCH,
    FAILED,
    FIGURES,
    FINISHED,
    SETTINGS,
    TOP1,
    enqueue_points,
    first_number,
    make_sampler,
    n_failed,
    own_trials,
)


def first_settings(config: Config, number: int) -> list[Settings]:
    """What a sweep's first trials would have, without a database: points, then random ones."""

    class Peek:
        def __init__(self) -> None:
            self.seen: list[Settings] = []

        def begins(self, index: int, settings: Settings) -> dict[str, Any]:
            self.seen.append(settings)
            return {}

        def ended(self, index: int, state: TrialState, result: dict[str, Any]) -> None:
            pass

        def told(self, index: int) -> None:
            pass

    sweep, peek = sweep_of(config), Peek()
    study = optuna.create_study(directions=[OBJECTIVES[o] for o in sweep.objectives])
    enqueue_points(config, study)
    searcher = StudySearcher(config, study, peek)
    for n in range(min(number, sweep.trials)):
        searcher.suggest(str(n))
    return peek.seen


class _Reseeded:
    """Optuna's trial, with a sampler whose draws depend on (seed, number, key) only.

    So the settings of a trial follow from what the study held when it was begun, whatever process asks, and one
    that was killed between two parameters is completed as it would have been.
    """

    def __init__(self, config: Config, trial: Trial, index: int) -> None:
        def reseeded(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(key: str, *args: Any, **options: Any) -> Any:
                trial.study.sampler = make_sampler(
                    sweep_of(config), derive_seed(config.seed, "sweep", index, key)
                )
                return method(key, *args, **options)

            return call

        self.suggest_int = reseeded(trial.suggest_int)
        self.suggest_float = reseeded(trial.suggest_float)
        self.suggest_categorical = reseeded(trial.suggest_categorical)


class Ends(Protocol):
    """Who wants to know what becomes of trials, in the user's process."""

    def begins(self, index: int, settings: Settings) -> dict[str, Any]:
        """Called before a trial starts or goes on; returns what its process is given."""

    def ended(self, index: int, state: TrialState, result: dict[str, Any]) -> None:
        """Called when a trial has ended, with its last report, before the study is told."""

    def told(self, index: int) -> None:
        """Called when the study knows of it, too."""


class StudySearcher(Searcher):
    """Asks and tells the study, as Ray Tune wants it.

    Args:
        config: of the sweep.
        study: as `open_study` gives it.
        ends: told of every trial.
        why: by Tune's id, why a trial's process was lost the last time.
        warm_ups: tasks that come before any trial, one for each process: they are of Tune's, not of the study's.
    """

    def __init__(
        self,
        config: Config,
        study: Study,
        ends: Ends,
        why: Callable[[str], str] = lambda trial_id: "out of memory, or killed",
        warm_ups: Sequence[dict[str, Any]] = (),
    ) -> None:
        super().__init__()
        self._warm_ups = list(warm_ups)
        self._why = why
        self._config, self._study, self._ends = config, study, ends
        self._sweep = sweep_of(config)
        begun = own_trials(study)
        self._first = first_number(study)
        self._unfinished = [t.number for t in begun if t.state == TrialState.RUNNING]
        self._begun = len(begun)
        self._trials: dict[str, Trial] = {}  # Tune's id -> Optuna's trial
        # Tune's id -> the last report: of a trial that is lost, Tune gives none.
        self._reported: dict[str, dict[str, Any]] = {}
        self.error: Exception | None = None  # Tune would take one of ours for the trial's

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be tried: an error of ours, or too many failed trials."""
        return self.error is not None or n_failed(self._study) > self._sweep.max_failures

    def suggest(self, trial_id: str) -> Any:
        """The next trial's task, or Tune's word for the end; first come those that an earlier sitting left."""
        try:
            return self._suggest(trial_id)
        except Exception as error:
            self.error = error
            return Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note an epoch's figure; those that are known already are told again by a resumed trial."""
        if trial_id not in self._trials:  # a warm-up
            return
        try:
            self._reported[trial_id] = result
            self._note(self._trials[trial_id], result)
        except Exception as error:
            self.error = error

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell Optuna how a trial ended: COMPLETE, PRUNED with what it had reached, or FAIL with the reason."""
        if trial_id not in self._trials or self.error is not None:
            return
        try:
            reported = self._reported.pop(trial_id, {})
            self._end(
                self._trials.pop(trial_id), dict(result or reported), self._why(trial_id) if error else None
            )
        except Exception as ours:
            self.error = ours

    def _suggest(self, trial_id: str) -> dict[str, Any] | str:
        to_come = len(self._unfinished) + self._sweep.trials - self._begun
        if self._warm_ups and to_come > 0:
            return self._warm_ups.pop()
        while True:
            trial = None if self.is_over else self._next()
            if trial is None:
                return Searcher.FINISHED
            index = trial.number - self._first
            settings = suggest(self._config, _Reseeded(self._config, trial, index))
            trial.set_user_attr(SETTINGS, settings)
            try:
                task = self._ends.begins(index, settings)
            except ConfigError as error:  # settings that do not fit together, which no sample had shown
                trial.set_user_attr(FAILED, one_line(error))
                self._study.tell(trial.number, state=TrialState.FAIL)
                self._ends.told(index)
                continue
            self._trials[trial_id] = trial
            return task

    def _next(self) -> Trial | None:
        """An unfinished trial, else a new one; None if there is none to come. Its settings are not all drawn yet."""
        if self._unfinished:
            number = self._unfinished.pop(0)
            self._seed(number - self._first)
            trial = Trial(self._study, self._frozen(number)._trial_id)
        elif self._begun < self._sweep.trials:
            self._seed(self._begun)
            trial = self._study.ask()
            self._begun += 1
        else:
            return None
        # Drawn now, all together, and not by the sampler of the first key that lacks a value.
        _ = trial.relative_params
        return trial

    def _seed(self, index: int) -> None:
        seed = derive_seed(self._config.seed, "sweep", index)
        self._study.sampler = make_sampler(self._sweep, seed)

    def _frozen(self, number: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]

    def _note(self, trial: Trial, result: dict[str, Any]) -> None:
        if EPOCH not in result or len(self._sweep.objectives) > 1:
            return
        if result[EPOCH] not in self._frozen(trial.number).intermediate_values:
            trial.report(result[TOP1], result[EPOCH])

    def _end(self, trial: Trial, result: dict[str, Any], lost: str | None) -> None:
        values = None
        if BLOCKED in result:  # the study is not told, so that the trial goes on with the next sitting
            number = trial.number - self._first
            raise IstanasError(f"trial {number} cannot continue: {result[BLOCKED]}", field="sweep")
        if lost is not None:
            result[FAILED] = (
                f"its process was lost more than {self._sweep.max_restarts} times (sweep.max_restarts): {lost}"
            )
        self._note(trial, result)  # Tune leaves out the report that made it stop the trial
        if FAILED in result:
            state = TrialState.FAIL
        elif FINISHED in result:
            state, values = TrialState.COMPLETE, [result[f"objective/{o}"] for o in self._sweep.objectives]
        else:
            state = TrialState.PRUNED
        for name in FIGURES:
            if name in result:
                trial.set_user_attr(name, result[name])
        self._ends.ended(trial.number - self._first, state, result)
        self._study.tell(trial.number, values, state)
        self._ends.told(trial.number - self._first)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is the memory."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study is the memory."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps a pickle of its searcher, from which nothing is ever restored here."""
        return {}


class Losses(Callback):
    """Why trials' processes were lost: Tune tells its searcher only that they were.

    Args:
        note: says a line to the user.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._folders: dict[str, str] = {}  # Tune's id -> where Tune writes what Ray says

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Remember where to look."""
        self._folders[trial.trial_id] = trial.local_path

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that a trial goes on in another process, and why."""
        self._folders[trial.trial_id] = trial.local_path  # it may never have started
        self._note(f"a trial's process was lost and another one goes on: {self.why(trial.trial_id)}")

    def why(self, trial_id: str) -> str:
        """What Ray said of the last loss."""
        folder = self._folders.get(trial_id)
        file = None if folder is None else Path(folder, EXPR_ERROR_FILE)
        said = file.read_text() if file is not None and file.is_file() else "Ray does not say why"
        return last_line(said.partition(" Some common causes")[0])

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps a pickle, from which nothing is ever restored here."""
        return {}


def make_scheduler(config: Config, study: Study, max_epochs: int) -> TrialScheduler:
    """Who stops trials early; it knows what earlier sittings have reported.

    Args:
        config: of the sweep.
        study: of the sweep.
        max_epochs: the most that a trial may report.
    """
    sweep = sweep_of(config)
    if sweep.scheduler == "none":
        return FIFOScheduler()
    scheduler = ASHAScheduler(
        time_attr=EPOCH,
        metric=TOP1,
        mode="max",
        # A trial in its last epoch has nothing left to be stopped from.
        max_t=max(sweep.grace_epochs, max_epochs - 1),
        grace_period=sweep.grace_epochs,
        reduction_factor=sweep.reduction_factor,
        stop_last_trials=False,
    )
    for trial in own_trials(study):
        if trial.state.is_finished():
            known: Any = SimpleNamespace(trial_id=f"earlier-{trial.number}")
            scheduler.on_trial_add(None, known)  # type: ignore[arg-type]
            for epoch, value in sorted(trial.intermediate_values.items()):
                scheduler.on_trial_result(None, known, {EPOCH: epoch, TOP1: value})  # type: ignore[arg-type]
    return scheduler
