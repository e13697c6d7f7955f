"""A full disk: existing files stay valid, no partial file remains, and the error says what to delete."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from istanas.errors import IstanasError
from pipeline.base.files import atomic_write, is_full
from pipeline.cli.commands import run as istanas
from pipeline.cluster.tune import FAILED
from pipeline.config.load import load
from pipeline.runs import checkpoint, epoch_log
from pipeline.runs.directory import RunDir
from pipeline.runs.epoch_log import LogEnd
from pipeline.runs.layout import EPOCH_LOGS
from pipeline.sweeps.searcher import StudySearcher
from pipeline.sweeps.study import BLOCKED, open_study, own_trials
from pipeline.sweeps.trial import failure
from pipeline.training.epoch_record import Progress
from tests.pipeline.jobs.tiny_search import SETTINGS, decided, search

PAGE = os.sysconf("SC_PAGE_SIZE")
FULL_DISK = r"No space left on device \(\d+\.\d\d MB are needed, \d+\.\d\d MB are free\)"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk (tmpfs) can't be mounted here: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Fill a disk except for some pages, and return the file that fills it."""
    filler = disk / "filler"
    stat = os.statvfs(disk)
    with open(filler, "wb", buffering=0) as file:
        for _ in range(stat.f_bavail * stat.f_frsize // PAGE - leave):
            file.write(bytes(PAGE))
    return filler


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_unchanged_if_its_replacement_has_no_room(disk: Path) -> None:
    file = disk / "run.json"
    atomic_write(file, "old")
    fill(disk, leave=2)
    with pytest.raises(OSError, match=FULL_DISK) as caught:
        atomic_write(file, bytes(5 * PAGE))
    assert is_full(caught.value)
    assert caught.value.filename == str(file)
    assert "(0.02 MB are needed, 0.01 MB are free)" in str(caught.value), "without what was written of it"
    assert file.read_text() == "old"
    assert names(disk) == {"run.json", "filler"}


def test_a_line_of_metrics_without_room_is_not_written_in_part(disk: Path) -> None:
    run = RunDir(disk / "run")
    run.append_metrics(1, {"train/loss": 2.5}, timestamp_ms=1000)
    before = run.metrics()
    filler = fill(disk)
    with pytest.raises(OSError, match=FULL_DISK) as caught:
        run.append_metrics(2, {f"metric/{n}": 1.0 for n in range(PAGE // 8)}, timestamp_ms=2000)
    assert caught.value.filename == str(run.path / "metrics.jsonl")
    assert run.metrics() == before
    assert (run.path / "metrics.jsonl").read_bytes().endswith(b"}\n")
    filler.unlink()
    run.append_metrics(2, {"train/loss": 2.0}, timestamp_ms=2000)
    assert [line.step for line in run.metrics()] == [1, 2]


@pytest.mark.parametrize(
    ("pages", "refused"),
    [
        (0, "epochs/000001.jsonl"),
        (1, "epochs-copy/000001.jsonl"),
        (2, "epoch-0002.pt"),
        (5, "epoch-0002.pt"),
        (6, "epoch-0002.json"),
    ],
    ids=["nothing", "one copy of the log", "the log", "half of the checkpoint", "all but the checksum"],
)
def test_a_checkpoint_without_room_leaves_nothing_and_the_last_one_is_good(
    disk: Path, pages: int, refused: str
) -> None:
    """The parameter's name says what still fits; a line of the log takes one page, a checkpoint four."""
    folder, end = disk / "run" / "checkpoints", LogEnd()
    old, new = (checkpoint.serialize({"epoch": epoch, "w": "x" * 3 * PAGE}) for epoch in (1, 2))
    assert 3 * PAGE < len(new) <= 4 * PAGE
    first, line = end.after("1" * (PAGE - 67))
    assert len(line) == PAGE
    checkpoint.write(folder, 1, old, line, 0)
    second, line = first.after("2" * (PAGE - 66))
    filler = fill(disk, leave=pages)
    with pytest.raises(OSError, match=FULL_DISK) as caught:
        checkpoint.write(folder, 2, new, line, first.offset)
    assert caught.value.filename == str(folder / refused)
    assert names(folder) == {"epoch-0001.pt", "epoch-0001.json", *EPOCH_LOGS}

    def newest() -> bytes | None:
        found = checkpoint.read_latest(folder)
        return None if found is None else found.data

    assert newest() == old
    assert len(list(epoch_log.read(folder, first))) == 1
    filler.unlink()
    checkpoint.write(folder, 2, new, line, first.offset)
    assert newest() == new
    assert len(list(epoch_log.read(folder, second))) == 2


def test_a_search_fails_with_a_full_disk_and_resumes_when_there_is_room(disk: Path, tmp_path: Path) -> None:
    """The disk is so full that not even the record's status FAILED can be written."""

    def full_after_the_first(progress: Progress) -> None:
        if progress.epochs == 1:
            fill(disk)

    with pytest.raises(OSError, match=FULL_DISK) as caught:
        search(disk, on_epoch=full_after_the_first)
    (path,) = (entry for entry in disk.iterdir() if entry.is_dir())
    assert caught.value.filename in [
        str(path / "checkpoints" / name) for name in ("epochs/000001.jsonl", "epoch-0002.pt")
    ]
    assert names(path / "checkpoints") == {"epoch-0001.pt", "epoch-0001.json", *EPOCH_LOGS}
    assert not list(path.rglob("*.tmp"))
    (disk / "filler").unlink()
    found, seen = search(disk)
    assert "resumed after epoch 1" in seen
    undisturbed, _ = search(tmp_path / "undisturbed")
    assert {**found, "run_dir": "", "seconds": 0} == {**undisturbed, "run_dir": "", "seconds": 0}
    assert decided(path) == decided(Path(undisturbed["run_dir"]))
    assert RunDir(path).read().status == "FINISHED"


def test_the_command_says_in_one_line_what_to_free(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(disk, leave=20)
    overrides = [*SETTINGS, f"runtime.runs_dir={disk}"]
    assert istanas(["search", *(part for override in overrides for part in ("--set", override))]) == 1
    err = capsys.readouterr().err
    (line,) = err.splitlines()
    assert re.fullmatch(
        rf"error: {disk}/\S+/checkpoints/epoch-0001\.pt: {FULL_DISK}: free space there \(old runs, their ray folders, "
        "mlartifacts\\), then run the same command again",
        line,
    ), line
    (path,) = (entry for entry in disk.iterdir() if entry.is_dir())
    assert RunDir(path).read().status == "FAILED"
    assert names(path / "checkpoints") == set(EPOCH_LOGS)


class Ends:
    """A listener of trials for a sweep whose trial does not end."""

    def trial_started(self, index: int, settings: dict[str, Any]) -> dict[str, Any]:
        return {}

    def trial_ended(self, index: int, state: Any, result: dict[str, Any]) -> None:
        raise AssertionError("the trial has not ended")

    def study_updated(self, index: int) -> None:
        raise AssertionError("the study was told")


def test_a_full_disk_stops_the_sweep_and_loses_no_trial(tmp_path: Path) -> None:
    sweep = json.dumps({"trials": 3, "space": {"search.lr": {"uniform": [0.01, 0.1]}}})
    config = load(None, [*SETTINGS, f"runtime.runs_dir={tmp_path}", f"sweep={sweep}"])
    study = open_study(config, "full", fresh=False)
    searcher = StudySearcher(config, study, Ends())
    searcher.suggest("a")
    searcher.on_trial_complete("a", {BLOCKED: "OSError: No space left on device: /data/x: free space there"})
    assert isinstance(searcher.error, IstanasError)
    assert str(searcher.error) == (
        "sweep: trial 0 cannot continue: OSError: No space left on device: /data/x: free space there"
    )
    (trial,) = own_trials(study)
    assert trial.state.name == "RUNNING"
    next_process = StudySearcher(config, study, Ends())
    next_process.suggest("b")
    assert len(own_trials(study)) == 1, "another trial was started in place of the blocked one"


def test_a_trial_distinguishes_a_full_disk_from_its_own_failure(disk: Path) -> None:
    fill(disk)
    with pytest.raises(OSError, match=FULL_DISK) as caught:
        atomic_write(disk / "x", bytes(PAGE))
    (told,) = failure(caught.value).items()
    assert told[0] == BLOCKED
    assert told[1].startswith(f"OSError: {caught.value.strerror}: {disk}/x; free space there (")
    assert failure(IstanasError("no use")) == {FAILED: "IstanasError: no use"}
    assert failure(PermissionError(13, "Permission denied")) == {FAILED: "PermissionError: Permission denied"}
