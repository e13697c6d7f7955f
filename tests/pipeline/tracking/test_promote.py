"""The alias `champion`: it moves only to a better version on the same pictures."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from istanas.errors import ConfigError
from pipeline.cli.commands import run as command_line
from pipeline.config.choices import METRICS
from pipeline.config.schema import TrackingSettings
from pipeline.runs.directory import RunDir
from pipeline.runs.record import DatasetUse
from pipeline.tracking.promote import Promotion, promote
from pipeline.tracking.store import open_client
from pipeline.tracking.tracker import MLflowTracker
from tests.pipeline.tracking.delivered_runs import end_run, make_run, save_small_network, small_network

Trained = Callable[..., RunDir]


@pytest.fixture
def store(tmp_path: Path, blank_database: Path) -> str:
    return f"sqlite:///{shutil.copy(blank_database, tmp_path)}"


@pytest.fixture
def trained(tmp_path: Path, store: str) -> Trained:
    """Makes finished, delivered retrainings with figures."""

    def make(name: str, *, digest: str = "d", deliver: bool = True, **figures: float) -> RunDir:
        pictures = tuple(
            DatasetUse("digits", context, 16 * letter, "here", 359, classes=10, shape=(1, 8, 8))
            for context, letter in (("training", "a"), ("hold-out", "c"), ("test", digest))
        )
        run = make_run(tmp_path / name, epochs=0, name=name, kind="retrain", datasets=pictures)
        named = {key.replace("_", "/", 1): value for key, value in figures.items()}
        run.append_metrics(1, dict.fromkeys(named, 0.5), 1000)
        run.append_metrics(2, named, 2000)
        save_small_network(run.path)
        end_run(run)
        if deliver:
            tracker = MLflowTracker(run, tracking_uri=store, experiment="tests", load_network=small_network)
            assert tracker.deliver()
        return run

    return make


def promoted(run: RunDir, store: str, metric: str = "test/top1", *, force: bool = False) -> Promotion:
    done = promote(run, TrackingSettings(uri=store), metric=metric, force=force)
    assert done.champion == (champion(store) == done.version)
    return done


def champion(store: str) -> int | None:
    client: MlflowClient = open_client(store)
    alias = client.get_registered_model("istanas-digits").aliases.get("champion")
    return None if alias is None else int(alias)


def test_the_better_one_is_the_champion_back_and_forth(trained: Trained, store: str) -> None:
    first, second = trained("first", test_top1=0.75), trained("second", test_top1=0.875)
    done = promoted(first, store)
    assert (done.moved, done.version, done.value, done.before) == (True, 1, 0.75, None)
    done = promoted(second, store)
    assert (done.moved, done.version, done.before, done.before_value) == (True, 2, 1, 0.75)
    tags = open_client(store).get_model_version("istanas-digits", "2").tags
    assert tags["istanas.champion_before"] == "1"
    assert tags["istanas.promoted"] == "test/top1 0.875 against 0.75 of version 1"

    done = promoted(first, store)
    assert (done.moved, done.champion, done.before) == (False, False, 2)
    assert done.reason == "test/top1 0.75 against 0.875 of version 2: not better"
    assert "istanas.champion_before" not in open_client(store).get_model_version("istanas-digits", "1").tags
    assert promoted(first, store, force=True).moved
    assert promoted(second, store).moved
    again = promoted(second, store)
    assert (again.moved, again.champion) == (False, True)


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_better(trained: Trained, store: str, metric: str) -> None:
    name = metric.replace("/", "_")
    low, high, same = (trained(run, **{name: value}) for run, value in (("a", 5.0), ("b", 7.0), ("c", 7.0)))
    assert promoted(low, store, metric).moved
    assert promoted(high, store, metric).moved == metric.endswith(("top1", "top5"))
    if metric.endswith(("top1", "top5")):
        assert not promoted(same, store, metric).moved, "equal is not better"


def test_figures_of_other_pictures_are_not_compared(trained: Trained, store: str) -> None:
    first, second = trained("first", test_top1=0.5), trained("second", test_top1=0.9, digest="e")
    promoted(first, store)
    with pytest.raises(
        ConfigError, match="version 2 is measured on digits eeeeeeee, the champion, version 1, on"
    ):
        promoted(second, store)
    assert champion(store) == 1
    assert promoted(second, store, force=True).moved
    assert promoted(trained("third", test_top1=0.95, digest="e"), store).moved


def test_a_run_whose_pictures_are_not_known_is_not_compared(trained: Trained, store: str) -> None:
    first = trained("first", test_top1=0.5)
    old = trained("old", test_top1=0.9, deliver=False)
    old.write(dataclasses.replace(old.read(), datasets=()))
    assert MLflowTracker(old, tracking_uri=store, experiment="tests", load_network=small_network).deliver()
    promoted(first, store)
    with pytest.raises(ConfigError, match="unknown pictures"):
        promoted(old, store)


def test_the_figure_must_be_there(trained: Trained, store: str) -> None:
    first, second = trained("first", test_top1=0.5), trained("second", test_top1=0.6)
    assert promoted(first, store, "valid/top1").moved, "without a champion nothing is chosen"
    with pytest.raises(ConfigError, match=r"valid/top1: version 2 has none; train it with data\.holdout"):
        promoted(second, store, "valid/top1")
    none = r"test/top5: version 2 has none \(top-5 is measured with more than 10 classes\); name another --metric"
    with pytest.raises(ConfigError, match=none):
        promoted(second, store, "test/top5")
    third = trained("third", valid_top1=0.6)
    with pytest.raises(ConfigError, match="valid/top1: the champion, version 1, has none"):
        promoted(third, store, "valid/top1")
    assert champion(store) == 1


def test_a_champion_without_a_run_gives_way_by_force_only(trained: Trained, store: str) -> None:
    client = open_client(store)
    client.create_registered_model("istanas-digits")
    client.create_model_version("istanas-digits", source="file:///by/hand")
    client.set_registered_model_alias("istanas-digits", "champion", "1")
    run = trained("run", test_top1=0.9)
    with pytest.raises(ConfigError, match="the champion, version 1, has none"):
        promoted(run, store)
    done = promoted(run, store, force=True)
    assert (done.version, done.before, done.before_value) == (2, 1, None)


def test_without_a_version_there_is_a_remedy(trained: Trained, store: str, tmp_path: Path) -> None:
    def refusal(run: RunDir, **settings: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            promote(run, TrackingSettings(**{"uri": store, **settings}), metric="test/top1")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    late = trained("late", test_top1=0.5, deliver=False)
    assert f"deliver it first: istanas sync {late.path}" in refusal(late)
    assert f"istanas sync {late.path} --set tracking.models=true" in refusal(late, models=False)
    assert "istanas sync" in refusal(late, uri=f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()
    two_stage = make_run(tmp_path / "two")
    end_run(two_stage)
    sweep = make_run(tmp_path / "sweep", kind="sweep")
    for run in (two_stage, sweep):
        assert f"istanas retrain --genotype {run.path}" in refusal(run)
    failed = make_run(tmp_path / "failed", kind="retrain")
    end_run(failed, "FAILED")
    assert "it is FAILED" in refusal(failed)
    named = trained("named", test_top1=0.5)
    said = refusal(named, registered_model="elsewhere")
    assert (
        said
        == "tracking.registered_model: is elsewhere, but the run is a version of istanas-digits; set that name"
    )
    (tmp_path / "broken.db").write_text("no database")
    link = json.loads((named.path / "mlflow.json").read_text())
    (named.path / "mlflow.json").write_text(
        json.dumps({**link, "tracking_uri": f"sqlite:///{tmp_path}/broken.db"})
    )
    assert "broken.db: can't be used" in refusal(named, uri=f"sqlite:///{tmp_path}/broken.db")


def test_the_command(
    trained: Trained,
    store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = command_line(["promote", *arguments, "--set", f"tracking.uri={store}"])
        out, err = capsys.readouterr()
        return code, out, err

    for name, value in (("first", 0.75), ("second", 0.875)):
        (trained(name, test_top1=value).path / "config.yaml").unlink()  # it says what a test has made up
    assert command("first")[0] == 0
    code, out, err = command("second", "--metric", "test/top1", "--json")
    assert code == 0
    result = json.loads(out)
    assert (result["version"], result["before"], result["champion"], result["moved"]) == (2, 1, True, True)
    assert "istanas-digits version 2 is the champion: test/top1 0.875 against 0.75 of version 1" in err
    code, out, err = command("first", "--metric", "test/top1")
    assert (code, err) == (1, "")
    assert out == (
        "istanas-digits version 1 is not promoted, version 2 is the champion: test/top1 0.75 against 0.875 of version "
        "2: not better\n"
    )
    code, out, err = command("first")
    assert (code, out) == (2, "")
    assert err.startswith("error: metric valid/top1: version 1 has none")
    assert err.count("\n") == 1
    assert command("first", "--metric", "train/loss")[0] == 2
    assert command("first", "--force")[0] == 0
    assert champion(store) == 1
    capsys.readouterr()
    assert command_line(["promote", "--help"]) == 0
    assert "chooses by the test split" in " ".join(capsys.readouterr().out.split())
