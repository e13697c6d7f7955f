"""Reading of tar files in the WebDataset layout, to write the index of shards that have none.

The members of a sample follow each other, and have one name and different suffixes: `000001.jpg` and `000001.cls` or
`000001.json`. The label is the text of `.cls`, or "class" or "label" of `.json`. Python's tarfile reads the headers.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from istanas.data.cache import reason
from istanas.data.folders import TEST_SPLITS, not_a_folder
from istanas.data.pool import Pool, Progress
from istanas.data.reading import PICTURE_SUFFIXES, Broken, Content, inspect_content, shown, unreadable
from istanas.data.shard_files import SAMPLE, FolderShards, Shard, excerpt_of
from istanas.data.shard_index import rows_table, write_index
from istanas.data.survey import FACTS
from istanas.errors import DataError, LayoutError

_FIELD = "--index"  # the option of istanas pack, which names the folder
_BLOCK = tarfile.BLOCKSIZE
_LABELS = ("cls", "json")
_MOST_TEXT = 1 << 20  # bytes of a label
_MOST_DIGITS = 18  # of a class's number, which then fits into 64 bits
_MOST_BYTES = (1 << 31) - 1  # of a sample, which an index counts with 32 bits
_STEP = 1 << 20  # bytes after the last member that are read at once


@dataclass
class _Sample:
    """A sample: its region of the shard (`offset` to `end`), its picture, and the contents of its labels by suffix."""

    key: str
    offset: int
    end: int = 0
    picture: tuple[str, int, int] | None = None  # suffix, offset and length
    labels: dict[str, bytes] = field(default_factory=dict)


def index_shards(root: Path, progress: Progress | None = None, processes: int | None = None) -> None:
    """Write the index of a folder of shards, `train/*.tar` and `test/*.tar` (or `val/*.tar`).

    The classes have the order of their names, as in a picture folder. Only if no sample names its class, so that the
    numbers are the names, they have the order of the numbers.

    Args:
        root: The folder.
        progress: Called with (shards read, shards in total).
        processes: Number of processes; by default one per usable core.

    Raises:
        LayoutError: If there is no such folder.
        DataError: If a shard or a sample cannot be used.
    """
    if not root.is_dir():
        raise LayoutError(not_a_folder(root), field=_FIELD, remedy="name a folder of shards")
    if all((root / split).is_dir() for split in TEST_SPLITS):
        raise LayoutError(
            f"{shown(root)} has {' and '.join(f'{split}/' for split in TEST_SPLITS)}, of which one is read",
            field=_FIELD,
            remedy="move the other one out of the folder",
        )
    storage = FolderShards(str(root), _FIELD)
    names = sorted(storage.sizes(), key=lambda name: (not name.startswith("train/"), name))
    if not names:
        raise DataError(
            f"{shown(root)}/train contains no tar file", field=_FIELD, remedy="name a folder of shards"
        )
    shards, tables = [], []
    known = ClassNumbers()
    for _, (shard, table, in_shard) in Pool(1, 2, processes, _FIELD).map(_scan_chunk, names, str(root)):
        for number, name in in_shard.names.items():
            known.add(f"{root}/{shard.name}", number, name)
        shards.append(shard)
        tables.append(table)
        if progress is not None:
            progress(len(shards), len(names))
    is_named = any(table["class"].null_count < len(table) for table in tables)
    tables = [
        _with_names(f"{root}/{shard.name}", table, known) for shard, table in zip(shards, tables, strict=True)
    ]
    write_index(root, shards, tables, numbers=None if is_named else known.numbers, field=_FIELD)


@dataclass
class ClassNumbers:
    """The classes whose number and name are known: names by number, and numbers by name."""

    names: dict[int, str] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)

    def add(self, path: Path | str, number: int, name: str) -> None:
        """Add a class of a shard.

        Raises:
            DataError: If the number has another name, or the name another number.
        """
        if self.names.setdefault(number, name) != name:
            raise _bad(path, f"the label {number} stands for the classes {self.names[number]} and {name}")
        if self.numbers.setdefault(name, number) != number:
            raise _bad(path, f"the class {name} has the labels {self.numbers[name]} and {number}")


def _with_names(path: str, table: Any, known: ClassNumbers) -> Any:
    """Return the rows of a shard with the name of each class, which is its number if no sample names it."""
    import pyarrow as pa

    classes, numbers = table["class"].to_pylist(), table["number"].to_pylist()
    for place, number in enumerate(numbers):
        if classes[place] is None:
            classes[place] = known.names.get(number, str(number))
            known.add(path, number, classes[place])
    table = table.drop_columns(["number"])
    return table.set_column(table.schema.get_field_index("class"), "class", pa.array(classes, pa.string()))


def _scan_chunk(names: Sequence[str], root: str) -> tuple[Shard, Any, ClassNumbers]:
    (name,) = names
    return scan_shard(Path(root), name)


def scan_shard(root: Path, name: str) -> tuple[Shard, Any, ClassNumbers]:
    """Read a shard.

    Args:
        root: The folder of the data set.
        name: The shard, such as "train/shard-000000.tar".

    Returns:
        (the shard, its rows, the classes whose number and name its samples say). The rows are those of `rows_table`,
        where the class is null if a sample says its number only, and a column "number", null if it says its name only.

    Raises:
        DataError: If the tar file is damaged, contains links or names that lead out of it, or a sample has no label,
            several labels, no picture or a broken picture.
    """
    import pyarrow as pa

    path = root / name
    rows, classes, numbers, files, facts = [], [], [], [], []
    known = ClassNumbers()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        for sample in _samples(path, file, size):
            if sample.end - sample.offset > _MOST_BYTES:
                raise _bad(path, f"the sample {sample.key} has more than {_MOST_BYTES:,} bytes")
            file.seek(sample.offset)
            region = file.read(sample.end - sample.offset)
            number, class_name, file_name = _label(path, sample)
            if sample.picture is None:
                raise _bad(path, f"the sample {sample.key} has no picture")
            suffix, start, length = sample.picture
            start -= sample.offset
            shown_name = f"{path}/{sample.key}.{suffix}"
            found = inspect_content(Content(region[start : start + length], shown_name))
            if isinstance(found, Broken):
                raise unreadable(found, field=_FIELD)
            if number is not None and class_name is not None:
                known.add(path, number, class_name)
            classes.append(class_name)
            numbers.append(number)
            files.append(file_name or f"{os.path.basename(sample.key)}.{suffix}")
            rows.append((0, 0, sample.offset, len(region), start, length, zlib.crc32(region)))
            facts.append((*found[:5], np.frombuffer(found.fingerprint, np.uint8)))
        if not rows:
            raise _bad(path, "it contains no sample", "delete it")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        excerpt = excerpt_of(lambda offset, count: os.pread(file.fileno(), count, offset), size)
    table = rows_table(classes, files, np.array(rows, SAMPLE), np.array(facts, FACTS))
    table = table.append_column("number", pa.array(numbers, pa.int64()))
    return Shard(name, size, len(rows), digest, excerpt), table, known


def _samples(path: Path, file: BinaryIO, size: int) -> Iterator[_Sample]:
    """Yield the samples of a shard, in order."""
    seen: set[str] = set()
    sample: _Sample | None = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            end = 0
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # otherwise all headers stay in memory
                _check_member(path, member)
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if not member.isreg() or os.path.basename(member.name).startswith("."):
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield sample
                    if key in seen:
                        raise _bad(path, f"the sample {key} occurs twice")
                    seen.add(key)
                    sample = _Sample(key, member.offset)
                sample.end = end
                _add(path, sample, suffix.lower(), member, file)
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, RecursionError) as error:
        raise _bad(path, f"it is truncated or damaged ({reason(error)})", "copy it again") from error
    _check_end(path, file, end)
    if sample is not None:
        yield sample


def _check_end(path: Path, file: BinaryIO, end: int) -> None:
    """Check that only the end of an archive, zeros, follows its last member."""
    file.seek(end)
    if file.read(2 * _BLOCK) != bytes(2 * _BLOCK):
        raise _bad(path, "it is truncated or damaged (its end is missing)", "copy it again")
    while rest := file.read(_STEP):
        if rest.count(0) != len(rest):
            raise _bad(path, "data follow the end of the archive", "write each archive to a shard of its own")


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    """Raise an error for a member that would be dangerous if another program extracted it."""
    try:
        member.name.encode()
    except UnicodeEncodeError:
        raise _bad(path, f"the name of its member {member.name} is not UTF-8") from None
    if member.size < 0:
        raise _bad(path, f"its member {member.name} has a negative size")
    if member.name.startswith(("/", "\\")) or ".." in member.name.replace("\\", "/").split("/"):
        raise _bad(path, f"its member {member.name} leads out of the archive")
    if member.issparse() or not (member.isreg() or member.isdir()):
        kind = "link" if member.islnk() or member.issym() else "special file"
        raise _bad(path, f"its member {member.name} is a {kind}")


def _add(path: Path, sample: _Sample, suffix: str, member: tarfile.TarInfo, file: BinaryIO) -> None:
    """Add a member to its sample."""
    if f".{suffix}" in PICTURE_SUFFIXES:
        if sample.picture is not None:
            raise _bad(path, f"the sample {sample.key} has two pictures")
        sample.picture = suffix, member.offset_data, member.size
    elif suffix in _LABELS:
        if suffix in sample.labels:
            raise _bad(path, f"the sample {sample.key} has two labels")
        if member.size > _MOST_TEXT:
            raise _bad(path, f"the label of the sample {sample.key} has {member.size:,} bytes")
        file.seek(member.offset_data)
        sample.labels[suffix] = file.read(member.size)


def _label(path: Path, sample: _Sample) -> tuple[int | None, str | None, str | None]:
    """Return (number of the class, name of the class, name of the file) of a sample; None for what it does not say."""
    numbers: set[int] = set()
    names: set[str] = set()
    file_name = None
    try:
        if "cls" in sample.labels:
            text = sample.labels["cls"].decode().strip()
            if text.isascii() and text.isdigit():
                numbers.add(_number(text))
            else:
                names.add(text)
        if "json" in sample.labels:
            said = json.loads(sample.labels["json"])
            if not isinstance(said, dict):
                raise ValueError("not an object")
            label, name, file_name = said.get("label"), said.get("class"), said.get("file")
            if isinstance(label, int) and not isinstance(label, bool):
                numbers.add(_number(str(label)))
            if isinstance(name, str):
                name.encode()  # raises an error if it is no valid text
                names.add(name)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"the label of the sample {sample.key} cannot be read ({reason(error)})") from error
    names.discard("")
    if not numbers and not names:
        raise _bad(path, f"the sample {sample.key} has no label", "add a member .cls with its class")
    for found in (sorted(numbers), sorted(names)):
        if len(found) > 1:
            raise _bad(path, f"the sample {sample.key} has two labels, {found[0]} and {found[1]}")
    if not isinstance(file_name, str) or not file_name or "/" in file_name or not file_name.isprintable():
        file_name = None
    return next(iter(numbers), None), next(iter(names), None), file_name


def _number(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _bad(path: Path | str, problem: str, remedy: str = "correct the shard and write it again") -> DataError:
    return DataError(f"{shown(path)}: {shown(problem)}", field=_FIELD, remedy=remedy)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_chunk(names: Sequence[str], root: str) -> list[str]:
    return [digest_of(Path(root, name)) for name in names]


def damaged_shards(
    root: Path, shards: Sequence[Shard], progress: Progress | None = None, processes: int | None = None
) -> list[str]:
    """Return the names of the shards whose content differs from the checksum in their index.

    Args:
        root: The folder.
        shards: The shards of its index.
        progress: Called with (shards read, shards in total).
        processes: Number of processes; by default one per usable core.
    """
    damaged: list[str] = []
    names = [shard.name for shard in shards]
    found = Pool(1, 2, processes).map(_digest_chunk, names, str(root))
    for done, (shard, (_, (digest,))) in enumerate(zip(shards, found, strict=True), 1):
        if digest != shard.sha256:
            damaged.append(shard.name)
        if progress is not None:
            progress(done, len(shards))
    return damaged
