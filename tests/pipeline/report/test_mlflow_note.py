"""Descriptions in MLflow: valid Markdown whatever the names, and no longer than the store allows."""

from typing import Any

from istanas.space import PUBLISHED
from istanas.space.nas_bench_201 import genotype_at
from pipeline.report import mlflow_note
from pipeline.tracking.lineage import Kin, with_links

GENOTYPE = PUBLISHED["ISTA_twostage"]
RESULT: dict[str, Any] = {
    "digest": GENOTYPE.digest(),
    "params": 40482,
    "macs": 1_400_000,
    "seconds": 83.0,
    "valid_top1": 0.975,
    "test_top1": 0.9916,
}
SWEEP = {
    **RESULT,
    "best_trial": 3,
    "settings": {"search.lr": 0.1},
    "retrained_top1": 0.96,
    "kendall_tau": None,
    "trials": 12,
    "complete": 7,
    "pruned": 4,
    "failed": 1,
    "epochs": 50,
}


def rows(text: str) -> list[list[str]]:
    """Return the listed figures, and the cells of all tables."""
    figures = [line[2:].split(": ") for line in text.splitlines() if line.startswith("- ")]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return figures + [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_figures_and_genotype_of_every_kind() -> None:
    frozen = [{"cell": "normal", "node": 0, "epoch": 3, "reason": "limit"}]
    one_stage = {**RESULT, "frozen": frozen, "search_epochs": 3, "train_epochs": 5, "rejected": 0}
    two = mlflow_note.of_search("two_stage", "digits", 12, RESULT, GENOTYPE)
    one = mlflow_note.of_trained_search("one_stage", "digits", 15, one_stage, GENOTYPE)
    retrain = mlflow_note.of_retraining("digits", 1, RESULT, GENOTYPE)
    sweep = mlflow_note.of_sweep("digits", {"search.lr": "uniform 0 .. 1"}, SWEEP, GENOTYPE, ["trials.csv"])
    for text in (two, one, retrain, sweep):
        assert f"\n\n```\n{GENOTYPE}\n```\n\n" in text
        assert ["parameters", "40,482"] in rows(text)
        assert ["multiply-adds", "1,400,000"] in rows(text)
        assert ["digest", f"`{GENOTYPE.digest()[:12]}`"] in rows(text)
        assert "--config config.yaml`" in text
    assert ["validation top-1", "97.50 %"] in rows(two)
    assert "99.16" not in two
    assert "measured on the alpha half: the part of the training pictures" in two
    assert "measured on the hold-out: the part of the training pictures" in retrain
    assert "skip_connect <- c(k-2), dil_conv_3x3 <- c(k-1)" in two
    assert ["test top-1", "99.16 %"] in rows(one)
    assert ["normal 0", "3", "limit"] in rows(one)
    first = "99.16 % test top-1, 97.50 % validation top-1: retraining on digits, 1 epoch.\n"
    assert retrain.startswith(first)
    assert sweep.startswith(
        "96.00 % top-1 by trial 3: sweep on digits, 12 trials, 7 finished, 4 stopped early, 1 failed;"
    )
    assert ["test top-1", "99.16 %"] in rows(retrain)
    assert ["time", "1 min 23 s"] in rows(retrain)
    assert ["search.lr", "uniform 0 .. 1", "0.1"] in rows(sweep)
    assert ["Kendall's tau between search and retraining", "not defined"] in rows(sweep)
    assert "All trials: `trials.csv`." in sweep


def test_a_split_that_was_not_measured_is_not_shown() -> None:
    result = {key: value for key, value in RESULT.items() if key != "test_top1"}
    text = mlflow_note.of_retraining("digits", 2, result, GENOTYPE)
    assert "test top-1" not in text
    assert ["validation top-1", "97.50 %"] in rows(text)


def test_top5_is_shown_below_top1_where_it_was_measured() -> None:
    result = {**RESULT, "valid_top5": 0.99, "test_top5": 0.9987}
    retrain = mlflow_note.of_retraining("cifar100", 1, result, GENOTYPE)
    assert rows(retrain)[:4] == [
        ["test top-1", "99.16 %"],
        ["test top-5", "99.87 %"],
        ["validation top-1", "97.50 %"],
        ["validation top-5", "99.00 %"],
    ]
    assert retrain.startswith("99.16 % test top-1, 97.50 % validation top-1: retraining")
    two = mlflow_note.of_search("two_stage", "cifar100", 12, result, GENOTYPE)
    assert rows(two)[:2] == [["validation top-1", "97.50 %"], ["validation top-5", "99.00 %"]]
    assert "top-5" not in mlflow_note.of_retraining("digits", 1, RESULT, GENOTYPE)


def test_a_bar_in_a_setting_does_not_break_the_table() -> None:
    text = mlflow_note.of_sweep("digits", {"data.root": "choice a|b"}, SWEEP, GENOTYPE, [])
    assert ["data.root", "choice a\\|b", ""] in rows(text)


def test_a_truncated_description_keeps_its_links_and_closes_its_code() -> None:
    long = "Title.\n\n```\n" + "sep_conv_3x3 <- 0\n" * 500 + "```"
    text = with_links(long, [Kin("search", "s", "1", "ab")], "cd", ["cells/normal.png", "cells/reduce.svg"])
    assert 4900 < len(text) <= 5000
    assert text.startswith("Title.\n\nOf [search s](#/experiments/1/runs/ab).\n\n```\nsep_conv")
    assert text.count("```") == 2
    assert text.endswith("![reduce cell](get-artifact?path=cells/reduce.svg&run_uuid=cd)")


def test_a_cell_of_a_benchmark_is_named_by_its_string_and_index() -> None:
    genotype = genotype_at(1462)
    text = mlflow_note.of_retraining("digits", 1, RESULT, genotype)
    assert f"\n\n```\n{genotype}\n```\n\n" in text
    assert str(genotype).startswith("|nor_conv_3x3~0|+|")
    assert "- genotype: `nas_bench_201:1462`\n" in text
    assert "- genotype: " not in mlflow_note.of_retraining("digits", 1, RESULT, GENOTYPE)
