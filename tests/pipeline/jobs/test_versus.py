"""`istanas versus`: a search against other methods at equal cost, on the digits and on planted results."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from istanas.space.nas_bench_201 import NasBench201Space
from pipeline.cli.commands import run
from pipeline.config.load import load
from pipeline.jobs import versus
from pipeline.jobs.budget import (
    PROBE_EPOCHS,
    TOLERANCE,
    retraining_epochs,
    search_epochs,
    with_retrain_epochs,
)
from pipeline.jobs.observer import RunObserver
from pipeline.jobs.versus import best_cell, evaluate, metrics_lines
from pipeline.runs.directory import RunDir
from pipeline.tracking.store import open_client
from pipeline.training.epoch_record import load_progress, read_records
from tests.pipeline.report.pages import Page

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# Most digits are in the hold-out, because an epoch of the others takes a moment.
CONFIG = """
data: {crop_padding: 1, holdout: 0.9}
space: {name: nas_bench_201, ops: [skip_connect, nor_conv_3x3], n_measurements: 2}
search: {epochs: 4, batch_size: 64, init_channels: 2, layers: 5, arch_lr: 0.05}
retrain: {epochs: 4, batch_size: 64, init_channels: 2, layers: 5, auxiliary_weight: 0, cutout: 0, test_every: 4}
runtime: {threads: 1, device: cpu, runs_dir: runs}
tracking: {enabled: false}
"""
METHODS = ("two_stage", "random")
ACCURACIES = ("valid_top1", "test_top1")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path


def arguments(*more: str, seeds: int = 2) -> list[str]:
    return ["versus", "--config", "tiny.yaml", "--seeds", str(seeds), *more]


def result(capfd: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    capfd.readouterr()
    code = run([*arguments(*more), "--json"])
    out, err = capfd.readouterr()
    assert code == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def keys(project: Path) -> dict[Path, str]:
    """The identities of all searches and retrainings: a run that was started over has another one."""
    return {
        path: RunDir(path).read().key for path in project.glob("runs/*-[sr]e*-*") if "versus" not in path.name
    }


def epoch_seconds(run_dir: str) -> list[float]:
    folder = Path(run_dir) / "checkpoints"
    return [record.seconds for record in read_records(folder, load_progress(folder))]


def of_run(cells: list[dict[str, Any]], method: str, seed: int) -> list[dict[str, Any]]:
    return [each for each in cells if (each["method"], each["seed"]) == (method, seed)]


def rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def cost(cells: list[dict[str, Any]]) -> float:
    return math.fsum(cell["search_seconds"] + cell["retrain_seconds"] for cell in cells)


def test_a_comparison_that_was_killed_resumes_and_spends_equal_costs(
    project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trial_done = RunObserver.trial_done

    def kill(self: RunObserver, text: str, done: int, *rest: Any) -> None:
        trial_done(self, text, done, *rest)
        if done == 3:  # the configured method's second seed
            raise SystemExit  # as a killed process, it leaves the record as it is

    with monkeypatch.context() as patched:
        patched.setattr(RunObserver, "trial_done", kill)
        with pytest.raises(SystemExit):
            run(arguments())
    said = capfd.readouterr().out
    assert "warning: with 2 seeds and 1 comparison, no difference can be found" in said
    assert "--seeds 6 is the smallest number that can find one" in said
    [folder] = project.glob("runs/*-versus-*")
    assert RunDir(folder).read().status == "RUNNING"
    assert not (folder / "versus.csv").exists()
    begun = keys(project)
    found = result(capfd)
    assert begun.items() <= keys(project).items()

    # ---- each method and seed, with the costs of the runs
    assert Path(found["run_dir"]).name == folder.name
    cells, runs = found["cells"], found["runs"]
    assert [(each["method"], each["seed"]) for each in runs] == [(m, s) for s in (0, 1) for m in METHODS]
    for each in cells:
        search, retrained = (RunDir(Path(each[key])).read() for key in ("search_dir", "retrain_dir"))
        assert (search.method, retrained.params["seed"]) == (each["method"], each["seed"])
        assert retrained.params["retrain.epochs"] == each["retrain_epochs"]
        assert search.result["digest"] == retrained.result["digest"] == each["digest"]
        assert search.result["seconds"] == each["search_seconds"]
        assert retrained.result["seconds"] == each["retrain_seconds"]
        assert [retrained.result[key] for key in ACCURACIES] == [each[key] for key in ACCURACIES]
    for each in runs:
        own, configured = (
            of_run(cells, each["method"], each["seed"]),
            of_run(cells, "two_stage", each["seed"]),
        )
        [chosen] = [cell for cell in own if cell["chosen"]]
        assert each["test_top1"] == chosen["test_top1"]
        assert each["seconds"] == pytest.approx(cost(own))
        assert each["cost_ratio"] == pytest.approx(cost(own) / cost(configured))

    # ---- the first random cell is that of the seed; each next one follows from the seconds before it
    space = NasBench201Space(ops=("skip_connect", "nor_conv_3x3"))
    for seed in (0, 1):
        [configured], own = of_run(cells, "two_stage", seed), of_run(cells, "random", seed)
        assert own[0]["architecture"] == space.text(space.random(seed))
        assert len({each["digest"] for each in own}) == len(own)
        assert own[0]["retrain_epochs"] == 4
        for number in range(1, len(own) + 1):
            slowest = max(
                each["retrain_seconds"] / each["retrain_epochs"] for each in (configured, *own[:number])
            )
            expected = retraining_epochs(cost([configured]), cost(own[:number]), slowest, 4)
            assert expected == (own[number]["retrain_epochs"] if number < len(own) else 0)
        # What is left of the cost is within the tolerance, or less than an epoch.
        assert cost([configured]) - cost(own) <= max(TOLERANCE * cost([configured]), slowest)
        best = max(each["valid_top1"] for each in own)
        assert [each["valid_top1"] for each in own if each["chosen"]] == [best]

    # ---- files
    assert [row["cost_ratio"] for row in rows(folder / "versus.csv")] == [
        str(each["cost_ratio"]) for each in runs
    ]
    assert [row["retrain_dir"] for row in rows(folder / "versus_cells.csv")] == [
        e["retrain_dir"] for e in cells
    ]
    page = Page(folder / "versus.html")
    page.check_loads_nothing()
    page.check_ids()
    assert page.sections == ["methods", "comparisons", "accuracies", "runs"]
    assert page.files == ["versus.csv", "versus_cells.csv"]
    assert all(sentence in page.text for sentence in (*found["sentences"], *found["cost_sentences"]))

    # ---- the same command prints the result
    done = keys(project)
    (folder / "metrics.jsonl").write_text("damaged\n")
    assert result(capfd) == found
    assert RunDir(folder).metrics()[-1].metrics["random/mean_cost_ratio"] == pytest.approx(
        found["methods"][1]["cost_ratio"]["estimate"]
    )
    assert keys(project) == done
    assert run(["compare", str(folder), cells[0]["retrain_dir"]]) == 2
    assert "is a comparison at equal cost, not a run" in capfd.readouterr().err


def test_equal_genotypes_are_retrained_once_and_all_runs_form_a_tree(
    project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A space with a single architecture, which all methods find; with --fresh, no run is started over twice."""
    monkeypatch.setattr(versus, "DRAWS", 1)
    found = result(
        capfd,
        *("--against", "random,darts", "--fresh", "--set", "tracking.enabled=true"),
        *("--set", "space.ops=[nor_conv_3x3]", "--set", "space.n_measurements=1"),
    )
    cells = found["cells"]
    assert [(each["method"], each["seed"]) for each in cells] == [
        (method, seed) for seed in (0, 1) for method in ("two_stage", "random", "darts")
    ]
    assert len({each["digest"] for each in cells}) == 1
    assert len(list(project.glob("runs/*-retrain-*"))) == 2
    assert (
        len({each["retrain_dir"] for each in cells}) == len({each["retrain_seconds"] for each in cells}) == 2
    )
    assert [each["difference"]["estimate"] for each in found["comparisons"]] == [0, 0]
    assert found["sentences"][1].startswith(
        "No difference between two_stage and darts was found: the means are equal"
    )

    # The epochs of darts follow from the seconds of an epoch of a short search, then of its newest one.
    [probe] = project.glob("runs/tiny-darts-probe-search-*")
    pace = epoch_seconds(str(probe))
    assert len(pace) == PROBE_EPOCHS
    for seed in (0, 1):
        [configured], [each] = of_run(cells, "two_stage", seed), of_run(cells, "darts", seed)
        assert each["search_epochs"] == search_epochs(pace, configured["search_seconds"])
        newest = epoch_seconds(each["search_dir"])
        pace = newest if len(newest) >= 3 else pace

    client, root = open_client(f"sqlite:///{project / 'mlflow.db'}"), found["mlflow_run_id"]
    parent = client.get_run(root)
    assert parent.data.tags["istanas.kind"] == "versus"
    assert parent.data.metrics["random/mean_test_top1"] == found["methods"][1]["test_top1"]["estimate"]
    assert "versus.html" in {file.path for file in client.list_artifacts(root)}
    runs = {each.info.run_id: each.data.tags for each in client.search_runs([parent.info.experiment_id])}
    assert len(runs) == 1 + len(keys(project))
    for run_id, tags in runs.items():
        if run_id != root:
            above = tags["mlflow.parentRunId"]
            assert tags["istanas.versus"] == Path(found["run_dir"]).name
            assert (
                above == root if tags["istanas.kind"] == "search" else runs[above]["istanas.kind"] == "search"
            )


