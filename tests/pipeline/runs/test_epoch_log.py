"""The epoch log: exact records, two verified copies, resumption after a kill at any write, version 0.1, cost."""

import contextlib
import dataclasses
import io
import json
import math
import os
import random
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from istanas.errors import CheckpointError
from istanas.limits import LOG_SEGMENT_BYTES
from istanas.space import CellSpace
from pipeline.jobs.observer import RunObserver
from pipeline.jobs.progress import EpochBar
from pipeline.runs import checkpoint
from pipeline.runs.checkpoint import serialize
from pipeline.runs.directory import RunDir
from pipeline.runs.epoch_log import LINE_BYTES, SEGMENT, BrokenCheckpointWarning, LogEnd, append_line
from pipeline.runs.layout import EPOCH_LOGS
from pipeline.runs.mlflow_link import read_link
from pipeline.runs.record import RunRecord
from pipeline.tracking.store import open_client
from pipeline.tracking.tracker import MLflowTracker, Tracker
from pipeline.training.epoch_record import (
    EpochRecord,
    FolderStore,
    Progress,
    Rollback,
    load_latest,
    load_progress,
    read_progress,
    read_records,
)
from tests.pipeline.jobs.tiny_search import decided, search, search_stopped_after_two
from tests.pipeline.training.made_up import as_version_0_1, record_of, save_epoch

NAMES = ("000001.jsonl", "000101.jsonl", "000201.jsonl")


# ---------- records
def test_a_record_is_restored_from_json_bit_for_bit() -> None:
    draw = random.Random(0)
    exact = [
        5e-324,
        -0.0,
        0.1 + 0.2,
        1e300,
        math.inf,
        *(draw.uniform(-1, 1) * 10.0**n for n in range(-300, 300)),
    ]
    record = dataclasses.replace(record_of(3), metrics={f"m{n}": value for n, value in enumerate(exact)})
    for each in (
        record,
        record_of(1),
        record_of(2, one_stage=True),
        dataclasses.replace(record, search=None),
    ):
        text = each.to_json()
        assert "\n" not in text
        assert EpochRecord.from_json(text) == each
        assert EpochRecord.from_json(text).to_json() == text
    undefined = dataclasses.replace(record, metrics={"m": math.nan})
    assert math.isnan(EpochRecord.from_json(undefined.to_json()).metrics["m"])


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("epoch"),
        lambda r: r.update(epoch="1"),
        lambda r: r.update(epoch=1.5),
        lambda r: r.update(other=1),
        lambda r: r["metrics"].update(a="b"),
        lambda r: r["metrics"].update(a=1),  # which no worker writes: a figure is a float
        lambda r: r["search"].pop("converged"),
        lambda r: r["search"]["nodes"][0].pop("cell"),
        lambda r: r["search"]["nodes"][0].update(more=1),
        lambda r: r["search"]["nodes"][0].update(changed="yes"),
        lambda r: r.update(search=[]),
    ],
)
def test_any_other_text_is_refused_in_one_line(change: Callable[[Any], Any]) -> None:
    found = json.loads(record_of(1).to_json())
    change(found)
    with pytest.raises(CheckpointError, match=r"^not the record of an epoch") as caught:
        EpochRecord.from_json(json.dumps(found))
    assert "\n" not in str(caught.value)


def test_integer_metrics_are_read_back_as_floats(tmp_path: Path) -> None:
    """Otherwise no checkpoint of the run could be read."""
    record = record_of(1)
    (node, *others) = record.found().nodes
    node = dataclasses.replace(node, gap=0, margin=1, edge_weights=[1, 2])
    found = dataclasses.replace(record.found(), nodes=(node, *others))
    save_epoch(
        tmp_path,
        Progress(),
        dataclasses.replace(
            record,
            seconds=2,
            metrics={"arch/frozen_nodes": 3},
            search=found,
            rollbacks=(Rollback(reason="nan", lr_factor=1),),
        ),
    )
    (read,) = read_records(tmp_path, load_progress(tmp_path))
    again = read.found().nodes[0]
    for value in (
        read.seconds,
        read.metrics["arch/frozen_nodes"],
        read.rollbacks[0].lr_factor,
        again.gap,
        again.margin,
        *again.edge_weights,
    ):
        assert type(value) is float
    assert (read.seconds, read.metrics["arch/frozen_nodes"], again.margin) == (2, 3, 1)


