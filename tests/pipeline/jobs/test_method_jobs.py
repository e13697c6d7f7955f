"""Each search method as a user's job: the printed genotype, an interrupted search, and settings that do not fit.

A new method is tested by one line in `METHOD_SETTINGS`.
"""

import json
from pathlib import Path

import pytest

from istanas.errors import ConfigError
from istanas.space import CellSpace, Genotype
from pipeline.cli.commands import run
from tests.pipeline.jobs.tiny_search import SETTINGS, decided, search, search_stopped_after_two

# The settings of a search of three epochs, in addition to those of `tiny_search`, and the method's own metrics.
METHOD_SETTINGS: dict[str, tuple[list[str], set[str]]] = {
    "darts": (["search.second_order=true"], {"arch/entropy"}),
    "pc_darts": (["search.warmup_epochs=1"], {"arch/entropy"}),
    "gdas": ([], {"arch/temperature"}),
    "random_nas": (["search.candidates=4", "search.candidate_pictures=40", "search.finalists=2"], set()),
    "measured": (
        ["search={stages: [[3, 1]], batch_size: 64, init_channels: 4, layers: 3, max_pictures: 100}"],
        {
            *(f"measured/{name}" for name in ("count", "epochs", "layers", "noise", "certain_choices")),
            *(f"measured/{name}" for name in ("expected_improvement", "predicted", "predicted_deviation")),
        },
    ),
}


def overrides(method: str) -> list[str]:
    return [f"method={method}", "search.max_pictures=100", *METHOD_SETTINGS[method][0]]


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_the_command_prints_the_genotype(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [argument for each in [*SETTINGS, *overrides(method)] for argument in ("--set", each)]
    assert run(["search", "--json", *settings]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    genotype = Genotype.from_dict(result["genotype"])
    assert genotype.digest() == result["digest"]
    assert all(
        len(picks) == 2 for kind in genotype.kinds for picks in CellSpace(n_nodes=2).supports(genotype)[kind]
    )
    assert ("valid_top1" in result) == (method != "measured")
    (folder,) = (tmp_path / "runs").iterdir()
    metrics = [line for line in decided(folder) if "train/loss" in line]
    assert len(metrics) == 3
    assert result.get("valid_top1", metrics[-1]["valid/top1"]) == metrics[-1]["valid/top1"]
    for line in metrics:
        assert "recovery/gap" not in line
        own = {name: line[name] for name in line if name.startswith(("arch/", "measured/"))}
        assert own.pop("arch/skip_ratio") >= 0
        assert set(own) <= METHOD_SETTINGS[method][1]
        assert all(-10 <= value <= 10 for value in own.values())
    assert METHOD_SETTINGS[method][1] <= set(metrics[-1])


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_an_interrupted_search_resumes_bit_for_bit(method: str, tmp_path: Path) -> None:
    whole, text = search(tmp_path / "whole", *overrides(method))
    search_stopped_after_two(tmp_path / "stopped", *overrides(method))
    resumed, _ = search(tmp_path / "stopped", *overrides(method))
    assert resumed["genotype"] == whole["genotype"]
    assert decided(Path(resumed["run_dir"])) == decided(Path(whole["run_dir"]))
    assert text.count("top-1") >= 3


def test_channels_that_cannot_be_divided_are_an_error_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^search\.init_channels: an operation has 6 channels") as caught:
        search(tmp_path, *overrides("pc_darts"), "search.init_channels=6")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("checkpoints"))
