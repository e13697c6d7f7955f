"""Checkpoints of a run: written atomically, checksummed, the last two kept; a broken one is passed over.

An epoch is two files: `epoch-0003.pt` (tensors and plain containers only, loaded with `weights_only=True`) and
`epoch-0003.json`, written after it, with its SHA-256. A checkpoint without a matching pair does not count.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from istanas.errors import CheckpointError
from istanas.limits import CHECKPOINT_PICKLE_BYTES, RECORD_BYTES, read_at_most
from pipeline import storage
from pipeline.rundir import atomic_write, is_out_of_memory

KEEP = 2


class BrokenCheckpointWarning(UserWarning):
    """A checkpoint did not match its checksum and was passed over."""


class Store(Protocol):
    """Where a worker's checkpoints go: a folder, or the process that keeps the folder."""

    def read(self) -> bytes | None:
        """The newest checkpoint, as `serialize` made it, or None."""

    def write(self, epoch: int, data: bytes) -> None:
        """Keep the checkpoint of an epoch; it is safe when this returns."""


@dataclass(frozen=True)
class FolderStore:
    """A store in this process's reach."""

    folder: Path

    def read(self) -> bytes | None:
        return read_latest(self.folder)

    def write(self, epoch: int, data: bytes) -> None:
        write(self.folder, epoch, data)


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


def save(folder: Path, epoch: int, state: dict[str, Any]) -> None:
    """`serialize`, then `write`."""
    write(folder, epoch, serialize(state))


def load_latest(folder: Path) -> dict[str, Any] | None:
    """`deserialize` of `read_latest`."""
    data = read_latest(folder)
    return None if data is None else deserialize(data)


def write(folder: Path, epoch: int, data: bytes) -> None:
    """Write the checkpoint of an epoch, then delete all but the last `KEEP`, and any of a later epoch.

    A later one can only be broken: a run goes on from the newest that is whole.
    If the run lies in a storage, the checkpoint does when this returns.

    Args:
        folder: where the run's checkpoints lie, in the run directory; created if need be.
        epoch: epochs done, >= 0.
        data: as `serialize` made it.

    Raises:
        OSError: if the disk refuses; earlier checkpoints are then untouched, and of this one nothing is left.
        IstanasError: if the storage does, see `pipeline.storage.push`.
    """
    file = folder / f"epoch-{epoch:04d}.pt"
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
    storage.push(folder.parent)


def read_latest(folder: Path) -> bytes | None:
    """The newest checkpoint that is whole, or None before the first.

    Args:
        folder: where the run's checkpoints lie; may be missing.

    Raises:
        CheckpointError: if more than one epoch is lost: there are checkpoints, and none is whole.

    Warns:
        BrokenCheckpointWarning: for every newer one that is not.
    """
    broken: list[str] = []
    manifests = _manifests(folder)
    for manifest in manifests:
        try:
            data = _read(manifest)
        except (
            CheckpointError,
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:  # not a MemoryError: the checkpoint may be whole
            reason = " ".join(str(error).split())  # torch's errors have many lines
            broken.append(f"checkpoint {manifest.with_suffix('.pt')} is broken ({reason:.200})")
            continue
        _warn(broken, "the one before is used")
        return data
    if not broken:
        return None
    if [_epoch(manifest) for manifest in manifests] == [1]:
        _warn(broken, "there is none before, the run begins again")
        return None
    # Days of work may be lost: that is not for us to pass over.
    raise CheckpointError(
        f"{'; '.join(broken)}: no checkpoint is left, restore one from a copy, or start over with --fresh"
    )


def _read(manifest: Path) -> bytes:
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
    deserialize(data)
    return data


def _warn(broken: list[str], consequence: str) -> None:
    for text in broken:
        warnings.warn(f"{text}: {consequence}", BrokenCheckpointWarning, stacklevel=3)


def _manifests(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(
        (
            p
            for p in folder.glob("epoch-*.json")
            if p.stem.isascii() and p.stem.removeprefix("epoch-").isdigit()
        ),
        key=_epoch,
        reverse=True,
    )


def _epoch(path: Path) -> int:
    return int(path.stem.removeprefix("epoch-"))
