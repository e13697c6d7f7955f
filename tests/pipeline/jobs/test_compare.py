"""The comparison of small real runs: figures, differing settings, the page and the picture."""

import html
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup
from PIL import Image
from rich.console import Console

from istanas.errors import ConfigError
from istanas.space import CellSpace, Genotype, random_genotype
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.jobs.compare import (
    TRAINED,
    UNTRAINED,
    CompareResult,
    differing_settings,
    print_comparison,
    run_compare,
)
from pipeline.jobs.context import JobContext
from pipeline.jobs.run import run_whole
from pipeline.jobs.search import run_search
from pipeline.report.compare_page import Curves, render_page
from pipeline.report.run_reader import ReadRun, read_run
from pipeline.runs.directory import RunDir
from pipeline.runs.record import MetricsLine

pytestmark = pytest.mark.slow  # because of the runs

TINY = [
    "space.nodes=2",
    "retrain={epochs: 2, batch_size: 256, init_channels: 2, layers: 2, auxiliary_weight: 0, cutout: 0}",
    "runtime={threads: 1, device: cpu}",
    "tracking.models=false",
]
TWO_STAGE = "search={epochs: 2, batch_size: 64, init_channels: 2, layers: 3, max_pictures: 200, arch_lr: 0.1}"
ONE_STAGE = (
    "search={max_search_epochs: 1, train_epochs: 2, batch_size: 256, init_channels: 2, layers: 3, cutout: 0, "
    "auxiliary_weight: 0}"
)
GENOTYPE = random_genotype(0, CellSpace(n_nodes=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


def config_of(folder: Path, *overrides: str) -> Config:
    where = [f"runtime.runs_dir={folder / 'runs'}", f"tracking.uri=sqlite:///{folder}/mlflow.db"]
    return load(None, [*TINY, *where, *overrides])


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, dict[str, Any]]:
    """A search with its retraining, a search without one, and a one-stage search."""
    results: dict[str, dict[str, Any]] = {}
    for name, job, settings in (
        ("first", run_whole, [TWO_STAGE]),
        ("second", run_search, [TWO_STAGE, "seed=1", "search.lr=0.05"]),
        ("single", run_search, [ONE_STAGE, "method=one_stage"]),
    ):
        config = config_of(folder, *settings)
        console = Console(file=io.StringIO())
        with Runtime(config.runtime) as runtime:
            results[name] = job(JobContext(config, name, console, runtime))  # type: ignore[operator]
    return results


def compare(folder: Path, *references: str, out: Path, width: int = 80) -> tuple[CompareResult, str]:
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    return run_compare(config_of(folder), references, out=out, console=console), stream.getvalue()


@pytest.fixture(scope="module")
def compared(folder: Path, runs: dict[str, dict[str, Any]]) -> tuple[CompareResult, str, Path]:
    """The comparison of all four runs, with every kind of reference to a run."""
    references = (
        runs["first"]["run_dir"],
        runs["second"]["mlflow_run_id"],
        "first-retrain",
        Path(runs["single"]["run_dir"]).name,
    )
    out = folder / "deep" / "compare"
    return *compare(folder, *references, out=out), out


def test_figures_are_those_of_the_runs(
    compared: tuple[CompareResult, str, Path], runs: dict[str, dict[str, Any]]
) -> None:
    first, second, retrained, single = compared[0]["runs"]
    assert [row["run_dir"] for row in (first, second, retrained, single)] == [
        runs["first"]["run_dir"],
        runs["second"]["run_dir"],
        runs["first"]["retrain_run_dir"],
        runs["single"]["run_dir"],
    ]
    for row, name in ((first, "first"), (second, "second"), (single, "single")):
        for key in ("digest", "params", "macs", "mlflow_run_id"):
            assert row[key] == runs[name][key], (name, key)  # type: ignore[literal-required]
    assert second["valid_top1"] == runs["second"]["valid_top1"]
    assert retrained["test_top1"] == runs["first"]["test_top1"]
    assert single["test_top1"] == runs["single"]["test_top1"]
    assert (first["test_top1"], retrained["valid_top1"]) == (None, None)
    assert [row["epochs"] for row in (first, second, retrained, single)] == [2, 2, 2, 4]
    assert {row["status"] for row in (first, second, retrained, single)} == {"FINISHED"}


def test_latency_is_measured_and_says_of_what(compared: tuple[CompareResult, str, Path]) -> None:
    result, seen, _ = compared
    assert [row["latency_of"] for row in result["runs"]] == [UNTRAINED, UNTRAINED, TRAINED, TRAINED]
    assert all(0 < (row["latency_seconds"] or 0) < 10 for row in result["runs"])
    assert result["threads"] == 1
    assert "on this CPU, 1 thread" in seen
    assert seen.count(" ms*") == 2


def test_settings_differ_only_among_runs_that_depend_on_them(
    compared: tuple[CompareResult, str, Path],
) -> None:
    differing = compared[0]["differing"]
    assert differing["seed"] == ["0", "1", "0", "0"]
    assert differing["search.lr"] == ["0.1", "0.05", None, "0.025"]
    assert differing["search.epochs"] == ["2", "2", None, None]  # of one method only
    assert not [key for key in differing if key.startswith(("retrain.", "data.", "space."))]
    same = [read(run_dir) for run_dir in (compared[0]["runs"][0]["run_dir"],) * 2]
    assert differing_settings(same) == {}


def read(ref: str | None) -> ReadRun:
    assert ref is not None
    return read_run(ref, runs_dir=Path("nowhere"), tracking_uri=None, scratch=Path("nowhere"))


def test_the_terminal_shows_it_in_80_columns(compared: tuple[CompareResult, str, Path]) -> None:
    result, seen, out = compared
    tables = seen[: seen.index("latency: one")]
    sentences = ("Validation accuracy ",)  # which the terminal wraps
    assert max(len(line) for line in tables.splitlines() if not line.startswith(sentences)) <= 80
    assert f"{result['runs'][0]['params']:,}" in tables
    assert "search.lr" in tables
    assert str(out / "compare.html") in seen
    quiet = io.StringIO()
    print_comparison({**result, "differing": {}}, Console(file=quiet, width=80))
    assert "all shared settings are equal" in quiet.getvalue()


def test_the_page_needs_nothing_else_and_shows_every_cell_once(
    compared: tuple[CompareResult, str, Path],
) -> None:
    result, _, out = compared
    assert sorted(path.name for path in out.iterdir()) == ["compare.html", "compare.png"]
    page = (out / "compare.html").read_text()
    assert not re.findall(r"(?:src|href)=[\"'](?!#|data:)[^\"']*", page.replace("xlink:href", "href"))
    assert "<script" not in page
    assert "url(http" not in page
    assert "prefers-color-scheme: dark" in page
    digests = {row["digest"] for row in result["runs"]}
    assert page.count("<figure") == len(digests)  # the retraining's are the search's
    assert page.count("<svg") == 1 + 2 * len(digests)
    for row in result["runs"]:
        assert row["run"] in page
        assert f"{row['params']:,}" in page
    genotype = Genotype.from_json((Path(result["runs"][0]["run_dir"] or "") / "genotype.json").read_text())
    drawn = page[page.index("<figure") : page.index("</figure>")]
    for op, _ in genotype.normal[0]:
        assert op in drawn


def test_the_picture_holds_table_curves_and_cells(compared: tuple[CompareResult, str, Path]) -> None:
    with Image.open(compared[2] / "compare.png") as picture:
        assert picture.format == "PNG"
        assert picture.width >= 1600, "two cells stand side by side"
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24) or []}
        lines = picture.convert("RGB").crop((0, 0, picture.width, 120)).getcolors(2**24) or []
    assert (0xD9, 0xDD, 0xE3) in {colour for _, colour in lines}, "the table's lines, above all else"
    box = "fdf3d1"  # of a node in a cell
    for colour in ("0072b2", "d55e00", "009e73", "aa4499", box):
        assert tuple(bytes.fromhex(colour)) in colours


