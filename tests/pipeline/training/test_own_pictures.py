"""What people's own pictures do to a command, from the command line alone."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from pipeline.cli.commands import run
from pipeline.tracking.store import open_client

TINY = """
data: {name: folder, root: pictures, cache_dir: cache}
space: {nodes: 1}
search: {epochs: 1, batch_size: 4, init_channels: 2, layers: 3}
retrain: {epochs: 1, batch_size: 4, init_channels: 2, layers: 2, auxiliary_weight: 0, cutout: 0}
runtime: {threads: 1, device: cpu}
tracking: {enabled: false}
"""
RETRAIN = ("retrain", "--genotype", "random:0")
JOBS = {"search": ("search",), "retrain": RETRAIN, "run": ("run",)}


class Done(NamedTuple):
    """What a command left: exit code, JSON object (None of a failed one), lines for people."""

    code: int
    result: Any
    said: str

    @property
    def run_dir(self) -> Path:
        return Path(self.result["run_dir"])

    @property
    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.run_dir / "run.json").read_text())
        return record

    @property
    def error(self) -> str:
        """The one line of a command that failed, after what it said before."""
        assert self.code in (1, 2), self.said
        (line,) = (line for line in self.said.splitlines() if line.startswith("error: "))
        return line


Command = Callable[..., Done]


@pytest.fixture
def istanas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in a folder with a configuration and the folder `pictures`: two classes, 8x8 pixels, grey."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    for shade, name in enumerate(("ant", "bee")):
        write("train", name, 8, shade=100 * shade)
        write("test", name, 2, shade=100 * shade + 50)

    def command(*arguments: str) -> Done:
        capsys.readouterr()
        code = run([*arguments, "--config", "tiny.yaml", "--json"])
        out, err = capsys.readouterr()
        return Done(code, json.loads(out) if code == 0 else None, err)

    return command


def write(split: str, name: str, count: int, side: int = 8, shade: int = 0, suffix: str = ".bmp") -> None:
    """Pictures of noise, which all have the same size and time as files."""
    folder = Path("pictures", split, name)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number + shade).integers(0, 256, (side, side), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}{suffix}")
        os.utime(folder / f"{number}{suffix}", (1e9, 1e9))


def swap(first: Path, second: Path) -> None:
    first.rename(first.with_name("kept"))
    second.rename(first)
    first.with_name("kept").rename(second)


def unfinish(run_dir: Path) -> None:
    """As a kill before the end leaves it."""
    record = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**record, "status": "RUNNING"}))


def training_digest(done: Done) -> str:
    (digest,) = (use["digest"] for use in done.record["datasets"] if use["context"] == "training")
    return str(digest)


# ---------- the pictures that are there now
def test_fresh_trains_with_corrected_labels(istanas: Command) -> None:
    """Files that only change places, with equal sizes and times, as after unpacking an archive."""
    before = training_digest(istanas(*RETRAIN))
    swap(Path("pictures/train/ant"), Path("pictures/train/bee"))
    fresh = training_digest(istanas(*RETRAIN, "--fresh"))
    shutil.rmtree("cache")
    without_cache = training_digest(istanas(*RETRAIN, "--fresh"))
    assert fresh == without_cache != before


@pytest.mark.parametrize("job", JOBS)
def test_a_finished_run_of_other_pictures_is_refused(job: str, istanas: Command) -> None:
    assert istanas(*JOBS[job]).code == 0
    write("train", "ant", 24)
    write("train", "cat", 8)
    refused = istanas(*JOBS[job])
    assert refused.code == 1
    assert "data set folder has changed since this run began" in refused.error
    assert "--fresh" in refused.error
    assert istanas(*JOBS[job], "--fresh").code == 0


@pytest.mark.parametrize("job", ["search", "retrain"])
def test_an_unfinished_run_of_other_pictures_is_refused_and_left_as_it_is(job: str, istanas: Command) -> None:
    run_dir = istanas(*JOBS[job]).run_dir
    unfinish(run_dir)
    record = (run_dir / "run.json").read_bytes()
    write("train", "ant", 24)
    assert "data set folder has changed" in istanas(*JOBS[job]).error
    assert (run_dir / "run.json").read_bytes() == record


# ---------- how they are read
def test_what_is_composited_and_scaled_is_said_once(istanas: Command) -> None:
    for number, file in enumerate(sorted(Path("pictures").glob("*/*/*.bmp"))):
        picture = Image.new("LA", (8, 8), (0, 16 * number % 256))
        picture.save(file.with_suffix(".png"))
        file.unlink()
    said = istanas(*RETRAIN).said
    assert said.count("20 pictures have transparency, such as ") == 1
    assert said.count("composited over data.background #ffffff") == 1


def test_bits_of_the_training_pictures_are_written_beside_the_network(istanas: Command) -> None:
    for number, file in enumerate(sorted(Path("pictures").glob("*/*/*.bmp"))):
        Image.fromarray(np.full((8, 8), 12 * number, np.uint16)).save(file.with_suffix(".png"))
        file.unlink()
    done = istanas(*RETRAIN)
    assert "20 pictures have more than 8 bits per channel" in done.said
    assert json.loads((done.run_dir / "network.json").read_text())["preprocessing"]["bits"] == 8


# ---------- what is there, and what is left out
@pytest.mark.parametrize("job", JOBS)
def test_pictures_in_a_sub_folder_stop_a_job(job: str, istanas: Command) -> None:
    folder = Path("pictures/train/ant/more")
    folder.mkdir()
    for number in range(1, 8):
        Path(f"pictures/train/ant/{number}.bmp").rename(folder / f"{number}.bmp")
    assert (
        "7 of 8 files of pictures/train/ant would be left out (7 files in sub-folders"
        in istanas(*JOBS[job]).error
    )
    allowed = istanas(*JOBS[job], "--set", "data.allow_left_out=true")
    assert allowed.code == 0
    assert (
        "pictures: left out: 7 files in sub-folders, such as pictures/train/ant/more/1.bmp\n" in allowed.said
    )


def test_a_class_without_test_pictures_is_reported_everywhere(istanas: Command, tmp_path: Path) -> None:
    shutil.rmtree("pictures/test/bee")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    tracked = (
        "--set",
        "tracking.enabled=true",
        "--set",
        f"tracking.uri={store}",
        "--set",
        "tracking.models=false",
    )
    done = istanas(*RETRAIN, *tracked)
    line = "the test split has no picture of bee"
    assert line in done.said
    assert line in (done.run_dir / "report.html").read_text()
    tags = open_client(store).get_run(done.result["mlflow_run_id"]).data.tags
    assert tags["istanas.missing_classes"] == "test: bee"
    assert line in tags["mlflow.note.content"]


def test_a_class_that_a_half_of_a_search_lacks_is_told(istanas: Command) -> None:
    for number in range(1, 8):
        Path(f"pictures/train/bee/{number}.bmp").unlink()
    for fraction, part in (("0.3", "alpha half"), ("0.7", "training part")):
        done = istanas("search", "--set", f"search.alpha_fraction={fraction}")
        assert f"the {part} has no picture of bee" in done.said
        assert f"the {part} has no picture of bee" in (done.run_dir / "report.html").read_text()


# ---------- sizes and stems
@pytest.mark.parametrize("job", JOBS)
def test_one_line_says_before_any_work_what_there_is(job: str, istanas: Command) -> None:
    line = (
        "pictures: folder: 16 training and 4 test pictures of 2 classes, 8x8 pixels, grey, as they are, kept in "
        "memory\n"
    )
    said = istanas(*JOBS[job]).said
    assert said.index(line) < said.index("epoch 1")
    said = istanas(*JOBS[job], "--set", "data={name: digits}", "--set", "search.max_pictures=50").said
    line = "pictures: digits: 1,438 training and 359 test pictures of 10 classes, 8x8 pixels, grey, kept in memory\n"
    assert said.index(line) < said.index("epoch 1")


def test_one_large_picture_does_not_make_a_folder_large(istanas: Command) -> None:
    write("train", "ant", 1, side=80)
    refused = istanas(*RETRAIN)
    assert "pictures/train/ant/0.bmp has 80x80 pixels, others have 8x8" in refused.error
    done = istanas(*RETRAIN, "--set", "data.image_size=8")
    assert "8x8 to 80x80 pixels, grey, scaled and cropped to 8x8, kept in memory" in done.said


def large(count: int = 2) -> None:
    shutil.rmtree("pictures")
    for split in ("train", "test"):
        for shade, name in enumerate(("ant", "bee")):
            write(split, name, count, side=80, shade=100 * shade)


def test_large_pictures_get_the_stem_that_fits_them(istanas: Command) -> None:
    large()
    done = istanas(*RETRAIN)
    assert json.loads((done.run_dir / "network.json").read_text())["stem"] == "imagenet"
    assert "warning: " not in done.said
    own = istanas(*RETRAIN, "--set", "retrain.stem=cifar")
    assert json.loads((own.run_dir / "network.json").read_text())["stem"] == "cifar"
    assert own.said.count("warning: retrain.stem is cifar") == 1


def test_the_mistakes_of_a_run_are_named_by_their_files(istanas: Command) -> None:
    done = istanas(*RETRAIN)
    mistakes = json.loads((done.run_dir / "evaluation.json").read_text())["mistakes"]
    assert mistakes, "of noise, some pictures are not recognised"
    report = (done.run_dir / "report.html").read_text()
    for each in mistakes:
        assert each["picture"].startswith(f"test/{each['true']}/")
        assert Path("pictures", each["picture"]).is_file()
        assert f'<th scope="row">{each["picture"]}</th><td>{each["true"]}</td>' in report


# ---------- names
@pytest.mark.parametrize("name", ["my pics #1", "123", "2024-01-01", "@eaDir", "[x]", "1e3", "a: b"])
def test_the_folder_that_is_named_is_the_one_that_is_read(name: str, istanas: Command) -> None:
    shutil.copytree("pictures", name)
    shutil.copytree("pictures", "my pics", dirs_exist_ok=True)
    done = istanas(*RETRAIN, "--set", f"data.root={name}")
    assert done.code == 0, done.said
    assert done.record["params"]["data.root"] == name
    assert {use["source"] for use in done.record["datasets"]} == {str(Path(name).absolute())}


@pytest.mark.parametrize("job", JOBS)
def test_a_class_whose_name_is_not_utf8_is_refused_at_the_start(job: str, istanas: Command) -> None:
    for split in ("train", "test"):
        os.rename(f"pictures/{split}/bee", f"pictures/{split}".encode() + b"/caf\xe9")
    refused = istanas(*JOBS[job])
    assert refused.error == (
        r"error: data.root: the name of pictures/train/caf\udce9 is not UTF-8; rename the folder"
    )
    assert not list(Path("runs").glob("*")), "a run was begun"


def test_two_names_of_one_class_are_told_by_their_code_points(istanas: Command) -> None:
    shutil.copytree("pictures/train/bee", "pictures/train/caf\u00e9")
    shutil.copytree("pictures/train/bee", "pictures/train/cafe\u0301")
    assert "(U+0065 U+0301 and U+00E9)" in istanas("search").error


# ---------- broken pictures
def break_one() -> Path:
    broken = Path("pictures/test/bee/1.bmp")
    broken.write_bytes(broken.read_bytes()[:1000])
    return broken


@pytest.mark.parametrize("job", JOBS)
def test_a_broken_large_test_picture_stops_a_job_before_any_work(job: str, istanas: Command) -> None:
    large()
    break_one()
    refused = istanas(*JOBS[job], "--set", "retrain.batch_size=2", "--set", "search.batch_size=2")
    assert "pictures/test/bee/1.bmp is not a readable picture" in refused.error
    assert "epoch" not in refused.said


def link_out(root: Path) -> None:
    root.joinpath("train/ant/0.bmp").rename("elsewhere.bmp")
    root.joinpath("train/ant/0.bmp").symlink_to(Path("elsewhere.bmp").absolute())


def nested_archive(root: Path) -> None:
    root.rename("inner")
    root.mkdir()
    Path("inner").rename(root / "pictures")


def one_class(root: Path) -> None:
    for split in ("train", "test"):
        shutil.rmtree(root / split / "bee")


@pytest.mark.parametrize("damage", [link_out, nested_archive, one_class])
def test_doctor_refuses_what_a_job_refuses(damage: Callable[[Path], None], istanas: Command) -> None:
    damage(Path("pictures"))
    looked = istanas("doctor")
    (line,) = (line for line in looked.said.splitlines() if " data: " in line)
    assert (looked.code, line.split()[0]) == (1, "fail")
    assert line == f"fail  data: {istanas('search').error.removeprefix('error: ')}"


def test_doctor_names_a_broken_large_test_picture(istanas: Command) -> None:
    large()
    assert istanas("doctor").code == 0
    break_one()
    looked = istanas("doctor")
    assert looked.code == 1
    assert "pictures/test/bee/1.bmp is not a readable picture" in looked.said


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_a_search_goes_on_with_a_repaired_test_split(state: str, istanas: Command) -> None:
    first = istanas("search")
    if state == "unfinished":
        unfinish(first.run_dir)
    Path("pictures/test/bee/1.bmp").unlink()
    again = istanas("search")
    assert again.code == 0, again.said
    assert again.result["digest"] == first.result["digest"]
