"""Reads configurations: YAML files and `--set key.path=value`, checked against the schema. It fails here or never.

Unknown keys, wrong types and impossible combinations are `ConfigError`s that name file, field and remedy.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pydantic
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import CollectionNode

from istanas.errors import ConfigError
from istanas.limits import CONFIG_BYTES, CONFIG_DEPTH, CONFIG_ERRORS, CONFIG_VALUES, SMALL_SIDE, read_at_most
from pipeline.base.redaction import without_secrets
from pipeline.config.schema import DEFAULT_METHOD, SCHEMAS, Config, OneStageConfig, Parameter

_HASHED = {
    "search": ("method", "seed", "data", "space", "search"),
    "retrain": ("seed", "data", "retrain"),
    "sweep": ("method", "seed", "data", "space", "search", "retrain", "sweep"),
}
_NOT_HASHED_DATA = ("download", "cache_dir", "allow_left_out")
# Settings that were added after version 0.1, with the value under which they change nothing. With that value they are
# left out of the hash, so that the runs of earlier versions keep theirs.
_ADDED = {"data.background": "#ffffff"}
_NOT_HASHED_SWEEP = (
    "storage",
    "max_concurrent",
    "cpus_per_trial",
    "gpus_per_trial",
    "max_failures",
    "max_restarts",
)


def default_file() -> Path:
    """The configuration that job commands use when none is named: the digits that scikit-learn ships."""
    return Path(__file__).resolve().parents[2] / "tune_configs" / "digits_quickstart.yaml"


def load(
    path: str | Path | None, overrides: Sequence[str] = (), sections: Mapping[str, Any] | None = None
) -> Config:
    """Read a YAML file, apply overrides, validate.

    Args:
        path: the file; None for the schema's defaults.
        overrides: "key.path=value" each, the value in YAML, or of a text key the text itself.
        sections: whole sections in the place of the file's.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: one line per mistake, each with file, field, value, remedy.
    """
    source = "command line" if path is None else str(path)
    tree = ({} if path is None else _read_yaml(Path(path))) | dict(sections or {})
    of_file = copy.deepcopy(tree)
    for override in overrides:
        _apply_override(tree, override)
    _check_method(of_file, tree, source, overrides)
    _check_sweep_section(of_file, source, overrides)
    return _validated(tree, source, overrides, of_file)


def with_settings(config: Config, settings: Mapping[str, Any], source: str) -> Config:
    """The configuration of one trial of a sweep: the sweep's own with other values at some keys, and without a sweep.

    What the sweep's file did not set has the default of the trial's method.

    Args:
        config: of the sweep.
        settings: "key.path" -> value.
        source: what to blame for a value that is refused.

    Raises:
        ConfigError: as `load` does.
    """
    without: Any = {"sweep": True, "runtime": {"address"}}  # a trial is where it is
    tree = config.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude=without)
    for key, value in settings.items():
        _set_value(tree, key, value, source)
    return _validated(tree, source, ())


def value_at(config: Config, key: str) -> Any:
    """What a configuration has at "key.path"; None if it has no such key.

    Example:
        >>> value_at(load(None), "search.epochs"), value_at(load(None), "search.train_epochs")
        (50, None)
    """
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part, None)
    return found


def known_methods(key: str) -> list[str]:
    """The methods whose schema has "key.path".

    Example:
        >>> known_methods("search.epochs"), known_methods("seed"), known_methods("search.epoch")
        (['two_stage'], ['two_stage', 'one_stage'], [])
    """
    return [name for name, schema in SCHEMAS.items() if _knows(schema, key.split("."))]


def section_of(annotation: Any) -> type[pydantic.BaseModel] | None:
    """Return the section that a key's annotation means, alone or beside None; None if the key is a value."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, pydantic.BaseModel):
            return part
    return None


def nearest_key(key: str) -> str:
    """The settable key that is written most like another.

    Example:
        >>> nearest_key("search.epoch")
        'search.epochs'
    """
    known = {
        f"{name}.{field}"
        for schema in SCHEMAS.values()
        for name, section in schema.model_fields.items()
        if name != "sweep" and (model := section_of(section.annotation)) is not None
        for field in model.model_fields
    } | {"seed", "method"}
    return difflib.get_close_matches(key, sorted(known), n=1, cutoff=0)[0]


