"""The process of a trial: a search and, with `sweep.objective: retrained`, the retraining of the cell that it found.

A trial reports after every epoch and at its end. Ray Tune stops it while it reports.
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
from pipeline.cluster.tune import FAILED, FINISHED, NODE, node_of_trial
from pipeline.config.plugins import Shipped
from pipeline.config.schema import Config
from pipeline.jobs.context import JobContext
from pipeline.jobs.retrain import run_retrain
from pipeline.jobs.search import run_search
from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import CHECKPOINTS, TRIAL_LOG
from pipeline.sweeps.study import BLOCKED, EPOCH, TOP1, WARNED
from pipeline.tracking.store import open_client, store_uri
from pipeline.training.epoch_record import Progress, load_progress, read_progress
from pipeline.training.pictures import open_dataset

# How long a restarted trial waits for its run directory. If its first process is on a node that lost the network, Ray
# ends that process only after a minute.
SECONDS_TO_LET_GO = 120.0
RETRAINED_NAME = "cell"  # the name of all retrainings of a sweep; trials share them


def run_trial(sent: dict[str, Shipped]) -> None:
    """Run one trial; this is Ray Tune's trainable.

    Args:
        sent: "task", a dictionary with "config" (`Config`), "name", "parent" (the sweep's run directory), "tags",
            "run_dir", "objective" and "objectives"; or only with "warm_up" (`Config`), to warm up the process.
    """
    from ray import tune

    ensure_usable_home()
    try:
        task = sent["task"].open()
    except IstanasError as error:  # a plugin that cannot be loaded on this node
        tune.report(failure(error))
        return
    if "warm_up" in task:
        _warm_up(task["warm_up"])
        tune.report({FINISHED: True})
        return
    path, messages = bucket.local(task["run_dir"]), list[str]()
    try:
        # The run directory is opened before the search does so, because it contains the log.
        with (
            bucket.acquired(RunDir(path), messages.append, wait=SECONDS_TO_LET_GO) as run,
            open(path / TRIAL_LOG, "a", buffering=1) as log,
        ):
            log.writelines(f"{line}\n" for line in messages)
            last = _logged_run(task, log, run)
            run.push(once=True)
    except (OSError, IstanasError) as error:  # a full disk, an unreachable storage, no permission
        last = failure(error)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # The next trial may run in this process.
    tune.report(last)


def _warm_up(config: Config) -> None:
    """Load modules and pictures in advance, so that the first trial of a process starts sooner."""
    with contextlib.suppress(Exception):  # The trial fails for the same reason, and reports it.
        for module in ("torch._dynamo", "matplotlib.figure"):  # for the optimisers and the cell figures
            importlib.import_module(module)
        open_dataset(config, ())
        open_client(store_uri(config.tracking.uri))


def _logged_run(task: dict[str, Any], log: TextIO, run: RunDir) -> dict[str, Any]:
    """Run a trial with its output in the log, and return its last report."""
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    reached: dict[str, Any] = {"run_dir": task["run_dir"]}

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        log.write(f"warning: {message}\n")
        reached[WARNED] = [*reached.get(WARNED, []), str(message)]

    previous, warnings.showwarning = warnings.showwarning, warn
    try:
        return {FINISHED: True, **_run(task, Console(file=log, width=120, markup=False), reached, run)}
    except Exception as error:  # A failed trial must not end the others.
        with contextlib.suppress(OSError):  # The disk may be full.
            log.write(traceback.format_exc())
        return {**reached, **failure(error)}
    finally:
        warnings.showwarning = previous
        logging.getLogger().removeHandler(handler)


def failure(error: Exception) -> dict[str, Any]:
    """Return the report of a failure: `BLOCKED` if the storage or the disk prevents all trials, else `FAILED`."""
    if isinstance(error, bucket.StorageError):
        return {BLOCKED: str(error)}
    if is_full(error):
        remedy = (
            "free space there (old runs, their ray folders, mlartifacts), then run the same command again"
        )
        return {BLOCKED: str(IstanasError(one_line(error), remedy=remedy))}
    return {FAILED: one_line(error)}


def _run(task: dict[str, Any], console: Console, reached: dict[str, Any], run: RunDir) -> dict[str, Any]:
    """Run a trial, and return its figures; `reached` is updated with the figures so far."""
    config: Config = task["config"]
    reported = 0  # number of epochs
    reached[NODE] = node_of_trial()
    console.print(f"on node {reached[NODE]}", highlight=False)

    def report(progress: Progress) -> None:
        from ray import tune

        nonlocal reported
        if progress.epochs > reported:
            reported = progress.epochs
            reached.update(_figures(progress))
            if TOP1 in progress.newest.metrics:
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
        if reported < progress.epochs:  # An earlier process has finished the search.
            for earlier in read_progress(folder, progress):
                report(earlier)
        figures = {**reached, **_figures(progress)}
        if task["objective"] == "retrained":
            figures |= _retrained(context, search["genotype"], search["run_dir"])
        top1 = figures["retrained_top1" if task["objective"] == "retrained" else "valid_top1"]
    values = {"top1": top1, "params": figures["params"], "macs": figures["macs"]}
    return {**figures, **{f"objective/{name}": float(values[name]) for name in task["objectives"]}}


def _retrained(context: JobContext, genotype: dict[str, Any], search_dir: str) -> dict[str, Any]:
    """Retrain the found cell, or return the figures of the trial that has already retrained it."""
    retraining = JobContext(
        context.config, RETRAINED_NAME, context.console, context.runtime, parent=search_dir, wait=-1
    )
    # In canonical form, genotypes with equal digests share a run directory.
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


def _figures(progress: Progress) -> dict[str, Any]:
    """Return the figures of a search so far."""
    m, found = progress.newest.metrics, progress.newest.found()
    return {
        **({"valid_top1": m[TOP1]} if TOP1 in m else {}),  # a method that trains nothing measures none
        "digest": Genotype.from_json(found.genotype).digest(),
        "params": int(m["target/params"]),
        "macs": int(m["target/macs"]),
        **({"latency_ms": m["target/latency_ms"]} if "target/latency_ms" in m else {}),
        "epochs": progress.epochs,
        "seconds": progress.seconds,
        **({"rollbacks": progress.rollbacks} if progress.rollbacks else {}),
        **({"frozen_epochs": [f.epoch for f in found.frozen]} if found.frozen is not None else {}),
    }
