"""The runs of a sweep's trials: opened, closed, counted and shown while the sweep runs."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from optuna.exceptions import OptunaError
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from istanas.errors import IstanasError
from pipeline.base.text import count, one_line
from pipeline.cluster.launch import with_absolute_paths
from pipeline.config.schema import Config
from pipeline.jobs.closing import close, close_below, deliver_below
from pipeline.jobs.lifecycle import announce
from pipeline.jobs.observer import RunObserver
from pipeline.jobs.search import search_spec
from pipeline.report.trials import write_table
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.outcome import INTERRUPTED, OUTCOME_TAG, PRUNED, TRIAL_TAG
from pipeline.runs.record import MetricsLine
from pipeline.sweep.plan import Plan
from pipeline.sweep.report import sweep_frame
from pipeline.sweep.space import Settings, readable, sweep_of, trial_config
from pipeline.sweep.study import FAILED, NODE, WARNED, first_number, own_trials, save_study
from pipeline.tracking.store import public_uri, store_uri
from pipeline.training.pictures import settle_stems

STATUS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED", TrialState.FAIL: "FAILED"}
OUTCOMES = {**STATUS, TrialState.PRUNED: PRUNED}
WORDS = {TrialState.COMPLETE: "done", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}


class Trials:
    """What this process does around its trials: their runs opened and closed, the table and the bar kept."""

    def __init__(self, config: Config, plan: Plan, run: RunDir, study: Study, observer: RunObserver) -> None:
        self._config, self._plan, self._run, self._study = config, plan, run, study
        self._observer = observer
        self._open: dict[int, tuple[Path, Config]] = {}  # begun, and not ended
        self._began: dict[int, float] = {}  # in this sitting, when
        self._took: list[float] = []  # seconds of the trials of this sitting that have ended
        self._delivered = not own_trials(study)  # an earlier sitting may have found no store

    def go_on(self) -> None:
        """Say what is there from an earlier sitting, and make the figures anew from the study."""
        bucket.fetch_records(self._run.path)
        done = [t for t in own_trials(self._study) if t.state.is_finished()]
        self._run.replace_metrics(metrics_of_trials(self._config, done))
        begun, learnt = len(own_trials(self._study)) - len(done), first_number(self._study)
        if learnt or sweep_of(self._config).start_from:
            self._observer.note(
                f"learnt from {count(learnt, 'trial')} of {sweep_of(self._config).start_from} that lie in this space"
            )
        if done or begun:
            self._observer.note(
                f"resumed: {count(len(done), 'trial')} done, {begun} to go on with, "
                f"{sweep_of(self._config).trials - len(done) - begun} to come"
            )
        self._show()

    def begins(self, index: int, settings: Settings) -> dict[str, Any]:
        config = self._of_trial(settings)
        name, parent = f"trial-{index:04d}", bucket.named(self._run.path)
        tags = {"istanas.sweep": self._run.path.name, "istanas.trial": str(index)}
        spec = search_spec(config, name, parent=parent, tags=tags)
        self._keep()  # else another sitting might draw other settings for a trial that was announced
        announce(spec)
        self._open[index] = spec.path, config
        self._began[index] = time.monotonic()
        return {
            "config": config,
            "name": name,
            "parent": parent,
            "tags": tags,
            "run_dir": bucket.shown(spec.path),
            "objective": sweep_of(self._config).objective,
            "objectives": sweep_of(self._config).objectives,
        }

    def warm_ups(self) -> list[dict[str, Any]]:
        """A task for each process that will have trials, one after the other."""
        left = sweep_of(self._config).trials - sum(t.state.is_finished() for t in own_trials(self._study))
        # Workers of a trial are processes of its own.
        number = 0 if self._plan.workers else min(self._plan.at_once, left)
        return [{"warm_up": self._of_trial({})}] * number

    def ended(self, index: int, state: TrialState, result: dict[str, Any]) -> None:
        path, config = self._open.pop(index)
        self._took.append(time.monotonic() - self._began.pop(index))
        tags = {TRIAL_TAG: state.name, OUTCOME_TAG: OUTCOMES[state]}
        if "digest" in result:
            tags["istanas.genotype"] = result["digest"]
        if NODE in result:
            tags["istanas.node"] = result[NODE]
        if FAILED in result:
            tags["istanas.reason"] = result[FAILED]
        kept = ("valid_top1", "retrained_top1", "digest", "params", "macs", "seconds")
        figures = {name: result[name] for name in kept if name in result}
        self._delivered &= close(path, config, STATUS[state], tags, figures)

    def leave(self) -> None:
        """Close the runs that this sitting leaves unfinished, and deliver what the store has not got.

        Those of trials, of their retrainings, and of an earlier sitting that this one did not come to.
        """
        self._open.clear()
        try:
            frame = sweep_frame(self._config, self._study)
            running = frame["state"] == TrialState.RUNNING.name
            if running.any():  # the study knows no other word for a trial that the same command resumes
                frame.loc[running, "state"] = INTERRUPTED
                write_table(self._run.path, frame)
            self._delivered &= close_below(self._run.path, self._config)
            if not self._delivered:
                deliver_below(self._run.path, self._config)
        except (OSError, IstanasError, OptunaError) as error:
            # A full disk, a storage that is away: it must not hide what else has failed.
            self._observer.note(
                f"runs of trials are left RUNNING ({one_line(error)}), the same command mends that"
            )

    def told(self, index: int) -> None:
        done = [t for t in own_trials(self._study) if t.state.is_finished()]
        self._run.replace_metrics(metrics_of_trials(self._config, done))
        self._show()
        self._keep()
        left = sweep_of(self._config).trials - len(done)
        self._observer.trial_done(
            describe_trial(index, self._trial(index)),
            len(done),
            seconds_left(self._took, left, self._plan.at_once),
        )
        self._observer.deliver()

    def _keep(self) -> None:
        """Have the study in the storage, if the run lies in one, before anybody is told what it holds."""
        save_study(self._config, self._run.path)
        bucket.push(self._run.path)

    def _show(self) -> None:
        write_table(self._run.path, sweep_frame(self._config, self._study))
        done = sum(t.state.is_finished() for t in own_trials(self._study))
        if done > 0:
            self._observer.step(done - 1, 1, 1, lambda: None)

    def _trial(self, index: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[first_number(self._study) + index]

    def _of_trial(self, settings: Settings) -> Config:
        """A trial's configuration, as it holds in its own process."""
        config, plan = settle_stems(trial_config(self._config, settings)), self._plan
        runtime: dict[str, Any] = {
            "workers": plan.workers,
            "threads": plan.cpus,
            "address": None,
            "device": "cuda" if plan.gpus else "cpu",
            "runs_dir": bucket.named(self._run.path),
        }
        uri = store_uri(config.tracking.uri)
        # A password in the environment stays there.
        tracking = {"uri": uri if public_uri(uri) == uri else None, "name": None, "models": False}
        return config.model_copy(
            update={
                "runtime": config.runtime.model_copy(update=runtime),
                "tracking": config.tracking.model_copy(update=tracking),
                "data": with_absolute_paths(config.data),
            }
        )


