"""Packing of a picture folder into shards, tar files in the WebDataset layout, with an index.

Which pictures a shard contains is planned before any is written, so that each shard is written by one process, and the
same command continues after it was killed: shards that are complete are kept. The bytes depend on the pictures and the
settings alone: members have no time and no owner, and their order follows from the names of the files. That order is
random with regard to the classes, as programs that read shards from the start to the end expect.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from istanas.data.cache import reason, sha256
from istanas.data.folders import check_text
from istanas.data.pool import Pool, Progress
from istanas.data.reading import (
    DEFAULT_DECODING,
    Broken,
    Content,
    Flag,
    fingerprint_of,
    inspect_content,
    read_picture,
    shown,
    unreadable,
)
from istanas.data.request import GivenFolder
from istanas.data.shard_files import SAMPLE, SPLITS, FolderShards, Shard, excerpt_of
from istanas.data.shard_index import (
    INDEX_FILE,
    read_index,
    read_table,
    rows_table,
    shard_of,
    write_index,
    write_table,
)
from istanas.data.survey import FACTS, Survey, survey_folder
from istanas.errors import ConfigError, DataError
from istanas.files import replacing_file

PARTS = ".parts"
"""Folder of the rows of the shards that are complete, until the index is written."""

PACKED_FOLDER = GivenFolder(
    "DIR", "name", "--allow-left-out", "--test-fraction", "let --test-fraction choose them from"
)
"""How error messages name the picture folder: as the arguments of `istanas pack`."""

_VERSION = 1
_LOCK_SECONDS = 2  # the processes of a command that was killed may have inherited its lock, until they end
_PLANNED = 64  # pictures whose size after resizing is measured to plan the shards
_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
_OVERHEAD = 5 * _BLOCK  # headers of three members, and the contents of .cls and .json
_SUFFIX = "jpg"  # of resized pictures
_KEPT_AS_THEY_ARE = Flag.TRANSPARENT | Flag.DEEP | Flag.SEVERAL_FRAMES


@dataclass(frozen=True)
class PackSettings:
    """How pictures are packed.

    Args:
        shard_size: Largest size of a shard in bytes; with `resize`, about the size. A larger picture gets its own.
        resize: Side in pixels to which the shorter side of larger pictures is reduced; None keeps the files' bytes.
        quality: Quality of resized pictures as JPEG, 1..100.
    """

    shard_size: int = 256_000_000
    resize: int | None = None
    quality: int = 92


@dataclass(frozen=True)
class Packed:
    """What was packed.

    Args:
        shards: Number of shards.
        pictures: Number of pictures.
        n_train: Number of training pictures among them.
        classes: Number of classes.
        bytes: Size of all shards.
        written: Number of shards that this call has written; the others were complete.
        notes: Lines for the user.
    """

    shards: int
    pictures: int
    n_train: int
    classes: int
    bytes: int
    written: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Task:
    """A shard to write: its name, the folder, and the pictures that it contains in this order."""

    name: str
    root: str
    out: str
    settings: PackSettings
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    facts: NDArray[np.void]
    first: int


def pack_folder(
    root: Path,
    out: Path,
    settings: PackSettings,
    *,
    cache_dir: Path,
    allow_left_out: bool = False,
    test_fraction: float = 0.0,
    processes: int | None = None,
    progress: Progress | None = None,
    checking: Progress | None = None,
) -> Packed:
    """Pack a picture folder into shards, or continue packing.

    Args:
        root: The folder, `train/CLASS/*` and `test/CLASS/*` (or `val/CLASS/*`); with `test_fraction`, `CLASS/*`.
        out: The folder of the shards, `train/shard-000000.tar` and so on, and of their index.
        settings: How they are packed.
        cache_dir: Folder in which the facts about the pictures are cached.
        allow_left_out, test_fraction: See `istanas.data.load_dataset`.
        processes: Number of processes; by default one per usable core.
        progress: Called with (pictures packed, pictures in total).
        checking: Called with (headers read, pictures in total).

    Raises:
        DataError: If the folder or a picture cannot be used.
        ConfigError: If `out` contains other shards, or is in use by another process.

    Example:
        >>> PackSettings(resize=256).quality
        92
    """
    from filelock import FileLock, Timeout

    survey = survey_folder(
        root,
        cache_dir=cache_dir,
        allow_left_out=allow_left_out,
        progress=checking,
        test_fraction=test_fraction,
        pool=Pool(processes=processes, field=PACKED_FOLDER.field),
        given=PACKED_FOLDER,
    )
    for path in survey.listing.paths:
        check_text(root / path, path, PACKED_FOLDER, "file")
    plan = _digest(survey, settings)
    parts = _prepared(root, out) / PARTS
    parts.mkdir(exist_ok=True)
    try:
        with FileLock(parts / "lock", timeout=_LOCK_SECONDS):
            return _pack(root, out, settings, survey, plan, processes, progress)
    except Timeout:
        raise ConfigError(
            f"another process packs into {shown(out)}", field="--out", remedy="wait for it, or name another"
        ) from None


def _prepared(root: Path, out: Path) -> Path:
    """Return the folder of shards, which is created if it is missing."""
    inside, target = os.path.realpath(root), os.path.realpath(out)
    if os.path.commonpath([inside, target]) == inside:
        raise ConfigError(
            f"{shown(out)} lies in the folder that is packed", field="--out", remedy="name another folder"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{shown(out)} cannot be created ({reason(error)})", field="--out", remedy="name another folder"
        ) from error
    return out


def _digest(survey: Survey, settings: PackSettings) -> str:
    """Return the digest of the pictures and settings, from which all bytes of the shards follow."""
    listing = survey.listing
    text = json.dumps(
        [_VERSION, asdict(settings), listing.class_names, listing.n_train, [str(p) for p in listing.paths]]
    )
    return sha256(text.encode(), np.ascontiguousarray(survey.facts["fingerprint"]).data)


def _pack(
    root: Path,
    out: Path,
    settings: PackSettings,
    survey: Survey,
    plan: str,
    processes: int | None,
    progress: Progress | None,
) -> Packed:
    listing, parts = survey.listing, out / PARTS
    _check_same_plan(out, plan)
    if _is_complete(out):
        shutil.rmtree(parts)
        return _packed(out, survey, settings, 0)
    tasks = _tasks(root, out, settings, survey)
    for split in SPLITS:
        (parts / split).mkdir(exist_ok=True)
    for abandoned in out.glob("*/.*.tmp"):  # of a process that was killed
        abandoned.unlink()
    done = {task.name: found for task in tasks if (found := _complete(out, task)) is not None}
    packed = sum(len(task.paths) for task in tasks if task.name in done)
    if progress is not None:
        progress(packed, len(listing.paths))
    open_tasks = [task for task in tasks if task.name not in done]
    for (task,), found in Pool(1, 2, processes, PACKED_FOLDER.field).map(_write_chunk, open_tasks):
        done[task.name] = found
        packed += len(task.paths)
        if progress is not None:
            progress(packed, len(listing.paths))
    shards = [done[task.name][0] for task in tasks]
    write_index(out, shards, [done[task.name][1] for task in tasks], plan=plan, field=PACKED_FOLDER.field)
    shutil.rmtree(parts)
    return _packed(out, survey, settings, len(open_tasks))


def _is_complete(out: Path) -> bool:
    """Return whether a folder has an index, and the shards that it describes."""
    try:
        read_index(FolderShards(str(out), "--out"))
    except DataError:
        return False
    return True


def _packed(out: Path, survey: Survey, settings: PackSettings, written: int) -> Packed:
    index = read_index(FolderShards(str(out), "--out"))
    return Packed(
        shards=len(index.shards),
        pictures=len(index.samples),
        n_train=index.n_train,
        classes=len(index.class_names),
        bytes=sum(shard.size for shard in index.shards),
        written=written,
        notes=tuple(_notes(survey, settings)),
    )


def _notes(survey: Survey, settings: PackSettings) -> list[str]:
    _, *notes = survey.notes(settings.resize, DEFAULT_DECODING)  # the first describes what a job would read
    kept = (survey.facts["flags"] & int(_KEPT_AS_THEY_ARE)) > 0
    if settings.resize is not None and kept.any():
        notes.append(
            f"{int(kept.sum()):,} pictures with transparency, several frames or more than 8 bits per channel keep "
            "their size"
        )
    return notes


def _check_same_plan(out: Path, plan: str) -> None:
    """Refuse a folder that contains other shards, which would be mixed with the new ones.

    Otherwise, the plan is noted, because a process that is killed may leave a shard without its rows.
    """
    index, note = out / INDEX_FILE, out / PARTS / "plan"
    found: object = plan
    if index.is_file():
        with contextlib.suppress(DataError):  # a damaged index, which does not say what the shards contain
            found = None
            found = read_table(index.read_bytes(), str(index), "--out")[1].get("plan")
    elif note.is_file():
        found = note.read_bytes().decode(errors="replace")
    elif any(out.glob("*/*.tar")):
        found = ""
    if found != plan:
        raise ConfigError(
            f"{shown(out)} contains shards of other pictures or settings, or its {INDEX_FILE} is damaged"
            if found is None
            else f"{shown(out)} contains shards of other pictures or settings",
            field="--out",
            remedy="name another folder, or delete it",
        )
    with replacing_file(note) as new:
        new.write_text(plan)


# ---------- the plan
def _tasks(root: Path, out: Path, settings: PackSettings, survey: Survey) -> list[_Task]:
    """Divide the pictures among shards."""
    listing = survey.listing
    tasks: list[_Task] = []
    labels = listing.labels.numpy()
    for split, start, end in (("train", 0, listing.n_train), ("test", listing.n_train, len(listing.paths))):
        order = _mixed(listing.paths, start, end)
        sizes = _sizes(root, settings, survey, order)
        firsts = _cuts(sizes, settings.shard_size)
        for number, (first, last) in enumerate(zip(firsts, [*firsts[1:], len(order)], strict=True)):
            chosen = order[first:last]
            tasks.append(
                _Task(
                    name=f"{split}/shard-{number:06d}.tar",
                    root=str(root),
                    out=str(out),
                    settings=settings,
                    paths=tuple(listing.paths[index] for index in chosen),
                    labels=tuple(labels[chosen].tolist()),
                    classes=listing.class_names,
                    facts=survey.facts[chosen],
                    first=first,
                )
            )
    return tasks


def _mixed(paths: Sequence[str], start: int, end: int) -> NDArray[np.int64]:
    """Return the indices start..end-1 in the order of the digests of their paths, which no library can change."""
    digests = [hashlib.blake2b(paths[i].encode(), digest_size=16).digest() for i in range(start, end)]
    return np.array(sorted(range(start, end), key=lambda i: (digests[i - start], paths[i])), np.int64)


def _sizes(root: Path, settings: PackSettings, survey: Survey, order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bytes that each picture takes in a shard; after resizing, the mean of some is taken for all."""
    paths = survey.listing.paths
    if settings.resize is None:
        return np.array([os.path.getsize(root / paths[index]) for index in order], np.int64)
    some = order[:_PLANNED]
    sizes = [len(_content(root / paths[index], survey.facts[index], settings)[0]) for index in some]
    return np.full(len(order), sum(sizes) // len(sizes), np.int64)


def _cuts(sizes: NDArray[np.int64], most: int) -> list[int]:
    """Return the first picture of each shard.

    Example:
        >>> _cuts(np.array([30_000, 30_000, 200_000, 10]), 100_000)
        [0, 2, 3]
    """
    firsts, used = [0], 0
    for index, size in enumerate(sizes.tolist()):
        size = -(-size // _BLOCK) * _BLOCK + _OVERHEAD
        if used and used + size + _RECORD > most:
            firsts.append(index)
            used = 0
        used += size
    return firsts


# ---------- one shard
def _complete(out: Path, task: _Task) -> tuple[Shard, Any] | None:
    """Return the description and the rows of a shard that an earlier call has completed."""
    file = _part(out, task.name)
    if not file.is_file():
        return None
    table, meta = read_table(file.read_bytes(), str(file), "--out")
    shard = shard_of(meta["shard"])
    path = out / task.name
    if not path.is_file() or path.stat().st_size != shard.size:
        return None
    return shard, table


def _part(out: Path, name: str) -> Path:
    return out / PARTS / Path(name).with_suffix(".parquet")


def _write_chunk(tasks: Sequence[_Task]) -> tuple[Shard, Any]:
    (task,) = tasks
    return _write_shard(task)


def _write_shard(task: _Task) -> tuple[Shard, Any]:
    """Write a shard and its rows, each completely or not at all."""
    path = Path(task.out, task.name)
    path.parent.mkdir(exist_ok=True)
    rows, facts, files = [], [], []
    with replacing_file(path) as new, open(new, "w+b") as file:
        stream = _Checked(file)
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
            for place, path_in in enumerate(task.paths):
                content, found, suffix = _content(Path(task.root, path_in), task.facts[place], task.settings)
                name = Path(path_in).name
                files.append(name)
                rows.append(
                    _add_sample(
                        tar, stream, task.first + place, content, suffix, name, task, task.labels[place]
                    )
                )
                facts.append(found)
        file.flush()
        size = file.tell()
        excerpt = excerpt_of(lambda offset, count: os.pread(file.fileno(), count, offset), size)
    shard = Shard(task.name, size, len(rows), stream.sha256.hexdigest(), excerpt)
    classes = [task.classes[label] for label in task.labels]
    table = rows_table(classes, files, np.array(rows, SAMPLE), np.array(facts, FACTS))
    write_table(_part(Path(task.out), task.name), table, {"version": _VERSION, "shard": asdict(shard)})
    return shard, table


def _add_sample(
    tar: tarfile.TarFile,
    stream: _Checked,
    number: int,
    content: bytes,
    suffix: str,
    name: str,
    task: _Task,
    label: int,
) -> tuple[int, ...]:
    """Write the members of a sample, and return its record, see `SAMPLE`."""
    start = stream.begin()
    said = {"class": task.classes[label], "file": name, "label": label}
    for ending, data in (
        (suffix, content),
        ("cls", str(label).encode()),
        ("json", json.dumps(said, ensure_ascii=False).encode()),
    ):
        member = tarfile.TarInfo(f"{number:06d}.{ending}")  # by default without time and owner
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return 0, 0, start, stream.size - start, _BLOCK, len(content), stream.crc


def _content(path: Path, facts: np.void, settings: PackSettings) -> tuple[bytes, tuple[Any, ...], str]:
    """Return (content, record of facts, suffix without dot) of a picture as it is packed.

    Raises:
        DataError: If the file has changed since it was surveyed, or cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(Broken.by(str(path), error), field=PACKED_FOLDER.field) from error
    if fingerprint_of(content) != facts["fingerprint"].tobytes():
        raise DataError(
            f"{shown(path)} has changed while the folder was packed",
            field=PACKED_FOLDER.field,
            remedy="run the command again when nothing writes to the folder",
        )
    small = settings.resize is None or min(int(facts["width"]), int(facts["height"])) <= settings.resize
    if small or int(facts["flags"]) & int(_KEPT_AS_THEY_ARE):
        return content, tuple(facts[name] for name in FACTS.names or ()), path.suffix[1:].lower()
    content = _resized(Content(content, str(path)), settings)
    found = inspect_content(Content(content, str(path)))
    if isinstance(found, Broken):
        raise unreadable(found, field=PACKED_FOLDER.field)
    return content, (*found[:5], np.frombuffer(found.fingerprint, np.uint8)), _SUFFIX


def _resized(content: Content, settings: PackSettings) -> bytes:
    """Return an upright picture whose shorter side is `settings.resize`, as JPEG."""
    from PIL import Image

    assert settings.resize is not None
    picture, is_grey = read_picture(content)
    scale = settings.resize / min(picture.size)
    width, height = (max(settings.resize, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    (picture.convert("L") if is_grey else picture).save(stream, "JPEG", quality=settings.quality)
    return stream.getvalue()


class _Checked:
    """A file that tarfile writes to, with the SHA-256 of all bytes and the CRC-32 of the last sample."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256, self.size, self.crc = hashlib.sha256(), 0, 0

    def begin(self) -> int:
        """Begin a sample, and return its offset."""
        self.crc = 0
        return self.size

    def tell(self) -> int:
        """Return the position."""
        return self.size

    def write(self, data: bytes) -> int:
        """Write bytes."""
        self._file.write(data)
        self.sha256.update(data)
        self.crc = zlib.crc32(data, self.crc)
        self.size += len(data)
        return len(data)
