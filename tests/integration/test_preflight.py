"""The pre-flight on two real nodes, one of which has folders of its own: what it lets pass, and what it stops."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import ray.tune  # noqa: F401 -- as a sweep does, long before it knows whether the cluster is on 127.0.0.1 only
from moto.server import ThreadedMotoServer

from istanas.errors import IstanasError
from pipeline.cli import run
from pipeline.cluster import Runtime
from pipeline.config import load
from pipeline.preflight import alive_nodes, check_nodes
from pipeline.schema import Config
from tests import namespaces
from tests.ray_cluster import RayCluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(300),
    # A node gets a folder of its own.
    pytest.mark.skipif(namespaces.refusal() is not None, reason=str(namespaces.refusal())),
]

KEYS = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "any"}


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the second node does not share."""
    return tmp_path_factory.mktemp("apart")


@pytest.fixture(scope="module")
def cluster(apart: Path) -> Iterator[RayCluster]:
    with pytest.MonkeyPatch.context() as patch:
        before = dict(os.environ)
        cluster = RayCluster(1, environment=KEYS)
        try:
            cluster.add(1, apart=apart)
            yield cluster
        finally:
            cluster.close()
            for name in set(os.environ) - set(before):  # what a joined Ray has set
                patch.delenv(name)


@pytest.fixture(scope="module")
def joined(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process has joined the cluster."""
    folder = tmp_path_factory.mktemp("joined")
    config = config_of(folder, f"runtime.address={cluster.address}", "runtime.workers=1")
    with Runtime(config.runtime) as runtime:
        runtime.start(folder)
        assert runtime.joined
        yield


def config_of(runs: Path, *overrides: str) -> Config:
    return load(None, (f"runtime.runs_dir={runs}", "tracking.enabled=false", *overrides))


def lines_of(config: Config, **options: Any) -> list[str]:
    lines: list[str] = []
    check_nodes(config, lines.append, **{"trials": False, "known": set(), **options})
    return lines


def refusal(config: Config, **options: Any) -> str:
    with pytest.raises(IstanasError) as caught:
        lines_of(config, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


def blind_node() -> str:
    import ray

    (id_,) = [n["NodeID"] for n in ray.nodes() if "node:__internal_head__" not in n["Resources"]]
    (name,) = [node.name for node in alive_nodes() if node.id == id_]
    return name


def picture_folder(folder: Path) -> None:
    for name in ("train/a/1.png", "train/b/1.png", "test/a/2.png", "test/b/2.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"never decoded")


def test_a_command_is_refused_before_it_queues_and_leaves_nothing(
    cluster: RayCluster, apart: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(apart)
    assert (
        run(["search", "--workers", "1", "--address", cluster.address, "--set", "tracking.enabled=false"])
        == 1
    )
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert re.match(
        rf"error: pre-flight: storage: runtime.runs_dir: {apart}/runs is not shared with node 127.0.0.1 \(\w{{8}}\) "
        r"\(No such file or directory\); .* choose a folder that all nodes share",
        line,
    )
    assert not list((apart / "runs").iterdir())


def test_what_all_nodes_share_passes_in_a_line_each_and_a_node_is_asked_once(
    joined: None, tmp_path: Path
) -> None:
    picture_folder(tmp_path / "pictures")
    known: set[str] = set()
    config = config_of(tmp_path / "runs", "data.name=folder", f"data.root={tmp_path}/pictures")
    versions, storage, data = lines_of(config, known=known)
    assert versions.startswith("pre-flight: versions: the same on 2 nodes (Python 3.")
    assert storage == f"pre-flight: storage: 2 nodes and this process share {tmp_path}/runs"
    assert data == f"pre-flight: data: 2 nodes and this process have the same files in {tmp_path}/pictures"
    assert len(known) == 2
    assert lines_of(config, known=known) == []
    assert not list((tmp_path / "runs").iterdir()), "marks were left"


def test_storage_by_an_address_is_written_on_one_node_and_read_on_another(
    joined: None, tmp_path: Path, apart: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(Path("unused"), f"runtime.runs_dir=file://{tmp_path}")
    assert lines_of(config)[1] == f"pre-flight: storage: 2 nodes and this process share {tmp_path}"
    assert not list(tmp_path.iterdir())
    assert f"{apart} is not shared with node {blind_node()}" in refusal(
        config_of(Path("unused"), f"runtime.runs_dir=file://{apart}")
    )
    assert not list(apart.glob(".pre*"))
    # In a bucket, on a real server; the nodes have its keys in their environment, see the fixture of the cluster.
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in KEYS.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="bucket")
        query = f"scheme=http&endpoint_override={host}%3A{port}&region=us-east-1&allow_bucket_creation=false"
        bucket = config_of(Path("unused"), f"runtime.runs_dir=s3://bucket/runs?{query}")
        assert lines_of(bucket)[1] == (
            f"pre-flight: storage: 2 nodes and this process share s3://bucket/runs?{query}"
        )
        left = [each["Key"] for each in client.list_objects_v2(Bucket="bucket").get("Contents", [])]
        assert left in ([], ["runs/"]), "marks were left"  # pyarrow makes an object for the folder
        nowhere = config_of(Path("unused"), f"runtime.runs_dir=s3://nowhere/runs?{query}")
        assert "can't be written from here" in refusal(nowhere)
    finally:
        server.stop()


def test_data_that_a_node_lacks_or_has_otherwise_is_named(joined: None, tmp_path: Path, apart: Path) -> None:
    picture_folder(apart / "pictures")
    config = config_of(tmp_path, "data.name=folder", f"data.root={apart}/pictures")
    assert f"{apart}/pictures holds no such pictures on node {blind_node()}" in refusal(config)


def test_trials_must_reach_the_store_from_every_node(joined: None, tmp_path: Path, apart: Path) -> None:
    local = config_of(tmp_path, "tracking.enabled=true", f"tracking.uri=sqlite:///{apart}/mlflow.db")
    assert lines_of(local)  # only this process writes to it
    line = refusal(local, trials=True)
    assert f"tracking.uri: the folder {apart} is not shared with node {blind_node()}" in line
    nowhere = config_of(tmp_path, "tracking.enabled=true", "tracking.uri=http://me:secret@127.0.0.1:1")
    line = refusal(nowhere)
    assert "tracking: http://127.0.0.1:1 is not reached from here (Connection refused)" in line
    assert "secret" not in line


def test_a_node_that_hangs_is_named(cluster: RayCluster, joined: None, tmp_path: Path) -> None:
    name = blind_node()
    cluster.halt()
    try:
        line = refusal(config_of(tmp_path), seconds=2)
    finally:
        cluster.wake()
    assert line.startswith(f"pre-flight: node {name}: no answer within 2 s")
    assert not list(tmp_path.iterdir())


WITHOUT_THIS_PROJECT = """
import sys
sys.path = [p for p in sys.path if not p.endswith(sys.argv[1])]
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f)]
from ray import cloudpickle
examine = cloudpickle.loads(sys.stdin.buffer.read())
answer = examine({"packages": ("numpy", "no-such-package")}, "")
assert "pipeline" not in sys.modules and "istanas" not in sys.modules
print(answer["code"], answer["versions"]["no-such-package"])
"""


def test_a_node_without_this_project_can_be_asked(tmp_path: Path, repo_root: Path) -> None:
    from ray import cloudpickle

    from pipeline import probe

    cloudpickle.register_pickle_by_value(probe)
    try:
        code = cloudpickle.dumps(probe.examine)
    finally:
        cloudpickle.unregister_pickle_by_value(probe)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THIS_PROJECT, str(repo_root)],
        input=code,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        timeout=60,
    )
    assert done.stdout.decode().split() == ["None", "none"], done.stderr.decode()
