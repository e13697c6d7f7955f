"""The job of `istanas pack`: shards from a picture folder, or the index or a check of shards that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich.console import Console

from istanas.data.cache import default_cache_dir
from istanas.data.packing import PackSettings, pack_folder
from istanas.data.reading import shown
from istanas.data.shard_files import FolderShards
from istanas.data.shard_index import INDEX_FILE, ShardIndex, read_index
from istanas.data.shard_scan import damaged_shards, index_shards
from istanas.errors import ConfigError, DataError
from pipeline.config.errors import layout_error_as_config_error
from pipeline.config.threads import usable_cores
from pipeline.jobs.context import say_to
from pipeline.jobs.lifecycle import progress_on

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
SMALLEST_SHARD = 64_000  # bytes; below, a tar file is mostly padding


def size_in_bytes(text: str) -> int:
    """Return the bytes of a size such as 256MB, 1.5GB or 500000.

    Raises:
        ConfigError: If the text is no size, or too small for a shard.

    Example:
        >>> size_in_bytes("256MB"), size_in_bytes("1.5 gb"), size_in_bytes("500000")
        (256000000, 1500000000, 500000)
        >>> size_in_bytes("big")
        Traceback (most recent call last):
        istanas.errors.ConfigError: --shard-size: 'big' is not a size of 64kB or more; give it as 256MB or 1GB
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([kmgt]?)b?", text.strip().lower())
    size = 0 if found is None else int(float(found[1]) * _UNITS[found[2]])
    if size < SMALLEST_SHARD:
        raise ConfigError(
            f"{text!r:.40} is not a size of {SMALLEST_SHARD // 1000}kB or more",
            field="--shard-size",
            remedy="give it as 256MB or 1GB",
        )
    return size


@layout_error_as_config_error()
def run_pack(
    folder: Path,
    out: Path,
    *,
    shard_size: int,
    resize: int | None,
    quality: int,
    allow_left_out: bool,
    test_fraction: float,
    processes: int | None,
    console: Console,
) -> dict[str, Any]:
    """Pack a picture folder into shards, see `istanas.data.packing.pack_folder`.

    Returns:
        Numbers of shards, pictures and classes, the size, and the folder.
    """
    packed = pack_folder(
        folder,
        out,
        PackSettings(shard_size, resize, quality),
        cache_dir=default_cache_dir(),
        allow_left_out=allow_left_out,
        test_fraction=test_fraction,
        processes=processes or usable_cores(),
        progress=progress_on("packed", console),
        checking=progress_on("checking", console),
    )
    say = say_to(console)
    for note in packed.notes:
        say(shown(note))
    state = "written" if packed.written else "complete already"
    say(
        f"{shown(out)}: {packed.shards:,} shards, {packed.bytes / 1e6:,.1f} MB, with {packed.n_train:,} training and "
        f"{packed.pictures - packed.n_train:,} test pictures of {packed.classes:,} classes, {state}"
    )
    say(f"use them with --set data.name=webdataset --set data.root={shown(out)}")
    return {
        "out": str(out),
        "shards": packed.shards,
        "written": packed.written,
        "bytes": packed.bytes,
        "pictures": packed.pictures,
        "training_pictures": packed.n_train,
        "classes": packed.classes,
    }


@layout_error_as_config_error()
def run_index(folder: Path, *, processes: int | None, console: Console) -> dict[str, Any]:
    """Write the index of a folder of shards.

    Returns:
        Numbers of shards, pictures and classes, and the folder.
    """
    index_shards(folder, progress_on("read", console, "shards"), processes or usable_cores())
    index = read_index(FolderShards(str(folder), "--index"))
    return _described(index, folder, "indexed", console)


@layout_error_as_config_error()
def run_check(folder: Path, *, processes: int | None, console: Console) -> dict[str, Any]:
    """Compare the content of every shard with the checksum in the index.

    Returns:
        Numbers of shards, pictures and classes, and the folder.

    Raises:
        DataError: If a shard differs.
    """
    index = read_index(FolderShards(str(folder), "--check"))
    progress = progress_on("checked", console, "shards")
    damaged = damaged_shards(folder, index.shards, progress, processes or usable_cores())
    if damaged:
        more = f", and {len(damaged) - 1} others" if len(damaged) > 1 else ""
        raise DataError(
            f"{shown(folder / damaged[0])} differs from its checksum in {INDEX_FILE}{more}",
            field="--check",
            remedy="copy it again, or run the istanas pack command that has made it again",
        )
    return _described(index, folder, "intact", console)


def _described(index: ShardIndex, folder: Path, what: str, console: Console) -> dict[str, Any]:
    n, n_classes = len(index.samples), len(index.class_names)
    say_to(console)(
        f"{shown(folder)}: {len(index.shards):,} shards with {index.n_train:,} training and {n - index.n_train:,} test "
        f"pictures of {n_classes:,} classes, {what}"
    )
    return {
        "out": str(folder),
        "shards": len(index.shards),
        "pictures": n,
        "training_pictures": index.n_train,
        "classes": n_classes,
    }
