"""The index of a set of shards: one Parquet file with a row for each picture, and the table of the shards.

`istanas pack` writes it. With it, a job knows classes, sizes and properties of all pictures, draws subsets and splits,
and reads any picture, without reading the shards. The rows have the order of a picture folder with the same pictures:
training pictures first, each split sorted by class and name. The results of a job therefore do not depend on how the
pictures are distributed over shards.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from istanas.buckets import is_address
from istanas.data.cache import reason
from istanas.data.folders import TEST_SPLITS, count_of, not_a_folder
from istanas.data.reading import shown
from istanas.data.shard_files import (
    SAMPLE,
    MemberNames,
    Shard,
    ShardStorage,
    excerpt_of,
    in_threads,
)
from istanas.data.survey import FACTS
from istanas.errors import DataError, LayoutError, MissingDataError
from istanas.files import replacing_file

INDEX_FILE = "index.parquet"
_VERSION = 1
_META = b"istanas"
_SHARD_NAME = re.compile(rf"(train|{'|'.join(TEST_SPLITS)})/[^/\0\\]+\.tar")
_FILE_FIELDS = ("offset", "size", "start", "length", "crc")
_FACT_FIELDS = ("width", "height", "peak", "level", "flags")
REINDEX = (
    "run the istanas pack command that has made the shards again, or istanas pack --index DIR for shards of another "
    "program"
)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The content of an index.

    Args:
        class_names: Names of the classes, sorted.
        n_train: Number of training pictures, which come first.
        shards: The tar files.
        samples: (N,) records, see `SAMPLE`.
        facts: (N,) records of the facts about each picture, see `istanas.data.reading.Facts`.
        files: N names of files without their class, a pyarrow array of texts.
        digest: Digest of the index.
        plan: Digest of the pictures and settings from which `istanas pack` made the shards; "" for other shards.
    """

    class_names: tuple[str, ...]
    n_train: int
    shards: tuple[Shard, ...]
    samples: NDArray[np.void]
    facts: NDArray[np.void]
    files: Any
    digest: str
    plan: str

    @property
    def shard_names(self) -> tuple[str, ...]:
        """Return the names of the shards."""
        return tuple(shard.name for shard in self.shards)

    def names(self, root: str) -> MemberNames:
        """Return the names of the pictures in the shards at a root."""
        return MemberNames(root, self.shard_names, self.class_names, self.samples, self.files)


# ---------- rows of one shard
def rows_table(
    classes: Sequence[str | None], files: Sequence[str], samples: NDArray[np.void], facts: NDArray[np.void]
) -> Any:
    """Return the rows of a shard as a pyarrow table.

    Args:
        classes: N names of classes; None for a name that is not known yet.
        files: N names of files.
        samples: (N,) records, see `SAMPLE`; label and shard are not used.
        facts: (N,) records, see `istanas.data.survey.FACTS`.
    """
    import pyarrow as pa

    columns: dict[str, Any] = {"class": pa.array(classes, pa.string()), "file": pa.array(files, pa.string())}
    columns |= {name: np.ascontiguousarray(samples[name]) for name in _FILE_FIELDS}
    columns |= {name: np.ascontiguousarray(facts[name]) for name in _FACT_FIELDS}
    prints = np.ascontiguousarray(facts["fingerprint"]).tobytes()
    columns["fingerprint"] = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(8), len(classes), [None, pa.py_buffer(prints)]
    )
    return pa.table(columns)


def write_table(file: Path, table: Any, meta: dict[str, Any]) -> None:
    """Write a table with checksums and a description; the file is complete or not there at all."""
    import pyarrow.parquet as pq

    described = table.replace_schema_metadata({_META: json.dumps(meta).encode()})
    with replacing_file(file) as new:
        pq.write_table(described, new, compression="zstd", write_page_checksum=True)


def read_table(content: bytes, name: str, field: str) -> tuple[Any, dict[str, Any]]:
    """Return a table and its description.

    Args:
        content: The content of the file.
        name: Its name, for messages.
        field: The setting or argument that names its folder, for messages.

    Raises:
        DataError: If it is damaged.
    """
    with _damage_reported(name, field):
        file, meta = _opened(content)
        return file.read(), meta


