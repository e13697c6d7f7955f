"""Damaged files of a run are noticed, and restored if possible; no damage is ignored silently."""

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from istanas.errors import CheckpointError
from pipeline.config.load import load
from pipeline.jobs.closing import deliver_below
from pipeline.runs.directory import RunDir
from pipeline.runs.epoch_log import BrokenCheckpointWarning
from pipeline.tracking.store import open_client
from tests.pipeline.jobs.tiny_search import (
    SETTINGS,
    decided,
    search,
    search_stopped_after_two,
    stop_after_two,
)

NAME = "tiny-search-*"


def tracked(folder: Path) -> list[str]:
    return ["tracking.enabled=true", f"tracking.uri=sqlite:///{folder}/mlflow.db"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search of three epochs."""
    found, _ = search(tmp_path_factory.mktemp("undisturbed"))
    return Path(found["run_dir"])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that was stopped after two epochs."""
    return search_stopped_after_two(tmp_path_factory.mktemp("stopped"))


@pytest.fixture
def stopped(original: Path, tmp_path: Path) -> Path:
    """The run directory in a copy of that folder."""
    shutil.copytree(original, tmp_path / "runs")
    (path,) = (tmp_path / "runs").glob(NAME)
    return path


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def cut_the_last_line(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 20)


def garbage_in_the_middle(file: Path) -> None:
    first, second, *_ = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + b"\x00\xff{]\n" + second)


def half_a_line_in_the_middle(file: Path) -> None:
    first, second, *_ = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first[: len(first) // 2] + b"\n" + second)


DAMAGED_TABLE = ": damaged: restored from the epoch log"


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("metrics.jsonl", cut, None),  # as a kill leaves it
        ("metrics.jsonl", garbage_in_the_middle, "metrics.jsonl: line 2 is not a line of metrics: restored"),
        (
            "metrics.jsonl",
            half_a_line_in_the_middle,
            "metrics.jsonl: line 1 is not a line of metrics: restored",
        ),
        ("metrics.jsonl", Path.unlink, None),
        ("run.json", cut, ": replaced, the damaged file is run.json.damaged"),
        ("environment.json", cut, ": replaced, the damaged file is environment.json.damaged"),
        ("trajectory.csv", cut, DAMAGED_TABLE),
        ("trajectory.csv", cut_the_last_line, None),  # as a kill leaves it
        ("trajectory.csv", Path.unlink, DAMAGED_TABLE),
        ("codes.csv", garbage_in_the_middle, DAMAGED_TABLE),
    ],
    ids=[
        "metrics cut",
        "garbage",
        "half a line",
        "no metrics",
        "record",
        "environment",
        "trajectory cut",
        "trajectory torn",
        "no trajectory",
        "codes",
    ],
)
def test_a_resumed_run_with_a_damaged_file_equals_an_undisturbed_one(
    stopped: Path, undisturbed: Path, name: str, damage: Callable[[Path], object], says: str | None
) -> None:
    damage(stopped / name)
    found, seen = search(stopped.parent)
    assert found["run_dir"] == str(stopped)
    warned = [line for line in seen.splitlines() if line.startswith("warning: ")]
    assert len(warned) == (says is not None)
    if says is not None:
        assert warned[0].startswith(f"warning: {stopped / name}: ")
        assert warned[0].endswith(says)
    assert "resumed after epoch 2" in seen
    assert decided(stopped) == decided(undisturbed)
    assert [line.step for line in RunDir(stopped).metrics()] == [1, 2, 3]
    assert RunDir(stopped).read().status == "FINISHED"
    for file in ("genotype.json", "trajectory.csv", "codes.csv"):
        assert (stopped / file).read_bytes() == (undisturbed / file).read_bytes()
    if name == "run.json":
        before = RunDir(undisturbed).read()
        assert RunDir(stopped).read().params == before.params
        assert (stopped / "run.json.damaged").is_file()


def test_a_run_without_its_record_resumes_from_its_checkpoints(stopped: Path, undisturbed: Path) -> None:
    (stopped / "run.json").unlink()
    _, seen = search(stopped.parent)
    assert f"warning: {stopped / 'run.json'}: missing although there are checkpoints: restored" in seen
    assert "resumed after epoch 2" in seen
    assert decided(stopped) == decided(undisturbed)