def check_batch_sizes(config: Config, jobs: Sequence[str]) -> None:
    """Check that every worker gets two pictures of each batch, which batch norm needs.

    Args:
        config: the configuration.
        jobs: "search", "retrain" or both.

    Raises:
        ConfigError: if it does not.
    """
    workers = config.runtime.worker_range.maximum
    for job in jobs:
        batch_size = getattr(config, job).batch_size
        if batch_size < 2 * workers:
            raise ConfigError(
                f"{job}.batch_size is {batch_size}, of all workers together: {workers} need at least {2 * workers}, "
                "raise it or lower runtime.workers"
            )


def _check_method(
    of_file: dict[str, Any], tree: dict[str, Any], source: str, overrides: Sequence[str]
) -> None:
    """Refuse an override of the method where the file's own settings belong to another one."""
    method = tree.get("method")
    wanted = SCHEMAS.get(method) if isinstance(method, str) else None
    by = [override for override in overrides if override.partition("=")[0] == "method"]
    section, left = of_file.get("search"), tree.get("search")
    if not by or wanted is None or not isinstance(section, dict) or not isinstance(left, dict):
        return
    foreign = [  # what an override has not replaced
        key
        for key in section
        if key in left and not _knows(wanted, ["search", key]) and known_methods(f"search.{key}")
    ]
    if foreign:
        example = default_file().with_name(
            "one_stage_digits.yaml" if method == "one_stage" else default_file().name
        )
        where = f"without --config the settings come from {source}, which" if _is_default(source) else source
        raise ConfigError(
            f"--set {by[-1]!r:.80}: {where} has search.{_printable(foreign[0])}, a setting of another method; give "
            f"--config with a file for {method}, such as {example}"
        )


def _check_sweep_section(of_file: dict[str, Any], source: str, overrides: Sequence[str]) -> None:
    """Refuse single settings of a sweep where nothing says what the sweep varies."""
    keys = [override.partition("=")[0] for override in overrides]
    if of_file.get("sweep") is not None or any(
        f"{key}.".startswith("sweep.space.") or key == "sweep" for key in keys
    ):
        return
    for key, override in zip(keys, overrides, strict=True):
        if key.startswith("sweep."):
            example = default_file().with_name("sweep_digits.yaml")
            raise ConfigError(
                f"--set {without_secrets(override)!r:.80}: {source} has no sweep section; give --config with a file "
                f"that has one, such as {example}"
            )


def _is_default(source: str) -> bool:
    return source == str(default_file())


def _validated(
    tree: dict[str, Any], source: str, overrides: Sequence[str], of_file: dict[str, Any] | None = None
) -> Config:
    """Validate a tree; `of_file` is what the file alone said, which tells the overrides that are to blame."""
    method = tree.get("method", DEFAULT_METHOD)
    schema = SCHEMAS.get(method if isinstance(method, str) else DEFAULT_METHOD, SCHEMAS[DEFAULT_METHOD])
    try:
        config = schema.model_validate(tree)
    except pydantic.ValidationError as error:
        errors = [
            e for e in error.errors() if e["loc"] == ("method",)
        ] or error.errors()  # it decides the schema
        given = {override.partition("=")[0]: override for override in overrides}
        lines = [
            _explain(_blamed(source, e, given, of_file or {}), e, schema) for e in errors[:CONFIG_ERRORS]
        ]
        if len(errors) > CONFIG_ERRORS:
            lines.append(f"{source}: {len(errors) - CONFIG_ERRORS} more mistakes like these")
        raise ConfigError("\n".join(lines)) from None
    if config.data.known_side is not None:
        config = with_stems(config, config.data.known_side)
    _check_combinations(source, config, overrides)
    return config


