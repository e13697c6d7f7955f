"""`make bench` itself: what it is asked for, its exit codes, where it writes; and bytes, which no noise can touch."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.benchmarks import __main__ as bench
from tests.benchmarks.harness import Row, growth
from tests.benchmarks.multiprocess import measure_bytes

Known = Callable[..., None]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Known:
    """Makes rows of these ratios, wanted to be at least 2, all that can be measured; in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def make(**ratios: float) -> None:
        rows = {name: Row(name, ratio, (ratio, ratio), 2.0, 1.0) for name, ratio in ratios.items()}
        monkeypatch.setattr(bench, "WORKS", {name: lambda row=row: row for name, row in rows.items()})

    return make


def test_an_unknown_work_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(["--only", "memroy"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert all(name in said for name in ("memroy", *bench.WORKS))


def test_a_missed_bound_is_exit_code_1(known: Known, capsys: pytest.CaptureFixture[str]) -> None:
    known(good=2.0, bad=1.9)
    assert bench.main([]) == 1
    assert capsys.readouterr().out.count("MISSED") == 1
    assert bench.main(["--only", "good"]) == 0


def test_a_partial_run_writes_only_where_it_is_told_to(known: Known, tmp_path: Path) -> None:
    known(one=2.0, two=3.0)
    bench.main(["--only", "one"])
    assert list(tmp_path.iterdir()) == []
    bench.main(["--only", "one", "--json", "one.json"])
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]
    assert [row["work"] for row in json.loads(Path("one.json").read_text())["rows"]] == ["one"]
    bench.main([])
    assert [row["work"] for row in json.loads(Path("bench.json").read_text())["rows"]] == ["one", "two"]


def test_growth_is_an_exponent_with_its_spread() -> None:
    row = growth("squares", (1, 2, 4), [[1, 1, 2], [4, 4, 8], [16, 16, 32]])
    assert (row.ratio, *row.spread) == pytest.approx((2, 2, 2))
    assert row.met, "it has no bound"
    rows = [[1, 1, 1], [2, 4, 8], [4, 16, 64]]
    assert growth("x, x^2, x^3", (1, 2, 4), rows).spread == pytest.approx((1, 3))


@pytest.mark.slow
def test_a_fifth_of_the_dense_supernets_bytes_at_most() -> None:
    found = measure_bytes()
    assert 0 < found["ratio"] <= 0.2
