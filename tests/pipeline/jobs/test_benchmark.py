"""`istanas benchmark`: searches on the digits, scored by small tables whose best architectures are known."""

import csv
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from istanas.errors import ConfigError, DataError
from istanas.space import Genotype
from istanas.space.nas_bench_201 import NasBench201Space, genotype_at
from istanas.statistics import FEWEST_FOR_BOOTSTRAP
from pipeline.cli.commands import run
from pipeline.jobs import benchmark, truth
from pipeline.jobs.benchmark import evaluate, metrics_lines, validation_tau
from pipeline.jobs.observer import RunObserver
from pipeline.runs.directory import RunDir
from pipeline.runs.record import MetricsLine
from pipeline.tracking.store import open_client
from tests.pipeline.report.pages import Page

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SPACE = NasBench201Space()
# Two operations on each edge: 64 architectures, of which a search of an instant finds some.
OPS = ("skip_connect", "nor_conv_3x3")
CONFIG = """
data: {crop_padding: 1}
space: {name: nas_bench_201, ops: [skip_connect, nor_conv_3x3], n_measurements: 2}
search: {epochs: 2, batch_size: 64, init_channels: 2, layers: 5, max_pictures: 64, arch_lr: 0.05}
retrain: {init_channels: 2, layers: 5}
runtime: {threads: 1, device: cpu, runs_dir: runs}
tracking: {enabled: false}
"""
TABLES = ("benchmark.csv", "benchmark_epochs.csv")


def architectures() -> list[str]:
    space = NasBench201Space(ops=OPS)
    found = {str(NasBench201Space.text(space.random(seed))) for seed in range(2000)}
    assert len(found) == 64
    return sorted(found)


ARCHITECTURES = architectures()


def write_table(file: Path, rows: list[tuple[str, str]], heading: str = "architecture,test_accuracy") -> Path:
    text = "\n".join([heading, *(f"{name},{value}" for name, value in rows)]) + "\n"
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text)
    return file


def ascending(names: list[str] = ARCHITECTURES) -> list[tuple[str, str]]:
    """Rows in which the last architecture is the best."""
    return [(name, f"{50 + place / 2:.2f},{90 - place / 2:.2f}") for place, name in enumerate(names)]


HEADING = "architecture,test_accuracy,valid_accuracy"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    write_table(tmp_path / "table.csv", ascending(), HEADING)
    return tmp_path


def arguments(*more: str, table: str = "table.csv", seeds: int = 2) -> list[str]:
    return ["benchmark", "--config", "tiny.yaml", "--table", table, "--seeds", str(seeds), *more]


def result(capfd: pytest.CaptureFixture[str], *more: str, **options: Any) -> dict[str, Any]:
    capfd.readouterr()
    code = run([*arguments(*more, **options), "--json"])
    out, err = capfd.readouterr()
    assert code == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def error(capfd: pytest.CaptureFixture[str], *more: str, code: int = 2, **options: Any) -> str:
    capfd.readouterr()
    assert run(arguments(*more, **options)) == code
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def without_seconds(file: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(file)]


