"""Ray's logs: into files while it runs, and into the run directory when it has ended."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any


def send_errors_to_log() -> None:
    """What Ray prints about lost workers and nodes goes to its log: stdout is for the user, or for `--json`.

    `log_to_driver` leaves these out, and what a client (ray://) is sent; and Ray offers nothing else.
    """
    import ray._private.worker as private
    from ray.util.client import logsclient

    def log(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        logging.getLogger("ray").warning("%s", "\n".join(map(str, data.get("lines", []))))

    private.print_to_stdstream = log
    client: Any = logsclient.LogstreamClient
    client.stdstream = lambda _, level, msg: logging.getLogger("ray").warning("%s", msg)


class _Log(logging.FileHandler):
    """A log file; on a full disk it is left incomplete, without a traceback for every line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, the name is logging's
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def log_to(file: Path) -> None:
    """Everything that Ray logs in this process goes to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = _Log(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # The latter passes on nothing of what a client is sent.
    for name in ("ray", "ray.util.client.logsclient"):
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            logger.removeHandler(old)
            old.close()
        logger.addHandler(handler)
        logger.propagate = False


def session_of(logs: Path) -> Path | None:
    """Where a Ray session that was started here keeps its files."""
    link = logs / "session"
    return Path(os.readlink(link)) if link.is_symlink() else None


def collect_logs(logs: Path) -> None:
    """Bring the logs of an ended Ray session into the run directory, and delete its other files."""
    scratch = session_of(logs)
    if scratch is None:
        return
    for session in scratch.glob("session_2*"):
        try:
            shutil.copytree(
                session / "logs", logs / session.name, dirs_exist_ok=True, ignore_dangling_symlinks=True
            )
        except OSError:  # a full disk: logs must not take what room is left, nor hide why the job has failed
            shutil.rmtree(logs / session.name, ignore_errors=True)
    shutil.rmtree(scratch, ignore_errors=True)
    (logs / "session").unlink()
