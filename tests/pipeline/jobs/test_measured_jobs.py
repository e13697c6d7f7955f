"""The tables of a search by measurements: their rows, their resuming, and what the user reads at the end."""

import dataclasses
import io
import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from istanas.effects import architecture, layout
from istanas.space import Genotype, NasBench201Space
from pipeline.cli.commands import run
from pipeline.jobs.compare import _row as compared_figures
from pipeline.jobs.effects import EFFECTS_COLUMNS
from pipeline.jobs.search_tables import MEASUREMENTS_COLUMNS, measurement_of, measurement_rows
from pipeline.report.run_reader import read_run
from pipeline.runs.directory import RunDir
from pipeline.tracking.store import open_client
from pipeline.training.epoch_record import load_progress, read_records
from tests.pipeline.jobs.test_damaged_files import cut, one_wrong_digit, warnings_in

SPACE = NasBench201Space()
SETTINGS = [
    *("--set", "method=measured", "--set", "space={name: nas_bench_201}", "--set", "data.crop_padding=1"),
    *("--set", "search={stages: [[6, 1], [3, 2, 8]], batch_size: 50, init_channels: 2, layers: 5}"),
    *("--set", "search.max_pictures=100", "--set", "search.calibration_batches=1"),
    *("--set", "retrain={layers: 5, init_channels: 4, auxiliary_weight: 0}"),
    *("--set", "runtime={threads: 1, device: cpu}"),
]
TABLES = ("measurements.csv", "effects.csv", "trajectory.csv", "codes.csv", "genotype.json")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, blank_database: Path) -> dict[str, Any]:
    """The result of a finished search, what it printed, and its folder."""
    folder, said, shown = tmp_path_factory.mktemp("whole"), io.StringIO(), io.StringIO()
    shutil.copy(blank_database, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "stdout", said)
        patch.setattr(sys, "stderr", shown)
        assert run(["search", "--json", *SETTINGS]) == 0
    result = json.loads(said.getvalue().splitlines()[-1])
    return {**result, "folder": folder, "shown": shown.getvalue(), "path": folder / result["run_dir"]}


@pytest.fixture
def measurements(undisturbed: dict[str, Any]) -> pd.DataFrame:
    return pd.read_csv(undisturbed["path"] / "measurements.csv")


def test_every_measurement_has_a_row(undisturbed: dict[str, Any], measurements: pd.DataFrame) -> None:
    assert tuple(measurements.columns) == MEASUREMENTS_COLUMNS
    assert list(measurements["measurement"]) == list(range(1, 10))
    assert list(measurements["epochs"]) == [1] * 6 + [2] * 3
    assert list(measurements["layers"]) == [5] * 6 + [8] * 3
    lines = [line.metrics for line in RunDir(undisturbed["path"]).metrics()]
    finished = [m for m in lines if "measured/epochs" in m]
    assert list(measurements["loss"]) == [m["valid/loss"] for m in finished]
    assert list(measurements["top1"]) == [m["valid/top1"] for m in finished]
    for row in measurements.itertuples():
        genotype = SPACE.parse(row.architecture)
        assert genotype is not None
        kept = architecture(SPACE, SPACE.supports(genotype))
        assert " ".join(map(str, kept)) == row.candidates
    assert measurements["predicted"].isna().tolist() == [True, True] + [False] * 7
    assert (measurements["deviation"].dropna() > 0).all()


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ("[[4, 1], [2, 1, 2]]", "search.stages: networks of 2 layers; use at least 3 layers"),
        ("[[4, 1], [2, 1, 6]]", "search.stages: 6 is not 3 N + 2, the layers of a network"),
        ("[[1, 1], [2, 2]]", "search.stages: the first of 2 stages has 1 measurement; give it 2 or more"),
        (
            "[[15626, 1]]",
            "search.stages: 15626 measurements of 1 epoch of 5 layers, and the space has 15625 archit",
        ),
        ("[[4, 1, 5, 5]]", "search.stages.0: [4, 1, 5, 5] is invalid: list should have at most 3 items"),
    ],
)
def test_stages_that_cannot_be_measured_leave_no_run(
    stages: str,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["search", *SETTINGS, "--set", f"search.stages={stages}"]) != 0
    assert says in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("runs/*"))


def test_every_candidate_has_an_effect(undisturbed: dict[str, Any]) -> None:
    effects = pd.read_csv(undisturbed["path"] / "effects.csv", keep_default_na=False)
    assert tuple(effects.columns) == EFFECTS_COLUMNS
    assert list(effects["candidate"]) == list(range(layout(SPACE).n_candidates))
    assert list(effects["op"]) == [op for d in SPACE.all_decisions() for op, _ in d.candidates]
    genotype = Genotype.from_dict(undisturbed["genotype"])
    assert tuple(np.flatnonzero(effects["kept"])) == architecture(SPACE, SPACE.supports(genotype))
    assert ((effects["low"] <= effects["mean"]) & (effects["mean"] <= effects["high"])).all()
    each = effects.groupby("node")
    np.testing.assert_allclose(each["mean"].sum(), 0, atol=1e-4)
    np.testing.assert_allclose(each["probability"].sum(), 1, atol=1e-5)


