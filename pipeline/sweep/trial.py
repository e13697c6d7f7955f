"""What runs in a trial's process: one search, and with `sweep.objective: retrained` the retraining of what it found.

It reports after every epoch, and once more at its end. Whoever stops it does so inside a report.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import traceback
import warnings
from typing import Any, TextIO

import torch
from rich.console import Console

from istanas.errors import IstanasError
from istanas.space import Genotype
from pipeline.base.files import is_full
from pipeline.base.home_folder import ensure_usable_home
from pipeline.base.text import one_line
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.schema import Config
from pipeline.jobs.context import JobContext
from pipeline.jobs.retrain import run_retrain
from pipeline.jobs.search import run_search
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import CHECKPOINTS, TRIAL_LOG
from pipeline.sweep.study import BLOCKED, EPOCH, FAILED, FINISHED, NODE, TOP1, WARNED
from pipeline.tracking.store import open_client, store_uri
from pipeline.training.epoch_record import Progress, load_progress, read_progress
from pipeline.training.pictures import open_dataset

# That a trial waits for its run: its first process, on a node that was cut off, lives a minute more, till Ray ends it.
SECONDS_TO_LET_GO = 120.0
RETRAINED_NAME = "cell"  # of all retrainings of a sweep: trials share them


def run_trial(task: dict[str, Any]) -> None:
    """Ray Tune's trainable.

    Args:
        task: "config" (`Config`), "name", "parent" (the sweep's run directory), "tags", "run_dir", "objective",
            "objectives"; or "warm_up" (`Config`) only, for a process without a trial.
    """
    from ray import tune

    ensure_usable_home()  # of this node
    if "warm_up" in task:
        _warm_up(task["warm_up"])
        tune.report({FINISHED: True})
        return
    path, said = bucket.local(task["run_dir"]), list[str]()
    try:
        # Here already, for the log is one of its files.
        with (
            bucket.acquired(RunDir(path), said.append, wait=SECONDS_TO_LET_GO) as run,
            open(path / TRIAL_LOG, "a", buffering=1) as log,
        ):
            log.writelines(f"{line}\n" for line in said)
            last = _logged_run(task, log, run)
            run.push(once=True)
    except (OSError, IstanasError) as error:  # no log, a full disk, a storage that is away
        last = failure(error)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the process may serve the next trial
    tune.report(last)


def _warm_up(config: Config) -> None:
    """Load what the first trial of a process would wait for, before its settings are drawn: imports, and pictures."""
    with contextlib.suppress(Exception):  # what is wrong here is wrong in the trial, too, which says so
        for module in ("torch._dynamo", "matplotlib.figure"):  # the optimisers', the pictures of cells'
            importlib.import_module(module)
        open_dataset(config, ())
        open_client(store_uri(config.tracking.uri))


def _logged_run(task: dict[str, Any], log: TextIO, run: RunDir) -> dict[str, Any]:
    """The trial's last report, everything that is said on the way being in the log."""
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    reached: dict[str, Any] = {"run_dir": task["run_dir"]}

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        log.write(f"warning: {message}\n")
        reached[WARNED] = [*reached.get(WARNED, []), str(message)]  # for the user's terminal

    shown, warnings.showwarning = warnings.showwarning, warn
    try:
        return {FINISHED: True, **_run(task, Console(file=log, width=120, markup=False), reached, run)}
    except Exception as error:  # whatever it is, the sweep goes on and says so
        with contextlib.suppress(OSError):  # on a full disk
            log.write(traceback.format_exc())
        return {**reached, **failure(error)}
    finally:
        warnings.showwarning = shown
        logging.getLogger().removeHandler(handler)


def failure(error: Exception) -> dict[str, Any]:
    """How a trial has failed: by itself, or because nothing can be written any more, which is no fault of its."""
    if isinstance(error, bucket.StorageError):
        return {BLOCKED: str(error)}
    if is_full(error):
        remedy = (
            "free space there (old runs, their ray folders, mlartifacts), then run the same command again"
        )
        return {BLOCKED: str(IstanasError(one_line(error), remedy=remedy))}
    return {FAILED: one_line(error)}


def _run(task: dict[str, Any], console: Console, reached: dict[str, Any], run: RunDir) -> dict[str, Any]:
    """The whole trial; `reached` is kept up to date with what it has got so far."""
    config: Config = task["config"]
    reported = 0
    reached[NODE] = _here()
    console.print(f"on node {reached[NODE]}", highlight=False)

    def report(progress: Progress) -> None:
        from ray import tune

        nonlocal reported
        if progress.epochs > reported:
            reported = progress.epochs
            reached.update(_figures(progress))
            tune.report({EPOCH: reported, TOP1: progress.newest.metrics[TOP1], **reached})

    with Runtime(config.runtime) as runtime:
        context = JobContext(
            config,
            task["name"],
            console,
            runtime,
            parent=task["parent"],
            tags=task["tags"],
            on_epoch=report,
            wait=SECONDS_TO_LET_GO,
            run=run,
        )
        search = run_search(context)
        folder = bucket.local(search["run_dir"]) / CHECKPOINTS
        progress = load_progress(folder)
        if reported < progress.epochs:  # the search had finished before
            for earlier in read_progress(folder, progress):
                report(earlier)
        figures = {**reached, **_figures(progress)}
        top1 = figures["valid_top1"]
        if task["objective"] == "retrained":
            figures |= _retrained(context, search["genotype"], search["run_dir"])
            top1 = figures["retrained_top1"]
    values = {"top1": top1, "params": figures["params"], "macs": figures["macs"]}
    return {**figures, **{f"objective/{name}": float(values[name]) for name in task["objectives"]}}


def _retrained(context: JobContext, genotype: dict[str, Any], search_dir: str) -> dict[str, Any]:
    """Retrain the found network, or return the figures of an earlier trial that found the same one."""
    retraining = JobContext(
        context.config, RETRAINED_NAME, context.console, context.runtime, parent=search_dir, wait=-1
    )
    # Canonical, so that genotypes of equal digest share a run directory.
    result = run_retrain(retraining, Genotype.from_dict(genotype).canonical())
    reused = RunDir(bucket.local(result["run_dir"])).read().parent != search_dir
    return {
        "retrained_top1": result["valid_top1"],
        "params": result["params"],
        "macs": result["macs"],
        "retrain_dir": result["run_dir"],
        "reused": reused,
        "retrain_seconds": 0.0 if reused else result["seconds"],
    }


def _here() -> str:
    """The node of the cluster that this trial runs on: its address, and Ray's id, for several may have one address."""
    import ray

    return f"{ray.util.get_node_ip_address()} ({ray.get_runtime_context().get_node_id()[:8]})"


def _figures(progress: Progress) -> dict[str, Any]:
    """What a search has reached."""
    m, found = progress.newest.metrics, progress.newest.found()
    return {
        "valid_top1": m[TOP1],
        "digest": Genotype.from_json(found.genotype).digest(),
        "params": int(m["target/params"]),
        "macs": int(m["target/macs"]),
        "epochs": progress.epochs,
        "seconds": progress.seconds,
        **({"rollbacks": progress.rollbacks} if progress.rollbacks else {}),
        **({"frozen_epochs": [f.epoch for f in found.frozen]} if found.frozen is not None else {}),
    }
