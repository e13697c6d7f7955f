"""The run directory: atomic records, metrics that survive a kill, and one process at a time."""

import builtins
import dataclasses
import io
import json
import logging
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from istanas.errors import CheckpointError, ConfigError
from pipeline.base.files import append, atomic_write
from pipeline.runs.directory import RunDir
from pipeline.runs.record import DatasetUse, MetricsLine, RunRecord, new_key

RECORD = RunRecord(
    name="digits_quickstart-search",
    kind="search",
    method="two_stage",
    dataset="digits",
    key=new_key(),
    params={"seed": 0, "lr": 0.1, "augment": True, "root": None, "stem": "small"},
    tags={"istanas.genotype": "abc"},
    description="# A run",
    parent=None,
    status="RUNNING",
    started_ms=1_700_000_000_000,
    ended_ms=None,
    artifacts=("config.yaml", "cells/normal.svg"),
    result={},
)


def test_record_comes_back_as_written(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "a")
    assert not run.exists()
    run.write(RECORD)
    assert run.exists()
    assert run.read() == RECORD


def test_key_is_made_once_when_empty(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write(dataclasses.replace(RECORD, key=""))
    first = run.read().key
    assert len(first) == 32
    assert int(first, 16) >= 0
    run.write(dataclasses.replace(RECORD, key="", status="FINISHED"))
    assert (run.read().key, run.read().status) == (first, "FINISHED")


def test_record_with_pictures_comes_back(tmp_path: Path) -> None:
    alphas, test = (
        DatasetUse("digits", context, 16 * "0", "here", 719, classes=10, shape=(1, 8, 8))
        for context in ("alphas", "test")
    )
    record = dataclasses.replace(RECORD, datasets=(alphas, test))
    RunDir(tmp_path).write(record)
    assert RunDir(tmp_path).read() == record
    assert record.measured_on("valid/top1") == alphas
    assert record.measured_on("test/loss") == test
    assert record.measured_on("train/loss") is None
    assert record.measured_on("target/params") is None


def test_record_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    data = dataclasses.asdict(RECORD)
    del data["datasets"]
    (tmp_path / "run.json").write_text(json.dumps(data))
    assert RunDir(tmp_path).read() == RECORD


def test_record_of_a_later_version_is_read(tmp_path: Path) -> None:
    data = {**dataclasses.asdict(RECORD), "invented_later": 1}
    (tmp_path / "run.json").write_text(json.dumps(data))
    assert RunDir(tmp_path).read() == RECORD


@pytest.mark.parametrize(
    ("content", "said"), [("{", "not JSON"), ("[]", "lacks name"), ('{"name": "x"}', "lacks kind")]
)
def test_broken_record_is_one_clear_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        RunDir(tmp_path).read()
    assert "run.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_record(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run\.json: missing"):
        RunDir(tmp_path).read()


def test_metrics_come_back_in_order_with_special_values(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "new")
    assert run.metrics() == []
    run.append_metrics(1, {"train/loss": 2.0, "valid/top1": 0.5}, 1000)
    run.append_metrics(2, {"train/loss": math.inf, "valid/top1": math.nan}, 2000)
    first, second = run.metrics()
    assert first == MetricsLine(1, 1000, {"train/loss": 2.0, "valid/top1": 0.5})
    assert second.metrics["train/loss"] == math.inf
    assert math.isnan(second.metrics["valid/top1"])


def test_half_written_last_line_is_ignored_then_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDir(tmp_path)
    run.append_metrics(1, {"a": 1.0}, 10)
    run.append_metrics(2, {"a": 2.0}, 20)
    file = tmp_path / "metrics.jsonl"
    whole = file.read_bytes()
    for cut in range(1, 12):  # wherever the kill came
        file.write_bytes(whole[:-cut])
        with caplog.at_level(logging.WARNING):
            assert [line.step for line in run.metrics()] == [1]
    assert "incomplete" in caplog.text
    run.append_metrics(3, {"a": 3.0}, 30)
    assert [line.step for line in run.metrics()] == [1, 3]


def test_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.append_metrics(1, {"a": 1.0}, 10)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2}\n')
    run.append_metrics(3, {"a": 1.0}, 10)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line 2"):
        run.metrics()


def test_replace_metrics(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in (1, 2, 3):
        run.append_metrics(step, {"a": float(step)}, step)
    run.replace_metrics([line for line in run.metrics() if line.step <= 2])
    assert [line.step for line in run.metrics()] == [1, 2]
    run.replace_metrics([])
    assert run.metrics() == []


def test_atomic_write_leaves_the_old_file_if_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "note.txt"
    atomic_write(file, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        atomic_write(file, "new")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_killed_writer_never_leaves_a_broken_record(tmp_path: Path) -> None:
    RunDir(tmp_path).write(RECORD)
    script = f"""
        import dataclasses
        from pipeline.runs.directory import RunDir
        run = RunDir({str(tmp_path)!r})
        record = run.read()
        print("go", flush=True)
        for n in range(10**9):
            run.write(dataclasses.replace(record, description="x" * 50_000, started_ms=n))
            run.append_metrics(n, {{"a": 1.0}}, n)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"go\n"
        run = RunDir(tmp_path)
        while len(run.metrics()) < 20:
            run.read()
        child.kill()
    assert run.read().key == RECORD.key
    steps = [line.step for line in run.metrics()]
    assert steps == list(range(len(steps)))


def test_a_second_process_is_refused_and_learns_the_owner(tmp_path: Path) -> None:
    script = f"""
        import sys
        from pipeline.runs.directory import RunDir
        with RunDir({str(tmp_path)!r}).lock():
            print("held", flush=True)
            sys.stdin.read()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=f"process {child.pid} on ") as caught, RunDir(tmp_path).lock():
            pass
        assert str(tmp_path) in str(caught.value)
        child.kill()
        child.wait()
    with RunDir(tmp_path).lock():  # a killed holder leaves nothing in the way
        pass
    with RunDir(tmp_path).lock():
        pass


class OneByteAtATime(io.FileIO):
    """A file of which every call writes at most one byte, as POSIX permits."""

    def write(self, data: Any, /) -> int:
        return super().write(memoryview(data)[:1])


def test_append_writes_all_of_the_data_when_every_write_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lines"
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", lambda descriptor, mode, buffering: OneByteAtATime(descriptor, mode))
        append(file, b"first line\n", at=0)
        append(file, b"second line\n", at=len(b"first line\n"))
    assert file.read_bytes() == b"first line\nsecond line\n"
