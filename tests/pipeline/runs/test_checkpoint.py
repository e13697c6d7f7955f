"""Checkpoints: written completely or not at all; damaged ones are skipped, and no code in a file is executed."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from istanas.errors import CheckpointError
from pipeline.runs import checkpoint
from pipeline.runs.checkpoint import deserialize, read_latest, serialize
from pipeline.runs.epoch_log import BrokenCheckpointWarning
from pipeline.training.epoch_record import FolderStore, Progress, load_latest, read_records
from tests.pipeline.training.made_up import record_of, save_epoch


def state(epoch: int) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "weights": {"w": torch.arange(6.0).reshape(2, 3) * epoch, "n": torch.tensor(epoch)},
        "plain": [{"metrics": {"loss": 0.1 * epoch}, "picks": ["a", "b"], "none": None}],
        "pair": (1, 2.5, True),
    }


LOG = {"epochs", "epochs-copy"}


def save(folder: Path, *epochs: int) -> None:
    """Write the checkpoints of some epochs, one after the other."""
    progress = Progress()
    for epoch in range(1, epochs[-1] + 1):
        before, (progress, _) = progress, progress.after(record_of(epoch))
        if epoch in epochs:
            assert save_epoch(folder, before, **state(epoch)) == progress


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of two epochs."""
    save(tmp_path / "run" / "checkpoints", 1, 2)
    return tmp_path / "run" / "checkpoints"


def epoch_found(folder: Path) -> int | None:
    found = read_latest(folder)
    return None if found is None else found.state["epoch"]


def test_a_checkpoint_is_restored_bit_for_bit(folder: Path) -> None:
    newest = read_latest(folder)
    assert newest is not None
    found = newest.state
    assert torch.equal(found["weights"]["w"], state(2)["weights"]["w"])
    assert found["plain"] == state(2)["plain"]
    assert found["pair"] == (1, 2.5, True)


def test_a_serialized_state_is_restored_bit_for_bit() -> None:
    found = deserialize(serialize(state(3)))
    assert torch.equal(found["weights"]["w"], state(3)["weights"]["w"])
    assert {k: v for k, v in found.items() if k != "weights"} == {
        k: v for k, v in state(3).items() if k != "weights"
    }


def test_a_folder_store_returns_the_written_bytes(tmp_path: Path) -> None:
    store, progress = FolderStore(tmp_path / "checkpoints"), Progress()
    assert store.read() is None
    written = {}
    for epoch in (1, 2, 3):
        before, (progress, line) = progress, progress.after(record_of(epoch))
        written[epoch] = serialize({**state(epoch), "progress": progress.to_state()})
        store.write(epoch, written[epoch], line, before.log.offset)
        assert store.read() == FolderStore(store.folder).read() == written[epoch]
        assert epoch_found(store.folder) == epoch
        assert list(read_records(store.folder, progress)) == [record_of(n + 1) for n in range(epoch)]
    assert {path.stem for path in store.folder.iterdir()} == {"epoch-0002", "epoch-0003", *LOG}
    flip_a_bit(store.folder / "epoch-0003.pt", 200)
    with pytest.warns(BrokenCheckpointWarning, match="epoch-0003"):
        assert store.read() == written[2]


def test_no_code_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    with pytest.raises(CheckpointError, match="not plain data"):
        deserialize(serialize({"search": Bomb(target)}))
    assert not target.exists()


def test_a_new_run_has_no_checkpoint(tmp_path: Path) -> None:
    assert read_latest(tmp_path) is None
    assert read_latest(tmp_path / "absent") is None


def test_the_last_two_are_kept(folder: Path) -> None:
    save(folder, 1, 2, 3, 4)
    names = {path.name for path in folder.iterdir()}
    assert names == {f"epoch-000{n}.{kind}" for n in (3, 4) for kind in ("pt", "json")} | LOG
    assert epoch_found(folder) == 4