def test_an_unreadable_record_is_refused_on_writing(tmp_path: Path) -> None:
    wrong: Any = {"valid/top1": "0.5"}
    with pytest.raises(CheckpointError, match=r"not the record of an epoch \(metrics.valid/top1"):
        save_epoch(tmp_path, Progress(), dataclasses.replace(record_of(1), metrics=wrong))
    assert not list(tmp_path.iterdir())


# ---------- the log
@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of 203 epochs, in three segments."""
    folder = tmp_path_factory.mktemp("written")
    extend(folder, Progress(), 203)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def extend(folder: Path, progress: Progress, epochs: int) -> Progress:
    """Append the epochs up to a number, and write the checkpoint of the last."""
    while progress.epochs < epochs - 1:
        before, (progress, line) = progress, progress.after(record_of(progress.epochs + 1))
        append_line(folder, progress.epochs, line, before.log.offset)
    return save_epoch(folder, progress)


def epochs_in(folder: Path) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return [record.epoch for record in read_records(folder, load_progress(folder))]


def test_sums_and_records_are_those_of_all_epochs(folder: Path) -> None:
    progress = load_progress(folder)
    records = list(read_records(folder, progress))
    assert records == [record_of(epoch) for epoch in range(1, 204)]
    assert progress.last == records[-1]
    assert progress.seconds == sum(record.seconds for record in records)
    assert progress.rollbacks == 1
    *_, then = read_progress(folder, progress)
    assert then == progress
    assert {path.name for path in (folder / "epochs").iterdir()} == set(NAMES)
    assert [len((folder / "epochs" / name).read_bytes().splitlines()) for name in NAMES] == [101, 101, 4]


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def of_another_run(file: Path) -> None:
    """Consistent lines of another run."""
    end, lines = LogEnd(), b""
    for _ in range(SEGMENT):
        end, line = end.after(record_of(7).to_json())
        lines += line
    file.write_bytes(lines)


def huge(file: Path) -> None:
    os.truncate(file, 2**36)


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("copy", EPOCH_LOGS)
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, of_another_run, huge, pipe])
def test_a_damaged_segment_is_replaced_from_its_copy(
    folder: Path, damage: Callable[[Path], object], copy: str, name: str
) -> None:
    whole = (folder / copy / name).read_bytes()
    damage(folder / copy / name)
    with pytest.warns(BrokenCheckpointWarning, match=f"{copy}/{name} was damaged .*: replaced from") as told:
        assert len(list(read_records(folder, load_progress(folder)))) == 203
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    assert (folder / copy / name).read_bytes() == whole
    assert epochs_in(folder) == list(range(1, 204)), "it was replaced"


def test_a_segment_that_is_damaged_in_both_copies_is_an_error(folder: Path) -> None:
    for copy in EPOCH_LOGS:
        flip(folder / copy / NAMES[1])
    with pytest.raises(CheckpointError, match=r"restore one of the two .* --fresh$") as caught:
        list(read_records(folder, load_progress(folder)))
    line = str(caught.value)
    assert all(f"{folder / copy / NAMES[1]} is damaged (line 1" in line for copy in EPOCH_LOGS)
    assert "\n" not in line


def test_different_segments_may_be_damaged_in_the_two_copies(folder: Path) -> None:
    flip(folder / "epochs" / NAMES[0])
    flip(folder / "epochs-copy" / NAMES[1])
    with pytest.warns(BrokenCheckpointWarning):
        assert len(list(read_records(folder, load_progress(folder)))) == 203
    assert epochs_in(folder) == list(range(1, 204))


def test_a_checkpoint_without_its_log_lines_is_skipped(
    folder: Path,
) -> None:
    """As in a copy of a run that was made while an epoch ended: the log was copied before the checkpoints."""
    older = {copy: (folder / copy / NAMES[2]).read_bytes() for copy in EPOCH_LOGS}
    save_epoch(folder, load_progress(folder))
    for copy in EPOCH_LOGS:
        (folder / copy / NAMES[2]).write_bytes(older[copy])
    with pytest.warns(BrokenCheckpointWarning) as told:
        progress = load_progress(folder)
    (line,) = (str(each.message) for each in told)
    assert "epoch-0204.pt does not match the log of epochs" in line
    assert all(
        f"{folder / copy / NAMES[2]} is damaged (it ends after line 203)" in line for copy in EPOCH_LOGS
    )
    assert line.endswith(": the previous checkpoint is used")
    assert "\n" not in line
    assert [record.epoch for record in read_records(folder, progress)] == list(range(1, 204))
    save_epoch(folder, progress)
    assert epochs_in(folder) == list(range(1, 205))


def test_log_lines_after_the_checkpoint_are_ignored_and_rewritten(folder: Path) -> None:
    """A complete line and half a line in the first copy, none in the second: the checkpoint was never written."""
    progress = load_progress(folder)
    _, line = progress.after(record_of(9999))
    with open(folder / "epochs" / NAMES[2], "ab") as stream:
        stream.write(line + line[:100])
    assert epochs_in(folder) == list(range(1, 204))
    save_epoch(folder, progress)
    assert epochs_in(folder) == list(range(1, 205))
    copies = [(folder / copy / NAMES[2]).read_bytes() for copy in EPOCH_LOGS]
    assert copies[0] == copies[1]


@pytest.mark.parametrize("back", [202, 200, 199, 100, 1])
def test_a_run_that_resumes_from_an_earlier_epoch_truncates_the_log(folder: Path, back: int) -> None:
    """Across segments, too; no line of the abandoned epochs is left."""
    *_, earlier = (p for p in read_progress(folder, load_progress(folder)) if p.epochs <= back)
    again = dataclasses.replace(record_of(back + 1), workers=7)
    progress = save_epoch(folder, earlier, again)
    assert list(read_records(folder, load_progress(folder)))[-1] == again
    assert load_progress(folder) == progress
    n_segments = -(-(back + 1) // SEGMENT)
    assert [{p.name for p in (folder / copy).iterdir()} for copy in EPOCH_LOGS] == [
        set(NAMES[:n_segments])
    ] * 2


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_at(call: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Kill at the n-th fsync: what was written up to there stays. Yields a list with an entry for each."""
    fsync, calls = os.fsync, list[int]()

    def counting(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == call:
            raise Killed
        fsync(descriptor)

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(os, "fsync", counting)
        yield calls


@pytest.mark.parametrize("done", [199, 200, 203])
def test_a_kill_at_any_write_leaves_the_log_of_the_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """In the middle of a segment, at the end of one and at the start of one."""
    (before,) = (p for p in read_progress(folder, load_progress(folder)) if p.epochs == done)
    for epoch in (204, 203, 202, 201, 200):
        (folder / f"epoch-{epoch:04d}.json").unlink(missing_ok=True)
    checkpoint.write_state(folder, done, serialize({"progress": before.to_state()}))
    with killed_at(10**6, monkeypatch) as calls:
        shutil.copytree(folder, tmp_path / "whole")
        save_epoch(tmp_path / "whole", before)
    assert len(calls) >= 6, "two copies of the log, a checkpoint and its checksum"
    for call in range(1, len(calls) + 1):
        copy = tmp_path / str(call)
        shutil.copytree(folder, copy)
        with killed_at(call, monkeypatch):
            save_epoch(copy, before)
        assert epochs_in(copy) in (list(range(1, done + 1)), list(range(1, done + 2)))
        progress = load_progress(copy)
        while progress.epochs < done + 2:
            progress = save_epoch(copy, progress)
        assert epochs_in(copy) == list(range(1, done + 3))


@pytest.mark.parametrize("damage", [cut, Path.unlink])
@pytest.mark.parametrize("copy", EPOCH_LOGS)
def test_a_copy_that_is_truncated_during_a_run_is_restored(
    folder: Path, damage: Callable[[Path], object], copy: str
) -> None:
    progress = load_progress(folder)
    damage(folder / copy / NAMES[2])
    with pytest.warns(
        BrokenCheckpointWarning, match=f"{copy}/{NAMES[2]} was damaged .*: replaced from"
    ) as told:
        save_epoch(folder, progress)
    assert len(told) == 1
    assert epochs_in(folder) == list(range(1, 205))


@pytest.mark.parametrize("other", [cut, flip, Path.unlink])
def test_a_log_that_is_damaged_in_both_copies_during_a_run_is_an_error(
    folder: Path, other: Callable[[Path], object]
) -> None:
    progress = load_progress(folder)
    cut(folder / "epochs" / NAMES[2])
    other(folder / "epochs-copy" / NAMES[2])
    with pytest.raises(
        CheckpointError, match=r"damaged .* run the same command again, which resumes"
    ) as caught:
        save_epoch(folder, progress)
    assert "\n" not in str(caught.value)
    assert str(folder / "epochs" / NAMES[2]) in str(caught.value)


def test_a_segment_has_room_for_the_largest_records(folder: Path) -> None:
    """Of the largest search space that a configuration may have."""
    largest = record_of(1, CellSpace(n_nodes=16))
    end, lines = LogEnd(), 0
    for _ in range(SEGMENT):
        end, line = end.after(largest.to_json())
        lines += len(line)
    assert lines < LOG_SEGMENT_BYTES


def test_a_record_above_the_size_limit_is_refused_on_writing(
    tmp_path: Path,
) -> None:
    _, longest = LogEnd().after("x" * (LINE_BYTES - 67))
    assert len(longest) == LINE_BYTES
    assert SEGMENT * LINE_BYTES <= LOG_SEGMENT_BYTES
    with pytest.raises(CheckpointError, match=r"the record of epoch 1 has .* bytes, more than") as caught:
        LogEnd().after("x" * LINE_BYTES)
    assert "\n" not in str(caught.value)


# ---------- a run with a damaged log
@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found, _ = search(tmp_path_factory.mktemp("undisturbed"))
    return Path(found["run_dir"])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return search_stopped_after_two(tmp_path_factory.mktemp("original"))


@pytest.fixture
def stopped(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "runs")
    (path,) = (tmp_path / "runs").iterdir()
    return path


def check_as_undisturbed(path: Path, undisturbed: Path) -> None:
    assert decided(path) == decided(undisturbed)
    for file in ("genotype.json", "trajectory.csv", "codes.csv"):
        assert (path / file).read_bytes() == (undisturbed / file).read_bytes()
    assert epochs_in(path / "checkpoints") == [1, 2, 3]


@pytest.mark.parametrize("copy", EPOCH_LOGS)
def test_a_run_with_a_damaged_copy_ends_like_an_undamaged_one(
    stopped: Path, undisturbed: Path, copy: str
) -> None:
    flip(stopped / "checkpoints" / copy / NAMES[0])
    with pytest.warns(BrokenCheckpointWarning, match=f"{copy}/{NAMES[0]} was damaged"):
        _, seen = search(stopped.parent)
    assert "resumed after epoch 2" in seen
    check_as_undisturbed(stopped, undisturbed)


def test_a_run_without_its_log_does_not_resume_and_keeps_its_files(stopped: Path) -> None:
    before = {name: (stopped / name).read_bytes() for name in ("metrics.jsonl", "trajectory.csv")}
    for copy in EPOCH_LOGS:
        (stopped / "checkpoints" / copy / NAMES[0]).unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is left; restore one from a copy") as caught:
        search(stopped.parent)
    assert "\n" not in str(caught.value)
    assert {name: (stopped / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("extra", [b"", b"9,normal,0,x", b"one more line\n" * 40])
def test_table_rows_after_the_checkpoint_are_removed(stopped: Path, undisturbed: Path, extra: bytes) -> None:
    for name in ("metrics.jsonl", "trajectory.csv", "codes.csv"):
        with open(stopped / name, "ab") as stream:
            stream.write(extra if name != "metrics.jsonl" else b"")
    search(stopped.parent)
    check_as_undisturbed(stopped, undisturbed)


# ---------- version 0.1
def make_version_0_1(folder: Path) -> None:
    """Make the checkpoints of a run what version 0.1 wrote: all records in each, no log."""
    found = load_latest(folder)
    assert found is not None
    history = [as_version_0_1(record) for record in read_records(folder, load_progress(folder))]
    for copy in EPOCH_LOGS:
        shutil.rmtree(folder / copy)
    state = {key: value for key, value in found.state.items() if key != "progress"}
    checkpoint.write_state(folder, len(history), serialize({**state, "history": history}))


def test_a_run_of_version_0_1_ends_like_one_of_this_version(stopped: Path, undisturbed: Path) -> None:
    make_version_0_1(stopped / "checkpoints")
    _, seen = search(stopped.parent)
    assert "resumed after epoch 2" in seen
    check_as_undisturbed(stopped, undisturbed)


@pytest.mark.parametrize("one_stage", [True, False])
def test_records_of_version_0_1_are_converted_to_the_log(tmp_path: Path, one_stage: bool) -> None:
    progress = Progress()
    for epoch in range(1, 104):
        progress = save_epoch(tmp_path, progress, record_of(epoch, one_stage=one_stage), net=epoch)
    make_version_0_1(tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.glob("epoch-*.*")}
    assert load_progress(tmp_path) == progress
    assert list(read_records(tmp_path, progress))[2] == record_of(3, one_stage=one_stage)
    found = load_latest(tmp_path)
    assert found is not None
    assert "history" not in found.state
    assert checkpoint.deserialize(found.data)["progress"] == found.state["progress"]
    assert found.state["net"] == 103
    assert {path.name: path.read_bytes() for path in tmp_path.glob("epoch-*.*")} == old
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))]
    load_progress(tmp_path)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))] == times, "written again"
    save_epoch(tmp_path, progress, record_of(104, one_stage=one_stage))
    newest = checkpoint.read_latest(tmp_path)
    assert newest is not None
    assert "history" not in newest.state
    assert epochs_in(tmp_path) == list(range(1, 105))


