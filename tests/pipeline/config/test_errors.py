"""Errors of a configuration: their attributes, not only their text, survive loading, nesting and pickling."""

import pickle

import pytest

from istanas.errors import ConfigError
from pipeline.config.errors import ConfigErrors, ConflictError, fields_of, mistakes_of, one_error
from pipeline.config.load import load


def refused(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(None, overrides)
    return caught.value


def test_each_of_several_mistakes_is_an_error_with_its_attributes() -> None:
    error = refused("search.epoch=3", "seed=-1")
    assert isinstance(error, ConfigErrors)
    unknown, negative = sorted(mistakes_of(error), key=lambda mistake: str(mistake.field))
    assert (unknown.source, unknown.field) == ("--set 'search.epoch=3'", "search.epoch")
    assert (unknown.problem, unknown.remedy) == ("unknown key", "did you mean epochs?")
    assert (negative.source, negative.field) == ("--set 'seed=-1'", "seed")
    assert str(error).splitlines() == [str(mistake) for mistake in mistakes_of(error)]


def test_a_single_mistake_is_no_list() -> None:
    error = refused("runtime.workers=many")
    assert mistakes_of(error) == (error,)
    assert (error.field, error.remedy) == (
        "runtime.workers",
        "give a number or MIN:MAX, such as 2 or 1:4",
    )


@pytest.mark.parametrize("override", ["search.lr_min=0.5", "search.lr=0.0001"])
def test_a_conflict_names_the_override_of_any_of_its_fields(override: str) -> None:
    error = refused(override)
    assert isinstance(error, ConflictError)
    assert fields_of(error) == ("search.lr_min", "search.lr")
    assert (error.source, error.field) == (f"--set {override!r}", "search.lr_min")


def test_a_source_is_added_to_every_mistake_and_pickling_keeps_all() -> None:
    mistakes = [
        ConflictError("1 is above b", fields=("a", "b"), remedy="lower it"),
        ConfigError("missing", field="c"),
    ]
    error = pickle.loads(pickle.dumps(one_error(mistakes).in_source("sweep.yaml")))
    assert str(error) == "sweep.yaml: a: 1 is above b; lower it\nsweep.yaml: c: missing"
    assert [fields_of(mistake) for mistake in mistakes_of(error)] == [("a", "b"), ("c",)]
