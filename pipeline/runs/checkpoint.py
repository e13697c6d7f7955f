"""Checkpoints of a run: written atomically, checksummed, the last two kept; damaged ones are skipped.

An epoch is two files: `epoch-0003.pt` (tensors and plain containers only, loaded with `weights_only=True`) and
`epoch-0003.json`, written after it, with its SHA-256. A checkpoint without a matching pair does not count.

The records of all epochs are in the log beside the checkpoints (`runs.epoch_log`), which is written first: after a
kill it may hold more than the newest checkpoint, never less.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from istanas.errors import CheckpointError
from istanas.limits import CHECKPOINT_PICKLE_BYTES, RECORD_BYTES, read_at_most
from pipeline.base.files import atomic_write, is_out_of_memory, sync_directory
from pipeline.runs import epoch_log
from pipeline.runs.directory import is_absent, out_of_reach
from pipeline.runs.epoch_log import BrokenCheckpointWarning, LogError
from pipeline.runs.layout import CHECKPOINT_MANIFEST, checkpoint_file

KEEP = 2


class Store(Protocol):
    """Where a worker's checkpoints go: a folder, or the process that keeps the folder."""

    def read(self) -> bytes | None:
        """The newest checkpoint, as `serialize` made it, or None."""

    def write(self, epoch: int, data: bytes, line: bytes, offset: int) -> None:
        """Keep an epoch's line of the log and its checkpoint, see `write`; both are safe when this returns."""


class Checkpoint(NamedTuple):
    """A checkpoint that is whole: as `serialize` made it, and what `deserialize` makes of that."""

    data: bytes
    state: dict[str, Any]


def serialize(state: dict[str, Any]) -> bytes:
    """A state of tensors, numbers, strings, and lists, tuples and dicts of them, as bytes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def deserialize(data: bytes) -> dict[str, Any]:
    """Inverse of `serialize`, on the CPU; nothing in the data is run as code.

    Raises:
        CheckpointError: the data is no checkpoint, or would fill much more memory than it has bytes.
        MemoryError: there is not enough for it.
    """
    try:
        _check_sizes(data)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch's, of pickles that it did not write; what it refuses is told below
            state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except pickle.UnpicklingError:  # torch's own words advise to run whatever it is
        raise CheckpointError(
            "no checkpoint (not plain data, which alone is read): use the one before"
        ) from None
    except Exception as error:  # torch's reader of hostile bytes raises nearly everything
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from None
        reason = " ".join(str(error).split()) or type(error).__name__  # torch's errors have many lines
        raise CheckpointError(f"no checkpoint ({reason:.200}): use the one before") from None
    return state


def _check_sizes(data: bytes) -> None:
    """What `torch.save` writes is a zip archive without compression whose pickle is small and makes no buffers."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is compressed")
        if sum(member.file_size for member in members) > len(data):
            raise ValueError("its parts are larger than the whole")
        for member in members:
            if member.filename.endswith(".pkl"):
                if member.file_size > CHECKPOINT_PICKLE_BYTES:
                    raise ValueError(f"its pickle is larger than {CHECKPOINT_PICKLE_BYTES} bytes")
                if b"bytearray" in archive.read(member):  # of any length, made of a number
                    raise ValueError("its pickle makes a bytearray")


def write(folder: Path, epoch: int, data: bytes, line: bytes, offset: int) -> None:
    """Append an epoch's line to the log, then write its checkpoint and delete all but the last `KEEP` checkpoints.

    Args:
        folder: where the run's checkpoints lie, in the run directory; created if need be.
        epoch: epochs done, >= 1.
        data: as `serialize` made it.
        line, offset: of the log, see `epoch_log.append_line`.

    Raises:
        OSError: if the disk refuses; earlier checkpoints are then untouched, and of this one nothing is left.
        CheckpointError: if both copies of the log have been damaged since they were read.
    """
    # A run resumes from the newest checkpoint that is whole and matches the log, so those of this epoch and of later
    # ones were skipped. They must not count any more, even after a power cut, once the log is overwritten.
    skipped = [manifest for manifest in _manifests(folder) if _epoch(manifest) >= epoch]
    for manifest in skipped:
        manifest.unlink()
    if skipped:
        sync_directory(folder)
    epoch_log.append_line(folder, epoch, line, offset)
    write_state(folder, epoch, data)