def test_a_kill_during_the_conversion_keeps_the_checkpoint_of_version_0_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Progress()
    for _ in range(2):
        progress = save_epoch(tmp_path / "old", progress)
    make_version_0_1(tmp_path / "old")
    (tmp_path / "old" / "epoch-0001.json").unlink()
    (tmp_path / "old" / "epoch-0001.pt").unlink()

    def resume(folder: Path) -> None:
        save_epoch(folder, load_progress(folder))

    shutil.copytree(tmp_path / "old", tmp_path / "whole")
    with killed_at(10**6, monkeypatch) as calls:
        resume(tmp_path / "whole")
    for call in range(1, len(calls) + 1):
        folder = tmp_path / str(call)
        shutil.copytree(tmp_path / "old", folder)
        with killed_at(call, monkeypatch):
            resume(folder)
        assert epochs_in(folder) in ([1, 2], [1, 2, 3])
        resume(folder)
        assert epochs_in(folder) in ([1, 2, 3], [1, 2, 3, 4])


def test_records_that_version_0_1_did_not_write_are_one_line(tmp_path: Path) -> None:
    for history in (7, [{}], [as_version_0_1(record_of(1)) | {"nodes": [{"cell": "a"}]}]):
        checkpoint.write_state(tmp_path, 1, serialize({"history": history}))
        with pytest.raises(
            CheckpointError, match=r"has no valid records of epochs .*; start over with --fresh$"
        ) as caught:
            load_progress(tmp_path)
        assert "\n" not in str(caught.value)


