"""Searches with costs as a user's job: five seeds within a limit, its trace in the results, and limits that fail."""

from pathlib import Path

import pytest

from istanas.effects import supports_of
from istanas.errors import ConfigError
from istanas.space import Genotype
from pipeline.config.load import load
from pipeline.runs.directory import RunDir
from pipeline.training.build import network_cost, target_sizes
from pipeline.training.pictures import open_dataset, settle_stems
from tests.pipeline.jobs.tiny_search import SETTINGS, search
from tests.pipeline.report.pages import Page

MEASURED = [
    "method=measured",
    "search={stages: [[4, 1]], batch_size: 50, init_channels: 2, layers: 3, max_pictures: 100}",
]
RETRAIN = "retrain={init_channels: 8, layers: 5}"


def test_five_searches_end_within_80_percent_of_the_multiply_adds(tmp_path: Path) -> None:
    """The cost is that of the retraining. The trajectory and the metrics show the weight that was necessary."""
    raised = 0
    for seed in range(5):
        common = [f"seed={seed}", RETRAIN, "search.epochs=2"]
        free, lines = search(tmp_path / "free", *common)
        assert "cost weight" not in lines
        limit = int(0.8 * free["macs"])
        found, lines = search(tmp_path / "limited", *common, f"search.max_macs={limit}")
        assert found["macs"] <= limit
        config = settle_stems(load(None, [*SETTINGS, *common]))
        dataset = open_dataset(config, ("search",))
        genotype = Genotype.from_dict(found["genotype"])
        assert network_cost(config, target_sizes(config), dataset, genotype).macs == found["macs"]
        weights = [line.metrics["arch/cost_weight"] for line in RunDir(Path(found["run_dir"])).metrics()]
        assert len(weights) == 2
        assert f", cost weight {weights[-1]:.3g}," in lines
        page = Page(Path(found["run_dir"]) / "trajectory.html")
        assert f"weight of the costs {weights[-1]:.3g}" in page.source
        raised += weights[-1] > 0
    assert raised >= 2


def test_a_weight_of_the_costs_gives_a_cheaper_cell(tmp_path: Path) -> None:
    free, _ = search(tmp_path / "free", RETRAIN)
    cheap, _ = search(tmp_path / "cheap", RETRAIN, "search.cost_weight=20", "search.cost=params")
    assert cheap["params"] < free["params"]


def test_a_search_by_measurements_reports_only_choices_within_its_limit(tmp_path: Path) -> None:
    free, _ = search(tmp_path / "free", *MEASURED, RETRAIN)
    limit = int(0.8 * free["macs"])
    found, _ = search(tmp_path / "limited", *MEASURED, RETRAIN, f"search.max_macs={limit}")
    assert found["macs"] <= limit
    config = settle_stems(load(None, [*SETTINGS, *MEASURED, RETRAIN]))
    dataset, space = open_dataset(config, ("search",)), config.space.build()
    following = [each["candidates"] for each in found["effects"]["next"]]
    assert len(following) == 5
    for kept in following:
        genotype = space.genotype(supports_of(space, tuple(kept)))
        assert network_cost(config, target_sizes(config), dataset, genotype).macs <= limit


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["search.max_macs=1000"], "search.max_macs: 1,000 is below the cheapest architecture, which has"),
        (["search.max_params=10"], "search.max_params: 10 is below the cheapest architecture, which has"),
        (
            ["search.cost_weight=-1"],
            "search.cost_weight: -1 is invalid: input should be greater than or equal to 0",
        ),
        (["search.cost=joules"], "search.cost: "),
        (["method=random_nas", "search.cost_weight=1"], "search.cost_weight: unknown key"),
        (
            ["method=gdas", "search.max_macs=1000"],
            "search.max_macs: 1,000 is below the cheapest architecture",
        ),
        ([*MEASURED, "search.cost_weight=1"], "search.cost_weight: unknown key"),
        (
            [*MEASURED, "search.max_params=10"],
            "search.max_params: 10 is below the cheapest architecture, which has",
        ),
    ],
)
def test_wrong_costs_are_refused_before_any_work(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        search(tmp_path / "runs", *overrides)
    assert message in str(caught.value)
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())
