"""The lease of a run directory in a storage: at most one process works on a run.

The owner writes the object `.owner.json` and renews it at intervals. An owner that does not renew its lease for too
long, or whose process has ended, loses the lease to the next process.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import tenacity

from istanas.errors import ConfigError, IstanasError
from pipeline.runs.layout import OWNER_OBJECT
from pipeline.runs.object_storage import Objects, reason_of

_LOG = logging.getLogger(__name__)
OWNER_LENGTH = 512  # bytes of the owner's object


@dataclass(frozen=True)
class Timing:
    """Durations of a lease, in seconds.

    Args:
        retry: How long a running job retries an unreachable storage; pyarrow itself retries for some seconds.
        interval: Interval at which an owner renews its lease.
        silence: An owner counts as dead after this time without a renewal.
        settle: Pause after writing the lease, in which a process notices another that wrote it at the same moment.
    """

    retry: float = 300.0
    interval: float = 20.0
    silence: float = 60.0
    settle: float = 1.0


@dataclass(frozen=True)
class Owner:
    """The process that works on a run.

    Args:
        host, process, started: Host name, process id and start time.
        key: Unique id of the acquisition.
        beats: Number of renewals.
        place: Boot and container in which the process id is valid; host names are not always unique.
    """

    host: str
    process: int
    started: float
    key: str
    beats: int = 0
    place: str = ""

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    @property
    def is_dead(self) -> bool:
        """Whether the owner was a process on this machine that has ended."""
        if (self.host, self.place) != (socket.gethostname(), _process_namespace()):
            return False
        try:
            return abs(psutil.Process(self.process).create_time() - self.started) > 1
        except psutil.NoSuchProcess:
            return True


class Lease:
    """The lease of one run directory, as this process acquires, renews and releases it.

    Args:
        objects: The objects of the run directory.
        timing: See `Timing`.
    """

    def __init__(self, objects: Objects, timing: Timing) -> None:
        process = psutil.Process()
        self.timing, self._objects = timing, objects
        self.me = Owner(
            socket.gethostname(),
            process.pid,
            process.create_time(),
            uuid.uuid4().hex,
            place=_process_namespace(),
        )

    def acquire(self, say: Callable[[str], None], wait: float = 0) -> None:
        """Become the owner as soon as no other owner is alive.

        Args:
            say: Receives a line if another owner may be alive.
            wait: Seconds to wait for an owner that is alive; -1 waits without limit.

        Raises:
            ConfigError: another owner is still alive after that time.
        """
        seen: Owner | None = None
        began = changed = time.monotonic()
        address, silence = self._objects.address, self.timing.silence

        def is_free() -> bool:
            nonlocal seen, changed
            owner, now = self.read(), time.monotonic()
            if owner is None or owner.is_dead:
                return True
            if seen is None:
                until = f"{silence:.0f} s for it to renew its lease" if wait == 0 else "until it has finished"
                say(f"{address}: in use by {owner}: waiting {until}")
            elif owner != seen and 0 <= wait <= now - began:
                raise ConfigError(
                    f"in use by {owner}", field=f"run {address}", remedy="wait until it ends or stop it"
                )
            if owner != seen:
                seen, changed = owner, now
            return now - changed >= silence

        until_free = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda free: not free),
            wait=tenacity.wait_fixed(min(2.0, self.timing.interval)),
        )
        while True:
            until_free(is_free)
            self.write(self.me)
            # The storage has no locks. Of several processes that write at once, the last one is the owner.
            time.sleep(self.timing.settle)
            if self._is_mine(self.read()):
                return

    def renew(self, stop: threading.Event) -> None:
        """Renew the lease at intervals until the event is set; runs in a thread."""
        me = self.me
        while not stop.wait(self.timing.interval):
            try:
                owner = self.read()
                if owner is None or self._is_mine(owner):
                    me = replace(me, beats=me.beats + 1)
                    self.write(me)
            except OSError as error:  # the next push reports it to the user
                _LOG.info("%s: %s", self._objects.address, reason_of(error))

    def check(self) -> None:
        """Check that no other process has taken the lease over.

        Raises:
            IstanasError: another process has taken it over.
        """
        owner = self.read()
        if owner is not None and not self._is_mine(owner):
            raise IstanasError(
                f"{self._objects.address}: was taken over by {owner}, because this process had not renewed its lease "
                f"for {self.timing.silence:.0f} s",
                field="runtime.runs_dir",
                remedy="let that process finish",
            )

    def release(self) -> None:
        """Release the lease, and delete the folder if it holds nothing else."""
        try:
            if self._is_mine(self.read()):
                self._objects.delete(OWNER_OBJECT)
                if not self._objects.stamps():
                    self._objects.delete_folder()
        except OSError as error:  # the lease then expires
            _LOG.info("%s: %s", self._objects.address, reason_of(error))

    def read(self) -> Owner | None:
        """Return the current owner, or None."""
        try:
            return Owner(**json.loads(self._objects.get(OWNER_OBJECT)))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # written by another version
            return Owner("another machine", 0, 0.0, "")

    def write(self, owner: Owner) -> None:
        """Write the owner."""
        # The length is constant, because pyarrow requests it before the content, and the object may change in between.
        self._objects.put(OWNER_OBJECT, json.dumps(asdict(owner)).ljust(OWNER_LENGTH).encode())

    def _is_mine(self, owner: Owner | None) -> bool:
        return owner is not None and owner.key == self.me.key


def _process_namespace() -> str:
    """Return the boot id and the container of this process; process ids are unique only within them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not on Linux
        return ""