# ---------- what an epoch costs
SPACE = CellSpace(n_nodes=2)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, if there is one, because thousands of epochs take long on a disk."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place if place.is_dir() else None) as folder:
        yield Path(folder)


class Run:
    """A run directory and the bookkeeping of a job: everything that an epoch does but train.

    Args:
        folder: of the run.
        done: epochs that it has behind it; they are written as epochs are, and delivered to MLflow.
    """

    def __init__(self, folder: Path, done: int, bar: EpochBar) -> None:
        self.run = RunDir(folder / "run")
        self.folder, self.progress = self.run.path / "checkpoints", Progress()
        self.run.write(RUN)
        for epoch in range(1, done + 1):
            before, (self.progress, line) = self.progress, self.progress.after(record_of(epoch, SPACE))
            append_line(self.folder, epoch, line, before.log.offset)
        self.tracker: Tracker = MLflowTracker(
            self.run, tracking_uri=f"sqlite:///{folder}/mlflow.db", experiment="istanas"
        )
        self.observer = RunObserver(
            self.run, self.tracker, bar, SPACE, lambda record: f"epoch {record.epoch}"
        )
        self.observer.resumed(self.progress, 1)

    def epoch(self) -> None:
        """Record an epoch."""
        self.progress = save_epoch(self.folder, self.progress, record_of(self.progress.epochs + 1, SPACE))
        self.observer.epoch_done(self.progress)


