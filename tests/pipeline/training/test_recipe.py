"""The settings of a recent recipe: mixed batches, RandAugment, random erasing, averaged weights, torch.compile."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from istanas.data import ArrayPictures, Augmentation, ImageDataset, load_dataset, stratified_subset
from istanas.distributed import Ranks
from istanas.errors import ConfigError
from istanas.space import CellSpace, random_genotype
from istanas.training import Compute, evaluate, train_target_epoch
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.training.build import build_target, ema_model
from pipeline.training.compute import compiled
from pipeline.training.epoch_record import EpochRecord, FolderStore, load_latest, read_records
from pipeline.training.loop import retrain_worker, trained_network
from pipeline.training.pictures import Batches, retrain_augmentation, search_augmentation
from tests.pipeline.training.small_jobs import Nobody, Watcher, decided, weights_of, with_train
from tests.ranks import run_ranks

CPU = Compute(torch.device("cpu"))
GENOTYPE = random_genotype(1, CellSpace(n_nodes=2))
RECIPE = {
    "rand_augment": "9",
    "random_erasing": "0.5",
    "mixup": "0.2",
    "cutmix": "1.0",
    "ema_decay": "0.5",
}


def tiny(*overrides: str, **recipe: str) -> Config:
    retrain = (
        "retrain={epochs: 2, batch_size: 32, init_channels: 2, layers: 2, auxiliary_weight: 0, cutout: 0}"
    )
    return load(
        None,
        [
            "space.nodes=2",
            retrain,
            "runtime={threads: 1, device: cpu}",
            *overrides,
            *(f"retrain.{key}={value}" for key, value in recipe.items()),
        ],
    )


@pytest.fixture(scope="module")
def few() -> ImageDataset:
    digits = load_dataset("digits")
    chosen = stratified_subset(digits.train.labels, 80, seed=0)
    assert isinstance(digits.train, ArrayPictures)
    return with_train(digits, digits.train.images[chosen], digits.train.labels[chosen])


def train(config: Config, dataset: ImageDataset, folder: Path, watcher: Any = None) -> list[EpochRecord]:
    done = retrain_worker(config, dataset, FolderStore(folder), watcher or Watcher(), GENOTYPE)
    return list(read_records(folder, done))


def digest(config: Config, dataset: ImageDataset, folder: Path) -> str:
    return weights_of(trained_network(config, GENOTYPE, dataset, folder))


@pytest.mark.slow
def test_each_setting_of_the_recipe_changes_the_training(few: ImageDataset, tmp_path: Path) -> None:
    digests = {}
    for name, recipe in (("plain", {}), *((key, {key: value}) for key, value in RECIPE.items())):
        config = tiny("retrain.epochs=1", "retrain.test_every=0", **recipe)
        train(config, few, tmp_path / name)
        digests[name] = digest(config, few, tmp_path / name)
    assert len(set(digests.values())) == len(digests)


def test_a_stopped_run_with_the_recipe_ends_with_the_same_bits(few: ImageDataset, tmp_path: Path) -> None:
    config = tiny(**RECIPE)
    whole = train(config, few, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config, few, tmp_path / "stopped", Watcher(stop_at=(1, 2)))
    resumed = train(config, few, tmp_path / "stopped")
    assert decided(resumed) == decided(whole)
    states = [load_latest(tmp_path / name).state for name in ("whole", "stopped")]  # type: ignore[union-attr]
    assert set(states[0]["ema"]) == set(states[1]["ema"])
    for key in ("net", "ema"):
        assert all(torch.equal(value, states[1][key][name]) for name, value in states[0][key].items())


def on_a_rank(config: Config, dataset: ImageDataset, folder: Path, leave_after: tuple[int, ...]) -> str:
    """Train on this rank; returns the digest of the averaged weights of rank 0's last checkpoint."""
    if Ranks.current(CPU.device).rank > 0:
        nobody: Any = Nobody()
        retrain_worker(config, dataset, nobody, nobody, GENOTYPE)
        return ""
    train(config, dataset, folder, Watcher(leave_after=leave_after))
    return "" if leave_after else digest(config, dataset, folder)


