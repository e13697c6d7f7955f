"""The settings of search methods: how long a search with other settings of its length lasts."""

import dataclasses

import pytest

from istanas.methods import METHODS
from istanas.settings import MeasuredSettings, PcDartsSettings

CHOSEN = [name for name, method in METHODS.items() if method.settings_class().lasting(3) is not None]


def test_the_length_of_every_search_with_a_cost_can_be_chosen() -> None:
    kinds = {name: method.settings_class for name, method in METHODS.items()}
    assert [name for name, kind in kinds.items() if kind.trains and not kind.trains_target] == CHOSEN


@pytest.mark.parametrize("name", CHOSEN)
def test_a_search_of_another_length_differs_in_nothing_else(name: str) -> None:
    settings = METHODS[name].settings_class()
    assert settings.lasting(settings.max_epochs) == settings
    longer = settings.lasting(4 * settings.max_epochs)
    assert longer is not None
    assert longer.max_epochs == 4 * settings.max_epochs
    of_length = {"epochs", "stages", "warmup_epochs"}
    changed = {
        field.name
        for field in dataclasses.fields(settings)
        if getattr(settings, field.name) != getattr(longer, field.name)
    }
    assert changed <= of_length


def test_a_warm_up_stays_shorter_than_its_search() -> None:
    settings = PcDartsSettings()
    for epochs in range(1, 60):
        shorter = settings.lasting(epochs)
        assert shorter.warmup_epochs < shorter.epochs == epochs


def test_every_stage_keeps_its_fidelity_and_two_measurements() -> None:
    assert MeasuredSettings(stages=((120, 3), (30, 8))).lasting(3).stages == ((2, 3), (2, 8))
    deep = MeasuredSettings(stages=((20, 1), (20, 1, 8), (20, 1, 17)), layers=8)
    assert deep.lasting(120, n_architectures=50).stages == ((25, 1), (25, 1, 8), (40, 1, 17)), (
        "the first two are equal"
    )