def test_epochs_are_ordered_as_numbers(tmp_path: Path) -> None:
    for epoch in (9998, 9999, 10000):
        checkpoint.write_state(tmp_path, epoch, serialize({"epoch": epoch}))
    assert epoch_found(tmp_path) == 10000
    assert {path.stem for path in tmp_path.iterdir()} == {"epoch-9999", "epoch-10000"}


def test_the_manifest_holds_the_checksum(folder: Path) -> None:
    manifest = json.loads((folder / "epoch-0002.json").read_text())
    data = (folder / "epoch-0002.pt").read_bytes()
    assert manifest == {
        "epoch": 2,
        "file": "epoch-0002.pt",
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
    }


def flip_a_bit(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: os.truncate(f / "epoch-0002.pt", 100),
        lambda f: os.truncate(f / "epoch-0002.pt", 0),
        lambda f: flip_a_bit(f / "epoch-0002.pt", 200),
        lambda f: flip_a_bit(f / "epoch-0002.pt", -1),
        lambda f: (f / "epoch-0002.pt").unlink(),
        lambda f: os.truncate(f / "epoch-0002.json", 20),
        lambda f: (f / "epoch-0002.json").write_text("[]"),
        lambda f: (f / "epoch-0002.json").write_text("{}"),
        lambda f: (f / "epoch-0002.json").write_bytes(b"\xff\xfe"),
        lambda f: shutil.copy(f / "epoch-0001.pt", f / "epoch-0002.pt"),
    ],
    ids=[
        "cut",
        "empty",
        "bit",
        "last bit",
        "no file",
        "cut manifest",
        "list",
        "no sum",
        "binary",
        "other epoch",
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    folder: Path, damage: Callable[[Path], object]
) -> None:
    damage(folder)
    with pytest.warns(
        BrokenCheckpointWarning, match=r"epoch-0002\.pt is broken .* the previous checkpoint is used"
    ) as told:
        assert epoch_found(folder) == 1
    assert len(told) == 1
    assert "\n" not in str(told[0].message)


