"""The keys of a configuration: which methods and spaces have a key, its type, and which key resembles a text."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pydantic

from istanas.methods import DEFAULT_METHOD, METHODS
from istanas.space import DEFAULT_SPACE, SPACES
from pipeline.config.schema import Config, Parameter, config_class


def value_at(config: Config, key: str) -> Any:
    """Return the value at "key.path", or None if the configuration has no such key.

    Example:
        >>> from pipeline.config.load import load
        >>> value_at(load(None), "search.epochs"), value_at(load(None), "search.train_epochs")
        (50, None)
    """
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part, None)
    return found


def schemas_of_methods() -> dict[str, type[Config]]:
    """Return the schema of every method in the default search space."""
    return {method: config_class(method) for method in METHODS}


def schemas_of_spaces() -> dict[str, type[Config]]:
    """Return the schema of every search space with the default method."""
    return {space: config_class(DEFAULT_METHOD, space) for space in SPACES}


def all_schemas() -> list[type[Config]]:
    """Return schemas that together have every key."""
    others = [schema for space, schema in schemas_of_spaces().items() if space != DEFAULT_SPACE]
    return [*schemas_of_methods().values(), *others]


def known_methods(key: str) -> list[str]:
    """Return the methods that have "key.path" in some search space.

    Example:
        >>> known_methods("search.max_search_epochs"), known_methods("search.epoch")
        (['one_stage'], [])
    """
    path = key.split(".")
    if path[0] == "space":
        return list(METHODS) if known_spaces(key) else []
    return [name for name, schema in schemas_of_methods().items() if is_known(schema, path)]


def known_spaces(key: str) -> list[str]:
    """Return the search spaces that have "key.path"."""
    return [name for name, schema in schemas_of_spaces().items() if is_known(schema, key.split("."))]


def nearest_key(key: str) -> str:
    """Return the settable key whose spelling is closest.

    Example:
        >>> nearest_key("search.epoch")
        'search.epochs'
    """
    known = {
        f"{name}.{field}"
        for schema in all_schemas()
        for name, section in schema.model_fields.items()
        if name != "sweep" and (model := section_of(section.annotation)) is not None
        for field in model.model_fields
    } | {"seed", "method"}
    return difflib.get_close_matches(key, sorted(known), n=1, cutoff=0)[0]


def section_of(annotation: Any) -> type[pydantic.BaseModel] | None:
    """Return the section that a key's annotation names, optional or not; None if the key is a value."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, pydantic.BaseModel):
            return part
    return None


def known_keys(schema: type[Config], location: Sequence[Any]) -> list[str]:
    """Return the keys of a section. The list is empty for a value, and for a sweep's space, which takes any key."""
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


def is_known(schema: type[Config], location: Sequence[Any]) -> bool:
    """Return whether a schema has a key."""
    *sections, key = location
    return key in known_keys(schema, sections)


def is_text(key: str) -> bool:
    """Return whether the value of "key.path" is a string, optional or not.

    Example:
        >>> is_text("data.root"), is_text("runtime.workers")
        (True, False)
    """
    for schema in all_schemas():
        model: Any = schema
        *parents, last = key.split(".")
        for name in parents:
            field = model.model_fields.get(name) if model is not None else None
            model = None if field is None else section_of(field.annotation)
        if model is not None and last in model.model_fields:
            return set(_types(model.model_fields[last].annotation)) - {type(None)} == {str}
    return False


def _types(annotation: Any) -> Iterator[Any]:
    """Yield the types of an annotation, without their constraints."""
    if get_origin(annotation) is Annotated:
        yield from _types(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _types(part)
    else:
        yield annotation