RUN = RunRecord(
    name="run",
    kind="search",
    method="two_stage",
    dataset="digits",
    key="1" * 32,
    params={},
    tags={},
    description="",
    parent=None,
    status="RUNNING",
    started_ms=1,
    ended_ms=None,
    artifacts=(),
    result={},
)


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the bytes that this process reads and writes, by the system's own count."""

    def now() -> dict[str, int]:
        pairs = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return {name: int(value) for name, value in pairs if name in ("rchar", "wchar")}

    found: dict[str, int] = {}
    before = now()
    yield found
    found.update({name: value - before[name] for name, value in now().items()})


def plain_part(folder: Path, epoch: int) -> int:
    """Size of a checkpoint without its tensors."""
    with zipfile.ZipFile(folder / f"epoch-{epoch:04d}.pt") as archive:
        return sum(m.file_size for m in archive.infolist() if m.filename.endswith(".pkl"))


@pytest.mark.slow
def test_an_epoch_costs_the_same_after_ten_epochs_and_after_two_thousand(memory: Path) -> None:
    """Record, log, checkpoint, metrics, tables and delivery to MLflow, in bytes that are read and written."""
    costs, sizes = {}, {}
    console = Console(file=io.StringIO())
    for done in (10, 2000):
        with EpochBar(console, "search", 3000, "epoch") as bar:
            run = Run(memory / str(done), done, bar)
            run.epoch()  # the tracker's connections are made, and the store is known
            each = []
            for _ in range(5):
                with counted() as cost:
                    run.epoch()
                each.append(cost)
            costs[done] = {name: min(cost[name] for cost in each) for name in ("rchar", "wchar")}
            sizes[done] = plain_part(run.folder, run.progress.epochs)
            client = open_client(f"sqlite:///{memory}/{done}/mlflow.db")
            history = client.get_metric_history(str(run.tracker.run_id), "train/loss")
            assert [metric.step for metric in history] == list(range(1, done + 7)), "lost or doubled"
    print(f"bytes of an epoch {costs}, of a checkpoint's plain part {sizes}")
    assert costs[10]["wchar"] > 10_000, "nothing was counted"
    for name in ("rchar", "wchar"):
        # SQLite's trees have a level more, and numbers a digit or two.
        assert costs[2000][name] < 1.5 * costs[10][name] + 20_000, costs
    assert sizes[2000] < sizes[10] + 200, sizes


