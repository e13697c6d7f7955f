"""Splits of the pictures: disjoint, stratified, and no look at the test split (invariant 6)."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from istanas.data import ArrayPictures, ImageDataset
from istanas.errors import ConfigError
from pipeline.training.epoch_record import (
    EpochRecord,
)
from pipeline.training.loop import trained_network
from pipeline.training.pictures import open_dataset
from pipeline.training.splits import Splits, splits_of
from tests.pipeline.training.small_jobs import (
    GENOTYPE,
    Watcher,
    decided,
    retrain,
    search,
    tiny,
    weights_of,
    with_train,
)


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
