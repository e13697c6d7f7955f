"""`istanas rank`: judges with planted orders, and real measurements on the digits."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from istanas.distributed import Ranks
from istanas.effects.coding import supports_of
from istanas.errors import ConfigError
from istanas.search.measured import MeasuredSearch
from istanas.space.nas_bench_201 import NasBench201Space
from pipeline.cli.commands import run
from pipeline.config.load import load
from pipeline.jobs.rank import TRUTH, Judgement, draw, evaluate, short_epochs
from pipeline.runs.directory import RunDir
from pipeline.training.compute import compute_for
from pipeline.training.epochs import SearchJob
from pipeline.training.judges import ShortTrainings
from pipeline.training.pictures import open_dataset, settle_stems
from tests.pipeline.report.pages import Page

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CONFIG = """
method: random_nas
data: {holdout: 0.2, crop_padding: 1}
space: {name: nas_bench_201, ops: [skip_connect, nor_conv_3x3], n_measurements: 2}
search: {epochs: 1, batch_size: 64, init_channels: 2, layers: 5, max_pictures: 256, candidates: 2}
retrain: {epochs: 2, batch_size: 256, init_channels: 2, layers: 5, auxiliary_weight: 0, drop_path: 0, cutout: 0}
runtime: {threads: 1, device: cpu, runs_dir: runs}
tracking: {enabled: false}
"""
SHARED = [f"shared weights, {each} statistics" for each in ("running", "batch", "recalibrated")]


def of_method(name: str, keys: str) -> str:
    """The configuration with another method, and with these keys of its search."""
    text = CONFIG.replace("random_nas", name).replace("epochs: 1, ", "", 1).replace(", candidates: 2", "")
    return text.replace("max_pictures: 256", f"max_pictures: 256, {keys}" if keys else "max_pictures: 256")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "measured.yaml").write_text(of_method("measured", "stages: [[2, 1]]"))
    (tmp_path / "random.yaml").write_text(of_method("random", ""))
    return tmp_path


def rank(*more: str) -> int:
    return run(["rank", "--config", "tiny.yaml", "--cells", "6", *more])


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def rows(judge: str, scores: Any, seconds: float) -> list[Judgement]:
    return [
        {
            "cell": n + 1,
            "digest": str(n),
            "architecture": "",
            "judge": judge,
            "score": float(s),
            "seconds": seconds,
        }
        for n, s in enumerate(scores)
    ]


# ---------- planted orders
def test_a_planted_order_is_found_and_an_absent_one_is_not() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=40)
    planted = [
        *rows(TRUTH, true, 100.0),
        *rows("good", true + 0.3 * rng.normal(size=40), 10.0),
        *rows("fast", true + 1.0 * rng.normal(size=40), 1.0),
        *rows("none", rng.normal(size=40), 1.0),
    ]
    figures = evaluate(planted, "planted", 0.0)
    good, fast, none = figures["judges"]
    assert good["tau"]["estimate"] > fast["tau"]["estimate"] > none["tau"]["estimate"]
    assert good["tau"]["low"] > 0
    assert none["tau"]["low"] < 0 < none["tau"]["high"]
    assert good["precision"] > none["precision"]
    assert (figures["cells"], figures["top"], figures["truth_seconds"]) == (40, 8, 100.0)
    first, second = figures["sentences"]
    assert first.startswith("The most information per second comes from: fast (tau 0.")
    assert "no order better than chance was found for: none." in second


def test_the_time_of_a_search_is_shared_by_the_cells() -> None:
    scores = np.arange(10.0)
    name = SHARED[0]
    (judge,) = evaluate([*rows(TRUTH, scores[::-1], 1.0), *rows(name, scores[::-1] % 7, 2.0)], "", 80.0)[
        "judges"
    ]
    assert judge["seconds_once"] == 80.0
    assert judge["information_per_second"] == pytest.approx(judge["information"] / (2.0 + 80.0 / 10))


def test_a_diverged_training_has_the_lowest_score() -> None:
    scores = np.arange(8.0)
    diverged = [-math.inf, *scores[1:]]
    (judge,) = evaluate([*rows(TRUTH, scores, 1.0), *rows("short", diverged, 1.0)], "", 0.0)["judges"]
    assert judge["tau"]["estimate"] == pytest.approx(1.0)
    assert math.isfinite(judge["information_per_second"])  # JSON has no infinity


def test_a_judge_whose_trainings_have_all_diverged_says_nothing() -> None:
    diverged = [-math.inf] * 8
    figures = evaluate([*rows(TRUTH, np.arange(8.0), 1.0), *rows("short", diverged, 1.0)], "", 0.0)
    assert figures["judges"][0]["tau"] is None


def test_a_diverged_retraining_has_the_lowest_score(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rate lets retrainings diverge, and the command still compares the judges."""
    assert rank("--set", "retrain.lr=1e30", "--set", "retrain.grad_clip=null", "--epochs", "1", "--json") == 0
    result = printed(capsys)
    scores = {row["score"] for row in result["judgements"] if row["judge"] == TRUTH}
    assert scores == {None}
    assert result["judges"][-1]["tau"] is None


