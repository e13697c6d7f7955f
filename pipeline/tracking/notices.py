"""Warnings about MLflow that are given once, however many runs they concern."""

from __future__ import annotations

import logging

_LOG = logging.getLogger(__name__)


class Notices:
    """Warnings that were given already."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def warn_once(self, message: str, *, about: str) -> None:
        """Log a warning, unless one about the same thing was logged before.

        Args:
            message: The warning.
            about: What it is about.
        """
        if about not in self._given:
            self._given.add(about)
            _LOG.warning(message)

    def clear(self) -> None:
        """Forget what was given."""
        self._given.clear()


# The default of all trackers: a process opens one per run, a sweep one per trial, and one warning about an unreachable
# store is enough.
OF_THIS_PROCESS = Notices()
