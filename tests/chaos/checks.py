"""Checks after a fault: nothing is lost, duplicated or left, compared with an undisturbed run."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML

from pipeline.report.trials import read_table
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import CONFIG_FILE
from pipeline.runs.mlflow_link import read_link
from pipeline.tracking.store import open_client
from pipeline.training.epoch_record import load_latest, load_progress, read_records
from tests.chaos.victims import Case
from tests.ray_cluster import title
from tests.waiting import wait_until

SAME_FILES = (CONFIG_FILE, "genotype.json", "trajectory.csv", "codes.csv", "model.safetensors")
CLOCKS = {"seconds", "images_per_second", "timestamp_ms", "retrain_seconds"}
PLACES = ["seconds", "retrain_seconds", "run_dir", "retrain_dir", "mlflow_run_id"]


def check_as_undisturbed(case: Case, reference: Case) -> None:
    """Check that runs, files, metrics and weights equal the reference's, and that MLflow has each of them once.

    Args:
        case: The case with faults.
        reference: The same job, with the same number of workers, without a fault.
    """
    names = [sorted(run_names(each)) for each in (case, reference)]
    assert names[0] == names[1]
    for name in names[0]:
        here, there = case.runs / name, reference.runs / name
        for file in SAME_FILES:
            assert content(here / file) == content(there / file), f"{name}/{file}"
        assert figures(here) == figures(there), name
        assert bits(here) == bits(there), name
        records = [RunDir(run).read() for run in (here, there)]
        assert records[0].status == records[1].status == "FINISHED"
        assert without_clocks(records[0].result) == without_clocks(records[1].result), name
    if case.job.name == "sweep":
        tables = [
            read_table(each.run).drop(columns=PLACES).to_json(orient="records") for each in (case, reference)
        ]
        assert tables[0] == tables[1]
    check_mlflow(case, f"sqlite:///{case.folder}/mlflow.db")
    check_reported_once(case)


def run_names(case: Case) -> list[str]:
    return [str(file.parent.relative_to(case.runs)) for file in case.runs.glob("**/run.json")]


def content(file: Path) -> Any:
    """Return a file's content; a configuration without its addresses and folders."""
    if not file.exists():
        return None
    if file.name != CONFIG_FILE:
        return file.read_bytes()
    config = YAML(typ="safe").load(file)
    for section, key in (("runtime", "address"), ("runtime", "runs_dir"), ("tracking", "uri")):
        del config[section][key]
    return config


def figures(run: Path) -> list[Any]:
    """Return the metrics of all epochs, and check that each epoch exists once."""
    lines = RunDir(run).metrics()
    assert [line.step for line in lines] == list(range(1, len(lines) + 1)), f"{run.name}: lost or duplicated"
    return [without_clocks(line.metrics) for line in lines]


def bits(run: Path) -> Any:
    """Return the newest checkpoint's weights, optimisers and codes, and all records, without times."""
    folder = run / "checkpoints"
    found = load_latest(folder)
    if found is None:
        return None
    records = [asdict(record) for record in read_records(folder, load_progress(folder))]
    return _plain({**found.state, "progress": records})


def _plain(value: Any) -> Any:
    if hasattr(value, "numpy"):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if k not in CLOCKS}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def without_clocks(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that depend neither on the time nor on the folder."""
    return {k: v for k, v in values.items() if k not in CLOCKS and not k.endswith("run_dir")}


def check_mlflow(case: Case, store: str) -> None:
    """Check that every run exists once and is FINISHED, with the metrics of `metrics.jsonl`, each once per epoch."""
    client = open_client(store)
    (experiment,) = client.search_experiments(filter_string="name = 'istanas'")
    found = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id], max_results=1000)}
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    names = run_names(case)
    assert len(found) == len(names), "runs in MLflow were duplicated or lost"
    for name in names:
        run = RunDir(case.runs / name)
        link = read_link(run)
        assert link is not None
        lines = run.metrics()
        for metric in lines[-1].metrics:
            history = [(m.step, m.value) for m in client.get_metric_history(link.run_id, metric)]
            written = [(m.step, m.metrics[metric]) for m in lines if metric in m.metrics]
            if metric in CLOCKS:  # of a repeated epoch, MLflow keeps the first value
                assert [step for step, _ in history] == [step for step, _ in written], metric
            else:
                assert history == written, metric


def check_reported_once(case: Case) -> None:
    """Check that no epoch is repeated that was reported, except those of damaged checkpoints, which are reported."""
    broken = re.findall(r"^warning: checkpoint \S+ is broken", "\n".join(case.told()), re.MULTILINE)
    assert len(broken) == case.may_repeat
    logs = [file.read_text().splitlines() for file in case.runs.glob("job-sweep-*/trial-*/trial.log")]
    repeated = 0
    for lines in ([line for attempt in case.attempts for line in attempt.lines], *logs):
        reported = 0
        for line in lines:
            if found := re.match(r"epoch (\d+):", line):
                repeated += int(found[1]) <= reported
                reported = int(found[1])
    assert repeated <= case.may_repeat, f"{repeated} reported epochs were repeated"


def check_cluster_is_left(case: Case, seconds: float = 30) -> None:
    """Check that no process of the job is left on the cluster."""
    if case.cluster is None:
        return
    kinds = ("RayTrainWorker", "TrainController", "ray::ImplicitFunc", "ray::Mailbox")
    named = case.cluster.named

    def alive() -> list[str]:
        return [title(process) for kind in kinds for process in named(kind)]

    wait_until(lambda: not alive(), seconds, "the job's processes on the cluster to end", state=alive)


def check_nothing_lives(case: Case, seconds: float = 20) -> None:
    """Check that no process of the case is left, except Ray's agents, which notice a killed driver after a minute."""

    def alive() -> list[str]:
        return [title(process) for process in case.processes() if not is_agent(process)]

    wait_until(lambda: not alive(), seconds, "the case's processes to end", state=alive, interval=0.1)


def is_agent(process: psutil.Process) -> bool:
    return "agent" in title(process).lower()