def test_a_fresh_comparison_leaves_finished_runs_as_they_are(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rank("--epochs", "1", "--json") == 0
    before = {
        path: (path / "run.json").read_bytes() for path in Path("runs").iterdir() if "-rank-" not in path.name
    }
    assert rank("--epochs", "1", "--fresh", "--json") == 0
    assert {path: (path / "run.json").read_bytes() for path in before} == before
    capsys.readouterr()


def test_equal_scores_have_no_correlation() -> None:
    figures = evaluate([*rows(TRUTH, np.arange(8.0), 1.0), *rows("short", np.ones(8), 1.0)], "", 0.0)
    assert figures["judges"][0]["tau"] is None
    assert figures["judges"][0]["information"] == 0
    assert figures["sentences"] == ["All cells have the same score or the same true accuracy for: short."]


# ---------- real measurements
def test_shared_weights_and_short_retrainings_are_compared_and_resumed(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rank("--json") == 0
    result = printed(capsys)
    assert [judge["judge"] for judge in result["judges"]] == [*SHARED, "retraining of 1 epoch"]
    assert result["truth"] == "test accuracy after 2 epochs"
    folder = RunDir(Path(result["run_dir"])).path
    table = pd.read_csv(folder / "rank.csv")
    assert len(table) == 6 * 5
    assert table.groupby("judge")["cell"].nunique().eq(6).all()
    short = table[table["judge"] == "retraining of 1 epoch"].sort_values("cell")
    found = {path.name for path in Path("runs").iterdir()}
    assert sum("-retrain-" in name for name in found) == 12
    results = [RunDir(Path("runs") / name).read().result for name in found if "-retrain-" in name]
    accuracies = {(each["digest"], each["valid_top1"]) for each in results}
    assert {(row.digest, row.score) for row in short.itertuples()} <= accuracies
    page = Page(folder / "rank.html")
    assert "Scores of the cells" in page.text

    # An unfinished comparison repeats neither a retraining nor a measurement that is in its table.
    record = RunDir(folder).read()
    before = (folder / "rank.csv").read_bytes()
    (folder / "run.json").write_text((folder / "run.json").read_text().replace('"FINISHED"', '"RUNNING"'))
    assert RunDir(folder).read().status == "RUNNING"
    assert rank("--json") == 0
    assert printed(capsys)["judges"] == record.result["judges"]
    assert (folder / "rank.csv").read_bytes() == before


def test_a_finished_search_is_compared_with_a_table(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The supernet is that of the run, which is not searched again. A table needs no retraining."""
    assert run(["search", "--config", "tiny.yaml", "--json"]) == 0
    search = printed(capsys)
    space = NasBench201Space(ops=("skip_connect", "nor_conv_3x3"))
    texts = sorted({str(space.text(space.random(seed))) for seed in range(2000)})
    table = "\n".join(["architecture,accuracy", *(f"{text},{50 + n / 2}" for n, text in enumerate(texts))])
    (project / "table.csv").write_text(table + "\n")
    assert run(["rank", search["run_dir"], "--cells", "7", "--table", "table.csv", "--json"]) == 0
    result = printed(capsys)
    assert [judge["judge"] for judge in result["judges"]] == SHARED
    assert result["truth"] == "accuracy of the table"
    assert result["truth_seconds"] is None
    true = {row["architecture"]: row["score"] for row in result["judgements"] if row["judge"] == TRUTH}
    assert true == {text: pytest.approx((50 + texts.index(text) / 2) / 100) for text in true}
    assert result["judges"][0]["seconds_once"] == pytest.approx(search["seconds"])
    assert sorted(path.name.split("-")[1] for path in Path("runs").iterdir()) == ["rank", "search"]


def test_measurements_are_those_of_the_search(project: Path) -> None:
    """A measurement equals the first one of a search with the same architecture, bit for bit."""
    config = settle_stems(load(project / "measured.yaml"))
    dataset, compute = open_dataset(config, ("search",)), compute_for(config.runtime)
    job = SearchJob(config, dataset, compute, Ranks.current(compute.device))
    assert isinstance(job.search, MeasuredSearch)
    first = job.search.current.kept
    job.run_epoch(0, lambda *_: None, 1.0)
    space = config.space.build()
    judge = ShortTrainings(config, dataset)
    ((name, score, _),) = judge.measure(space.genotype(supports_of(space, first)))
    assert name == "measurement of 1 epoch of 5 layers"
    assert score == -job.search.measurements[0].loss


# ---------- bad input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cells", "5"], "--cells: 5 cells say too little about an order; use 6 or more"),
        (["--cells", "65"], "--cells: the space has only 64 architectures; use at most 64"),
        (["--epochs", "2"], "--epochs: 2 is not shorter than the retraining; use 1 to 1"),
        (["--epochs", "1,x"], "'1,x' is not a list such as 1,3,10"),
        (["--epochs", "0"], "0 is not a number of epochs: use 1 or more"),
        (["--column", "a"], "--column: there is no table; give --table, too"),
        (["--table", "none.csv"], "--table none.csv: no such file"),
        (
            ["--set", "data.holdout=0"],
            "data.holdout: 0 leaves no pictures on which short retrainings are compared",
        ),
        (["--set", "retrain.test_every=0"], "retrain.test_every: 0 never tests; use 1 or more"),
        (["--config", "random.yaml", "--epochs", ""], "--epochs: random measures no architectures"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert rank(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists() or not any(Path("runs").iterdir())


def test_the_retraining_of_one_epoch_has_no_shorter_one() -> None:
    config = load(None, ["retrain.epochs=1", "data.holdout=0.1"])
    assert short_epochs(config, None, has_table=False) == []
    assert short_epochs(load(None, ["retrain.epochs=16"]), None, has_table=False) == [2, 4, 8]
    assert short_epochs(config, (3, 1, 3), has_table=True) == [1, 3]


def test_cells_are_different_and_the_same_for_a_seed() -> None:
    config = load(None, ["space.name=nas_bench_201", "space.n_measurements=2"])
    drawn = [each.digest() for each in draw(config, 30)]
    assert len(set(drawn)) == 30
    assert drawn[:10] == [each.digest() for each in draw(config, 10)]
    assert drawn[:10] != [each.digest() for each in draw(config.model_copy(update={"seed": 5}), 10)]
    with pytest.raises(ConfigError, match="only 64 architectures"):
        draw(load(None, ["space.name=nas_bench_201", "space.ops=[skip_connect,nor_conv_3x3]"]), 65)
