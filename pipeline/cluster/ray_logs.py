"""Ray's logs, which are written to files and moved to the run directory when Ray has ended."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any


def send_errors_to_log() -> None:
    """Write Ray's messages about lost workers and nodes to its log, because stdout is for the user or for `--json`.

    Ray prints them even with `log_to_driver=False`, and has no public option to turn them off.
    """
    import ray._private.worker as private

    def log(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        logging.getLogger("ray").warning("%s", "\n".join(map(str, data.get("lines", []))))

    private.print_to_stdstream = log


class _Log(logging.FileHandler):
    """A log handler that drops lines on a full disk, without a traceback for every line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, the name is logging's
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def log_to(file: Path) -> None:
    """Write everything that Ray logs in this process to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = _Log(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("ray")
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)
    logger.propagate = False


def session_of(logs: Path) -> Path | None:
    """Return the temporary folder of the Ray session whose logs belong to a run, or None."""
    link = logs / "session"
    return Path(os.readlink(link)) if link.is_symlink() else None


def collect_logs(logs: Path) -> None:
    """Copy the logs of an ended Ray session into the run directory, and delete the session's temporary folder."""
    temporary = session_of(logs)
    if temporary is None:
        return
    for session in temporary.glob("session_2*"):
        try:
            shutil.copytree(
                session / "logs", logs / session.name, dirs_exist_ok=True, ignore_dangling_symlinks=True
            )
        except OSError:  # On a full disk, logs must not take the remaining space or hide why the job failed.
            shutil.rmtree(logs / session.name, ignore_errors=True)
    shutil.rmtree(temporary, ignore_errors=True)
    (logs / "session").unlink()
