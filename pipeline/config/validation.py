"""Validation of settings against the schema. Each mistake names the file or the override that caused it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pydantic

from istanas.errors import ConfigError
from istanas.limits import CONFIG_ERRORS
from istanas.methods import DEFAULT_METHOD, METHODS
from istanas.registry import Registry
from istanas.space import DEFAULT_SPACE, SPACES
from pipeline.base.redaction import without_secrets
from pipeline.config.combinations import conflicts_of
from pipeline.config.errors import fields_of, one_error
from pipeline.config.keys import is_known, known_keys, schemas_of_methods, schemas_of_spaces
from pipeline.config.schema import Config, config_class
from pipeline.config.sections import find


def validate(
    tree: Mapping[str, Any], source: str, overrides: Sequence[str], of_file: Mapping[str, Any]
) -> Config:
    """Return the configuration of a tree of settings, after checking each setting individually.

    Args:
        tree: The file's settings with the overrides applied.
        source: The file.
        overrides: The overrides as they were written.
        of_file: The file's settings without the overrides.

    Raises:
        ConfigError: A key is unknown, or a value has the wrong type or range.
    """
    given = {override.partition("=")[0]: override for override in overrides}
    schema = schema_of(tree, source, given)
    try:
        return schema.model_validate(tree)
    except pydantic.ValidationError as error:
        found = error.errors()
        mistakes = [
            _mistake(e, schema).in_source(_source_of(source, e["loc"], given, of_file))
            for e in found[:CONFIG_ERRORS]
        ]
        if len(found) > CONFIG_ERRORS:
            mistakes.append(ConfigError(f"{len(found) - CONFIG_ERRORS} more mistakes", source=source))
        raise one_error(mistakes) from None


def schema_of(
    tree: Mapping[str, Any], source: str, given: Mapping[str, str] = MappingProxyType({})
) -> type[Config]:
    """Return the schema of the tree's method and search space, which determine all other keys.

    Args:
        tree: The settings.
        source: The file.
        given: The key of each override, and the override as it was written.

    Raises:
        ConfigError: The method or the space is not registered.
    """
    section = tree.get("space")
    chosen: dict[str, tuple[Registry[Any], Any]] = {
        "method": (METHODS, tree.get("method", DEFAULT_METHOD)),
        "space.name": (
            SPACES,
            section.get("name", DEFAULT_SPACE) if isinstance(section, Mapping) else DEFAULT_SPACE,
        ),
    }
    for field, (registry, name) in chosen.items():
        try:
            find(registry, name)
        except ConfigError as error:
            raise error.in_source(_source_of(source, field.split("."), given, {})) from None
    return config_class(*(name for _, name in chosen.values()))


def check_combinations(config: Config, source: str, overrides: Sequence[str]) -> None:
    """Check that the settings of a configuration can be combined.

    Raises:
        ConfigError: They cannot be combined.
    """
    try:
        config.space.build()
        conflicts: list[ConfigError] = [*conflicts_of(config)]
    except ConfigError as error:
        conflicts = [error]
    if conflicts:
        raise one_error([each.in_source(_source_of_conflict(source, each, overrides)) for each in conflicts])


def printable(key: Any) -> str:
    """Return a key as it was written, or escaped if it would break the line of a message."""
    return str(key) if str(key).isprintable() else repr(key)


class Keyword(str):
    """An override "key.path=value" that was a keyword argument of a Python function, and is named so in messages."""

    __slots__ = ()


def shown_override(override: str) -> str:
    """Return an override as a message quotes it: shortened, and without passwords.

    Example:
        >>> shown_override("sed=3"), shown_override(Keyword("sed=3"))
        ("--set 'sed=3'", "keyword argument 'sed=3'")
    """
    return f"{origin_of(override)} {without_secrets(override)!r:.80}"


def origin_of(override: str) -> str:
    """Return how the user gave an override: "--set", or "keyword argument"."""
    return "keyword argument" if isinstance(override, Keyword) else "--set"


def _source_of(
    source: str, location: Sequence[Any], given: Mapping[str, str], of_file: Mapping[str, Any]
) -> str:
    """Return the override that caused a mistake, or else the file.

    Args:
        source: The file.
        location: The key of the mistake, as a list of names.
        given: The key of each override, and the override as it was written.
        of_file: The file's settings without the overrides.
    """
    path = ".".join(str(part) for part in location)
    found = source
    for key, override in given.items():
        # `serach.epochs=3` creates the section `serach`, for which pydantic reports the error.
        created = key.startswith(f"{path}.") and not _contains(of_file, location)
        if path == key or path.startswith(f"{key}.") or created:
            found = shown_override(override)
    return found


def _contains(tree: Any, location: Sequence[Any]) -> bool:
    for part in location:
        if not isinstance(tree, Mapping) or part not in tree:
            return False
        tree = tree[part]
    return True


def _source_of_conflict(source: str, conflict: ConfigError, overrides: Sequence[str]) -> str:
    """Return the overrides of the conflict's keys. If there are none, return the file, and mention any overrides."""
    keys = fields_of(conflict)
    named = [override for override in overrides if override.partition("=")[0] in keys]
    if named:
        return " ".join(map(shown_override, named))
    return f"{source} with {origin_of(overrides[-1])}" if overrides else source


def _mistake(error: Any, schema: type[Config]) -> ConfigError:
    """Convert one of pydantic's errors to a ConfigError."""
    location = error["loc"]
    field = ".".join(
        printable(part) for part in location if not str(part).startswith(("function-", "constrained-"))
    )
    if error["type"] == "extra_forbidden":
        return ConfigError("unknown key", field=field, remedy=_hint(location, schema))
    value = f"{without_secrets(repr(error.get('input'))):.60}"
    if error["type"] in ("model_type", "dict_type"):
        example = next(iter(known_keys(schema, location)), "key")
        return ConfigError(
            f"{value} is not a section", field=field, remedy=f"give its keys, such as {field}.{example}"
        )
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, ValueError) and cause.args and isinstance(cause.args[0], ConfigError):
        own = cause.args[0]  # raised by a validator of the schema
        return ConfigError(own.problem, field=field, remedy=own.remedy)
    reason = error["msg"]
    return ConfigError(
        f"{value} is invalid: {reason[:1].lower()}{reason[1:]}",
        field=field,
        remedy="put it in quotes" if error["type"] == "string_type" else None,
    )


def _hint(location: Sequence[Any], schema: type[Config]) -> str:
    """Return a hint about what to write instead of an unknown key."""
    # The schemas of all methods have the default space, whose keys belong to the space and not to a method.
    if location[0] != "space":
        for method, other in schemas_of_methods().items():
            if other is not schema and is_known(other, location):
                return f"it belongs to method: {method}"
    for space, other in schemas_of_spaces().items():
        if is_known(other, location):
            return f"it belongs to space.name: {space}"
    known = known_keys(schema, location[:-1])
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
