"""Arguments, exit codes and files of `make bench`; and its all-reduced bytes, a figure without noise."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from istanas.methods import METHODS
from tests.benchmarks import __main__ as bench
from tests.benchmarks import methods
from tests.benchmarks.harness import Row, growth
from tests.benchmarks.multiprocess import measure_bytes


def works(**ratios: float) -> dict[str, Callable[[], Row]]:
    """Works that measure these ratios, with a bound of at least 2."""
    rows = {name: Row(name, ratio, (ratio, ratio), 2.0, 1.0) for name, ratio in ratios.items()}
    return {name: lambda row=row: row for name, row in rows.items()}  # type: ignore[misc]


@pytest.fixture
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_unknown_work_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(["--only", "memroy"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert all(name in said for name in ("memroy", *bench.WORKS))


@pytest.mark.usefixtures("empty_folder")
def test_a_missed_bound_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    known = works(good=2.0, bad=1.9)
    assert bench.main([], known) == 1
    assert capsys.readouterr().out.count("MISSED") == 1
    assert bench.main(["--only", "good"], known) == 0


def test_a_partial_run_writes_only_the_file_of_json(empty_folder: Path) -> None:
    known = works(one=2.0, two=3.0)
    bench.main(["--only", "one"], known)
    assert list(empty_folder.iterdir()) == []
    bench.main(["--only", "one", "--json", "one.json"], known)
    assert [path.name for path in empty_folder.iterdir()] == ["one.json"]
    assert [row["work"] for row in json.loads(Path("one.json").read_text())["rows"]] == ["one"]
    bench.main([], known)
    assert [row["work"] for row in json.loads(Path("bench.json").read_text())["rows"]] == ["one", "two"]


def test_growth_is_an_exponent_with_its_spread() -> None:
    row = growth("squares", (1, 2, 4), [[1, 1, 2], [4, 4, 8], [16, 16, 32]])
    assert (row.ratio, *row.spread) == pytest.approx((2, 2, 2))
    assert row.met, "it has no bound"
    rows = [[1, 1, 1], [2, 4, 8], [4, 16, 64]]
    assert growth("x, x^2, x^3", (1, 2, 4), rows).spread == pytest.approx((1, 3))


@pytest.mark.slow
def test_every_method_that_trains_has_its_cost() -> None:
    tiny = (4, 3, 4)
    trained = methods.with_steps()
    assert {"two_stage", "one_stage", "darts", "pc_darts"} <= set(trained) <= set(METHODS)
    rows = [*methods.seconds(trained, 2, tiny), *methods.memory(["darts"], 2, tiny)]
    assert len(rows) == len(trained) + 1
    assert all(row.bound is None and row.met and row.ours > 0 for row in rows)
    assert (rows[0].ratio, rows[-1].ratio) == (1, 1), "the method that the others are compared with"


@pytest.mark.slow
def test_a_fifth_of_the_dense_supernets_bytes_at_most() -> None:
    found = measure_bytes()
    assert 0 < found["ratio"] <= 0.2
