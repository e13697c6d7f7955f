"""What a worker does with pictures: disjoint stratified splits, no look at the test split, exact resumption."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from istanas.data import ArrayPictures, ImageDataset, load_dataset, stratified_subset
from istanas.errors import CheckpointError, ConfigError, IstanasError
from istanas.space import PUBLISHED, CellSpace, Genotype, random_genotype
from istanas.training import Totals
from pipeline.config import Config, load
from pipeline.worker import (
    Record,
    compute_for,
    genotype_cost,
    holdout_indices,
    open_dataset,
    retrain_worker,
    search_split,
    search_worker,
    threads_for,
    training_indices,
)

TINY = [
    "space.nodes=2",
    "search={epochs: 2, batch_size: 64, init_channels: 2, layers: 3}",
    "retrain={epochs: 2, batch_size: 64, init_channels: 2, layers: 2, auxiliary_weight: 0.4, cutout: 2}",
    "data.crop_padding=1",
    "runtime={threads: 1, device: cpu}",
]
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
    """An observer that remembers, and may stop the job after an epoch or in the middle of one."""

    def __init__(self, stop_at: tuple[int, int] | None = None) -> None:
        self.stop_at = stop_at
        self.history: list[Record] = []
        self.resumed_with: list[int] = []
        self.steps: list[tuple[int, int, int]] = []
        self.counts: dict[int, int] = {}

    def resumed(self, history: list[Record]) -> None:
        self.resumed_with.append(len(history))

    def step(self, epoch: int, step: int, n_steps: int, totals: Totals) -> None:
        self.steps.append((epoch, step, n_steps))
        self.counts[epoch] = totals.metrics().count
        if (epoch, step) == self.stop_at:
            raise KeyboardInterrupt

    def epoch_done(self, history: list[Record]) -> None:
        self.history = list(history)


def decided(history: list[Record]) -> list[Record]:
    """Records without what the clock decides."""
    timed = ("timestamp_ms", "seconds")
    return [
        {
            **{key: value for key, value in record.items() if key not in timed},
            "metrics": {k: v for k, v in record["metrics"].items() if k != "images_per_second"},
        }
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
def test_the_parts_of_a_search_are_disjoint_stratified_and_leave_the_holdout_alone(
    digits: ImageDataset, holdout: float, max_pictures: int | None, alpha_fraction: float
) -> None:
    limit = "null" if max_pictures is None else max_pictures
    config = tiny(
        f"data.holdout={holdout}", f"search.max_pictures={limit}", f"search.alpha_fraction={alpha_fraction}"
    )
    split, kept = search_split(config, digits), holdout_indices(config, digits)
    parts = [split.weights, split.alphas] + ([] if kept is None else [kept])
    everything = torch.cat(parts)
    assert len(everything.unique()) == len(everything), "a picture is in two parts"
    n = len(digits.train)
    total = n - round(holdout * n) if max_pictures is None else max_pictures
    assert len(split.weights) + len(split.alphas) == total
    assert len(split.alphas) == round(alpha_fraction * total)
    share = class_counts(digits, torch.arange(n)) / n
    for part in parts:
        # Up to three draws, each within one picture a class.
        assert (class_counts(digits, part) - share * len(part)).abs().max() <= 3
    if kept is not None:
        assert len(kept) == round(holdout * n)
        trainable = training_indices(config, digits)
        assert torch.equal(torch.cat([trainable, kept]).sort().values, torch.arange(n))
        assert torch.isin(torch.cat([split.weights, split.alphas]), trainable).all()


def test_without_a_holdout_retraining_may_use_every_training_picture(digits: ImageDataset) -> None:
    assert torch.equal(training_indices(tiny(), digits), torch.arange(len(digits.train)))
    assert holdout_indices(tiny(), digits) is None


def test_splits_follow_from_the_seed(digits: ImageDataset) -> None:
    one, same, other = (search_split(tiny(f"seed={s}", "search.max_pictures=500"), digits) for s in (0, 0, 1))
    assert torch.equal(one.weights, same.weights)
    assert torch.equal(one.alphas, same.alphas)
    assert not torch.equal(one.weights, other.weights)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["search.max_pictures=2000"], "search.max_pictures is 2000, above the 1438"),
        (["search.max_pictures=1438", "data.holdout=0.1"], "search.max_pictures is 1438, above the 1294"),
        (["search.alpha_fraction=1e-9"], "search.alpha_fraction is 1e-09"),
    ],
)
def test_a_split_that_cannot_be_is_refused(digits: ImageDataset, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        search_split(tiny(*overrides), digits)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_do_not_fit_the_pictures_are_refused_before_any_work() -> None:
    with pytest.raises(ConfigError, match=r"retrain\.cutout is 9, above the pictures' side of 8: lower it"):
        open_dataset(tiny("retrain.cutout=9"), ("search", "retrain"))
    assert open_dataset(tiny("retrain.cutout=9"), ("search",)).height == 8
    assert open_dataset(tiny("data.image_size=16", "retrain.cutout=9"), ("retrain",)).height == 16


# ---------- invariant 6
def test_a_search_never_looks_at_the_test_split(few: ImageDataset, tmp_path: Path) -> None:
    blind = dataclasses.replace(few, test=Untouchable())  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="test split"):
        len(blind.test)
    history = search_worker(tiny(), blind, tmp_path / "blind", Watcher())
    seeing = search_worker(tiny(), few, tmp_path / "seeing", Watcher())
    assert decided(history) == decided(seeing)
    assert not any(name.startswith("test/") for record in history for name in record["metrics"])


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
        net, history = retrain_worker(tiny(), GENOTYPE, dataset, tmp_path / name, Watcher())
        nets.append(weights_of(net))
        tops.append(history[-1]["metrics"]["test/top1"])
    assert nets[0] == nets[1]
    assert tops[0] != tops[1]


@pytest.mark.parametrize("job", ["search", "retrain"])
def test_holdout_pictures_are_never_trained_on(few: ImageDataset, tmp_path: Path, job: str) -> None:
    config = tiny("data.holdout=0.2", f"{job}.epochs=1")
    kept = holdout_indices(config, few)
    assert kept is not None
    assert isinstance(few.train, ArrayPictures)

    def result(name: str, changed: torch.Tensor) -> tuple[Any, Record]:
        images = few.train.images.clone()  # type: ignore[union-attr]
        images[changed] = 255 - images[changed]
        dataset = with_train(few, images, few.train.labels)
        if job == "search":
            history = search_worker(config, dataset, tmp_path / name, Watcher())
            return decided(history), history[-1]
        net, history = retrain_worker(config, GENOTYPE, dataset, tmp_path / name, Watcher())
        return weights_of(net), history[-1]

    nothing = torch.tensor([], dtype=torch.int64)
    plain, plain_record = result("plain", nothing)
    changed, changed_record = result("kept", kept)
    assert plain == changed
    one_trained = training_indices(config, few)[:1]
    assert plain != result("trained", one_trained)[0], "a training picture has no influence"
    if job == "retrain":  # the hold-out is what is measured
        assert plain_record["metrics"]["valid/loss"] != changed_record["metrics"]["valid/loss"]


def test_retraining_takes_every_training_picture_once_an_epoch(few: ImageDataset, tmp_path: Path) -> None:
    watcher = Watcher()
    retrain_worker(tiny(), GENOTYPE, few, tmp_path, watcher)
    assert watcher.counts == {0: 300, 1: 300}
    assert watcher.steps == [(epoch, step, 5) for epoch in (0, 1) for step in range(1, 6)]


def test_a_last_batch_of_one_picture_is_left_out_because_batch_norm_needs_two(
    few: ImageDataset, tmp_path: Path
) -> None:
    watcher = Watcher()
    config = tiny("retrain.batch_size=299", "retrain.epochs=1")
    retrain_worker(config, GENOTYPE, few, tmp_path, watcher)
    assert watcher.counts == {0: 299}


# ---------- records
def test_a_search_record_has_the_metrics_and_nodes_of_an_epoch(few: ImageDataset, tmp_path: Path) -> None:
    config = tiny()
    history = search_worker(config, few, tmp_path, Watcher())
    assert [record["epoch"] for record in history] == [1, 2]
    for record in history:
        assert record["metrics"].keys() == {
            "train/loss",
            "train/top1",
            "valid/loss",
            "valid/top1",
            "recovery/gap",
            "recovery/truncation",
            "recovery/distance",
            "recovery/support_changes",
            "arch/skip_ratio",
            "arch/frozen_nodes",
            "target/params",
            "target/macs",
            "images_per_second",
        }
        assert 0 <= record["metrics"]["train/top1"] <= 1
        assert record["metrics"]["recovery/gap"] <= 1e-9
        assert [(n["cell"], n["node"]) for n in record["nodes"]] == [
            (cell, node) for cell in ("normal", "reduce") for node in (0, 1)
        ]
    # What an epoch trains is what the recovery before it has found.
    assert history[1]["trained_genotype"] == history[0]["genotype"]
    cost = genotype_cost(config, few, Genotype.from_json(history[-1]["genotype"]))
    assert {name: history[-1]["metrics"][name] for name in cost} == cost


def test_retraining_measures_the_test_split_as_often_as_asked_and_at_the_end(
    few: ImageDataset, tmp_path: Path
) -> None:
    config = tiny("retrain.epochs=3", "retrain.test_every=2")
    _, history = retrain_worker(config, GENOTYPE, few, tmp_path, Watcher())
    assert ["test/top1" in record["metrics"] for record in history] == [False, True, True]


def test_a_search_stops_when_the_codes_no_longer_move(few: ImageDataset, tmp_path: Path) -> None:
    still = tiny("search.epochs=4", "search.arch_lr=1e-9", "search.termination_tol=1e-3")
    history = search_worker(still, few, tmp_path / "still", Watcher())
    assert len(history) == 1
    assert history[-1]["converged"]
    watcher = Watcher()
    assert decided(search_worker(still, few, tmp_path / "still", watcher)) == decided(history)
    assert watcher.steps == [], "a converged search was trained on"
    moving = tiny("search.epochs=2", "search.arch_lr=0.1", "search.termination_tol=1e-6")
    assert len(search_worker(moving, few, tmp_path / "moving", Watcher())) == 2


# ---------- resumption, in one process (kills of whole processes: tests/integration/test_resume.py)
@pytest.mark.parametrize("stop_at", [(0, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("job", ["search", "retrain"])
def test_a_job_stopped_in_an_epoch_goes_on_as_if_it_had_not_been(
    few: ImageDataset, tmp_path: Path, job: str, stop_at: tuple[int, int]
) -> None:
    config = tiny(f"{job}.epochs=3", "search.max_pictures=300", "search.arch_lr=0.1", "search.batch_size=32")

    def start(folder: Path, watcher: Watcher) -> tuple[list[Record], str]:
        if job == "search":
            history = search_worker(config, few, folder, watcher)
            return decided(history), history[-1]["genotype"]
        net, history = retrain_worker(config, GENOTYPE, few, folder, watcher)
        return decided(history), weights_of(net)

    whole = start(tmp_path / "whole", Watcher())
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "stopped", Watcher(stop_at))
    watcher = Watcher()
    assert start(tmp_path / "stopped", watcher) == whole
    assert watcher.resumed_with == [stop_at[0]]
    assert watcher.steps[0][:2] == (stop_at[0], 1)
    if job == "search":
        assert sum(r["metrics"]["recovery/support_changes"] for r in whole[0]) > 0, "no change to be lost"


def test_checkpoints_of_another_job_or_genotype_are_refused(few: ImageDataset, tmp_path: Path) -> None:
    config = tiny("retrain.epochs=1", "search.epochs=1")
    retrain_worker(config, GENOTYPE, few, tmp_path, Watcher())
    other = random_genotype(2, CellSpace(n_nodes=2))
    with pytest.raises(CheckpointError, match="not of this genotype's retraining, use --fresh"):
        retrain_worker(config, other, few, tmp_path, Watcher())


@pytest.mark.parametrize("job", ["search", "retrain"])
def test_a_diverged_epoch_stops_the_job_and_leaves_no_checkpoint(
    few: ImageDataset, tmp_path: Path, job: str
) -> None:
    config = tiny(f"{job}.lr=1e30", f"{job}.grad_clip=null")
    start: Callable[[], object] = (
        (lambda: search_worker(config, few, tmp_path, Watcher()))
        if job == "search"
        else (lambda: retrain_worker(config, GENOTYPE, few, tmp_path, Watcher()))
    )
    with pytest.raises(IstanasError, match="the run diverged, lower the learning rate") as caught:
        start()
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("epoch-*"))


# ---------- device, precision, threads
def test_device_and_precision_on_a_machine_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    auto = compute_for(tiny("runtime.device=auto").runtime)
    assert auto.device.type == "cpu"
    assert auto.autocast_dtype is None
    for override, field in (
        ("runtime.device=cuda", "runtime.device"),
        ("runtime.precision=bf16", "runtime.precision"),
    ):
        with pytest.raises(ConfigError, match=f"{field} is .*: choose") as caught:
            compute_for(tiny("runtime.device=auto", override).runtime)
        assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_a_gpu_computes_in_bfloat16_unless_told_otherwise() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, none is usable here")
    auto = "runtime.device=auto"
    assert compute_for(tiny(auto).runtime).autocast_dtype is torch.bfloat16
    assert compute_for(tiny(auto, "runtime.precision=fp32").runtime).autocast_dtype is None
    assert compute_for(tiny("runtime.device=cpu").runtime).device.type == "cpu"


def test_threads_are_as_set() -> None:
    assert threads_for(load(None, ["runtime.threads=3"]).runtime) == 3
    assert threads_for(load(None).runtime) >= 1
    compute_for(tiny().runtime)
    assert torch.get_num_threads() == 1


def test_the_cost_is_that_of_the_retrained_network(digits: ImageDataset) -> None:
    config = load(None)
    dataset = dataclasses.replace(digits, channels=3, height=32, width=32)
    assert genotype_cost(config, dataset, PUBLISHED["ISTA_twostage"])["target/params"] == 3316726
