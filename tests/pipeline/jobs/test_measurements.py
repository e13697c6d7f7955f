"""Concurrent measurements without Ray: the searcher is used like Ray Tune does, and trials run in this process."""

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from istanas.distributed import Ranks
from istanas.errors import ConfigError, IstanasError
from istanas.search.measured import Planned
from istanas.training import Compute
from pipeline.cli.commands import run as istanas
from pipeline.cluster.tune import FAILED, FINISHED, NODE
from pipeline.config.load import load, run_hash
from pipeline.config.workers import Node
from pipeline.jobs.measurements import (
    MEASURED,
    MeasurementRuns,
    MeasurementSearcher,
    _Ledger,
    _task_of,
    divide,
)
from pipeline.jobs.observer import RunObserver
from pipeline.jobs.opening import open_record
from pipeline.jobs.progress import EpochBar
from pipeline.jobs.search import describe_epoch, search_spec
from pipeline.runs.directory import RunDir
from pipeline.tracking.tracker import NullTracker
from pipeline.training.epoch_record import FolderStore
from pipeline.training.loop import start_or_resume
from pipeline.training.measurements import Measured, MeasurementJob, measure
from pipeline.training.pictures import open_dataset
from tests.pipeline.jobs.tiny_search import SETTINGS, search

TINY = [
    *SETTINGS,
    "method=measured",
    "search={stages: [[4, 1], [2, 2, 4]], batch_size: 64, init_channels: 4, layers: 3, max_pictures: 100}",
]
CONCURRENT = [*TINY, "search.max_concurrent=3"]


class Machines:
    """A process of a search, and its trials, which run in this process when they finish."""

    def __init__(self, folder: Path, *overrides: str, restarts: int = 0) -> None:
        self.config = load(None, [*CONCURRENT, f"runtime.runs_dir={folder}", *overrides])
        self.dataset = open_dataset(self.config, ("search",))
        spec = search_spec(self.config, "tiny")
        self.run, self.out = RunDir(spec.path), io.StringIO()
        self.run.path.mkdir(parents=True, exist_ok=True)
        open_record(self.run, spec)
        bar = EpochBar(Console(file=self.out, width=200), "search", spec.epochs, spec.unit)
        space = self.config.space.build()
        observer = RunObserver(self.run, NullTracker(), bar, space, describe_epoch, unit=spec.unit)
        store = FolderStore(self.run.path / "checkpoints")
        self.job, progress = start_or_resume(
            lambda compute, ranks: MeasurementJob(self.config, self.dataset, compute, ranks),
            self.dataset,
            store,
            Compute(torch.device("cpu")),
            Ranks(),
        )
        observer.resumed(progress, 1)
        runs = MeasurementRuns(self.config, self.run)
        self.ledger = _Ledger(self.config, self.dataset, self.job, progress, runs, store, observer)
        plan = divide(self.config, [Node(3)])
        self.searcher = MeasurementSearcher(
            self.job.search,
            _task_of(self.config, self.dataset, plan),
            self.ledger.add,
            lambda trial_id: f"{trial_id} was killed",
            restarts=restarts,
            note=observer.note,
        )
        self.running: dict[str, Any] = {}
        self._ids = (f"trial-{n}" for n in range(100))

    def fill(self, places: int = 3) -> None:
        while len(self.running) < places:
            trial_id = next(self._ids)
            task = self.searcher.suggest(trial_id)
            if task is None or task == self.searcher.FINISHED:
                return
            self.running[trial_id] = task

    def planned(self) -> Iterator[Planned]:
        for task in self.running.values():
            yield task["task"].open()[2]

    def finish(self, place: int) -> None:
        """Let the trial at a place finish."""
        trial_id = list(self.running)[place]
        config, digest, planned = self.running.pop(trial_id)["task"].open()
        measured = measure(config, self.dataset, digest, planned)
        report = {FINISHED: True, NODE: "here", MEASURED: measured.to_json()}
        self.searcher.on_trial_complete(trial_id, report)
        if self.searcher.error is not None:
            raise self.searcher.error


def children(run: RunDir) -> dict[int, RunDir]:
    found = [RunDir(path) for path in sorted(run.path.glob("measurement-*"))]
    return {int(str(each.read().params["number"])): each for each in found}


