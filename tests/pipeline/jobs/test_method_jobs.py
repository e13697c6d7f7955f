"""Each search method as a user's job: the printed genotype, an interrupted search, and settings that do not fit.

A new method is tested by one line in `METHOD_SETTINGS`.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from istanas.errors import ConfigError
from istanas.space import CellSpace, Genotype
from pipeline.cli.commands import run
from tests.pipeline.jobs.tiny_search import SETTINGS, decided, search, search_stopped_after_two

# The settings of a search of three epochs, in addition to those of `tiny_search`.
METHOD_SETTINGS: dict[str, list[str]] = {
    "darts": ["search.second_order=true"],
    "pc_darts": ["search.warmup_epochs=1"],
}


def overrides(method: str) -> list[str]:
    return [f"method={method}", "search.max_pictures=100", *METHOD_SETTINGS[method]]


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
    assert 0 <= result["valid_top1"] <= 1
    (folder,) = (tmp_path / "runs").iterdir()
    metrics = [line for line in decided(folder) if "train/loss" in line]
    assert len(metrics) == 3
    assert all(0 < line["arch/entropy"] < 3 and "recovery/gap" not in line for line in metrics)


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_an_interrupted_search_resumes_bit_for_bit(method: str, tmp_path: Path) -> None:
    found: list[Any] = []
    for folder in ("whole", "stopped"):
        if folder == "stopped":
            search_stopped_after_two(tmp_path / folder, *overrides(method))
        result, _ = search(tmp_path / folder, *overrides(method))
        (run_dir,) = (tmp_path / folder).iterdir()
        found.append((result["digest"], decided(run_dir)))
    assert found[0] == found[1]


def test_channels_that_cannot_be_divided_are_an_error_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^search\.init_channels: an operation has 6 channels") as caught:
        search(tmp_path, *overrides("pc_darts"), "search.init_channels=6")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("checkpoints"))