def test_a_damaged_record_below_a_sweep_keeps_no_other_run_from_mlflow(stopped: Path, tmp_path: Path) -> None:
    other = stopped.parent / "other"
    shutil.copytree(stopped, other)
    cut(stopped / "run.json")
    config = load(None, [*SETTINGS, *tracked(tmp_path)])
    assert deliver_below(stopped.parent, config)
    client = open_client(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs(["1"])
    assert run.data.tags["istanas.run_dir"] == str(other)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (garbage_in_the_middle, "line 2 is not a line of metrics"),
        (cut_the_last_line, "ends in the middle of a line"),
    ],
)
def test_damaged_metrics_of_a_finished_run_are_restored(
    undisturbed: Path, tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    shutil.copytree(undisturbed.parent, tmp_path / "runs")
    (path,) = (tmp_path / "runs").glob(NAME)
    before = (path / "metrics.jsonl").read_bytes()
    damage(path / "metrics.jsonl")
    _, seen = search(path.parent)
    assert "already finished" in seen
    assert f"metrics.jsonl: {says}: restored" in seen
    assert (path / "metrics.jsonl").read_bytes() == before


def one_wrong_digit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.fixture
def finished(undisturbed: Path, tmp_path: Path) -> Path:
    """The run directory in a copy of a finished run's folder."""
    shutil.copytree(undisturbed.parent, tmp_path / "runs")
    (path,) = (tmp_path / "runs").glob(NAME)
    return path


def warnings_in(seen: str) -> list[str]:
    return [line for line in seen.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize("name", ["trajectory.csv", "codes.csv"])
@pytest.mark.parametrize("damage", [cut, cut_the_last_line, one_wrong_digit, Path.unlink])
def test_a_damaged_table_of_a_finished_run_is_restored(
    finished: Path, name: str, damage: Callable[[Path], object]
) -> None:
    before = (finished / name).read_bytes()
    damage(finished / name)
    _, seen = search(finished.parent)
    assert "already finished" in seen
    assert warnings_in(seen) == [f"warning: {finished / name}{DAMAGED_TABLE}"]
    assert (finished / name).read_bytes() == before
    _, seen = search(finished.parent)
    assert warnings_in(seen) == []


@pytest.mark.parametrize("lost", ["checkpoints", "newest", "all broken"])
def test_tables_of_a_finished_run_stay_if_no_checkpoint_can_restore_them(finished: Path, lost: str) -> None:
    folder = finished / "checkpoints"
    before = {name: (finished / name).read_bytes() for name in ("trajectory.csv", "codes.csv")}
    if lost == "checkpoints":
        shutil.rmtree(folder)
    for file in folder.glob("epoch-*.pt"):
        if lost == "all broken" or file.name == "epoch-0003.pt":
            cut(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BrokenCheckpointWarning)
        found, seen = search(finished.parent)
    assert "already finished" in seen
    assert found["run_dir"] == str(finished)
    assert {name: (finished / name).read_bytes() for name in before} == before
    assert ["no checkpoint is left" in line for line in warnings_in(seen)] == [True] * (lost == "all broken")


def test_a_damaged_environment_of_a_finished_run_is_renamed(finished: Path) -> None:
    """It is not written again, since the present environment may differ from that of the run."""
    cut(finished / "environment.json")
    damaged = (finished / "environment.json").read_bytes()
    _, seen = search(finished.parent)
    assert "already finished" in seen
    (line,) = warnings_in(seen)
    assert line.startswith(f"warning: {finished / 'environment.json'}: not JSON")
    assert line.endswith(": renamed to environment.json.damaged")
    assert (finished / "environment.json.damaged").read_bytes() == damaged
    _, seen = search(finished.parent)
    assert warnings_in(seen) == []


def test_a_restored_record_keeps_its_run_in_mlflow(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "runs", *tracked(tmp_path), on_epoch=stop_after_two)
    (path,) = (tmp_path / "runs").glob(NAME)
    cut(path / "run.json")
    found, _ = search(tmp_path / "runs", *tracked(tmp_path))
    client = open_client(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs(["1"])
    assert (run.info.run_id, run.info.status) == (found["mlflow_run_id"], "FINISHED")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [1, 2, 3]


def test_a_broken_checkpoint_costs_one_epoch_and_is_reported(stopped: Path, undisturbed: Path) -> None:
    cut(stopped / "checkpoints" / "epoch-0002.pt")
    with pytest.warns(
        BrokenCheckpointWarning, match=r"epoch-0002\.pt is broken .*: the previous checkpoint is used"
    ):
        _, seen = search(stopped.parent)
    assert "resumed after epoch 1" in seen
    assert decided(stopped) == decided(undisturbed)


def test_a_run_without_a_valid_checkpoint_needs_the_users_decision(stopped: Path, undisturbed: Path) -> None:
    for epoch in (1, 2):
        cut(stopped / "checkpoints" / f"epoch-000{epoch}.pt")
    before = RunDir(stopped).metrics()
    with pytest.raises(
        CheckpointError, match="no checkpoint is left; restore one from a copy, or start"
    ) as caught:
        search(stopped.parent)
    assert "\n" not in str(caught.value)
    assert all(f"epoch-000{epoch}.pt is broken" in str(caught.value) for epoch in (1, 2))
    assert RunDir(stopped).metrics() == before, "the metrics are kept for the user"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, seen = search(stopped.parent, fresh=True)
    assert "resumed" not in seen
    assert decided(stopped) == decided(undisturbed)
