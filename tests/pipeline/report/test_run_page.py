"""The report of every kind of run: its contents, no loaded resources, escaped names."""

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from istanas.space import CellSpace, random_genotype
from pipeline.base.page_links import without_file_links
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.load import flat_params, load, to_yaml
from pipeline.jobs.context import JobContext
from pipeline.jobs.retrain import run_retrain
from pipeline.jobs.search import run_search
from pipeline.report.html import figure, inline_svg
from pipeline.report.run_page import write_report
from pipeline.report.trajectory_page import write_trajectory_page
from pipeline.report.trials import page_table, trials_table, write_table
from pipeline.runs.directory import RunDir
from pipeline.runs.environment import write_environment
from pipeline.runs.genotype_file import write_genotype
from pipeline.runs.record import RunRecord
from pipeline.sweeps.job import SECTIONS
from pipeline.sweeps.report import sweep_frame, write_figures
from pipeline.tracking.store import open_client
from pipeline.tracking.tracker import MLflowTracker
from tests.pipeline.report.pages import Page
from tests.pipeline.sweeps.test_job import ended_sweep
from tests.pipeline.tracking.test_data_label import RECORD

TINY = ["space.nodes=2", "runtime={threads: 1, device: cpu}", "tracking.enabled=false"]
SIZE = "batch_size: 256, init_channels: 2, layers: 3, auxiliary_weight: 0, cutout: 0"
JOBS = {
    "two_stage": ["search={epochs: 2, batch_size: 64, init_channels: 2, layers: 3, max_pictures: 200}"],
    "one_stage": [
        "method=one_stage",
        f"search={{max_search_epochs: 2, train_epochs: 1, max_pictures: 300, {SIZE}}}",
    ],
    "retrain": [
        "retrain={epochs: 2, batch_size: 256, init_channels: 2, layers: 2, auxiliary_weight: 0, cutout: 0}"
    ],
}
COMMON = ["figures", "cells", "curves", "settings", "environment", "command"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """A finished run of each kind except a sweep."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for kind, overrides in JOBS.items():
        config = load(None, [*TINY, *overrides, f"runtime.runs_dir={folder}"])
        with Runtime(config.runtime) as runtime:
            context = JobContext(config, kind, Console(file=io.StringIO()), runtime)
            if kind == "retrain":
                genotype = random_genotype(0, CellSpace(n_nodes=2))
                result: Any = run_retrain(context, genotype, origin="random:0")
            else:
                result = run_search(context)
        found[kind] = RunDir(result["run_dir"])
    return found


@pytest.fixture
def copy(runs: dict[str, RunDir], tmp_path: Path) -> RunDir:
    """A copy of the two-stage search."""
    return RunDir(shutil.copytree(runs["two_stage"].path, tmp_path / "copy"))


def page_of(run: RunDir) -> Page:
    return Page(run.path / "report.html")


@pytest.mark.parametrize("kind", JOBS)
def test_it_loads_nothing_and_all_sections_are_there(runs: dict[str, RunDir], kind: str) -> None:
    run = runs[kind]
    page = page_of(run)
    page.check_loads_nothing()
    page.check_ids()
    extra = [
        "pictures",
        *(["frozen"] if kind == "one_stage" else []),
        *(["evaluation"] if kind != "two_stage" else []),  # of a trained network
    ]
    assert sorted(page.sections) == sorted(COMMON + extra)
    assert "report.html" in run.read().artifacts
    assert ("See also: trajectory.html (the search, epoch by epoch)" in page.text) == (kind != "retrain")
    assert page.all("script") == []
    labels = [svg["aria-label"] for svg in page.all("svg")]
    assert [label.partition(":")[0] for label in labels[:3]] == [
        "normal cell",
        "reduce cell",
        "Loss and top-1 over the epochs",
    ]


@pytest.mark.parametrize("kind", JOBS)
def test_results_settings_environment_and_command_are_shown(runs: dict[str, RunDir], kind: str) -> None:
    run, text = runs[kind], page_of(runs[kind]).text
    record = run.read()
    result = record.result
    assert f"{kind}-{record.kind}" in text
    for key, label in (
        ("test_top1", "test top-1"),
        ("valid_top1", "validation top-1"),
    ):
        assert (f"{label} {100 * result[key]:.2f} %" in text) if key in result else (label not in text)
    assert f"parameters {result['params']:,} multiply-adds {result['macs']:,}" in text
    assert result["digest"][:12] in text
    for key, value in record.params.items():
        shown = figure(value).replace(",", ", ") if isinstance(value, str) else figure(value)
        assert f"{key.rpartition('.')[2]} {shown}" in text
    environment = run.environment()
    assert environment["cpu"] in text
    assert f"torch {environment['packages']['torch']}" in text
    assert environment["command"] in text
    for frozen in result.get("frozen", []):
        assert f"{frozen['cell']} node {frozen['node']} {frozen['epoch']} {frozen['reason']}" in text
    for split in ("train", "valid", "test"):
        measured = any(f"{split}/top1" in line.metrics for line in run.metrics())
        curves = page_of(run).source.partition('id="curves"')[2].partition("</figure>")[0]
        assert (f">{split}</text>" in curves) == measured


def test_a_retraining_says_where_its_genotype_comes_from(runs: dict[str, RunDir]) -> None:
    record = runs["retrain"].read()
    assert record.tags["istanas.genotype_from"] == "random:0"
    assert "- genotype from: `random:0`\n" in record.description
    assert "Retraining on digits, genotype from random:0, ended" in page_of(runs["retrain"]).text


def test_own_pictures_are_named_by_their_folder(copy: RunDir) -> None:
    record = dataclasses.replace(
        copy.read(), dataset="folder", params={**copy.read().params, "data.root": "/data/Pets"}, datasets=()
    )
    copy.write(record)
    write_report(copy)
    write_trajectory_page(copy)
    assert f"Two-stage search on {record.data_label}, ended" in page_of(copy).text
    assert f"Two-stage search on {record.data_label} " in Page(copy.path / "trajectory.html").text
    assert record.data_label.startswith("data-pets-")


def test_a_report_written_again_is_identical(runs: dict[str, RunDir]) -> None:
    for run in runs.values():
        first = (run.path / "report.html").read_bytes()
        (run.path / "report.html").unlink()
        write_report(run)
        assert (run.path / "report.html").read_bytes() == first


def test_hostile_names_are_text(copy: RunDir) -> None:
    evil = "</title><script>alert(1)</script>"
    record = copy.read()
    params = {**record.params, "data.root": '"><img src=http://example.org/x onerror=alert(1)>'}
    copy.write(dataclasses.replace(record, name=evil, dataset=evil, params=params, parent=f"x/{'<b>' * 3}"))
    environment = json.loads((copy.path / "environment.json").read_text())
    (copy.path / "environment.json").write_text(json.dumps({**environment, "command": evil, "cpu": evil}))
    (copy.path / "config.yaml").write_text(evil)
    write_report(copy)
    page = page_of(copy)
    page.check_loads_nothing()
    assert page.all("script") == page.all("img") == page.all("b") == []
    assert page.text.count(evil) >= 5


def test_a_run_without_a_recorded_environment_has_a_report(copy: RunDir) -> None:
    (copy.path / "environment.json").unlink()
    write_report(copy)
    assert "environment not recorded" in page_of(copy).text


def test_earlier_environments_are_counted(copy: RunDir) -> None:
    file = copy.path / "environment.json"
    environment = json.loads(file.read_text())
    file.write_text(json.dumps({**environment, "cores": environment["cores"] + 1}))
    write_environment(copy, "search")
    write_report(copy)
    assert "earlier environments 1, in environment.json" in page_of(copy).text


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The directory of a sweep of 60 trials with made-up figures, one of them failed."""
    folder = tmp_path_factory.mktemp("sweep")
    config, study = ended_sweep(folder, trials=60)
    run = RunDir(folder / "made-up-sweep")
    run.path.mkdir()
    frame = sweep_frame(config, study)
    frame["run_dir"] = [f"{run.path}/trial-{number:04d}" for number in range(60)]
    write_table(run.path, frame)
    for number, artifacts in ((2, ("report.html",)), (4, ())):
        trial = dataclasses.replace(RECORD, artifacts=artifacts)
        RunDir(run.path / f"trial-{number:04d}").write(trial)
    write_figures(run.path, config, study, frame, lambda _: None)
    genotype = random_genotype(0, CellSpace())
    write_genotype(run.path, genotype)
    write_environment(run, "sweep")
    (run.path / "config.yaml").write_text(to_yaml(config))
    for step in (1, 2):
        run.append_metrics(step, {"sweep/complete": float(step), "sweep/best_top1": 0.9 + step / 100}, step)
    result = {
        **{"best_trial": 3, "settings": {"search.lr": float(frame["search.lr"][3])}, "params": 40482},
        **{"digest": genotype.digest(), "genotype": genotype.to_dict(), "valid_top1": 0.93, "macs": 400123},
        **{"retrained_top1": 0.9561, "kendall_tau": -1.0, "complete": 59, "pruned": 0, "failed": 1},
        **{"epochs": 177, "seconds": 88.5},
    }
    record = RunRecord(
        **{"name": "made-up-sweep", "kind": "sweep", "method": "two_stage", "dataset": "digits", "key": ""},
        **{"params": flat_params(config, SECTIONS), "tags": {}, "description": "", "parent": None},
        **{"status": "FINISHED", "started_ms": 0, "ended_ms": 1, "artifacts": (), "result": result},
    )
    run.write(record)
    write_report(run)
    return run


def test_a_sweep_has_its_best_settings_its_trials_and_its_figures(sweep: RunDir) -> None:
    page = page_of(sweep)
    page.check_loads_nothing()
    page.check_ids()
    assert sorted(page.sections) == sorted([*COMMON, "best", "trials", "plots"])
    assert "See also: sweep.html (interactive figures)" in page.text
    text = page.text
    for words in (
        "top-1 after retraining 95.61 %",
        "Kendall's tau -1.00",
        "59 done, 0 stopped, 1 failed",
        "parameters 40,482",
        "time of all searches 1 min 28 s",
        "uniform 0.01 .. 0.1",
        "Finished trials come first, the best at the top. All columns are in trials.csv",
    ):
        assert words in text, words
    tops = [float(re.findall(r"([\d.]+) %", row)[1]) for row in map(" ".join, page.trials[:-1])]
    assert tops == sorted(tops, reverse=True)  # the best first
    assert page.trials[-1][1] == "failed: IstanasError: the loss is NaN"
    assert len(page.all("img")) == len(list((sweep.path / "plots").glob("*.png"))) >= 3
    # Optuna's global style does not affect our figures.
    curves = page.source.partition('id="curves"')[2].partition("</figure>")[0]
    assert "#e5e5e5" not in curves
    assert "best top-1 so far, %" in curves


@pytest.mark.parametrize("name", ["report.html", "sweep.html"])
def test_both_pages_of_a_sweep_link_to_the_reports_of_trials(sweep: RunDir, name: str) -> None:
    page = Page(sweep.path / name)
    page.check_ids()
    numbers = [re.sub("<[^>]*>", "", row[0]) for row in page.trials]
    assert sorted(map(int, numbers)) == list(range(60))
    other = {"report.html": "sweep.html", "sweep.html": "report.html"}[name]
    assert sorted(page.files) == [other, "trial-0002/report.html", "trials.csv"]
    assert [row[0] for row in page.trials if "href" in row[0]] == [
        '<a data-file href="trial-0002/report.html">2</a>'
    ]
    assert Page(written(sweep, without_file_links(page.source))).files == []


def written(run: RunDir, text: str) -> Path:
    """Write a page into the run directory."""
    file = run.path / "delivered.html"
    file.write_text(text)
    return file


def test_keys_with_the_same_last_part_keep_their_full_names(tmp_path: Path) -> None:
    space = "{search.lr: {uniform: [0.01, 0.1]}, retrain.lr: {uniform: [0.01, 0.1]}, space.sparsity: {int: [1, 2]}}"
    config, study = ended_sweep(tmp_path, f"sweep={{trials: 9, scheduler: none, space: {space}}}", trials=9)
    frame = sweep_frame(config, study)
    headings = ["trial", "state", "search.lr", "retrain.lr", "sparsity"]
    assert page_table(tmp_path, frame)["headings"][:5] == headings
    assert [column.heading for column in trials_table(frame).columns[:5]] == headings


def test_ids_of_inline_pictures_have_a_prefix() -> None:
    source = (
        '<?xml version="1.0"?><!DOCTYPE svg><svg width="5pt" height="5pt" viewBox="0 0 5 5">'
        '<metadata><a href="http://x"/></metadata><defs><style type="text/css">*{}</style><clipPath id="p"/></defs>'
        '<g id="a" clip-path="url(#p)" style="clip-path: url(#p)"><use xlink:href="#a" width="3"/></g></svg>'
    )
    assert str(inline_svg(source, "one", "label")) == (
        '<svg role="img" aria-label="label" viewBox="0 0 5 5"><defs><clipPath id="one-p"/></defs>'
        '<g id="one-a" clip-path="url(#one-p)" style="clip-path: url(#one-p)">'
        '<use xlink:href="#one-a" width="3"/></g></svg>'
    )


@pytest.mark.parametrize("kind", JOBS)
def test_pages_have_links_to_files_on_disk_but_not_in_mlflow(
    runs: dict[str, RunDir], kind: str, tmp_path: Path
) -> None:
    """MLflow's viewer cannot open a page from a link of another one."""
    run = runs[kind]
    pages = sorted(run.path.glob("*.html"))
    links = [link for page in pages for link in Page(page).files]
    assert links == ([] if kind == "retrain" else ["trajectory.html", "report.html"])
    assert all((run.path / link).is_file() for link in links)
    tracker = MLflowTracker(run, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="x", models=False)
    assert tracker.deliver()
    assert tracker.last_delivery is not None
    assert {page.name for page in pages} <= set(tracker.last_delivery.artifacts)
    client = open_client(tracker.tracking_uri)
    for page in pages:
        delivered = Path(client.download_artifacts(str(tracker.run_id), page.name, str(tmp_path)))
        assert Page(delivered).files == []
        assert "".join(Page(delivered).texts) == "".join(Page(page).texts)
    assert tracker.deliver()
    assert tracker.last_delivery.artifacts == (), "unchanged files are not sent again"
