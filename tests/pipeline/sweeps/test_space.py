"""A sweep's space: errors are found before anything starts, and conditions hold in sampled settings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import nn

from istanas.errors import ConfigError
from istanas.registry import registering_for, unregister
from istanas.space import ChoiceSpace, Decision, NetworkSize, register_space
from istanas.space.choice import Choose
from pipeline.config.load import load, run_hash, to_yaml
from pipeline.sweeps.space import (
    check_space,
    first_points,
    random_settings,
    readable,
    settings_of_point,
    suggest,
    trial_config,
)

BASE = """
data: {name: digits, holdout: 0.1}
search: {batch_size: 64}
sweep:
  space:
"""
BOTH = """
data: {name: digits, holdout: 0.1}
sweep:
  space:
    method: {choice: [two_stage, one_stage]}
    search.lr: {loguniform: [0.01, 0.3]}
    search.epochs: {int: [2, 4], when: {method: two_stage}}
    search.train_epochs: {fixed: 3, when: {method: one_stage}}
    search.termination_tol: {uniform: [0.001, 0.01], when: {method: one_stage}}
"""


def write(folder: Path, space: str, rest: str = "") -> Path:
    file = folder / "sweep.yaml"
    lines = "".join(f"    {line}\n" for line in space.strip().splitlines())
    file.write_text(f"{BASE}{lines}{rest}")
    return file


def refusal(folder: Path, space: str, rest: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        check_space(load(write(folder, space, rest)))
    return str(caught.value)


@pytest.mark.parametrize(
    ("space", "line"),
    [
        (
            "search.lr: {}",
            "sweep.space.search.lr: no kind of range is given; give exactly one of uniform, loguniform, int,",
        ),
        ("search.lr: {uniform: [0, 1], fixed: 1}", "give exactly one of uniform"),
        (
            "search.lr: {uniform: [1, 1]}",
            "uniform: [1.0, 1.0] is not a range; give [low, high] with low below high",
        ),
        ("search.lr: {uniform: [0.1]}", "sweep.space.search.lr.uniform: [0.1] is invalid"),
        ("search.lr: {loguniform: [0, 1]}", "loguniform: 0.0 has no logarithm"),
        ("search.lr: {uniform: [0.1, .inf]}", "uniform: [0.1, inf] is not a range; give [low, high]"),
        ("space.sparsity: {int: [1.5, 2]}", "sweep.space.space.sparsity.int.0: 1.5 is invalid"),
        ("space.matrix: {choice: []}", "sweep.space.space.matrix.choice: [] is invalid"),
        ("space.matrix: {choice: [uniform, uniform]}", "choice: a value is given twice"),
        ("search.lr: {loguniforn: [0.1, 1]}", "unknown key; did you mean loguniform?"),
        ("search.lrr: {uniform: [0.1, 1]}", "sweep.space.search.lrr: unknown key; did you mean search.lr?"),
        ("runtime.threads: {int: [1, 2]}", "sweep.space.runtime.threads: cannot be swept"),
        ("data.root: {choice: [a, b]}", "sweep.space.data.root: cannot be swept"),
        ("data.holdout: {choice: [0.0, 0.1]}", "sweep.space.data.holdout: cannot be swept"),
        ("space.sparsity: {int: [0, 2]}", "sweep.space.space.sparsity: space.sparsity: 0 is invalid"),
        ("space.matrix: {choice: [uniform, normal]}", "space.matrix: 'normal' is invalid"),
        ("search.batch_size: {uniform: [2, 9]}", "search.batch_size: 2.0 is invalid"),
        ("search.lr: {uniform: [0.0001, 1]}", "search.lr_min: 0.001 is above search.lr = 0.0001"),
        ("search.train_epochs: {fixed: 3}", "belongs to method: one_stage, but no trial has this method"),
        (
            "seed: {int: [0, 1], when: {search.lrr: 1}}",
            "sweep.space.seed.when: unknown key search.lrr; did you mean search.lr?",
        ),
        (
            "seed: {int: [0, 1], when: {space.matrix: uniform}}\nspace.matrix: {choice: [uniform, gaussian]}",
            "sweep.space.seed.when: space.matrix is listed below seed; move space.matrix above seed",
        ),
        (
            "space.matrix: {choice: [uniform, gaussian]}\nseed: {int: [0, 1], when: {space.matrix: normal}}",
            "when: space.matrix is never 'normal'",
        ),
        (
            "method: {choice: [two_stage, one_stage]}\nsearch.train_epochs: {fixed: 3}",
            "add when: {method: one_stage}",
        ),
        # Each bound is valid alone; random settings show that some combinations are not.
        (
            "search.lr: {uniform: [0.01, 0.1]}\nsearch.lr_min: {uniform: [0.001, 0.05]}",
            "sweep.space allows search.lr=",
        ),
    ],
)
def test_an_invalid_space_is_rejected(tmp_path: Path, space: str, line: str) -> None:
    message = refusal(tmp_path, space)
    assert line in message
    assert all(len(each) < 300 for each in message.splitlines())


@pytest.mark.parametrize(
    ("rest", "line"),
    [
        ("  points: [{search.momentum: 0.5}]\n", "sweep.points.0: search.momentum: not in sweep.space"),
        (
            "  points: [{search.lr: 0.05}, {search.lr: 5}]\n",
            "sweep.points.1: search.lr: 5 is outside uniform",
        ),
        (
            "  start_from: x\n  searcher: nsga2\n  scheduler: none\n  objectives: [top1, params]\n",
            "sweep.start_from: sweep.searcher nsga2 learns only",
        ),
        ("  objectives: [params]\n", "sweep.objectives: ['params'] lacks top1"),
        ("  objectives: [top1, params]\n", "sweep.scheduler: asha cannot rank trials by several"),
        ("  searcher: nsga2\n", "sweep.searcher: nsga2 requires several"),
        ("  gpus_per_trial: 1.5\n", "sweep.gpus_per_trial: 1.5 is neither"),
        (
            "  gpus_per_trial: 1\nruntime: {device: cpu}\n",
            "sweep.gpus_per_trial: 1.0 cannot be used on runtime.device cpu",
        ),
        ("  trials: 0\n", "sweep.trials: 0 is invalid"),
        (
            "  searcher: grid\n",
            "search.lr: uniform 0.01 .. 1 has no choices, which sweep.searcher grid combines",
        ),
        (
            "  searcher: grid\n  points: [{search.lr: 0.5}]\n",
            "sweep.points: sweep.searcher grid has all its points",
        ),
        (
            "  searcher: grid\n  start_from: x\n",
            "sweep.start_from: sweep.searcher grid learns from no trials",
        ),
        ("runtime: {workers: '1:2'}\n", "runtime.workers: 1:2 is a range"),
    ],
)
def test_contradicting_settings_of_a_sweep_are_rejected(tmp_path: Path, rest: str, line: str) -> None:
    assert line in refusal(tmp_path, "search.lr: {uniform: [0.01, 1]}", rest)


def test_a_grid_has_as_many_trials_as_combinations(tmp_path: Path) -> None:
    space = "seed: {choice: [0, 1]}\nspace.matrix: {choice: [uniform, gaussian]}\nsearch.epochs: {fixed: 3}"
    line = refusal(tmp_path, space, "  searcher: grid\n  trials: 5\n")
    assert line == "sweep.trials: 5, and the grid has 4 combinations; set 4"
    config = load(write(tmp_path, space, "  searcher: grid\n  trials: 4\n"))
    check_space(config)
    assert first_points(config)[1] == {"seed": 0, "space.matrix": "gaussian"}


def test_objectives_on_the_hold_out_need_one(tmp_path: Path) -> None:
    file = write(tmp_path, "search.lr: {uniform: [0.01, 1]}", "  objective: retrained\n")
    with pytest.raises(ConfigError, match=r"data\.holdout: 0 leaves no pictures"):
        load(file, ["data.holdout=0"])
    (tmp_path / "both.yaml").write_text(BOTH)
    with pytest.raises(ConfigError, match=r"data\.holdout: 0, but one-stage trials are compared"):
        check_space(load(tmp_path / "both.yaml", ["data.holdout=0"]))


def test_a_configuration_without_a_sweep_is_rejected() -> None:
    with pytest.raises(ConfigError, match="sweep: no such section; give a configuration with a sweep"):
        check_space(load(None))


@pytest.mark.parametrize(
    "space",
    [
        "search.lr_min: {fixed: 0.0}\nsearch.lr: {loguniform: [0.0001, 0.1]}",
        "retrain.epochs: {fixed: 20}\nretrain.warmup_epochs: {uniform: [0, 3]}",
        "search.lr_min: {uniform: [0.00001, 0.00005]}\nsearch.lr: {loguniform: [0.0001, 0.1]}",
    ],
)
def test_a_bound_may_contradict_a_setting_that_the_space_replaces(tmp_path: Path, space: str) -> None:
    check_space(load(write(tmp_path, space)))


def test_a_value_is_checked_where_its_condition_holds(tmp_path: Path) -> None:
    space = (
        "retrain.stem: {choice: [cifar, imagenet]}\n"
        "retrain.init_channels: {int: [1, 16], when: {retrain.stem: cifar}}"
    )
    check_space(load(write(tmp_path, space), ["retrain.stem=imagenet", "retrain.init_channels=16"]))


def test_a_value_of_a_point_whose_condition_fails_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text(BOTH)
    lost = load(tmp_path / "both.yaml", ["sweep.points=[{search.termination_tol: 0.005}]"])
    with pytest.raises(
        ConfigError, match=r"points\.0: search\.termination_tol: its condition .* method: one_st"
    ):
        check_space(lost)
    kept = "sweep.points=[{method: one_stage, search.termination_tol: 0.005}]"
    check_space(load(tmp_path / "both.yaml", [kept]))


def test_conditions_hold_and_every_trial_has_its_methods_schema(tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text(BOTH)
    config = load(tmp_path / "both.yaml")
    check_space(config)
    seen: dict[str, set[str]] = {}
    for seed in range(40):
        settings = random_settings(config, seed)
        seen.setdefault(settings["method"], set()).add(",".join(settings))
        trial = trial_config(config, settings)
        assert trial.sweep is None
        if trial.method == "one_stage":
            assert (trial.search.train_epochs, trial.search.test_every) == (3, 0)
            assert 0.001 <= trial.search.termination_tol <= 0.01
            assert trial.search.init_channels == 36  # the method's default
        else:
            assert 2 <= trial.search.max_epochs <= 4
            assert trial.search.init_channels == 16
        assert trial.retrain.test_every == 0
        assert 0.01 <= trial.search.lr <= 0.3
    assert seen == {
        "two_stage": {"method,search.lr,search.epochs"},
        "one_stage": {"method,search.lr,search.train_epochs,search.termination_tol"},
    }


def test_a_point_is_completed_from_the_space(tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text(BOTH)
    config = load(tmp_path / "both.yaml")
    settings = settings_of_point(config, {"method": "one_stage", "search.lr": 0.2})
    assert settings == {
        "method": "one_stage",
        "search.lr": 0.2,
        "search.train_epochs": 3,
        "search.termination_tol": 0.001,
    }


def test_a_one_stage_trial_that_is_retrained_needs_its_batch_norms(tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text(BOTH)
    config = load(tmp_path / "both.yaml", ["sweep.objective=retrained"])
    settings = {"method": "one_stage", "search.train_epochs": 3}
    with pytest.raises(ConfigError, match=r"cells of a one-stage search.*set retrain\.op_batchnorm=true$"):
        trial_config(config, settings)
    assert trial_config(config, {**settings, "retrain.op_batchnorm": True}).retrain.op_batchnorm
    assert not trial_config(config, {"method": "two_stage"}).retrain.op_batchnorm


def test_a_written_sweep_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text(BOTH)
    config = load(tmp_path / "both.yaml")
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "again.yaml") == config
    assert "sweep" not in to_yaml(trial_config(config, random_settings(config, 0)))


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("sweep.max_concurrent=1", True),
        ("sweep.storage=sqlite:///x.db", True),
        ("sweep.max_failures=9", True),
        ("runtime.workers=2", True),
        ("sweep.trials=21", False),
        ("sweep.objective=retrained", False),
        ("retrain.epochs=5", False),
        ("search.batch_size=32", False),
    ],
)
def test_what_decides_a_sweep_is_in_its_hash(tmp_path: Path, override: str, same: bool) -> None:
    file = write(tmp_path, "search.lr: {uniform: [0.01, 1]}")
    equal = run_hash(load(file), "sweep") == run_hash(load(file, [override]), "sweep")
    assert equal is same


def test_null_and_lists_are_values(tmp_path: Path) -> None:
    space = """
