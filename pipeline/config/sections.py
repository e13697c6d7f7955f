"""Sections of a configuration that are generated from settings classes, such as those of search methods and spaces.

A settings class is a dataclass. Its annotations hold types and ranges, and the part `Args` of its docstring describes
each field. The generated section has a key for each field that is not excluded.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import re
from collections.abc import Callable, Collection, Mapping
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler

from istanas.errors import ConfigError, IstanasError
from istanas.registry import Registered, Registry
from istanas.settings import Unit

UNIT, WORDS = "x-unit", "x-type"  # extensions of a key's JSON schema


class Section(BaseModel):
    """A section of a configuration. Unknown keys are rejected, and values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)

    locator: ClassVar[tuple[str, ...]] = ()
    """How pickled objects refer to a generated class, which has no name to import: a function that was registered with
    `found_by`, and its arguments."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not self.locator:
            return super().__reduce_ex__(protocol)
        return _restored, (self.locator, self.__getstate__())


S = TypeVar("S", bound=Section)
T = TypeVar("T")
Find = Callable[..., type[Section]]
_finders: dict[str, Find] = {}


def found_by(find: Find) -> None:
    """Register a function that returns a generated class, so that objects of that class can be pickled."""
    _finders[find.__name__] = find


def _restored(locator: tuple[str, ...], state: dict[Any, Any]) -> Section:
    finder, *names = locator
    section = _finders[finder](*names)
    restored = section.__new__(section)
    restored.__setstate__(state)
    return restored


def unit(name: str) -> Any:
    """Return an annotation that attaches the unit of a number, which is shown beside its range."""
    return Field(json_schema_extra={UNIT: name})


def in_words(type_: str) -> Any:
    """Return an annotation that attaches a description of the type that is more precise than the JSON schema."""
    return Field(json_schema_extra={WORDS: type_})


def checked(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a validator that converts a ConfigError of `check` to a ValueError, which pydantic requires."""

    def validate(value: Any) -> Any:
        try:
            return check(value)
        except ConfigError as error:
            raise ValueError(error) from None

    return validate


class NameIn:
    """An annotation of a text that must be a name in a registry. Descriptions list the names that are registered.

    Args:
        registry: The registry.
    """

    def __init__(self, registry: Registry[Any]) -> None:
        self._registry = registry

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return AfterValidator(checked(self._check)).__get_pydantic_core_schema__(source, handler)

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "enum": list(self._registry), WORDS: names_in(self._registry)}

    def _check(self, name: str) -> str:
        find(self._registry, name)
        return name


def find(registry: Registry[T], name: Any) -> T:
    """Return the entry of a name in a configuration.

    Raises:
        ConfigError: If the name is not registered. The error also suggests a missing plugin.
    """
    try:
        return registry.find(name)
    except ConfigError as error:
        remedy = f"{error.remedy}, or name the plugin that registers it with --plugin FILE"
        raise ConfigError(error.problem, field=error.field, remedy=remedy) from None


def names_in(registry: Registry[Any]) -> str:
    """Return the names in a registry and who registered them, in words."""
    return f"one of {', '.join(f'{name} ({registry.origin(name)})' for name in registry)}"


def section_from(
    settings: type,
    base: type[S],
    *,
    locator: tuple[str, ...],
    exclude: Collection[str] = (),
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
) -> type[S]:
    """Return the section with the fields of a settings class as keys.

    Args:
        settings: The settings class, a dataclass whose fields have defaults.
        base: The base class of the section.
        locator: See `Section`.
        exclude: Fields that do not become keys.
        before: Other keys that come first, each with its annotation and pydantic's `Field`.
        after: Other keys that come last.

    Raises:
        ConfigError: If a field has the name of another key or of a property of the section, or an impossible type.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Chain:
        ...     '''A chain of blocks.
        ...
        ...     Args:
        ...         blocks: Number of blocks.
        ...     '''
        ...     blocks: int = 6
        >>> section = section_from(Chain, Section, locator=())
        >>> section().blocks, section.model_fields["blocks"].description
        (6, 'Number of blocks.')
    """
    hints = get_type_hints(settings, include_extras=True)
    meanings = descriptions(settings)
    others = {**(before or {}), **(after or {})}
    keys: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        if field.name not in exclude:
            default = _default(field)
            key = key_of(field)
            if key in others or hasattr(base, key):
                raise ConfigError(
                    "the name is taken",
                    field=f"{settings.__name__}.{field.name}",
                    remedy="choose another name",
                )
            keys[key] = (_annotation(hints[field.name]), _field(default, meanings.get(field.name)))
    try:
        section = pydantic.create_model(
            # A JSON schema tells sections by their names, and the settings classes of two plugins may share theirs.
            "-".join(locator) or settings.__name__,
            __base__=base,
            __module__=__name__,
            __doc__=summary(settings),
            **{**(before or {}), **keys, **(after or {})},
        )
    except pydantic.errors.PydanticUserError:
        for key, (annotation, _) in keys.items():
            _check_type(annotation, f"{settings.__name__}.{key}")
        raise
    section.locator = locator
    return section