@pytest.mark.slow
def test_a_run_of_five_thousand_epochs_resumes(memory: Path) -> None:
    """The log of 4,999 epochs is written as epochs are, behind the first one of a real search, which then goes on."""
    smallest = (
        "space.nodes=1",
        "search={epochs: 5001, batch_size: 16, init_channels: 1, layers: 3, max_pictures: 32}",
    )

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(memory, *smallest, on_epoch=stop)
    (path,) = memory.iterdir()
    folder = path / "checkpoints"
    found, progress = load_latest(folder), load_progress(folder)
    assert found is not None
    first = progress.newest
    later = dataclasses.replace(first.found(), start_nodes=())
    for epoch in range(2, 5001):
        before, (progress, line) = (
            progress,
            progress.after(dataclasses.replace(first, epoch=epoch, search=later)),
        )
        append_line(folder, epoch, line, before.log.offset)
    found.state["search"]["epoch"] = 5000
    FolderStore(folder).write(
        5000, serialize({**found.state, "progress": progress.to_state()}), line, before.log.offset
    )
    assert plain_part(folder, 5000) < 200_000

    result, seen = search(memory, *smallest)
    assert "resumed after epoch 5000" in seen
    assert "epoch 5001: loss" in seen
    assert [line.step for line in RunDir(path).metrics()] == list(range(1, 5002))
    epochs = {int(row.partition(",")[0]) for row in (path / "trajectory.csv").read_text().splitlines()[1:]}
    assert epochs == set(range(5002))
    assert epochs_in(folder) == list(range(1, 5002))
    assert RunDir(path).read().status == "FINISHED"
    assert result["seconds"] == load_progress(folder).seconds