@pytest.mark.slow
def test_two_ranks_resume_the_recipe_with_the_same_bits(few: ImageDataset, tmp_path: Path) -> None:
    parts = (("whole", ()), ("parts", (1,)), ("parts", ()))
    calls = [partial(on_a_rank, tiny(**RECIPE), few, tmp_path / name, leave) for name, leave in parts]
    whole, _, resumed = (outcomes[0].value for outcomes in run_ranks(calls, 2))
    assert whole == resumed != ""


def test_the_averaged_weights_are_measured_and_exported(few: ImageDataset, tmp_path: Path) -> None:
    config = tiny(ema_decay="0.75")
    history = train(config, few, tmp_path)
    net = trained_network(config, GENOTYPE, few, tmp_path)
    found = load_latest(tmp_path)
    assert found is not None
    last = found.state["net"]
    assert any(not torch.equal(value, last[name]) for name, value in net.state_dict().items())
    batches = Batches(config, few, CPU, Ranks(), 32, Augmentation()).measuring("test", None)
    assert history[-1].metrics["test/loss"] == evaluate(net, batches, CPU).loss


def test_the_average_is_exponential_over_weights_and_statistics() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    average = ema_model(net, 0.75)  # type: ignore[arg-type]
    wanted: dict[str, torch.Tensor] = {}
    for step in range(4):
        with torch.no_grad():
            net[0].weight.normal_()
        net(torch.randn(8, 2))
        average.update_parameters(net)
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                wanted[name] = value.clone() if step == 0 else 0.75 * wanted[name] + 0.25 * value
    for name, value in wanted.items():
        torch.testing.assert_close(average.module.state_dict()[name], value)


def test_only_a_retraining_has_the_augmentation_of_the_recipe() -> None:
    config = tiny("data.horizontal_flip=true", "search.cutout=3", color_jitter="false", **RECIPE)
    assert search_augmentation(config) == Augmentation(horizontal_flip=True, cutout=3)
    assert retrain_augmentation(config) == Augmentation(
        horizontal_flip=True, color_jitter=False, rand_augment=9, random_erasing=0.5
    )


@pytest.mark.parametrize("value", ["31", "-1"])
def test_an_impossible_magnitude_is_one_line(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(rand_augment=value)
    assert "retrain.rand_augment: " in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------- torch.compile
@pytest.mark.slow
def test_a_traced_network_has_the_same_losses(few: ImageDataset) -> None:
    """The network is one graph for torch.compile. `python -m tests.benchmarks --only compile` also generates C++."""
    losses = []
    for backend in (None, "aot_eager"):
        net = build_target(tiny(layers="1"), GENOTYPE, few).train()
        forward = net.forward_with_auxiliary
        if backend is not None:
            forward = torch.compile(forward, backend=backend, fullgraph=True)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        batches = Batches(tiny(), few, CPU, Ranks(), 40, Augmentation()).measuring("train", torch.arange(80))
        losses += [
            train_target_epoch(
                net,
                optimizer,
                batches,
                CPU,
                lr_at=lambda step: 0.1,
                auxiliary_weight=0,
                label_smoothing=0,
                grad_clip=5.0,
                forward=forward,
            ).loss
        ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.slow
def test_a_rising_drop_path_is_not_compiled_in_each_epoch(few: ImageDataset) -> None:
    """torch compiles eight graphs at most; the epochs after them would not be compiled."""
    net = build_target(tiny(layers="1"), GENOTYPE, few).train()
    counter = CompileCounter()
    forward = torch.compile(net.forward_with_auxiliary, backend=counter, fullgraph=True)
    dropped = []
    for epoch in range(5):
        net.drop_path_prob = 0.15 * epoch
        outputs = [forward(torch.ones(4, 1, 8, 8))[0] for _ in range(4)]
        dropped += [any(not torch.equal(each, outputs[0]) for each in outputs)]
    assert counter.frame_count == 2  # without drop path and with it
    assert dropped == [False, True, True, True, True]


def test_compilation_without_a_compiler_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"^runtime\.compile: .* install g\+\+, or set it to false$"):
        compiled(tiny("runtime.compile=true").runtime, CPU, lambda: None)
    assert compiled(tiny().runtime, CPU, len) is len
