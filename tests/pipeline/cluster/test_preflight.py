"""The questions of the pre-flight checks and the evaluation of answers; test_nodes_apart.py asks real nodes."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from istanas.data import register_dataset
from istanas.errors import ConfigError, IstanasError
from istanas.registry import registering_for, unregister
from pipeline.cluster import preflight, probe
from pipeline.cluster.address import find_address
from pipeline.cluster.allotment import allotment
from pipeline.cluster.preflight import ClusterNode, check_gpus, data_place, make_question
from pipeline.cluster.probe import Answer
from pipeline.config.load import load
from pipeline.config.schema import RuntimeSettings
from pipeline.config.workers import Node

NODES = [ClusterNode("1" * 56, "10.0.0.1"), ClusterNode("2" * 56, "10.0.0.2")]
HERE = Answer({"Python": "3.11", "torch": "2.14.1"}, "aabbccdd", data="11223344")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (replace(HERE, code=None), "node 10.0.0.2: this project is not installed there; install it"),
        (
            replace(HERE, code="ffff0000"),
            "node 10.0.0.2: the source files of this project differ there (digest ffff0000, here",
        ),
        (
            replace(HERE, versions={"Python": "3.11", "torch": "none"}),
            "node 10.0.0.2: other releases are installed there: torch none (here 2.14.1); install the same releases",
        ),
    ],
)
def test_a_node_with_other_software_is_reported(other: Answer, words: str) -> None:
    with pytest.raises(IstanasError) as caught:
        preflight._check_versions(NODES, [HERE, other], HERE)
    assert words in str(caught.value)
    line = preflight._check_versions(NODES, [HERE, HERE], HERE)
    assert line == "versions: the same on 2 nodes (Python 3.11, torch 2.14.1, our files aabbccdd)"


def test_other_pictures_on_a_node_are_reported(tmp_path: Path) -> None:
    config = load(None, ("data.name=folder", f"data.root={tmp_path}"))
    question = make_question(config, None)
    with pytest.raises(
        IstanasError, match=r"contains other files on node 10\.0\.0\.2 than here; copy them again"
    ):
        preflight._check_data(NODES, [HERE, replace(HERE, data="55667788")], HERE, question)


def test_the_digest_of_our_files_depends_on_their_content(tmp_path: Path, repo_root: Path) -> None:
    for package in probe.OURS:
        shutil.copytree(repo_root / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", "from pipeline.cluster.probe import code_digest; print(code_digest())"]

    def digest() -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert digest() == probe.code_digest()
    with (tmp_path / "istanas" / "measure.py").open("a") as file:
        file.write("# changed\n")
    assert digest() != probe.code_digest()


def test_a_listing_covers_names_and_sizes_of_the_relevant_parts(tmp_path: Path) -> None:
    def digest(most_files: int = probe.MOST_FILES) -> str:
        return probe.listing_digest(str(tmp_path), ("train", "one.mat"), most_files)

    assert digest() == ""
    for name in ("train/a/1.png", "train/b/1.png", "one.mat"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    seen = [digest()]
    (tmp_path / "cache.npy").write_text("another file")
    assert digest() == seen[-1]
    for name in ("train/b/1.png", "one.mat"):
        (tmp_path / name).write_text("longer")
        seen.append(digest())
    (tmp_path / "train/c").mkdir()
    seen.append(digest())
    assert len(set(seen)) == 4
    before = digest(most_files=1)
    (tmp_path / "train/b/2.png").write_text("after the first file")
    assert digest(most_files=1) == before


def test_the_place_of_the_pictures(tmp_path: Path) -> None:
    def place(*overrides: str) -> tuple[str | None, tuple[str, ...]]:
        return data_place(load(None, overrides).data)

    assert place() == (None, ())  # The digits are part of a package.
    assert place("data.name=cifar10", "data.download=true") == (None, ())
    assert place("data.name=cifar10") == ("", ("cifar-10-batches-py",))
    assert place("data.name=svhn", f"data.cache_dir={tmp_path}")[0] == f"{tmp_path}/downloads"
    assert place("data.name=folder", f"data.root={tmp_path}") == (str(tmp_path), ("train", "test", "val"))


def test_the_place_of_a_users_pictures_is_a_file_or_a_folder(tmp_path: Path) -> None:
    """Everything in it is compared between nodes; without a root, the pictures come from the plugin's code."""
    with registering_for("own.py") as registered:
        register_dataset("own", print)
    try:
        inside = tmp_path / "folder"
        (inside / "deep").mkdir(parents=True)
        (inside / "deep" / "a.npy").write_text("a")
        assert data_place(load(None, ["data.name=own"]).data) == (None, ())
        for root, parts in ((inside, ("",)), (inside / "deep" / "a.npy", ("a.npy",))):
            place = data_place(load(None, ["data.name=own", f"data.root={root}"]).data)
            assert place == (str(root if root.is_dir() else root.parent), parts)
            before = probe.listing_digest(str(place[0]), parts)
            (inside / "deep" / "a.npy").write_text(f"longer than before {root}")
            assert "" != before != probe.listing_digest(str(place[0]), parts) != ""
    finally:
        unregister(registered)


def test_trials_share_runs_and_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(None, ())
    question = make_question(config, f"sqlite:///{tmp_path}/store/mlflow.db")
    assert question.storage == (f"{tmp_path}/runs", f"{tmp_path}/store")
    server = make_question(config, "https://me:secret@host:5000")
    assert (server.store, server.store_in_environment) == ("https://host:5000", True)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    answer = probe.examine(vars(replace(server, storage=(), store="sqlite:///x")), "")
    assert answer["store"] == "MLFLOW_TRACKING_URI is not set there"
    assert make_question(load(None, ("runtime.runs_dir=s3://b/p",)), None).storage == ("s3://b/p",)
    assert make_question(load(None, ("runtime.runs_dir=file:///new/runs",)), None).storage == ("/new/runs",)
    # A store that is a folder has to be shared in any form of its address.
    for store in ("/nope/mlruns", "file:///nope/mlruns"):
        folder = make_question(config, store)
        assert (folder.storage[-1], folder.store) == ("/nope/mlruns", None)
    assert make_question(config, "databricks").store == "databricks"


def test_gpus_are_present_or_waited_for() -> None:
    lines: list[str] = []
    check_gpus(0, 0, 10, lines.append)
    check_gpus(2, 4, 10, lines.append)
    check_gpus(2, 0, 10, lines.append)
    assert lines == [
        "pre-flight: GPUs: 2 requested, 4 present",
        "pre-flight: GPUs: 2 requested, 0 present: waiting for nodes with the others, at most 10 minutes "
        "(runtime.wait_minutes)",
    ]
    wanted = RuntimeSettings(device="cuda", workers=2)
    assert allotment(wanted, [Node(8)], may_come=True).bundle == {"CPU": 1, "GPU": 1}
    with pytest.raises(ConfigError, match=r"runtime\.device: cuda requires a GPU"):
        allotment(wanted, [Node(8)])


def test_auto_is_the_address_that_ray_start_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert find_address("auto") == "auto"
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379\n")
    assert find_address("auto") == "10.0.0.1:6379"
    assert find_address(None) is None
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert find_address("auto") == find_address(None) == "head:6379"
    assert find_address("other:1") == "other:1"