def key_of(field: dataclasses.Field[Any]) -> str:
    """Return the key of a settings field: its name, or the `key` in its metadata."""
    key: str = field.metadata.get("key", field.name)
    return key


def settings_from(kind: type[T], *sections: Section, **values: Any) -> T:
    """Return a settings object whose fields have the values of the keys in some sections; lists become tuples.

    Args:
        kind: The settings class. A field without a key keeps its default.
        sections: The sections. If several have a key, the first one decides.
        values: Values of fields that are not in the sections.
    """
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        key = key_of(field)
        found = [getattr(each, key) for each in sections if key in type(each).model_fields]
        if found and field.name not in values:
            values[field.name] = _converted(found[0], list, tuple)
    return kind(**values)


def with_values(section: S, settings: Any) -> S:
    """Return a section whose keys have the values of a settings object: the reverse of `settings_from`.

    Args:
        section: The section.
        settings: The settings object. Fields without a key are left out.
    """
    values = {key_of(field): getattr(settings, field.name) for field in dataclasses.fields(settings)}
    keys = type(section).model_fields
    new = {key: _converted(value, tuple, list) for key, value in values.items() if key in keys}
    return section.model_copy(
        update={key: value for key, value in new.items() if value != getattr(section, key)}
    )


def _converted(value: Any, old: type[Any], new: Any) -> Any:
    """Return a value whose lists are tuples or the reverse, nested ones too.

    Example:
        >>> _converted([[120, 3], [30, 8]], list, tuple)
        ((120, 3), (30, 8))
    """
    return new(_converted(each, old, new) for each in value) if isinstance(value, old) else value


def summary(settings: type) -> str:
    """Return the first paragraph of a class's docstring in one line; empty if it has none of its own.

    Example:
        >>> summary(Unit)
        'The unit of a number, which descriptions show beside its range.'
    """
    return " ".join(inspect.cleandoc(settings.__doc__ or "").split("\n\n")[0].split())


def descriptions(settings: type) -> dict[str, str]:
    """Return what the docstrings of a class and its bases say about each field, in their part `Args`.

    Example:
        >>> from istanas.settings import TwoStageSettings
        >>> found = descriptions(TwoStageSettings)
        >>> found["epochs"][:31], found["momentum"]
        ('Number of epochs of the search.', 'Momentum of SGD on the weights.')
    """
    found: dict[str, str] = {}
    for each in reversed(settings.__mro__):
        text = inspect.cleandoc(each.__dict__.get("__doc__") or "")
        part = re.search(r"^Args:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
        if part is not None:
            for names, meaning in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", part[1], re.MULTILINE):
                found[names] = " ".join(meaning.split())
    return found


def _check_type(annotation: Any, field: str) -> None:
    """Check that a key can have a type.

    Raises:
        ConfigError: If values of the type cannot be written in a configuration.
    """
    try:
        pydantic.TypeAdapter(annotation)
    except pydantic.errors.PydanticUserError:
        raise ConfigError(
            f"{annotation!r:.80} cannot be the type of a key",
            field=field,
            remedy="use bool, int, float, str, Literal, a tuple of them, or None",
        ) from None


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    raise IstanasError("a key of a settings class has no default", field=field.name, remedy="give it one")


def _field(default: Any, description: str | None) -> Any:
    if isinstance(default, tuple):
        return Field(default_factory=lambda: _converted(default, tuple, list), description=description)
    return Field(default, description=description)


def _annotation(hint: Any) -> Any:
    """Return the annotation of a key: tuples are lists, as in YAML, floats are finite, and units are kept."""
    if get_origin(hint) is Annotated:
        inner, *metadata = get_args(hint)
        for each in metadata:
            if isinstance(each, Registered):
                return Annotated[str, NameIn(each.registry)]
        extra = [unit(each.name) if isinstance(each, Unit) else each for each in metadata]
        return Annotated[_annotation(inner), *extra]
    if hint is float:
        return Annotated[float, Field(allow_inf_nan=False)]
    if get_origin(hint) is tuple:
        items = get_args(hint)
        if len(items) == 2 and items[1] is Ellipsis:
            return list[_annotation(items[0])]  # type: ignore[misc]
        length = Field(min_length=len(items), max_length=len(items))
        return Annotated[list[_annotation(items[0])], length]  # type: ignore[misc]
    if get_origin(hint) in (Union, UnionType):
        return functools.reduce(operator.or_, map(_annotation, get_args(hint)))
    return hint