def test_searches_are_scored_by_the_table(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = result(capfd, "--method", "random", "--set", "tracking.enabled=true")
    folder = Path(found["run_dir"])
    assert [(each["method"], each["seed"]) for each in found["runs"]] == [
        ("two_stage", 0),
        ("random", 0),
        ("two_stage", 1),
        ("random", 1),
    ]
    for each in found["runs"]:
        search = RunDir(Path(each["run_dir"])).read()
        genotype = Genotype.from_dict(search.result["genotype"])
        place = ARCHITECTURES.index(each["architecture"])
        assert each["architecture"] == SPACE.text(genotype)
        assert (search.method, search.params["seed"]) == (each["method"], each["seed"])
        assert Path(search.parent or "").name == folder.name
        assert each["true_accuracy"] == pytest.approx(0.5 + place / 200)
        assert each["rank"] == 64 - place
        assert each["regret"] == pytest.approx((63 - place) / 200)
        assert each["accuracies"]["valid_accuracy"] == pytest.approx(0.9 - place / 200)
        assert each["seconds"] == search.result["seconds"]
    random = [SPACE.text(NasBench201Space(ops=OPS).random(seed)) for seed in (0, 1)]
    assert [each["architecture"] for each in found["runs"] if each["method"] == "random"] == random
    assert found["table"] == {
        "rows": 64,
        "column": "test_accuracy",
        "best": 0.815,
        "mean": pytest.approx(0.6575),
        "chance_rank": 32.5,
    }
    for method in found["methods"]:
        own = [each for each in found["runs"] if each["method"] == method["method"]]
        for key in ("true_accuracy", "rank", "regret", "seconds"):
            assert method[key]["estimate"] == pytest.approx(sum(each[key] for each in own) / 2)
        assert 1 <= method["rank"]["low"] <= method["rank"]["high"] <= 64
        assert method["kendall_tau"] is None  # two seeds have no rank correlation
    assert len(found["sentences"]) == 2
    assert all("With 2 seeds, this test cannot find any difference" in text for text in found["sentences"])

    written = rows(folder / "benchmark.csv")
    assert [row["architecture"] for row in written] == [each["architecture"] for each in found["runs"]]
    assert [float(row["table/test_accuracy"]) for row in written] == [
        e["true_accuracy"] for e in found["runs"]
    ]
    epochs = rows(folder / "benchmark_epochs.csv")
    assert [(row["method"], row["seed"], row["epoch"]) for row in epochs] == [
        ("two_stage", "0", "1"),
        ("two_stage", "0", "2"),
        ("random", "0", "1"),
        ("two_stage", "1", "1"),
        ("two_stage", "1", "2"),
        ("random", "1", "1"),
    ]
    last = {(row["method"], int(row["seed"])): row for row in epochs}
    for each in found["runs"]:
        row = last[each["method"], each["seed"]]
        assert int(row["rank"]) == each["rank"]
        assert float(row["seconds"]) == pytest.approx(each["seconds"])

    page = Page(folder / "benchmark.html")
    page.check_loads_nothing()
    page.check_ids()
    assert page.sections == ["methods", "comparisons", "ranks", "runs"]
    assert page.files == list(TABLES)
    assert all(each["architecture"] in page.text for each in found["runs"])

    client = open_client(f"sqlite:///{project / 'mlflow.db'}")
    parent = client.get_run(found["mlflow_run_id"])
    assert parent.data.tags["istanas.kind"] == "benchmark"
    assert parent.data.metrics["random/mean_rank"] == found["methods"][1]["rank"]["estimate"]
    history = client.get_metric_history(found["mlflow_run_id"], "two_stage/rank")
    assert [point.value for point in history] == [each["rank"] for each in found["runs"][::2]]
    assert {*TABLES, "benchmark.html", "config.yaml"} <= {
        file.path for file in client.list_artifacts(found["mlflow_run_id"])
    }
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{found['mlflow_run_id']}'"
    )
    assert len(children) == 4
    assert {child.data.tags["istanas.benchmark"] for child in children} == {folder.name}

    # The same command prints the result; damaged metrics are rebuilt from it.
    metrics = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("damaged\n" + metrics)
    again = result(capfd, "--method", "random", "--set", "tracking.enabled=true")
    assert again == found
    assert RunDir(folder).metrics()[-1].metrics["random/mean_rank"] == found["methods"][1]["rank"]["estimate"]
    assert run(["compare", str(folder), found["runs"][0]["run_dir"]]) == 2
    assert "is a benchmark, not a run" in capfd.readouterr().err