def with_stems(config: Config, side: int) -> Config:
    """The configuration with the stems that fit the pictures in the place of `auto`.

    Those are hashed and recorded. They do not count as set: a trial of a sweep that changes the pictures' size has
    its own.

    Args:
        config: the configuration.
        side: of the pictures, in pixels.

    Raises:
        ConfigError: if a network is too narrow for its stem.

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
        if stem == "imagenet" and section.init_channels < 2:
            raise ConfigError(
                f"{name}.init_channels is {section.init_channels}: the stem of pictures of {side}x{side} pixels needs "
                "at least 2"
            )
        sections[name] = section.model_copy(update={"stem": stem})
        sections[name].model_fields_set.discard("stem")
    return config.model_copy(update=sections)


def to_yaml(config: Config) -> str:
    """Return the whole configuration as YAML, defaults included; `load` reads it back to an equal one."""
    buffer = io.StringIO()
    _yaml().dump(to_tree(config), buffer)
    return buffer.getvalue()


def to_tree(config: Config) -> dict[str, Any]:
    """Return the whole configuration as nested dictionaries of plain values, as in its file."""
    tree = config.model_dump(mode="json", by_alias=True)
    if config.sweep is None:
        del tree["sweep"]
    else:
        for name in ("search", "retrain"):  # trials with pictures of another size have another stem
            if "stem" not in getattr(config, name).model_fields_set:
                tree[name]["stem"] = "auto"
        # of each parameter's kinds only the one that was given
        space = {
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
    """Ten hex digits that stand for everything that decides a job's result.

    Args:
        config: the configuration.
        job: "search", "retrain" or "sweep".
        extra: what else decides it (the genotype of a retraining).
    """
    decisive = config.model_dump(mode="json", include=set(_HASHED[job]))
    for key in _NOT_HASHED_DATA:
        del decisive["data"][key]
    for path, neutral in _ADDED.items():
        section, key = path.split(".")
        if decisive.get(section, {}).get(key) == neutral:
            del decisive[section][key]
    for key in _NOT_HASHED_SWEEP if job == "sweep" else ():
        del decisive["sweep"][key]
    if decisive["data"]["root"] is not None:
        decisive["data"]["root"] = str(Path(decisive["data"]["root"]).expanduser().resolve())
    text = json.dumps({"job": job, **decisive, **extra}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def flat_params(config: Config, sections: Sequence[str]) -> dict[str, Any]:
    """Short flat settings for MLflow: "section.key" -> value."""
    tree = config.model_dump(mode="json")
    params: dict[str, Any] = {"seed": config.seed, "method": config.method}
    for section in sections:
        for key, value in tree[section].items():
            params[f"{section}.{key}"] = ",".join(map(str, value)) if isinstance(value, list) else value
    if config.sweep is not None and "sweep" in sections:
        del (
            params["sweep.space"],
            params["sweep.points"],
            params["sweep.storage"],
        )  # a database may have a password
        params |= {f"sweep.space.{key}": str(parameter) for key, parameter in config.sweep.space.items()}
    return params


def _yaml() -> YAML:
    # YAML 1.2: 1e-3 is a number; duplicate keys are errors; tags are not objects.
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    return yaml


def _load_yaml(text: str) -> Any:
    """What a text holds, its size known beforehand: nine aliases of nine aliases of ... would fill any memory.

    Raises:
        YAMLError, ValueError, RecursionError: it is none, or holds too much.
    """
    yaml = _yaml()
    root = yaml.compose(text)
    if root is None:
        return None
    _size_of(root, {})
    return yaml.constructor.construct_document(root)


def _size_of(node: Any, known: dict[int, int], depth: int = 0) -> int:
    """Keys and values in a node, aliases followed."""
    if depth > CONFIG_DEPTH:
        raise ValueError(f"more than {CONFIG_DEPTH} sections and lists inside one another")
    if id(node) not in known:
        children = node.value if isinstance(node, CollectionNode) else []
        if any(isinstance(child, tuple) and isinstance(child[0], CollectionNode) for child in children):
            raise ValueError("a list or a section as a key, write a name")
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = 1 + sum(_size_of(part, known, depth + 1) for part in parts)
        if known[id(node)] > CONFIG_VALUES:
            raise ValueError(f"more than {CONFIG_VALUES} keys and values")
    return known[id(node)]


def _yaml_problem(error: Exception) -> str:
    """What is wrong with a text, and where: ruamel's own message calls the text `<unicode string>`."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark, problem = error.problem_mark, error.problem or error.context or "cannot be read"
        return f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(problem.split())}"
    return " ".join(str(error).replace('in "<unicode string>", ', "").split())


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = _load_yaml(read_at_most(path, CONFIG_BYTES, pipe=True).decode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}), give an existing YAML file") from None
    except (YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {_yaml_problem(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: holds a {type(tree).__name__}, give sections such as `search:` with their keys"
        )
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {override!r}: write key.path=value, such as search.epochs=10")
    if not _is_utf8(override):
        raise ConfigError(f"--set {key}: its value {text!a} is not UTF-8, rename what it names")
    try:
        value = _text(text) if _is_text(key) else _load_yaml(text)
    except (YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {_yaml_problem(error)}") from None
    _set_value(tree, key, value, f"--set {override!r}")


def _text(value: str) -> str | None:
    """The value of a text key as it was written, whatever it means in YAML: paths hold anything.

    Example:
        >>> _text("/data/my pics #1"), _text("2024-01-01"), _text("~"), _text("null"), _text("'null'")
        ('/data/my pics #1', '2024-01-01', '~', None, 'null')
        >>> _text("'a' and 'b'")
        "'a' and 'b'"
    """
    if value in ("", "null"):
        return None
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        with contextlib.suppress(YAMLError):  # text that begins and ends with a quotation mark
            unquoted = _load_yaml(value)
            return unquoted if isinstance(unquoted, str) else value
    return value


def _is_text(key: str) -> bool:
    """Whether "key.path" is one of text, and of nothing else."""
    for schema in SCHEMAS.values():
        model: Any = schema
        *parents, last = key.split(".")
        for name in parents:
            field = model.model_fields.get(name) if model is not None else None
            model = None if field is None else section_of(field.annotation)
        if model is not None and last in model.model_fields:
            return set(_types(model.model_fields[last].annotation)) - {type(None)} == {str}
    return False


def _types(annotation: Any) -> Iterator[Any]:
    """What an annotation allows, beside what is asked of it."""
    if get_origin(annotation) is Annotated:
        yield from _types(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _types(part)
    else:
        yield annotation


def _is_utf8(text: str) -> bool:
    """Whether a text from the command line is one: other bytes could be written into no file."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _set_value(tree: dict[str, Any], key: str, value: Any, source: str) -> None:
    *parents, last = key.split(".")
    if len(parents) > CONFIG_DEPTH:
        raise ConfigError(f"{source:.80}: more than {CONFIG_DEPTH} names; write key.path=value")
    for name in parents:
        child = tree.setdefault(name, {})
        if child is None:
            child = tree[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{source}: {_printable(name)} is a value, not a section")
        tree = child
    tree[last] = value


def _blamed(source: str, error: Any, given: dict[str, str], of_file: dict[str, Any]) -> str:
    """The override that one of pydantic's errors is due to, else the file.

    Args:
        source: the file.
        error: one of pydantic's errors.
        given: key of an override -> the override as it was written.
        of_file: the file's own settings.
    """
    path = ".".join(str(part) for part in error["loc"])
    blamed = source
    for key, override in given.items():
        # `serach.epochs=3` creates the section `serach`, at which the error lies.
        created = key.startswith(f"{path}.") and not _stands_in(of_file, error["loc"])
        if path == key or path.startswith(f"{key}.") or created:
            blamed = f"--set {without_secrets(override)!r:.80}"
    return blamed


def _stands_in(tree: Any, location: Sequence[Any]) -> bool:
    for part in location:
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def _explain(source: str, error: Any, schema: type[Config]) -> str:
    """One line for one of pydantic's errors."""
    field = ".".join(
        _printable(part) for part in error["loc"] if not str(part).startswith(("function-", "constrained-"))
    )
    if error["type"] == "extra_forbidden":
        known = _known_keys(schema, error["loc"][:-1])
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        others = [name for name, other in SCHEMAS.items() if other is not schema]
        hint = next((f"it belongs to method: {m}" for m in others if _knows(SCHEMAS[m], error["loc"])), hint)
        return f"{source}: {field}: unknown key, {hint}"
    if error["type"] in ("model_type", "dict_type"):
        example = next(iter(_known_keys(schema, error["loc"])), "key")
        error = {**error, "msg": f"a section, give its keys, such as {field}.{example}"}
    if error["loc"] == ("method",):
        error = {**error, "msg": f"choose {' or '.join(SCHEMAS)}"}
    value = without_secrets(repr(error.get("input")))
    reason = error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_type":
        reason += ", put it in quotes"
    return f"{source}: {field}: {value:.60} is refused: {reason[:1].lower()}{reason[1:]}"


def _printable(key: Any) -> str:
    """A key as it was written, or escaped if it would break the line of the message."""
    return str(key) if str(key).isprintable() else repr(key)


def _known_keys(schema: type[Config], location: Sequence[Any]) -> list[str]:
    """The keys that a section has; a sweep's space is a dictionary of sections, whose keys are any."""
    model: Any = schema
    for part in location:
        if model is dict:
            model = Parameter
        else:
            field = model.model_fields.get(part)
            annotation = None if field is None else field.annotation
            model = dict if get_origin(annotation) is dict else section_of(annotation)
        if model is None:
            return []
    if model is dict:
        return []
    return [field.alias or name for name, field in model.model_fields.items()]


def _knows(schema: type[Config], location: Sequence[Any]) -> bool:
    *sections, key = location
    return key in _known_keys(schema, sections)


def _blamed_for_combination(source: str, problem: str, overrides: Sequence[str]) -> str:
    """The overrides of the keys that a problem names; without any, file and overrides together."""
    keys = set(re.findall(r"[a-z_]+(?:\.[a-z0-9_]+)+", problem))
    named = [override for override in overrides if override.partition("=")[0] in keys]
    if named:
        return " ".join(f"--set {without_secrets(override)!r:.80}" for override in named)
    return f"{source} with --set" if overrides else source


def _check_combinations(source: str, config: Config, overrides: Sequence[str]) -> None:
    try:
        config.space.cell_space()
    except ConfigError as error:
        raise ConfigError(f"{_blamed_for_combination(source, str(error), overrides)}: {error}") from None
    problems = []
    for name in ("search", "retrain"):
        section = getattr(config, name)
        if section.lr_min > section.lr:
            problems.append(f"{name}.lr_min is {section.lr_min}, above {name}.lr = {section.lr}: lower it")
        if section.stem == "imagenet" and section.init_channels < 2:
            problems.append(
                f"{name}.init_channels is {section.init_channels}: stem imagenet needs at least 2"
            )
    if (
        config.runtime.address is not None
        and config.runtime.worker_range.maximum == 0
        and config.sweep is None
    ):
        problems.append("runtime.address is set and runtime.workers is 0: give --workers N")
    warm = [("retrain.warmup_epochs", config.retrain.warmup_epochs, "retrain.epochs", config.retrain.epochs)]
    if isinstance(config, OneStageConfig):
        s = config.search
        warm.append(
            ("search.warmup_epochs", s.warmup_epochs, "search.max_search_epochs", s.max_search_epochs)
        )
    problems += [f"{key} is {n}: choose less than {other} = {m}" for key, n, other, m in warm if n >= m]
    if config.retrain.nesterov and config.retrain.momentum == 0:
        problems.append("retrain.nesterov is true: it needs retrain.momentum above 0")
    size = config.data.image_size
    if config.data.name != "folder" and size is not None and size > SMALL_SIDE:
        problems.append(f"data.image_size is {size}: {config.data.name} takes at most {SMALL_SIDE}")
    called = config.tracking.name
    if called is not None and (called.strip() in ("", ".", "..") or any(c in called for c in "/\\\0")):
        problems.append(
            f"tracking.name is {called!r:.60}: it names a folder in runtime.runs_dir, give one that is not blank and "
            "has no slashes"
        )
    problems += _sweep_problems(config)
    if config.data.name == "folder" and config.data.root is None:
        problems.append("data.root is missing: name the picture folder, --set data.root=DIR")
    if config.runtime.device == "cpu" and config.runtime.precision == "bf16":
        problems.append(
            "runtime.precision is bf16 on runtime.device cpu: slower and unsafe there, choose fp32"
        )
    if problems:
        raise ConfigError(
            "\n".join(f"{_blamed_for_combination(source, p, overrides)}: {p}" for p in problems)
        )


def _sweep_problems(config: Config) -> list[str]:
    """What of a sweep's settings does not fit together; its space is checked by `sweep_space`."""
    sweep = config.sweep
    if sweep is None:
        return []
    problems = []
    if len(set(sweep.objectives)) < len(sweep.objectives) or "top1" not in sweep.objectives:
        problems.append(f"sweep.objectives is {sweep.objectives}: give top1, and what else at most once")
    if len(sweep.objectives) > 1:
        if sweep.scheduler != "none":
            problems.append(
                "sweep.scheduler is asha with several sweep.objectives: no early figure ranks them, set none"
            )
    elif sweep.searcher == "nsga2":
        problems.append("sweep.searcher is nsga2 with one objective: choose tpe, or add to sweep.objectives")
    if sweep.start_from is not None and sweep.searcher == "nsga2":
        problems.append(
            "sweep.start_from is set with sweep.searcher nsga2, which learns from its own trials only"
        )
    if config.data.holdout == 0 and (sweep.objective == "retrained" or config.method == "one_stage"):
        problems.append("data.holdout is 0: the objective is measured on it, set data.holdout=0.1")
    if config.runtime.worker_range.elastic:
        problems.append(f"runtime.workers is {config.runtime.workers}: trials need a fixed number, such as 2")
    gpus = sweep.gpus_per_trial
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        problems.append(f"sweep.gpus_per_trial is {gpus}: give a whole number, or a fraction below 1")
    if gpus and config.runtime.device == "cpu":
        problems.append(f"sweep.gpus_per_trial is {gpus} on runtime.device cpu: set 0, or device auto")
    if gpus == 0 and config.runtime.device == "cuda":
        problems.append("sweep.gpus_per_trial is 0 on runtime.device cuda: give each trial a part of one")
    if config.runtime.worker_range.maximum > 1 and "gpus_per_trial" in sweep.model_fields_set:
        problems.append("sweep.gpus_per_trial is set with several workers: each has one GPU, leave it out")
    return problems