def _opened(content: bytes) -> tuple[Any, dict[str, Any]]:
    """Return the Parquet file with this content, and its description."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
    meta = json.loads((file.schema_arrow.metadata or {})[_META])
    if meta["version"] != _VERSION:
        raise ValueError(f"version {meta['version']}, not {_VERSION}")
    return file, meta


@contextlib.contextmanager
def _damage_reported(name: str, field: str) -> Iterator[None]:
    """Convert errors of a file that is no index, or damaged."""
    import pyarrow as pa

    try:
        yield
    except (
        *(pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError),
        *(OverflowError, RecursionError, MemoryError),
    ) as error:
        raise _unfit(f"{shown(name)} is not an index of shards ({reason(error):.200})", field) from error


# ---------- the whole index
def write_index(
    root: Path,
    shards: Sequence[Shard],
    tables: Sequence[Any],
    *,
    plan: str = "",
    numbers: Mapping[str, int] | None = None,
    field: str = "data.root",
) -> None:
    """Write the index of a data set.

    The classes have the order of their names, or of their numbers if these are given.

    Args:
        root: The folder of the data set.
        shards: Its tar files.
        tables: The rows of each, see `rows_table`.
        plan: See `ShardIndex`.
        numbers: Number of each class, by name, if the classes are to have the order of their numbers.
        field: The setting or argument that names the folder, for messages.

    Raises:
        DataError: If the two splits are not those of one data set.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    merged = []
    for number, (shard, table) in enumerate(zip(shards, tables, strict=True)):
        is_test = not shard.name.startswith("train/")
        for name, value, kind in (("shard", number, pa.int32()), ("is_test", is_test, pa.bool_())):
            table = table.append_column(name, pa.array(np.full(len(table), value), kind))
        merged.append(table)
    whole = pa.concat_tables(merged)
    trained = pc.unique(whole.filter(pc.invert(whole["is_test"]))["class"]).to_pylist()
    class_names = sorted(trained, key=None if numbers is None else numbers.__getitem__)
    _check_classes(root, whole, class_names, field)
    labels = pc.index_in(whole["class"], pa.array(class_names, pa.string()))
    whole = whole.drop_columns(["class"]).append_column("label", labels)
    whole = whole.sort_by([(name, "ascending") for name in ("is_test", "label", "file", "shard", "offset")])
    meta = {
        "version": _VERSION,
        "classes": class_names,
        "n_train": len(whole) - pc.sum(whole["is_test"]).as_py(),
        "shards": [asdict(shard) for shard in shards],
        "plan": plan,
    }
    write_table(root / INDEX_FILE, whole.drop_columns(["is_test"]), meta)


def _check_classes(root: Path, whole: Any, class_names: Sequence[str], field: str) -> None:
    import pyarrow.compute as pc

    tested = pc.unique(whole.filter(whole["is_test"])["class"]).to_pylist()
    problem = None
    if len(class_names) < 2:
        count = count_of(len(class_names), "class", "classes")
        problem = f"the training shards contain {count}, at least two are needed"
    elif not tested:
        problem = "there is no test picture"
    elif strangers := sorted(set(tested) - set(class_names)):
        problem = f"the test shards contain the class {shown(strangers[0])}, which the training shards lack"
    if problem is not None:
        raise DataError(
            f"{shown(root)}: {problem}",
            field=field,
            remedy="put training shards into train/ and test shards into test/",
        )


def read_index(storage: ShardStorage) -> ShardIndex:
    """Read the index of a data set, and check that it fits the shards.

    The sizes of all shards and 48 KiB of each are compared. Every picture is compared again when it is read.

    Raises:
        DataError: If there is no index, if it is damaged, or if it does not fit the shards.
    """
    try:
        content = storage.content(INDEX_FILE)
    except FileNotFoundError:
        raise _no_index(storage) from None
    index = _last.parsed(content, f"{storage.root}/{INDEX_FILE}", storage.field)
    check_shards(storage, index)
    return index


class _Last:
    """The index that was parsed last, because a job reads its index several times."""

    def __init__(self) -> None:
        self._index: tuple[str, ShardIndex] | None = None

    def parsed(self, content: bytes, name: str, field: str) -> ShardIndex:
        """Return the index in a file.

        Raises:
            DataError: If it is damaged.
        """
        digest = hashlib.sha256(content).hexdigest()
        if self._index is None or self._index[0] != name or self._index[1].digest != digest:
            self._index = name, _parsed(content, name, digest, field)
        return self._index[1]


_last = _Last()


def _parsed(content: bytes, name: str, digest: str, field: str) -> ShardIndex:
    """Return the index in a file, whose columns are read one by one to save memory."""
    import pyarrow as pa

    with _damage_reported(name, field):
        file, meta = _opened(content)
        n = file.metadata.num_rows
        shards = tuple(map(shard_of, meta["shards"]))
        if n * tarfile.BLOCKSIZE > sum(shard.size for shard in shards):  # before memory is taken for the rows
            raise ValueError(f"{n:,} pictures do not fit into its shards")
        samples, facts = np.empty(n, SAMPLE), np.empty(n, FACTS)

        def column(key: str) -> Any:
            read = file.read(columns=[key], use_threads=False)[key]
            if read.null_count:
                raise ValueError(f"the column {key} has missing values")
            return read.combine_chunks()

        for key in ("label", "shard", *_FILE_FIELDS):
            samples[key] = column(key).to_numpy()
        for key in _FACT_FIELDS:
            facts[key] = column(key).to_numpy()
        prints = column("fingerprint").buffers()[1]
        facts["fingerprint"] = np.frombuffer(prints, np.uint8)[: 8 * n].reshape(-1, 8)
        index = ShardIndex(
            class_names=tuple(map(str, meta["classes"])),
            n_train=int(meta["n_train"]),
            shards=shards,
            samples=samples,
            facts=facts,
            files=column("file").cast(pa.string()),
            digest=digest,
            plan=str(meta["plan"]),
        )
        _check_rows(index, name, field)
    return index


