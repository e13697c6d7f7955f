"""The page of a search, epoch by epoch, shows the tables of the run directory."""

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from istanas.draw import edge_widths
from istanas.space import PRIMITIVES, CellSpace
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.load import load
from pipeline.jobs.context import JobContext
from pipeline.jobs.search import run_search
from pipeline.jobs.search_tables import CODES_COLUMNS, TRAJECTORY_COLUMNS, codes_rows, trajectory_rows
from pipeline.report.trajectory_page import write_trajectory_page
from pipeline.runs.directory import RunDir
from tests.pipeline.report.pages import Page
from tests.pipeline.training.made_up import record_of

TINY = [
    "space.nodes=2",
    "search={epochs: 3, batch_size: 64, init_channels: 2, layers: 3, max_pictures: 200, arch_lr: 0.1}",
    "runtime={threads: 1, device: cpu}",
    "tracking.enabled=false",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished two-stage search of three epochs."""
    config = load(None, [*TINY, f"runtime.runs_dir={tmp_path_factory.mktemp('runs')}"])
    with Runtime(config.runtime) as runtime:
        console = Console(file=io.StringIO())
        result = run_search(JobContext(config, "tiny", console, runtime))
    return RunDir(result["run_dir"])


@pytest.fixture
def copy(run: RunDir, tmp_path: Path) -> RunDir:
    """A copy of the search."""
    return RunDir(shutil.copytree(run.path, tmp_path / "copy"))


def page_of(run: RunDir) -> Page:
    return Page(run.path / "trajectory.html")


def data_of(page: Page) -> dict[str, Any]:
    return json.loads(page.scripts[0])


def test_it_loads_nothing_and_all_sections_are_there(run: RunDir) -> None:
    page = page_of(run)
    page.check_loads_nothing()
    page.check_ids()
    assert page.sections == ["cells", "nodes", "curves", "codes"]
    # The slider's epoch is marked in four charts and on the codes of four nodes.
    assert len([a for _, a in page.tags if a.get("class") == "cursor"]) == 8
    assert "tiny-search: epoch by epoch" in page.text
    assert "Two-stage search on digits" in page.text


def test_the_slider_has_the_epochs_and_a_label(run: RunDir) -> None:
    page = page_of(run)
    (slider,) = (field for field in page.all("input") if field["type"] == "range")
    assert (slider["min"], slider["max"], slider["step"], slider["value"]) == ("0", "3", "1", "3")
    assert [label["for"] for label in page.all("label")] == [slider["id"]]
    assert page.all("output")[0]["aria-live"] == "polite"
    data = data_of(page)
    assert {len(data[name]) for name in ("cells", "widths", "summaries", "rows")} == {4}
    assert data["summaries"][3] in page.text  # Without the script, the page shows the last epoch.


def test_cells_widths_and_figures_are_those_of_the_trajectory(run: RunDir) -> None:
    page, frame = page_of(run), pd.read_csv(run.path / "trajectory.csv")
    data, n_cells = data_of(page), 0
    labels = {
        int(box["data-cell"]): svg["aria-label"]
        for (_, box), (tag, svg) in zip(page.tags, page.tags[1:], strict=False)
        if "data-cell" in box and tag == "svg"
    }
    keeps_of: dict[int, set[str]] = {}
    for epoch, rows in frame.groupby("epoch"):
        assert isinstance(epoch, int)
        for place, cell in enumerate(("normal", "reduce")):
            of_cell = rows[rows["cell"] == cell].to_dict("records")
            number = data["cells"][epoch][place]
            assert labels[number].startswith(f"{cell} cell: ")
            keeps = [frozenset(row["picks"].split()) for row in of_cell]
            keeps_of.setdefault(number, set()).add(str([sorted(kept) for kept in keeps]))
            weights = [[float(w) for w in row["edge_weights"].split()] for row in of_cell]
            widths = [width for row in edge_widths(weights) for width in row]
            assert sorted(data["widths"][epoch][place]) == pytest.approx(sorted(widths), abs=0.006)
        for row, shown in zip(rows.to_dict("records"), data["rows"][epoch], strict=True):
            assert shown[0] is row["changed"]
            assert shown[3:] == [f"{row[name]:.2g}" for name in ("distance", "gap", "truncation", "margin")]
            for pick, weight in zip(row["picks"].split(), row["edge_weights"].split(), strict=True):
                op, state = pick.split("<-")
                name = ("c(k-2)", "c(k-1)", "node 0")[int(state)]
                assert f"{op} ← {name} ({float(weight):.2g})" in shown[1]
        n_cells += 2
    assert all(len(cells) == 1 for cells in keeps_of.values())  # one drawing, one cell
    assert len(labels) == len(keeps_of) == len({cells.copy().pop() for cells in keeps_of.values()})
    assert len(labels) <= n_cells
    lines = {line.step: line.metrics["arch/skip_ratio"] for line in run.metrics()}
    for epoch, ratio in lines.items():
        assert f"skip ratio {100 * ratio:.2f} %" in data["summaries"][epoch]
    for epoch, smallest in frame.groupby("epoch")["margin"].min().items():
        assert data["summaries"][epoch].endswith(f"; smallest margin {smallest:.2g}.")


def test_a_trajectory_without_margins_has_a_page(copy: RunDir) -> None:
    file = copy.path / "trajectory.csv"
    frame = pd.read_csv(file)
    for older in (frame.drop(columns="margin"), frame.assign(margin=None)):
        older.to_csv(file, index=False)
        write_trajectory_page(copy)
        page = page_of(copy)
        data = data_of(page)
        assert all(row[-1] == "–" for rows in data["rows"] for row in rows)  # noqa: RUF001
        assert not any("margin" in summary for summary in data["summaries"])
        assert "an earlier version, which made this run, did not record it" in page.text


def test_the_heat_map_has_a_pixel_for_every_candidate_and_epoch(run: RunDir) -> None:
    page, codes = page_of(run), pd.read_csv(run.path / "codes.csv")
    kept = pd.read_csv(run.path / "trajectory.csv").set_index(["epoch", "cell", "node"])["picks"]
    pictures = page.all("image")
    assert len(pictures) == 4  # two cells of two nodes
    places = [(cell, node) for cell in ("normal", "reduce") for node in (0, 1)]
    for picture, (cell, node) in zip(pictures, places, strict=True):
        with Image.open(io.BytesIO(_decoded(picture["href"]))) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=int)
        names = [(state, op) for state in range(node + 2) for op in PRIMITIVES]
        assert pixels.shape == (len(names), 4, 3)
        for epoch in range(4):
            blue = {
                f"{op}<-{state}"
                for (state, op), p in zip(names, pixels[:, epoch], strict=True)
                if p[2] > p[0] + 8
            }
            assert blue == set(kept[epoch, cell, node].split())
            rows = codes[(codes["epoch"] == epoch) & (codes["cell"] == cell) & (codes["node"] == node)]
            others = [not {f"{op}<-{state}"} & blue for state, op in names]
            darkness, magnitude = 765 - pixels[others, epoch].sum(-1), rows["magnitude"].to_numpy()[others]
            assert (np.diff(darkness[np.argsort(magnitude)]) >= 0).all()


def test_hostile_names_are_text(copy: RunDir) -> None:
    record = copy.read()
    copy.write(dataclasses.replace(record, name="</title><script>alert(1)</script>", dataset="<img src=x>"))
    before = len(page_of(copy).all("script"))
    write_trajectory_page(copy)
    page = page_of(copy)
    page.check_loads_nothing()
    assert len(page.all("script")) == before
    assert page.all("img") == []
    assert "</title><script>alert(1)</script>: epoch by epoch" in page.text
    assert "<img src=x>" in page.text.lower()


def test_a_page_written_again_is_identical(run: RunDir) -> None:
    file = run.path / "trajectory.html"
    first = file.read_bytes()
    file.unlink()
    write_trajectory_page(run)
    assert file.read_bytes() == first


def test_a_run_without_codes_has_a_page_that_says_so(copy: RunDir) -> None:
    (copy.path / "codes.csv").unlink()
    write_trajectory_page(copy)
    page = page_of(copy)
    assert page.all("image") == []
    assert "Not available: an earlier version, which made this run, did not record the codes." in page.text


@pytest.mark.slow
def test_fifty_epochs_of_eight_nodes_stay_below_two_megabytes(copy: RunDir) -> None:
    space = CellSpace()
    records = [record_of(epoch, space) for epoch in range(1, 51)]
    rows = [row for record in records for row in trajectory_rows(record)]
    pd.DataFrame(rows, columns=TRAJECTORY_COLUMNS).to_csv(copy.path / "trajectory.csv", index=False)
    codes = [row for record in records for row in codes_rows(record, space, {})]
    pd.DataFrame(codes, columns=CODES_COLUMNS).to_csv(copy.path / "codes.csv", index=False)
    four = [[["skip_connect", 0], ["skip_connect", 1]]] * 4
    genotype = {
        "version": 1,
        "normal": four,
        "normal_concat": [2, 3, 4, 5],
        "reduce": four,
        "reduce_concat": [2, 3, 4, 5],
    }
    (copy.path / "genotype.json").write_text(json.dumps(genotype))
    write_trajectory_page(copy)
    page = page_of(copy)
    page.check_ids()
    assert len({number for cells in data_of(page)["cells"] for number in cells}) == 102
    assert len(page.source.encode()) < 2_000_000


def _decoded(address: str) -> bytes:
    import base64

    head, _, data = address.partition(",")
    assert head == "data:image/png;base64"
    return base64.b64decode(data)
