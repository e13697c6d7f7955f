"""Errors of a configuration: one mistake, settings that cannot be combined, or several mistakes at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from istanas.errors import ConfigError, LayoutError


class ConflictError(ConfigError):
    """Settings that cannot be combined.

    Args:
        problem: What is wrong, with the value of the first field.
        fields: Every key that the conflict is about. The first one is the error's `field`.
        remedy: What the user can do about it.
    """

    def __init__(self, problem: str, *, fields: tuple[str, ...] = (), remedy: str | None = None) -> None:
        super().__init__(problem, field=fields[0] if fields else None, remedy=remedy)
        self.fields = fields


class ConfigErrors(ConfigError):  # noqa: N818 - the plural says that it carries several
    """Several mistakes of a configuration, one per line of the text."""

    def __init__(self, mistakes: Sequence[ConfigError]) -> None:
        super().__init__("\n".join(map(str, mistakes)))
        self.mistakes = tuple(mistakes)
        self.args = (self.mistakes,)  # pickle passes them to the constructor

    def in_source(self, source: str) -> Self:
        """Return a copy in which every mistake names the source."""
        return type(self)([mistake.in_source(source) for mistake in self.mistakes])


def one_error(mistakes: Sequence[ConfigError]) -> ConfigError:
    """Return the only mistake, or a `ConfigErrors` of all of them."""
    return mistakes[0] if len(mistakes) == 1 else ConfigErrors(mistakes)


def mistakes_of(error: ConfigError) -> tuple[ConfigError, ...]:
    """Return the mistakes in an error. A `ConfigErrors` has several; any other error is the only mistake.

    Example:
        >>> [mistake.field for mistake in mistakes_of(ConfigError("0 is too small", field="search.epochs"))]
        ['search.epochs']
    """
    return error.mistakes if isinstance(error, ConfigErrors) else (error,)


def fields_of(mistake: ConfigError) -> tuple[str, ...]:
    """Return the keys that a mistake is about.

    Example:
        >>> fields_of(ConflictError("0.1 is above search.lr", fields=("search.lr_min", "search.lr")))
        ('search.lr_min', 'search.lr')
    """
    if isinstance(mistake, ConflictError):
        return mistake.fields
    return () if mistake.field is None else (mistake.field,)


@contextmanager
def layout_error_as_config_error() -> Iterator[None]:
    """Raise a `ConfigError` instead of a `LayoutError` of the body, because an argument of a command names the folder.

    Raises:
        ConfigError: Instead of a `LayoutError`.

    Example:
        >>> with layout_error_as_config_error():
        ...     raise LayoutError("photos has no pictures", field="DIR")
        Traceback (most recent call last):
        istanas.errors.ConfigError: DIR: photos has no pictures
    """
    try:
        yield
    except LayoutError as error:
        raise ConfigError(error.problem, field=error.field, remedy=error.remedy) from None
