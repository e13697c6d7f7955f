"""The errors that the project raises on purpose. Each has a field, a problem and a remedy, and is shown on one line."""

from __future__ import annotations

import copy
from typing import Self


class IstanasError(Exception):
    """Base class of every error that the project raises on purpose.

    Its text is "source: field: problem; remedy", without the parts that are None.

    Args:
        problem: What is wrong, with the value.
        field: The setting, argument or file that is wrong.
        remedy: What the user can do about it.
        source: The configuration file, override or data file that contains the field.

    Example:
        >>> error = ConfigError("0 is too small", field="search.epochs", remedy="use 1 or more")
        >>> print(error.in_source("search.yaml"))
        search.yaml: search.epochs: 0 is too small; use 1 or more
        >>> error.field, error.remedy
        ('search.epochs', 'use 1 or more')
    """

    def __init__(
        self, problem: str, *, field: str | None = None, remedy: str | None = None, source: str | None = None
    ) -> None:
        # Only the positional argument is in `args`; pickle restores the others from the instance's dictionary.
        super().__init__(problem)
        self.problem = problem
        self.field = field
        self.remedy = remedy
        self.source = source

    def __str__(self) -> str:
        text = ": ".join(part for part in (self.source, self.field, self.problem) if part is not None)
        return text if self.remedy is None else f"{text}; {self.remedy}"

    def in_source(self, source: str) -> Self:
        """Return a copy of the error that names the source of its field."""
        named = copy.copy(self)
        named.source = source if self.source is None else f"{source}: {self.source}"
        return named


class ConfigError(IstanasError):
    """A configuration, an argument, or a combination of them that cannot work. The exit code is 2."""


class DataError(IstanasError):
    """A data set that is missing, broken, or different from what the configuration says."""


class LayoutError(DataError):
    """A folder that does not exist, or that does not have the layout of a data set, such as its splits and classes."""


class MissingDataError(DataError):
    """A data set that is not there, or that cannot be reached, rather than one that has changed."""


class GenotypeError(IstanasError):
    """An invalid genotype: an unknown operation, a state out of range, an unknown version. The exit code is 2."""


class SolverError(IstanasError):
    """A LASSO solver that cannot run, or that was given invalid input."""


class DivergedError(IstanasError):
    """A training run that diverged: the loss or a parameter is not finite, or the loss exceeds its bound."""


class CheckpointError(IstanasError):
    """A checkpoint that is missing, broken, or belongs to another run."""