def cell(method: str, seed: int, test: float, **others: Any) -> Any:
    """A planted cell, which by default costs 10 + 20 seconds."""
    return {
        "method": method,
        "seed": seed,
        "chosen": True,
        "architecture": f"{method}-{seed}",
        "digest": "",
        "search_dir": "",
        "retrain_dir": "",
        "search_epochs": 5,
        "retrain_epochs": 10,
        "search_seconds": 10.0,
        "retrain_seconds": 20.0,
        "valid_top1": test,
        "test_top1": test,
        **others,
    }


def test_planted_truths_are_found() -> None:
    """Eight seeds: random is worse by construction, and darts is the same up to the order of its seeds."""
    plain = [0.85, 0.87, 0.84, 0.86, 0.88, 0.85, 0.83, 0.86]
    cells = []
    for seed, accuracy in enumerate(plain):
        cells += [
            cell("two_stage", seed, accuracy),
            cell("random", seed, accuracy - 0.04, search_seconds=0.0),
            cell("random", seed, 0.99, search_seconds=0.0, retrain_seconds=9.9, chosen=False),
            cell("darts", seed, plain[-1 - seed], search_seconds=13.0),
        ]
    found = evaluate(cells)
    assert [(each["first"], each["second"], each["found"]) for each in found["comparisons"]] == [
        ("two_stage", "random", True),
        ("two_stage", "darts", False),
    ]
    assert found["comparisons"][0]["difference"]["estimate"] == pytest.approx(4)
    assert found["comparisons"][0]["comparisons"] == 2
    better, equal = found["sentences"]
    assert better.startswith("two_stage is better than random by 4 points of test accuracy (")
    assert equal.startswith("No difference between two_stage and darts was found: the means are equal")
    assert "would go unnoticed in at least one study out of five" in equal
    assert found["cost_sentences"] == [
        "random had 0.997 to 0.997 times the cost of two_stage: the costs agree within 2 % for each seed.",
        "darts had 1.100 to 1.100 times the cost of two_stage. The costs do not agree within 2 % for each seed. "
        "Usual causes are short runs, whose epochs are a large part of the cost, and other work on the machine.",
    ]
    assert [method["cells"] for method in found["methods"]] == [1, 2, 1]
    lines = metrics_lines(found, 7)
    assert [line.step for line in lines] == list(range(1, 9))
    assert lines[0].metrics["random/test_top1"] == pytest.approx(0.81)
    assert lines[-1].metrics["darts/mean_cost_ratio"] == pytest.approx(1.1)


