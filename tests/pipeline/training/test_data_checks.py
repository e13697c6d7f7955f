"""Settings against the pictures that they are for."""

import re
from pathlib import Path

import pytest

from istanas.data import load_dataset
from istanas.errors import ConfigError
from pipeline.cli.commands import run
from pipeline.config.load import default_file, load
from pipeline.jobs.lifecycle import check_data
from pipeline.sweeps.check import warnings_of_space
from pipeline.training.data_checks import warnings_of


@pytest.mark.parametrize("job", ["search", "retrain"])
def test_a_holdout_that_leaves_nothing_is_blamed(job: str) -> None:
    config = load(None, ["data.holdout=0.9995", "retrain.cutout=0"])
    with pytest.raises(ConfigError) as caught:
        check_data(config, load_dataset("digits"), (job,))
    assert str(caught.value).startswith("data.holdout: 0.9995 leaves ")
    assert str(caught.value).endswith(" of 1438 pictures for training; lower it")


ONE_STAGE = ("method=one_stage", "search.cutout=0")


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
    assert line.startswith(f"error: data.holdout: {holdout} leaves ")


@pytest.mark.parametrize(
    ("overrides", "job", "says"),
    [
        (["space.ops=[skip_connect]"], "search", "space.ops has one operation: with space.sparsity = 2 only"),
        (
            ["data.crop_padding=40"],
            "search",
            "data.crop_padding is 40: most crops of pictures of 8x8 pixels",
        ),
        # What a step draws from: half of the pictures, a part of half of them, all but the hold-out.
        (["search.batch_size=720"], "search", "search.batch_size is 720: above the 719 pictures that train"),
        (
            ["search.batch_size=76", "search.max_pictures=150"],
            "search",
            "search.batch_size is 76: above the 75",
        ),
        (
            ["search.batch_size=512", "search.alpha_fraction=0.75"],
            "search",
            "search.batch_size is 512: above the 360 pictures that train the weights, so that an epoch is one step",
        ),
        (
            [*ONE_STAGE, "search.batch_size=1439"],
            "search",
            "search.batch_size is 1439: above the 1438 pictures of",
        ),
        (
            [*ONE_STAGE, "search.max_pictures=95"],
            "search",
            "search.batch_size is 96: above the 95 pictures of the",
        ),
        (
            ["retrain.batch_size=1000", "data.holdout=0.5"],
            "retrain",
            "retrain.batch_size is 1000: above the 719 training pictures, so that an epoch is one step; lower it",
        ),
        (
            ["retrain.stem=imagenet"],
            "retrain",
            "retrain.stem is imagenet: a network with it loses most details for pictures of 8x8",
        ),
    ],
)
def test_settings_that_make_no_sense_are_warned_of(overrides: list[str], job: str, says: str) -> None:
    digits = load_dataset("digits")
    (line,) = warnings_of(load(None, overrides), digits, (job,))
    assert line.startswith(f"warning: {says}")


@pytest.mark.parametrize(
    ("overrides", "job"),
    [
        ([], "search"),
        (["search.batch_size=719"], "search"),
        ([*ONE_STAGE, "search.batch_size=1438"], "search"),
        (["retrain.batch_size=1438"], "retrain"),
    ],
)
def test_settings_that_make_sense_are_not_warned_of(overrides: list[str], job: str) -> None:
    assert warnings_of(load(None, overrides), load_dataset("digits"), (job,)) == []


@pytest.mark.parametrize(
    ("sweep", "settings", "says"),
    [
        (
            "space: {search.batch_size: {choice: [64, 128, 4096]}}",
            [],
            ["sweep.space: search.batch_size is 4096"],
        ),
        (
            "space: {search.batch_size: {int: [2000, 4096]}}",
            [],
            ["sweep.space: search.batch_size is 2000", "sweep.space: search.batch_size is 4096"],
        ),
        # The sweep's own setting is warned of once, and only if trials have it.
        (
            "space: {search.lr: {uniform: [0.01, 0.1]}}",
            ["search.batch_size=720"],
            ["search.batch_size is 720"],
        ),
        ("space: {search.batch_size: {choice: [64, 128]}}", ["search.batch_size=720"], []),
        (
            "space: {search.alpha_fraction: {uniform: [0.5, 0.8]}}",
            ["search.batch_size=512"],
            ["search.batch_size is 512"],
        ),
        ("space: {data.crop_padding: {int: [0, 9]}}", [], ["sweep.space: data.crop_padding is 9"]),
        (
            "space: {space.ops: {choice: [[skip_connect], [skip_connect, sep_conv_3x3]]}}",
            [],
            ["sweep.space: space.ops has one operation"],
        ),
        ("space: {search.lr: {uniform: [0.01, 0.1]}}", ["search.stem=imagenet"], ["search.stem is imagenet"]),
        (
            "space: {retrain.batch_size: {choice: [64, 1439]}}",  # trials do not retrain
            [],
            [],
        ),
        (
            "objective: retrained, space: {retrain.batch_size: {choice: [64, 1300]}}",
            ["data.holdout=0.1"],
            ["sweep.space: retrain.batch_size is 1300"],
        ),
        (
            "space: {method: {choice: [two_stage, one_stage]}, search.batch_size: {fixed: 800}, "
            "search.cutout: {fixed: 0}}",
            ["data.holdout=0.1"],
            ["sweep.space: search.batch_size is 800"],
        ),
    ],
)
def test_a_sweep_warns_once_of_its_settings_and_of_each_value_of_its_space(
    sweep: str, settings: list[str], says: list[str]
) -> None:
    config = load(None, [f"sweep={{{sweep}}}", "retrain.cutout=0", *settings])
    lines = warnings_of_space(config, load_dataset("digits"))
    assert [re.split(": (above|most crops|a network|with)", line)[0] for line in lines] == [
        f"warning: {each}" for each in says
    ]
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize("name", ["../up", "/tmp/x", "a/b", "..", "."])
def test_a_name_that_leaves_the_runs_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.name: .* cannot name a folder"):
        load(None, [f"tracking.name={name}"])
