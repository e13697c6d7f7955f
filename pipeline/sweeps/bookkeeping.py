"""The runs, the table and the progress bar of a sweep's trials, maintained while the sweep runs."""

from __future__ import annotations

import math
import time
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
from pipeline.cluster.places import Plan
from pipeline.cluster.tune import FAILED, NODE
from pipeline.config.plugins import ship
from pipeline.config.schema import Config
from pipeline.jobs.closing import close, close_below, deliver_below
from pipeline.jobs.lifecycle import announce
from pipeline.jobs.observer import RunObserver
from pipeline.jobs.search import search_spec
from pipeline.report.trials import write_table
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.outcome import INTERRUPTED, PRUNED
from pipeline.runs.tags import Tag
from pipeline.sweeps.report import sweep_frame
from pipeline.sweeps.resume import describe_resumed, finished, metrics_of_trials
from pipeline.sweeps.space import Settings, readable, sweep_of, trial_config
from pipeline.sweeps.study import WARNED, own_trials, save_study
from pipeline.tracking.store import public_uri, store_uri
from pipeline.training.pictures import settle_stems

STATUS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED", TrialState.FAIL: "FAILED"}
OUTCOMES = {**STATUS, TrialState.PRUNED: PRUNED}
WORDS = {TrialState.COMPLETE: "done", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}


class TrialRuns:
    """A `TrialListener` that opens and closes the trials' runs, and updates the sweep's table, metrics and bar."""

    def __init__(self, config: Config, plan: Plan, run: RunDir, study: Study, observer: RunObserver) -> None:
        self._config, self._plan, self._run, self._study = config, plan, run, study
        self._observer = observer
        self._open: dict[int, tuple[Path, Config]] = {}  # trials that are running
        self._started: dict[int, float] = {}  # start times in this process
        self._durations: list[float] = []  # seconds of the trials that this process has ended
        self._delivered = not own_trials(study)  # MLflow may lack trials of an earlier process.

    def resume(self) -> None:
        """Rebuild the metrics and the table from the study, and report what an earlier process has done."""
        bucket.fetch_records(self._run.path)
        self._run.replace_metrics(metrics_of_trials(self._config, finished(self._study)))
        for line in describe_resumed(self._config, self._study):
            self._observer.note(line)
        self._update_table()

    def trial_started(self, index: int, settings: Settings) -> dict[str, Any]:
        """Open the trial's run, and return the task for its process."""
        config = self._trial_config(settings)
        name, parent = f"trial-{index:04d}", bucket.named(self._run.path)
        tags = {Tag.SWEEP: self._run.path.name, Tag.TRIAL: str(index)}
        spec = search_spec(config, name, parent=parent, tags=tags)
        self._save()  # Otherwise a later process could sample other settings for a trial whose run exists.
        announce(spec)
        self._open[index] = spec.path, config
        self._started[index] = time.monotonic()
        task = {
            "config": config,
            "name": name,
            "parent": parent,
            "tags": tags,
            "run_dir": bucket.shown(spec.path),
            "objective": sweep_of(self._config).objective,
            "objectives": sweep_of(self._config).objectives,
        }
        return {"task": ship(task)}

    def warm_ups(self) -> list[dict[str, Any]]:
        """Return a warm-up task for each process that trials will share."""
        left = sweep_of(self._config).trials - len(finished(self._study))
        # The workers of a trial are new processes, which a warm-up does not reach.
        number = 0 if self._plan.workers else min(self._plan.at_once, left)
        return [{"task": ship({"warm_up": self._trial_config({})})}] * number

    def trial_ended(self, index: int, state: TrialState, result: dict[str, Any]) -> None:
        """Close the trial's run with its figures."""
        path, config = self._open.pop(index)
        self._durations.append(time.monotonic() - self._started.pop(index))
        tags = {Tag.TRIAL_STATE: state.name, Tag.OUTCOME: OUTCOMES[state]}
        if "digest" in result:
            tags[Tag.GENOTYPE] = result["digest"]
        if NODE in result:
            tags[Tag.NODE] = result[NODE]
        if FAILED in result:
            tags[Tag.REASON] = result[FAILED]
        kept = ("valid_top1", "retrained_top1", "digest", "params", "macs", "latency_ms", "seconds")
        figures = {name: result[name] for name in kept if name in result}
        self._delivered &= close(path, config, STATUS[state], tags, figures)

    def close(self) -> None:
        """Close the runs of unfinished trials and their retrainings, and deliver what MLflow lacks."""
        self._open.clear()
        try:
            frame = sweep_frame(self._config, self._study)
            running = frame["state"] == TrialState.RUNNING.name
            # An interrupted trial stays RUNNING in the study, which has no other state for it.
            if running.any():
                frame.loc[running, "state"] = INTERRUPTED
                write_table(self._run.path, frame)
            self._delivered &= close_below(self._run.path, self._config)
            if not self._delivered:
                deliver_below(self._run.path, self._config)
        except (OSError, IstanasError, OptunaError) as error:
            # A full disk or an unreachable storage must not hide the error that ended the sweep.
            self._observer.note(
                f"some runs of trials are still RUNNING ({one_line(error)}); run the same command again to correct it"
            )

    def study_updated(self, index: int) -> None:
        """Update metrics, table and progress bar after the study has recorded the end of a trial."""
        done = finished(self._study)
        self._run.replace_metrics(metrics_of_trials(self._config, done))
        self._update_table()
        self._save()
        left = sweep_of(self._config).trials - len(done)
        self._observer.trial_done(
            describe_trial(index, own_trials(self._study)[index]),
            len(done),
            seconds_left(self._durations, left, self._plan.at_once),
        )
        self._observer.deliver()

    def _save(self) -> None:
        """Save the study and the run directory in the bucket, if the run is in one."""
        save_study(self._config, self._run.path)
        self._run.push()

    def _update_table(self) -> None:
        write_table(self._run.path, sweep_frame(self._config, self._study))
        done = len(finished(self._study))
        if done > 0:
            self._observer.step(done - 1, 1, 1, lambda: None)

    def _trial_config(self, settings: Settings) -> Config:
        """Return the configuration of a trial, with the paths and resources of its own process."""
        config, plan = settle_stems(trial_config(self._config, settings)), self._plan
        runtime = plan.runtime_of_trial(config.runtime)
        runs_dir = bucket.named(self._run.path)
        uri = store_uri(config.tracking.uri)
        # A password in the environment is not written into the trial's configuration.
        tracking = {"uri": uri if public_uri(uri) == uri else None, "name": None, "models": False}
        update = {
            "runtime": runtime.model_copy(update={"runs_dir": runs_dir}),
            "tracking": config.tracking.model_copy(update=tracking),
        }
        return with_absolute_paths(config.model_copy(update=update))


