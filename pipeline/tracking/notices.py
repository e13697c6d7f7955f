"""Warnings about MLflow that are logged once for any number of runs."""

from __future__ import annotations

import logging

_LOG = logging.getLogger(__name__)


class Notices:
    """The warnings that were logged so far."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def warn_once(self, message: str, *, about: str) -> None:
        """Log a warning, unless one about the same thing was logged before.

        Args:
            message: The warning.
            about: Key of the subject, about which only one warning is logged.
        """
        if about not in self._given:
            self._given.add(about)
            _LOG.warning(message)

    def clear(self) -> None:
        """Forget the logged warnings, so that they may be logged again."""
        self._given.clear()


# The default of all trackers. A process opens a tracker for each run, but one warning about an unreachable store is
# enough.
OF_THIS_PROCESS = Notices()
