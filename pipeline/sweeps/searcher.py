"""The searcher that connects Ray Tune to a sweep's study, and the scheduler that stops trials early.

All persistent state is in the study, from which the next process resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from istanas.errors import ConfigError, IstanasError
from istanas.training import derive_seed
from pipeline.base.text import one_line
from pipeline.cluster.tune import FAILED, FINISHED, TaskSearcher
from pipeline.config.schema import OBJECTIVES, Config
from pipeline.sweeps.resume import unfinished
from pipeline.sweeps.space import Settings, suggest, sweep_of
from pipeline.sweeps.study import (
    BLOCKED,
    EPOCH,
    FIGURES,
    SETTINGS,
    TOP1,
    enqueue_points,
    first_number,
    make_sampler,
    n_failed,
    own_trials,
)


class TrialListener(Protocol):
    """A receiver of the events of trials, in the process that the user started."""

    def trial_started(self, index: int, settings: Settings) -> dict[str, Any]:
        """Handle a trial that is about to start or to resume, and return the task for its process."""

    def trial_ended(self, index: int, state: TrialState, result: dict[str, Any]) -> None:
        """Handle the last report of a trial, before the study records its end."""

    def study_updated(self, index: int) -> None:
        """Handle the end of a trial, after the study has recorded it."""


class _NoListener:
    """A listener that ignores all events."""

    def trial_started(self, index: int, settings: Settings) -> dict[str, Any]:
        return {}

    def trial_ended(self, index: int, state: TrialState, result: dict[str, Any]) -> None:
        pass

    def study_updated(self, index: int) -> None:
        pass


def first_settings(config: Config, number: int) -> list[Settings]:
    """Return the settings of a sweep's first trials (the points, then random settings), without a database."""
    study = optuna.create_study(directions=[OBJECTIVES[o] for o in sweep_of(config).objectives])
    enqueue_points(config, study)
    searcher = StudySearcher(config, study, _NoListener())
    for n in range(min(number, sweep_of(config).trials)):
        searcher.suggest(str(n))
    if searcher.error is not None:
        raise searcher.error
    return [trial.user_attrs[SETTINGS] for trial in own_trials(study)]


class _Reseeded:
    """An Optuna trial whose sampler is seeded by (seed, number of the trial, key).

    The settings of a trial depend only on the study at its start, not on the process that samples them. A trial that
    was interrupted between two parameters is therefore completed with the same settings.
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


class StudySearcher(TaskSearcher[Trial]):
    """A Ray Tune searcher that samples trials from an Optuna study and records their results in it.

    Args:
        config: The sweep's configuration.
        study: The study that `open_study` returns.
        listener: Receives the events of trials.
        loss_reason: Returns the reason for the last loss of a trial's process; called with Tune's id.
        warm_ups: Tasks that run before all trials, one for each process. They are not part of the study.
    """

    def __init__(
        self,
        config: Config,
        study: Study,
        listener: TrialListener,
        loss_reason: Callable[[str], str] = lambda trial_id: "out of memory, or killed",
        warm_ups: Sequence[dict[str, Any]] = (),
    ) -> None:
        super().__init__(loss_reason)
        self._warm_ups = list(warm_ups)
        self._config, self._study, self._listener = config, study, listener
        self._sweep = sweep_of(config)
        started = own_trials(study)
        self._first = first_number(study)
        self._unfinished = unfinished(study)
        self._n_started = len(started)

    @property
    def is_over(self) -> bool:
        """Whether no further trial may start, after an error of this process or too many failed trials."""
        return self.error is not None or n_failed(self._study) > self._sweep.max_failures

    def _suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return the task of the next trial; those of an earlier process are resumed first."""
        left = len(self._unfinished) + self._sweep.trials - self._n_started
        if self._warm_ups and left > 0:
            return self._warm_ups.pop()
        while True:
            trial = None if self.is_over else self._next()
            if trial is None:
                return Searcher.FINISHED
            index = trial.number - self._first
            settings = suggest(self._config, _Reseeded(self._config, trial, index))
            trial.set_user_attr(SETTINGS, settings)
            try:
                task = self._listener.trial_started(index, settings)
            except ConfigError as error:  # an invalid combination that `check_space` has not sampled
                trial.set_user_attr(FAILED, one_line(error))
                self._study.tell(trial.number, state=TrialState.FAIL)
                self._listener.study_updated(index)
                continue
            self._trials[trial_id] = trial
            return task

    def _next(self) -> Trial | None:
        """Return an unfinished trial, else a new one, else `None`. Some of its settings may not be sampled yet."""
        if self._unfinished:
            number = self._unfinished.pop(0)
            self._seed(number - self._first)
            trial = Trial(self._study, self._frozen(number)._trial_id)
        elif self._n_started < self._sweep.trials:
            self._seed(self._n_started)
            trial = self._study.ask()
            self._n_started += 1
        else:
            return None
        # Sample the joint settings here; otherwise the seed of the first missing key would be used.
        _ = trial.relative_params
        return trial

    def _seed(self, index: int) -> None:
        seed = derive_seed(self._config.seed, "sweep", index)
        self._study.sampler = make_sampler(self._sweep, seed)

    def _frozen(self, number: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]

    def _record(self, trial: Trial, result: dict[str, Any]) -> None:
        """Record the accuracy of an epoch, unless a resumed trial reports it again."""
        if EPOCH not in result or len(self._sweep.objectives) > 1:
            return
        if result[EPOCH] not in self._frozen(trial.number).intermediate_values:
            trial.report(result[TOP1], result[EPOCH])

    def _end(self, trial: Trial, result: dict[str, Any], lost: str | None) -> None:
        """Record the end of a trial: COMPLETE, PRUNED with its last figures, or FAIL with the reason."""
        values = None
        if BLOCKED in result:  # Nothing is recorded, so that the next process resumes the trial.
            number = trial.number - self._first
            raise IstanasError(f"trial {number} cannot continue: {result[BLOCKED]}", field="sweep")
        if lost is not None:
            result[FAILED] = (
                f"its process was lost more than {self._sweep.max_restarts} times (sweep.max_restarts): {lost}"
            )
        self._record(trial, result)  # Tune omits the report on which it stopped the trial.
        if FAILED in result:
            state = TrialState.FAIL
        elif FINISHED in result:
            state, values = TrialState.COMPLETE, [result[f"objective/{o}"] for o in self._sweep.objectives]
        else:
            state = TrialState.PRUNED
        for name in FIGURES:
            if name in result:
                trial.set_user_attr(name, result[name])
        self._listener.trial_ended(trial.number - self._first, state, result)
        self._study.tell(trial.number, values, state)
        self._listener.study_updated(trial.number - self._first)


def make_scheduler(config: Config, study: Study, max_epochs: int) -> TrialScheduler:
    """Return the scheduler that stops trials early, initialised with the reports of earlier processes.

    Args:
        config: The sweep's configuration.
        study: The sweep's study.
        max_epochs: The largest number of epochs that a trial may report.
    """
    sweep = sweep_of(config)
    if sweep.scheduler == "none":
        return FIFOScheduler()
    scheduler = ASHAScheduler(
        time_attr=EPOCH,
        metric=TOP1,
        mode="max",
        # Stopping a trial after its last epoch would save nothing.
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
