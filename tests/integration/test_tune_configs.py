"""Every file under tune_configs is valid, has its launch command, and has the published settings."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from istanas.data import load_dataset
from istanas.errors import ConfigError
from pipeline.cli.commands import cli
from pipeline.config.load import default_file, load
from pipeline.config.schema import RuntimeSettings
from pipeline.sweeps.space import check_space
from pipeline.tracking.references import genotype_to_train
from pipeline.training.build import network_cost
from pipeline.training.compute import choose_compute
from pipeline.training.epochs import retraining_rate

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tune_configs").rglob("*.y*ml"))

PUBLISHED = {
    "two_stage_cifar10": {
        "method": "two_stage",
        "data": {"name": "cifar10"},
        "space": {
            "nodes": 4,
            "sparsity": 2,
            "one_op_per_edge": False,
            "n_measurements": 7,
            "matrix": "uniform",
            "l1_weight": 1e-5,
        },
        "search": {
            "epochs": 50,
            "batch_size": 256,
            "init_channels": 16,
            "layers": 8,
            "stem": "cifar",
            "lr": 0.1,
            "momentum": 0.9,
            "arch_lr": 6e-4,
            "arch_betas": [0.5, 0.999],
            "arch_weight_decay": 1e-3,
            "max_pictures": None,
            "alpha_fraction": 0.5,
        },
    },
    "darts_cifar10": {
        "method": "darts",
        "data": {"name": "cifar10", "crop_padding": 4, "horizontal_flip": True},
        "space": {"nodes": 4, "sparsity": 2},
        "search": {
            "epochs": 50,
            "batch_size": 64,
            "init_channels": 16,
            "layers": 8,
            "stem": "cifar",
            "lr": 0.025,
            "lr_min": 0.001,
            "momentum": 0.9,
            "weight_decay": 3e-4,
            "grad_clip": 5.0,
            "arch_lr": 3e-4,
            "arch_betas": [0.5, 0.999],
            "arch_weight_decay": 1e-3,
            "alpha_fraction": 0.5,
            "cutout": 0,
            "second_order": False,
        },
    },
    "pc_darts_cifar10": {
        "method": "pc_darts",
        "data": {"name": "cifar10", "crop_padding": 4, "horizontal_flip": True},
        "space": {"nodes": 4, "sparsity": 2},
        "search": {
            "epochs": 50,
            "batch_size": 256,
            "init_channels": 16,
            "layers": 8,
            "stem": "cifar",
            "lr": 0.1,
            "lr_min": 0.0,
            "momentum": 0.9,
            "weight_decay": 3e-4,
            "grad_clip": 5.0,
            "arch_lr": 6e-4,
            "arch_betas": [0.5, 0.999],
            "arch_weight_decay": 1e-3,
            "alpha_fraction": 0.5,
            "cutout": 0,
            "warmup_epochs": 15,
            "partial": 4,
        },
    },
    "gdas_cifar10": {
        "method": "gdas",
        "data": {"name": "cifar10"},
        "search": {
            "epochs": 240,
            "batch_size": 64,
            "init_channels": 16,
            "layers": 8,
            "lr": 0.025,
            "lr_min": 0.001,
            "momentum": 0.9,
            "weight_decay": 3e-4,
            "grad_clip": 5.0,
            "arch_lr": 3e-4,
            "arch_betas": [0.5, 0.999],
            "arch_weight_decay": 1e-3,
            "tau_max": 10.0,
            "tau_min": 0.1,
            "alpha_fraction": 0.5,
        },
    },
    "random_nas_cifar10": {
        "method": "random_nas",
        "data": {"name": "cifar10"},
        "space": {"nodes": 4, "sparsity": 2, "one_op_per_edge": True},
        "search": {
            "epochs": 100,
            "batch_size": 64,
            "init_channels": 16,
            "layers": 8,
            "lr": 0.025,
            "lr_min": 0.001,
            "momentum": 0.9,
            "weight_decay": 3e-4,
            "candidates": 1000,
            "candidate_pictures": 640,
            "finalists": 10,
            "statistics": "running",
        },
    },
    "retrain_cifar10": {
        "data": {"name": "cifar10"},
        "retrain": {
            "epochs": 600,
            "batch_size": 96,
            "init_channels": 36,
            "layers": 20,
            "stem": "cifar",
            "lr": 0.025,
            "schedule": "cosine",
            "auxiliary_weight": 0.4,
            "drop_path": 0.2,
            "cutout": 16,
            "grad_clip": 5.0,
            "weight_decay": 3e-4,
        },
    },
    "nas_bench_201_cifar10": {
        "method": "two_stage",
        "data": {"name": "cifar10", "crop_padding": 4, "horizontal_flip": True},
        "space": {"name": "nas_bench_201"},
        "search": {"init_channels": 16, "layers": 17},
        "retrain": {
            "epochs": 200,
            "batch_size": 256,
            "init_channels": 16,
            "layers": 17,
            "stem": "cifar",
            "lr": 0.1,
            "lr_min": 0.0,
            "schedule": "cosine",
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 5e-4,
            "grad_clip": None,
            "auxiliary_weight": 0.0,
            "drop_path": 0.0,
            "cutout": 0,
        },
    },
    "one_stage_cifar10": {
        "method": "one_stage",
        "data": {"name": "cifar10"},
        "space": {"nodes": 4, "sparsity": 2, "n_measurements": 7, "matrix": "uniform", "l1_weight": 1e-5},
        "search": {
            "max_search_epochs": 600,
            "train_epochs": 600,
            "termination_tol": 1e-3,
            "max_params": 3_700_000,
            "batch_size": 96,
            "init_channels": 36,
            "layers": 20,
            "stem": "cifar",
            "lr": 0.025,
            "lr_min": 0.001,
            "schedule": "cosine",
            "momentum": 0.9,
            "arch_lr": 3e-4,
            "auxiliary_weight": 0.4,
            "drop_path": 0.2,
            "cutout": 16,
        },
    },
    "retrain_one_stage_cifar10": {
        "retrain": {"op_batchnorm": True, "epochs": 600, "init_channels": 36, "layers": 20},
    },
    "retrain_imagenet": {
        "retrain": {
            "epochs": 250,
            "batch_size": 1024,
            "init_channels": 48,
            "layers": 14,
            "stem": "imagenet",
            "lr": 0.5,
            "schedule": "linear_by_epoch",
            "warmup_epochs": 5,
            "label_smoothing": 0.1,
            "weight_decay": 3e-5,
            "drop_path": 0.0,
            "auxiliary_weight": 0.4,
        },
    },
    "one_stage_imagenet": {
        "method": "one_stage",
        "search": {
            "max_params": None,
            "max_macs": 630_000_000,
            "stem": "imagenet",
            "batch_size": 1024,
            "init_channels": 48,
            "layers": 14,
            "schedule": "linear_by_epoch",
            "warmup_epochs": 5,
            "label_smoothing": 0.1,
        },
    },
}


def test_the_number_of_files() -> None:
    """The number is explicit, so that a file which is not found fails the test."""
    assert len(FILES) == 30


@pytest.mark.parametrize("file", FILES)
def test_it_is_valid_and_opens_with_its_own_launch_command(file: str) -> None:
    text = (ROOT / file).read_text()
    config = load(ROOT / file)
    comment = "\n".join(re.match(r"(#.*\n)+", text).group().splitlines())  # type: ignore[union-attr]
    commands = re.findall(r"^#\s+istanas (\w+) (.*)$", comment, flags=re.MULTILINE)
    assert len(commands) >= 2, "a launch command and one with an override"
    for command, arguments in commands:
        assert command in cli.commands
        assert f"--config {file}" in arguments
    assert (config.sweep is not None) == Path(file).name.startswith(("sweep_", "pareto_"))
    if config.sweep is not None:
        check_space(config)
    overrides = re.findall(r"--set (\S+=\S+)", comment)
    assert overrides
    changed = load(ROOT / file, overrides)
    assert changed != config


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_settings_are_as_published(name: str) -> None:
    config = load(ROOT / "tune_configs" / f"{name}.yaml").model_dump()
    for section, wanted in PUBLISHED[name].items():
        if isinstance(wanted, dict):
            assert {key: config[section][key] for key in wanted} == wanted
        else:
            assert config[section] == wanted


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_compute_in_float32(name: str) -> None:
    """Also on a GPU, where other configurations compute in bf16 and TF32."""
    config = load(ROOT / "tune_configs" / f"{name}.yaml")
    assert choose_compute(config.runtime, gpus=1).autocast_dtype is None
    assert choose_compute(RuntimeSettings(), gpus=1).autocast_dtype is torch.bfloat16


def test_learning_rates_of_the_published_imagenet_retraining() -> None:
    """All 250 epochs follow the published rule: base 0.5, warm-up of 5 epochs, small rates in the last 5."""
    r = load(ROOT / "tune_configs" / "retrain_imagenet.yaml").retrain
    rates = [retraining_rate(r, epoch) for epoch in range(r.epochs)]
    warm = [0.1, 0.2, 0.3, 0.4, 0.5]
    falling = [0.5 * (245 - epoch) / 245 for epoch in range(5, 245)]
    tail = [0.5 * left / 1225 for left in (5, 4, 3, 2, 1)]
    assert rates == pytest.approx([*warm, *falling, *tail], rel=1e-12)
    pinned = {0: 0.1, 4: 0.5, 5: 0.489796, 125: 0.244898, 244: 0.002041, 245: 0.002041, 249: 0.000408}
    assert {epoch: round(rates[epoch], 6) for epoch in pinned} == pinned
    # All steps of an epoch have the same rate.
    assert [retraining_rate(r, epoch + 0.999) for epoch in range(r.epochs)] == rates


@pytest.mark.parametrize(
    ("file", "cell", "params"),
    [
        ("retrain_cifar10", "ISTA_twostage", 3_316_726),
        ("retrain_one_stage_cifar10", "ISTA_onestage", 3_371_806),
        ("nas_bench_201_cifar10", "nas_bench_201:1462", 1_531_546),
    ],
)
def test_the_published_cells_are_built_at_their_published_size(file: str, cell: str, params: int) -> None:
    config = load(ROOT / "tune_configs" / f"{file}.yaml")
    genotype, _ = genotype_to_train(cell, config)
    cifar10 = dataclasses.replace(load_dataset("digits"), channels=3, height=32, width=32)
    assert network_cost(config, config.retrain, cifar10, genotype).params == params


def test_a_one_stage_cell_needs_the_setting_of_its_batch_norms() -> None:
    config = load(ROOT / "tune_configs" / "retrain_cifar10.yaml")
    with pytest.raises(ConfigError, match=r"comes from a one-stage search.*set retrain\.op_batchnorm=true$"):
        genotype_to_train("ISTA_onestage", config)


def test_the_quickstart_searches_the_digits_for_at_least_ten_epochs() -> None:
    config = load(default_file())
    assert config.data.name == "digits"
    assert config.search.epochs >= 10


def test_the_small_cifar10_run_has_its_minimum_of_epochs_and_pictures() -> None:
    """Five epochs of search over 20,000 pictures, and a retraining on all pictures."""
    config = load(ROOT / "tune_configs" / "cifar10_small_cpu.yaml")
    assert config.search.epochs >= 5
    assert config.search.max_pictures is None or config.search.max_pictures >= 20_000
    assert config.data.holdout == 0


def test_every_one_stage_file_keeps_the_published_tolerance() -> None:
    configs = [load(ROOT / file) for file in FILES]
    one_stage = [config for config in configs if config.method == "one_stage"]
    assert len(one_stage) == 6
    assert {config.search.termination_tol for config in one_stage} == {1e-3}


@pytest.mark.parametrize("method", ["one_stage", "darts", "pc_darts"])
def test_the_defaults_of_a_method_are_its_published_settings(method: str) -> None:
    published = load(ROOT / "tune_configs" / f"{method}_cifar10.yaml").search
    assert load(None, [f"method={method}"]).search == published


@pytest.mark.slow
def test_a_few_steps_of_the_one_stage_imagenet_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the file's schedule, limit, label smoothing and auxiliary head, on 24 pictures of twelve classes."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1)):
        for label in range(12):
            folder = tmp_path / "pictures" / split / f"class{label:02}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 256, (80, 96, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    monkeypatch.chdir(tmp_path)
    arguments = ["search", "--config", str(ROOT / "tune_configs" / "one_stage_imagenet.yaml"), "--json"]
    for setting in (
        f"data.root={tmp_path / 'pictures'}",
        *("data.image_size=96", "search.batch_size=8", "search.init_channels=2", "search.layers=3"),
        *("search.max_search_epochs=2", "search.warmup_epochs=1", "search.train_epochs=2"),
        *("runtime.data_workers=0", "runtime.threads=1", "tracking.enabled=false"),
    ):
        arguments += ["--set", setting]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["search_epochs"] + result["train_epochs"] == 2 + 1 + 2
    assert result["macs"] <= 630_000_000
