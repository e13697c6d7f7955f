"""Registered data sets: arrays that fit no network, functions that fail, and digests that notice changes."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from istanas.data import DatasetRequest, ImageDataset, dataset_from_arrays, load_dataset, register_dataset
from istanas.data.registry import DATASETS
from istanas.errors import ConfigError, DataError, IstanasError
from istanas.registry import registering_for, unregister

PICTURES, LABELS = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
Register = Callable[..., None]


@pytest.fixture
def register() -> Iterator[Register]:
    """Register a data set named "own" that is removed after the test."""
    registered = []

    def register(load: Any, **facts: Any) -> None:
        with registering_for("own.py") as entries:
            register_dataset("own", load, **facts)
        registered.extend(entries)

    yield register
    unregister(registered)


def from_arrays(*arrays: Any) -> Callable[[DatasetRequest], ImageDataset]:
    return lambda request: dataset_from_arrays(request, *arrays)


def test_an_unknown_name_gets_the_nearest_and_all_others() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.name: 'digit' .*mean digits\?.*choose from digits, .*folder"
    ):
        load_dataset("digit")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((PICTURES.astype(float), LABELS, PICTURES, LABELS), r"train split of own .* dtype float64"),
        ((PICTURES, LABELS, PICTURES[0], LABELS), r"test split of own have the shape \(8, 8\)"),
        ((np.zeros((4, 8, 8, 4), np.uint8), LABELS, PICTURES, LABELS), r"shape \(4, 8, 8, 4\)"),
        ((np.zeros((4, 3, 8, 8), np.uint8), LABELS, PICTURES, LABELS), r"shape \(4, 3, 8, 8\)"),
        ((PICTURES, LABELS, np.zeros((4, 9, 8), np.uint8), LABELS), r"different shapes, \(1, 8, 8\) and"),
        ((PICTURES, LABELS[:3], PICTURES, LABELS), r"train split of own has 4 pictures and 3 labels"),
        ((PICTURES, LABELS / 2, PICTURES, LABELS), r"labels of the train split of own .* float64"),
        ((PICTURES, LABELS - 1, PICTURES, LABELS), r"train split of own has labels -1\.\.0"),
        ((PICTURES, LABELS, PICTURES, LABELS + 1, ["a", "b"]), r"test split of own has labels 1\.\.2 for 2"),
        ((PICTURES[:0], LABELS[:0], PICTURES, LABELS), r"train split of own has 0 pictures and 0 labels"),
    ],
)
def test_arrays_that_do_not_fit_are_one_line(
    register: Register, arrays: tuple[Any, ...], message: str
) -> None:
    register(from_arrays(*arrays))
    with pytest.raises(DataError, match=message) as caught:
        load_dataset("own")
    assert caught.value.field == "data.name"
    assert len(str(caught.value).splitlines()) == 1


def test_a_function_that_fails_is_named_with_its_reason(register: Register) -> None:
    register(lambda request: np.load("/nowhere/pictures.npy"))
    with pytest.raises(
        DataError, match=r"data\.name: the function of own failed \(FileNotFoundError: No such file"
    ) as caught:
        load_dataset("own")
    assert "own.py" in str(caught.value)


@pytest.mark.parametrize("returned", [None, PICTURES, (PICTURES, LABELS)])
def test_a_function_that_returns_something_else_is_named(register: Register, returned: Any) -> None:
    register(lambda request: returned)
    with pytest.raises(DataError, match=rf"own returned {type(returned).__name__}, not an ImageDataset"):
        load_dataset("own")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: replace(part, images=part.images.float()), "not a tensor with dtype uint8"),
        (lambda part: replace(part, images=part.images[:, 0]), r"shape \(4, 8, 8\), not \(4, 1, 8, 8\)"),
        (lambda part: replace(part, labels=part.labels.int()), "dtype int64"),
        (lambda part: replace(part, labels=part.labels + 7), r"labels 7\.\.8 for 2 classes"),
        (lambda part: replace(part, images=part.images[:0], labels=part.labels[:0]), "is empty"),
        (lambda part: None, "is NoneType, not ArrayPictures"),
    ],
)
def test_a_data_set_built_by_hand_is_checked(
    register: Register, change: Callable[[Any], Any], message: str
) -> None:
    def load(request: DatasetRequest) -> ImageDataset:
        dataset = from_arrays(PICTURES, LABELS, PICTURES, LABELS)(request)
        return replace(dataset, test=change(dataset.test))

    register(load)
    with pytest.raises(DataError, match=f"the test split of own .*{message}"):
        load_dataset("own")


def test_missing_digests_are_filled_in_and_notice_changed_pictures(register: Register) -> None:
    pictures = PICTURES.copy()

    def load(request: DatasetRequest) -> ImageDataset:
        dataset = from_arrays(PICTURES, LABELS, pictures, LABELS)(request)
        return replace(dataset, name="", digest="", train_digest="")

    register(load)
    before = load_dataset("own")
    pictures[3, 7, 7] = 1
    after = load_dataset("own")
    assert before.name == "own"
    assert before.digest != after.digest
    assert before.train_digest == after.train_digest != ""


def test_a_size_without_an_effect_is_refused(register: Register) -> None:
    register(from_arrays(PICTURES, LABELS, PICTURES, LABELS))
    with pytest.raises(ConfigError, match=r"data\.image_size: 16 has no effect on own"):
        load_dataset("own", image_size=16)


def test_a_function_that_ignores_the_size_is_noticed(register: Register) -> None:
    register(lambda request: replace(load_dataset("digits"), name="own"), resizable=True)
    with pytest.raises(
        DataError, match=r"data\.image_size: 16 has no effect: .* own returned pictures of 8x8"
    ):
        load_dataset("own", image_size=16)


def test_pictures_above_the_registered_side_are_refused(register: Register) -> None:
    register(from_arrays(PICTURES, LABELS, PICTURES, LABELS), side=7)
    with pytest.raises(DataError, match=r"own is registered with side=7, and its pictures have 8x8"):
        load_dataset("own")


def test_a_missing_root_is_refused_before_the_function_is_called(register: Register) -> None:
    register(lambda request: pytest.fail("called"), needs_root=True)
    with pytest.raises(ConfigError, match=r"data\.root: missing; name the data of own with --set data\.root"):
        load_dataset("own")


@pytest.mark.parametrize(
    ("name", "load", "facts", "message"),
    [
        ("own", None, {}, "'own' has no function that loads it, but None"),
        ("own", "load", {}, "'own' has no function"),
        ("own", print, {"side": "8"}, "'8' is not the side"),
        ("digits", print, {}, "'digits' is already registered, by istanas"),
        ("my pictures", print, {}, "'my pictures' cannot name a data set"),
    ],
)
def test_a_wrong_registration_is_refused(name: str, load: Any, facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        register_dataset(name, load, **facts)
    assert "own" not in DATASETS


def test_the_users_own_error_is_kept(register: Register) -> None:
    def load(request: DatasetRequest) -> ImageDataset:
        raise IstanasError("the scanner is off", remedy="switch it on")

    register(load)
    with pytest.raises(IstanasError, match="the scanner is off; switch it on"):
        load_dataset("own")


def test_the_registry_does_not_import_torch(repo_root: Path) -> None:
    code = "import sys; from istanas.data import DATASETS; print(len(DATASETS) > 7, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False"]
