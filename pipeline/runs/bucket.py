"""Run directories on `s3://` and `gs://`: worked on in a local copy, mirrored with pyarrow's file systems, as Ray does.

What lies in the storage is the truth. It is fetched when a job begins, and whatever must not be lost is sent before
it counts: every checkpoint before its epoch is done, the results before the run is finished. Files go up in an order
that makes sense if it is cut anywhere, see `_place`; an object appears whole or not at all. The copy lies under the
user's cache folder, at a path that spells the address, so that either can be told from the other.

A sweep's trials lie in its run directory and are run directories of their own: each is held, fetched and sent by the
process that works on it, on whatever machine; only their records are written by the sweep's process, too.

Folders and `file://` are not copied: there the functions of this module do nothing.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import posixpath
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import psutil
import tenacity

from istanas.errors import ConfigError, IstanasError
from pipeline.base.addresses import CREDENTIALS, is_remote, joined_address, names_in
from pipeline.base.files import atomic_write
from pipeline.base.redaction import without_secrets
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import LINK_FILE, RECORD_FILE

_LOG = logging.getLogger(__name__)

OWNER_OBJECT = ".owner.json"
OWNER_LENGTH = 512
NOT_MIRRORED = "ray"  # Ray's logs; and names with a dot in front are locks and temporaries

RETRY_SECONDS = 300.0  # that a running job waits for a storage that has gone; pyarrow tries for some seconds
SECONDS_BETWEEN_BEATS = 20.0  # of a run's owner
SECONDS_TO_BEAT = 60.0  # after which an owner that was not heard of counts as gone
SECONDS_TO_SETTLE = 1.0  # in which two that take a run at the same moment are seen by each other
_MANIFEST = re.compile(r"checkpoints/epoch-[0-9]+\.json")
RUN_FOLDER = re.compile(r".+-(search|retrain)-[0-9a-f]{10}")  # in a sweep's run directory: runs of their own

Say = Callable[[str], None]
Wanted = Callable[[str], bool]  # of a file, by its name in the run directory


class AwayError(IstanasError):
    """A storage that can't be used, for want of network, rights or room."""


def local(address: str) -> Path:
    """Where an address is worked on: a folder is itself, for a storage it is the copy. Nothing is read or made.

    Example:
        >>> local("runs"), local("file:///mnt/runs")
        (PosixPath('runs'), PosixPath('/mnt/runs'))
    """
    if address.startswith("file://"):
        return Path(unquote(urlsplit(address).path))
    if not is_remote(address):
        return Path(address)
    url = urlsplit(address)
    query = base64.urlsafe_b64encode(url.query.encode()).decode().rstrip("=")
    return _copies().joinpath(f"{url.scheme}-{query}", url.netloc, *names_in(url))


def shown(path: Path) -> str:
    """What people and records are told of a path: of a copy, the address that it is a copy of.

    Example:
        >>> shown(Path("runs/digits")), shown(local("s3://bucket/runs?region=eu-west-1") / "digits")
        ('runs/digits', 's3://bucket/runs/digits?region=eu-west-1')
    """
    try:
        first, *parts = path.relative_to(_copies()).parts
    except ValueError:
        return str(path)
    scheme, _, encoded = first.partition("-")
    query = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode()
    return joined_address(scheme, parts, query)


def _copies() -> Path:
    from istanas.data.cache import default_cache_dir  # imports torch, which most commands can do without

    return default_cache_dir() / "storage"


def named(path: Path) -> str:
    """What a process on another machine may call a path: absolute, or the address that it is a copy of.

    Example:
        >>> named(Path("/runs/digits")), named(local("s3://bucket/runs") / "digits")
        ('/runs/digits', 's3://bucket/runs/digits')
    """
    return shown(path) if is_copy(path) else str(path.resolve())


def is_copy(path: Path) -> bool:
    """Whether a path is that of a copy of something in a storage."""
    return path.is_relative_to(_copies())


# ---------- what jobs and commands call
def push(path: Path, *, once: bool = False) -> None:
    """Send what has changed in a run directory that this process holds; nothing to do for a folder.

    Args:
        path: the run directory.
        once: the run has failed already: try once, and say so if that fails too.

    Raises:
        AwayError: the storage was away for `RETRY_SECONDS`.
        IstanasError: another process has taken the run over.
    """
    mirror = _held.get(path)
    if mirror is None or (once and mirror.is_away):
        return
    try:
        _persistently(mirror, mirror.push, 0 if once else RETRY_SECONDS)
    except IstanasError as error:
        mirror.is_away = True
        if not once:
            raise
        _LOG.warning("%s", error)


