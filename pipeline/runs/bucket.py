"""Run directories in a storage (`s3://` or `gs://`), as jobs and commands use them.

A job works in a local copy of the run directory below the user's cache folder (`runs.copies`). The job acquires the
run, so that no other process works on it (`runs.lease`), and sends its changes to the storage (`RunDir.push`,
`runs.mirror`). The functions of this module do nothing for folders and `file://` addresses.

The trials of a sweep are run directories inside the sweep's run directory. The process that runs a trial, on any
machine, acquires the trial and sends its changes; the process of the sweep only writes the records of trials.
"""

from __future__ import annotations

import contextlib
import posixpath
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from istanas.errors import ConfigError
from pipeline.runs.copies import is_copy, local, named, shown
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import LINK_FILE, RECORD_FILE
from pipeline.runs.lease import Timing
from pipeline.runs.mirror import Mirror, Wanted
from pipeline.runs.object_storage import StorageError, stamp_of

__all__ = [
    "StorageError",
    "Timing",
    "acquired",
    "fetch",
    "fetch_parts",
    "fetch_records",
    "is_copy",
    "local",
    "named",
    "send",
    "shown",
]

_DEFAULT = Timing()


@contextlib.contextmanager
def acquired(
    run: RunDir, say: Callable[[str], None], *, wait: float = 0, timing: Timing = _DEFAULT
) -> Iterator[RunDir]:
    """Acquire a run in a storage for this process, and fetch it.

    Args:
        run: The run directory. It is yielded unchanged if it is in a folder, or acquired already.
        say: Receives a line if another process may work on the run.
        wait: Seconds to wait for another process that works on the run; -1 waits without limit.
        timing: See `Timing`.

    Yields:
        The run directory, whose `push` sends changes to the storage.

    Raises:
        StorageError: the storage cannot be used; nothing was written.
        ConfigError: another process works on the run.
    """
    if run.mirror is not None or not is_copy(run.path):
        yield run
        return
    mirror = Mirror(run.path, timing)
    stop = threading.Event()
    renewing = threading.Thread(target=mirror.lease.renew, args=(stop,), daemon=True)
    try:
        try:
            with mirror.objects.failures():
                mirror.lease.acquire(say, wait)
                renewing.start()  # before fetching, which may take longer than the lease is valid
                mirror.pull()
        except StorageError:
            mirror.is_unreachable = True
            raise
        yield RunDir(run.path, mirror)
    finally:
        stop.set()
        if not mirror.is_unreachable:  # otherwise the lease expires
            if renewing.is_alive():
                renewing.join()
            mirror.lease.release()


def fetch(address: str) -> Path:
    """Return the run directory at an address, and update it if it is a local copy.

    A copy in use by a process on this machine is newer than the storage, and is not changed.

    Raises:
        StorageError: the storage cannot be used.
        ConfigError: there is no run.
    """
    path = local(address)
    if not is_copy(path):
        return path
    mirror = Mirror(path, _DEFAULT)
    with mirror.objects.failures():
        if RECORD_FILE not in mirror.list():
            raise ConfigError(
                f"there is no run (no {RECORD_FILE})",
                field=f"run {mirror.objects.address}",
                remedy="give the address of a run",
            )
        _pull_unless_in_use(mirror)
    return path


def fetch_parts(path: Path, wanted: Wanted) -> None:
    """Update some files of a local copy as `fetch` does, even if the copy holds no run.

    Raises:
        StorageError: the storage cannot be used.
    """
    if is_copy(path):
        mirror = Mirror(path, _DEFAULT)
        mirror.objects.retrying(lambda: _pull_unless_in_use(mirror, wanted), mirror.timing.retry)


def fetch_records(folder: Path) -> None:
    """Update the records of all runs below a folder of runs or a sweep's run directory.

    The records suffice to find a run.

    Raises:
        StorageError: the storage cannot be used.
    """
    if not is_copy(folder):
        return
    objects = Mirror(folder, _DEFAULT).objects
    with objects.failures():
        there = objects.stamps()
        runs = {posixpath.dirname(name) for name in there if posixpath.basename(name) == RECORD_FILE}
        runs |= {file.parent.relative_to(folder).as_posix() for file in folder.glob(f"**/{RECORD_FILE}")}
        for run in sorted(runs - {"", "."}):
            files = [f"{run}/{name}" for name in (RECORD_FILE, LINK_FILE)]
            if any(there.get(file) != stamp_of(folder / file) for file in files):
                mirror = Mirror(folder / run, _DEFAULT)
                _pull_unless_in_use(mirror, lambda name: name in (RECORD_FILE, LINK_FILE))


def send(path: Path, *names: str) -> None:
    """Send some files of a run, even if another process has acquired the run.

    Raises:
        StorageError: the storage was unreachable for `Timing.retry` seconds.
    """
    if not is_copy(path):
        return
    mirror = Mirror(path, _DEFAULT)

    def put() -> None:
        for name in names:
            if (path / name).is_file():
                mirror.objects.put(name, (path / name).read_bytes())

    mirror.objects.retrying(put, mirror.timing.retry)


def _pull_unless_in_use(mirror: Mirror, wanted: Wanted | None = None) -> None:
    lock = contextlib.ExitStack()
    try:
        lock.enter_context(RunDir(mirror.path).lock())
    except ConfigError:  # in use by a process on this machine
        return
    with lock:
        mirror.pull(wanted)
