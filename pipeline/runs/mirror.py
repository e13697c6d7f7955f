"""The mirror of one run directory: its local copy on this machine and its objects in a storage.

The storage is authoritative. A mirror pulls the objects before a job starts. It pushes a checkpoint before the epoch
counts as done, and the results before the run counts as finished. The order of the files (`_rank`) keeps the storage
consistent if a push is interrupted.
"""

from __future__ import annotations

import logging
import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from istanas.errors import IstanasError
from pipeline.base.files import atomic_write
from pipeline.runs.copies import make_private, shown
from pipeline.runs.layout import CHECKPOINT_MANIFEST, CHECKPOINTS, LOG_FOLDER, RECORD_FILE, RUN_FOLDER
from pipeline.runs.lease import Lease, Timing
from pipeline.runs.object_storage import Objects, Stamp, stamp_of

_LOG = logging.getLogger(__name__)

Wanted = Callable[[str], bool]  # receives a file's name in the run directory


class Mirror:
    """The mirror of one run directory.

    Args:
        path: The local copy.
        timing: See `Timing`.

    Attributes:
        is_unreachable: Whether the storage has failed, after which nothing more is sent.

    Raises:
        ConfigError: the address is invalid.
    """

    def __init__(self, path: Path, timing: Timing) -> None:
        self.path, self.timing = path, timing
        self.objects = Objects(shown(path))
        self.lease = Lease(self.objects, timing)
        self.is_unreachable = False
        self._there: dict[str, Stamp] = {}

    def push(self, *, once: bool = False) -> None:
        """Send all changes of the copy.

        Args:
            once: Try once, and log a warning if that fails; for a run that has failed already.

        Raises:
            StorageError: the storage was unreachable for `Timing.retry` seconds.
            IstanasError: another process has taken the run over.
        """
        if once and self.is_unreachable:
            return
        try:
            self.objects.retrying(self._push, 0 if once else self.timing.retry)
        except IstanasError as error:
            self.is_unreachable = True
            if not once:
                raise
            _LOG.warning("%s", error)

    def push_cleared(self) -> None:
        """Send a run directory that was cleared to start over, and delete the runs inside it from the storage."""
        self.push()
        self.objects.retrying(self._delete_runs, self.timing.retry)

    def pull(self, wanted: Wanted | None = None) -> None:
        """Update the copy, or only its wanted files, from the storage.

        Files without an object are deleted; files that are up to date are not written.
        """
        make_private(self.path)
        here = self._here()
        for name, stamp in self.list().items():
            if here.get(name) != stamp and (wanted is None or wanted(name)):
                atomic_write(self.path / name, self.objects.get(name))
                self._stamp(name)
        for name in here.keys() - self._there.keys():
            if wanted is None or wanted(name):
                (self.path / name).unlink()

    def list(self) -> dict[str, Stamp]:
        """Return names and stamps of all objects that are mirrored."""
        self._there = {name: stamp for name, stamp in self.objects.stamps().items() if _is_mirrored(name)}
        return self._there

    def _push(self) -> None:
        self.lease.check()
        here = self._here()
        gone = sorted(self._there.keys() - here.keys(), key=_rank, reverse=True)
        # When a run starts over, its old record must not exist beside new files.
        first = gone if RECORD_FILE in gone else self._outdated_manifests(here)
        for name in first:
            self._delete(name)
        changed = sorted((n for n, stamp in here.items() if self._there.get(n) != stamp), key=_rank)
        for name in changed:
            self.objects.put(name, (self.path / name).read_bytes())
        for name in gone:
            if name in self._there:
                self._delete(name)
        # Lists only the folders that changed, because a sweep has many trials.
        for folder in sorted({posixpath.dirname(name) for name in changed}):
            self._there |= {n: stamp for n, stamp in self.objects.stamps(folder).items() if _is_mirrored(n)}
        after = self._here()
        for name in changed:
            if after.get(name) == here[name] and name in self._there:
                self._stamp(name)

    def _delete(self, name: str) -> None:
        self.objects.delete(name)
        del self._there[name]

    def _delete_runs(self) -> None:
        for folder in {name.partition("/")[0] for name in self.objects.stamps() if _is_of_another_run(name)}:
            self.objects.delete_folder(folder)

    def _outdated_manifests(self, here: Mapping[str, Stamp]) -> Sequence[str]:
        """Return the manifests of epochs that were repeated or abandoned.

        They are deleted before anything is sent, because the push overwrites the log that their checkpoints match.
        """
        newest = max(map(_epoch, filter(_is_manifest, here)), default=0)
        return [
            name
            for name, stamp in self._there.items()
            if _is_manifest(name) and _epoch(name) >= newest and here.get(name) != stamp
        ]

    def _stamp(self, name: str) -> None:
        os.utime(self.path / name, ns=(self._there[name].changed,) * 2)

    def _here(self) -> dict[str, Stamp]:
        stamps = {}
        for folder, folders, files in os.walk(self.path):
            folders[:] = [
                name for name in folders if not name.startswith(".") and not RUN_FOLDER.fullmatch(name)
            ]
            for file in files:
                path = Path(folder) / file
                name = path.relative_to(self.path).as_posix()
                if _is_mirrored(name) and (stamp := stamp_of(path)) is not None:
                    stamps[name] = stamp
        return stamps


def _is_manifest(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    return folder == CHECKPOINTS and CHECKPOINT_MANIFEST.fullmatch(file) is not None


def _epoch(manifest: str) -> int:
    return int(manifest.removeprefix(f"{CHECKPOINTS}/epoch-").removesuffix(".json"))


def _rank(name: str) -> int:
    """Return the position of an object in the order of writing; objects are deleted in the reverse order.

    The order is: epoch log, checkpoint, the manifest that makes the checkpoint valid, other files, record.
    """
    if not name.startswith(f"{CHECKPOINTS}/"):
        return 4 if name == RECORD_FILE else 3
    if _is_manifest(name):
        return 2
    return 1 if name.endswith(".pt") else 0


def _is_mirrored(name: str) -> bool:
    parts = name.split("/")
    # Names that start with a dot are locks and temporary files.
    is_local = parts[0] == LOG_FOLDER or any(part.startswith(".") for part in parts)
    return not is_local and not _is_of_another_run(name)


def _is_of_another_run(name: str) -> bool:
    folder, inside, _ = name.partition("/")
    return bool(inside) and RUN_FOLDER.fullmatch(folder) is not None