def shard_of(said: Any) -> Shard:
    """Return the tar file that an index describes.

    Raises:
        ValueError, TypeError, KeyError: If the description lacks something, or a value has a wrong type.
    """
    texts, numbers = ("name", "sha256", "excerpt"), ("size", "samples")
    if not all(isinstance(said[key], str) for key in texts):
        raise ValueError("a shard has no name or digest")
    if not all(type(said[key]) is int and 0 <= said[key] < 1 << 62 for key in numbers):
        raise ValueError("a shard has no size")
    return Shard(**{key: said[key] for key in (*texts, *numbers)})


def _check_rows(index: ShardIndex, name: str, field: str) -> None:
    """Check that no row of an index, which may come from a stranger, points outside of the shards."""
    samples, shards = index.samples, index.shards
    problem = None
    strange = next((shard.name for shard in shards if not _SHARD_NAME.fullmatch(shard.name)), None)
    if strange is not None:
        problem = f"names the shard {shown(strange)}"
    elif not 0 < index.n_train < len(samples):
        problem = f"has {index.n_train:,} training pictures of {len(samples):,} pictures"
    elif len(index.class_names) < 2:
        problem = f"has {count_of(len(index.class_names), 'class', 'classes')}, at least two are needed"
    elif not 0 <= int(samples["label"].min()) <= int(samples["label"].max()) < len(index.class_names):
        problem = f"has labels above its {len(index.class_names)} classes"
    elif not 0 <= int(samples["shard"].min()) <= int(samples["shard"].max()) < len(shards):
        problem = f"has pictures of more than its {len(shards)} shards"
    else:
        sizes = np.array([shard.size for shard in shards], np.int64)[samples["shard"]]
        ends = samples["offset"] + samples["size"]
        inside = samples["start"].astype(np.int64) + samples["length"] <= samples["size"]
        valid = inside & (ends <= sizes)
        for key in ("offset", "start", "length"):
            valid &= samples[key] >= 0
        if not valid.all():
            problem = f"has {int((~valid).sum())} pictures outside of their shards"
    if problem is not None:
        raise _unfit(f"{shown(name)} {problem}", field)


def check_shards(storage: ShardStorage, index: ShardIndex) -> None:
    """Check that the shards are those that the index describes, by their names, sizes and an excerpt of each.

    Raises:
        DataError: If they are not. It names the first shard that differs.
    """
    there, known = storage.sizes(), {shard.name: shard for shard in index.shards}
    for name, shard in known.items():
        if name not in there:
            raise _unfit(f"{storage.root}/{name} is missing", storage.field, "restore it")
        if there[name] != shard.size:
            what = "is truncated" if there[name] < shard.size else "has grown"
            raise _unfit(
                f"{storage.root}/{name} {what}: it has {there[name]:,} bytes, and its index says {shard.size:,}",
                storage.field,
            )
    if unknown := sorted(name for name in there if name not in known and _SHARD_NAME.fullmatch(name)):
        raise _unfit(f"{storage.root}/{unknown[0]} is not in the index", storage.field)
    storage.open_all(list(known))

    def differs(shard: Shard) -> bool:
        read = functools.partial(storage.read, shard.name)
        return excerpt_of(read, shard.size) != shard.excerpt

    changed = (
        in_threads(differs, index.shards) if storage.is_remote else [differs(shard) for shard in index.shards]
    )
    if any(changed):
        raise _unfit(
            f"{storage.root}/{index.shards[changed.index(True)].name} has changed since its index was written",
            storage.field,
        )


def _no_index(storage: ShardStorage) -> DataError:
    if not storage.is_remote and not Path(storage.root).is_dir():
        return LayoutError(
            not_a_folder(Path(storage.root)),
            field=storage.field,
            remedy="name a folder of shards; istanas pack makes one",
        )
    remedy = "complete it with istanas pack, or write one for shards of another program with istanas pack --index DIR"
    if is_address(storage.root):
        remedy += f", and copy {INDEX_FILE} and the shards to the bucket"
    return MissingDataError(f"{shown(storage.root)} has no {INDEX_FILE}", field=storage.field, remedy=remedy)


def _unfit(problem: str, field: str, remedy: str | None = None) -> DataError:
    return DataError(problem, field=field, remedy=REINDEX if remedy is None else f"{remedy}, or {REINDEX}")
