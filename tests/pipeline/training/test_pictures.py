"""Picture folders under jobs: a result belongs to its pictures; what is told of them; stems that fit them."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from istanas.errors import CheckpointError, DataError, IstanasError
from istanas.space import CellSpace, random_genotype
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.jobs.context import JobContext
from pipeline.jobs.profile import run_profile
from pipeline.jobs.retrain import run_retrain
from pipeline.jobs.search import run_search
from pipeline.runs.directory import RunDir
from pipeline.runs.network_files import load_network, read_card
from pipeline.tracking.store import open_client
from pipeline.training.pictures import datasets_used, load_pictures, settle_stems

TINY = [
    "space.nodes=1",
    "search={epochs: 1, batch_size: 4, init_channels: 2, layers: 3}",
    "retrain={epochs: 1, batch_size: 4, init_channels: 2, layers: 2, auxiliary_weight: 0, cutout: 0}",
    "runtime={threads: 1, device: cpu}",
    "tracking.enabled=false",
    "data.name=folder",
]
GENOTYPE = random_genotype(0, CellSpace(n_nodes=1))


class Folder:
    """A picture folder, and jobs on it."""

    def __init__(self, tmp_path: Path) -> None:
        self.root, self._tmp_path = tmp_path / "pictures", tmp_path
        self.seen = ""

    def write(self, split: str, name: str, count: int, side: int = 8, shade: int = 0) -> None:
        for number in range(count):
            file = self.root / split / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number + shade).integers(0, 256, (side, side), dtype=np.uint8)
            Image.fromarray(pixels).save(file)

    def config(self, *overrides: str) -> Config:
        places = [f"data.root={self.root}", f"data.cache_dir={self._tmp_path / 'cache'}"]
        return load(None, [*TINY, *places, f"runtime.runs_dir={self._tmp_path / 'runs'}", *overrides])

    def run(self, kind: str, *overrides: str, fresh: bool = False) -> RunDir:
        config, out = self.config(*overrides), io.StringIO()
        try:
            with Runtime(config.runtime) as runtime:
                context = JobContext(config, "tiny", Console(file=out, width=300), runtime, fresh)
                result: Any = run_search(context) if kind == "search" else run_retrain(context, GENOTYPE)
        finally:
            self.seen = out.getvalue()
        return RunDir(result["run_dir"])


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Two classes of eight training pictures and two test pictures each, 8x8, grey."""
    made = Folder(tmp_path)
    for shade, name in enumerate(("ant", "bee")):
        made.write("train", name, 8, shade=100 * shade)
        made.write("test", name, 2, shade=100 * shade + 50)
    return made


def unfinish(run: RunDir) -> None:
    """As a kill before the end leaves it."""
    record = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps({**record, "status": "RUNNING"}))


def as_version_0_1(run: RunDir) -> None:
    record = json.loads((run.path / "run.json").read_text())
    for name in ("data_digest", "pictures"):
        del record[name]
    for use in record["datasets"]:
        del use["missing"]
    (run.path / "run.json").write_text(json.dumps(record))


def more_pictures(folder: Folder) -> None:
    folder.write("train", "ant", 24)


def another_class(folder: Folder) -> None:
    folder.write("train", "cat", 8)


def corrected_label(folder: Folder) -> None:
    (folder.root / "train" / "ant" / "0.png").rename(folder.root / "train" / "bee" / "9.png")


# ---------- a result belongs to its pictures


@pytest.mark.parametrize(
    ("state", "kind", "change"),
    [
        *(
            (state, kind, corrected_label)
            for state in ("finished", "unfinished", "finished by version 0.1")
            for kind in ("search", "retrain")
        ),
        ("finished", "search", more_pictures),
        ("unfinished", "retrain", another_class),
    ],
)
def test_a_run_is_refused_once_its_pictures_have_changed(
    state: str, kind: str, change: Any, folder: Folder
) -> None:
    run = folder.run(kind)
    if state == "unfinished":
        unfinish(run)
    elif state == "finished by version 0.1":
        as_version_0_1(run)
    assert folder.run(kind).read().result == run.read().result
    if state == "unfinished":
        unfinish(run)
    before = (run.path / "run.json").read_bytes()
    change(folder)
    with pytest.raises(CheckpointError, match="data set folder has changed since this run began") as refusal:
        folder.run(kind)
    assert "\n" not in str(refusal.value)
    assert "start over with --fresh, or give the new run another name" in str(refusal.value)
    assert (run.path / "run.json").read_bytes() == before
    again = folder.run(kind, fresh=True)
    assert again.path == run.path
    assert again.read().data_digest != json.loads(before).get("data_digest")