def test_the_hold_out_chooses_and_not_the_test_split() -> None:
    def place(*cells: tuple[float, float, int]) -> int:
        return best_cell([cell("random", 0, t, valid_top1=v, retrain_epochs=e) for v, t, e in cells])

    assert place((0.8, 0.9, 10), (0.9, 0.1, 10), (0.7, 0.99, 10)) == 1
    assert place((0.8, 0.1, 2), (0.8, 0.9, 10), (0.8, 0.9, 10)) == 1  # the longest retraining, then the first
    assert best_cell([cell("darts", 0, 0.5, valid_top1=None)]) == 0


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 50])
def test_the_length_of_a_search_is_recovered_from_its_seconds(epochs: int) -> None:
    first, middle, last = 3.0, 2.0, 5.0
    total = first + (epochs - 2) * middle + last
    assert search_epochs([first, middle, middle, last], total) == epochs


def test_a_search_that_stopped_at_once_and_an_outlier_give_a_length() -> None:
    assert search_epochs([2.0], 10.0) == 5
    assert search_epochs([2.0, 4.0], 30.0) == 10
    assert search_epochs([9.0, 1.0, 1.0, 50.0, 1.0], 20.0) == 12  # the median of the middle epochs


@pytest.mark.parametrize("spent", [0.0, 30.0, 59.5, 85.0, 97.9, 98.1, 150.0])
def test_a_retraining_at_the_expected_pace_stays_within_the_cost(spent: float) -> None:
    epochs = retraining_epochs(100.0, spent, 1.5, 20)
    assert 0 <= epochs <= 20
    assert epochs == 0 or spent + 1.5 * epochs <= 102
    # Nothing that fits is left over.
    assert epochs == 20 or spent >= 98 or spent + 1.5 * (epochs + 1) > 102


