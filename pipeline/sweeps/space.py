"""The search space of a sweep: validated against the schema before a sweep starts, sampled by Optuna's trials."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from istanas.errors import ConfigError
from pipeline.base.text import count, shown_value
from pipeline.config.errors import fields_of, mistakes_of, one_error
from pipeline.config.keys import known_methods, nearest_key, value_at
from pipeline.config.load import with_settings
from pipeline.config.schema import Config, Parameter, SweepSettings

Settings = dict[str, Any]  # the settings of one trial: "key.path" -> value
N_CHECKED = 100  # number of random settings that are validated before a sweep starts

optuna.logging.set_verbosity(optuna.logging.WARNING)  # Optuna logs a line for every study otherwise.

# Keys that decide where a trial runs or how it is evaluated. Trials that differ in them could not be compared.
_NOT_SWEPT = (
    *("runtime", "tracking", "sweep", "search.test_every", "retrain.test_every"),
    *("data.name", "data.root", "data.download", "data.cache_dir", "data.holdout"),
)


def sweep_of(config: Config) -> SweepSettings:
    """Return the `sweep` section of a configuration.

    Raises:
        ConfigError: If the configuration has no such section.
    """
    if config.sweep is None:
        raise ConfigError(
            "no such section",
            field="sweep",
            remedy="give a configuration with a sweep section, such as sweep_digits.yaml",
        )
    return config.sweep


def distribution(parameter: Parameter) -> BaseDistribution | None:
    """Return the Optuna distribution of a parameter; `None` for a fixed one."""
    value = parameter.value
    if parameter.kind == "int":
        return IntDistribution(*value)
    if parameter.kind == "choice":
        return CategoricalDistribution([encoded(choice) for choice in value])
    if parameter.kind == "fixed":
        return None
    low, high = value
    return FloatDistribution(low, high, log=parameter.kind == "loguniform")


def values_of(parameter: Parameter) -> list[Any]:
    """Return the values that a parameter lists: its bounds, its choices, or its fixed value."""
    return [parameter.value] if parameter.kind == "fixed" else list(parameter.value)


def encoded(value: Any) -> Any:
    """Return a value in the form that Optuna's database can store: a list becomes JSON text."""
    return json.dumps(value) if isinstance(value, list) else value


def _active_parameters(config: Config, settings: Settings) -> Iterator[tuple[str, Parameter]]:
    """Yield the parameters whose conditions hold. The caller adds to `settings` while it iterates."""
    for key, parameter in sweep_of(config).space.items():
        values = {name: settings.get(name, value_at(config, name)) for name in parameter.when}
        if values == parameter.when:
            yield key, parameter


class Suggests(Protocol):
    """The part of an Optuna trial that chooses values."""

    @property
    def suggest_int(self) -> Callable[..., int]:
        """Choose an integer; called as (key, low, high)."""

    @property
    def suggest_float(self) -> Callable[..., float]:
        """Choose a float; called as (key, low, high, log=False)."""

    @property
    def suggest_categorical(self) -> Callable[..., Any]:
        """Choose one of several values; called as (key, choices)."""


def suggest(config: Config, trial: Suggests) -> Settings:
    """Sample the settings of one trial, fixed values included.

    Args:
        config: The sweep's configuration.
        trial: The Optuna trial. Values that it already has are kept.
    """
    settings: Settings = {}
    for key, parameter in _active_parameters(config, settings):
        value = parameter.value
        if parameter.kind == "int":
            settings[key] = trial.suggest_int(key, *value)
        elif parameter.kind == "choice":
            choices = [encoded(choice) for choice in value]
            settings[key] = value[choices.index(trial.suggest_categorical(key, choices))]
        elif parameter.kind == "fixed":
            settings[key] = value
        else:
            settings[key] = trial.suggest_float(key, *value, log=parameter.kind == "loguniform")
    return settings


def trial_config(config: Config, settings: Settings, source: str = "trial") -> Config:
    """Return the configuration of one trial, which never measures the test split.

    Raises:
        ConfigError: If the settings contradict each other.
    """
    trial = with_settings(config, settings, source)
    if sweep_of(config).objective == "valid" and not trial.search.settings_class.validates:
        raise ConfigError(
            f"{trial.method} measures no validation accuracy of its result, the sweep's objective",
            field="method",
            remedy="set sweep.objective=retrained and data.holdout=0.1",
            source=source,
        )
    update: dict[str, Any] = {"retrain": trial.retrain.model_copy(update={"test_every": 0})}
    if trial.trains_target:
        update["search"] = trial.search.model_copy(update={"test_every": 0})
        if trial.data.holdout == 0:
            raise ConfigError(
                "0, but one-stage trials are compared by their accuracy on the hold-out",
                field="data.holdout",
                remedy="set data.holdout=0.1",
                source=source,
            )
        if sweep_of(config).objective == "retrained" and not trial.retrain.op_batchnorm:
            raise ConfigError(
                "false, but cells of a one-stage search have batch norm after pooling and identity operations",
                field="retrain.op_batchnorm",
                remedy="set retrain.op_batchnorm=true",
                source=source,
            )
    return trial.model_copy(update=update)