def test_the_numbers_of_changed_pictures_are_told(folder: Folder) -> None:
    folder.run("retrain")
    folder.write("train", "ant", 24)
    with pytest.raises(CheckpointError, match=r"\(16 training pictures of 2 classes then, 32 of 2 now\)"):
        folder.run("retrain")


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_a_search_takes_a_repaired_test_split(state: str, folder: Folder) -> None:
    run = folder.run("search")
    trained = folder.run("retrain")
    if state == "unfinished":
        unfinish(run)
        unfinish(trained)
    (folder.root / "test" / "ant" / "0.png").unlink()
    assert folder.run("search").read().result["digest"] == run.read().result["digest"]
    with pytest.raises(CheckpointError, match="4 test pictures of 2 classes then, 3 of 2 now"):
        folder.run("retrain")
    never = "retrain.test_every=0"
    digest = folder.run("retrain", never).read().data_digest
    (folder.root / "test" / "bee" / "0.png").unlink()
    assert folder.run("retrain", never).read().data_digest == digest


EXPLICIT = ("search.stem=cifar", "retrain.stem=cifar")


@pytest.mark.parametrize("stems", [(), EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("kind", ["search", "retrain"])
def test_the_result_of_pictures_that_are_gone_is_told_with_a_warning(
    kind: str, stems: tuple[str, ...], folder: Folder
) -> None:
    run = folder.run(kind)
    folder.root.rename(folder.root.with_name("elsewhere"))
    assert folder.run(kind, *stems).path == run.path
    (warning,) = (line for line in folder.seen.splitlines() if line.startswith("warning: "))
    assert warning.startswith("warning: the pictures of this result cannot be checked any more: data.root: ")
    assert "already finished" in folder.seen
    folder.root.mkdir()
    with pytest.raises(DataError, match="has no pictures"):
        folder.run(kind, *stems)


@pytest.mark.parametrize("stems", [(), EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("kind", ["search", "retrain"])
def test_an_unfinished_run_names_the_folder_that_it_resumes_with(
    kind: str, stems: tuple[str, ...], folder: Folder
) -> None:
    run = folder.run(kind)
    unfinish(run)
    record = run.read()
    elsewhere = folder.root.with_name("elsewhere")
    folder.root.rename(elsewhere)
    with pytest.raises(DataError) as refusal:
        folder.run(kind, *stems)
    assert str(refusal.value) == (
        f"data.root: no such folder: {folder.root}; restore the folder to resume {run.path}, or name another one for "
        "a new run"
    )
    assert run.read() == record
    elsewhere.rename(folder.root)
    assert folder.run(kind, *stems).read().status == "FINISHED"


def test_a_folder_that_no_run_has_used_is_refused_in_one_line(folder: Folder) -> None:
    with pytest.raises(DataError) as refusal:
        folder.run("search", f"data.root={folder.root}/none")
    assert str(refusal.value) == (
        f"data.root: no such folder: {folder.root}/none; "
        "set data.root to a folder with train/CLASS/* and test/CLASS/*"
    )


def test_runs_of_both_stems_are_not_mistaken_for_one_another(folder: Folder) -> None:
    """The folder held small pictures once, and large ones later: which of the two is meant cannot be told."""
    runs = {folder.run("retrain", f"retrain.stem={stem}").path for stem in ("cifar", "imagenet")}
    assert len(runs) == 2
    folder.root.rename(folder.root.with_name("elsewhere"))
    with pytest.raises(DataError, match="no such folder"):
        folder.run("retrain")


# ---------- broken pictures, and those of a class that lacks


@pytest.mark.parametrize("kind", ["search", "retrain"])
@pytest.mark.parametrize("side", [8, 80])
def test_a_broken_test_picture_stops_a_job_before_any_work(side: int, kind: str, folder: Folder) -> None:
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            folder.write(split, name, 2, side)
    for file in folder.root.glob("train/*/[2-9].png"):
        file.unlink()
    broken = folder.root / "test" / "bee" / "1.png"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(DataError, match=r"test/bee/1\.png is not a readable picture"):
        folder.run(kind)
    assert "epoch" not in folder.seen


def test_a_class_without_test_pictures_is_told_everywhere(folder: Folder, tmp_path: Path) -> None:
    shutil.rmtree(folder.root / "test" / "bee")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    run = folder.run("retrain", "tracking.enabled=true", f"tracking.uri={store}", "tracking.models=false")
    line = "the test split has no picture of bee; accuracies on it cover 1 of 2 classes"
    assert f"pictures: {line}\n" in folder.seen
    record = run.read()
    assert {use.context: use.missing for use in record.datasets} == {"training": (), "test": ("bee",)}
    assert line in record.pictures
    assert line in (run.path / "report.html").read_text()
    assert line in record.description
    assert record.tags["istanas.missing_classes"] == "test: bee"
    (tracked,) = open_client(store).search_runs(["1"])
    assert tracked.data.tags["istanas.missing_classes"] == "test: bee"
    assert line in tracked.data.tags["mlflow.note.content"]
    profiles = [json.loads(use.dataset.profile) for use in tracked.inputs.dataset_inputs]
    assert [profile.get("classes_without_pictures") for profile in profiles].count(["bee"]) == 1


def test_a_class_that_the_alphas_lack_is_told(folder: Folder) -> None:
    for file in folder.root.glob("train/bee/[1-9].png"):
        file.unlink()
    run = folder.run("search", "search.alpha_fraction=0.3")
    assert (
        "pictures: the alpha half has no picture of bee; accuracies on it cover 1 of 2 classes\n"
        in folder.seen
    )
    assert run.read().tags["istanas.missing_classes"] == "alphas: bee"


def test_the_pictures_are_described_before_any_work(folder: Folder) -> None:
    run = folder.run("search")
    line = (
        "folder: 16 training and 4 test pictures of 2 classes, 8x8 pixels, grey, as they are, kept in memory"
    )
    assert folder.seen.index(f"pictures: {line}\n") < folder.seen.index("epoch 1")
    assert folder.seen.index("pictures: search.stem: cifar\n") < folder.seen.index("epoch 1")
    assert run.read().pictures == (line, "search.stem: cifar")
    assert line in (run.path / "report.html").read_text()


# ---------- how pictures are read goes with the network


def test_how_pictures_are_read_is_written_beside_the_network(folder: Folder) -> None:
    for number, file in enumerate(sorted(folder.root.glob("train/*/*.png"))):
        Image.fromarray(np.full((8, 8), 16 * number, np.uint16)).save(file)
    run = folder.run("retrain", "data.background=#102030")
    card = read_card(run.path)
    assert (card.preprocessing.bits, card.preprocessing.background) == (8, (16, 32, 48))
    data = json.loads((run.path / "network.json").read_text())
    steps = data["preprocessing"]
    for odd in ({"bits": 7}, {"bits": 17}, {"background": [0, 0, 256]}, {"mean": []}, {"resize": "zoom"}):
        (run.path / "network.json").write_text(json.dumps(data | {"preprocessing": steps | odd}))
        with pytest.raises(CheckpointError, match="does not contain a complete trained network"):
            load_network(run.path)


# ---------- stems


@pytest.mark.parametrize(("side", "stem"), [(8, "cifar"), (64, "cifar"), (65, "imagenet")])
def test_the_stem_fits_the_pictures_of_a_folder(side: int, stem: str, folder: Folder) -> None:
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            folder.write(split, name, 8, side)
    config = settle_stems(folder.config())
    assert (config.search.stem, config.retrain.stem) == (stem, stem)
    assert settle_stems(folder.config("search.stem=cifar")).search.stem == "cifar"


def test_large_pictures_are_searched_and_retrained_with_their_stem(folder: Folder) -> None:
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            folder.write(split, name, 2, 80)
    for file in folder.root.glob("train/*/[2-9].png"):
        file.unlink()
    search, retrain = folder.run("search"), folder.run("retrain")
    assert "warning" not in folder.seen
    assert search.read().params["search.stem"] == "imagenet"
    assert read_card(retrain.path).stem == "imagenet"
    written = load(retrain.path / "config.yaml")
    assert written.retrain.stem == written.search.stem == "imagenet"
    assert folder.run("retrain").path == retrain.path
    assert folder.run("retrain", "retrain.stem=imagenet").path == retrain.path, (
        "what is hashed is the stem itself"
    )


def test_a_stem_that_does_not_fit_is_warned_of(folder: Folder) -> None:
    assert folder.run("retrain", "retrain.stem=imagenet").read().params["retrain.stem"] == "imagenet"
    assert (
        "warning: retrain.stem is imagenet: a network with it loses most details for pictures of 8x8 pixels"
        in folder.seen
    )
    out = io.StringIO()
    config = folder.config("data.image_size=96", "search.stem=cifar", "search.batch_size=2")
    run_profile(config, genotype=None, steps=1, trace=None, console=Console(file=out, width=300))
    assert (
        "warning: search.stem is cifar: a network with it is many times slower for pictures of 96x96 pixels"
        in out.getvalue()
    )


def test_pictures_left_out_are_told_and_do_not_change_the_run(folder: Folder) -> None:
    run = folder.run("retrain")
    (folder.root / "train" / "ant" / "1.heic").touch()
    with pytest.raises(IstanasError, match=r"--set data\.allow_left_out=true"):
        folder.run("retrain")
    assert folder.run("retrain", "data.allow_left_out=true").path == run.path
    dataset = load_pictures(folder.config("data.allow_left_out=true").data)
    assert "left out: 1 file with the suffix .heic" in dataset.notes[1]
    assert [use.pictures for use in datasets_used(folder.config(), dataset, "retrain")] == [16, 4]


def test_a_folder_val_beside_test_is_told_by_a_job_and_in_its_report(folder: Folder) -> None:
    run = folder.run("search")
    folder.write("val", "ant", 3)
    line = f"left out: 3 files in val/, which is ignored because test/ exists, such as {folder.root}/val/ant/0.png"
    assert folder.run("search", "seed=1").path != run.path
    assert f"pictures: {line}\n" in folder.seen
    assert folder.run("search").path == run.path, "a run does not depend on pictures that it does not read"
    again = folder.run("search", fresh=True)
    assert line in again.read().pictures
    assert "3 files in val/" in (again.path / "report.html").read_text()
