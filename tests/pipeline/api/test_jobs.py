"""The Python API: the runs of the commands, typed results, event loops, interrupts and errors in one line."""

import _thread
import asyncio
import doctest
import inspect
import json
import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline
from istanas.data import ArrayPictures, load_dataset
from istanas.errors import ConfigError, DataError
from istanas.space import Genotype
from pipeline.cli.commands import run as command_line

TINY = """
data: {name: digits, holdout: 0.8}
space: {nodes: 1, ops: [skip_connect, max_pool_3x3]}
search: {epochs: 3, batch_size: 64, init_channels: 2, layers: 3, max_pictures: 128}
retrain: {epochs: 2, batch_size: 64, init_channels: 2, layers: 2, auxiliary_weight: 0, cutout: 0}
runtime: {threads: 1, device: cpu}
tracking: {enabled: false}
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with a configuration file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("python"))
        Path("digits.yaml").write_text(TINY)
        yield Path()


@pytest.fixture(scope="module")
def trained() -> "pipeline.FinishedRun[Any]":
    async def main() -> "pipeline.FinishedRun[Any]":
        return pipeline.run("digits.yaml", quiet=True, seed=1)

    return asyncio.run(main())  # a notebook calls it inside a running event loop, too


def test_the_retraining_with_its_search_network_and_epochs(trained: "pipeline.FinishedRun[Any]") -> None:
    search = trained.parent
    assert search is not None
    assert (trained.kind, search.kind, search.parent) == ("retrain", "search", None)
    assert trained.genotype == search.genotype == Genotype.from_dict(trained.result["genotype"])
    assert (trained.config.seed, trained.config.retrain.epochs) == (1, 2)
    assert search.history["epoch"].tolist() == [1, 2, 3]
    assert trained.history["test/top1"].iloc[-1] == trained.result["test_top1"]
    assert trained.class_names == tuple("0123456789")
    assert trained.network is trained.network
    assert not trained.network.training
    assert trained.network(torch.zeros(2, *trained.preprocessing.shape)).shape == (2, 10)


def test_a_command_and_a_call_have_the_same_run(
    trained: "pipeline.FinishedRun[Any]", capsys: pytest.CaptureFixture[str]
) -> None:
    assert capsys.readouterr() == ("", ""), "quiet"
    assert command_line(["run", "--config", "digits.yaml", "--set", "seed=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == trained.result
    found = pipeline.search("digits.yaml", seed=1)
    assert f"search: already finished, see {found.path.relative_to(Path.cwd())}" in capsys.readouterr().out
    again = pipeline.retrain(found, "digits.yaml", quiet=True, seed=1)
    assert again.path == trained.path
    assert pipeline.load(again.reference).result == pipeline.load(again.path.name).result == again.result


def test_a_finished_run_is_printed_on_a_short_line(
    trained: "pipeline.FinishedRun[Any]", tmp_path: Path
) -> None:
    place, top1 = f"runs/{trained.path.name}", trained.result["test_top1"]
    expected = f"FinishedRun(name='digits-retrain', kind='retrain', path='{place}', test_top1={top1:.4f})"
    assert repr(trained) == str(trained) == expected
    assert len(expected) < 110
    assert repr(pipeline.FinishedRun(tmp_path / "gone", {})) == f"FinishedRun(path='{tmp_path}/gone')"


def test_a_finished_run_does_not_depend_on_the_working_directory(
    trained: "pipeline.FinishedRun[Any]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained.history
    monkeypatch.chdir(tmp_path)
    assert trained.history.equals(expected)
    assert trained.network is not None


def test_settings_may_be_sections_lists_paths_and_none(folder: Path) -> None:
    found = pipeline.search(
        folder / "digits.yaml",
        quiet=True,
        search={"epochs": 1, "batch_size": 64, "init_channels": 2, "layers": 3, "max_pictures": 128},
        **{
            "space.ops": ["max_pool_3x3", "avg_pool_3x3"],
            "tracking.name": None,
            "runtime.runs_dir": Path("elsewhere #1"),
        },
    )
    assert found.path.parent == Path("elsewhere #1").absolute()
    assert found.config.search.max_epochs == 1
    assert found.config.space.ops == ["max_pool_3x3", "avg_pool_3x3"]


def test_predictions_are_those_of_the_network(trained: "pipeline.FinishedRun[Any]", folder: Path) -> None:
    pixels = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8)
    Image.fromarray(pixels[0].numpy()).save(folder / "picture.png")
    (found,) = pipeline.predict(trained, folder / "picture.png")
    with torch.no_grad():
        logits = trained.network(trained.preprocessing.normalized(pixels[None]))
    assert found["class"] == trained.class_names[int(logits.argmax())]
    assert found["probability"] == pytest.approx(float(logits.softmax(1).max()), abs=1e-6)
    assert pipeline.predict(trained.path.name, "picture.png") == [found]
    (folder / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text\.png"):
        pipeline.predict(trained, "picture.png", "text.png")


def test_exported_files_are_on_disk(trained: "pipeline.FinishedRun[Any]") -> None:
    files = pipeline.export(trained, quiet=True)
    assert set(files) == {"safetensors", "program", "onnx"}
    assert all(file.stat().st_size > 0 for file in files.values())
    assert pipeline.export(trained.path, quiet=True) == files
    for tolerance in (-1.0, math.inf, math.nan):
        line = f"^tolerance: {tolerance} is not a loss of accuracy in percentage points; use 0 to 100$"
        with pytest.raises(ConfigError, match=line):
            pipeline.export(trained, precision="int8", tolerance=tolerance)
    with pytest.raises(
        ConfigError, match=r'^tolerance: 0\.5 has no effect, .*; leave it out, or set precision="int8"$'
    ):
        pipeline.export(trained, tolerance=0.5)


def test_an_evaluation_has_the_figures_of_the_command(
    trained: "pipeline.FinishedRun[Any]", folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = pipeline.evaluate(trained, predictions=True, quiet=True)
    correct = [each["true"] == each["predicted"] for each in own["predictions"]]
    assert sum(correct) / len(correct) == trained.result["test_top1"]
    assert own["evaluation"]["top1"]["estimate"] == trained.result["test_top1"]
    assert all(Path(file).exists() for file in own["files"])
    assert capsys.readouterr().out == ""

    test = load_dataset("digits").test
    assert isinstance(test, ArrayPictures)
    for index in range(60):
        place = folder / "labelled" / str(int(test.labels[index])) / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(test.images[index, 0].numpy()).save(place)
    elsewhere = Path("elsewhere") / trained.path.name
    shutil.copytree(trained.path, elsewhere)
    runs: dict[str, Any] = {"runtime.runs_dir": "elsewhere", "tracking.enabled": False}
    found = pipeline.evaluate(trained.path.name, "labelled", out="figures", quiet=True, **runs)
    command = ["evaluate", str(trained.path), "--data", "labelled", "--out", "of_command", "--json"]
    assert command_line(command) == 0
    assert json.loads(capsys.readouterr().out)["evaluation"] == found["evaluation"]
    assert found["network"] == str(elsewhere), "the setting decides where the name is looked up"
    (one,) = pipeline.predict(trained.path.name, place, **runs)
    assert one["class"] in trained.class_names

    (folder / "labelled" / "0" / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text\.png"):
        pipeline.evaluate(trained, "labelled", quiet=True)


@pytest.mark.parametrize("name", [name for name in pipeline.__all__ if name != "sweep"])  # which starts Ray
def test_the_example_of_each_name_runs(name: str, trained: "pipeline.FinishedRun[Any]", folder: Path) -> None:
    """They are marked as skipped, because only this folder has their files."""
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("picture.png")
    text = inspect.getdoc(getattr(pipeline, name))
    assert text is not None
    assert "# doctest: +SKIP" in text, "there is an example"
    namespace = {"pipeline": pipeline, name: getattr(pipeline, name)}
    example = doctest.DocTestParser().get_doctest(text.replace("+SKIP", ""), namespace, name, None, None)
    lines: list[str] = []
    found = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=lines.append)
    assert found.failed == 0, "".join(lines)


def interrupt_after_an_epoch(run_dirs: str) -> None:
    """Interrupt the main thread, as Ctrl-C does, when a run has written its first epoch."""
    while not any(Path().glob(f"{run_dirs}/metrics.jsonl")):
        time.sleep(0.01)
    _thread.interrupt_main()


def test_an_interrupted_call_is_resumed_by_the_same_call() -> None:
    settings: dict[str, Any] = {"seed": 4, "search.epochs": 60, "runtime.runs_dir": "interrupted"}
    thread = threading.Thread(target=interrupt_after_an_epoch, args=["interrupted/*"])
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        pipeline.search("digits.yaml", quiet=True, **settings)
    thread.join(timeout=60)
    (run_dir,) = Path("interrupted").iterdir()
    with pytest.raises(ConfigError, match="is INTERRUPTED; wait until it has finished, or resume it"):
        pipeline.load(run_dir)
    found = pipeline.search("digits.yaml", quiet=True, **settings)
    assert found.path.name == run_dir.name
    assert found.history["epoch"].tolist() == list(range(1, 61))


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: pipeline.search("no.yaml"), r"no\.yaml: cannot be read"),
        (
            lambda: pipeline.search("digits.yaml", sed=3),
            "^keyword argument 'sed=3': sed: unknown key; did you mean seed",
        ),
        (
            lambda: pipeline.search("digits.yaml", search={"epochs": 0}),
            r"^keyword argument 'search=.*: search\.epochs: 0 is",
        ),
        (
            lambda: pipeline.search("digits.yaml", method="one_stage"),
            "^keyword argument 'method=\"one_stage\"': digits.yaml sets ",
        ),
        (lambda: pipeline.search("digits.yaml", **{"search.lr": math.nan}), "search.lr: 'NaN' is invalid"),
        (
            lambda: pipeline.search("digits.yaml", seed=torch),
            "^seed: <module 'torch'.* cannot be written to a",
        ),
        (
            lambda: pipeline.retrain("no.json", "digits.yaml"),
            "^genotype 'no.json': no such file",
        ),
        (lambda: pipeline.load("no-run"), "run 'no-run': "),
        (lambda: pipeline.sweep("digits.yaml"), "^sweep: "),
        (lambda: pipeline.search("digits.yaml", plugins=["no.py"]), r"--plugin no\.py: "),
    ],
)
def test_a_wrong_call_is_one_line(call: Any, line: str) -> None:
    with pytest.raises(ConfigError, match=line) as error:
        call()
    assert len(str(error.value).splitlines()) == 1


def test_a_search_has_no_network(trained: "pipeline.FinishedRun[Any]") -> None:
    assert trained.parent is not None
    with pytest.raises(ConfigError, match="has no trained network; give its retraining"):
        _ = trained.parent.network


def test_workers_that_import_pipeline_do_not_load_the_jobs() -> None:
    line = "import sys, pipeline; sys.exit('torch' in sys.modules or not callable(pipeline.run))"
    assert subprocess.run([sys.executable, "-c", line], check=False).returncode == 0
