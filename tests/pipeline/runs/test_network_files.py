"""A network that is saved and loaded gives the same logits; damaged files are reported in one line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from istanas.data import ImageDataset, load_dataset
from istanas.errors import CheckpointError, IstanasError
from istanas.nets import TargetNet
from istanas.space import PUBLISHED, CellSpace, random_genotype
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.runs.layout import NETWORK_FILE, WEIGHTS_FILE
from pipeline.runs.network_files import load_network, read_card, save_network
from pipeline.training.build import build_target

GENOTYPE = PUBLISHED["ISTA_twostage"]


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_dataset("digits")


@pytest.fixture(scope="module")
def config() -> Config:
    return load(None, ["retrain.init_channels=2", "retrain.layers=3", "retrain.op_batchnorm=true", "seed=3"])


def trained(config: Config, dataset: ImageDataset) -> TargetNet:
    """A network whose running statistics have changed."""
    net = build_target(config, GENOTYPE, dataset)
    net.train()(torch.rand(4, 1, 8, 8))
    return net.eval()


def test_the_network_comes_back_without_its_auxiliary_head(
    tmp_path: Path, digits: ImageDataset, config: Config
) -> None:
    net = trained(config, digits)
    assert any(key.startswith("auxiliary_head") for key in net.state_dict())
    save_network(tmp_path, net, GENOTYPE, config.retrain, digits, config.space.build())
    again, example = load_network(tmp_path)
    assert not again.training
    assert example.shape == (2, 1, 8, 8)
    assert not any(key.startswith("auxiliary_head") for key in again.state_dict())
    pictures = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(pictures), net(pictures))


def test_the_card_says_how_to_feed_it(tmp_path: Path, digits: ImageDataset, config: Config) -> None:
    save_network(tmp_path, trained(config, digits), GENOTYPE, config.retrain, digits, config.space.build())
    card = json.loads((tmp_path / NETWORK_FILE).read_text())
    steps = card["preprocessing"]
    assert (steps["shape"], steps["resize"], steps["channel_order"]) == ([1, 8, 8], "none", "grey")
    assert (steps["mean"], steps["std"], steps["value_range"]) == (
        list(digits.mean),
        list(digits.std),
        [0, 1],
    )
    assert card["class_names"] == list("0123456789")
    assert (card["init_channels"], card["layers"], card["op_batchnorm"]) == (2, 3, True)


def test_a_card_of_version_0_1_is_read(tmp_path: Path, digits: ImageDataset, config: Config) -> None:
    save_network(tmp_path, trained(config, digits), GENOTYPE, config.retrain, digits, config.space.build())
    card = read_card(tmp_path)
    content = json.loads((tmp_path / NETWORK_FILE).read_text())
    steps = content.pop("preprocessing")
    flat = {key: steps[key] for key in ("shape", "mean", "std", "background", "bits")}
    (tmp_path / NETWORK_FILE).write_text(json.dumps({**content, **flat}))
    assert read_card(tmp_path) == card
    large = {**content, **flat, "shape": [1, 224, 224]}
    (tmp_path / NETWORK_FILE).write_text(json.dumps(large))
    assert read_card(tmp_path).preprocessing.resize == "resize_and_crop"


def test_other_cells_do_not_fit_the_weights(tmp_path: Path, digits: ImageDataset, config: Config) -> None:
    save_network(tmp_path, trained(config, digits), GENOTYPE, config.retrain, digits, config.space.build())
    card = json.loads((tmp_path / NETWORK_FILE).read_text())
    card["genotype"] = random_genotype(0, CellSpace()).to_json()
    (tmp_path / NETWORK_FILE).write_text(json.dumps(card))
    with pytest.raises(CheckpointError) as caught:
        load_network(tmp_path)
    assert_one_line(caught.value, tmp_path)


def assert_one_line(error: IstanasError, folder: Path) -> None:
    assert re.fullmatch(re.escape(f"{folder}: ") + r".*; train it again, or copy the run again", str(error))


@pytest.mark.parametrize("name", [NETWORK_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"genotype": 1}', b"\xff\x00" * 50], ids=str)
def test_a_missing_or_broken_file_is_one_line(
    tmp_path: Path, digits: ImageDataset, config: Config, name: str, content: bytes | None
) -> None:
    save_network(tmp_path, trained(config, digits), GENOTYPE, config.retrain, digits, config.space.build())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_network(tmp_path)
    assert_one_line(caught.value, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"class_names": list("abcdefg")},
        {"class_names": ["a"] * 10},
        {"preprocessing": {"std": [0.0]}},
        {"preprocessing": {"mean": [0.5, 0.5]}},
        {"preprocessing": {"shape": [1, -8, 8]}},
        {"preprocessing": {"bits": 99}},
    ],
    ids=str,
)
def test_a_card_that_contradicts_itself_is_one_line(
    tmp_path: Path, digits: ImageDataset, config: Config, changes: dict[str, Any]
) -> None:
    save_network(tmp_path, trained(config, digits), GENOTYPE, config.retrain, digits, config.space.build())
    card = json.loads((tmp_path / NETWORK_FILE).read_text())
    steps = {**card["preprocessing"], **changes.pop("preprocessing", {})}
    (tmp_path / NETWORK_FILE).write_text(json.dumps({**card, **changes, "preprocessing": steps}))
    for read in (load_network, read_card):
        with pytest.raises(CheckpointError) as caught:
            read(tmp_path)
        assert_one_line(caught.value, tmp_path)


def test_weights_are_plain_tensors(tmp_path: Path, digits: ImageDataset, config: Config) -> None:
    net = trained(config, digits).to(memory_format=torch.channels_last)
    save_network(tmp_path, net, GENOTYPE, config.retrain, digits, config.space.build())
    weights = safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("auxiliary_head")}
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[key], value) for key, value in state.items())