# ---------- delivery from a byte on
LATER = record_of(1).timestamp_ms + 1_000_000


def test_replaced_metrics_are_compared_again(tmp_path: Path) -> None:
    """An export adds metrics to the last epoch; a resumed run repeats epochs."""
    console = Console(file=io.StringIO())
    with EpochBar(console, "search", 10, "epoch") as bar:
        run = Run(tmp_path, 3, bar)
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    def stored(name: str) -> list[int]:
        return [m.step for m in open_client(uri).get_metric_history(str(run.tracker.run_id), name)]

    link = read_link(run.run)
    assert link is not None
    assert link.metrics_bytes == (run.run.path / "metrics.jsonl").stat().st_size
    *rest, last = run.run.metrics()
    run.run.replace_metrics([*rest, last._replace(metrics={**last.metrics, "export/onnx": 1e-7})])
    assert run.tracker.deliver()
    assert (stored("export/onnx"), stored("train/loss")) == ([3], [1, 2, 3])
    run.run.replace_metrics(rest[:1])
    for step in (2, 3, 4):
        run.run.append_metrics(step, {"train/loss": 0.5}, timestamp_ms=LATER + step)
    for tracker in (run.tracker, MLflowTracker(run.run, tracking_uri=uri, experiment="istanas")):
        assert tracker.deliver()
        assert stored("train/loss") == [1, 2, 3, 4]


def test_a_link_of_version_0_1_leads_to_its_run_without_duplicates(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    with EpochBar(console, "search", 10, "epoch") as bar:
        run = Run(tmp_path, 3, bar)
    file = run.run.path / "mlflow.json"
    link = json.loads(file.read_text())
    old = {key: link[key] for key in ("tracking_uri", "experiment", "run_id", "artifacts")}
    file.write_text(json.dumps(old))
    run.run.append_metrics(4, {"train/loss": 0.5}, timestamp_ms=LATER)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = MLflowTracker(run.run, tracking_uri=uri, experiment="istanas")
    assert tracker.deliver()
    assert tracker.run_id == link["run_id"]
    steps = [m.step for m in open_client(uri).get_metric_history(link["run_id"], "train/loss")]
    assert steps == [1, 2, 3, 4]
