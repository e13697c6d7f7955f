"""Tables on narrow terminals: dropped columns, then blocks; names never break, and runs can be distinguished."""

import io

import pandas as pd
import pytest
from rich.console import Console

from pipeline.base.fitted_table import Column, FittedTable
from pipeline.report.columns import COLUMNS
from pipeline.report.terminal import results_table
from pipeline.report.trials import COLUMNS as TRIAL_COLUMNS
from pipeline.report.trials import trials_table

NAME = "digits_quickstart-a-long-name-retrain"


def printed(table: FittedTable, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table, crop=False)
    return console.export_text()


def results(*rows: dict[str, object]) -> pd.DataFrame:
    common = {
        "name": NAME,
        "kind": "retrain",
        "method": "two_stage",
        "dataset": "digits",
        "status": "FINISHED",
        "outcome": "FINISHED",
        "genotype": "0123456789",
        "valid_top1": 0.5,
        "test_top1": 0.25,
        "params": 123456,
        "macs": 1234567,
        "seconds": 61.0,
        "started": pd.Timestamp("2026-01-01", tz="UTC"),
    }
    filled = [{**common, "run_id": f"{n}{0:031x}", **row} for n, row in enumerate(rows)]
    return pd.DataFrame(filled, columns=list(COLUMNS)).astype(COLUMNS)


@pytest.mark.parametrize("width", [10, 30, 40, 60, 80, 120, 200])
def test_names_of_runs_never_break(width: int) -> None:
    text = printed(results_table(results({}, {"name": "second-" + NAME}), width=width), width)
    assert NAME in text
    assert "second-" + NAME in text
    assert "25.00%" in text
    assert max(map(len, text.splitlines())) <= max(width, len("second-" + NAME))


def test_what_is_left_out_is_said_and_in_blocks_nothing_is() -> None:
    narrow = printed(results_table(results({}), width=80), 80)
    assert "columns that did not fit: MACs; --csv and --json have everything" in narrow
    block = printed(results_table(results({}), width=30), 30)
    assert block.splitlines()[0] == NAME
    assert "  MACs: 1,234,567" in block
    assert "left out" not in block


@pytest.mark.parametrize("width", [20, 40, 80, 100, 200])
def test_settings_of_trials_never_break(width: int) -> None:
    keys = {f"search.setting_number_{n}": [f"value_{n}_of_a_trial"] for n in range(9)}
    row = {"trial": [0], "state": ["FAIL"], "reason": ["IstanasError: the loss is NaN"], "pareto": [False]}
    frame = pd.DataFrame({**{name: [None] for name in TRIAL_COLUMNS}, **row, **keys})
    text = printed(trials_table(frame), width)
    for n in range(9):
        assert f"setting_number_{n}" in text
        assert f"value_{n}_of_a_trial" in text


def test_a_column_of_rank_zero_is_never_left_out() -> None:
    table = FittedTable([Column("a"), Column("b", rank=2), Column("c", rank=1)], [["aaaa", "bbbb", "cccc"]])
    assert [table.places(width) for width in (16, 15, 11, 10, 6, 5)] == [
        [0, 1, 2],
        [0, 2],
        [0, 2],
        [0],
        [0],
        None,
    ]


def test_runs_of_one_name_are_told_apart_by_directory_or_id() -> None:
    frame = results(
        {"name": "a", "run_dir": "/x/runs/a-1111"},
        {"name": "a", "run_dir": "/x/runs/a-2222"},
        {"name": "b", "run_dir": "/x/runs/b-3333"},
        {"name": "b", "run_dir": "/x/runs/b-3333"},
        {"name": "trial-0001", "run_dir": "/x/runs/s-1/trial-0001"},
        {"name": "trial-0001", "run_dir": "/x/runs/s-2/trial-0001"},
        {"name": "alone", "run_dir": "/x/runs/alone-1"},
    )
    lines = printed(results_table(frame, width=200), 200).splitlines()
    names = [line.partition(" 01234567")[0].strip() for line in lines if " 01234567" in line]
    assert names == [
        "a-1111",
        "a-2222",
        "b-3333 20000000",
        "b-3333 30000000",
        "s-1/trial-0001",
        "s-2/trial-0001",
        "alone",
    ]


def test_a_random_cell_and_what_became_of_a_run_are_said() -> None:
    frame = results(
        {"name": "a", "origin": "random:0"},
        {"name": "b", "status": "FAILED", "outcome": "INTERRUPTED"},
        {"name": "c", "status": "KILLED", "outcome": "PRUNED"},
        {"name": "d", "status": "FAILED", "outcome": "FAILED", "origin": "ISTA_twostage"},
    )
    text = printed(results_table(frame, width=200), 200)
    for label in ("a (random:0)", "b (INTERRUPTED, resumable)", "c (PRUNED)", "d (ISTA_twostage, FAILED)"):
        assert f" {label} " in text