def check_space(config: Config) -> None:
    """Validate every parameter, its bounds, its conditions and many random settings against the schema.

    Raises:
        ConfigError: If the space is invalid, with one line for each mistake.
    """
    sweep = sweep_of(config)
    errors: list[ConfigError] = []
    for place, (key, parameter) in enumerate(sweep.space.items()):
        errors += _parameter_errors(config, key, parameter, list(sweep.space)[:place])
    for number, point in enumerate(sweep.points):
        errors += [error.in_source(f"sweep.points.{number}") for error in _point_errors(config, point)]
    if sweep.searcher == "grid" and not errors:
        errors += _grid_errors(config)
    if errors:
        raise one_error(errors)
    from istanas.training import derive_seed  # Imports torch, which other users of this module do not need.

    for number in range(N_CHECKED):
        settings = random_settings(config, derive_seed(config.seed, "check", number))
        _check_trial(config, settings, f"sweep.space allows {readable(settings)}")
    for number, point in enumerate(sweep.points):
        _check_trial(config, settings_of_point(config, point), f"sweep.points.{number}")


def _check_trial(config: Config, settings: Settings, source: str) -> None:
    from pipeline.training.build import check_method

    trial = trial_config(config, settings, source)
    try:
        check_method(trial)
    except ConfigError as error:
        raise error.in_source(source) from None


def extreme_settings(config: Config) -> Iterator[Settings]:
    """Yield settings with each value that the space lists, and the lowest or first value of all other keys."""
    for key, parameter in sweep_of(config).space.items():
        for value in values_of(parameter):
            yield settings_of_point(config, {**parameter.when, key: value})


