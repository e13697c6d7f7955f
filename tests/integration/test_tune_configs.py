"""Every file under tune_configs is valid, tells how it is started, and holds the published figures it promises."""

import re
from pathlib import Path

import pytest

import pipeline.config
import pipeline.schema
from pipeline.cli import cli
from pipeline.sweep_space import check_space

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
    "one_stage_cifar10": {
        "method": "one_stage",
        "data": {"name": "cifar10"},
        "space": {"nodes": 4, "sparsity": 2, "n_measurements": 7, "matrix": "uniform", "l1_weight": 1e-5},
        "search": {
            "max_search_epochs": 120,
            "train_epochs": 600,
            "termination_tol": 1e-3,
            "max_params": 3_700_000,
            "batch_size": 96,
            "init_channels": 36,
            "layers": 20,
            "stem": "cifar",
            "lr": 0.025,
            "lr_min": 0.0,
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
            "schedule": "linear",
            "label_smoothing": 0.1,
        },
    },
}


def test_there_are_as_many_as_we_know() -> None:
    """A new file is counted here on purpose: it then is validated below."""
    assert len(FILES) == 13


@pytest.mark.parametrize("file", FILES)
def test_it_is_valid_and_opens_with_its_own_launch_command(file: str) -> None:
    text = (ROOT / file).read_text()
    config = pipeline.config.load(ROOT / file)
    comment = "\n".join(re.match(r"(#.*\n)+", text).group().splitlines())  # type: ignore[union-attr]
    commands = re.findall(r"^#\s+istanas (\w+) (.*)$", comment, flags=re.MULTILINE)
    assert len(commands) >= 2, "a launch command and one with an override"
    for command, arguments in commands:
        assert command in cli.commands
        assert f"--config {file}" in arguments
    assert (config.sweep is not None) == Path(file).name.startswith("sweep_")
    if config.sweep is not None:
        check_space(config)
    overrides = re.findall(r"--set (\S+=\S+)", comment)
    assert overrides
    changed = pipeline.config.load(ROOT / file, overrides)
    assert changed != config


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_settings_are_as_published(name: str) -> None:
    config = pipeline.config.load(ROOT / "tune_configs" / f"{name}.yaml").model_dump()
    for section, wanted in PUBLISHED[name].items():
        if isinstance(wanted, dict):
            assert {key: config[section][key] for key in wanted} == wanted
        else:
            assert config[section] == wanted


def test_imagenet_warms_up() -> None:
    assert pipeline.config.load(ROOT / "tune_configs" / "retrain_imagenet.yaml").retrain.warmup_epochs > 0


def test_the_quickstart_searches_at_least_ten_epochs_and_retrains_on_the_digits() -> None:
    config = pipeline.config.load(pipeline.config.default_file())
    assert config.data.name == "digits"
    assert config.search.epochs >= 10


def test_the_small_cifar10_run_searches_five_epochs_over_20000_pictures_and_retrains_on_all() -> None:
    config = pipeline.config.load(ROOT / "tune_configs" / "cifar10_small_cpu.yaml")
    assert config.search.epochs >= 5
    assert config.search.max_pictures is None or config.search.max_pictures >= 20_000
    assert config.data.holdout == 0


def test_every_one_stage_file_keeps_the_published_tolerance() -> None:
    configs = [pipeline.config.load(ROOT / file) for file in FILES]
    one_stage = [config for config in configs if isinstance(config, pipeline.schema.OneStageConfig)]
    assert len(one_stage) == 5
    assert {config.search.termination_tol for config in one_stage} == {1e-3}


def test_the_defaults_of_one_stage_search_are_the_published_settings() -> None:
    published = pipeline.config.load(ROOT / "tune_configs" / "one_stage_cifar10.yaml").search
    assert pipeline.config.load(None, ["method=one_stage"]).search == published