def test_a_shorter_retraining_has_a_shorter_warm_up() -> None:
    config = load(None, ["retrain.epochs=20", "retrain.warmup_epochs=5"])
    shorter = with_retrain_epochs(config, 4).retrain
    assert (shorter.epochs, shorter.warmup_epochs) == (4, 1)
    assert with_retrain_epochs(config, 20) is config


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--against", "randm"), "method: 'randm' is not a registered search method (did you mean random?)"),
        (
            ("--against", "random,random"),
            "error: --against: random takes part already; name each method once",
        ),
        (("--against", "two_stage"), "error: --against: two_stage takes part already"),
        (("--against", ""), "error: --against: names no method; name one or more, such as random,darts"),
        (
            ("--against", "one_stage"),
            "error: --against: one_stage trains its network while it searches, and its cell",
        ),
        (("--against", "pc_darts"), "error: --against pc_darts: search.warmup_epochs: 15 is not less than"),
        (
            ("--set", "data.holdout=0"),
            "error: data.holdout: 0 keeps no pictures on which random can choose among",
        ),
        (
            ("--set", "retrain.test_every=0"),
            "error: retrain.test_every: 0 measures no test accuracy to compare",
        ),
        (("--seeds", "1"), "error: Invalid value for '--seeds': 1 is not in the range x>=2."),
    ],
)
def test_bad_arguments_are_one_clear_line_before_any_work(
    project: Path, capfd: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert error(capfd, *arguments(*more)).startswith(message if message.startswith("error") else "error: ")
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    ("method", "against", "message"),
    [
        ("one_stage", "random", "error: method: one_stage trains its network while it searches"),
        (
            "random",
            "darts",
            "error: method: random trains nothing, and a comparison requires a search with a cost",
        ),
    ],
)
def test_a_configured_method_without_a_retraining_or_a_cost_is_refused(
    project: Path, capfd: pytest.CaptureFixture[str], method: str, against: str, message: str
) -> None:
    (project / "own.yaml").write_text(f"method: {method}\ndata: {{holdout: 0.1}}\n")
    assert error(capfd, "versus", "--config", "own.yaml", "--against", against).startswith(message)


def test_concurrent_trainings_are_refused(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Their seconds are those of shares of the machine."""
    text = "method: measured\ndata: {holdout: 0.1}\nsearch: {stages: [[4, 1]], max_concurrent: 2}\n"
    (project / "own.yaml").write_text(text)
    message = "error: search.max_concurrent: 2 trainings at a time have no seconds that can be compared; set it to 1"
    assert error(capfd, "versus", "--config", "own.yaml").startswith(message)


def test_settings_that_a_method_does_not_have_are_left_out_and_named(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments("--against", "measured,random", "--set", "retrain.test_every=0")) == 2
    said = capfd.readouterr().out
    assert "measured has no search.epochs: left out, its defaults are used" in said
    assert "random has no" not in said  # it trains nothing


def error(capfd: pytest.CaptureFixture[str], *line: str) -> str:
    capfd.readouterr()
    assert run(list(line)) == 2
    [found] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    return found
