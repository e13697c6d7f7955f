"""`--genotype RUN` without `--config` takes data, space and tracking settings from the run, wherever it is kept."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.cli.commands import run
from pipeline.config.load import load
from pipeline.runs.directory import RunDir
from pipeline.tracking.references import resolve_origin
from pipeline.tracking.store import open_client
from tests.pipeline.runs import test_bucket as test_storage
from tests.pipeline.runs.test_bucket import BUCKET, Elsewhere, Server
from tests.warm import warm_program

server, elsewhere, prefix = test_storage.server, test_storage.elsewhere, test_storage.prefix

TINY = """
data: {name: folder, root: pictures, horizontal_flip: true}
space: {nodes: 1, ops: [skip_connect, sep_conv_3x3]}
search: {batch_size: 4, epochs: 1, init_channels: 2, layers: 3}
runtime: {threads: 1, device: cpu}
tracking: {uri: "sqlite:///store/mlflow.db", experiment: mine, models: false}
"""
SWEEP = """
sweep:
  trials: 1
  scheduler: none
  space: {search.batch_size: {choice: [4, 7]}, data.horizontal_flip: {fixed: false}}
"""
SHORT = (
    "--set=retrain={epochs: 1, batch_size: 4, init_channels: 2, layers: 2, auxiliary_weight: 0, cutout: 0}",
)
SAID = "data (folder in pictures), space and tracking settings are those of "


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str]:
    """Run a command that succeeds; return its JSON object and what it said to people."""
    capsys.readouterr()
    code = run([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out), err


def experiments(store: Path) -> set[str]:
    return {each.name for each in open_client(f"sqlite:///{store}").search_experiments()}


@pytest.fixture
def project(tmp_path: Path, blank_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with pictures of two classes, a configuration, and a store that is not the default one."""
    here = tmp_path / "project"
    for split, count in (("train", 8), ("test", 2)):
        for shade, name in enumerate(("ant", "bee")):
            for number in range(count):
                file = here / "pictures" / split / name / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 200 * shade + number).save(file)
    (here / "tiny.yaml").write_text(TINY)
    (here / "store").mkdir()
    shutil.copy(blank_database, here / "store" / "mlflow.db")
    monkeypatch.chdir(here)
    return here


def test_of_a_run_that_only_mlflow_has(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found in the store that is asked; the store that its configuration names lies on another machine."""
    found, _ = command(capsys, "search", "--config", "tiny.yaml")
    shutil.rmtree(found["run_dir"])
    (project / "store").rename(project / "copied")
    asked = f"--set=tracking.uri=sqlite:///{project}/copied/mlflow.db"
    trained, said = command(capsys, "retrain", "--genotype", found["mlflow_run_id"], asked, *SHORT)
    assert SAID + found["mlflow_run_id"] in said
    record = RunDir(trained["run_dir"]).read()
    assert (record.dataset, record.name, record.params["data.horizontal_flip"]) == (
        "folder",
        "tiny-retrain",
        True,
    )
    stored = open_client(f"sqlite:///{project}/copied/mlflow.db").get_run(trained["mlflow_run_id"])
    assert experiments(project / "copied" / "mlflow.db") >= {"mine"}
    assert stored.data.tags["istanas.dataset"] == "folder"
    _, said = command(capsys, "profile", "--genotype", found["mlflow_run_id"], asked, "--steps=1", *SHORT)
    assert SAID + found["mlflow_run_id"] in said


def test_of_a_run_that_only_the_default_store_has(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _ = command(capsys, "search", "--config", "tiny.yaml")
    shutil.rmtree(found["run_dir"])
    (project / "store").rename(project / "copied")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/copied/mlflow.db")
    trained, _ = command(capsys, "retrain", "--genotype", found["mlflow_run_id"], *SHORT)
    open_client(f"sqlite:///{project}/copied/mlflow.db").get_run(trained["mlflow_run_id"])
    assert not (project / "store").exists(), "the store's place on another machine"


def test_of_a_run_in_a_project_that_was_moved(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A store beside the runs is found where it is now; one that is not found is named, and none is created."""
    shutil.copy(project / "store" / "mlflow.db", project)
    beside, _ = command(capsys, "search", "--config", "tiny.yaml", "--set=tracking.uri=sqlite:///mlflow.db")
    apart, _ = command(capsys, "search", "--config", "tiny.yaml", "--set=seed=1")
    moved = project.with_name("moved")
    project.rename(moved)
    monkeypatch.chdir(moved)

    def retrain(found: Any, *settings: str) -> "subprocess.CompletedProcess[str]":
        # A process of its own, because MLflow remembers the folders of stores within a process.
        arguments = ["retrain", "--genotype", found["run_dir"], *SHORT, *settings, "--json"]
        line = [*warm_program(), *arguments]
        return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)

    done = retrain(beside)
    assert done.returncode == 0, done.stderr
    assert SAID + beside["run_dir"] in done.stderr
    open_client(f"sqlite:///{moved}/mlflow.db").get_run(json.loads(done.stdout)["mlflow_run_id"])
    done = retrain(apart)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: tracking.uri: the folder of sqlite:///{project}/store/mlflow.db, a setting of {apart['run_dir']}, no "
        "longer exists; name a store with --set tracking.uri=URI"
    )
    assert retrain(apart, "--set=tracking.uri=sqlite:///store/mlflow.db").returncode == 0
    assert not project.exists()