space.ops: {choice: [[skip_connect, sep_conv_3x3], [skip_connect, max_pool_3x3, dil_conv_3x3]]}
search.max_pictures: {choice: [null, 500]}
data.crop_padding: {fixed: 0}
space.matrix_seed: {fixed: null}
search.lr: {uniform: [0.1, 1], when: {search.max_pictures: null}}
"""
    points = "  points: [{space.ops: [skip_connect, sep_conv_3x3], search.max_pictures: null}]\n"
    config = load(write(tmp_path, space, points))
    check_space(config)
    settings = settings_of_point(config, config.sweep.points[0])  # type: ignore[union-attr]
    assert settings == {
        "space.ops": ["skip_connect", "sep_conv_3x3"],
        "search.max_pictures": None,
        "data.crop_padding": 0,
        "space.matrix_seed": None,
        "search.lr": 0.1,
    }
    assert readable(settings).startswith("space.ops=[skip_connect, sep_conv_3x3], search.max_pictures=null,")
    seen = [random_settings(config, seed) for seed in range(20)]
    assert {len(s["space.ops"]) for s in seen} == {2, 3}
    assert {s["search.max_pictures"] for s in seen} == {None, 500}
    assert all(("search.lr" in s) is (s["search.max_pictures"] is None) for s in seen)
    assert trial_config(config, settings).space.ops == ["skip_connect", "sep_conv_3x3"]
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "again.yaml") == config
    assert "7 is outside choice null, 500" in refusal(
        tmp_path, space, "  points: [{search.max_pictures: 7}]\n"
    )
    assert "space.ops.1: 'conv' is not a registered operation" in refusal(
        tmp_path, "space.ops: {choice: [[skip_connect, conv]]}"
    )


class FromList:
    """Suggests the values of a list, in order."""

    def __init__(self, *values: Any) -> None:
        self._values = list(values)

    def _next(self, *_: Any, **__: Any) -> Any:
        return self._values.pop(0)

    suggest_int = suggest_float = suggest_categorical = _next


def test_a_key_outside_the_space_may_be_a_condition(tmp_path: Path) -> None:
    space = "search.lr: {uniform: [0.1, 1], when: {space.matrix: uniform}}\nseed: {int: [0, 9]}"
    config = load(write(tmp_path, space))
    assert suggest(config, FromList(0.5, 3)) == {"search.lr": 0.5, "seed": 3}
    other = load(write(tmp_path, space), ["space.matrix=gaussian"])
    assert suggest(other, FromList(3)) == {"seed": 3}


@dataclass(frozen=True)
class Whole(ChoiceSpace):
    """A space whose candidates cannot run on a part of the channels."""

    name: ClassVar[str] = "whole"

    def make_decisions(self) -> list[Decision]:
        return [Decision("block", 0, (("a", 0), ("b", 0)), sparsity=1)]

    def network(self, size: NetworkSize, choose: Choose) -> nn.Module:
        return nn.Sequential(choose("block", 0, 1, lambda *_: nn.Identity()), nn.Flatten(), nn.LazyLinear(10))


@pytest.mark.parametrize(
    ("space", "line"),
    [
        ("method: {choice: [gdas, random]}", "method: random measures no validation accuracy"),
        (
            "method: {choice: [gdas, pc_darts]}\nspace.name: {choice: [darts, whole]}",
            "method: pc_darts runs operations on a part of the channels, which whole does not support",
        ),
    ],
)
def test_a_method_that_some_trials_cannot_use_is_rejected(tmp_path: Path, space: str, line: str) -> None:
    with registering_for("test") as registered:
        register_space(Whole)
    try:
        found = refusal(tmp_path, space)
    finally:
        unregister(registered)
    assert found.startswith("sweep.space allows method=")
    assert line in found