@contextlib.contextmanager
def held(path: Path, say: Say, *, wait: float = 0) -> Iterator[None]:
    """Hold a run directory of a storage for this process, and fetch it; nothing to do for a folder, or if it is held.

    Args:
        path: the run directory, locked on this machine.
        say: told if there is something to wait for.
        wait: so many seconds for another process that works on the run; -1: for ever.

    Raises:
        AwayError: the storage can't be used; nothing was written then.
        ConfigError: another process works on the run.
    """
    if not is_copy(path) or path in _held:
        yield
        return
    mirror = _Mirror(path)
    beating = threading.Event()
    heart = threading.Thread(target=mirror.beat, args=(beating,), daemon=True)
    try:
        try:
            with mirror.failures():
                mirror.take(say, wait)
                heart.start()  # now: fetching may take longer than others wait for a beat
                mirror.pull()
        except AwayError:
            mirror.is_away = True
            raise
        _held[path] = mirror
        yield
    finally:
        _held.pop(path, None)
        beating.set()
        if not mirror.is_away:  # else whoever comes next waits a minute
            if heart.is_alive():
                heart.join()
            mirror.leave()


def fetch(address: str) -> Path:
    """The run directory at an address, brought up to date if it is a copy.

    One that a process on this machine works on is the newest there is, and left alone.

    Raises:
        AwayError: the storage can't be used.
        ConfigError: there is no run.
    """
    path = local(address)
    if not is_copy(path):
        return path
    mirror = _Mirror(path)
    with mirror.failures():
        there = mirror.list()
        if RECORD_FILE not in there:
            raise ConfigError(
                f"run {mirror.address}: there is no run (no {RECORD_FILE}), give the address of one"
            )
        _pull_unless_in_use(mirror)
    return path


def fetch_parts(path: Path, wanted: Wanted) -> None:
    """Bring some files of a run directory up to date, as `fetch` does with all, be there a run or not.

    Raises:
        AwayError: the storage can't be used.
    """
    if is_copy(path):
        mirror = _Mirror(path)
        _persistently(mirror, lambda: _pull_unless_in_use(mirror, wanted), RETRY_SECONDS)


def fetch_records(folder: Path) -> None:
    """Bring the records of all runs in a folder of runs, or in a sweep's run directory, up to date, if it is a copy.

    Enough to find a run by.

    Raises:
        AwayError: the storage can't be used.
    """
    if not is_copy(folder):
        return
    everything = _Mirror(folder)
    with everything.failures():
        there = everything.names()
        runs = {posixpath.dirname(name) for name in there if posixpath.basename(name) == RECORD_FILE}
        runs |= {file.parent.relative_to(folder).as_posix() for file in folder.glob(f"**/{RECORD_FILE}")}
        for run in sorted(runs - {"", "."}):
            files = [f"{run}/{name}" for name in (RECORD_FILE, LINK_FILE)]
            if any(there.get(file) != _stamp_of(folder / file) for file in files):
                _pull_unless_in_use(_Mirror(folder / run), lambda name: name in (RECORD_FILE, LINK_FILE))


def send(path: Path, *names: str) -> None:
    """Send some files of a run that another process may hold; nothing to do for a folder.

    Raises:
        AwayError: the storage was away for `RETRY_SECONDS`.
    """
    if not is_copy(path):
        return
    mirror = _Mirror(path)

    def work() -> None:
        for name in names:
            if (path / name).is_file():
                mirror.put(name, (path / name).read_bytes())

    _persistently(mirror, work, RETRY_SECONDS)


def push_cleared(path: Path) -> None:
    """`push` of a run directory that was cleared, to start over: the runs in it go, too."""
    push(path)
    if (mirror := _held.get(path)) is not None:
        _persistently(mirror, mirror.delete_runs, RETRY_SECONDS)


def _pull_unless_in_use(mirror: _Mirror, wanted: Wanted | None = None) -> None:
    lock = contextlib.ExitStack()
    try:
        lock.enter_context(RunDir(mirror.path).lock())
    except ConfigError:  # by a process on this machine
        return
    with lock:
        mirror.pull(wanted)


