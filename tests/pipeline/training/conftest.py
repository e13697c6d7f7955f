"""Fixtures of the tests of the training loop: the digits, and what undisturbed jobs end with."""

from typing import Any

import pytest

from istanas.data import ArrayPictures, ImageDataset, load_dataset, stratified_subset
from tests.pipeline.training.small_jobs import Watcher, result_of, with_train


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_dataset("digits")


@pytest.fixture(scope="module")
def few(digits: ImageDataset) -> ImageDataset:
    """A fifth of the digits, for tests that train."""
    chosen = stratified_subset(digits.train.labels, 300, seed=0)
    assert isinstance(digits.train, ArrayPictures)
    return with_train(digits, digits.train.images[chosen], digits.train.labels[chosen])


@pytest.fixture(scope="module")
def whole(few: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each job ends with when nothing stops it."""
    return {
        job: result_of(job, few, tmp_path_factory.mktemp(job), Watcher()) for job in ("search", "retrain")
    }