def random_settings(config: Config, seed: int) -> Settings:
    """Sample random settings from the space, without a study."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed % 2**32))
    return suggest(config, study.ask())


def settings_of_point(config: Config, point: Mapping[str, Any]) -> Settings:
    """Complete one of `sweep.points`: missing keys get their fixed, lowest or first value."""
    from optuna.trial import FixedTrial

    space = sweep_of(config).space
    defaults = {key: parameter.value[0] for key, parameter in space.items() if parameter.kind != "fixed"}
    return suggest(config, FixedTrial({key: encoded(v) for key, v in {**defaults, **point}.items()}))


def grid_of(config: Config) -> list[Settings]:
    """Return every combination of the choices of a space; those of the last key vary fastest.

    Combinations that differ only in keys whose conditions do not hold are one.
    """
    space = {key: each for key, each in sweep_of(config).space.items() if each.kind != "fixed"}
    combinations = itertools.product(*(values_of(each) for each in space.values()))
    found = (settings_of_point(config, dict(zip(space, each, strict=True))) for each in combinations)
    return list({json.dumps(settings): settings for settings in found}.values())


def first_points(config: Config) -> list[Settings]:
    """Return the settings of the first trials, without fixed ones: `sweep.points`, or the whole grid.

    Keys that a point lacks are sampled.
    """
    sweep = sweep_of(config)
    if sweep.searcher == "grid":
        return [
            {key: value for key, value in settings.items() if sweep.space[key].kind != "fixed"}
            for settings in grid_of(config)
        ]
    points = ((point, settings_of_point(config, point)) for point in sweep.points)
    return [{key: value for key, value in settings.items() if key in point} for point, settings in points]


def _grid_errors(config: Config) -> Iterator[ConfigError]:
    """Yield the errors of a grid: keys without choices, or another number of trials than combinations."""
    sweep = sweep_of(config)
    ranges = [key for key, each in sweep.space.items() if each.kind not in ("choice", "fixed")]
    for key in ranges:
        yield ConfigError(
            f"{sweep.space[key]} has no choices, which sweep.searcher grid combines",
            field=f"sweep.space.{key}",
            remedy="give choice or fixed, or choose another searcher",
        )
    if not ranges and sweep.trials != (size := len(grid_of(config))):
        yield ConfigError(
            f"{sweep.trials}, and the grid has {count(size, 'combination')}",
            field="sweep.trials",
            remedy=f"set {size}",
        )


def readable(settings: Settings) -> str:
    """Format settings in one line.

    Example:
        >>> readable({"search.lr": 0.123456, "space.sparsity": 2})
        'search.lr=0.1235, space.sparsity=2'
    """
    return ", ".join(
        f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={shown_value(v)}" for k, v in settings.items()
    )


def _parameter_errors(
    config: Config, key: str, parameter: Parameter, earlier: Sequence[str]
) -> Iterator[ConfigError]:
    """Yield an error for each mistake in one key of the space; `earlier` are the keys above it."""
    field, methods = f"sweep.space.{key}", known_methods(key)
    if not methods:
        yield ConfigError("unknown key", field=field, remedy=f"did you mean {nearest_key(key)}?")
        return
    if any(key == name or key.startswith(f"{name}.") for name in _NOT_SWEPT):
        yield ConfigError(
            "cannot be swept, because it decides where a trial runs or how it is evaluated",
            field=field,
            remedy="set it outside the space",
        )
        return
    yield from _condition_errors(config, key, parameter, earlier)
    possible = methods_of(config)
    if "method" in parameter.when and parameter.when["method"] in possible:
        possible = [str(parameter.when["method"])]
    if missing := [method for method in possible if method not in methods]:
        if methods[0] in methods_of(config):
            problem, remedy = f"trials may be {missing[0]}", f"add when: {{method: {methods[0]}}}"
        else:
            problem, remedy = "no trial has this method", "leave it out or set the method"
        yield ConfigError(f"belongs to method: {methods[0]}, but {problem}", field=field, remedy=remedy)
        return
    # Each value is validated alone; `check_space` finds invalid combinations by random sampling.
    if len(possible) == 1:
        base: Settings = {"method": possible[0], **parameter.when}
        for name, other in sweep_of(config).space.items():
            if other.kind == "fixed" and other.when.items() <= base.items():
                base[name] = other.value
        others = [name for name in sweep_of(config).space if name != key and name not in base]
        for value in values_of(parameter):
            try:
                with_settings(config, {**base, key: value}, field)
            except ConfigError as error:
                for mistake in mistakes_of(error):
                    if _concerns(mistake, key) and not any(_concerns(mistake, name) for name in others):
                        yield mistake
                        break


def _concerns(mistake: ConfigError, key: str) -> bool:
    """Return whether a mistake is about a key, or about a part of its value."""
    return any(field == key or field.startswith(f"{key}.") for field in fields_of(mistake))


def _condition_errors(
    config: Config, key: str, parameter: Parameter, earlier: Sequence[str]
) -> Iterator[ConfigError]:
    """Yield an error for each mistake in the conditions of one key of the space."""
    field, space = f"sweep.space.{key}.when", sweep_of(config).space
    for name, wanted in parameter.when.items():
        if name in space and name not in earlier:
            yield ConfigError(f"{name} is listed below {key}", field=field, remedy=f"move {name} above {key}")
        elif not known_methods(name):
            yield ConfigError(f"unknown key {name}", field=field, remedy=f"did you mean {nearest_key(name)}?")
        elif name in space and not _in_range(space[name], wanted):
            remedy = f"choose a value that sweep.space.{name} allows"
            yield ConfigError(f"{name} is never {wanted!r}", field=field, remedy=remedy)


def methods_of(config: Config) -> list[str]:
    """Return the search methods that trials may have."""
    parameter = sweep_of(config).space.get("method")
    return [config.method] if parameter is None else list(values_of(parameter))


def _point_errors(config: Config, point: Mapping[str, Any]) -> Iterator[ConfigError]:
    """Yield an error for each mistake in one of `sweep.points`."""
    space = sweep_of(config).space
    valid = True
    for key, value in point.items():
        if key not in space:
            valid = False
            yield ConfigError("not in sweep.space", field=key, remedy="add it there or leave it out")
        elif not _in_range(space[key], value):
            valid = False
            yield ConfigError(
                f"{value!r} is outside {space[key]}", field=key, remedy="choose a value that the space allows"
            )
    # Keys that a point lacks are sampled, so a condition on such a key may not hold.
    for key in set(point) - set(settings_of_point(config, point)) if valid else ():
        wanted = ", ".join(f"{name}: {shown_value(v)}" for name, v in space[key].when.items())
        yield ConfigError("its condition does not hold in this point", field=key, remedy=f"add {wanted}")


def _in_range(parameter: Parameter, value: Any) -> bool:
    if parameter.kind in ("fixed", "choice"):
        return any(
            value == other and isinstance(value, bool) == isinstance(other, bool)
            for other in values_of(parameter)
        )
    low, high = parameter.value
    kinds = int if parameter.kind == "int" else int | float
    return isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high