def test_the_user_reads_how_certain_the_choices_are(undisturbed: dict[str, Any]) -> None:
    effects, shown = undisturbed["effects"], " ".join(undisturbed["shown"].split())
    assert effects["measurements"] == 9
    assert effects["choices"] == len(effects["choice_probabilities"]) == 6
    certain = f"{effects['certain']} of 6 choices certain (at least 95 %)"
    assert f"9 measurements: {certain}, {effects['toss_ups']} toss-up" in shown
    assert f"expected improvement by further measurements: {effects['expected_improvement']:.2f}" in shown
    assert "validation top-1" not in shown
    assert len(effects["next"]) == 5
    description = RunDir(undisturbed["path"]).read().description
    assert description.startswith(
        f"{effects['certain']} of 6 choices certain: measured search on digits, 12 epochs."
    )
    assert "alpha half" not in description
    assert f"- 9 measurements: {certain}" in description


def test_mlflow_has_the_tables_and_no_validation_accuracy_of_the_result(
    undisturbed: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = open_client(f"sqlite:///{undisturbed['folder']}/mlflow.db")
    names = {file.path for file in client.list_artifacts(undisturbed["mlflow_run_id"])}
    assert {"measurements.csv", "effects.csv"} <= names
    monkeypatch.chdir(undisturbed["folder"])
    assert run(["results", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert row["valid_top1"] is None
    found = read_run(
        undisturbed["run_dir"], runs_dir=Path("runs"), tracking_uri=None, scratch=Path("scratch")
    )
    assert found.last("valid/top1") is not None  # that of the architecture that was measured last
    assert compared_figures(found, None, None)["valid_top1"] is None
    assert row["params"] == undisturbed["params"]


def test_a_killed_search_has_the_same_tables_in_the_end(
    undisturbed: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process is killed in the last stage, whose measurements take two epochs."""
    monkeypatch.chdir(tmp_path)
    command = ["search", "--json", *SETTINGS, "--set", "tracking.enabled=false"]
    program = [sys.executable, "-m", "pipeline.cli", *command]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as killed:
        assert killed.stderr is not None
        assert any(line.startswith("epoch 7:") for line in killed.stderr)
        killed.kill()
    assert killed.returncode == -signal.SIGKILL
    path = tmp_path / undisturbed["run_dir"]
    assert 7 <= len((path / "measurements.csv").read_text().splitlines()) < 10
    assert not (path / "effects.csv").exists()
    assert run(command) == 0
    out, shown = capsys.readouterr()
    assert "resumed after epoch" in shown
    assert warnings_in(shown) == []
    assert json.loads(out.splitlines()[-1])["effects"] == undisturbed["effects"]
    for name in TABLES:
        assert (path / name).read_bytes() == (undisturbed["path"] / name).read_bytes(), name


@pytest.mark.parametrize("damage", [cut, one_wrong_digit, Path.unlink])
def test_damaged_measurements_of_a_finished_search_are_restored(
    undisturbed: dict[str, Any],
    damage: Callable[[Path], object],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(undisturbed["folder"])
    file = undisturbed["path"] / "measurements.csv"
    before = file.read_bytes()
    damage(file)
    assert run(["search", *SETTINGS]) == 0
    seen = " ".join(capsys.readouterr().out.split())
    assert "measurements.csv: damaged: restored from the epoch log" in seen
    assert file.read_bytes() == before


def test_a_diverged_training_has_an_infinite_loss(undisturbed: dict[str, Any]) -> None:
    folder = undisturbed["path"] / "checkpoints"
    *_, last = read_records(folder, load_progress(folder))
    only = {name: value for name, value in last.metrics.items() if name.startswith("measured/")}
    diverged = dataclasses.replace(last, metrics=only)
    measured = measurement_of(diverged, SPACE)
    assert measured is not None
    assert (measured.loss, measured.top1, measured.fidelity) == (math.inf, 0.0, (8, 2))
    ((number, _, _, epochs, layers, loss, top1, *_),) = measurement_rows(diverged, SPACE)
    assert (number, epochs, layers, str(loss), top1) == (9, 2, 8, "inf", 0.0)
    unfinished = dataclasses.replace(last, metrics={"train/loss": 2.0, "measured/count": 8.0})
    assert measurement_of(unfinished, SPACE) is None
    assert list(measurement_rows(unfinished, SPACE)) == []