def test_a_benchmark_killed_between_two_seeds_equals_an_undisturbed_one(
    project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = result(capfd, "--method", "random", "--set", "runtime.runs_dir=whole")
    trial_done = RunObserver.trial_done

    def kill(self: RunObserver, text: str, done: int, *more: Any) -> None:
        trial_done(self, text, done, *more)
        if done == 3:  # the first search of the second seed
            raise SystemExit  # as a killed process, it leaves the record of the benchmark as it is

    with monkeypatch.context() as patched:
        patched.setattr(RunObserver, "trial_done", kill)
        with pytest.raises(SystemExit):
            run(arguments("--method", "random"))
    [folder] = project.glob("runs/*-benchmark-*")
    assert RunDir(folder).read().status == "RUNNING"
    assert not (folder / "benchmark.csv").exists()
    assert "random has no search.epochs" not in capfd.readouterr().out  # it trains nothing
    begun = {path: RunDir(path).read().key for path in project.glob("runs/*-search-*")}
    assert len(begun) == 3
    resumed = result(capfd, "--method", "random")
    assert all(RunDir(path).read().key == key for path, key in begun.items())
    for name in TABLES:
        if name == "benchmark.csv":
            written, expected = (
                [{k: v for k, v in row.items() if k != "run_dir"} for row in without_seconds(Path(f) / name)]
                for f in (resumed["run_dir"], whole["run_dir"])
            )
        else:
            written, expected = (
                without_seconds(Path(f) / name) for f in (resumed["run_dir"], whole["run_dir"])
            )
        assert written == expected
        assert len(written) in (4, 6)
    assert resumed["table"] == whole["table"]


def test_more_seeds_and_other_methods_use_finished_searches_again(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    two = result(capfd, "--method", "random")
    keys = {path: RunDir(path).read().key for path in project.glob("runs/*-search-*")}
    three = result(capfd, "--method", "random", seeds=3)
    assert three["runs"][:4] == two["runs"]
    assert all(RunDir(path).read().key == key for path, key in keys.items())
    assert len(list(project.glob("runs/*-search-*"))) == 6
    alone = result(capfd, seeds=3)
    assert alone["runs"] == three["runs"][::2]
    assert alone["sentences"] == []
    assert len(list(project.glob("runs/*-search-*"))) == 6
    assert len(list(project.glob("runs/*-benchmark-*"))) == 3


def test_no_search_can_read_the_table(
    project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table in which the last is the best and one in which the first is: the searches are the same.

    While they run, the tables are not even on the disk, and no file of a search names them.
    """
    run_search = benchmark.run_search
    names = list(reversed(ARCHITECTURES))
    write_table(project / "permuted_table.csv", ascending(names), HEADING)

    def without_tables(context: Any) -> Any:
        for table in project.glob("*table.csv"):
            shutil.move(table, table.with_suffix(".hidden"))
        try:
            return run_search(context)
        finally:
            for table in project.glob("*table.hidden"):
                shutil.move(table, table.with_suffix(".csv"))

    monkeypatch.setattr(benchmark, "run_search", without_tables)
    one, other = (
        result(capfd, "--method", "darts", "--set", f"runtime.runs_dir={table}-runs", table=f"{table}.csv")
        for table in ("table", "permuted_table")
    )
    assert [r["architecture"] for r in one["runs"]] == [r["architecture"] for r in other["runs"]]
    assert [r["valid_top1"] for r in one["runs"]] == [r["valid_top1"] for r in other["runs"]]
    for mine, theirs in zip(one["runs"], other["runs"], strict=True):
        assert mine["rank"] == 65 - theirs["rank"]
        left, right = (
            [
                {name: value for name, value in line.metrics.items() if name != "images_per_second"}
                for line in RunDir(Path(each["run_dir"])).metrics()
            ]
            for each in (mine, theirs)
        )
        assert left == right
        files = [path for path in Path(mine["run_dir"]).rglob("*") if path.is_file()]
        assert len(files) > 5
        named = [path.name for path in files if b"table.csv" in path.read_bytes()]
        # environment.json has the command line of the process, for the user.
        assert set(named) <= {"environment.json"}


def test_other_settings_of_the_same_method_take_part_as_a_file(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (project / "more epochs.yaml").write_text(CONFIG.replace("epochs: 2", "epochs: 3"))
    found = result(capfd, "--method", "more epochs.yaml")
    assert [each["method"] for each in found["methods"]] == ["two_stage", "more-epochs"]
    assert [len(RunDir(Path(each["run_dir"])).metrics()) for each in found["runs"]] == [2, 3, 2, 3]


def test_a_missing_row_is_reported_and_finished_searches_are_kept(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = result(capfd)
    missing = found["runs"][0]["architecture"]
    write_table(project / "part.csv", [row for row in ascending() if row[0] != missing], HEADING)
    keys = {path: RunDir(path).read().key for path in project.glob("runs/*-search-*")}
    line = error(capfd, table="part.csv", code=1)
    assert line.startswith("error: --table: has no row for the architecture ")
    assert "add the row and run the same command again; finished searches are not repeated" in line
    assert {path: RunDir(path).read().key for path in project.glob("runs/*-search-*")} == keys


def bad_table(text: str) -> Callable[[Path], None]:
    return lambda file: write_bytes(file, text.encode())


def write_bytes(file: Path, data: bytes) -> None:
    file.write_bytes(data)


A, B = ARCHITECTURES[:2]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: file.unlink(), "no such file; give a CSV file with true accuracies"),
        (lambda file: (file.unlink(), file.mkdir()), "cannot be read (IsADirectoryError: Is a directory: "),
        (lambda file: file.write_bytes(b"\xff\xfe\x00"), "cannot be read (UnicodeDecodeError: "),
        (bad_table(""), "its first line is ''; name the columns there: architecture, then one or more"),
        (bad_table(f"architecture\n{A}\n"), "its first line is 'architecture'; name the columns there"),
        (bad_table(f"cell,accuracy\n{A},50\n"), "its first line is 'cell,accuracy'; name the columns there"),
        (
            bad_table(f"architecture,a,a\n{A},50,50\n"),
            "its first line is 'architecture,a,a'; name the columns",
        ),
        (bad_table("architecture,a\n"), "has no rows; give a row for each architecture"),
        (bad_table(f"architecture,a\n{A},50\n{B}\n"), "line 3: 1 values for 2 columns; give one value"),
        (bad_table("architecture,a\nconv,50\n"), "line 2: 'conv' is no architecture of nas_bench_201"),
        (bad_table(f"architecture,a\n{A[:-1]},50\n"), "is no architecture of nas_bench_201 ("),
        (bad_table(f"architecture,a\n{A},50\n{B},60\n {A},70\n"), "line 4: the architecture of line 2 again"),
        (bad_table(f"architecture,a\n{A},nan\n"), "line 2, column a: 'nan' is not in 0..100; give it in per"),
        (bad_table(f"architecture,a\n{A},100.1\n"), "line 2, column a: '100.1' is not in 0..100"),
        (bad_table(f"architecture,a\n{A},-1\n"), "line 2, column a: '-1' is not in 0..100"),
        (bad_table(f"architecture,a\n{A},high\n"), "line 2, column a: 'high' is not in 0..100"),
        (
            bad_table(f"architecture,a\n{A},0.93\n"),
            "column a: the highest accuracy is 0.93; give accuracies in",
        ),
        (bad_table(f'architecture,a\n"{A},50\n'), "not CSV ("),
    ],
)
def test_a_bad_table_is_one_clear_line_before_any_work(
    project: Path, capfd: pytest.CaptureFixture[str], write: Callable[[Path], Any], message: str
) -> None:
    write(project / "table.csv")
    line = error(capfd)
    assert line.startswith("error: --table table.csv: ")
    assert message in line
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--column", "speed"),
            "error: --column 'speed': no column of table.csv; choose test_accuracy, valid_",
        ),
        (("--set", "space={name: darts}"), "error: space.name: architectures of darts have no text form"),
        (("--method", "randm"), "method: 'randm' is not a registered search method (did you mean random?)"),
        (("--method", "random,random"), "error: --method: random takes part already; name each method once"),
        (("--method", "two_stage"), "error: --method: two_stage takes part already"),
        (("--method", "pc_darts"), "error: --method pc_darts: search.warmup_epochs: 15 is not less than"),
        (("--seeds", "1"), "error: Invalid value for '--seeds': 1 is not in the range x>=2."),
    ],
)
def test_bad_arguments_are_one_clear_line_before_any_work(
    project: Path, capfd: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert message in error(capfd, *more)
    assert not (project / "runs").exists()


def test_a_broken_or_oversized_archive_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_table(tmp_path / "whole.csv.gz", ascending(), HEADING)
    assert truth.check_table(whole, SPACE).rows == 64
    (tmp_path / "cut.csv.gz").write_bytes(whole.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"cut\.csv\.gz: cannot be read \(EOFError: "):
        truth.check_table(tmp_path / "cut.csv.gz", SPACE)
    monkeypatch.setattr(truth, "TABLE_BYTES", 1000)
    with pytest.raises(ConfigError, match="larger than 1000 bytes when decompressed"):
        truth.check_table(whole, SPACE)


def test_a_table_that_changed_while_searching_is_refused(tmp_path: Path) -> None:
    file = write_table(tmp_path / "table.csv", ascending(), HEADING)
    facts = truth.check_table(file, SPACE, "valid_accuracy")
    assert truth.read_truth(file, SPACE, facts).best == 0.9
    write_table(file, ascending(list(reversed(ARCHITECTURES))), HEADING)
    with pytest.raises(ConfigError, match="has changed since the command began; run the same command again"):
        truth.read_truth(file, SPACE, facts)


def test_the_published_table_has_known_ranks(shared_dir: Path) -> None:
    """The benchmark's own best cell on CIFAR-10 is number 6111; 3x3 convolutions everywhere are in the top 2 %."""
    file = shared_dir / "data" / "nas_bench_201_cifar10.csv.gz"
    if not file.is_file():
        pytest.skip(f"no file {file}")
    table = truth.read_truth(file, SPACE, truth.check_table(file, SPACE))
    assert table.facts.rows == 15_625
    assert table.score(genotype_at(6111)).rank == 1
    assert 100 < table.score(genotype_at(1462)).rank < 250
    assert table.chance_rank == 7813


def test_equal_accuracies_share_a_rank(tmp_path: Path) -> None:
    accuracies = ["90", "80", "80", "70"]
    file = write_table(tmp_path / "t.csv", list(zip(ARCHITECTURES[:4], accuracies, strict=True)))
    table = truth.read_truth(file, SPACE, truth.check_table(file, SPACE))
    genotypes = [SPACE.parse(name) for name in ARCHITECTURES[:5]]
    assert [table.score(g).rank for g in genotypes[:4] if g is not None] == [1, 2, 2, 4]
    with pytest.raises(DataError, match="has no row for the architecture"):
        table.score(genotypes[4] or pytest.fail("not parsed"))


def planted(method: str, accuracies: list[float], table: truth.Truth) -> list[Any]:
    """Searches with given places in a table of the 64 architectures."""
    found = []
    for seed, accuracy in enumerate(accuracies):
        place = round(200 * (accuracy - 0.5))
        genotype = SPACE.parse(ARCHITECTURES[place])
        assert genotype is not None
        score = table.score(genotype)
        found.append(
            {
                "method": method,
                "seed": seed + 3,
                "valid_top1": 0.3 + accuracy / 2,
                "true_accuracy": score.accuracy,
                "rank": score.rank,
                "regret": score.regret,
                "seconds": 1.0 + seed,
            }
        )
    return found


def test_planted_truths_are_found(tmp_path: Path) -> None:
    """Eight seeds: one method is better by construction, and two are the same up to the order of their seeds."""
    file = write_table(tmp_path / "t.csv", ascending(), HEADING)
    table = truth.read_truth(file, SPACE, truth.check_table(file, SPACE))
    plain = [0.55, 0.6, 0.52, 0.58, 0.61, 0.57, 0.54, 0.59]
    runs = [
        *planted("good", [accuracy + 0.15 for accuracy in plain], table),
        *planted("plain", plain, table),
        *planted("equal", plain[::-1], table),
    ]
    found = evaluate(runs, table)
    for kind in ("true_accuracy", "rank"):
        verdicts = {(c["first"], c["second"]): c["found"] for c in found["comparisons"][kind]}
        assert verdicts == {("good", "plain"): True, ("good", "equal"): True, ("plain", "equal"): False}
    assert found["comparisons"]["true_accuracy"][0]["difference"]["estimate"] == pytest.approx(15)
    assert found["comparisons"]["rank"][0]["difference"]["estimate"] == pytest.approx(-30)
    texts = found["sentences"]
    assert texts[0].startswith("good is better than plain by 15 points of true accuracy (")
    assert texts[3].startswith("good is better than plain by 30 ranks (")
    assert texts[2].startswith("No difference between plain and equal was found: the means are equal")
    good = found["methods"][0]
    assert good["true_accuracy"]["method"] == "bootstrap"
    assert good["seeds"] >= FEWEST_FOR_BOOTSTRAP
    # The validation accuracies are planted in the order of the truth.
    assert good["kendall_tau"]["estimate"] == pytest.approx(1)
    assert good["deviation"] == pytest.approx(0.0307, abs=1e-3)
    lines = metrics_lines({**found, "runs": runs}, 7)
    assert [line.step for line in lines] == list(range(1, 9))
    assert lines[0] == MetricsLine(
        1,
        7,
        {
            f"{m}/{key}": run[key]
            for m, run in (("good", runs[0]), ("plain", runs[8]), ("equal", runs[16]))
            for key in ("true_accuracy", "rank", "regret", "seconds")
        },
    )
    assert lines[-1].metrics["good/mean_rank"] == good["rank"]["estimate"]


@pytest.mark.parametrize(
    ("valid", "accuracies", "tau"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.5, 0.6, 0.7, 0.8, 0.9, 1.0], 1.0),
        ([0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.6, 0.7, 0.8, 0.9], None),
        ([None] * 6, [0.5, 0.6, 0.7, 0.8, 0.9, 1.0], None),
        ([0.1, 0.2, 0.3, 0.4, 0.5, None], [0.5, 0.6, 0.7, 0.8, 0.9, 1.0], None),
        ([0.1] * 6, [0.5, 0.6, 0.7, 0.8, 0.9, 1.0], None),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.6] * 6, None),
    ],
)
def test_tau_is_not_defined_without_values_that_differ(
    valid: list[float | None], accuracies: list[float], tau: float | None
) -> None:
    found = validation_tau(valid, accuracies)
    assert (None if found is None else found.estimate) == (None if tau is None else pytest.approx(tau))
