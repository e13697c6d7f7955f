"""Descriptions of configuration keys: type, range, default and meaning, for the terminal, editors and the docs."""

from __future__ import annotations

import difflib
import itertools
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pydantic

from istanas.errors import ConfigError
from istanas.methods import DEFAULT_METHOD, METHODS
from istanas.space import DEFAULT_SPACE, SPACES
from pipeline.base.text import count
from pipeline.config.keys import all_schemas, schemas_of_methods, schemas_of_spaces, section_of
from pipeline.config.schema import config_class
from pipeline.config.sections import UNIT, WORDS, names_in

ANY_KEY = "KEY"  # placeholder for the swept keys in `sweep.space.KEY.uniform`


@dataclass(frozen=True)
class Variant:
    """A key as one method or one search space defines it.

    Args:
        type: Type, range and unit in words.
        default: The default value; None if the key is required.
        required: Whether the key has no default.
        meaning: What the key does.
    """

    type: str
    default: Any
    required: bool
    meaning: str

    @property
    def shown_default(self) -> str:
        """The default as YAML."""
        return "none, the key is required" if self.required else as_yaml(self.default)


@dataclass(frozen=True)
class Key:
    """A key of the configuration.

    Args:
        path: The key with its sections, such as "search.epochs".
        variants: The key as each method defines it, or each search space for the keys of the section `space`. Those
            without the key are left out.
    """

    path: str
    variants: Mapping[str, Variant]

    @property
    def owner(self) -> str:
        """What defines the key: "space" for the keys of the section `space`, otherwise "method"."""
        return "space" if self.path.startswith("space.") else "method"

    @property
    def only(self) -> str:
        """The methods or spaces that have the key, or an empty string if all have it."""
        everyone = SPACES if self.owner == "space" else METHODS
        return "" if len(self.variants) == len(everyone) else ", ".join(self.variants)

    def fact(self, name: str) -> list[tuple[str, str]]:
        """Return an attribute of the variants as pairs (owners, value); owners is empty if all variants agree.

        Example:
            >>> key, = describe("search.layers")
            >>> key.fact("shown_default")[1], key.fact("type")
            (('one_stage', '20'), [('', 'integer, at least 3')])
        """
        values: dict[str, list[str]] = {}
        for owner, variant in self.variants.items():
            values.setdefault(getattr(variant, name), []).append(owner)
        if len(values) == 1:
            return [("", next(iter(values)))]
        return [(", ".join(owners), value) for value, owners in values.items()]

    def as_json(self) -> dict[str, Any]:
        """Return the key as a JSON object."""
        variants = {
            owner: {"type": v.type, "default": v.default, "required": v.required, "meaning": v.meaning}
            for owner, v in self.variants.items()
        }
        return {"key": self.path, f"{self.owner}s": variants}


def all_keys() -> list[Key]:
    """Return every key of every method and search space, in the order of the schema."""
    found: dict[str, dict[str, Variant]] = {}
    for of_space, schemas in ((False, schemas_of_methods()), (True, schemas_of_spaces())):
        for owner, schema in schemas.items():
            document = schema.model_json_schema()
            for path, variant in _walk(schema, document, document["$defs"], ""):
                if path.startswith("space.") is of_space:
                    found.setdefault(path, {})[owner] = variant
    # Each schema allows only its own method and space.
    for path, registry, default in (
        ("method", METHODS, DEFAULT_METHOD),
        ("space.name", SPACES, DEFAULT_SPACE),
    ):
        found[path] = {
            owner: Variant(names_in(registry), default, False, variant.meaning)
            for owner, variant in found[path].items()
        }
    order = list(config_class().model_fields)
    paths = sorted(found, key=lambda path: order.index(path.partition(".")[0]))  # stable within a section
    return [Key(path, found[path]) for path in paths]


