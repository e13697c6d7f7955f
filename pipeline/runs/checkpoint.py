"""Checkpoints of a run.

Checkpoints are written atomically with a checksum. The last two are kept, and damaged ones are skipped. `training.loop`
assembles their content:

| key | content |
|---|---|
| search | supernet, optimisers, codes, node states, epoch; of a one-stage search also its freezings (`state_dict`) |
| net, optimizer, genotype, kind | network, optimiser and cells of a retraining (`training.epochs.RetrainJob.state`) |
| progress | number of epochs, sums over them, position in the epoch log (`training.epoch_record.Progress.to_state`) |
| data | digest of the pictures |

States of random generators are not stored, because the seed and the epoch determine all random numbers of an epoch.

A checkpoint consists of two files: `epoch-0003.pt` (only tensors and plain containers, loaded with
`weights_only=True`) and the manifest `epoch-0003.json` with its SHA-256, which is written after it. A checkpoint
without a matching manifest is ignored.

The records of all epochs are in the epoch log beside the checkpoints (`runs.epoch_log`). The log is written before the
checkpoint, so that it holds at least the epochs of the newest checkpoint, even if the process was killed.
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
from istanas.files import sync_directory
from istanas.limits import CHECKPOINT_PICKLE_BYTES, RECORD_BYTES, read_at_most
from pipeline.base.files import atomic_write, is_out_of_memory
from pipeline.runs import epoch_log
from pipeline.runs.directory import is_absent, unreadable_error
from pipeline.runs.epoch_log import BrokenCheckpointWarning, LogError
from pipeline.runs.layout import CHECKPOINT_MANIFEST, checkpoint_file

KEEP = 2


class Store(Protocol):
    """Interface that stores a worker's checkpoints in a folder, or sends them to the process that owns the folder."""

    def read(self) -> bytes | None:
        """Return the newest checkpoint as `serialize` made it, or None."""

    def write(self, epoch: int, data: bytes, line: bytes, offset: int) -> None:
        """Store an epoch's log line and checkpoint durably; the arguments are those of the function `write`."""


class Checkpoint(NamedTuple):
    """An intact checkpoint, serialized and deserialized."""

    data: bytes
    state: dict[str, Any]


