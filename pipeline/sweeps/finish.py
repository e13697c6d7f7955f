"""The end of a sweep: its best trial, its figures, and its result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from istanas.errors import IstanasError
from istanas.space import Genotype
from pipeline.base.files import atomic_write
from pipeline.base.text import count
from pipeline.cluster.tune import FAILED
from pipeline.config.load import to_yaml, with_settings
from pipeline.config.schema import Config
from pipeline.jobs.lifecycle import Outcome
from pipeline.jobs.opening import as_written
from pipeline.report import mlflow_note
from pipeline.report.trials import kendall_tau, write_table
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.genotype_file import write_genotype
from pipeline.runs.layout import (
    BEST_FOLDER,
    CONFIG_FILE,
    GENOTYPE_FILE,
    SWEEP_PAGE,
    TRIALS_TABLE,
    cell_figures,
)
from pipeline.runs.tags import Tag
from pipeline.sweeps.report import sweep_frame, write_figures
from pipeline.sweeps.space import Settings, sweep_of
from pipeline.sweeps.study import best_trial, own_study
from pipeline.training.pictures import settle_stems


def finish_sweep(config: Config, run: RunDir, study: Study, say: Callable[[str], None]) -> Outcome:
    """Write the results of a sweep whose trials have ended.

    Args:
        config: The sweep's configuration.
        run: The sweep's run directory.
        study: The sweep's study.
        say: Called with a line for each figure that cannot be drawn.

    Raises:
        IstanasError: If too many trials failed, or none has finished.
    """
    own = own_study(study)
    best = _best(config, run, own)
    frame = sweep_frame(config, study)
    write_table(run.path, frame)
    figures = write_figures(run.path, config, own, frame, say)
    genotype = _genotype_of(best)
    _write_best(config, run.path / BEST_FOLDER, best.user_attrs["settings"], genotype)
    write_genotype(run.path, genotype)  # With this file, commands accept the sweep as a genotype.
    result = _result(config, own, best, frame, genotype)
    best_files = (f"{BEST_FOLDER}/{CONFIG_FILE}", f"{BEST_FOLDER}/{GENOTYPE_FILE}")
    return Outcome(
        result=result,
        artifacts=(
            CONFIG_FILE,
            GENOTYPE_FILE,
            *cell_figures(genotype.kinds),
            TRIALS_TABLE,
            *figures,
            *best_files,
        ),
        tags={Tag.GENOTYPE: genotype.digest()},
        description=mlflow_note.of_sweep(
            run.read().data_label,
            {key: str(parameter) for key, parameter in sweep_of(config).space.items()},
            result,
            genotype,
            files=(TRIALS_TABLE, *(file for file in figures if file == SWEEP_PAGE)),
        ),
    )


def _best(config: Config, run: RunDir, own: Study) -> FrozenTrial:
    """Return the best trial.

    Raises:
        IstanasError: If too many trials failed, or none has finished.
    """
    failed = own.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    if len(failed) > sweep_of(config).max_failures:
        raise IstanasError(
            f"{count(len(failed), 'trial')} failed, more than {sweep_of(config).max_failures} (the first: "
            f"{failed[0].user_attrs.get(FAILED)})",
            field="sweep.max_failures",
            remedy="run the same command with a higher value to resume",
        )
    best = best_trial(own)
    if best is None:
        raise IstanasError(
            "no trial has finished: all failed or were stopped early",
            field="sweep",
            remedy=f"see {run.path / TRIALS_TABLE}, change the space, or set sweep.scheduler=none",
        )
    return best


def _genotype_of(trial: FrozenTrial) -> Genotype:
    folder = bucket.local(trial.user_attrs["run_dir"])
    bucket.fetch_parts(folder, lambda name: name == GENOTYPE_FILE)
    return Genotype.from_json((folder / GENOTYPE_FILE).read_text())


def _write_best(config: Config, folder: Path, settings: Settings, genotype: Genotype) -> None:
    """Write the best trial's configuration, for retraining on all training pictures, and its genotype."""
    best = settle_stems(with_settings(config, settings, "best"))
    best = best.model_copy(update={"data": best.data.model_copy(update={"holdout": 0.0})})
    atomic_write(folder / CONFIG_FILE, to_yaml(as_written(best)))
    atomic_write(folder / GENOTYPE_FILE, genotype.to_json() + "\n")


def _result(
    config: Config, own: Study, best: FrozenTrial, frame: pd.DataFrame, genotype: Genotype
) -> dict[str, Any]:
    """Return the figures of a `SweepResult`."""
    sweep, figures, trials = sweep_of(config), best.user_attrs, own.get_trials(deepcopy=False)
    states = Counter(trial.state for trial in trials)
    result: dict[str, Any] = {
        "best_trial": best.number,
        "best_run_dir": figures["run_dir"],
        "settings": figures["settings"],
        "digest": genotype.digest(),
        "genotype": genotype.to_dict(),
        "objective_top1": best.values[sweep.objectives.index("top1")],
        **({"valid_top1": figures["valid_top1"]} if "valid_top1" in figures else {}),
        "params": figures["params"],
        "macs": figures["macs"],
        "trials": len(trials),
        "complete": states[TrialState.COMPLETE],
        "pruned": states[TrialState.PRUNED],
        "failed": states[TrialState.FAIL],
        "epochs": int(frame["epochs"].fillna(0).sum()),
        "seconds": float(frame["seconds"].fillna(0).sum()),
    }
    if sweep.objective == "retrained":
        result |= {
            "retrained_top1": figures["retrained_top1"],
            "kendall_tau": kendall_tau(frame),
            "retrain_seconds": float(frame["retrain_seconds"].fillna(0).sum()),
        }
    return result
