"""Loading of configurations: YAML files and `--set key.path=value`, validated before any work starts.

Unknown keys, wrong types and impossible combinations are `ConfigError`s that name file, field and remedy.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAMLError

from istanas.checks import MIN_STEM_CHANNELS
from istanas.errors import ConfigError
from istanas.limits import CONFIG_DEPTH, RECORD_BYTES, SMALL_SIDE, read_at_most
from istanas.space import DEFAULT_SPACE
from pipeline.base.addresses import is_remote
from pipeline.base.redaction import without_secrets
from pipeline.config.keys import is_known, is_text, known_keys, known_methods, schemas_of_methods
from pipeline.config.plugins import plugin_digests
from pipeline.config.schema import Config, considers_costs
from pipeline.config.validation import (
    check_combinations,
    origin_of,
    printable,
    schema_of,
    shown_override,
    validate,
)
from pipeline.config.yaml_files import NOT_YAML, describe_error, dump, parse, read_file

_HASHED = {
    "search": ("method", "seed", "data", "space", "search"),
    "retrain": ("seed", "data", "retrain"),
    "sweep": ("method", "seed", "data", "space", "search", "retrain", "sweep"),
    "benchmark": ("method", "seed", "data", "space", "search"),
    "rank": ("method", "seed", "data", "space", "search", "retrain"),
    "versus": ("method", "seed", "data", "space", "search", "retrain"),
}
_NOT_HASHED_DATA = ("download", "cache_dir", "allow_left_out")
# Settings that were added after version 0.1, with the value that has no effect, for all methods ("") or one. They are
# not hashed if they have this value, so that the runs of earlier versions keep their hashes.
_LATENCY = {"search.max_latency_ms": None, "search.latency_table": None}
_LIMITS = {"search.max_params": None, "search.max_macs": None, **_LATENCY}
_COSTS = {"search.cost": "macs", "search.cost_weight": 0.0}
_RECIPE = {
    "retrain.color_jitter": True,
    "retrain.rand_augment": 0,
    "retrain.random_erasing": 0.0,
    "retrain.mixup": 0.0,
    "retrain.cutmix": 0.0,
    "retrain.ema_decay": 0.0,
}
_ADDED: dict[str, dict[str, Any]] = {
    "": {
        "data.background": "#ffffff",
        "data.reduced_decoding": False,
        "data.test_fraction": 0.0,
        "space.name": DEFAULT_SPACE,
        **_RECIPE,
    },
    **dict.fromkeys(("two_stage", "darts", "pc_darts", "gdas"), _COSTS | _LIMITS),
    **dict.fromkeys(("random_nas", "random"), _LIMITS),
    "measured": {"search.max_concurrent": 1, **_LIMITS},
    "one_stage": {**_COSTS, **_LATENCY, "search.over_limit": "reject"},
}
_NOTHING = object()
_NOT_HASHED_SWEEP = (
    "storage",
    "max_concurrent",
    "cpus_per_trial",
    "gpus_per_trial",
    "max_failures",
    "max_restarts",
)


def default_file() -> Path:
    """Return the configuration file that job commands use without --config. Its data are scikit-learn's digits."""
    return Path(__file__).resolve().parents[2] / "tune_configs" / "digits_quickstart.yaml"


def shipped_files() -> dict[str, Path]:
    """Return the configuration files that the package contains, by name.

    Example:
        >>> shipped_files()["digits_quickstart"].name
        'digits_quickstart.yaml'
    """
    return {file.stem: file for file in sorted(default_file().parent.glob("*.yaml"))}


def shipped_file(name: str) -> Path:
    """Return a configuration file of the package.

    Raises:
        ConfigError: There is none of this name.
    """
    files = shipped_files()
    if name not in files:
        close = difflib.get_close_matches(name, files, 1)
        raise ConfigError(
            "neither a file nor a configuration of istanas",
            field=f"configuration {name!r:.80}",
            remedy=f"did you mean {close[0]}?" if close else "istanas config --list shows those of istanas",
        )
    return files[name]


def configuration_file(given: str | None) -> Path:
    """Return the configuration file that a user names: a path, or the name of one that the package contains.

    Args:
        given: A path or a name; None for the default one. A file in the working directory precedes a name.

    Raises:
        ConfigError: It looks like a name, and there is no such configuration.

    Example:
        >>> configuration_file("one_stage_digits").name, str(configuration_file("my/own.yaml"))
        ('one_stage_digits.yaml', 'my/own.yaml')
    """
    if given is None:
        return default_file()
    path = Path(given)
    is_name = re.fullmatch(r"[\w-]+", given) is not None and not path.is_file()
    return shipped_file(given) if is_name else path


