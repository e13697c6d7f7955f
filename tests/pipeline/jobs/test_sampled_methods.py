"""GDAS, random search with weight sharing and random architectures as a user runs them, on the digits."""

import json
from pathlib import Path
from typing import Any

import pytest

from istanas.space import CellSpace, Genotype
from pipeline.cli.commands import run
from pipeline.runs.directory import RunDir
from tests.pipeline.jobs.tiny_search import search

GDAS = "method=gdas"
RANDOM_NAS = "method=random_nas"
FEW = ("search.candidates=4", "search.candidate_pictures=40", "search.finalists=2")

TINY = """
space: {{nodes: 2}}
{more}
retrain: {{epochs: 1, batch_size: 64, init_channels: 4, layers: 3, auxiliary_weight: 0.0, cutout: 0}}
runtime: {{threads: 1, device: cpu}}
tracking: {{enabled: false}}
"""


def configured(folder: Path, method: str, more: str = "") -> str:
    file = folder / f"{method}.yaml"
    file.write_text(f"method: {method}\n{TINY.format(more=more)}")
    return str(file)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(("method", "more"), [(GDAS, ()), (RANDOM_NAS, FEW)])
def test_pages_of_a_search_without_codes_show_no_gap(
    method: str, more: tuple[str, ...], tmp_path: Path
) -> None:
    result, _ = search(tmp_path, method, *more, "search.epochs=1")
    page = (Path(result["run_dir"]) / "trajectory.html").read_text()
    assert "relative gap" not in page
    assert "sparse codes" not in page
    assert "earlier version" not in page
    assert ("Weights of the candidates" in page) == (method == GDAS)


def test_a_random_architecture_passes_through_the_same_job(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = configured(tmp_path, "random")
    found = printed(capsys, "search", "--config", config, "--set", "seed=3")
    assert Genotype.from_dict(found["genotype"]) == CellSpace(n_nodes=2).random(3)
    assert "valid_top1" not in found
    again = printed(capsys, "search", "--config", config, "--set", "seed=3")
    assert again == found
    retrained = printed(capsys, "run", "--config", config, "--set", "seed=3")
    assert (retrained["digest"], retrained["run_dir"]) == (found["digest"], found["run_dir"])
    assert 0 <= retrained["test_top1"] <= 1
    (line,) = RunDir(Path(found["run_dir"])).metrics()
    assert not [name for name in line.metrics if name.startswith(("train/", "valid/", "images"))]
    report = (Path(found["run_dir"]) / "report.html").read_text()
    assert "validation top-1" not in report
    assert 'id="h-curves"' not in report
    assert not [w for w in recwarn if "legend" in str(w.message)]


def test_it_is_the_cell_that_retrain_draws_for_this_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = configured(tmp_path, "random")
    found = printed(capsys, "search", "--config", config, "--set", "seed=11")
    retrained = printed(capsys, "retrain", "--genotype", "random:11", "--config", config)
    assert retrained["digest"] == found["digest"]


def test_a_sweep_by_validation_accuracy_needs_a_method_that_has_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = configured(tmp_path, "random", "sweep: {trials: 2, space: {seed: {int: [0, 9]}}}")
    assert run(["sweep", "--config", config]) == 2
    errors = capsys.readouterr().err
    assert "sweep.objective: method random measures no validation accuracy" in errors
    assert "set sweep.objective=retrained" in errors
    assert not (tmp_path / "runs").exists()


def test_profiling_a_method_without_steps_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["profile", "--config", configured(tmp_path, "random")]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith("error: method: random trains nothing")