def sections() -> dict[str, str]:
    """Return every section with its meaning.

    Example:
        >>> sections()["tracking"]
        "Tracking in MLflow. These keys are not part of the configuration's hash."
    """
    found: dict[str, list[str]] = {}
    for schema in all_schemas():
        for path, model in _sections(schema, ""):
            meanings = found.setdefault(path, [])
            text = " ".join((model.__doc__ or "").split())
            if text not in meanings:
                meanings.append(text)
    return {path: " ".join(meanings) for path, meanings in found.items()}


def describe(prefix: str = "") -> list[Key]:
    """Return the key with a name, the keys of a section, or the keys that begin with a text.

    Args:
        prefix: A key, a section or the beginning of a key; empty for all keys.

    Raises:
        ConfigError: No key matches. The error names the nearest one.

    Example:
        >>> [key.path for key in describe("search.lr")], [key.path for key in describe("search.warm")]
        (['search.lr'], ['search.warmup_epochs'])
    """
    keys = all_keys()
    exact = [key for key in keys if key.path == prefix]
    inside = [key for key in keys if key.path.startswith(f"{prefix}.")]
    found = exact + inside or [key for key in keys if key.path.startswith(prefix)]
    if not found:
        known = [key.path for key in keys] + list(sections())
        nearest = difflib.get_close_matches(prefix, known, n=1, cutoff=0)[0]
        raise ConfigError(
            "unknown key", field=f"--describe {prefix!r:.80}", remedy=f"did you mean {nearest}?"
        )
    return found