def test_a_killed_search_resumes_with_the_losses_of_a_sequential_one(tmp_path: Path) -> None:
    alone, _ = search(tmp_path / "alone", *TINY)
    lines = RunDir(alone["run_dir"]).metrics()

    killed = Machines(tmp_path / "several")
    for place in (2, 0):
        killed.fill()
        killed.finish(place)
    killed.fill()
    lost = list(killed.planned())
    assert [planned.number for planned in lost] == [1, 3, 4]
    assert list(children(killed.run)) == [0, 2]

    machines = Machines(tmp_path / "several")  # the first process is gone
    machines.fill()
    assert list(machines.planned()) == lost
    while machines.running:
        machines.finish(-1)
        machines.fill()
    assert machines.job.search.is_done
    assert "resumed after measurement 2" in machines.out.getvalue()

    runs = children(machines.run)
    assert sorted(runs) == list(range(6))
    assert [runs[n].read().params["epochs"] for n in range(6)] == [1, 1, 1, 1, 2, 2]
    assert [runs[n].read().params["layers"] for n in range(6)] == [3, 3, 3, 3, 4, 4]
    assert {each.read().status for each in runs.values()} == {"FINISHED"}
    for number in range(2):  # the balanced design; what follows depends on the order
        (own,) = runs[number].metrics()
        same = {name: value for name, value in lines[number].metrics.items() if name in own.metrics}
        assert own.metrics == same
        assert set(own.metrics) == {"train/loss", "train/top1", "valid/loss", "valid/top1"}
    metrics = [line.metrics for line in machines.run.metrics()]
    assert [line.step for line in machines.run.metrics()] == list(range(1, 7))
    assert [each["measured/count"] for each in metrics] == [1, 2, 3, 4, 5, 6]
    assert sorted(each["valid/loss"] for each in metrics) == sorted(
        each.metrics()[0].metrics["valid/loss"] for each in runs.values()
    )
    assert len((machines.run.path / "trajectory.csv").read_text().splitlines()) > 6


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_diverged_training_is_a_measurement_without_a_loss(tmp_path: Path, epochs: int) -> None:
    """The first step spoils the weights: after one epoch the measured loss is NaN, and a second one has none at all."""
    settings = ("search.lr=1e30", "search.grad_clip=null", f"search.stages=[[4, {epochs}]]")
    machines = Machines(tmp_path, *settings)
    machines.fill()
    machines.finish(1)
    ((number, run),) = children(machines.run).items()
    assert (number, run.read().tags["istanas.reason"]) == (1, "the training has diverged")
    losses = [line.metrics["valid/loss"] for line in run.metrics()]
    assert [math.isnan(loss) for loss in losses] == [True] * (2 - epochs)
    assert ("the training has diverged" in machines.out.getvalue()) == (epochs == 2)
    assert not math.isfinite(machines.job.search.measurements[0].loss)
    with pytest.raises(IstanasError, match=r"^search\.lr: all 2 trainings have diverged; lower it"):
        machines.finish(0)


def test_a_search_that_has_converged_ends_the_other_trials(tmp_path: Path) -> None:
    """The others are neither waited for nor recorded, and a later process finds nothing to do."""
    settings = ("search.stop_probability=0.999", "search.stop_margin=1000.0")
    machines = Machines(tmp_path, *settings)
    machines.fill()
    machines.finish(0)
    assert not machines.searcher.ends_trials
    machines.finish(0)
    assert machines.searcher.ends_trials
    for trial_id in machines.running:
        machines.searcher.on_trial_complete(trial_id, {})
    assert machines.searcher.error is None
    assert machines.searcher.suggest("another") == machines.searcher.FINISHED
    assert list(children(machines.run)) == [0, 1]
    again = Machines(tmp_path, *settings)
    assert again.job.is_done(again.ledger.progress)


@pytest.mark.parametrize(
    ("report", "lost", "line"),
    [
        (
            {},
            True,
            "search: the process of measurement 0 was lost more than 0 times (runtime.max_failures): trial-0 was "
            "killed; run the same command again to resume",
        ),
        (
            {FAILED: "DataError: no such folder: /data"},
            False,
            "search: measurement 0 failed: DataError: no such folder: /data; correct the cause, then run the same "
            "command again to resume",
        ),
        ({}, False, "search: measurement 0 failed: it ended without a result; correct the cause, then"),
    ],
)
def test_a_measurement_that_cannot_be_made_ends_the_search(
    tmp_path: Path, report: dict[str, Any], lost: bool, line: str
) -> None:
    machines = Machines(tmp_path)
    machines.fill()
    machines.searcher.on_trial_complete("trial-0", report, error=lost)
    assert str(machines.searcher.error).startswith(line)
    assert machines.searcher.ends_trials
    assert children(machines.run) == {}


