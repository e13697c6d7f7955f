"""Registries: the named operations, search spaces, search methods and data sets, and who registered each of them.

The package registers its own entries when it is imported. Plugins register theirs inside `registering_for`, which
removes all of a plugin's entries again if the plugin fails.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from istanas.errors import ConfigError

Entry = TypeVar("Entry")

OWN = "istanas"  # the origin of the package's own entries
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_origin: ContextVar[str] = ContextVar("origin", default=OWN)
_registered: ContextVar[list[Registration] | None] = ContextVar("registered", default=None)


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Entries by their names, in the order of their registration.

    Args:
        kind: What an entry is, for messages, such as "operation".
        field: The configuration key that names an entry, such as "space.ops".

    Example:
        >>> colours = Registry("colour", "page.colour")
        >>> colours.register("red", "#ff0000")
        >>> colours["red"], colours.origin("red")
        ('#ff0000', 'istanas')
        >>> colours.find("rod")
        Traceback (most recent call last):
        istanas.errors.ConfigError: page.colour: 'rod' is not a registered colour (did you mean red?); choose from red
    """

    def __init__(self, kind: str, field: str) -> None:
        self.kind = kind
        self.field = field
        self._entries: dict[str, tuple[Entry, str]] = {}

    def register(self, name: str, entry: Entry) -> None:
        """Add an entry.

        Raises:
            ConfigError: If the name is taken, or is not a letter followed by at most 63 letters, digits and
                underscores.
        """
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            raise ConfigError(
                f"{name!r:.80} cannot name a {self.kind}",
                field=self.field,
                remedy="use a letter followed by at most 63 letters, digits and underscores",
            )
        if name in self._entries:
            raise ConfigError(
                f"the {self.kind} {name!r} is already registered, by {self.origin(name)}",
                field=self.field,
                remedy="choose another name",
            )
        self._entries[name] = (entry, _origin.get())
        registered = _registered.get()
        if registered is not None:
            registered.append(Registration(self, name, entry))

    def find(self, name: Any) -> Entry:
        """Return the entry of a name that a user gave, which may be any value.

        Raises:
            ConfigError: If the name is not registered. The error names the nearest name and all others.
        """
        if not isinstance(name, str) or name not in self._entries:
            raise ConfigError(
                f"{name!r:.60} is not a registered {self.kind}{did_you_mean(str(name), self._entries)}",
                field=self.field,
                remedy=f"choose from {', '.join(self._entries)}",
            )
        return self._entries[name][0]

    def origin(self, name: str) -> str:
        """Return who registered a name: "istanas" or the name of a plugin."""
        return self._entries[name][1]

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    # A registry is compared by identity, so that annotations can contain it.
    __eq__ = object.__eq__
    __hash__ = object.__hash__


@dataclass(frozen=True)
class Registered:
    """An annotation of a settings field whose text must be a name in a registry."""

    registry: Registry[Any]


@dataclass(frozen=True)
class Registration:
    """An entry that was registered.

    Args:
        registry, name, entry: The registry, and what it holds under that name.
    """

    registry: Registry[Any]
    name: str
    entry: Any


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean NAME?)" with the nearest known name, or "" if none is near.

    Example:
        >>> did_you_mean("skip_conect", ["none", "skip_connect"]), did_you_mean("x", ["none"])
        (' (did you mean skip_connect?)', '')
    """
    near = difflib.get_close_matches(name, [*known], n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def unregister(registrations: Iterable[Registration]) -> None:
    """Remove the entries of a plugin that is no longer used."""
    for registration in registrations:
        del registration.registry._entries[registration.name]


@contextmanager
def registering_for(origin: str) -> Iterator[list[Registration]]:
    """Return a context in which entries are registered for a plugin. After an error, all of them are removed.

    The context's value is the list of what has been registered in it so far.

    Args:
        origin: Name of the plugin.

    Example:
        >>> colours = Registry("colour", "page.colour")
        >>> with registering_for("my_colours.py"):
        ...     colours.register("blue", "#0000ff")
        >>> colours.origin("blue")
        'my_colours.py'
    """
    registered: list[Registration] = []
    tokens = _origin.set(origin), _registered.set(registered)
    try:
        yield registered
    except BaseException:
        unregister(registered)
        raise
    finally:
        _origin.reset(tokens[0])
        _registered.reset(tokens[1])