def as_text(keys: Sequence[Key], width: int) -> str:
    """Return the keys as text for a terminal, one paragraph each.

    Args:
        keys: The keys.
        width: Width of the terminal in columns.
    """
    return "\n\n".join("\n".join(_lines(key, width)) for key in keys)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a configuration file, with which editors complete and check keys."""
    definitions: dict[str, Any] = {}
    cases: list[dict[str, Any]] = []
    for method, space in itertools.product(METHODS, SPACES):
        schema = config_class(method, space)
        document = schema.model_json_schema()
        definitions |= document.pop("$defs") | {schema.__name__: document}
        of_space = _chooses("name", space, DEFAULT_SPACE)
        cases.append(
            {
                "if": {
                    "allOf": [
                        _chooses("method", method, DEFAULT_METHOD),
                        {
                            "properties": {"space": of_space},
                            **({} if space == DEFAULT_SPACE else _NEEDS_SPACE),
                        },
                    ]
                },
                "then": {"$ref": f"#/$defs/{schema.__name__}"},
            }
        )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Configuration of istanas",
        "type": "object",
        "properties": {
            "method": {"enum": list(METHODS)},
            "space": {"properties": {"name": {"enum": list(SPACES)}}},
        },
        "allOf": cases,
        "$defs": definitions,
    }


_NEEDS_SPACE = {"required": ["space"]}


def _chooses(key: str, value: str, default: str) -> dict[str, Any]:
    """Return the condition that an object has this value of a key; a missing key has the default."""
    required = {} if value == default else {"required": [key]}
    return {"properties": {key: {"const": value}}, **required}


def as_yaml(value: Any) -> str:
    """Return a value as YAML in one line.

    Example:
        >>> as_yaml([True, "cosine", "#ffffff", None, 1e-5])
        '[true, cosine, "#ffffff", null, 1e-05]'
    """
    if isinstance(value, list):
        return f"[{', '.join(map(as_yaml, value))}]"
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value)
    return value if plain else json.dumps(value)


def _walk(
    model: type[pydantic.BaseModel], node: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, Variant]]:
    """Yield every key of a section and its subsections as (path, variant).

    Args:
        model: The section.
        node: Its JSON schema, from which the types are easier to read.
        definitions: The JSON schemas to which `node` refers.
        prefix: Path of the section with a final dot.
    """
    for name, field in model.model_fields.items():
        key = field.alias or name
        inner = section_of(field.annotation)
        property_ = node["properties"][key]
        is_mapping = "additionalProperties" in property_
        if inner is None or is_mapping:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            yield (
                prefix + key,
                Variant(_type(property_), default, field.is_required(), field.description or ""),
            )
        if inner is not None:
            below = f"{prefix}{key}.{ANY_KEY}." if is_mapping else f"{prefix}{key}."
            yield from _walk(inner, definitions[inner.__name__], definitions, below)


def _sections(model: type[pydantic.BaseModel], prefix: str) -> Iterator[tuple[str, type[pydantic.BaseModel]]]:
    for name, field in model.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            yield prefix + name, inner
            yield from _sections(inner, f"{prefix}{name}.")


def _type(node: Mapping[str, Any]) -> str:
    """Return the type of a JSON schema in words."""
    if WORDS in node:
        return str(node[WORDS])
    if "anyOf" in node:
        kinds = [_type(part) for part in node["anyOf"]]
        comma = any("," in kind for kind in kinds) or len(kinds) > 2
        return f"{', '.join(kinds[:-1])}{',' if comma else ''} or {kinds[-1]}"
    if "const" in node:
        return as_yaml(node["const"])
    if "enum" in node:
        return f"one of {', '.join(map(as_yaml, node['enum']))}"
    if "$ref" in node:
        return "range of values"  # only a sweep's `Parameter` is a reference
    kind = node["type"]
    if kind == "array":
        values = _values(node.get("minItems"), node.get("maxItems"))
        return f"list of {values}, each {_with_article(_type(node['items']))}"
    if kind == "object":
        return f"mapping of keys to values, each {_with_article(_type(node['additionalProperties']))}"
    words = {"boolean": "true or false", "string": "text", "null": "null"}.get(kind, kind)
    pattern = f" that matches {node['pattern']}" if "pattern" in node else ""
    unit = f" ({node[UNIT]})" if UNIT in node else ""
    return f"{words}{pattern}{_range(node)}{unit}"


def _values(least: int | None, most: int | None) -> str:
    """Return how many values a list has."""
    if least is None:
        return "values"
    if most is None:
        return f"at least {count(least, 'value')}"
    return count(least, "value") if least == most else f"{least} to {most} values"


def _with_article(words: str) -> str:
    if words.startswith("one of "):
        return words
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _range(node: Mapping[str, Any]) -> str:
    """Return the range of a number in words.

    Example:
        >>> _range({"minimum": 0, "exclusiveMaximum": 1}), _range({"exclusiveMinimum": 0}), _range({})
        (' in [0, 1)', ', above 0', '')
    """
    bounds = {name: _number(value) for name, value in node.items() if name.lower().endswith("imum")}
    low, above = bounds.get("minimum"), bounds.get("exclusiveMinimum")
    high, below = bounds.get("maximum"), bounds.get("exclusiveMaximum")
    if len(bounds) == 2:
        left = f"[{low}" if low is not None else f"({above}"
        return f" in {left}, {high}]" if high is not None else f" in {left}, {below})"
    words = {"at least": low, "above": above, "at most": high, "below": below}
    return "".join(f", {word} {value}" for word, value in words.items() if value is not None)


def _number(value: float) -> str:
    whole = int(value)
    if whole >= 2**32 and whole & (whole - 1) == 0:
        return f"2^{whole.bit_length() - 1}"
    return f"{value:g}"


def _lines(key: Key, width: int) -> Iterator[str]:
    owners = f"{key.owner}{'s' if len(key.variants) > 1 else ''} {key.only}"
    yield from textwrap.wrap(
        f"{key.path} ({owners} only)" if key.only else key.path, width, subsequent_indent="    "
    )
    for label, name in (("", "meaning"), ("type", "type"), ("default", "shown_default")):
        for owners, value in key.fact(name):
            start = " ".join(word for word in (label, f"({owners})" if owners else "") if word)
            yield from textwrap.wrap(
                f"{start}: {value}" if start else value,
                width,
                initial_indent="  ",
                subsequent_indent="    ",
                break_on_hyphens=False,
                break_long_words=False,
            )
