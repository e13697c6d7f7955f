"""The steps of resuming a sweep from its Optuna study, which is its only persistent state.

1. `study.open_study` opens the study in its database, or restores it from the bucket.
2. The metrics and the table of the sweep are rebuilt from the finished trials (`bookkeeping.TrialRuns.resume`).
3. `searcher.StudySearcher` proposes the unfinished trials again, with the settings that they had, before new ones.
4. The process of such a trial (`trial.run_trial`) resumes its search from the newest checkpoint of its run directory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from pipeline.base.text import count
from pipeline.config.schema import Config
from pipeline.runs.record import MetricsLine
from pipeline.sweeps.space import sweep_of
from pipeline.sweeps.study import first_number, own_trials


def finished(study: Study) -> list[FrozenTrial]:
    """Return the sweep's own trials that have ended: complete, pruned or failed."""
    return [trial for trial in own_trials(study) if trial.state.is_finished()]


def unfinished(study: Study) -> list[int]:
    """Return the numbers of the trials that an earlier process started but did not end."""
    return [trial.number for trial in own_trials(study) if trial.state == TrialState.RUNNING]


def describe_resumed(config: Config, study: Study) -> Iterator[str]:
    """Yield lines for the user about the trials that are already in the study."""
    sweep = sweep_of(config)
    done = len(finished(study))
    started = len(own_trials(study)) - done
    if sweep.start_from:
        known = count(first_number(study), "trial")
        yield f"the sampler learns from {known} of {sweep.start_from} that fit this space"
    if done or started:
        left = sweep.trials - done - started
        yield f"resumed: {count(done, 'trial')} done, {started} to resume, {left} to start"


def metrics_of_trials(config: Config, done: Sequence[FrozenTrial]) -> list[MetricsLine]:
    """Return the sweep's metrics: one line for each ended trial, in the order in which they ended."""
    lines: list[MetricsLine] = []
    best: float | None = None
    states: Counter[str] = Counter()
    place = sweep_of(config).objectives.index("top1")
    for step, trial in enumerate(sorted(done, key=lambda t: (t.datetime_complete, t.number)), start=1):
        states[trial.state.name.lower()] += 1
        metrics = {f"sweep/{s}": float(states[s]) for s in ("complete", "pruned", "fail")}
        if trial.state == TrialState.COMPLETE:
            best = trial.values[place] if best is None else max(best, trial.values[place])
        if best is not None:
            metrics["sweep/best_top1"] = best
        assert trial.datetime_complete is not None
        lines.append(MetricsLine(step, int(trial.datetime_complete.timestamp() * 1000), metrics))
    return lines