def _persistently(mirror: _Mirror, work: Callable[[], None], seconds: float) -> None:
    """Do it, again and again for so long while the storage is away; said once, and when it is back."""

    def tell(state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            reason = _reason(state.outcome.exception())
            _LOG.warning(
                "%s: can't be reached (%s); trying again for %.0f minutes",
                mirror.address,
                reason,
                seconds / 60,
            )

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_of_storage),
        wait=tenacity.wait_exponential(max=30),
        stop=tenacity.stop_after_delay(seconds),
        before_sleep=tell,
        reraise=True,
    )
    with mirror.failures():
        retrying(work)
    if retrying.statistics["attempt_number"] > 1:
        _LOG.warning("%s: is back, nothing is missing there", mirror.address)


# ---------- one run directory and its counterpart
class _Stamp(NamedTuple):
    """By what two versions of a file are told apart; a file has the time of its object once they are the same."""

    size: int
    changed: int  # ns


def _stamp_of(path: Path) -> _Stamp | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return _Stamp(stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class _Owner:
    """Who works on a run: `key` is of one sitting, `beats` shows that it lives."""

    host: str
    process: int
    started: float
    key: str
    beats: int = 0
    place: str = ""  # where process numbers are this machine's: names of machines are not always their own

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    @property
    def is_dead(self) -> bool:
        """Whether it was a process of this machine that is there no more."""
        if (self.host, self.place) != (socket.gethostname(), _place_of_processes()):
            return False
        try:
            return abs(psutil.Process(self.process).create_time() - self.started) > 1
        except psutil.NoSuchProcess:
            return True


class _Mirror:
    """A run directory's copy and the objects that it is a copy of."""

    def __init__(self, path: Path) -> None:
        self.path, self.address = path, shown(path)
        process = psutil.Process()
        self._me = _Owner(
            socket.gethostname(),
            process.pid,
            process.create_time(),
            uuid.uuid4().hex,
            place=_place_of_processes(),
        )
        self._there: dict[str, _Stamp] = {}
        self.is_away = False  # for good: there is no sense in trying again
        with self.failures():
            self._fs, self._base = _file_system(self.address)

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """What the storage refuses, as one line."""
        try:
            yield
        except OSError as error:
            if not _is_of_storage(error):
                raise
            scheme = self.address.partition("://")[0]
            raise AwayError(
                f"runtime.runs_dir: {self.address}: {_reason(error)}: {_remedy(error, scheme)}; then the same command "
                "goes on"
            ) from error

    # ----- single objects
    def put(self, name: str, data: Any) -> None:
        # In one piece: what is interrupted before `close` is no object.
        stream = self._fs.open_output_stream(f"{self._base}/{name}")
        stream.write(data)
        stream.close()

    def get(self, name: str) -> bytes:
        try:
            with self._fs.open_input_stream(f"{self._base}/{name}") as stream:
                data: bytes = stream.read()
        except OSError as error:
            if "NO_SUCH_KEY" in str(error):  # deleted since its length was asked for
                raise FileNotFoundError(name) from None
            raise
        return data

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(f"{self._base}/{name}")

    def list(self) -> dict[str, _Stamp]:
        """Names and stamps of all objects that have a counterpart here."""
        self._there = {name: stamp for name, stamp in self._look().items() if _is_mirrored(name)}
        return self._there

    def names(self) -> dict[str, _Stamp]:
        """Of all objects, those of runs in this one included, with their stamps."""
        return self._look()

    def delete_runs(self) -> None:
        """Delete the runs in this one."""
        for folder in {name.partition("/")[0] for name in self._look() if _is_of_another_run(name)}:
            self._fs.delete_dir(f"{self._base}/{folder}")

    def _look(self, folder: str | None = None) -> dict[str, _Stamp]:
        """Names and stamps of the objects, all of them, or only those that lie in a folder itself."""
        from pyarrow.fs import FileSelector, FileType

        place = f"{self._base}/{folder}" if folder else self._base
        infos = self._fs.get_file_info(FileSelector(place, recursive=folder is None, allow_not_found=True))
        files = [info for info in infos if info.type == FileType.File]
        return {posixpath.relpath(info.path, self._base): _Stamp(info.size, info.mtime_ns) for info in files}

    # ----- all of them
    def pull(self, wanted: Wanted | None = None) -> None:
        """Make the copy what is there, all of it or some files; a file that is the same already stays."""
        _make_private(self.path)
        here = self._here()
        for name, stamp in self.list().items():
            if here.get(name) != stamp and (wanted is None or wanted(name)):
                atomic_write(self.path / name, self.get(name))
                self._stamp(name)
        for name in here.keys() - self._there.keys():
            if wanted is None or wanted(name):
                (self.path / name).unlink()

    def push(self) -> None:
        """Make what is there the copy."""
        owner = self._owner()
        if owner is not None and owner.key != self._me.key:
            raise IstanasError(
                f"runtime.runs_dir: {self.address}: was taken over by {owner}, which did not hear of this process for "
                f"{SECONDS_TO_BEAT:.0f} s: let that one go on"
            )
        here = self._here()
        gone = sorted(self._there.keys() - here.keys(), key=_place, reverse=True)
        # Started over: at no moment is there an old record and a new file.
        first = gone if RECORD_FILE in gone else self._outdated_manifests(here)
        for name in first:
            self._forget(name)
        changed = sorted((n for n, stamp in here.items() if self._there.get(n) != stamp), key=_place)
        for name in changed:
            self.put(name, (self.path / name).read_bytes())
        for name in gone:
            if name in self._there:
                self._forget(name)
        # Not all of them: a sweep has many trials.
        for folder in sorted({posixpath.dirname(name) for name in changed}):
            self._there |= {name: stamp for name, stamp in self._look(folder).items() if _is_mirrored(name)}
        after = self._here()
        for name in changed:
            if after.get(name) == here[name] and name in self._there:
                self._stamp(name)

    def _forget(self, name: str) -> None:
        self.delete(name)
        del self._there[name]

    def _outdated_manifests(self, here: Mapping[str, _Stamp]) -> Sequence[str]:
        """Names of the checksums of epochs that are done again, or were abandoned.

        They are deleted before anything is sent: the log that their checkpoints match is about to be overwritten.
        """
        newest = max(map(_epoch, filter(_MANIFEST.fullmatch, here)), default=0)
        return [
            name
            for name, stamp in self._there.items()
            if _MANIFEST.fullmatch(name) and _epoch(name) >= newest and here.get(name) != stamp
        ]

    def _stamp(self, name: str) -> None:
        os.utime(self.path / name, ns=(self._there[name].changed,) * 2)

    def _here(self) -> dict[str, _Stamp]:
        stamps = {}
        for folder, folders, files in os.walk(self.path):
            folders[:] = [
                name for name in folders if not name.startswith(".") and not RUN_FOLDER.fullmatch(name)
            ]
            for file in files:
                path = Path(folder) / file
                name = path.relative_to(self.path).as_posix()
                if _is_mirrored(name) and (stamp := _stamp_of(path)) is not None:
                    stamps[name] = stamp
        return stamps

    # ----- whose it is
    def take(self, say: Say, wait: float = 0) -> None:
        """Become the owner, once no other is alive.

        Args:
            say: told if one may be.
            wait: so many seconds for one that is; -1: for ever.

        Raises:
            ConfigError: another is, for longer.
        """
        seen: _Owner | None = None
        began = changed = time.monotonic()

        def is_free() -> bool:
            nonlocal seen, changed
            owner, now = self._owner(), time.monotonic()
            if owner is None or owner.is_dead:
                return True
            if seen is None:
                patience = f"{SECONDS_TO_BEAT:.0f} s to see whether it still is"
                say(
                    f"{self.address}: {owner} was at it: waiting {patience if wait == 0 else 'until it has done'}"
                )
            elif owner != seen and 0 <= wait <= now - began:
                raise ConfigError(f"run {self.address}: in use by {owner}; wait until it ends or stop it")
            if owner != seen:
                seen, changed = owner, now
            return now - changed >= SECONDS_TO_BEAT

        until_free = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda free: not free),
            wait=tenacity.wait_fixed(min(2.0, SECONDS_BETWEEN_BEATS)),
        )
        while True:
            until_free(is_free)
            self._write_owner(self._me)
            # Others wait for the same, and the storage has no lock: the last of them is the owner.
            time.sleep(SECONDS_TO_SETTLE)
            owner = self._owner()
            if owner is not None and owner.key == self._me.key:
                return

    def beat(self, ended: threading.Event) -> None:
        """Show again and again, in a thread, that the owner lives."""
        me = self._me
        while not ended.wait(SECONDS_BETWEEN_BEATS):
            try:
                owner = self._owner()
                if owner is None or owner.key == me.key:
                    me = replace(me, beats=me.beats + 1)
                    self._write_owner(me)
            except OSError as error:  # the next push tells the user; that may be an hour away
                _LOG.info("%s: %s", self.address, _reason(error))

    def leave(self) -> None:
        """Be the owner no longer, and leave nothing behind where no run was begun."""
        try:
            owner = self._owner()
            if owner is not None and owner.key == self._me.key:
                self.delete(OWNER_OBJECT)
                if not self.names():
                    self._fs.delete_dir(self._base)
        except OSError as error:  # away at the end: as if it had been so before
            _LOG.info("%s: %s", self.address, _reason(error))

    def _owner(self) -> _Owner | None:
        try:
            return _Owner(**json.loads(self.get(OWNER_OBJECT)))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # of another version
            return _Owner("another machine", 0, 0.0, "")

    def _write_owner(self, owner: _Owner) -> None:
        # All of one length: pyarrow asks for an object's length first, and it may be written anew before it is read.
        self.put(OWNER_OBJECT, json.dumps(asdict(owner)).ljust(OWNER_LENGTH).encode())


