"""Commands on runs in an `s3://` bucket from a machine without a local copy, and Ctrl-C."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.runs import bucket
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import OWNER_OBJECT
from pipeline.training.epoch_record import Progress
from tests.pipeline.runs import test_bucket as test_storage
from tests.pipeline.runs.test_bucket import BUCKET, Elsewhere, Server, comparable, istanas, search, tiny

server, elsewhere, prefix = test_storage.server, test_storage.elsewhere, test_storage.prefix


def test_compare_draw_results_and_promote_take_addresses(
    server: Server,
    elsewhere: Elsewhere,
    prefix: str,
    tmp_path: Path,
    blank_database: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = f"s3://{BUCKET}/{prefix}"
    shutil.copy(blank_database, tmp_path)
    settings = [
        *tiny(tmp_path, place),
        "--set=tracking.enabled=true",
        f"--set=tracking.uri=sqlite:///{tmp_path}/mlflow.db",
        "--set=retrain.epochs=1",
        "--set=data.holdout=0.2",
        "--json",
    ]

    def command(*arguments: str) -> Any:
        code, out, err = istanas(*arguments, *settings, capsys=capsys)
        assert code == 0, err
        return json.loads(out[-1])

    first = command("retrain", "--genotype", "random:0")
    second = command(
        "retrain", "--genotype", "random:1", "--set=tracking.models=false"
    )  # which takes seconds
    runs = [first["run_dir"], second["run_dir"]]
    elsewhere()
    drawn = command("draw", runs[0], "--out", str(tmp_path / "cells"))
    assert (drawn["digest"], (tmp_path / "cells" / "normal.svg").exists()) == (first["digest"], True)
    elsewhere()
    compared = command("compare", *runs, "--out", str(tmp_path / "page"))
    assert [run["run_dir"] for run in compared["runs"]] == runs
    assert [run["digest"] for run in compared["runs"]] == [first["digest"], second["digest"]]
    elsewhere()
    assert command("promote", runs[0])["moved"]
    assert {row["run_dir"] for row in command("results")["results"]} == set(runs)


def test_a_result_in_a_bucket_outlives_its_pictures(
    server: Server, elsewhere: Elsewhere, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With stem auto, the run depends on the pictures; another machine finds it without them."""
    pictures = tmp_path / "pictures"
    for split in ("train", "test"):
        for shade, name in enumerate(("ant", "bee")):
            (pictures / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new("L", (8, 8), 200 * shade + number).save(pictures / split / name / f"{number}.png")
    own = ("data.name=folder", f"data.root={pictures}", "search.max_pictures=null", "search.batch_size=2")
    arguments = [
        "search",
        *tiny(tmp_path, f"s3://{BUCKET}/{prefix}"),
        *(f"--set={each}" for each in own),
        "--json",
    ]
    code, out, _ = istanas(*arguments, capsys=capsys)
    assert code == 0
    elsewhere()
    shutil.rmtree(pictures)
    code, again, err = istanas(*arguments, capsys=capsys)
    assert (code, json.loads(again[-1])) == (0, json.loads(out[-1]))
    assert [line.partition(": ")[2] for line in err if line.startswith("warning")] == [
        f"the pictures of this result cannot be checked any more: data.root: no such folder: {pictures}; set "
        "data.root to a folder with train/CLASS/* and test/CLASS/*"
    ]


def test_ctrl_c_is_noted_in_the_storage_and_another_machine_goes_on(
    server: Server, elsewhere: Elsewhere, prefix: str
) -> None:
    place = f"s3://{BUCKET}/{prefix}"

    def interrupt(progress: Progress) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        search(place, tell=interrupt)
    (name,) = {key.partition("/")[0] for key in server.objects(prefix)}
    there = server.objects(f"{prefix}/{name}")
    assert json.loads(there["run.json"])["status"] == "FAILED"
    assert OWNER_OBJECT not in there
    elsewhere()
    told: list[int] = []
    result = search(place, tell=lambda progress: told.append(progress.epochs))
    assert told[0] == 1  # the run was resumed
    run = RunDir(bucket.local(result["run_dir"]))
    assert [line.step for line in run.metrics()] == [1, 2]
    assert len(comparable(run)) == 2
    assert json.loads(server.objects(f"{prefix}/{name}")["run.json"])["status"] == "FINISHED"
