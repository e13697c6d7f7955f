"""Settings against the pictures that they are for."""

from pathlib import Path

import pytest

from istanas.data import load_dataset
from istanas.errors import ConfigError
from pipeline.cli import run
from pipeline.config import default_file, load
from pipeline.jobs.job import check_data, warnings_of


@pytest.mark.parametrize("job", ["search", "retrain"])
def test_a_holdout_that_leaves_nothing_is_blamed(job: str) -> None:
    config = load(None, ["data.holdout=0.9995"])
    with pytest.raises(ConfigError) as caught:
        check_data(config, load_dataset("digits"), (job,))
    assert str(caught.value).startswith("data.holdout is 0.9995: of 1438 pictures it leaves ")
    assert str(caught.value).endswith("for training, lower it")


@pytest.mark.parametrize("holdout", ["0.999", "0.9995"])
@pytest.mark.parametrize(
    "command",
    [
        ["search"],
        ["retrain", "--genotype", "random:0"],
        ["run"],
        ["sweep", "--config", str(default_file().with_name("sweep_digits.yaml"))],
    ],
    ids=lambda words: words[0],
)
def test_a_command_blames_the_holdout(
    command: list[str],
    holdout: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The halves of a search divide what it leaves, and must not be blamed."""
    monkeypatch.chdir(tmp_path)
    assert run([*command, "--set", f"data.holdout={holdout}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: data.holdout is {holdout}: of 1438 pictures it leaves ")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["space.ops=[skip_connect]"], "space.ops has one operation and space.sparsity is 2"),
        (["data.crop_padding=40"], "data.crop_padding is 40 with pictures of 8x8"),
        (["search.batch_size=2000"], "search.batch_size is 2000, above the 1438 training pictures"),
    ],
)
def test_settings_that_make_no_sense_are_warned_of(overrides: list[str], says: str) -> None:
    digits = load_dataset("digits")
    (line,) = warnings_of(load(None, overrides), digits, ("search",))
    assert line.startswith(f"warning: {says}")
    assert warnings_of(load(None), digits, ("search",)) == []


@pytest.mark.parametrize("name", ["../up", "/tmp/x", "a/b", "..", "."])
def test_a_name_that_leaves_the_runs_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.name is .*: it names a folder"):
        load(None, [f"tracking.name={name}"])
