"""Reading and writing the YAML of configurations: YAML 1.2, of limited size, without tags that create objects."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import CollectionNode

from istanas.errors import ConfigError
from istanas.limits import CONFIG_BYTES, CONFIG_DEPTH, CONFIG_VALUES, read_at_most

NOT_YAML = (YAMLError, ValueError, RecursionError)  # raised by `parse` and by decoding a file


def read_file(path: Path) -> dict[str, Any]:
    """Read the sections of a configuration file.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or does not contain sections.
    """
    source = str(path)
    try:
        tree = parse(read_at_most(path, CONFIG_BYTES, pipe=True).decode())
    except OSError as error:
        raise ConfigError(
            f"cannot be read ({error.strerror})", source=source, remedy="give an existing YAML file"
        ) from None
    except NOT_YAML as error:
        raise ConfigError(f"not valid YAML: {describe_error(error)}", source=source) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"contains a {type(tree).__name__}",
            source=source,
            remedy="give sections such as `search:` with their keys",
        )
    return tree


def parse(text: str) -> Any:
    """Return the value of a YAML text.

    The number of values is checked before they are built, because nested aliases could fill the memory.

    Raises:
        YAMLError, ValueError, RecursionError: The text is not YAML, or exceeds the limits.
    """
    yaml = _yaml()
    root = yaml.compose(text)
    if root is None:
        return None
    _size_of(root, {})
    return yaml.constructor.construct_document(root)


def dump(tree: dict[str, Any]) -> str:
    """Return nested dictionaries as YAML."""
    buffer = io.StringIO()
    _yaml().dump(tree, buffer)
    return buffer.getvalue()


def describe_error(error: Exception) -> str:
    """Return what is wrong with a text, and where. ruamel's own message calls the text `<unicode string>`."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark, problem = error.problem_mark, error.problem or error.context or "cannot be read"
        return f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(problem.split())}"
    return " ".join(str(error).replace('in "<unicode string>", ', "").split())


def _yaml() -> YAML:
    # YAML 1.2 reads 1e-3 as a number; the safe loader rejects duplicate keys and builds no objects from tags.
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    return yaml


def _size_of(node: Any, known: dict[int, int], depth: int = 0) -> int:
    """Return the number of keys and values in a node, with aliases expanded."""
    if depth > CONFIG_DEPTH:
        raise ValueError(f"more than {CONFIG_DEPTH} nested sections and lists")
    if id(node) not in known:
        children = node.value if isinstance(node, CollectionNode) else []
        if any(isinstance(child, tuple) and isinstance(child[0], CollectionNode) for child in children):
            raise ValueError("a key is a list or a section; write a name")
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = 1 + sum(_size_of(part, known, depth + 1) for part in parts)
        if known[id(node)] > CONFIG_VALUES:
            raise ValueError(f"more than {CONFIG_VALUES} keys and values")
    return known[id(node)]
