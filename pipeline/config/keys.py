"""The keys of a configuration: which methods have a key, what its type is, and which known key resembles a text."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pydantic

from pipeline.config.schema import SCHEMAS, Config, Parameter


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


def known_methods(key: str) -> list[str]:
    """Return the methods whose schema has "key.path".

    Example:
        >>> known_methods("search.epochs"), known_methods("seed"), known_methods("search.epoch")
        (['two_stage'], ['two_stage', 'one_stage'], [])
    """
    return [name for name, schema in SCHEMAS.items() if is_known(schema, key.split("."))]


def nearest_key(key: str) -> str:
    """Return the settable key whose spelling is closest.

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
    """Yield the types of an annotation, without their constraints."""
    if get_origin(annotation) is Annotated:
        yield from _types(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _types(part)
    else:
        yield annotation
