"""Settings against the pictures that they are for."""

import pytest
from rich.console import Console

from istanas.errors import ConfigError
from pipeline.config import load
from pipeline.jobs.job import prepare_data


@pytest.mark.parametrize("job", ["search", "retrain"])
def test_a_holdout_that_leaves_nothing_is_blamed(job: str) -> None:
    config = load(None, ["data.holdout=0.9995"])
    with pytest.raises(ConfigError) as caught:
        prepare_data(config, (job,), Console(quiet=True))
    assert str(caught.value).startswith("data.holdout is 0.9995: of 1438 pictures it leaves ")
    assert str(caught.value).endswith("for training, lower it")