def seconds_left(durations: Sequence[float], left: int, at_once: int) -> float:
    """Estimate the remaining time of a sweep: rounds of concurrent trials, each of the average duration.

    Args:
        durations: The seconds of the ended trials, at least one.
        left: The number of trials that have not ended.
        at_once: The number of concurrent trials.

    Example:
        >>> seconds_left([50.0, 70.0], left=9, at_once=2)
        300.0
    """
    return fmean(durations) * math.ceil(left / at_once)


def describe_trial(index: int, trial: FrozenTrial) -> str:
    """Describe an ended trial in one line, followed by its warnings."""
    figures = trial.user_attrs
    text = f"trial {index} {WORDS[trial.state]}"
    if FAILED in figures:
        text += f" ({figures[FAILED]})"
    again = " (by an earlier trial)" if figures.get("reused") else ""
    named = (("valid_top1", "top-1", ""), ("retrained_top1", "retrained", again))
    tops = [f"{name} {100 * figures[key]:.1f} %{note}" for key, name, note in named if key in figures]
    if tops:
        text += f": {', '.join(tops)}, {count(figures['epochs'], 'epoch')}, {figures['seconds']:.1f} s"
    if "rollbacks" in figures:
        text += f", rolled back {count(figures['rollbacks'], 'time')}"
    text = f"{text}; {readable(figures.get('settings', {}))}"
    return "\n".join([text, *(f"warning: trial {index}: {warned}" for warned in figures.get(WARNED, ()))])
