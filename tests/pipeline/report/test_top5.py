"""Top-5 is measured and shown with more than 10 classes only: in the lines of epochs, tables and pages."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from istanas.data import ArrayPictures, load_dataset, normalize
from istanas.training import Metrics
from pipeline.cli.commands import run as command_line
from pipeline.jobs.progress import EpochBar
from pipeline.report import epochs_frame, results_frame, searches_frame
from pipeline.report.run_page import write_report
from pipeline.report.terminal import results_table
from pipeline.runs.directory import RunDir
from pipeline.runs.network_files import load_network
from pipeline.tracking.store import open_client
from tests.pipeline.report.pages import Page

pytestmark = pytest.mark.slow

TINY = """
space: {{nodes: 2}}
method: {method}
search: {{{search}, init_channels: 2, layers: 3, cutout: 0}}
retrain: {{epochs: 2, batch_size: 64, init_channels: 2, layers: 2, auxiliary_weight: 0, cutout: 0, test_every: 1}}
data: {data}
runtime: {{threads: 1, device: cpu, runs_dir: {folder}/runs}}
tracking: {{uri: "sqlite:///{folder}/mlflow.db", models: false}}
"""
TWO_STAGE = "epochs: 2, batch_size: 64, max_pictures: 60"
ONE_STAGE = "max_search_epochs: 1, train_epochs: 1, batch_size: 64, auxiliary_weight: 0, max_pictures: 60"
CLASSES = 12
NUMBER = r"([\d.]+) %"
TOPS = rf"{NUMBER}, top-5 {NUMBER}"


@dataclass(frozen=True)
class Job:
    """The output and the result of a command."""

    seen: str
    result: dict[str, Any]

    def run(self, key: str = "run_dir") -> RunDir:
        return RunDir(self.result[key])

    def metrics(self, key: str = "run_dir") -> list[dict[str, float]]:
        return [line.metrics for line in self.run(key).metrics()]


@dataclass(frozen=True)
class Jobs:
    """`many` and `single` (one-stage) use 12 classes, `few` uses the digits."""

    folder: Path
    many: Job
    single: Job
    few: Job

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"


def command(*arguments: str) -> tuple[str, str]:
    """Run a command line and return its stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert command_line(list(arguments)) == 0, err.getvalue()
    return out.getvalue(), err.getvalue()


def write_pictures(root: Path) -> None:
    """Write pictures of 12 classes that differ in brightness, so that neighbours are often confused."""
    for split, n in (("train", 8), ("test", 5)):
        for label in range(CLASSES):
            folder = root / split / f"class{label:02d}"
            folder.mkdir(parents=True)
            for number in range(n):
                picture = Image.new("L", (8, 8), 20 * label + number)
                picture.putpixel((number, label % 8), 255)
                picture.save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, blank_database: Path) -> Jobs:
    folder = tmp_path_factory.mktemp("classes")
    shutil.copy(blank_database, folder / "mlflow.db")
    write_pictures(folder / "pictures")
    pictures = f"{{name: folder, root: {folder}/pictures, cache_dir: {folder}/cache, holdout: 0.25}}"
    digits = "{name: digits, holdout: 0.1}"
    done = {}
    for name, job, method, search, data in (
        ("many", "run", "two_stage", TWO_STAGE, pictures),
        ("single", "search", "one_stage", ONE_STAGE, pictures),
        ("few", "run", "two_stage", TWO_STAGE, digits),
    ):
        file = folder / f"{name}.yaml"
        file.write_text(TINY.format(method=method, search=search, data=data, folder=folder))
        out, err = command(job, "--config", str(file), "--json")
        done[name] = Job(err, json.loads(out))
    return Jobs(folder, **done)


def row(text: str, label: str) -> str:
    """Return the cells of a table row, without its borders."""
    (line,) = [line for line in text.splitlines() if label in line]
    return " ".join(re.sub(r"[│┃|]", " ", line).split())


