"""The report of a search by measurements: effects, the map of the measurements, and what would be measured next."""

import base64
import dataclasses
import io
import json
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from istanas.effects import balanced_design, coded, layout, supports_of
from istanas.search.measured import Measurement, summary_of
from istanas.settings import Fidelity
from istanas.space import CellSpace, Genotype, NasBench201Space, SearchSpace
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.load import load
from pipeline.jobs.context import JobContext
from pipeline.jobs.effects import effects_figures, effects_table
from pipeline.jobs.search import run_search
from pipeline.jobs.search_tables import MEASUREMENTS_COLUMNS
from pipeline.report.effects_section import effects_contents
from pipeline.report.run_page import write_report
from pipeline.runs.directory import RunDir
from pipeline.runs.genotype_file import write_genotype
from tests.pipeline.report.pages import Page

SETTINGS = [
    "method=measured",
    "space={nodes: 1, ops: [skip_connect, max_pool_3x3]}",
    "search={stages: [[4, 1], [2, 2]], batch_size: 50, init_channels: 2, layers: 3, max_pictures: 60}",
    "search.calibration_batches=1",
    "runtime={threads: 1, device: cpu}",
    "tracking.enabled=false",
]
SPACES: dict[str, SearchSpace] = {"nas_bench_201": NasBench201Space(), "darts": CellSpace()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished search of six measurements."""
    config = load(None, [*SETTINGS, f"runtime.runs_dir={tmp_path_factory.mktemp('runs')}"])
    with Runtime(config.runtime) as runtime:
        result = run_search(JobContext(config, "tiny", Console(file=io.StringIO()), runtime))
    return RunDir(result["run_dir"])


@pytest.fixture(scope="module", params=SPACES)
def planted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, run: RunDir) -> RunDir:
    """The search, with the tables of 60 measurements with planted effects in a space of published size."""
    space = SPACES[request.param]
    copy = RunDir(tmp_path_factory.mktemp("runs") / "planted")
    copy.path.mkdir()
    for file in run.path.iterdir():
        if file.is_file():
            (copy.path / file.name).write_bytes(file.read_bytes())
    rng = np.random.default_rng(0)
    effects = np.zeros(layout(space).n_candidates)
    effects[[3, -1]] = 3.0
    kept = balanced_design(space, 60, seed=0)
    losses = np.exp(-coded(space, kept) @ effects - 0.1 * rng.standard_normal(60))
    losses[7] = np.inf
    fidelities = [Fidelity(8, 3)] * 40 + [Fidelity(17, 1)] * 20
    measurements = [Measurement(*each, 0.5) for each in zip(kept, fidelities, losses.tolist(), strict=True)]
    predicted = -np.log(np.where(np.isfinite(losses), losses, 1e3)) + rng.standard_normal(60)
    rows = [
        (
            *(i + 1, "", " ".join(map(str, m.kept)), m.fidelity.epochs, m.fidelity.layers, m.loss, m.top1),
            *("" if i < 2 else predicted[i], 0.5),
        )
        for i, m in enumerate(measurements)
    ]
    pd.DataFrame(rows, columns=MEASUREMENTS_COLUMNS).to_csv(copy.path / "measurements.csv", index=False)
    summary = summary_of(space, measurements, seed=0)
    assert summary is not None
    (copy.path / "effects.csv").write_text(effects_table(space, summary))
    genotype = space.genotype(supports_of(space, summary.best))
    write_genotype(copy.path, genotype)
    record = run.read()
    figures = json.loads(json.dumps(effects_figures(space, summary, 60)))
    result = {**record.result, "genotype": genotype.to_dict(), "effects": figures}
    copy.write(dataclasses.replace(record, result=result))
    write_report(copy)
    return copy


def contents_of(run: RunDir) -> dict[str, Any]:
    return effects_contents(run, run.read())


def test_the_section_is_part_of_a_report_that_loads_nothing(run: RunDir) -> None:
    page = Page(run.path / "report.html")
    page.check_loads_nothing()
    page.check_ids()
    assert page.sections.index("effects") == page.sections.index("cells") + 1
    assert page.files == ["trajectory.html", "measurements.csv", "effects.csv"]
    assert "The accuracies belong to that architecture, not to the result." in page.text
    assert "validation top-1" not in page.text
    before = page.source
    write_report(run)
    assert Page(run.path / "report.html").source == before


def test_choices_are_told_apart_in_sentences(planted: RunDir) -> None:
    figures = planted.read().result["effects"]
    certain, likely, toss_ups, improvement, sparse = contents_of(planted)["sentences"]
    assert certain.startswith("Certain (at least 95 %): ")
    for sentence, n in (
        (certain, figures["certain"]),
        (likely, figures["choices"] - figures["certain"] - figures["toss_ups"]),
        (toss_ups, figures["toss_ups"]),
    ):
        assert sentence.count("node ") - sentence.count(" ← node") == n
    assert f"{figures['expected_improvement']:.2f} standard deviations" in improvement
    nonzero = (pd.read_csv(planted.path / "effects.csv")["lasso"] != 0).sum()
    assert f"keeps {nonzero} of {len(pd.read_csv(planted.path / 'effects.csv'))} effects" in sparse
    page = Page(planted.path / "report.html")
    for sentence in (certain, likely, toss_ups, improvement, sparse):
        assert sentence in page.text


def test_every_candidate_has_an_interval_and_a_row_of_the_map(planted: RunDir) -> None:
    page, effects = Page(planted.path / "report.html"), pd.read_csv(planted.path / "effects.csv")
    intervals = [line for line in page.all("line") if line.get("class") == "interval"]
    assert len(intervals) == len(effects)
    widths = np.array([float(line["x2"]) - float(line["x1"]) for line in intervals])
    expected = (effects["high"] - effects["low"]).to_numpy()
    np.testing.assert_allclose(widths / widths.max(), expected / expected.max(), atol=0.001)
    assert [line["stroke"] == "#0b5fa5" for line in intervals] == effects["kept"].tolist()
    assert sum(line.get("class") == "lasso" for line in page.all("line")) == (effects["lasso"] != 0).sum()
    # The names of neighbouring rows do not touch.
    ys = np.array([float(line["y1"]) for line in intervals])
    assert (np.diff(ys)[np.diff(ys) > 0] >= 14).all()


def pixels_of(page: Page) -> np.ndarray:
    """Return the pixels of all maps, one row for each candidate."""
    found = re.findall(r'href="data:image/png;base64,([^"]+)"', page.source)
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in found]
    return np.concatenate(pictures)


def test_the_map_has_the_kept_candidates_coloured_by_their_loss(planted: RunDir) -> None:
    measurements = pd.read_csv(planted.path / "measurements.csv")
    pixels = pixels_of(Page(planted.path / "report.html"))
    kept = np.zeros(pixels.shape[:2], dtype=bool)
    for column, text in enumerate(measurements["candidates"]):
        kept[[int(number) for number in text.split()], column] = True
    np.testing.assert_array_equal((pixels < 255).any(2), kept)
    brightness = np.array([pixels[kept[:, c], c].sum(1).mean() for c in range(len(measurements))])
    assert (pixels[kept[:, 7], 7] == (179, 64, 14)).all(), "a diverged training is orange"
    for epochs in (3, 1):
        own = (measurements["epochs"] == epochs).to_numpy() & np.isfinite(measurements["loss"]).to_numpy()
        order = np.argsort(measurements["loss"][own])
        assert (np.diff(brightness[own][order]) >= 0).all(), "a smaller loss is darker"


def test_predictions_have_a_correlation_for_each_stage(planted: RunDir) -> None:
    first, second = contents_of(planted)["correlations"]
    figures = r"Kendall's tau 0\.\d\d \(-?0\.\d\d to 0\.\d\d\)"
    assert re.fullmatch(f"38 measurements of 3 epochs of 8 layers: {figures}", first)
    assert re.fullmatch(f"20 measurements of 1 epoch of 17 layers: {figures}", second)


def test_next_measurements_differ_from_the_result_as_described(planted: RunDir) -> None:
    result = planted.read().result
    effects = pd.read_csv(planted.path / "effects.csv")
    best = set(effects.index[effects["kept"]])
    rows = contents_of(planted)["following"]
    assert len(rows) == 5
    for row, each in zip(rows, result["effects"]["next"], strict=True):
        parts = [part for part in row["differences"].split("; ") if " instead of " in part]
        added = [pick for part in parts for pick in part.split(": ")[1].split(" instead of ")[0].split(", ")]
        assert len(added) == len(set(each["candidates"]) - best)
        assert row["score"] == f"{each['predicted']:.2f} ± {each['deviation']:.2f}"
        assert row["differences"] in Page(planted.path / "report.html").text
    has_text = Genotype.from_dict(result["genotype"]).space == "nas_bench_201"
    assert ("architecture differs from the result by" in Page(planted.path / "report.html").text) == has_text


def test_a_few_measurements_have_no_rank_correlation(run: RunDir) -> None:
    assert contents_of(run)["correlations"] == [
        "2 measurements of 1 epoch: no rank correlation",
        "2 measurements of 2 epochs: no rank correlation",
    ]