def test_a_lost_measurement_is_repeated_with_its_number(tmp_path: Path) -> None:
    """Also if everything has been drawn: until the last trial has ended, the searcher is asked again."""
    machines = Machines(tmp_path, restarts=1)
    machines.fill(6)
    lost = list(machines.planned())[5]
    assert machines.searcher.suggest("none is left") is None
    machines.running.pop("trial-5")
    machines.searcher.on_trial_complete("trial-5", error=True)
    assert machines.searcher.error is None
    assert "its measurement is repeated: trial-5 was killed" in machines.out.getvalue()
    machines.fill(6)
    assert list(machines.planned())[5] == lost


def test_a_node_with_other_pictures_measures_nothing(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    machines.fill(1)
    (planned,) = machines.planned()
    with pytest.raises(
        IstanasError, match=r"^data set digits differs from that of the search; copy the same"
    ):
        measure(machines.config, machines.dataset, "another", planned)


def test_a_result_is_sent_with_exact_numbers() -> None:
    measured = Measured({"valid/loss": 0.1 + 0.2}, 1 / 3)
    assert Measured.from_json(measured.to_json()) == measured


@pytest.mark.parametrize(
    ("overrides", "nodes", "plan"),
    [
        ([], [Node(8)], (2, 0, 4, 3)),  # the cores are divided among three trials
        ([], [Node(2)], (1, 0, 2, 2)),
        (["runtime.threads=4"], [Node(8), Node(8)], (4, 0, 4, 3)),
        (["runtime.threads=4"], [Node(2)], (4, 0, 0, 0)),
        (["runtime.device=auto"], [Node(8, 1)], (2, 1 / 3, 3, 3)),  # three trials share a GPU
        (["runtime.device=auto"], [Node(8, 2)], (2, 0.5, 4, 3)),
        (["runtime.device=auto"], [Node(8, 8)], (2, 1, 4, 3)),
        (["runtime.device=cuda"], [Node(8)], (2, 1, 0, 0)),
    ],
)
def test_the_machines_are_divided_among_measurements(
    overrides: list[str], nodes: list[Node], plan: Any
) -> None:
    config = load(None, [*CONCURRENT, "runtime={threads: null, device: cpu}", *overrides])
    found = divide(config, nodes)
    assert (found.cpus, found.gpus, found.fit, found.at_once) == pytest.approx(plan)
    assert found.workers == 0


# ---------- settings


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["search.max_concurrent=0"], "search.max_concurrent: 0 is invalid"),
        (["runtime.workers=2"], "search.max_concurrent: 3 architectures are trained at a time, each in one"),
        (
            ["runtime.workers=1:4"],
            "search.max_concurrent: 3 architectures are trained at a time, each in one",
        ),
        (
            [
                "sweep={objective: retrained, scheduler: none, space: {seed: {int: [0, 9]}}}",
                "data.holdout=0.1",
            ],
            "search.max_concurrent: 3, but the trials of a sweep train one architecture at a time; set it to 1",
        ),
        (["method=darts"], "search.max_concurrent: unknown key; it belongs to method: measured"),
    ],
)
def test_settings_that_contradict_concurrency_are_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, ["method=measured", "search.max_concurrent=3", *overrides])
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cluster_needs_no_workers() -> None:
    assert load(None, [*CONCURRENT, "runtime.address=10.0.0.1:6379"]).runtime.workers == 0
    with pytest.raises(ConfigError, match=r"runtime\.workers: 0 runs the job in this process"):
        load(None, [*TINY, "runtime.address=10.0.0.1:6379"])


def test_runs_of_one_measurement_at_a_time_keep_their_hash() -> None:
    assert run_hash(load(None, ["method=measured"]), "search") == "eaa932bb1c"
    assert run_hash(load(None, ["method=measured", "search.max_concurrent=2"]), "search") != "eaa932bb1c"


def test_a_profile_is_that_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [argument for each in CONCURRENT for argument in ("--set", each)]
    assert istanas(["profile", "--steps", "1", *settings]) == 0
    out = capsys.readouterr()
    assert "measured and projected for one process; search.max_concurrent is 3" in out.out + out.err