def purpose(file: Path) -> str:
    """Return the first sentence of the comment at the top of a configuration file.

    Example:
        >>> purpose(shipped_files()["random_digits"])
        'A random cell, retraining and tracking on the digits of scikit-learn: the baseline of every search.'
    """
    lines = itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    text = " ".join(line.lstrip("# ") for line in lines)
    return text.partition(". ")[0].rstrip(".") + "."


def example_file(method: str) -> Path:
    """Return a configuration file of a method for the digits, or the default file if there is none."""
    file = default_file().with_name(f"{method}_digits.yaml")
    return file if file.exists() else default_file()


def load(
    path: str | Path | None, overrides: Sequence[str] = (), sections: Mapping[str, Any] | None = None
) -> Config:
    """Read a YAML file, apply overrides, and validate the result.

    Args:
        path: The file; None for the schema's defaults.
        overrides: Each "key.path=value". The value is YAML, but the value of a text key is taken as written.
        sections: Whole sections that replace those of the file.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: The configuration is invalid. Several mistakes raise a `pipeline.config.errors.ConfigErrors`.
    """
    source = "command line" if path is None else str(path)
    tree = ({} if path is None else read_file(Path(path))) | dict(sections or {})
    of_file = copy.deepcopy(tree)
    for override in overrides:
        _apply_override(tree, override)
    _check_method(of_file, tree, source, overrides)
    _check_sweep_section(of_file, source, overrides)
    return _validated(tree, source, overrides, of_file)


def with_settings(config: Config, settings: Mapping[str, Any], source: str) -> Config:
    """Return the configuration of a trial: the sweep's configuration with other values for some keys.

    The trial has no sweep section. Keys that the sweep's file does not set have the default of the trial's method.

    Args:
        config: The configuration of the sweep.
        settings: "key.path" -> value.
        source: Name of the source of the settings, for error messages.

    Raises:
        ConfigError: The settings are invalid.
    """
    without: Any = {"sweep": True, "runtime": {"address"}}  # a trial already runs on the cluster
    tree = config.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude=without)
    for key, value in settings.items():
        _set_value(tree, key, value, source)
    return _validated(tree, source, (), {})


def with_method(config: Config, method: str, option: str = "--method") -> tuple[Config, tuple[str, ...]]:
    """Return the configuration with another search method, and the keys of `search` that this method does not have.

    These keys are left out. Keys that only the other method has, and those that the file does not set, have the other
    method's defaults.

    Args:
        config: The configuration.
        method: Name of the method.
        option: The option of the command line that named it, for error messages.

    Raises:
        ConfigError: The method is unknown, or does not accept a setting.

    Example:
        >>> changed, left_out = with_method(load(None, ["search.epochs=3"]), "one_stage")
        >>> changed.method, left_out
        ('one_stage', ('epochs',))
    """
    if method == config.method:
        return config, ()
    source, tree = f"{option} {method}", _without_sweep(config) | {"method": method}
    own, given = known_keys(schema_of(tree, source), ["search"]), tree.get("search", {})
    tree["search"] = {key: value for key, value in given.items() if key in own}
    return _validated(tree, source, (), {}), tuple(key for key in given if key not in own)


def with_search_of(config: Config, other: Config, source: str) -> Config:
    """Return the configuration with the method and the section `search` of another one.

    Args:
        config: The configuration.
        other: The configuration with the other method and section.
        source: Name of the other one, for error messages.

    Raises:
        ConfigError: The section does not fit the configuration.
    """
    theirs = _without_sweep(other)
    tree = _without_sweep(config) | {"method": other.method, "search": theirs.get("search", {})}
    return _validated(tree, source, (), {})


def _without_sweep(config: Config) -> dict[str, Any]:
    """Return what a configuration sets, without a sweep, as nested dictionaries of plain values."""
    tree: dict[str, Any] = config.model_dump(
        mode="json", by_alias=True, exclude_unset=True, exclude={"sweep"}
    )
    return tree


def _validated(
    tree: Mapping[str, Any], source: str, overrides: Sequence[str], of_file: Mapping[str, Any]
) -> Config:
    config = validate(tree, source, overrides, of_file)
    if config.data.known_side is not None:
        config = with_stems(config, config.data.known_side)
    check_combinations(config, source, overrides)
    return config