_held: dict[Path, _Mirror] = {}


def _place_of_processes() -> str:
    """This boot of this machine, and the container: two of them with one name do not know each other's processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not on Linux
        return ""


def _epoch(manifest: str) -> int:
    return int(manifest.removeprefix("checkpoints/epoch-").removesuffix(".json"))


def _place(name: str) -> int:
    """Return the rank in which objects are written; they are deleted in the opposite order.

    The log of epochs comes first, then a checkpoint of them, then the checksum that makes it count, then what is told
    of it, and the record last.
    """
    if not name.startswith("checkpoints/"):
        return 4 if name == RECORD_FILE else 3
    if _MANIFEST.fullmatch(name):
        return 2
    return 1 if name.endswith(".pt") else 0


def _is_mirrored(name: str) -> bool:
    parts = name.split("/")
    hidden = parts[0] == NOT_MIRRORED or any(part.startswith(".") for part in parts)
    return not hidden and not _is_of_another_run(name)


def _is_of_another_run(name: str) -> bool:
    folder, inside, _ = name.partition("/")
    return bool(inside) and RUN_FOLDER.fullmatch(folder) is not None


def _make_private(path: Path) -> None:
    """A folder below the user's cache, which only the user may look into."""
    top = _copies()
    top.mkdir(parents=True, exist_ok=True)
    top.chmod(0o700)
    path.mkdir(parents=True, exist_ok=True)


