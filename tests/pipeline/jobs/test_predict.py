"""Predictions of pictures: as accurate as the recorded test accuracy, from every form of the network."""

import base64
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pandas as pd
import pytest
import requests
import safetensors.torch
import torch
from PIL import Image

from istanas.data import ArrayPictures, load_dataset
from istanas.errors import CheckpointError, DataError, IstanasError
from pipeline.cli.commands import run
from pipeline.jobs.export import export_network
from pipeline.jobs.quantization import Int8Plan, LabelledPictures
from pipeline.runs.directory import RunDir
from pipeline.runs.predictor import open_predictor
from pipeline.tracking.picture_model import PictureModel, predictor_of
from pipeline.tracking.store import open_client
from tests.ports import free_ports

SETTINGS = """
space: {nodes: 2}
retrain: {epochs: 2, batch_size: 128, init_channels: 4, layers: 2, auxiliary_weight: 0, cutout: 0, lr: 0.1}
runtime: {threads: 1, device: cpu}
"""

Command = Callable[..., tuple[int, str, str]]


class Project(NamedTuple):
    """A folder with a retraining of the digits, which is tracked in MLflow, and its test pictures as PNG files."""

    folder: Path
    result: dict[str, Any]
    files: list[str]
    labels: list[str]

    @property
    def run(self) -> Path:
        return self.folder / self.result["run_dir"]

    def accuracy(self, classes: list[str]) -> float:
        return float(np.mean([a == b for a, b in zip(classes, self.labels, strict=True)]))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, blank_database: Path) -> Project:
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(blank_database, folder / "mlflow.db")
    (folder / "tiny.yaml").write_text(SETTINGS)
    digits = load_dataset("digits").test
    assert isinstance(digits, ArrayPictures)
    for index, image in enumerate(digits.images.numpy()):
        place = folder / "pictures" / f"part{index % 2}" / f"{index:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(place)
    files = sorted((folder / "pictures").rglob("*.png"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        out, err = io.StringIO(), io.StringIO()
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        assert run(["retrain", "--genotype", "random:0", "--config", "tiny.yaml", "--json"]) == 0
    assert "Operation with range is deprecated" not in err.getvalue(), "pandas about MLflow"
    result = json.loads(out.getvalue().splitlines()[-1])
    return Project(
        folder, result, list(map(str, files)), [str(int(digits.labels[int(f.stem)])) for f in files]
    )


@pytest.fixture
def istanas(project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.chdir(project.folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def command(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return command


def test_predictions_have_exactly_the_recorded_accuracy(project: Project, istanas: Command) -> None:
    assert 0.3 < project.result["test_top1"] < 1
    code, out, _ = istanas("predict", str(project.run), "pictures", "--json")
    assert code == 0
    found = json.loads(out)
    assert [str(project.folder / each["file"]) for each in found["predictions"]] == project.files
    assert project.accuracy([each["class"] for each in found["predictions"]]) == project.result["test_top1"]
    first = found["predictions"][0]
    assert len(first["top5"]) == 5
    assert (first["class"], first["probability"]) == (*first["top5"][0].values(),)
    values = [guess["probability"] for guess in first["top5"]]
    assert values == sorted(values, reverse=True)
    assert 0.5 < sum(values) <= 1


def test_every_form_of_the_network_predicts_the_same(project: Project, istanas: Command) -> None:
    assert istanas("export", str(project.run))[0] == 0
    files = project.files[:40]
    expected = json.loads(istanas("predict", str(project.run), *files, "--json")[1])["predictions"]
    for reference in (
        project.run.name,
        f"{project.run}/export",
        f"{project.run}/export/model.onnx",
        f"{project.run}/export/model.safetensors",
        "models:/istanas-digits@candidate",
        "models:/istanas-digits/1",
    ):
        code, out, err = istanas("predict", reference, *files, "--json")
        assert code == 0, (reference, err)
        predictions = json.loads(out)["predictions"]
        assert [each["class"] for each in predictions] == [each["class"] for each in expected], reference
        for one, two in zip(predictions, expected, strict=True):
            assert one["probability"] == pytest.approx(two["probability"], abs=1e-5)


def test_a_broken_file_is_one_line_and_the_others_are_predicted(project: Project, istanas: Command) -> None:
    broken, large = project.folder / "broken.png", project.folder / "large.png"
    broken.write_bytes(Path(project.files[0]).read_bytes()[:60])
    Image.new("L", (9, 8)).save(large)
    files = [project.files[0], "absent.png", str(broken), str(large), project.files[1]]
    code, out, err = istanas("predict", str(project.run), *files, "--csv", "-")
    assert code == 1
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["file"] for row in rows] == project.files[:2]
    assert rows[0].keys() >= {"file", "class", "probability", "class_5", "probability_5"}
    lines = err.splitlines()
    assert [line.startswith("error: ") for line in lines] == [True, True, True, False]
    for line, words in zip(
        lines, ("error: absent.png does not exist", "broken.png", "has 9x8 pixels"), strict=False
    ):
        assert words in line
    assert lines[-1] == "3 of 5 files could not be used"


def test_links_in_a_folder_are_followed_but_not_out_of_it(
    project: Project, istanas: Command, tmp_path: Path
) -> None:
    for name in ("real/0.png", "real/1.png", "2.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(project.files[0], tmp_path / "in" / name)
    (tmp_path / "in" / "real" / "up").symlink_to("..")  # a cycle
    (tmp_path / "in" / "linked.png").symlink_to("real/0.png")
    (tmp_path / "in" / "again").symlink_to("real")
    code, out, err = istanas("predict", str(project.run), str(tmp_path / "in"), "--json")
    assert code == 0, err
    found = [Path(each["file"]).relative_to(tmp_path / "in") for each in json.loads(out)["predictions"]]
    assert list(map(str, found)) == ["2.png", "linked.png", "again/0.png", "again/1.png"]
    (tmp_path / "in" / "out").symlink_to(project.folder / "pictures")
    code, out, err = istanas("predict", str(project.run), str(tmp_path / "in"))
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert err.startswith("error: FILE: ")
    assert "in/out is a link that leads out of the folder, to " in err
    assert err.endswith("; put a copy in its place, or name a folder that contains both\n")


def test_the_table_has_a_row_for_each_file(project: Project, istanas: Command) -> None:
    code, out, err = istanas("predict", str(project.run), *project.files[:2])
    assert (code, err) == (0, "")
    assert all(file in out for file in project.files[:2])
    code, out, _ = istanas("predict", str(project.run), "pictures", "--csv", "all.csv")
    assert code == 0
    assert out.split() == ["359", "rows:", "all.csv"]
    assert len(pd.read_csv(project.folder / "all.csv")) == 359


@pytest.mark.parametrize(
    ("reference", "files", "says"),
    [
        ("models:/istanas-digits@best", ["x.png"], "not in the MLflow store"),
        ("models:/nothing/1", ["x.png"], "not in the MLflow store"),
        ("{run}", ["empty"], "empty contains no picture"),
    ],
)
def test_a_bad_reference_or_an_empty_folder_is_one_line(
    reference: str, files: list[str], says: str, project: Project, istanas: Command
) -> None:
    (project.folder / "empty").mkdir(exist_ok=True)
    code, out, err = istanas("predict", reference.format(run=project.run), *files)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert says in err


# ---------- 8-bit integers


def test_an_8_bit_network_is_exported_predicts_and_is_evaluated(project: Project, istanas: Command) -> None:
    code, out, err = istanas("export", str(project.run), "--precision", "int8", "--json")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    figures, file = result["int8"], project.folder / result["run_dir"] / result["exports"]["int8"]["file"]
    before, after = figures["fp32"], figures["int8"]
    assert (before["top1"], figures["pictures"]) == (project.result["test_top1"], 359)
    assert figures["measured"] == "the test split of digits"
    assert (figures["calibration_pictures"], figures["tolerance"]) == (256, 1.0)
    assert before["top1"] - after["top1"] <= 0.01
    assert (after["bytes"], file.name) == (file.stat().st_size, "model.int8.onnx")
    assert min(before["latency_ms"], after["latency_ms"]) > 0
    assert f"top-1 {100 * before['top1']:.2f} -> {100 * after['top1']:.2f} %" in err
    weights = {each.data_type for each in onnx.load(file).graph.initializer if len(each.dims) == 4}
    assert weights == {onnx.TensorProto.INT8}

    client = open_client(f"sqlite:///{project.folder}/mlflow.db")
    run = client.get_run(project.result["mlflow_run_id"])
    assert run.data.metrics["export/int8_top1"] == after["top1"]
    assert run.data.metrics["export/fp32_latency_ms"] == before["latency_ms"]
    sent = {each.path for each in client.list_artifacts(run.info.run_id, "export")}
    assert {"export/model.int8.onnx", "export/int8.json"} <= sent

    code, out, _ = istanas("predict", str(file), "pictures", "--json")
    assert code == 0
    classes = [each["class"] for each in json.loads(out)["predictions"]]
    # In batches of other pictures, rounding may change single predictions.
    assert project.accuracy(classes) == pytest.approx(after["top1"], abs=2 / 359)
    for picture, label in zip(project.files, project.labels, strict=True):
        place = project.folder / "classes" / label / Path(picture).name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, place)
    code, out, _ = istanas("evaluate", str(file), "--data", "classes", "--out", "of_int8", "--json")
    assert json.loads(out.splitlines()[-1])["evaluation"]["top1"]["estimate"] == pytest.approx(
        after["top1"], abs=2 / 359
    )


def test_an_inaccurate_8_bit_network_leaves_nothing(project: Project, istanas: Command) -> None:
    """It is calibrated with black pictures, so that most activations are outside the range of its numbers."""
    assert istanas("export", str(project.run))[0] == 0
    before = {path: path.read_bytes() for path in (project.run / "export").iterdir()}
    assert not any("int8" in path.name for path in before), "those of another export are gone"
    steps, test = open_predictor(project.run).preprocessing, load_dataset("digits").test
    assert isinstance(test, ArrayPictures)
    black = ArrayPictures(torch.zeros_like(test.images), test.labels)
    plan = Int8Plan(
        steps,
        LabelledPictures("black pictures", black, torch.arange(8)),
        LabelledPictures("the test split", test, torch.arange(len(test))),
        tolerance=2.0,
    )
    line = (
        r"--precision int8: top-1 accuracy on the test split falls from \S+ to \S+ %, by more than the tolerance of "
        r"2 points; accept it with a larger --tolerance, or export without --precision int8"
    )
    with pytest.raises(IstanasError, match=f"^{line}$"):
        export_network(RunDir(project.run), int8=plan)
    assert {path: path.read_bytes() for path in (project.run / "export").iterdir()} == before
    assert "int8" not in (project.run / "run.json").read_text()
    code, _, err = istanas("export", str(project.run), "--tolerance", "2")
    assert (code, "--tolerance: only --precision int8 changes the accuracy" in err) == (2, True)
    for tolerance in ("-1", "inf", "nan"):
        code, out, err = istanas(
            "export", str(project.run), "--precision", "int8", "--tolerance", tolerance, "--json"
        )
        lines = err.splitlines()
        assert (code, out, len(lines)) == (2, "", 1), err
        assert "tolerance" in lines[0]


# ---------- evaluations


def test_the_report_has_the_evaluation_of_the_test_split(project: Project) -> None:
    figures = json.loads((project.run / "evaluation.json").read_text())
    assert figures["top1"]["estimate"] == project.result["test_top1"]
    assert figures["pictures"] == 359
    assert Image.open(project.run / "mistakes.png").size == (712, 716)
    page = (project.run / "report.html").read_text()
    assert 'id="evaluation"' in page
    assert f"{100 * figures['top1']['low']:.2f} to {100 * figures['top1']['high']:.2f}" in page
    client = open_client(f"sqlite:///{project.folder}/mlflow.db")
    sent = {each.path for each in client.list_artifacts(project.result["mlflow_run_id"])}
    assert {"evaluation.json", "mistakes.png"} <= sent


def test_a_run_is_evaluated_again_with_the_same_figures(project: Project, istanas: Command) -> None:
    before = json.loads((project.run / "evaluation.json").read_text())
    for name in ("evaluation.json", "mistakes.png", "report.html"):
        (project.run / name).unlink()
    code, out, err = istanas("evaluate", str(project.run), "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["evaluation"] == before
    assert json.loads((project.run / "evaluation.json").read_text()) == before
    assert "confusion matrix, predicted classes in columns:" in err
    assert 'id="evaluation"' in (project.run / "report.html").read_text()


def test_an_evaluation_writes_the_predictions_of_all_pictures(project: Project, istanas: Command) -> None:
    figures = json.loads((project.run / "evaluation.json").read_text())
    code, out, _ = istanas("evaluate", str(project.run), "--csv", "all.csv", "--json")
    assert code == 0
    assert "predictions" not in json.loads(out.splitlines()[-1])
    table = pd.read_csv("all.csv", dtype={"true": str, "predicted": str})
    assert table["picture"].tolist() == [f"test picture {i}" for i in range(figures["pictures"])]
    confusion = pd.crosstab(table["true"], table["predicted"]).to_numpy().tolist()
    assert confusion == figures["confusion"]
    wrong = table[table["true"] != table["predicted"]].sort_values("true_probability", kind="stable")
    assert wrong["picture"].tolist()[:20] == [each["picture"] for each in figures["mistakes"]]
    _, printed, _ = istanas("evaluate", str(project.run), "--csv", "-")
    assert printed == Path("all.csv").read_text()
    for arguments, problem in (
        (("--csv", "-", "--json"), "--csv -: --json writes to stdout, too"),
        (("--csv", "."), "a folder; name a file"),
    ):
        code, _, err = istanas("evaluate", str(project.run), *arguments)
        assert (code, problem in err) == (2, True), err


def test_other_pictures_are_evaluated_with_their_labels(project: Project, istanas: Command) -> None:
    for file, label in zip(project.files, project.labels, strict=True):
        place = project.folder / "labelled" / "test" / label / Path(file).name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    code, out, err = istanas("evaluate", f"{project.run}/model.safetensors", "--data", "labelled", "--json")
    assert (code, err.count("error:")) == (0, 0)
    figures = json.loads(out.splitlines()[-1])["evaluation"]
    recorded = json.loads((project.run / "evaluation.json").read_text())
    assert figures["top1"] == recorded["top1"]
    assert figures["confusion"] == recorded["confusion"]
    assert 'id="evaluation"' in (project.folder / "evaluation" / "evaluation.html").read_text()
    within = project.folder / "labelled" / "test" / "1" / "rejected"
    within.mkdir()
    shutil.copy(project.files[0], within)  # a training leaves it out
    (project.folder / "labelled" / "test" / "0" / "a.png").write_bytes(b"")
    code, out, err = istanas("evaluate", str(project.run), "--data", "labelled", "--out", "two")
    assert code == 1
    assert "a.png is not a readable picture (the file is empty" in err
    assert f"{figures['pictures']}" in out
    assert "left out: 1 file in sub-folders, such as " in out
    (project.folder / "labelled" / "test" / "ten").mkdir()
    code, _, err = istanas("evaluate", str(project.run), "--data", "labelled", "--out", "three")
    assert code == 2
    assert "ten is not a class of the network (0, 1, 2" in err


# ---------- MLflow


@pytest.fixture(scope="module")
def model_folder(project: Project) -> str:
    """The folder of the registered model."""
    client = open_client(f"sqlite:///{project.folder}/mlflow.db")
    source = client.get_model_version_download_uri("istanas-digits", "1")
    return source.removeprefix("file://")


def test_the_mlflow_model_takes_pictures(project: Project, model_folder: str) -> None:
    import mlflow

    model = mlflow.pyfunc.load_model(model_folder)
    contents = [Path(file).read_bytes() for file in project.files]
    found = model.predict(pd.DataFrame({"picture": contents}))
    assert project.accuracy(found["class"].tolist()) == project.result["test_top1"]
    assert set(found["probabilities"][0]) == set("0123456789")
    assert found["probabilities"][0][found["class"][0]] == found["probability"][0]
    arrays = [np.asarray(Image.open(file)) for file in project.files]
    for pictures in (
        arrays,
        [array[..., None] for array in arrays],
        [array.tolist() for array in arrays],
        [base64.b64encode(content).decode() for content in contents],
    ):
        assert model.predict(pd.DataFrame({"picture": pictures})).equals(found)
    with pytest.raises(DataError, match="picture 1: it is neither base64 nor an array"):
        model.predict(pd.DataFrame({"picture": [contents[0], "no picture"]}))
    steps = model.metadata.metadata["preprocessing"]
    assert (steps["shape"], steps["channel_order"]) == ([1, 8, 8], "grey")


def test_a_table_without_rows_and_an_index_are_kept(project: Project, model_folder: str) -> None:
    import mlflow

    text = base64.encodebytes(Path(project.files[0]).read_bytes()).decode()  # in lines, as programs write it
    # MLflow before 3.17 replaces the index, so the model is called directly.
    found = PictureModel(open_predictor(project.run)).predict(pd.DataFrame({"picture": [text]}, index=[7]))
    assert found.index.tolist() == [7]
    model = mlflow.pyfunc.load_model(model_folder)
    assert len(model.predict(pd.DataFrame({"picture": []}))) == 0


def changed_onnx(file: Path, **changes: str) -> None:
    """Change the metadata of an ONNX file."""
    model = onnx.load(file)
    metadata = {each.key: each.value for each in model.metadata_props} | changes
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, file)


def test_metadata_that_contradict_the_network_are_one_line(
    project: Project, istanas: Command, tmp_path: Path
) -> None:
    assert istanas("export", str(project.run))[0] == 0
    for number, changes in enumerate(
        ({"class_names": '["a", "b"]'}, {"preprocessing": '{"shape": [1, 16, 16]}'})
    ):
        file = tmp_path / f"{number}.onnx"
        shutil.copy(project.run / "export" / "model.onnx", file)
        changed_onnx(file, **changes)
        code, _, err = istanas("predict", str(file), project.files[0])
        assert (code, len(err.splitlines())) == (1, 1), err
        assert "is not a network with its preprocessing" in err


def test_another_file_of_weights_is_not_taken_for_the_network(
    project: Project, istanas: Command, tmp_path: Path
) -> None:
    """network.json beside it belongs to model.safetensors."""
    for name in ("network.json", "model.safetensors"):
        shutil.copy(project.run / name, tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "other.safetensors")
    assert istanas("predict", str(tmp_path / "model.safetensors"), project.files[0])[0] == 0
    code, _, err = istanas("predict", str(tmp_path / "other.safetensors"), project.files[0])
    assert (code, len(err.splitlines())) == (2, 1), err


def test_a_network_that_computes_nan_is_refused(project: Project, istanas: Command, tmp_path: Path) -> None:
    weights = safetensors.torch.load_file(project.run / "model.safetensors")
    last = next(name for name in reversed(weights) if name.endswith("bias"))
    safetensors.torch.save_file(
        {**weights, last: weights[last] * float("nan")}, tmp_path / "model.safetensors"
    )
    shutil.copy(project.run / "network.json", tmp_path)
    code, _, err = istanas("predict", str(tmp_path), project.files[0])
    assert code == 1
    assert "the network computes NaN or infinite values" in err


def test_the_program_of_a_registered_model_is_not_loaded(
    project: Project, model_folder: str, tmp_path: Path
) -> None:
    """Because a file of torch.export may contain pickled code, and the store may be another machine's."""
    network = shutil.copytree(Path(model_folder) / "data" / "network", tmp_path / "network")
    picture = predictor_of(network).preprocessing.read(project.files[0])[None]
    expected = predictor_of(network).probabilities(picture)
    (network / "model.pt2").write_bytes(b"no archive")
    assert torch.equal(predictor_of(network).probabilities(picture), expected)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a model with its preprocessing"):
        predictor_of(tmp_path)


@pytest.mark.slow
def test_a_real_server_classifies_a_png(project: Project, model_folder: str, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    command = [
        *(sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", model_folder),
        *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
    ]
    # MLflow finds uvicorn in the PATH, as in an activated environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=tmp_path, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 240
        while not _answers(f"http://127.0.0.1:{port}/ping"):
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.3)
        pictures = [base64.b64encode(Path(file).read_bytes()).decode() for file in project.files[:20]]
        body = {"dataframe_split": {"columns": ["picture"], "data": [[each] for each in pictures]}}
        answer = requests.post(f"http://127.0.0.1:{port}/invocations", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)  # the command has started a server of its own
        server.wait(30)
    predictor = open_predictor(project.run)
    read = [predictor.preprocessing.read(file) for file in project.files[:20]]
    expected = predictor.guesses(predictor.probabilities(torch.stack(read)), 1)
    rows = answer.json()["predictions"]
    assert [row["class"] for row in rows] == [guess.name for (guess,) in expected]
    probabilities = [row["probabilities"][row["class"]] for row in rows]
    assert probabilities == pytest.approx([guess.probability for (guess,) in expected], abs=1e-5)


def _answers(address: str) -> bool:
    try:
        return requests.get(address, timeout=2).status_code == 200
    except requests.ConnectionError:
        return False
