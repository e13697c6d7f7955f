"""`istanas new`: the configuration that it writes for a picture folder, the budget, and bad input."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from istanas.data.folders import count_of
from pipeline.cli.commands import run
from pipeline.config.keys import value_at
from pipeline.config.load import load
from pipeline.config.threads import usable_cores
from pipeline.jobs import new, proposal

TINY = ("space.nodes=1", "search.layers=3", "retrain.layers=2", "runtime.threads=1", "runtime.device=cpu")
SETTINGS = tuple(f"--set={each}" for each in TINY)  # networks that are cheap to measure

Outcome = tuple[int, str, str]
Command = Callable[..., Outcome]


def letters(root: Path) -> None:
    """Grey pictures of two classes with different sizes around 16 pixels: 40 for training and 8 for testing."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 4)):
        for name in ("bars", "noise"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                height, width = rng.integers(15, 20, 2)
                pixels = rng.integers(0, 256, (height, width), dtype=np.uint8)
                if name == "bars":
                    pixels[::2] = 255
                Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.fixture
def istanas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `istanas new` in this process, in a folder with pictures: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    letters(tmp_path / "letters")

    def command(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = run(["new", *arguments])
        return code, *capsys.readouterr()

    return command


def test_the_file_loads_and_gives_reasons(istanas: Command, tmp_path: Path) -> None:
    code, out, err = istanas("letters", *SETTINGS, "--json")
    assert code == 0, err
    result: dict[str, Any] = json.loads(out)
    assert (result["config"], result["name"]) == ("letters.yaml", "letters")

    text, config = (tmp_path / "letters.yaml").read_text(), load("letters.yaml")
    assert {key: value_at(config, key) for key in result["settings"]} == result["settings"]
    assert (config.tracking.name, config.data.root) == ("letters", str(tmp_path / "letters"))
    assert (config.search.stem, config.data.image_size, config.data.crop_padding) == ("cifar", 16, 2)
    assert (config.data.holdout, config.data.horizontal_flip) == (0.0, False)
    assert (config.search.layers, config.search.batch_size) == (3, 16)
    assert (config.search.max_epochs, config.retrain.epochs) == proposal.default_epochs(40, 16)
    assert "Given with --set." in text
    assert "grey, 1 channel" in text
    assert "test_fraction" not in text, "the folder has a test split"
    for section in ("data", "search", "retrain", "runtime", "tracking"):  # a comment precedes the settings
        assert re.search(rf"^{section}:\n(  name: folder\n  root:\s+\S.*\n)?  # [A-Z]", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 120

    assert result["memory_bytes"] > 50e6
    assert result["seconds"] == pytest.approx(result["search_seconds"] + result["retrain_seconds"])
    code, out, err = istanas("letters", "--json")
    assert (code, out) == (2, "")
    assert err == "error: --out: letters.yaml exists; name another file, or replace it with --force\n"
    assert (tmp_path / "letters.yaml").read_text() == text


def test_class_folders_without_splits_are_divided(istanas: Command, tmp_path: Path) -> None:
    code, out, err = istanas("letters/train", *SETTINGS, "--out", "divided.yaml", "--json")
    assert code == 0, err
    assert "32 training and 8 test pictures of 2 classes" in err
    config, text = load("divided.yaml"), (tmp_path / "divided.yaml").read_text()
    assert config.data.test_fraction == json.loads(out)["settings"]["data.test_fraction"] == 0.2
    assert "# The folder has no test split" in text
    assert "32 training and 8 test pictures" in text
    few = "warning: 32 training pictures of 2 classes; a network needs at least 20 pictures of each class"
    assert few in err
    assert f"#   {few}" in text
    assert "warning: 8 test pictures; the 95 % interval of the test accuracy" in err


@pytest.mark.skipif(usable_cores() < 2, reason="one core has no other number of threads")
def test_the_faster_number_of_threads_is_in_the_file(
    istanas: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        code, _, err = istanas("letters", *(each for each in SETTINGS if "threads" not in each))
    finally:
        torch.set_num_threads(before)
    assert code == 0, err
    text = Path("letters.yaml").read_text()
    found = re.search(
        r"# A step of the search took (\d+) ms with 1\s+(?:# )?thread, and (\d+) ms with (\d+)", text
    )
    assert found is not None
    one, several, most = map(int, found.groups())
    assert most == usable_cores()
    chosen = load("letters.yaml").runtime.threads
    if one != several:  # rounded
        assert chosen == (1 if one < several else None)
    shown = count_of(chosen or most, "thread")
    assert f"cpu, {shown}, " in text, "the estimate is for the number of threads in the file"


@pytest.mark.parametrize(("slower", "threads"), [(8, 1), (0.25, None)])
def test_the_seconds_of_a_step_decide_the_threads(slower: float, threads: int | None) -> None:
    """A step with two threads that takes much longer is repeated once only."""
    done: list[int] = []

    def train(n: int, observe: Callable[[], None]) -> None:
        for _ in range(n):
            done.append(torch.get_num_threads())
            time.sleep(0.01 if done[-1] == 1 else 0.01 * slower)
            observe()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        choice = new._threads(cast(Any, SimpleNamespace(train=train)))
        assert choice is not None
        assert (choice.value, torch.get_num_threads()) == (threads, threads or 2)
    finally:
        torch.set_num_threads(before)
    assert len(done) == (8 if threads == 1 else 12)


def test_a_budget_decides_the_epochs(istanas: Command, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("method: one_stage\n")
    code, out, err = istanas("letters", "--budget", "1m", "--out", "own.yaml", "--force", *SETTINGS, "--json")
    assert code == 0, err
    result, config = json.loads(out), load("own.yaml")
    assert result["budget_seconds"] == 60
    epochs = config.search.max_epochs, config.retrain.epochs
    assert result["seconds"] <= 60
    assert result["seconds"] > 30 or epochs == proposal.MAX_EPOCHS, "the epochs fill the budget"
    assert result["name"] == "letters"

    code, out, err = istanas("letters", "--budget", "0.0001m", "--out", "short.yaml", *SETTINGS)
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("error: --budget: 0.0 s is less than an epoch of search and retraining, ")
    assert line.endswith(
        "; give more time or fewer pictures, or measure when no other program uses the cores"
    )
    assert not (tmp_path / "short.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["absent"], 2, "DIR: no such folder: "),
        (["note.txt"], 2, "DIR: .*note.txt is a file, not a folder; name a folder with CLASS/"),
        (
            ["letters/train/bars"],
            2,
            r"DIR: .*train/bars has 20 pictures but no class folders; put them into CLASS/\*$",
        ),
        (["one"], 2, "DIR: .*one has only one class, bird; two or more are needed, each in its own folder$"),
        (
            ["nothing"],
            2,
            r"DIR: .*nothing has no pictures; put them into CLASS/\*, one folder for each class$",
        ),
        (["one", "--set", "data.test_fraction=0.3"], 2, "DIR: .*one has only one class, bird; "),
        (
            ["untested"],
            2,
            r"put the pictures into test/CLASS/\*, or name a folder of CLASS/\*, such as .*untested/train$",
        ),
        (["outer"], 2, "DIR: .*outer has only one folder, inner, .*; name .*/outer/inner$"),
        (["broken"], 1, "DIR: .*0.png is not a readable picture "),
        (["empty"], 2, "DIR: .*empty/train/ant contains no picture; add some"),
        (["single"], 2, "DIR: .*single/train has no pictures; put them into train/CLASS/"),
        (["unpacked"], 2, "DIR: .*unpacked/train is missing; name .*/unpacked/photos$"),
        (["letters", "--budget", "2 hours"], 2, "--budget: '2 hours' is not a time; give minutes"),
        (["letters", "--budget", "0h"], 2, "--budget: '0h' is not a time; "),
        (["letters", "--out", "absent/new.yaml"], 2, "--out: absent/new.yaml cannot be written; "),
        (["letters", "--out", "letters", "--force"], 2, "--out: letters cannot be written; "),
        (["letters", "--set", "method=one_stage"], 2, "--set 'method=one_stage': cannot be set here; "),
        (["letters", "--set", "data.image=9"], 2, "data.image"),
        (["letters", "--set", "search.epoch=9"], 2, "did you mean epochs?"),
    ],
)
def test_bad_input_is_a_one_line_error(
    istanas: Command, tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    for split in ("train", "test"):
        for name in ("empty/{}/ant", "empty/{}/bee", "single/{}/ant", "unpacked/photos/{}/ant"):
            (tmp_path / name.format(split)).mkdir(parents=True)
    for name in (
        "one/bird",
        "outer/inner/ant",
        "outer/inner/bee",
        "untested/train/ant",
        "broken/train/ant",
        "broken/train/bee",
        "broken/test/ant",
    ):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / name / "0.png")
    (tmp_path / "broken" / "train" / "ant" / "0.png").write_text("no picture")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "note.txt").write_text("")
    found, _, err = istanas(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (found, len(lines)) == (code, 1), err
    assert re.search(says, lines[0]) or says in lines[0], err
    assert "data.test_fraction" not in lines[0] or arguments[0] != "untested"
    assert list(tmp_path.glob("*.yaml")) == []