def _check_method(
    of_file: dict[str, Any], tree: dict[str, Any], source: str, overrides: Sequence[str]
) -> None:
    """Reject an override of the method if the file has settings of another method."""
    method = tree.get("method")
    schema = schemas_of_methods().get(method) if isinstance(method, str) else None
    given = [override for override in overrides if override.partition("=")[0] == "method"]
    section, merged = of_file.get("search"), tree.get("search")
    if not given or schema is None or not isinstance(section, dict) or not isinstance(merged, dict):
        return
    foreign = [  # keys that no override has replaced
        key
        for key in section
        if key in merged and not is_known(schema, ["search", key]) and known_methods(f"search.{key}")
    ]
    if foreign:
        example = example_file(str(method))
        is_default = source == str(default_file())
        where = f"without --config the settings come from {source}, which" if is_default else source
        raise ConfigError(
            f"{where} sets search.{printable(foreign[0])}, which belongs to another method",
            field=shown_override(given[-1]),
            remedy=f"give --config with a file for {method}, such as {example}",
        )


def _check_sweep_section(of_file: dict[str, Any], source: str, overrides: Sequence[str]) -> None:
    """Reject overrides of a sweep's settings if neither the file nor an override has its space."""
    keys = [override.partition("=")[0] for override in overrides]
    if of_file.get("sweep") is not None or any(
        f"{key}.".startswith("sweep.space.") or key == "sweep" for key in keys
    ):
        return
    for key, override in zip(keys, overrides, strict=True):
        if key.startswith("sweep."):
            example = default_file().with_name("sweep_digits.yaml")
            raise ConfigError(
                f"{source} has no sweep section",
                field=shown_override(override),
                remedy=f"give --config with a file that has one, such as {example}",
            )


def with_stems(config: Config, side: int) -> Config:
    """Return the configuration with every stem `auto` replaced by the one that fits the pictures.

    The replaced stems are hashed and recorded. They are not marked as set, so that a sweep's trial with pictures of
    another size chooses its own stem.

    Args:
        config: The configuration.
        side: Side of the pictures, in pixels.

    Raises:
        ConfigError: A network has too few channels for its stem.

    Example:
        >>> config = load(None, ["data.name=folder", "data.root=photos"])
        >>> config.search.stem, with_stems(config, 224).search.stem, with_stems(config, 32).retrain.stem
        ('auto', 'imagenet', 'cifar')
    """
    stem = "cifar" if side <= SMALL_SIDE else "imagenet"
    sections = {}
    for name in ("search", "retrain"):
        section = getattr(config, name)
        if section.stem != "auto":
            continue
        if section.init_channels < MIN_STEM_CHANNELS[stem]:
            raise ConfigError(
                f"{section.init_channels} is too small for the stem of pictures of {side}x{side} pixels",
                field=f"{name}.init_channels",
                remedy=f"use {MIN_STEM_CHANNELS[stem]} or more",
            )
        sections[name] = section.model_copy(update={"stem": stem})
        sections[name].model_fields_set.discard("stem")
    return config.model_copy(update=sections)


def to_yaml(config: Config) -> str:
    """Return the whole configuration as YAML, defaults included. `load` returns an equal configuration from it."""
    return dump(to_tree(config))


def to_tree(config: Config) -> dict[str, Any]:
    """Return the whole configuration as nested dictionaries of plain values, as in its file."""
    tree = config.model_dump(mode="json", by_alias=True)
    if config.sweep is None:
        del tree["sweep"]
    else:
        for name in ("search", "retrain"):  # a trial with pictures of another size chooses its own stem
            if "stem" not in getattr(config, name).model_fields_set:
                tree[name]["stem"] = "auto"
        space = {  # without the kinds that are not set
            key: p.model_dump(by_alias=True, exclude_unset=True) for key, p in config.sweep.space.items()
        }
        tree["sweep"]["space"] = space
    return tree


def without_passwords(config: Config) -> Config:
    """Return the configuration without the passwords in the addresses of its stores.

    Example:
        >>> config = load(None, ["tracking.uri=http://me:secret@host:5000"])
        >>> without_passwords(config).tracking.uri
        'http://host:5000'
    """
    if config.tracking.uri is not None:
        tracking = config.tracking.model_copy(update={"uri": without_secrets(config.tracking.uri)})
        config = config.model_copy(update={"tracking": tracking})
    if config.sweep is not None and config.sweep.storage is not None:
        sweep = config.sweep.model_copy(update={"storage": without_secrets(config.sweep.storage)})
        config = config.model_copy(update={"sweep": sweep})
    return config