def _file_system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it: put together here, for a name may hold anything."""
    from pyarrow.fs import FileSystem

    url = urlsplit(address)
    query = url.query
    if url.scheme == "s3" and "allow_delayed_open" not in query:  # a small object is one request, else three
        query = "&".join(filter(None, [query, "allow_delayed_open=true"]))
    try:
        system, _ = FileSystem.from_uri(joined_address(url.scheme, [url.netloc], query))
        return system, "/".join([url.netloc, *names_in(url)])
    except (ValueError, TypeError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ConfigError(
            f"runtime.runs_dir: {address}: {' '.join(str(error).split()):.200}; correct the address"
        ) from None


def _is_of_storage(error: BaseException) -> bool:
    """Whether it is an error of a storage, and not of this machine's disk: those have a number."""
    return isinstance(error, OSError) and error.errno is None


def _reason(error: BaseException | None) -> str:
    """What a storage says, short and without secrets."""
    text = " ".join(str(error).split())
    return without_secrets(text.partition("AWS Error ")[2] or text)[:200]


def _remedy(error: OSError, scheme: str) -> str:
    text = str(error)
    if (
        "ACCESS_DENIED" in text
        or "CREDENTIALS" in text
        or "INVALID_ACCESS_KEY" in text
        or "SIGNATURE" in text
    ):
        return f"give credentials that may list, read, write and delete there ({CREDENTIALS[scheme]})"
    if "NO_SUCH_BUCKET" in text:
        return "make the bucket, or correct its name"
    return "check network and endpoint, and that the storage is up"