def test_a_checkpoint_without_a_manifest_does_not_count(folder: Path) -> None:
    """A kill between the two writes leaves one, which needs no warning."""
    (folder / "epoch-0002.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert epoch_found(folder) == 1


def test_only_damaged_checkpoints_are_an_error(folder: Path) -> None:
    for epoch in (1, 2):
        flip_a_bit(folder / f"epoch-000{epoch}.pt", 50)
    with pytest.raises(CheckpointError) as caught:
        read_latest(folder)
    line = str(caught.value)
    assert [n for n in (1, 2) if f"epoch-000{n}.pt is broken (its checksum does not match)" in line] == [1, 2]
    assert line.endswith(": no checkpoint is left; restore one from a copy, or start over with --fresh")
    assert "\n" not in line


def test_a_damaged_only_checkpoint_of_several_epochs_is_an_error(folder: Path) -> None:
    for path in folder.glob("epoch-0001.*"):
        path.unlink()
    os.truncate(folder / "epoch-0002.pt", 100)
    with pytest.raises(CheckpointError, match=r"epoch-0002\.pt is broken .*: no checkpoint is left"):
        read_latest(folder)


def test_a_run_resumes_from_the_previous_checkpoint(folder: Path) -> None:
    """The damaged checkpoint of an epoch is replaced when the epoch is repeated."""
    flip_a_bit(folder / "epoch-0002.pt", 50)
    with pytest.warns(BrokenCheckpointWarning):
        assert epoch_found(folder) == 1
    save(folder, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert epoch_found(folder) == 2


@contextlib.contextmanager
def no_more_files() -> Iterator[None]:
    """Prevent this process from opening more files (EMFILE)."""
    lowest_free = os.open("/", os.O_RDONLY)
    os.close(lowest_free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Run as a user without privileges: root, the user of containers, may read every file."""
    mine = os.geteuid()
    os.seteuid(65534 if mine == 0 else mine)
    try:
        yield
    finally:
        os.seteuid(mine)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("epoch-0002.pt", 0), ("epoch-0002.json", 0), ("epochs/000001.jsonl", 0), (".", 0o300)],
)
def test_a_file_without_read_permission_does_not_count_as_broken(public: Path, name: str, mode: int) -> None:
    """The next epoch deletes a damaged checkpoint, but this one may be intact."""
    save(public / "checkpoints", 1, 2)
    before = (public / "checkpoints" / name).stat().st_mode
    (public / "checkpoints" / name).chmod(mode)
    with nobody(), pytest.raises(CheckpointError) as caught:
        load_latest(public / "checkpoints")
    (public / "checkpoints" / name).chmod(before)
    assert str(caught.value) == (
        f"{public / 'checkpoints' / name}: cannot be read (Permission denied); make it readable and run the same "
        "command again"
    )
    found = load_latest(public / "checkpoints")
    assert found is not None
    assert found.state["epoch"] == 2


def test_too_many_open_files_do_not_start_a_run_over(folder: Path) -> None:
    with no_more_files(), pytest.raises(CheckpointError, match="Too many open files") as caught:
        epoch_found(folder)
    assert str(caught.value).startswith(f"{folder}: cannot be read")
    assert epoch_found(folder) == 2


def test_later_checkpoints_are_deleted_before_the_log_is_overwritten(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power failure could leave a checkpoint beside the log of other epochs."""
    flip_a_bit(folder / "epoch-0002.pt", 50)
    fsync, synced = os.fsync, []

    def noting(descriptor: int) -> None:
        synced.append(
            (Path(os.readlink(f"/proc/self/fd/{descriptor}")), (folder / "epoch-0002.json").exists())
        )
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    save(folder, 2)
    monkeypatch.undo()
    assert synced[:2] == [(folder, False), (folder / "epochs" / "000001.jsonl", False)]


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", ["torch", "pickle", "garbage", "nothing"])
def test_a_file_that_matches_its_checksum_is_not_trusted(folder: Path, tmp_path: Path, form: str) -> None:
    target = tmp_path / "executed"
    bomb, buffer = Bomb(target), io.BytesIO()
    if form == "torch":
        torch.save({"epoch": 2, "search": bomb}, buffer)
    data = {
        "torch": buffer.getvalue(),
        "pickle": pickle.dumps(bomb, protocol=2),
        "garbage": bytes(range(256)),
        "nothing": b"",
    }[form]
    (folder / "epoch-0002.pt").write_bytes(data)
    manifest = {"epoch": 2, "file": "epoch-0002.pt", "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "epoch-0002.json").write_text(json.dumps(manifest))
    with pytest.warns(BrokenCheckpointWarning, match="epoch-0002") as told:
        assert epoch_found(folder) == 1
    assert "\n" not in str(told[0].message)
    assert not target.exists()
    if form == "pickle":  # the bomb is a real one
        pickle.loads(data)
        assert target.is_dir()


def test_a_failed_write_leaves_the_earlier_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(folder, 3)
    monkeypatch.undo()
    assert epoch_found(folder) == 2
    assert {path.stem for path in folder.iterdir()} == {"epoch-0001", "epoch-0002", *LOG}
    save(folder, 3)
    assert epoch_found(folder) == 3


def test_files_of_a_killed_writer_are_removed_with_the_next_epoch(folder: Path) -> None:
    left = folder / ".epoch-0003.pt.4242.abcdef01.tmp"
    left.write_bytes(b"half a checkpoint")
    assert epoch_found(folder) == 2
    save(folder, 3)
    assert not left.exists()
    assert checkpoint.KEEP == 2
    assert {path.name for path in folder.glob("*.pt")} == {"epoch-0002.pt", "epoch-0003.pt"}


def test_a_damaged_first_checkpoint_starts_the_run_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "epoch-0001.pt").write_bytes(b"")
    with pytest.warns(BrokenCheckpointWarning, match="there is no earlier checkpoint, the run starts over"):
        assert read_latest(tmp_path) is None
    save(tmp_path, 1)
    assert epoch_found(tmp_path) == 1
    assert {path.stem for path in tmp_path.iterdir()} == {"epoch-0001", *LOG}