def seconds_left(took: Sequence[float], left: int, at_once: int) -> float:
    """Estimate how long the rest of a sweep takes: trials run in rounds, each as long as a trial took on average.

    Args:
        took: seconds of the trials that have ended, at least one.
        left: how many have not ended.
        at_once: how many run at once.

    Example:
        >>> seconds_left([50.0, 70.0], left=9, at_once=2)
        300.0
    """
    return fmean(took) * math.ceil(left / at_once)


def describe_trial(index: int, trial: FrozenTrial) -> str:
    """One line for people about an ended trial."""
    figures = trial.user_attrs
    text = f"trial {index} {WORDS[trial.state]}"
    if FAILED in figures:
        text += f" ({figures[FAILED]})"
    if "valid_top1" in figures:
        text += f": top-1 {100 * figures['valid_top1']:.1f} %"
        if "retrained_top1" in figures:
            again = ", known from another trial" if figures.get("reused") else ""
            text += f", retrained {100 * figures['retrained_top1']:.1f} %{again}"
        text += f", {count(figures['epochs'], 'epoch')}, {figures['seconds']:.1f} s"
    if "rollbacks" in figures:
        text += f", rolled back {count(figures['rollbacks'], 'time')}"
    text = f"{text}; {readable(figures.get('settings', {}))}"
    return "\n".join([text, *(f"warning: trial {index}: {warned}" for warned in figures.get(WARNED, ()))])


def metrics_of_trials(config: Config, done: Sequence[FrozenTrial]) -> list[MetricsLine]:
    """The sweep's own figures: after every ended trial, in the order of their ends."""
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
