"""The settings of the algorithms that a configuration gives."""

from dataclasses import fields, replace
from typing import Any

import pytest

from istanas.search import OneStageSettings, SearchSettings, TwoStageSettings
from pipeline.config.load import load
from pipeline.training.build import settings_of

KINDS = {"two_stage": TwoStageSettings, "one_stage": OneStageSettings}
WITHOUT_KEY = {"alphas_scale"}


@pytest.mark.parametrize("method", KINDS)
def test_the_default_configuration_gives_the_default_settings(method: str) -> None:
    settings = settings_of(load(None, [f"method={method}"]))
    assert settings == replace(KINDS[method](), stem="cifar")  # the stem that fits the digits
    assert isinstance(settings.arch_betas, tuple)


@pytest.mark.parametrize("method", KINDS)
def test_each_setting_comes_from_its_key(method: str) -> None:
    kind: type[SearchSettings] = KINDS[method]
    others: dict[str, Any] = {
        "matrix": "gaussian",
        "solver": "fista",
        "schedule": "linear",
        "arch_betas": (0.1, 0.2),
        "momentum": 0.25,
        "drop_path": 0.125,
        "label_smoothing": 0.5,
        "stem": "imagenet",
        "test_every": 3,
        "max_pictures": 10,
        "alpha_fraction": 0.25,
        "cost": "params",
        "latency_table": "elsewhere",
        "over_limit": "reweigh",
    }
    names = {field.name for field in fields(kind)} - WITHOUT_KEY
    values = {
        name: others[name] if name in others else (getattr(kind(), name) or 0) // 2 + 1 for name in names
    }
    space = ("n_measurements", "matrix", "matrix_seed", "l1_weight", "solver")
    keys = {name: f"{'space' if name in space else 'search'}.{name}" for name in values}
    overrides = [f"{keys[name]}={list(v) if isinstance(v, tuple) else v}" for name, v in values.items()]
    config = load(None, [f"method={method}", *overrides])
    settings = settings_of(config)
    assert settings == replace(kind(), **values)
    assert not [name for name in values if getattr(settings, name) == getattr(kind(), name)]


def test_the_matrices_have_the_seed_of_the_run_unless_given_their_own() -> None:
    assert settings_of(load(None, ["seed=3"])).matrix_seed == 3
    assert settings_of(load(None, ["seed=3", "space.matrix_seed=0"])).matrix_seed == 0