def shown(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def test_epochs_lines_and_metrics_say_top5(jobs: Jobs) -> None:
    lines = jobs.many.seen.splitlines()
    searched = [
        found
        for line in lines
        if (found := re.match(rf"epoch \d: loss [\d.]+, top-1 {TOPS} \(validation {TOPS}\), \d", line))
    ]
    retrained = [
        found
        for line in lines
        if (
            found := re.match(
                rf"epoch \d: loss [\d.]+, top-1 {TOPS}, validation {TOPS}, test {TOPS}, [\d.]+ s", line
            )
        )
    ]
    splits = {
        "run_dir": (searched, ("train", "valid")),
        "retrain_run_dir": (retrained, ("train", "valid", "test")),
    }
    for key, (found, names) in splits.items():
        measured = [
            [m[f"{split}/{top}"] for split in names for top in ("top1", "top5")]
            for m in jobs.many.metrics(key)
        ]
        assert [list(line.groups()) for line in found] == [
            [shown(value) for value in epoch] for epoch in measured
        ]
        for first, fifth in zip(measured[-1][::2], measured[-1][1::2], strict=True):
            assert first < fifth <= 1
    training = jobs.single.seen.splitlines()
    assert (
        sum(re.match(rf"epoch 1: .*, validation {TOPS}, distance", line) is not None for line in training)
        == 1
    )
    # Epoch 2 closes the search phase.
    assert sum(re.match(rf"epoch 3: .*, test {TOPS}, [\d.]+ s", line) is not None for line in training) == 1


def test_the_test_figure_is_that_of_the_network(jobs: Jobs) -> None:
    pictures = load_dataset("folder", root=jobs.folder / "pictures", cache_dir=jobs.folder / "cache")
    assert isinstance(pictures.test, ArrayPictures)
    for job, key in ((jobs.many, "retrain_run_dir"), (jobs.single, "run_dir")):
        net, _ = load_network(job.run(key).path)
        logits = net(normalize(pictures.test.images, pictures.mean, pictures.std))
        own = logits.gather(1, pictures.test.labels[:, None])
        top5 = ((logits > own).sum(1) < 5).double().mean().item()
        assert job.result["test_top5"] == pytest.approx(top5, abs=1e-12)


def test_results_and_the_table_at_the_end_have_top5(jobs: Jobs) -> None:
    search, retrain, single = (
        jobs.many.metrics()[-1],
        jobs.many.metrics("retrain_run_dir")[-1],
        jobs.single.metrics()[-1],
    )
    result = jobs.many.result
    assert (result["valid_top5"], result["test_top5"]) == (search["valid/top5"], retrain["test/top5"])
    of_retraining = jobs.many.run("retrain_run_dir").read().result
    assert (of_retraining["valid_top5"], of_retraining["test_top5"]) == (
        retrain["valid/top5"],
        retrain["test/top5"],
    )
    one_stage = jobs.single.result
    assert (one_stage["valid_top5"], one_stage["test_top5"]) == (single["valid/top5"], single["test/top5"])
    for job in (jobs.many, jobs.single):
        assert row(job.seen, "test top-5") == f"test top-5 {100 * job.result['test_top5']:.2f} %"
        label = "validation top-5"
        assert row(job.seen, label) == f"{label} {100 * job.result['valid_top5']:.2f} %"


def test_frames_have_top5(jobs: Jobs) -> None:
    frame = results_frame(tracking_uri=jobs.uri).set_index("name")
    searches = searches_frame(tracking_uri=jobs.uri).set_index("name")
    search, retrain = jobs.many.metrics()[-1], jobs.many.metrics("retrain_run_dir")[-1]
    assert frame.loc["many-search", "valid_top5"] == search["valid/top5"]
    assert pd.isna(frame.loc["many-search", "test_top5"])
    assert frame.loc["many-retrain", "valid_top5"] == retrain["valid/top5"]
    assert frame.loc["many-retrain", "test_top5"] == retrain["test/top5"]
    assert frame.loc["single-search", "test_top5"] == jobs.single.result["test_top5"]
    assert searches.loc["many-search", "valid_top5"] == search["valid/top5"]
    assert searches.loc["many-search", "retrained_valid_top5"] == retrain["valid/top5"]
    assert searches.loc["many-search", "retrained_test_top5"] == retrain["test/top5"]
    assert searches.loc["single-search", "test_top5"] == jobs.single.result["test_top5"]
    epochs = epochs_frame(tracking_uri=jobs.uri, kind="retrain", dataset="folder")
    for split in ("train", "valid", "test"):
        assert list(epochs[f"{split}/top5"]) == [
            m[f"{split}/top5"] for m in jobs.many.metrics("retrain_run_dir")
        ]


def printed(frame: pd.DataFrame, width: int = 80) -> list[str]:
    """Return the lines of the table, with single spaces between cells."""
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(results_table(frame, width=width))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    return [" ".join(line.split()) for line in lines]


def test_the_table_of_results_has_top5_where_a_run_has_it(jobs: Jobs) -> None:
    frame = results_frame(tracking_uri=jobs.uri)
    digits = "\n".join(printed(frame[frame["dataset"] == "digits"]))
    assert "test" in digits
    assert "top-5" not in digits
    result = jobs.many.run("retrain_run_dir").read().result
    valid, valid5, test, test5 = (
        f"{result[key]:.2%}" for key in ("valid_top1", "valid_top5", "test_top1", "test_top5")
    )
    wide, narrow = printed(frame, width=160), printed(frame)
    assert "valid test" in wide
    assert any(
        line.endswith("genotype valid top-5 test top-5 params MACs time data method started") for line in wide
    )
    assert any(f" {valid} {valid5} {test} {test5} " in line for line in wide)
    assert "run genotype valid test top-5 params MACs time" in narrow
    assert any(f" {valid} {test} {test5} " in line for line in narrow)
    searches = printed(frame[frame["name"] == "many-search"])
    assert "run genotype valid top-5 test params MACs time" in searches, "test has no top-5"


def test_the_report_has_top5(jobs: Jobs) -> None:
    for job, key, half in (
        (jobs.many, "run_dir", "alpha half"),
        (jobs.many, "retrain_run_dir", "hold-out"),
        (jobs.single, "run_dir", "hold-out"),
    ):
        run = job.run(key)
        page, result = Page(run.path / "report.html"), run.read().result
        page.check_loads_nothing()
        page.check_ids()
        assert f"measured on the {half}: the part" in page.text
        assert f"validation top-5 {100 * result['valid_top5']:.2f} %" in page.text
        assert ("test top-5" in page.text) == ("test_top5" in result)
        assert "Loss, top-1 and top-5 over the epochs" in [svg["aria-label"] for svg in page.all("svg")]
        curves = page.source.partition('id="curves"')[2].partition("</figure>")[0]
        assert curves.count(">top-5, %</text>") == 1


def test_notes_in_mlflow_have_top5(jobs: Jobs) -> None:
    client = open_client(jobs.uri)
    for key, half in (("mlflow_run_id", "alpha half"), ("retrain_run_id", "hold-out")):
        run = client.get_run(jobs.many.result[key])
        result = jobs.many.run("run_dir" if key == "mlflow_run_id" else "retrain_run_dir").read().result
        note = run.data.tags["mlflow.note.content"]
        assert f"measured on the {half}: the part" in note
        assert f"- validation top-5: {100 * result['valid_top5']:.2f} %\n" in note
        assert ("- test top-5: " in note) == (key == "retrain_run_id")
        assert (
            run.data.metrics["train/top5"]
            == jobs.many.metrics("run_dir" if half == "alpha half" else "retrain_run_dir")[-1]["train/top5"]
        )


def compared(jobs: Jobs, out: Path, *runs: str) -> tuple[dict[str, Any], str, str]:
    """Return the result of a comparison, its messages, and the source of its page."""
    config = ("--config", str(jobs.folder / "few.yaml"))
    stdout, stderr = command("compare", *runs, *config, "--out", str(out), "--json")
    return json.loads(stdout), stderr, (out / "compare.html").read_text()


def test_a_comparison_has_top5_where_a_run_has_it(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")  # room for all columns
    many, few = jobs.many.result, jobs.few.result
    result, seen, page = compared(jobs, tmp_path, many["retrain_run_dir"], few["retrain_run_dir"])
    first, second = result["runs"]
    assert first["test_top5"] == many["test_top5"]
    assert (second["valid_top5"], second["test_top5"]) == (None, None)
    lines = [" ".join(line.split()) for line in seen.splitlines()]
    (heading,) = (line for line in lines if line.startswith("run "))
    assert heading == "run params MACs latency valid top-5 test top-5"
    assert f"{many['test_top5']:.2%}" in seen
    assert f">{many['test_top5']:.2%}<" in page
    for heading in ("valid top-5", "test top-5"):
        assert f">{heading}</th>" in page
    for panel in ("training top-5, %", "validation top-5, %", "test top-5, %"):
        assert f">{panel}</text>" in page

    _, seen, page = compared(jobs, tmp_path, few["run_dir"], few["retrain_run_dir"])
    assert "top-1, %" in page
    assert "top-5" not in seen + page


def test_ten_classes_have_no_top5_anywhere(jobs: Jobs) -> None:
    few = jobs.few
    texts = [few.seen, json.dumps(few.result)]
    for key in ("run_dir", "retrain_run_dir"):
        assert all("train/top1" in metrics for metrics in few.metrics(key))
        files = [
            file
            for file in few.run(key).path.rglob("*")
            if file.suffix in (".json", ".jsonl", ".html", ".csv")
        ]
        assert {"run.json", "metrics.jsonl", "report.html"} <= {file.name for file in files}
        texts += [file.read_text() for file in files]
    assert [text for text in texts if re.search('top-?5(?!": null)', text)] == []
    client = open_client(jobs.uri)
    for key in ("mlflow_run_id", "retrain_run_id"):
        data = client.get_run(few.result[key]).data
        assert "top-5" not in data.tags["mlflow.note.content"]
        assert not [name for name in data.metrics if name.endswith("top5")]
    frame = results_frame(tracking_uri=jobs.uri, dataset="digits")
    assert frame[["valid_top5", "test_top5"]].isna().all(axis=None)
    assert (frame.dtypes[["valid_top5", "test_top5"]] == "Float64").all()


@pytest.fixture
def without_top5(jobs: Jobs, tmp_path: Path) -> Callable[[int], RunDir]:
    """Return a function that copies a retraining as an older version wrote it, without top-5 in its first epochs."""

    def make(n_epochs: int) -> RunDir:
        run = RunDir(shutil.copytree(jobs.many.result["retrain_run_dir"], tmp_path / "old-retrain"))
        for file in ("mlflow.json", "evaluation.json", "mistakes.png"):
            (run.path / file).unlink()
        lines = run.metrics()
        for line in lines[:n_epochs]:
            for split in ("train", "valid", "test"):
                del line.metrics[f"{split}/top5"]
        run.replace_metrics(lines)
        if n_epochs == len(lines):
            record = json.loads((run.path / "run.json").read_text())
            for key in ("valid_top5", "test_top5"):
                del record["result"][key]
            (run.path / "run.json").write_text(json.dumps(record))
        return run

    return make


def test_a_run_of_an_older_version_is_shown_without_top5(
    jobs: Jobs, without_top5: Callable[[int], RunDir], blank_database: Path, tmp_path: Path
) -> None:
    old = without_top5(2)
    write_report(old)
    page = Page(old.path / "report.html")
    assert "test top-1" in page.text
    assert "top-5" not in page.source
    result, seen, source = compared(jobs, tmp_path, str(old.path), jobs.few.result["retrain_run_dir"])
    assert result["runs"][0]["test_top5"] is None
    assert result["runs"][0]["test_top1"] == jobs.many.result["test_top1"]
    assert "top-5" not in seen + source
    uri = f"sqlite:///{shutil.copy(blank_database, tmp_path)}"
    command("sync", str(old.path), "--set", f"tracking.uri={uri}", "--set", "tracking.models=false")
    frame = results_frame(tracking_uri=uri)
    (row,) = frame[frame["run_dir"].str.endswith("old-retrain")].to_dict("records")
    assert row["test_top1"] == jobs.many.result["test_top1"]
    assert pd.isna(row["test_top5"])


def test_a_run_started_by_an_older_version_shows_top5_of_later_epochs(
    jobs: Jobs, without_top5: Callable[[int], RunDir], tmp_path: Path
) -> None:
    run = without_top5(1)
    write_report(run)
    assert f"test top-5 {100 * jobs.many.result['test_top5']:.2f} %" in Page(run.path / "report.html").text
    result, _, page = compared(jobs, tmp_path, str(run.path), jobs.few.result["retrain_run_dir"])
    assert result["runs"][0]["test_top5"] == jobs.many.result["test_top5"]
    assert ">test top-5, %</text>" in page


@pytest.mark.parametrize("top5", [None, 0.75])
def test_the_bar_has_top5_where_it_is_measured(top5: float | None) -> None:
    out = io.StringIO()
    with EpochBar(Console(file=out, force_terminal=True, width=160), "search", 2) as bar:
        bar.step(0, 1, 4, lambda: Metrics(1.0, 0.5, 4, top5))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "loss 1.000  top-1 50.0 %" in text
    assert ("top-1 50.0 %  top-5 75.0 %" in text) == (top5 is not None)
    assert ("top-5" in text) == (top5 is not None)