def run_hash(config: Config, job: str, **extra: str) -> str:
    """Return ten hex digits that identify the settings, and the plugins, on which a job's result depends.

    All loaded plugins count, whether the settings name something of them or not, because only a plugin's own code
    knows what it changes.

    Args:
        config: The configuration.
        job: "search", "retrain", "sweep", "benchmark", "rank" or "versus".
        extra: Other inputs on which the result depends, such as the genotype of a retraining.
    """
    # The networks of other spaces may depend on the settings of the space, not only on the genotype.
    space = {"space"} if config.space.name != DEFAULT_SPACE else set()
    decisive = config.model_dump(mode="json", include=set(_HASHED[job]) | space)
    for key in _NOT_HASHED_DATA:
        del decisive["data"][key]
    for path, neutral in (_ADDED[""] | _ADDED.get(config.method, {})).items():
        section, key = path.split(".")
        if decisive.get(section, {}).get(key, _NOTHING) == neutral:
            del decisive[section][key]
    for key in _NOT_HASHED_SWEEP if job == "sweep" else ():
        del decisive["sweep"][key]
    if (
        "search" in decisive
        and "retrain" not in decisive
        and considers_costs(config)
        and not config.trains_target
    ):
        sizes = {"init_channels", "layers", "stem", "op_batchnorm"}
        decisive["target"] = config.retrain.model_dump(mode="json", include=sizes)
    if decisive["data"]["root"] is not None and not is_remote(decisive["data"]["root"]):
        decisive["data"]["root"] = str(Path(decisive["data"]["root"]).expanduser().resolve())
    if decisive.get("search", {}).get("latency_table") is not None:
        decisive["search"]["latency_table"] = _digest_of(decisive["search"]["latency_table"])
    if digests := plugin_digests():
        decisive["plugins"] = digests
    text = json.dumps({"job": job, **decisive, **extra}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _digest_of(file: str) -> str:
    """Return the digest of a file's content, wherever it is. A file that cannot be read is refused by the job."""
    try:
        return hashlib.sha256(read_at_most(Path(file).expanduser(), RECORD_BYTES)).hexdigest()
    except (OSError, ValueError):
        return file


def flat_params(config: Config, sections: Sequence[str]) -> dict[str, Any]:
    """Return the settings of some sections for MLflow, as "section.key" -> value."""
    tree = config.model_dump(mode="json")
    params: dict[str, Any] = {"seed": config.seed, "method": config.method}
    for section in sections:
        for key, value in tree[section].items():
            params[f"{section}.{key}"] = ",".join(map(str, value)) if isinstance(value, list) else value
    if config.sweep is not None and "sweep" in sections:
        # The address of a database may contain a password.
        del params["sweep.space"], params["sweep.points"], params["sweep.storage"]
        params |= {f"sweep.space.{key}": str(parameter) for key, parameter in config.sweep.space.items()}
    return params


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    source = shown_override(override)
    if not equals or not all(key.split(".")):
        raise ConfigError(
            "not of the form key.path=value", field=source, remedy="write for example search.epochs=10"
        )
    if not _is_utf8(override):
        raise ConfigError(
            f"{text!a} is not UTF-8",
            field=f"{origin_of(override)} {key}",
            remedy="rename the file or folder that it names",
        )
    try:
        value = _text(text) if is_text(key) else parse(text)
    except NOT_YAML as error:
        raise ConfigError(f"the value is not YAML: {describe_error(error)}", field=source) from None
    _set_value(tree, key, value, source)


def _text(value: str) -> str | None:
    """Return the value of a text key as it was written, because a path may contain special characters of YAML.

    Example:
        >>> _text("/data/my pics #1"), _text("2024-01-01"), _text("~"), _text("null"), _text("'null'")
        ('/data/my pics #1', '2024-01-01', '~', None, 'null')
        >>> _text("'a' and 'b'")
        "'a' and 'b'"
    """
    if value in ("", "null"):
        return None
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        with contextlib.suppress(YAMLError):  # such as "'a' and 'b'"
            unquoted = parse(value)
            return unquoted if isinstance(unquoted, str) else value
    return value


def _is_utf8(text: str) -> bool:
    """Return whether a command-line argument was UTF-8. Python represents other bytes by lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _set_value(tree: dict[str, Any], key: str, value: Any, source: str) -> None:
    *parents, last = key.split(".")
    if len(parents) > CONFIG_DEPTH:
        raise ConfigError(
            f"more than {CONFIG_DEPTH} names in the key",
            source=f"{source:.80}",
            remedy="write key.path=value",
        )
    for name in parents:
        child = tree.setdefault(name, {})
        if child is None:
            child = tree[name] = {}
        if not isinstance(child, dict):
            raise ConfigError("a value, not a section", field=printable(name), source=source)
        tree = child
    tree[last] = value
