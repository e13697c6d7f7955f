"""Validation accuracy has one name, and one sentence explains on which pictures it was measured."""

from pathlib import Path

import pytest
from rich.console import Console

from istanas.space import PUBLISHED
from pipeline.cli.output import show_result
from pipeline.config.load import load
from pipeline.report.terminal import validation_note


@pytest.mark.parametrize(
    ("kind", "method", "pictures", "other"),
    [
        ("search", "two_stage", "alpha half", "hold-out"),
        ("search", "one_stage", "hold-out", "alpha half"),
        ("retrain", "two_stage", "hold-out", "alpha half"),
        ("retrain", "one_stage", "hold-out", "alpha half"),
    ],
)
def test_the_closing_table_names_the_right_pictures(
    kind: str, method: str, pictures: str, other: str, tmp_path: Path
) -> None:
    console = Console(record=True, width=200, quiet=False)
    config = load(None if method == "two_stage" else "tune_configs/one_stage_digits.yaml")
    with console.capture() as seen:
        show_result({"valid_top1": 0.5, "run_dir": str(tmp_path)}, False, console, config, kind=kind)
    text = " ".join(seen.get().split())
    assert "validation top-1" in text
    assert pictures in text
    assert other not in text
    assert validation_note(kind, method) in text


def test_a_genotypes_text_names_its_inputs() -> None:
    lines = str(PUBLISHED["ISTA_twostage"]).splitlines()
    assert lines[0] == "normal node 0: skip_connect <- c(k-2), dil_conv_3x3 <- c(k-1)"
    assert lines[1] == "normal node 1: sep_conv_5x5 <- c(k-2), dil_conv_3x3 <- node 0"
