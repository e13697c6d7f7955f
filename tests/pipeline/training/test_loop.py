"""What a worker does with pictures: disjoint stratified splits, no look at the test split, exact resumption."""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from istanas.data import ArrayPictures, ImageDataset, load_dataset, normalize, stratified_subset
from istanas.distributed import Ranks
from istanas.errors import CheckpointError, ConfigError, DivergedError, IstanasError
from istanas.space import PUBLISHED, CellSpace, Genotype, random_genotype
from istanas.sparse import mosek_licence
from istanas.training import Compute, Metrics
from pipeline.base.text import count
from pipeline.config.load import load
from pipeline.config.schema import Config, RuntimeSettings
from pipeline.config.threads import usable_cores
from pipeline.jobs.search import describe_epoch, describe_trained_epoch
from pipeline.runs import checkpoint
from pipeline.runs.epoch_log import BrokenCheckpointWarning
from pipeline.training.build import build_retraining, build_search, network_cost
from pipeline.training.compute import choose_compute, compute_for, describe_place, set_float32_precision
from pipeline.training.epoch_record import (
    EpochRecord,
    FolderStore,
    Progress,
    load_latest,
    load_progress,
    read_records,
)
from pipeline.training.loop import retrain_worker, search_worker, trained_network
from pipeline.training.pictures import open_dataset
from pipeline.training.splits import Splits, splits_of
from tests.ranks import run_ranks