def test_of_a_run_in_a_bucket(
    server: Server, elsewhere: Elsewhere, prefix: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"--set=runtime.runs_dir=s3://{BUCKET}/{prefix}"
    found, _ = command(capsys, "search", "--config", "tiny.yaml", place)
    address = found["run_dir"]
    assert address.startswith("s3://")
    for reference in (address, f"{address}/genotype.json", f"{address}/genotype.json?region=us-east-1"):
        elsewhere()
        trained, said = command(capsys, "retrain", "--genotype", reference, place, *SHORT)
        assert SAID + address in said
        record = json.loads(server.objects(trained["run_dir"].removeprefix(f"s3://{BUCKET}/"))["run.json"])
        assert (record["dataset"], record["name"]) == ("folder", "tiny-retrain")
        assert record["params"]["data.horizontal_flip"] is True
    elsewhere()
    _, said = command(capsys, "profile", "--genotype", address, "--steps=1", *SHORT)
    assert SAID + address in said


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_of_a_sweep_those_of_its_best_trial_on_all_training_pictures(
    server: Server, elsewhere: Elsewhere, prefix: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its directory, its name, either of its genotype files, in MLflow alone and in a bucket."""
    (project / "tiny.yaml").write_text(TINY.replace("flip: true", "flip: true, holdout: 0.25") + SWEEP)
    swept, said = command(capsys, "sweep", "--config", "tiny.yaml")
    warning = "warning: sweep.space: search.batch_size is 7: above the 6 pictures that train the weights"
    assert said.count("warning: ") == said.count(warning) == 1
    assert said.index(warning) < said.index("trial 0 done")
    (project / "pictures").rename(project / "elsewhere")
    again, said = command(capsys, "sweep", "--config", "tiny.yaml")
    assert again == swept
    assert "warning: the pictures of this result cannot be checked any more" in said
    (project / "elsewhere").rename(project / "pictures")
    sweep = Path(swept["run_dir"])
    for file in (
        file for file in sweep.rglob("*") if file.is_file() and "ray" not in file.relative_to(sweep).parts
    ):
        key = f"{prefix}/{sweep.name}/{file.relative_to(sweep)}"
        server.client.put_object(Bucket=BUCKET, Key=key, Body=file.read_bytes())
    address = f"s3://{BUCKET}/{prefix}/{sweep.name}"
    store = f"--set=tracking.uri=sqlite:///{project}/store/mlflow.db"
    names = (
        str(sweep),
        "tiny-sweep",
        f"{sweep}/genotype.json",
        f"{sweep}/best/genotype.json",
        swept["mlflow_run_id"],
    )
    for number, reference in enumerate(
        (*names, address, f"{address}/best/genotype.json", swept["mlflow_run_id"])
    ):
        if number == len(names) + 2:
            shutil.rmtree(sweep)
        trained, said = command(
            capsys, "retrain", "--genotype", reference, store, f"--set=seed={number}", *SHORT
        )
        assert SAID in said
        run_dir = RunDir(trained["run_dir"])
        assert run_dir.read().name == "tiny-retrain"
        data = load(run_dir.path / "config.yaml").data
        assert (data.root, data.holdout, data.horizontal_flip) == ("pictures", 0, False)
        assert run_dir.read().params["data.horizontal_flip"] is False


@pytest.mark.parametrize("only_in_mlflow", [False, True])
def test_a_relative_folder_of_pictures_starts_where_the_run_did(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], only_in_mlflow: bool
) -> None:
    """Another project has a folder of the same name, with other pictures."""
    found, _ = command(capsys, "search", "--config", "tiny.yaml")
    other = project.parent / "other"
    shutil.copytree(project / "pictures" / "train" / "ant", other / "pictures" / "train" / "cat")
    reference = str(project / found["run_dir"])
    if only_in_mlflow:
        shutil.rmtree(reference)
        reference = found["mlflow_run_id"]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/store/mlflow.db")
    monkeypatch.chdir(other)
    trained, said = command(capsys, "retrain", "--genotype", reference, *SHORT)
    assert f"data (folder in {project / 'pictures'}), space and tracking settings are those of" in said
    assert RunDir(trained["run_dir"]).read().datasets[0].classes == 2


def test_the_environment_names_the_same_store_with_its_password(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run directories hold no passwords."""
    found, _ = command(capsys, "search", "--config", "tiny.yaml")
    file = project / found["run_dir"] / "config.yaml"
    file.write_text(file.read_text().replace(f"sqlite:///{project}/store/mlflow.db", "http://host:5000"))
    stores = []
    for uri in ("http://me:secret@host:5000", "http://me:secret@other:5000"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        origin = resolve_origin(found["run_dir"], runs_dir=project / "runs", tracking_uri=None)
        assert origin is not None
        stores.append(origin.config.tracking.uri)
    assert stores == [None, "http://host:5000"]
