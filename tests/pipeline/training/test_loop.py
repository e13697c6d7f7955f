"""The training loop: records of epochs, exact resumption, several ranks, and the trained network."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from istanas.data import ArrayPictures, ImageDataset, normalize
from istanas.errors import CheckpointError
from istanas.space import CellSpace, Genotype, random_genotype
from istanas.sparse import mosek_licence
from pipeline.jobs.search import describe_epoch, describe_trained_epoch
from pipeline.runs import checkpoint
from pipeline.runs.epoch_log import BrokenCheckpointWarning
from pipeline.training.build import network_cost
from pipeline.training.epoch_record import (
    EpochRecord,
    Progress,
    load_latest,
)
from pipeline.training.loop import retrain_worker, search_worker, trained_network
from tests.pipeline.training.small_jobs import (
    GENOTYPE,
    Nobody,
    Watcher,
    decided,
    moving,
    result_of,
    retrain,
    search,
    tiny,
)
from tests.ranks import run_ranks

# ---------- records


def test_a_search_record_has_the_metrics_and_nodes_of_an_epoch(few: ImageDataset, tmp_path: Path) -> None:
    config = tiny()
    history = search(config, few, tmp_path)
    assert [record.workers for record in history] == [1, 1]
    assert [record.epoch for record in history] == [1, 2]
    for record in history:
        assert record.metrics.keys() == {
            "train/loss",
            "train/top1",
            "valid/loss",
            "valid/top1",
            "recovery/gap",
            "recovery/truncation",
            "recovery/margin",
            "recovery/distance",
            "recovery/support_changes",
            "arch/skip_ratio",
            "arch/frozen_nodes",
            "target/params",
            "target/macs",
            "images_per_second",
        }
        assert 0 <= record.metrics["train/top1"] <= 1
        assert record.metrics["recovery/gap"] <= 1e-9
        assert [(n.cell, n.node) for n in record.found().nodes] == [
            (cell, node) for cell in ("normal", "reduce") for node in (0, 1)
        ]
    # What an epoch trains is what the recovery before it has found.
    assert history[1].found().trained_genotype == history[0].found().genotype
    cost = network_cost(config, config.retrain, few, Genotype.from_json(history[-1].found().genotype))
    m = history[-1].metrics
    assert (m["target/params"], m["target/macs"]) == (cost.params, cost.macs)


@pytest.mark.parametrize("method", ["two_stage", "one_stage"])
def test_another_solver_recovers_nodes_that_the_first_failed_on(
    few: ImageDataset, tmp_path: Path, method: str
) -> None:
    sizes = {"two_stage": "epochs: 2", "one_stage": "max_search_epochs: 2, train_epochs: 0"}[method]
    common = [f"method={method}", f"search={{{sizes}, batch_size: 64, init_channels: 2, layers: 3}}"]
    if mosek_licence() is not None:
        pytest.skip("MOSEK has a licence here: it would not fail")
    # A one-stage search ends with an epoch after which nothing is recovered.
    other = search(tiny(*common, "space.solver=mosek"), few, tmp_path / "other")[:2]
    asked = search(tiny(*common), few, tmp_path / "asked")[:2]
    assert [record.metrics.pop("recovery/fallbacks") for record in other] == [4.0, 4.0]
    for one, two in zip(decided(other), decided(asked), strict=True):
        nodes = [*one.found().start_nodes, *one.found().nodes]
        wanted = [*two.found().start_nodes, *two.found().nodes]
        assert nodes == [dataclasses.replace(node, fallback=True) for node in wanted]
        assert {node.solver for node in nodes} == {"homotopy"}
        assert not any(node.fallback for node in wanted)
        without = [dataclasses.replace(each.found(), nodes=(), start_nodes=()) for each in (one, two)]
        assert without[0] == without[1]
        assert one.metrics == two.metrics
    describe = {"two_stage": describe_epoch, "one_stage": describe_trained_epoch}[method]
    line = "space.solver failed, recovered normal node 0, normal node 1, reduce node 0, reduce node 1 by homotopy"
    assert line in describe(other[-1]).splitlines()
    assert "space.solver" not in describe(asked[-1])


def test_retraining_measures_the_test_split_at_intervals_and_at_the_end(
    few: ImageDataset, tmp_path: Path
) -> None:
    config = tiny("retrain.epochs=3", "retrain.test_every=2")
    history = retrain(config, few, tmp_path)
    assert [record.workers for record in history] == [1, 1, 1]
    assert ["test/top1" in record.metrics for record in history] == [False, True, True]


def test_a_search_stops_when_the_codes_no_longer_move(few: ImageDataset, tmp_path: Path) -> None:
    still = tiny("search.epochs=4", "search.arch_lr=1e-9", "search.termination_tol=1e-3")
    history = search(still, few, tmp_path / "still")
    assert len(history) == 1
    assert history[-1].found().converged
    watcher = Watcher()
    assert decided(search(still, few, tmp_path / "still", watcher)) == decided(history)
    assert watcher.steps == [], "a converged search was trained on"
    moving = tiny("search.epochs=2", "search.arch_lr=0.1", "search.termination_tol=1e-6")
    assert len(search(moving, few, tmp_path / "moving")) == 2


# ---------- resumption, in one process (kills of whole processes: tests/integration/test_resume.py)


@pytest.mark.parametrize("stop_at", [(0, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("job", ["search", "retrain"])
def test_a_job_stopped_in_an_epoch_goes_on_as_if_it_had_not_been(
    few: ImageDataset, whole: dict[str, Any], tmp_path: Path, job: str, stop_at: tuple[int, int]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        result_of(job, few, tmp_path, Watcher(stop_at))
    watcher = Watcher()
    assert result_of(job, few, tmp_path, watcher) == whole[job]
    assert watcher.resumed_with == [(stop_at[0], 1)]
    assert watcher.steps[0][:2] == (stop_at[0], 1)


@pytest.mark.parametrize("job", ["search", "retrain"])
def test_a_job_that_stops_after_an_epoch_resumes_as_if_it_had_not(
    few: ImageDataset, whole: dict[str, Any], tmp_path: Path, job: str
) -> None:
    for done in (1, 2):
        watcher = Watcher(leave_after=(done,))
        history = (search if job == "search" else retrain)(moving(job), few, tmp_path, watcher)
        assert decided(history) == whole[job][0][:done]
        assert {epoch for epoch, _, _ in watcher.steps} == {done - 1}
    watcher = Watcher()
    assert result_of(job, few, tmp_path, watcher) == whole[job]
    assert watcher.resumed_with == [(2, 1)]
    assert {epoch for epoch, _, _ in watcher.steps} == {2}


@pytest.mark.parametrize("job", ["search", "retrain"])
def test_a_finished_job_started_again_trains_nothing_and_ends_the_same(
    few: ImageDataset, tmp_path: Path, job: str
) -> None:
    start = search if job == "search" else retrain
    history, watcher = start(tiny(), few, tmp_path), Watcher()
    assert start(tiny(), few, tmp_path, watcher) == history
    assert (watcher.resumed_with, watcher.steps) == ([(2, 1)], [])


class Memory:
    """A store without a disk."""

    def __init__(self) -> None:
        self.kept: dict[int, bytes] = {}
        self.log = b""

    def read(self) -> bytes | None:
        return self.kept[max(self.kept)] if self.kept else None

    def write(self, epoch: int, data: bytes, line: bytes, offset: int) -> None:
        self.kept[epoch] = data
        self.log = self.log[:offset] + line


def test_a_checkpoint_is_kept_before_anybody_hears_of_its_epoch(few: ImageDataset) -> None:
    store = Memory()

    class Listener(Watcher):
        def epoch_done(self, progress: Progress) -> None:
            super().epoch_done(progress)
            lines = store.log.splitlines()[1:]  # after the beginning of the segment
            assert max(store.kept) == len(lines) == progress.epochs

    for start in (
        lambda: search_worker(tiny(), few, store, Listener()),
        lambda: retrain_worker(tiny(), few, store, Listener(), GENOTYPE),
    ):
        store.kept.clear()
        assert start().epochs == len(store.kept) == 2


# ---------- on several ranks


def on_a_rank(
    job: str, dataset: ImageDataset, folder: Path, leave_after: tuple[int, ...]
) -> list[EpochRecord]:
    """The records of all epochs on the first rank, and the last one on another."""
    if torch.distributed.get_rank() > 0:
        nobody: Any = Nobody()
        arguments = () if job == "search" else (GENOTYPE,)
        worker: Any = search_worker if job == "search" else retrain_worker
        return [worker(tiny(), dataset, nobody, nobody, *arguments).newest]
    watcher = Watcher(leave_after=leave_after)
    history = (search if job == "search" else retrain)(tiny(), dataset, folder, watcher)
    assert [workers for _, workers in watcher.resumed_with] == [2]
    assert watcher.notes[0].startswith("2 workers (cpu, gloo), each 1 thread, ")
    return history


def test_rank_0_keeps_reports_and_decides_for_all(few: ImageDataset, tmp_path: Path) -> None:
    """Each job leaves after its first epoch, goes on on two ranks, and then in one process."""
    jobs = ("search", "search", "retrain", "retrain")
    parts = run_ranks([partial(on_a_rank, job, few, tmp_path / job, (1,)) for job in jobs], 2)
    for job, done, (first, second) in zip(jobs, (1, 2, 1, 2), parts, strict=True):
        together = first.value
        assert decided(second.value) == decided(together[-1:])
        assert [record.workers for record in together] == [2] * done
        if done == 2:
            alone = (search if job == "search" else retrain)(tiny(f"{job}.epochs=3"), few, tmp_path / job)
            assert alone[:2] == together
            assert [record.workers for record in alone] == [2, 2, 1]


# ---------- the trained network


def test_the_trained_network_has_the_figures_that_were_measured(few: ImageDataset, tmp_path: Path) -> None:
    history = retrain(tiny(), few, tmp_path)
    net = trained_network(tiny(), GENOTYPE, few, tmp_path)
    assert not net.training
    assert isinstance(few.test, ArrayPictures)
    logits = net(normalize(few.test.images, few.mean, few.std))
    top1 = (logits.argmax(1) == few.test.labels).double().mean().item()
    assert top1 == pytest.approx(history[-1].metrics["test/top1"], abs=1e-12)


def test_a_network_that_is_not_trained_to_the_end_is_not_given_out(few: ImageDataset, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the last epoch's checkpoint is missing or damaged") as caught:
        trained_network(tiny(), GENOTYPE, few, tmp_path)
    assert "\n" not in str(caught.value)
    retrain(tiny(), few, tmp_path, Watcher(leave_after=(1,)))
    with pytest.raises(CheckpointError, match="the last epoch's checkpoint is missing or damaged"):
        trained_network(tiny(), GENOTYPE, few, tmp_path)
    retrain(tiny(), few, tmp_path)
    with pytest.raises(
        CheckpointError, match="not belong to the retraining of this genotype; start over with --fresh"
    ):
        trained_network(tiny(), random_genotype(2, CellSpace(n_nodes=2)), few, tmp_path)
    (tmp_path / "epoch-0002.pt").write_bytes(b"")
    with (
        pytest.warns(BrokenCheckpointWarning),
        pytest.raises(CheckpointError, match="run the same command again to train it"),
    ):
        trained_network(tiny(), GENOTYPE, few, tmp_path)


# ---------- checkpoints that do not fit


def test_checkpoints_of_another_job_or_genotype_are_refused(few: ImageDataset, tmp_path: Path) -> None:
    config = tiny("retrain.epochs=1", "search.epochs=1")
    retrain(config, few, tmp_path)
    other = random_genotype(2, CellSpace(n_nodes=2))
    with pytest.raises(
        CheckpointError, match="not belong to the retraining of this genotype; start over with --fresh"
    ):
        retrain(config, few, tmp_path, genotype=other)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.clear(),
        lambda state: state.pop("progress"),
        lambda state: state.update(progress=7),
        lambda state: state.pop("genotype"),
        lambda state: state.pop("net"),
        lambda state: state.update(net={}),
    ],
)
def test_a_whole_checkpoint_that_is_not_of_the_job_is_one_line(
    few: ImageDataset, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    config = tiny("retrain.epochs=1")
    retrain(config, few, tmp_path)
    found = load_latest(tmp_path)
    assert found is not None
    change(found.state)
    checkpoint.write_state(tmp_path, 1, checkpoint.serialize(found.state))
    for use in (
        lambda: trained_network(config, GENOTYPE, few, tmp_path),
        lambda: retrain(config, few, tmp_path),
    ):
        with pytest.raises(CheckpointError, match=r"progress of a job|does not belong to th") as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("job", ["search", "retrain"])
def test_a_job_does_not_resume_with_other_pictures(few: ImageDataset, tmp_path: Path, job: str) -> None:
    start = search if job == "search" else retrain
    start(tiny(), few, tmp_path, Watcher(leave_after=(1,)))
    with pytest.raises(CheckpointError, match="data set digits has changed since the checkpoint of this run"):
        start(tiny(), dataclasses.replace(few, digest="other", train_digest="other"), tmp_path)


def test_a_two_stage_search_resumes_with_other_test_pictures(few: ImageDataset, tmp_path: Path) -> None:
    repaired = dataclasses.replace(few, digest="other")
    for start, folder in ((search, tmp_path / "search"), (retrain, tmp_path / "retrain")):
        folder.mkdir()
        start(tiny(), few, folder, Watcher(leave_after=(1,)))
    assert len(search(tiny(), repaired, tmp_path / "search")) == tiny().search.max_epochs
    with pytest.raises(CheckpointError, match="data set digits has changed since the checkpoint"):
        retrain(tiny(), repaired, tmp_path / "retrain")
