"""MLflow's pages on the store of a real run, and our own pages from the disk, in headless Chromium."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from pipeline.cli.commands import run
from pipeline.report.run_page import write_report
from pipeline.runs.directory import RunDir
from pipeline.sweeps.report import sweep_frame, write_figures
from tests.pipeline.sweeps.test_job import ended_sweep

RUN = [
    *("run", "--json", "--set", "runtime.threads=1", "--set", "data.holdout=0.2", "--set", "search.epochs=4"),
    *("--set", "search.init_channels=4", "--set", "retrain.epochs=2", "--set", "retrain.init_channels=4"),
]
TRAINING = "workflowType=machine_learning"  # selects one of the two forms of MLflow's pages
SECONDS = 30.0  # longest time for a page of MLflow on a busy machine

expect.set_options(timeout=1000 * SECONDS)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, or the program in CHROMIUM."""
    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no browser here: apt-get install chromium, or name one with CHROMIUM=PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def result(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory, blank_database: Path
) -> dict[str, Any]:
    """The result of a search and a retraining of the digits, which are compared; "folder" is their project."""
    folder, said = tmp_path_factory.mktemp("store"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        shutil.copy(blank_database, folder / "mlflow.db")
        patch.chdir(folder)
        assert run(RUN) == 0
        result: dict[str, Any] = json.loads(said.getvalue().splitlines()[-1])
        assert run(["compare", result["run_dir"], result["retrain_run_dir"], "--out", "compare"]) == 0
        assert run(["promote", result["retrain_run_dir"]]) == 0
    return {**result, "folder": folder}


MEASURED = [
    *("search", "--json", "--set", "method=measured", "--set", "space={name: nas_bench_201}"),
    *("--set", "search={stages: [[8, 1], [4, 2]], batch_size: 50, init_channels: 2, layers: 5}"),
    *("--set", "search.max_pictures=100", "--set", "search.calibration_batches=1"),
    *("--set", "retrain={layers: 5, init_channels: 4, auxiliary_weight: 0}"),
    *("--set", "data.crop_padding=1", "--set", "runtime={threads: 1, device: cpu}"),
    *("--set", "tracking.enabled=false"),
]


@pytest.fixture(scope="module")
def measured(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a search by 12 measurements in the space of NAS-Bench-201."""
    folder, said = tmp_path_factory.mktemp("measured"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(folder)
        assert run(MEASURED) == 0
    return folder / json.loads(said.getvalue().splitlines()[-1])["run_dir"]


SWEEP = """{space: {
    search.lr: {loguniform: [0.002, 0.3]},
    search.weight_decay: {loguniform: [0.0001, 0.01]},
    space.n_measurements: {int: [4, 7]},
    space.matrix: {choice: [uniform, gaussian]}
}}"""


@pytest.fixture(scope="module")
def sweep(browser: Browser, result: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a sweep with made-up figures, enough trials for every figure, and the report of one of them."""
    folder = tmp_path_factory.mktemp("sweep")
    config, study = ended_sweep(folder, f"sweep={SWEEP}", trials=9)
    frame = sweep_frame(config, study)
    frame["run_dir"] = [f"{folder}/sweep/trial-{number:04d}" for number in frame["trial"]]
    trial = RunDir(folder / "sweep" / "trial-0000")
    shutil.copytree(result["folder"] / result["run_dir"], trial.path)
    trial.write(dataclasses.replace(trial.read(), name="trial-0000"))
    write_report(trial)
    write_figures(folder / "sweep", config, study, frame, lambda _: None)
    return folder / "sweep"


@pytest.fixture(scope="module")
def address(result: dict[str, Any]) -> Iterator[str]:
    """The address of MLflow's pages, which `istanas ui` serves on a free port."""
    command = [sys.executable, "-m", "pipeline.cli", "ui", "--json"]
    with subprocess.Popen(command, cwd=result["folder"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        said = json.loads(server.stdout.readline())
        assert result["retrain_run_id"] in said["newest_run"]
        assert said["newest_run"].startswith(said["url"])
        yield said["url"]
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """A page whose screenshot is kept with the test's output."""
    context = browser.new_context(viewport={"width": 1400, "height": 1100})
    context.set_default_timeout(1000 * SECONDS)
    page = context.new_page()
    yield page
    page.screenshot(path=tmp_path / "page.png")
    context.close()


def close_assistant(page: Page) -> None:
    """Close the panel that MLflow opens on the first visit."""
    panel = page.get_by_label("Close").first
    if panel.is_visible():
        panel.click()


def watch(page: Page) -> list[str]:
    """Return a list to which the page's errors and its requests to other addresses are appended."""
    seen: list[str] = []
    page.on("console", lambda message: seen.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.on(
        "request", lambda r: seen.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None
    )
    return seen


def share_of_white(page: Page) -> float:
    """Return the share of nearly white pixels on a whole page."""
    picture = np.asarray(Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB"))
    return float((picture.min(axis=2) > 200).mean())


# ---------- our pages, from the disk
def move_slider(page: Page) -> None:
    """Move the trajectory's slider with the keyboard, and check that it shows the cells of another epoch."""
    slider = page.get_by_role("slider")
    last = int(slider.get_attribute("max") or 0)
    assert last == 4
    said: list[str] = []
    for epoch in (last, 0):
        slider.focus()
        page.keyboard.press("End" if epoch else "Home")
        expect(slider).to_have_value(str(epoch))
        expect(page.get_by_text(re.compile(rf"Epoch {epoch} of {last}")).first).to_be_visible()
        visible = [c.inner_html() for c in page.locator("svg").all() if c.is_visible()]
        said.append("".join(visible))
    assert said[0] != said[1], "the cells stay the same"


def test_the_trajectory_opens_from_the_disk_and_its_slider_moves_the_cell(
    page: Page, result: dict[str, Any]
) -> None:
    seen = watch(page)
    page.goto((result["folder"] / result["run_dir"] / "trajectory.html").as_uri())
    for text in ("distance", "gap", "truncation", "skip ratio", "Magnitudes of the sparse codes"):
        expect(page.get_by_text(text).first).to_be_visible()
    move_slider(page)
    assert seen == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["run_dir", "retrain_run_dir", "compare"])
def test_reports_open_from_the_disk_without_network_or_errors(
    page: Page, result: dict[str, Any], name: str, scheme: Any
) -> None:
    seen = watch(page)
    page.emulate_media(color_scheme=scheme)
    file = "compare/compare.html" if name == "compare" else f"{result[name]}/report.html"
    page.goto((result["folder"] / file).as_uri())
    for width in (1400, 800, 400):
        page.set_viewport_size({"width": width, "height": 1000})
        wider = page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
        assert not wider, f"the page is wider than {width} px"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 200) is (scheme == "dark")
    page.set_viewport_size({"width": 1400, "height": 1000})
    assert (share_of_white(page) < 0.05) is (scheme == "dark")
    assert seen == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_a_sweep_has_readable_figures_and_all_trials(
    page: Page, sweep: Path, scheme: Any
) -> None:
    seen = watch(page)
    page.emulate_media(color_scheme=scheme)
    page.goto((sweep / "sweep.html").as_uri())
    expect(page.locator(".js-plotly-plot .main-svg").first).to_be_visible()
    assert page.locator("#trials tbody tr").count() == 9
    assert (share_of_white(page) < 0.05) is (scheme == "dark")

    # The names of parallel coordinates are complete, horizontal and do not overlap.
    figure = page.locator("#parallel_coordinates")
    names = figure.locator(".xtick text")
    assert names.all_text_contents() == ["top-1", "lr", "matrix", "n_measurements", "weight_decay"]
    assert not any("rotate" in (name.get_attribute("transform") or "") for name in names.all())
    boxes = sorted(
        (box["x"], box["x"] + box["width"]) for name in names.all() if (box := name.bounding_box())
    )
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(boxes)), "names overlap"
    ink = "rgb(230, 233, 238)" if scheme == "dark" else "rgb(29, 33, 41)"
    texts = page.locator(".js-plotly-plot .main-svg text")
    fills = texts.evaluate_all("texts => texts.map(text => getComputedStyle(text).fill)")
    assert set(fills) == {ink}

    for width in (1400, 800, 400):
        page.set_viewport_size({"width": width, "height": 1000})
        wider = page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
        assert not wider, f"the page is wider than {width} px"
    page.locator("#trials tbody a").first.click()
    expect(page.get_by_role("heading", name=re.compile("^trial-"))).to_be_visible()
    assert seen == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_of_a_search_by_measurements_has_readable_figures(
    page: Page, measured: Path, scheme: Any
) -> None:
    seen = watch(page)
    page.emulate_media(color_scheme=scheme)
    page.goto((measured / "report.html").as_uri())
    figure = page.get_by_role("img", name="Effects of the candidates of the cell")
    expect(figure).to_be_visible()
    assert figure.locator(".interval").count() == 30
    assert page.locator("#effects tbody tr").count() == 5  # the next measurements
    # No two texts of a figure overlap.
    for svg in page.locator("#effects svg").all():
        boxes = [box for text in svg.locator("text").all() if (box := text.bounding_box())]
        for one, other in itertools.combinations(boxes, 2):
            across = min(one["x"] + one["width"], other["x"] + other["width"]) - max(one["x"], other["x"])
            down = min(one["y"] + one["height"], other["y"] + other["height"]) - max(one["y"], other["y"])
            assert across <= 0 or down <= 0.35 * min(one["height"], other["height"])
    # The pixels of a map are not blurred.
    picture = figure.locator("image").first
    assert picture.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    for width in (1400, 800, 400):
        page.set_viewport_size({"width": width, "height": 1000})
        wider = page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
        assert not wider, f"the page is wider than {width} px"
    assert (share_of_white(page) < 0.05) is (scheme == "dark")
    assert seen == []


# ---------- MLflow's pages
def test_the_run_is_found_with_its_chart_cell_report_and_model(
    page: Page, address: str, result: dict[str, Any]
) -> None:
    # The list of runs.
    page.goto(f"{address}/#/experiments/1/runs?{TRAINING}")
    close_assistant(page)
    name = RunDir(result["folder"] / result["run_dir"]).read().name
    expect(page.get_by_text(name).first).to_be_visible()

    # The search: data set, description with the genotype, a chart of a metric.
    page.goto(f"{address}/#/experiments/1/runs/{result['mlflow_run_id']}?{TRAINING}")
    close_assistant(page)
    expect(page.get_by_text("digits (").first).to_be_visible()
    expect(page.get_by_text("validation top-1: two-stage search on digits").first).to_be_visible()
    page.get_by_text("Model metrics").click()
    page.get_by_placeholder("Search metric charts").fill("valid/top1")
    expect(page.get_by_text("top1", exact=True).first).to_be_visible()
    expect(page.locator(".js-plotly-plot")).to_have_count(1)

    # Its files: the cell's picture, the report.
    page.get_by_text("Artifacts", exact=True).click()
    page.get_by_text("cells", exact=True).first.click()
    page.get_by_text("normal.png").first.click()
    picture = page.get_by_role("img", name="cells/normal.png").last
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth") >= 800
    page.get_by_text("report.html").first.click()
    frame = page.frame_locator("iframe").last
    expect(frame.get_by_text("Results").first).to_be_visible()
    page.get_by_text("trajectory.html").first.click()
    slider = page.frame_locator("iframe").last.get_by_role("slider")
    slider.press("Home")
    expect(page.frame_locator("iframe").last.get_by_text(re.compile(r"Epoch 0 of 4")).first).to_be_visible()


def test_the_registered_model_links_to_its_retraining_and_its_search(
    page: Page, address: str, result: dict[str, Any]
) -> None:
    page.goto(f"{address}/#/models/istanas-digits")
    close_assistant(page)
    expect(page.get_by_text("champion").first).to_be_visible()
    page.goto(f"{address}/#/models/istanas-digits/versions/1")
    for link, run_id in (("retraining ", result["retrain_run_id"]), ("search ", result["mlflow_run_id"])):
        with page.expect_popup() as opened:  # MLflow opens the links of a description in a new page
            page.get_by_role("link", name=re.compile(f"^{link}")).first.click()
        expect(opened.value.get_by_text(run_id, exact=True).first).to_be_visible()
        assert f"/runs/{run_id}" in opened.value.url