def write_state(folder: Path, epoch: int, data: bytes) -> None:
    """Write the checkpoint of an epoch whose line the log has already; arguments and errors as of `write`."""
    file = folder / checkpoint_file(epoch)
    atomic_write(file, data)
    digest = hashlib.sha256(data).hexdigest()
    manifest = {"epoch": epoch, "file": file.name, "sha256": digest, "bytes": len(data)}
    try:
        atomic_write(file.with_suffix(".json"), json.dumps(manifest))
    except OSError:
        file.unlink()  # it does not count without, and takes room
        raise
    kept = {path.stem for path in [p for p in _manifests(folder) if _epoch(p) <= epoch][:KEEP]}
    for path in folder.glob("epoch-*.*"):
        if path.stem not in kept:
            path.unlink()
    for path in folder.glob(".epoch-*.tmp"):  # a writer that was killed; the run's lock keeps others out
        path.unlink()


def read_latest(
    folder: Path, prepare: Callable[[Checkpoint], Checkpoint] = lambda found: found
) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, or None before the first.

    Args:
        folder: where the run's checkpoints lie; may be missing.
        prepare: returns a whole checkpoint as the caller needs it. If it raises a `LogError`, the checkpoint before is
            tried.

    Raises:
        CheckpointError: if there are checkpoints and none can be used, so that more than one epoch is lost; or if a
            file cannot be read now, though it may be whole; or raised by `prepare`.

    Warns:
        BrokenCheckpointWarning: for every newer checkpoint that was skipped.
    """
    skipped: list[str] = []
    manifests = _manifests(folder)
    for manifest in manifests:
        file = manifest.with_suffix(".pt")
        try:
            found = _read(manifest)
        except (
            CheckpointError,
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:  # not a MemoryError: the checkpoint may be whole
            if isinstance(error, OSError) and not is_absent(error):
                raise out_of_reach(error, Path(error.filename or file)) from error
            reason = " ".join(str(error).split())  # torch's errors have many lines
            skipped.append(f"checkpoint {file} is broken ({reason:.200})")
            continue
        try:
            found = prepare(found)
        except LogError as error:
            skipped.append(f"checkpoint {file} does not match the log of epochs ({error})")
            continue
        _warn(skipped, "the one before is used")
        return found
    if not skipped:
        return None
    if [_epoch(manifest) for manifest in manifests] == [1]:
        _warn(skipped, "there is none before, the run begins again")
        return None
    # Days of work may be lost, so the user must decide.
    raise CheckpointError(
        f"{'; '.join(skipped)}: no checkpoint is left, restore one from a copy, or start over with --fresh"
    )


def _read(manifest: Path) -> Checkpoint:
    expected = json.loads(read_at_most(manifest, RECORD_BYTES))
    file = manifest.with_suffix(".pt")
    if file.exists() and not file.is_file():  # but a pipe, which nobody fills
        raise ValueError("it is no file")
    size = file.stat().st_size
    if size != expected.get("bytes", size):  # earlier versions did not write it
        raise ValueError(f"it has {size} bytes, not {expected['bytes']}")
    with open(file, "rb") as stream:  # piece by piece: junk may be larger than memory
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != expected["sha256"]:
        raise ValueError("its checksum does not match")
    data = file.read_bytes()
    return Checkpoint(data, deserialize(data))


def _warn(skipped: list[str], consequence: str) -> None:
    for text in skipped:
        warnings.warn(f"{text}: {consequence}", BrokenCheckpointWarning, stacklevel=3)


def _manifests(folder: Path) -> list[Path]:
    """Newest first."""
    try:
        names = os.listdir(folder)  # `Path.glob` finds nothing in a folder without read permission
    except OSError as error:
        if is_absent(error):
            return []
        raise out_of_reach(error, folder) from error
    return sorted(
        (folder / name for name in names if CHECKPOINT_MANIFEST.fullmatch(name)), key=_epoch, reverse=True
    )


def _epoch(path: Path) -> int:
    return int(path.stem.removeprefix("epoch-"))