def test_a_run_whose_directory_is_elsewhere_comes_from_the_store(
    folder: Path, runs: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    ids = [runs["first"]["mlflow_run_id"], runs["first"]["retrain_run_id"], runs["single"]["mlflow_run_id"]]
    here, _ = compare(folder, *ids, out=tmp_path / "here")
    moved = shutil.move(folder / "runs", folder / "away")
    try:
        there, _ = compare(folder, *ids, out=tmp_path / "there")
        with pytest.raises(ConfigError, match="no such run"):
            compare(folder, ids[0], "0" * 32, out=tmp_path)
    finally:
        shutil.move(moved, folder / "runs")
    for a, b in zip(here["runs"], there["runs"], strict=True):
        assert b["run_dir"] is None
        changed = {"run_dir", "latency_seconds"}
        assert {k: v for k, v in a.items() if k not in changed} == {
            k: v for k, v in b.items() if k not in changed
        }
        assert b["latency_seconds"] is not None
        assert b["latency_seconds"] > 0
    assert there["differing"] == here["differing"]


def test_what_cannot_be_compared_is_refused(
    folder: Path, runs: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    first, run_id = runs["first"]["run_dir"], runs["first"]["mlflow_run_id"]
    with pytest.raises(ConfigError, match="is given twice"):
        compare(folder, first, run_id, out=tmp_path)
    with pytest.raises(ConfigError, match="'frist': unknown"):
        compare(folder, first, "frist", out=tmp_path)
    sweep = RunDir(shutil.copytree(first, tmp_path / "sweep"))
    record = json.loads((sweep.path / "run.json").read_text())
    (sweep.path / "run.json").write_text(json.dumps({**record, "kind": "sweep"}))
    with pytest.raises(ConfigError, match="is a sweep, not a run; compare its trials"):
        compare(folder, first, str(sweep.path), out=tmp_path)
    assert not list(tmp_path.glob("compare.*"))


def test_missing_parts_of_a_run_are_empty_and_have_a_note(
    folder: Path, runs: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """The runs: one that has just begun, one with a damaged network, one with pictures on another machine."""
    young, broken, foreign = (
        Path(shutil.copytree(runs[name][key], tmp_path / copy))
        for name, key, copy in (
            ("second", "run_dir", "young"),
            ("single", "run_dir", "broken"),
            ("second", "run_dir", "foreign"),
        )
    )
    record = json.loads((young / "run.json").read_text())
    (young / "run.json").write_text(json.dumps({**record, "status": "RUNNING", "dataset": "cifar10"}))
    for name in ("genotype.json", "metrics.jsonl"):
        (young / name).unlink()
    (broken / "model.safetensors").write_bytes(b"torn")
    config = (foreign / "config.yaml").read_text()
    (foreign / "config.yaml").write_text(
        config.replace("name: digits", "name: folder").replace("root: null", "root: /nowhere")
    )
    result, seen = compare(folder, str(young), str(broken), str(foreign), out=tmp_path)
    begun, torn, elsewhere = result["runs"]
    assert (begun["digest"], begun["params"], begun["valid_top1"], begun["epochs"]) == (None, None, None, 0)
    assert [row["latency_seconds"] for row in (begun, torn, elsewhere)] == [None] * 3
    assert torn["test_top1"] == runs["single"]["test_top1"]
    assert "young (RUNNING), cifar10" in " ".join(seen.split())
    for note in (
        "the runs are on different data sets",
        "not finished: 1 is RUNNING",
        "latency of 2: not measured",
        "latency of 3: not measured",
    ):
        assert note in seen
        assert note in (tmp_path / "compare.html").read_text()
    assert "no genotype yet" in (tmp_path / "compare.html").read_text()


def test_a_name_is_escaped_on_the_page() -> None:
    name = "<script>alert('x')</script>"
    rows = [["1", name, "", "", "", "", "", "", ""]]
    page = render_page(
        ["", "run"], rows, {"search.lr": [name]}, [name], [GENOTYPE], Curves(b"", Markup("<svg></svg>"))
    )
    assert "<script" not in page
    assert page.count(html.escape(name, quote=False).replace("'", "&#39;")) == 4


def test_lines_of_one_epoch_are_merged(tmp_path: Path, runs: dict[str, dict[str, Any]]) -> None:
    """An export appends its figures as another line of the last epoch."""
    run = RunDir(shutil.copytree(runs["single"]["run_dir"], tmp_path / "run"))
    run.append_metrics(4, {"export/onnx_difference": 0.0}, 1)
    lines = read(str(run.path)).lines
    assert [line.step for line in lines] == [1, 2, 3, 4]
    assert lines[-1].metrics.keys() >= {"train/loss", "export/onnx_difference"}
    assert isinstance(lines[-1], MetricsLine)