TINY = [
    "space.nodes=2",
    "search={epochs: 2, batch_size: 64, init_channels: 2, layers: 3}",
    "retrain={epochs: 2, batch_size: 64, init_channels: 2, layers: 2, auxiliary_weight: 0.4, cutout: 2}",
    "data.crop_padding=1",
    "runtime={threads: 1, device: cpu}",
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GENOTYPE = random_genotype(1, CellSpace(n_nodes=2))


def tiny(*overrides: str) -> Config:
    return load(None, [*TINY, *overrides])


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_dataset("digits")


@pytest.fixture(scope="module")
def few(digits: ImageDataset) -> ImageDataset:
    """A fifth of the digits, for tests that train."""
    chosen = stratified_subset(digits.train.labels, 300, seed=0)
    assert isinstance(digits.train, ArrayPictures)
    return with_train(digits, digits.train.images[chosen], digits.train.labels[chosen])


def with_train(dataset: ImageDataset, images: torch.Tensor, labels: torch.Tensor) -> ImageDataset:
    return dataclasses.replace(dataset, train=ArrayPictures(images, labels))


class Watcher:
    """An observer that remembers, and may stop the job in the middle of an epoch or have it end after one."""

    def __init__(self, stop_at: tuple[int, int] | None = None, leave_after: tuple[int, ...] = ()) -> None:
        self.stop_at, self.leave_after = stop_at, leave_after
        self.done: list[int] = []
        self.last: EpochRecord | None = None
        self.notes: list[str] = []
        self.resumed_with: list[tuple[int, int]] = []
        self.steps: list[tuple[int, int, int]] = []
        self.counts: dict[int, int] = {}

    def note(self, text: str) -> None:
        self.notes.append(text)

    def resumed(self, progress: Progress, workers: int) -> None:
        self.resumed_with.append((progress.epochs, workers))

    def step(self, epoch: int, step: int, n_steps: int, read: Callable[[], Metrics | None]) -> None:
        self.steps.append((epoch, step, n_steps))
        if (metrics := read()) is not None:
            self.counts[epoch] = metrics.count
        if (epoch, step) == self.stop_at:
            raise KeyboardInterrupt

    def epoch_done(self, progress: Progress) -> None:
        self.done.append(progress.epochs)
        self.last = progress.last

    def should_continue(self) -> bool:
        return self.done[-1] not in self.leave_after


def search(
    config: Config, dataset: ImageDataset, folder: Path, watcher: Watcher | None = None
) -> list[EpochRecord]:
    """Run a search with its checkpoints in a folder; returns the records of all its epochs."""
    return all_records(folder, search_worker(config, dataset, FolderStore(folder), watcher or Watcher()))


def retrain(
    config: Config,
    dataset: ImageDataset,
    folder: Path,
    watcher: Watcher | None = None,
    genotype: Genotype = GENOTYPE,
) -> list[EpochRecord]:
    """Run a retraining with its checkpoints in a folder; returns the records of all its epochs."""
    done = retrain_worker(config, dataset, FolderStore(folder), watcher or Watcher(), genotype)
    return all_records(folder, done)


def all_records(folder: Path, progress: Progress) -> list[EpochRecord]:
    """The records of all epochs, with which what the worker returns agrees."""
    records = list(read_records(folder, progress))
    assert progress.newest.to_json() == records[-1].to_json()  # as text, in which nan is nan
    assert progress.epochs == len(records)
    assert progress.seconds == sum(record.seconds for record in records)
    assert progress.rollbacks == sum(len(record.rollbacks) for record in records)
    return records


def decided(history: list[EpochRecord]) -> list[EpochRecord]:
    """Records without what the clock decides."""
    return [
        dataclasses.replace(
            record,
            timestamp_ms=0,
            seconds=0.0,
            metrics={k: v for k, v in record.metrics.items() if k != "images_per_second"},
        )
        for record in history
    ]


class Untouchable:
    """Stands where the test split is; whoever looks at it fails."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"the test split was asked for {name}")

    def __len__(self) -> int:
        raise AssertionError("the test split was counted")


# ---------- splits
def class_counts(dataset: ImageDataset, indices: torch.Tensor) -> torch.Tensor:
    return torch.bincount(dataset.train.labels[indices], minlength=dataset.num_classes).double()


@pytest.mark.parametrize("holdout", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("max_pictures", [None, 500])
@pytest.mark.parametrize("alpha_fraction", [0.5, 0.3])
def test_splits_of_a_search_are_disjoint_and_stratified(
    digits: ImageDataset, holdout: float, max_pictures: int | None, alpha_fraction: float
) -> None:
    limit = "null" if max_pictures is None else max_pictures
    config = tiny(
        f"data.holdout={holdout}", f"search.max_pictures={limit}", f"search.alpha_fraction={alpha_fraction}"
    )
    splits = splits_of(config, digits, "search")
    kept, alphas = splits.holdout, splits.alpha_half()
    parts = [splits.training, alphas] + ([] if kept is None else [kept])
    everything = torch.cat(parts)
    assert len(everything.unique()) == len(everything), "a picture is in two parts"
    n = len(digits.train)
    total = n - round(holdout * n) if max_pictures is None else max_pictures
    assert len(splits.training) + len(alphas) == total
    assert len(alphas) == round(alpha_fraction * total)
    share = class_counts(digits, torch.arange(n)) / n
    for part in parts:
        # Up to three draws, each within one picture a class.
        assert (class_counts(digits, part) - share * len(part)).abs().max() <= 3
    if kept is not None:
        assert len(kept) == round(holdout * n)
        trainable = splits_of(config, digits, "retrain").training
        assert torch.equal(torch.cat([trainable, kept]).sort().values, torch.arange(n))
        assert torch.isin(torch.cat([splits.training, alphas]), trainable).all()


def test_without_a_holdout_retraining_may_use_every_training_picture(digits: ImageDataset) -> None:
    splits = splits_of(tiny(), digits, "retrain")
    assert torch.equal(splits.training, torch.arange(len(digits.train)))
    assert splits.alphas is splits.holdout is None


def test_splits_follow_from_the_seed(digits: ImageDataset) -> None:
    def split(seed: int, dataset: ImageDataset) -> Splits:
        return splits_of(tiny(f"seed={seed}", "search.max_pictures=500"), dataset, "search")

    copy = dataclasses.replace(digits)  # splits are computed once per data set, so not those of `digits`
    one, same, other = split(0, digits), split(0, copy), split(1, digits)
    assert one is not same
    assert torch.equal(one.training, same.training)
    assert torch.equal(one.alpha_half(), same.alpha_half())
    assert not torch.equal(one.training, other.training)


def test_splits_are_computed_once_for_a_data_set_and_its_settings(digits: ImageDataset) -> None:
    one = splits_of(tiny(), digits, "search")
    assert splits_of(tiny("search.lr=0.01", "retrain.lr=0.01"), digits, "search") is one
    decisive = ("seed=1", "data.holdout=0.1", "search.max_pictures=500", "search.alpha_fraction=0.3")
    others = [splits_of(tiny(override), digits, "search") for override in decisive]
    retraining = splits_of(tiny(), digits, "retrain")
    assert len({id(each) for each in (one, retraining, *others)}) == 2 + len(decisive)
    again = splits_of(tiny(), digits, "search")  # computed again, because only the newest ones are kept
    assert torch.equal(again.training, one.training)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["search.max_pictures=2000"], "search.max_pictures: 2000 is above the 1438"),
        (["search.max_pictures=1438", "data.holdout=0.1"], "search.max_pictures: 1438 is above the 1294"),
        (["search.alpha_fraction=1e-9"], "search.alpha_fraction: 1e-09 leaves"),
    ],
)
def test_a_split_that_cannot_be_is_refused(digits: ImageDataset, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        splits_of(tiny(*overrides), digits, "search")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_do_not_fit_the_pictures_are_refused_before_any_work() -> None:
    with pytest.raises(
        ConfigError,
        match=r"retrain\.cutout: 9 is larger than the pictures' shorter side, 8; choose at most 8",
    ):
        open_dataset(tiny("retrain.cutout=9"), ("search", "retrain"))
    assert open_dataset(tiny("retrain.cutout=9"), ("search",)).height == 8
    assert open_dataset(tiny("data.image_size=16", "retrain.cutout=9"), ("retrain",)).height == 16


def test_a_batch_has_two_pictures_for_every_worker() -> None:
    for job in ("search", "retrain"):
        for workers, enough in (("0", 2), ("1", 2), ("2", 4), ("1:3", 6)):
            place = f"runtime.workers='{workers}'"
            assert open_dataset(tiny(place, f"{job}.batch_size={enough}"), (job,))
            few, other = f"{job}.batch_size={enough - 1}", "retrain" if job == "search" else "search"
            if enough > 2:  # one picture is none of the schema's batches
                assert open_dataset(tiny(place, few), (other,))
                with pytest.raises(
                    ConfigError,
                    match=rf"^{job}\.batch_size: {enough - 1} is too small .* lower runtime\.workers$",
                ) as caught:
                    open_dataset(tiny(place, few), ("search", "retrain"))
                assert f"use at least {enough}" in str(caught.value)
                assert "\n" not in str(caught.value)


# ---------- invariant 6
def test_a_search_never_looks_at_the_test_split(few: ImageDataset, tmp_path: Path) -> None:
    blind = dataclasses.replace(few, test=Untouchable())  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="test split"):
        len(blind.test)
    history = search(tiny(), blind, tmp_path / "blind")
    seeing = search(tiny(), few, tmp_path / "seeing")
    assert decided(history) == decided(seeing)
    assert not any(name.startswith("test/") for record in history for name in record.metrics)


def weights_of(net: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in net.state_dict().items():
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_the_test_split_chooses_nothing_in_retraining(few: ImageDataset, tmp_path: Path) -> None:
    test = few.test
    assert isinstance(test, ArrayPictures)
    other = dataclasses.replace(few, test=ArrayPictures(255 - test.images, test.labels.flip(0)))
    nets, tops = [], []
    for name, dataset in (("one", few), ("other", other)):
        history = retrain(tiny(), dataset, tmp_path / name)
        nets.append(weights_of(trained_network(tiny(), GENOTYPE, dataset, tmp_path / name)))
        tops.append(history[-1].metrics["test/top1"])
    assert nets[0] == nets[1]
    assert tops[0] != tops[1]


@pytest.mark.parametrize("job", ["search", "retrain"])
def test_holdout_pictures_are_never_trained_on(few: ImageDataset, tmp_path: Path, job: str) -> None:
    config = tiny("data.holdout=0.2", f"{job}.epochs=1")
    kept = splits_of(config, few, "retrain").holdout
    assert kept is not None
    assert isinstance(few.train, ArrayPictures)

    def result(name: str, changed: torch.Tensor) -> tuple[Any, EpochRecord]:
        images = few.train.images.clone()  # type: ignore[union-attr]
        images[changed] = 255 - images[changed]
        dataset = with_train(few, images, few.train.labels)
        if job == "search":
            history = search(config, dataset, tmp_path / name)
            return decided(history), history[-1]
        history = retrain(config, dataset, tmp_path / name)
        return weights_of(trained_network(config, GENOTYPE, dataset, tmp_path / name)), history[-1]

    nothing = torch.tensor([], dtype=torch.int64)
    plain, plain_record = result("plain", nothing)
    changed, changed_record = result("kept", kept)
    assert plain == changed
    one_trained = splits_of(config, few, "retrain").training[:1]
    assert plain != result("trained", one_trained)[0], "a training picture has no influence"
    if job == "retrain":  # the hold-out is what is measured
        assert plain_record.metrics["valid/loss"] != changed_record.metrics["valid/loss"]


def test_retraining_takes_every_training_picture_once_an_epoch(few: ImageDataset, tmp_path: Path) -> None:
    watcher = Watcher()
    retrain(tiny(), few, tmp_path, watcher)
    assert watcher.counts == {0: 300, 1: 300}
    assert watcher.steps == [(epoch, step, 5) for epoch in (0, 1) for step in range(1, 6)]


def test_a_last_batch_of_one_picture_is_left_out(few: ImageDataset, tmp_path: Path) -> None:
    watcher = Watcher()
    config = tiny("retrain.batch_size=299", "retrain.epochs=1")
    retrain(config, few, tmp_path, watcher)
    assert watcher.counts == {0: 299}


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
def moving(job: str) -> Config:
    """Three epochs in which the architecture changes."""
    return tiny(f"{job}.epochs=3", "search.max_pictures=300", "search.arch_lr=0.1", "search.batch_size=32")


def result_of(
    job: str, dataset: ImageDataset, folder: Path, watcher: Watcher
) -> tuple[list[EpochRecord], Genotype | str]:
    """Run a job that moves to its end: its history without times, what it found."""
    config = moving(job)
    if job == "search":
        history = search(config, dataset, folder, watcher)
        assert sum(r.metrics["recovery/support_changes"] for r in history) > 0, "no change to be lost"
        return decided(history), history[-1].found().genotype
    history = retrain(config, dataset, folder, watcher)
    return decided(history), weights_of(trained_network(config, GENOTYPE, dataset, folder))


@pytest.fixture(scope="module")
def whole(few: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each job ends with when nothing stops it."""
    return {
        job: result_of(job, few, tmp_path_factory.mktemp(job), Watcher()) for job in ("search", "retrain")
    }


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
class Nobody:
    """Store and observer of a rank that is not the first: whatever is called fails."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def fail(*_: Any) -> Any:
            raise AssertionError(f"{name} was called on a rank that is not the first")

        return fail


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


@pytest.mark.parametrize("job", ["search", "retrain"])
def test_a_diverged_epoch_stops_the_job_and_leaves_no_checkpoint(
    few: ImageDataset, tmp_path: Path, job: str
) -> None:
    config = tiny(f"{job}.lr=1e30", f"{job}.grad_clip=null")
    with pytest.raises(IstanasError, match=r"the run diverged; .*; lower the learning rate") as caught:
        (search if job == "search" else retrain)(config, few, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("epoch-*"))


# One diverges in its second epoch, one in its third, one at once; all of them go on with a lower learning rate.
DIVERGING = {
    "search": ["search.epochs=3", "search.lr=64.0", "search.grad_clip=null", "runtime.max_loss=20"],
    "one_stage": [
        "method=one_stage",
        "search={max_search_epochs: 2, train_epochs: 2, batch_size: 64, init_channels: 2, layers: 3}",
        "search.lr=32.0",
        "search.grad_clip=null",
        "runtime.max_loss=30",
    ],
    "retrain": ["retrain.epochs=1", "retrain.lr=1e4", "retrain.grad_clip=null", "runtime.max_loss=null"],
}
LAST_GOOD = {"search": 1, "one_stage": 2, "retrain": 0}


def diverging(job: str, *overrides: str) -> Config:
    return tiny(*DIVERGING[job], *overrides)


def run_diverging(
    job: str, dataset: ImageDataset, folder: Path, watcher: Watcher | None = None, *overrides: str
) -> list[EpochRecord]:
    config = diverging(job, *(overrides or ("runtime.on_nan=rollback", "runtime.max_rollbacks=9")))
    return (retrain if job == "retrain" else search)(config, dataset, folder, watcher)


def exact(history: list[EpochRecord]) -> list[str]:
    """What is decided in each epoch, as text: a diverged run has figures that are nan."""
    return [record.to_json() for record in decided(history)]


def newest(folder: Path) -> list[Any]:
    """All that is in the newest checkpoint but for what the clock decides, tensors as bytes."""
    found = load_latest(folder)
    assert found is not None
    records = decided(list(read_records(folder, load_progress(folder))))
    return flat({**found.state, "progress": [dataclasses.asdict(record) for record in records]})


def flat(tree: Any) -> list[Any]:
    if isinstance(tree, torch.Tensor):
        return [tree.numpy().tobytes()]
    if isinstance(tree, dict):
        tree = [*tree, *tree.values()]
    return [leaf for part in tree for leaf in flat(part)] if isinstance(tree, list | tuple) else [repr(tree)]


@pytest.mark.slow
@pytest.mark.parametrize("job", DIVERGING)
def test_a_diverged_run_stops_and_the_same_command_with_rollback_goes_on(
    few: ImageDataset, tmp_path: Path, job: str
) -> None:
    epoch = LAST_GOOD[job]
    with pytest.raises(DivergedError) as caught:
        run_diverging(job, few, tmp_path / "stopped", None, "runtime.on_nan=stop")
    line = str(caught.value)
    assert "\n" not in line
    assert f" in epoch {epoch + 1}" in line
    last = (
        f"the last good checkpoint is of epoch {epoch}; " if epoch else "there is no checkpoint before it; "
    )
    assert last in line
    assert "at half the rate with --set runtime.on_nan=rollback" in line
    assert load_progress(tmp_path / "stopped").epochs == epoch

    watcher = Watcher()
    history = run_diverging(job, few, tmp_path / "whole", watcher)
    told = [note for note in watcher.notes if "rolled back" in note]
    assert 1 <= len(told) == sum(len(record.rollbacks) for record in history) <= 9
    to = f"to the end of epoch {epoch}" if epoch else "to the start"
    assert f"{to}, with half the learning rate (0.5 of the configured one; rollback 1 of 9)" in told[0]
    assert [record.epoch for record in history] == list(range(1, len(history) + 1)), "an epoch is doubled"
    after = [record.metrics.get("train/rollbacks") for record in history]
    assert after[:epoch] == [None] * epoch
    assert after[epoch] == len(history[epoch].rollbacks) > 0
    assert [undone.lr_factor for undone in history[epoch].rollbacks] == [
        0.5 ** (n + 1) for n in range(len(history[epoch].rollbacks))
    ]

    # The stopped run goes on, and so does one that is stopped in an attempt after the rollback, bit for bit.
    assert exact(run_diverging(job, few, tmp_path / "stopped")) == exact(history)
    assert newest(tmp_path / "stopped") == newest(tmp_path / "whole")
    stop_at = (epoch, 1) if job == "search" else (len(history) - 1, 2)
    with pytest.raises(KeyboardInterrupt):
        run_diverging(job, few, tmp_path / "interrupted", StopsAfterRollback(stop_at))
    assert exact(run_diverging(job, few, tmp_path / "interrupted")) == exact(history)
    assert newest(tmp_path / "interrupted") == newest(tmp_path / "whole")


class StopsAfterRollback(Watcher):
    """Stops at a step, but not before the run was rolled back."""

    def step(self, epoch: int, step: int, n_steps: int, read: Callable[[], Metrics | None]) -> None:
        if any("rolled back" in note for note in self.notes):
            super().step(epoch, step, n_steps, read)


def test_a_run_is_rolled_back_so_often_and_then_stops(few: ImageDataset, tmp_path: Path) -> None:
    watcher = Watcher()
    config = tiny("search.lr=1e30", "search.grad_clip=null", "runtime={on_nan: rollback, max_rollbacks: 2}")
    with pytest.raises(DivergedError, match=r"rolled back 2 times; .*; raise runtime\.max_rollbacks"):
        search(config, few, tmp_path, watcher)
    assert [note.partition("(")[2] for note in watcher.notes if "rolled" in note] == [
        "0.5 of the configured one; rollback 1 of 2)",
        "0.25 of the configured one; rollback 2 of 2)",
    ]
    assert not list(tmp_path.glob("epoch-*"))


def roll_back_on_a_rank(dataset: ImageDataset, folder: Path) -> tuple[list[EpochRecord], list[str]]:
    if torch.distributed.get_rank() > 0:
        nobody: Any = Nobody()
        config = diverging("search", "runtime.on_nan=rollback")
        return [search_worker(config, dataset, nobody, nobody).newest], []
    watcher = Watcher()
    return run_diverging("search", dataset, folder, watcher), watcher.notes


@pytest.mark.slow
def test_ranks_roll_back_together(few: ImageDataset, tmp_path: Path) -> None:
    ((first, second),) = run_ranks([partial(roll_back_on_a_rank, few, tmp_path)], 2)
    history, notes = first.value
    assert decided(second.value[0]) == decided(history[-1:])
    assert (
        sum(len(record.rollbacks) for record in history)
        == sum("rolled back to the end of epoch" in note for note in notes)
        > 0
    )


# ---------- device, precision, threads
@pytest.mark.parametrize(
    ("device", "precision", "gpus", "expected"),
    [
        ("auto", "auto", 0, Compute(CPU)),
        ("auto", "fp32", 0, Compute(CPU)),
        ("cpu", "auto", 4, Compute(CPU)),
        ("auto", "auto", 1, Compute(CUDA, torch.bfloat16)),
        ("cuda", "auto", 8, Compute(CUDA, torch.bfloat16)),
        ("auto", "bf16", 1, Compute(CUDA, torch.bfloat16)),
        ("auto", "fp32", 1, Compute(CUDA)),
    ],
)
def test_device_precision_and_backend_follow_from_settings_and_gpus(
    device: Literal["auto", "cpu", "cuda"],
    precision: Literal["auto", "fp32", "bf16"],
    gpus: int,
    expected: Compute,
) -> None:
    compute = choose_compute(RuntimeSettings(device=device, precision=precision), gpus)
    assert compute == expected
    assert compute.backend == ("gloo" if compute.device == CPU else "nccl")


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_only_bf16_lets_gpus_round_float32_to_tf32(precision: Literal["auto", "fp32"]) -> None:
    """The flags are set in this process, where they concern nothing, and put back."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        set_float32_precision(choose_compute(RuntimeSettings(precision=precision), gpus=1))
        flags = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        assert flags == (("high", True) if precision == "auto" else ("highest", False))
        assert torch.backends.cuda.matmul.allow_tf32 == (precision == "auto")
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize(
    ("override", "gpus", "says"),
    [
        (
            "runtime.device=cuda",
            0,
            "runtime.device: cuda requires a GPU, but none is usable here; choose cpu or auto",
        ),
        (
            "runtime.precision=bf16",
            0,
            "runtime.precision: bf16 needs a GPU, and none is used here; choose fp32 or auto",
        ),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(override: str, gpus: int, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_compute(tiny("runtime.device=auto", override).runtime, gpus)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_compute_for_sets_up_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        compute = compute_for(tiny("runtime.device=auto", "runtime.threads=2").runtime)
        assert torch.get_num_threads() == 2
        assert compute.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
        compute_for(tiny("runtime.threads=null").runtime)
        assert torch.get_num_threads() == usable_cores()
        compute_for(tiny().runtime)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
def test_a_gpu_computes_in_bfloat16_unless_told_otherwise() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, none is usable here")
    auto = "runtime.device=auto"
    assert compute_for(tiny(auto).runtime).autocast_dtype is torch.bfloat16
    assert compute_for(tiny(auto, "runtime.precision=fp32").runtime).autocast_dtype is None
    assert compute_for(tiny("runtime.device=cpu").runtime).device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("job", ["search", "retrain"])
def test_the_same_loop_runs_on_a_gpu(few: ImageDataset, tmp_path: Path, job: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, none is usable here")
    watcher = Watcher()
    history = (search if job == "search" else retrain)(tiny("runtime.device=cuda"), few, tmp_path, watcher)
    losses = [record.metrics["train/loss"] for record in history]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
    assert any("cuda" in text for text in watcher.notes)


@pytest.mark.parametrize("job", ["search", "retrain"])
def test_a_job_says_where_it_runs_before_it_starts(few: ImageDataset, tmp_path: Path, job: str) -> None:
    watcher = Watcher()
    (search if job == "search" else retrain)(tiny(f"{job}.epochs=1"), few, tmp_path, watcher)
    place = f"in this process, cpu, 1 thread, {count(usable_cores(), 'core')} on this machine"
    assert watcher.notes == [place] == [describe_place(Compute(CPU), Ranks())]


@pytest.mark.parametrize("on", [False, True])
def test_activation_checkpointing_reaches_every_network(few: ImageDataset, on: bool) -> None:
    setting, compute, ranks = f"runtime.activation_checkpointing={str(on).lower()}", Compute(CPU), Ranks()
    config = tiny(setting)
    one_stage = load(None, [setting, "method=one_stage", "search={init_channels: 2, layers: 3}"])
    assert config.method == "two_stage"
    assert one_stage.method == "one_stage"
    nets = (
        build_search(config, few, compute, ranks).supernet,
        build_search(one_stage, few, compute, ranks).supernet,
        build_retraining(config, GENOTYPE, few, compute)[0],
    )
    assert [net.activation_checkpointing for net in nets] == [on] * 3


def test_the_cost_is_that_of_the_retrained_network(digits: ImageDataset) -> None:
    config = load(None)
    dataset = dataclasses.replace(digits, channels=3, height=32, width=32)
    assert network_cost(config, config.retrain, dataset, PUBLISHED["ISTA_twostage"]).params == 3_316_726
    one_stage = load(None, ["method=one_stage"])
    assert network_cost(one_stage, one_stage.search, dataset, PUBLISHED["ISTA_onestage"]).params == 3_371_806