def serialize(state: dict[str, Any]) -> bytes:
    """Serialize a state of tensors, numbers, strings, and lists, tuples and dicts of them."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def deserialize(data: bytes) -> dict[str, Any]:
    """Deserialize a state onto the CPU; no code in the data is executed.

    Raises:
        CheckpointError: the data is not a checkpoint, or would need much more memory than its size.
        MemoryError: there is not enough memory.
    """
    try:
        _check_sizes(data)
        with warnings.catch_warnings():
            # torch warns about pickles of other programs; the pickles that it rejects are reported below.
            warnings.simplefilter("ignore")
            state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except pickle.UnpicklingError:  # torch's message suggests loading the pickle unsafely
        raise CheckpointError(
            "no checkpoint (not plain data)", remedy="use the previous checkpoint"
        ) from None
    except Exception as error:  # torch raises many types of errors on invalid bytes
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from None
        reason = " ".join(str(error).split()) or type(error).__name__  # torch's errors have many lines
        raise CheckpointError(
            f"no checkpoint ({reason:.200})", remedy="use the previous checkpoint"
        ) from None
    return state


def _check_sizes(data: bytes) -> None:
    """Reject archives that would need more memory than their size.

    `torch.save` writes an uncompressed zip archive whose pickle is small and creates no buffers.

    Raises:
        ValueError: the data is not such an archive.
    """
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
                if b"bytearray" in archive.read(member):  # one number in the pickle sets its length
                    raise ValueError("its pickle creates a bytearray")


def write(folder: Path, epoch: int, data: bytes, line: bytes, offset: int) -> None:
    """Append an epoch's line to the log, then write its checkpoint and delete all but the last `KEEP` checkpoints.

    Args:
        folder: The folder of the run's checkpoints; created if it does not exist.
        epoch: Number of epochs done, >= 1.
        data: The checkpoint as `serialize` made it.
        line, offset: See `epoch_log.append_line`.

    Raises:
        OSError: the files cannot be written. Earlier checkpoints are then unchanged, and this one leaves
            no files.
        CheckpointError: both copies of the log were damaged after they had been read.
    """
    # A run resumes from the newest intact checkpoint that matches the log, so existing checkpoints of this and later
    # epochs were skipped. They must be invalid before the log is overwritten, even after a power failure.
    skipped = [manifest for manifest in _manifests(folder) if _epoch(manifest) >= epoch]
    for manifest in skipped:
        manifest.unlink()
    if skipped:
        sync_directory(folder)
    epoch_log.append_line(folder, epoch, line, offset)
    write_state(folder, epoch, data)


def write_state(folder: Path, epoch: int, data: bytes) -> None:
    """Write the checkpoint of an epoch that is in the log already; arguments and errors are those of `write`."""
    file = folder / checkpoint_file(epoch)
    atomic_write(file, data)
    digest = hashlib.sha256(data).hexdigest()
    manifest = {"epoch": epoch, "file": file.name, "sha256": digest, "bytes": len(data)}
    try:
        atomic_write(file.with_suffix(".json"), json.dumps(manifest))
    except OSError:
        file.unlink()  # it takes space, and is ignored without a manifest
        raise
    kept = {path.stem for path in [p for p in _manifests(folder) if _epoch(p) <= epoch][:KEEP]}
    for path in folder.glob("epoch-*.*"):
        if path.stem not in kept:
            path.unlink()
    for path in folder.glob(".epoch-*.tmp"):  # left by a killed writer; the run's lock excludes other writers
        path.unlink()


def read_latest(
    folder: Path, prepare: Callable[[Checkpoint], Checkpoint] = lambda found: found
) -> Checkpoint | None:
    """Return the newest intact checkpoint, or None if there is none yet.

    Args:
        folder: The folder of the run's checkpoints; it need not exist.
        prepare: Converts an intact checkpoint for the caller. If it raises a `LogError`, the previous checkpoint is
            tried.

    Raises:
        CheckpointError: there are checkpoints of more than one epoch, and none can be used; a file cannot be read,
            though it may be intact; or `prepare` raises it.

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
        ) as error:  # not MemoryError: the checkpoint may be intact
            if isinstance(error, OSError) and not is_absent(error):
                raise unreadable_error(error, Path(error.filename or file)) from error
            problem = error.problem if isinstance(error, CheckpointError) else str(error)
            reason = " ".join(problem.split())  # torch's errors have many lines
            skipped.append(f"checkpoint {file} is broken ({reason:.200})")
            continue
        try:
            found = prepare(found)
        except LogError as error:
            skipped.append(f"checkpoint {file} does not match the log of epochs ({error})")
            continue
        _warn(skipped, "the previous checkpoint is used")
        return found
    if not skipped:
        return None
    if [_epoch(manifest) for manifest in manifests] == [1]:
        _warn(skipped, "there is no earlier checkpoint, the run starts over")
        return None
    # Starting over would lose more than one epoch, so the user must decide.
    raise CheckpointError(
        f"{'; '.join(skipped)}: no checkpoint is left",
        remedy="restore one from a copy, or start over with --fresh",
    )


def _read(manifest: Path) -> Checkpoint:
    expected = json.loads(read_at_most(manifest, RECORD_BYTES))
    file = manifest.with_suffix(".pt")
    if file.exists() and not file.is_file():  # reading a pipe would block
        raise ValueError("it is not a regular file")
    size = file.stat().st_size
    if size != expected.get("bytes", size):  # earlier versions did not write the size
        raise ValueError(f"it has {size} bytes, not {expected['bytes']}")
    with open(file, "rb") as stream:  # in pieces, because a damaged file may be larger than the memory
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != expected["sha256"]:
        raise ValueError("its checksum does not match")
    data = file.read_bytes()
    return Checkpoint(data, deserialize(data))


def _warn(skipped: list[str], consequence: str) -> None:
    for text in skipped:
        warnings.warn(f"{text}: {consequence}", BrokenCheckpointWarning, stacklevel=3)


def _manifests(folder: Path) -> list[Path]:
    """Return the manifests in a folder, newest first."""
    try:
        names = os.listdir(folder)  # `Path.glob` finds nothing in a folder without read permission
    except OSError as error:
        if is_absent(error):
            return []
        raise unreadable_error(error, folder) from error
    return sorted(
        (folder / name for name in names if CHECKPOINT_MANIFEST.fullmatch(name)), key=_epoch, reverse=True
    )


def _epoch(path: Path) -> int:
    return int(path.stem.removeprefix("epoch-"))
