"""Run directories on `s3://`, tested with a local S3 server (moto)."""

import contextlib
import dataclasses
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from rich.console import Console

from istanas.errors import ConfigError, IstanasError
from pipeline.base.addresses import checked_address
from pipeline.cli import commands as cli
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.load import load
from pipeline.jobs.context import JobContext
from pipeline.jobs.search import run_search, search_spec
from pipeline.runs import bucket as storage
from pipeline.runs import copies
from pipeline.runs.bucket import Timing
from pipeline.runs.directory import RunDir
from pipeline.runs.epoch_log import BrokenCheckpointWarning
from pipeline.runs.layout import OWNER_OBJECT
from pipeline.runs.lease import Owner
from pipeline.runs.mirror import Mirror
from pipeline.runs.object_storage import Objects, file_system
from pipeline.sweeps.study import BLOCKED
from pipeline.sweeps.trial import failure
from pipeline.training.epoch_record import FolderStore, Progress, load_latest, load_progress, read_records
from tests.pipeline.jobs.test_lifecycle import TINY
from tests.pipeline.training.made_up import record_of, save_epoch
from tests.ports import unused_port
from tests.waiting import wait_until

BUCKET = "bucket"
NO_COMPETITOR = Timing(settle=0.05)
NOT_REPEATED = {"images_per_second"}


class Server:
    """moto's S3 server, which keeps its objects when it is stopped, and Amazon's client of it."""

    def __init__(self) -> None:
        self.port = unused_port()  # reserved while the server is stopped
        self.start()
        self.client = boto3.client("s3", endpoint_url=self.url, region_name="us-east-1")
        self.client.create_bucket(Bucket=BUCKET)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()

    def stop(self) -> None:
        self._server.stop()

    def objects(self, prefix: str) -> dict[str, bytes]:
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/").get("Contents", [])
        keys = [entry["Key"] for entry in found if not entry["Key"].endswith("/")]
        read = self.client.get_object
        return {key.removeprefix(f"{prefix}/"): read(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


@contextlib.contextmanager
def bucket() -> Iterator[Server]:
    """Start the server, which this process and its children find by environment variables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "something")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = Server()
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server
        server.stop()


def keys_of_the_bucket() -> dict[str, str]:
    """Return the environment variables with credentials and address, for processes with another environment."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with bucket() as server:
        yield server


class Elsewhere:
    """Switch to another machine, that is to an empty cache folder."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder, self._patch, self._number = folder, patch, 0
        self()

    def __call__(self) -> Path:
        self._number += 1
        cache = self._folder / f"cache-{self._number}"
        self._patch.setenv("XDG_CACHE_HOME", str(cache))
        return cache


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    return Elsewhere(tmp_path, monkeypatch)


@pytest.fixture
def on_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners cannot see each other's processes."""
    monkeypatch.setattr(Owner, "is_dead", False)


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A prefix in the bucket for each test."""
    return f"runs/{request.node.name}"


def acquired(path: Path, timing: Timing = NO_COMPETITOR) -> contextlib.AbstractContextManager[RunDir]:
    return storage.acquired(RunDir(path), print, timing=timing)


def search(
    runs_dir: str, *overrides: str, tell: Any = None, fresh: bool = False, timing: Timing = NO_COMPETITOR
) -> dict[str, Any]:
    config = load(None, [*TINY, f"runtime.runs_dir={runs_dir}", *overrides])
    console = Console(file=io.StringIO(), width=200)
    with Runtime(config.runtime) as runtime, acquired(search_spec(config, "tiny").path, timing) as run:
        return dict(run_search(JobContext(config, "tiny", console, runtime, fresh, on_epoch=tell, run=run)))


def tiny(folder: Path, place: str) -> list[str]:
    """Return arguments of the command line for the same configuration."""
    (folder / "tiny.yaml").write_text("")
    return [
        "--config",
        str(folder / "tiny.yaml"),
        *(f"--set={o}" for o in (*TINY, f"runtime.runs_dir={place}")),
    ]


def comparable(run: RunDir) -> list[dict[str, float]]:
    return [{k: v for k, v in line.metrics.items() if k not in NOT_REPEATED} for line in run.metrics()]


def files(folder: Path) -> dict[str, bytes]:
    """Return the files of a run directory that are mirrored."""
    return {
        name: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not (name := path.relative_to(folder).as_posix()).startswith((".", "ray/"))
    }


def istanas(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str], list[str]]:
    code = cli.run([*arguments])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], RunDir]:
    """The same search in a folder, given as `file://`."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = search(folder.as_uri())
    return result, RunDir(next(folder.glob("tiny-search-*")))


def test_another_machine_uses_a_search_in_the_storage(
    server: Server,
    elsewhere: Elsewhere,
    prefix: str,
    undisturbed: tuple[dict[str, Any], RunDir],
    tmp_path: Path,
    blank_database: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = f"s3://{BUCKET}/{prefix}"
    shutil.copy(blank_database, tmp_path)
    result = search(place)
    run_dir = result["run_dir"]
    assert run_dir == f"{place}/{undisturbed[1].path.name}"
    name = f"{prefix}/{undisturbed[1].path.name}"
    here = storage.local(run_dir)
    there = server.objects(name)
    assert there == files(here)
    assert there.keys() == files(undisturbed[1].path).keys()
    assert result["genotype"] == undisturbed[0]["genotype"]
    assert comparable(RunDir(here)) == comparable(undisturbed[1])
    assert copies.root().stat().st_mode & 0o077 == 0
    assert here.is_relative_to(copies.root())

    elsewhere()
    common = [*tiny(tmp_path, place), "--json"]
    # A run, a file in it, a name: all are found from a machine that has never seen them.
    for reference in (run_dir, f"{run_dir}/genotype.json", "tiny-search"):
        code, out, err = istanas("retrain", "--genotype", reference, *common, capsys=capsys)
        assert code == 0, err
        retrained = json.loads(out[-1])
        assert retrained["run_dir"].startswith(f"{place}/tiny-retrain-")
        record = json.loads(server.objects(retrained["run_dir"].removeprefix(f"s3://{BUCKET}/"))["run.json"])
        assert (record["status"], record["parent"]) == ("FINISHED", run_dir)
    assert any("already finished" in line for line in err)  # the second and third time it was there already

    elsewhere()
    store = f"--set=tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    code, out, err = istanas("sync", run_dir, store, "--set=tracking.enabled=true", "--json", capsys=capsys)
    assert code == 0, err
    assert json.loads(out[-1])["run_dir"] == run_dir
    from pipeline.tracking.store import open_client

    tags = (
        open_client(f"sqlite:///{tmp_path}/mlflow.db").get_run(json.loads(out[-1])["mlflow_run_id"]).data.tags
    )
    assert tags["istanas.run_dir"] == run_dir
    code, _, err = istanas("retrain", "--genotype", f"{place}/nothing", *common, capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert f"run {place}/nothing: there is no run" in err[0]


@pytest.mark.parametrize("name", ["a#b", "my run", "50%41", "what?", "a&b=c", "ü"])
def test_names_with_special_characters_have_distinct_addresses(name: str) -> None:
    root = "s3://bucket/runs?region=eu-west-1"
    first, second = (storage.local(root) / f"{name}-{digits}" for digits in ("0123abcd", "9999ffff"))
    assert storage.local(storage.shown(first)) == first
    assert file_system(storage.shown(first))[1] == f"bucket/runs/{name}-0123abcd"
    assert file_system(storage.shown(second))[1] == f"bucket/runs/{name}-9999ffff"
    assert checked_address(storage.shown(first)) == storage.shown(first)


@pytest.mark.parametrize("address", ["s3:/b/x", "file:/x", "s3://b/%2e%2e/x", "s3://b/a%2fb", "s3://b/x//y"])
def test_a_malformed_address_is_not_a_folder(address: str) -> None:
    with pytest.raises(ConfigError, match="write"):
        checked_address(address)


def test_fresh_replaces_the_run_in_the_storage(server: Server, elsewhere: Elsewhere, prefix: str) -> None:
    place = f"s3://{BUCKET}/{prefix}"
    run_dir = search(place, "search.epochs=1")["run_dir"]
    name = run_dir.removeprefix(f"s3://{BUCKET}/")
    server.client.put_object(Bucket=BUCKET, Key=f"{name}/left.txt", Body=b"over")
    key = json.loads(server.objects(name)["run.json"])["key"]
    elsewhere()
    search(place, "search.epochs=1", fresh=True)
    there = server.objects(name)
    assert "left.txt" not in there
    assert json.loads(there["run.json"])["key"] != key
    assert there == files(storage.local(run_dir))


def test_fetch_replaces_the_local_files(server: Server, elsewhere: Elsewhere, prefix: str) -> None:
    address = f"s3://{BUCKET}/{prefix}/run"
    path = storage.local(address)
    for name, text in {"run.json": "{}", "same.txt": "same", "folder/other.txt": "there"}.items():
        server.client.put_object(Bucket=BUCKET, Key=f"{prefix}/run/{name}", Body=text.encode())
    storage.fetch(address)
    untouched = (path / "same.txt").stat()
    (path / "folder/other.txt").write_text("here!")
    (path / "stale.txt").write_text("of a process that was killed")
    (path / "ray").mkdir()
    (path / "ray" / "log").write_text("of this machine")
    storage.fetch(address)
    assert {k: v.decode() for k, v in files(path).items()} == {
        "run.json": "{}",
        "same.txt": "same",
        "folder/other.txt": "there",
    }
    assert (path / "ray" / "log").exists()
    assert (path / "same.txt").stat().st_ino == untouched.st_ino  # not fetched twice
    with RunDir(path).lock():  # a process on this machine works on it: what it has is the newest
        (path / "same.txt").write_text("newer")
        storage.fetch(address)
        assert (path / "same.txt").read_text() == "newer"


def test_a_kill_between_any_two_writes_leaves_a_resumable_run(
    server: Server, elsewhere: Elsewhere, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Look at the objects before every write and deletion of three epochs and of a start with --fresh."""
    address = f"s3://{BUCKET}/{prefix}/run"
    path = storage.local(address)
    counts, looks, starting_over = 0, 0, False

    def look() -> None:
        nonlocal looks
        looks += 1
        there = server.objects(f"{prefix}/run")
        folder = tmp_path / f"look-{looks}"
        for name, data in there.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        if (
            starting_over
        ):  # the record goes first: nothing that looks like a run is without what belongs to it
            assert "run.json" not in there or len(there) == 1 + n_files
            return
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a checkpoint that is not whole
            progress = load_progress(folder / "checkpoints")
            records = list(read_records(folder / "checkpoints", progress))
        epoch = progress.epochs
        assert [record.epoch for record in records] == list(range(1, epoch + 1)), "the log lacks an epoch"
        assert epoch in (counts, counts + 1)
        if "run.json" in there:
            assert json.loads(there["run.json"])["epoch"] <= len(there["metrics.jsonl"].splitlines()) <= epoch

    def watched(work: Any) -> Any:
        def watch(self: Any, name: str, *data: Any) -> None:
            if name != OWNER_OBJECT:
                look()
            work(self, name, *data)

        return watch

    with acquired(path) as run, monkeypatch.context() as patch:
        store = FolderStore(path / "checkpoints", run.push)
        patch.setattr(Objects, "put", watched(Objects.put))
        patch.setattr(Objects, "delete", watched(Objects.delete))
        progress = Progress()
        for epoch in (1, 2, 3):
            progress = save_epoch(store, progress)
            counts = epoch
            (path / "metrics.jsonl").write_text("line\n" * epoch)
            (path / "run.json").write_text(json.dumps({"epoch": epoch}))
            run.push()
        look()
        n_files, starting_over = len(files(path)), True
        assert server.objects(f"{prefix}/run").keys() - {OWNER_OBJECT} == files(path).keys()
        (path / "run.json").unlink()
        (path / "metrics.jsonl").unlink()
        shutil.rmtree(path / "checkpoints")
        run.push()
    # Checkpoint, checksum and both copies of the log, metrics, record; one old pair; end; all deleted.
    assert looks == 3 * 6 + 2 + 1 + 8
    assert not server.objects(f"{prefix}/run")


def test_a_kill_while_an_epoch_is_repeated_leaves_a_matching_checkpoint(
    server: Server, elsewhere: Elsewhere, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epoch 3 is lost on this machine only and repeated with other metrics: its log replaces the old one."""
    path = storage.local(f"s3://{BUCKET}/{prefix}/run")
    folder, seen = path / "checkpoints", list[int]()

    def look() -> None:
        copy = tmp_path / f"look-{len(seen)}"
        for name, data in server.objects(f"{prefix}/run").items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a checkpoint that is damaged, or that the log does not match
            progress = load_progress(copy / "checkpoints")
        seen.append(progress.epochs)
        assert len(list(read_records(copy / "checkpoints", progress))) == progress.epochs

    def watched(work: Any) -> Any:
        def watch(self: Any, name: str, *data: Any) -> None:
            work(self, name, *data)
            if name != OWNER_OBJECT:
                look()

        return watch

    with acquired(path) as run:
        progress, store = Progress(), FolderStore(folder, run.push)
        for _ in range(2):
            progress = save_epoch(store, progress)
        save_epoch(store, progress)
        (folder / "epoch-0003.pt").write_bytes(b"")
        with pytest.warns(BrokenCheckpointWarning, match="epoch-0003"):
            assert load_progress(folder) == progress
        with monkeypatch.context() as patch:
            patch.setattr(Objects, "put", watched(Objects.put))
            patch.setattr(Objects, "delete", watched(Objects.delete))
            save_epoch(store, progress, dataclasses.replace(record_of(3), workers=7))
    assert seen[0] == 2
    assert seen[-1] == 3


def test_an_interrupted_upload_leaves_no_object(server: Server, elsewhere: Elsewhere, prefix: str) -> None:
    objects = Objects(f"s3://{BUCKET}/{prefix}/run")
    stream = objects._fs.open_output_stream(f"{objects._base}/big")
    stream.write(bytes(20_000_000))  # more than one part
    assert not server.objects(f"{prefix}/run")
    stream.close()
    assert len(server.objects(f"{prefix}/run")["big"]) == 20_000_000


@pytest.mark.slow
def test_a_run_resumes_after_a_kill_and_the_loss_of_the_disk(
    server: Server,
    elsewhere: Elsewhere,
    prefix: str,
    undisturbed: tuple[dict[str, Any], RunDir],
    tmp_path: Path,
    repo_root: Path,
) -> None:
    name = f"{prefix}/{undisturbed[1].path.name}"
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    killed = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "search", *tiny(tmp_path, f"s3://{BUCKET}/{prefix}")],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_until(
            lambda: "checkpoints/epoch-0001.json" in server.objects(name),
            120,
            "the first epoch's checkpoint in the bucket",
            alive=lambda: killed.poll() is None,
            interval=0.01,
        )
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert json.loads(server.objects(name)["run.json"])["status"] == "RUNNING"
    cache = elsewhere()
    assert not cache.exists()
    result = search(f"s3://{BUCKET}/{prefix}")
    assert result["genotype"] == undisturbed[0]["genotype"]
    run = RunDir(storage.local(result["run_dir"]))
    assert comparable(run) == comparable(undisturbed[1])
    last = [load_latest(r.path / "checkpoints") for r in (run, undisturbed[1])]
    assert last[0] is not None
    assert last[1] is not None
    assert str(last[0].state["search"]) == str(last[1].state["search"])
    assert server.objects(name) == files(run.path)


def test_a_job_waits_for_an_unreachable_storage(
    server: Server,
    elsewhere: Elsewhere,
    prefix: str,
    undisturbed: tuple[dict[str, Any], RunDir],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop_for_a_while(progress: Progress) -> None:
        if progress.epochs == 1:
            server.stop()
            threading.Timer(1.0, server.start).start()

    failed = 0
    get = Objects.get

    def get_twice(self: Objects, name: str) -> bytes:
        nonlocal failed
        failed += 1
        if failed == 6:  # pyarrow has given up
            raise OSError("AWS Error NETWORK_CONNECTION during HeadObject operation")
        return get(self, name)

    monkeypatch.setattr(Objects, "get", get_twice)
    result = search(f"s3://{BUCKET}/{prefix}", tell=stop_for_a_while)
    assert result["genotype"] == undisturbed[0]["genotype"]
    run = RunDir(storage.local(result["run_dir"]))
    assert comparable(run) == comparable(undisturbed[1])
    assert server.objects(result["run_dir"].removeprefix(f"s3://{BUCKET}/")) == files(run.path)
    said = [record.getMessage() for record in caplog.records if record.name == "pipeline.runs.object_storage"]
    assert len(said) == 2
    assert "can't be reached (NETWORK_CONNECTION during HeadObject operation); trying again" in said[0]
    assert "is reachable again" in said[1]


@pytest.mark.slow  # pyarrow tries for six seconds
def test_a_job_ends_if_the_storage_stays_unreachable_and_can_be_resumed(
    server: Server,
    elsewhere: Elsewhere,
    prefix: str,
    undisturbed: tuple[dict[str, Any], RunDir],
) -> None:
    place = f"s3://{BUCKET}/{prefix}"

    def stop(progress: Progress) -> None:
        server.stop()

    try:
        with pytest.raises(storage.StorageError) as caught:
            search(place, tell=stop, timing=Timing(retry=0.0, settle=0.05))
    finally:
        server.start()
    assert failure(caught.value) == {BLOCKED: str(caught.value)}  # of a trial: it is not failed for good
    assert str(caught.value).startswith(f"runtime.runs_dir: {place}/tiny-search-")
    assert "check network and endpoint" in str(caught.value)
    assert "then run the same command again" in str(caught.value)
    elsewhere()
    result = search(place, timing=Timing(silence=0.0, settle=0.05))
    assert result["genotype"] == undisturbed[0]["genotype"]
    assert comparable(RunDir(storage.local(result["run_dir"]))) == comparable(undisturbed[1])


def test_a_second_machine_is_refused_while_the_first_works(
    server: Server, elsewhere: Elsewhere, on_other_hosts: None, prefix: str
) -> None:
    address = f"s3://{BUCKET}/{prefix}/run"
    first, timing = storage.local(address), Timing(interval=0.1, settle=0.05)
    said: list[str] = []
    with storage.acquired(RunDir(first), said.append, timing=timing):
        assert not said
        elsewhere()
        second = storage.local(address)
        with (
            pytest.raises(
                ConfigError, match=rf"in use by process {os.getpid()} on .*; wait until it ends or stop"
            ),
            storage.acquired(RunDir(second), said.append, timing=timing),
        ):
            pytest.fail("two owners")
        assert "waiting" in said[0]
        assert len(said) == 1
        assert not server.objects(f"{prefix}/run").keys() - {OWNER_OBJECT}


def test_an_owner_that_lost_its_lease_writes_nothing(
    server: Server, elsewhere: Elsewhere, prefix: str
) -> None:
    first = storage.local(f"s3://{BUCKET}/{prefix}/run")
    with acquired(first) as run:  # which renews its lease after 20 seconds only
        lease = Mirror(first, NO_COMPETITOR).lease
        lease.write(dataclasses.replace(lease.me, host="second"))
        (first / "run.json").write_text("{}")
        with pytest.raises(IstanasError, match=r"was taken over by process .* on second"):
            run.push()
    assert "run.json" not in server.objects(f"{prefix}/run")


def test_an_acquired_run_is_not_acquired_again(server: Server, elsewhere: Elsewhere, prefix: str) -> None:
    """A trial acquires its run for its log, and passes it to the search."""
    path = storage.local(f"s3://{BUCKET}/{prefix}/run")
    with acquired(path) as run:
        (path / "run.json").write_text("{}")
        with storage.acquired(run, pytest.fail) as same:
            assert same is run
        run.push()
        assert OWNER_OBJECT in server.objects(f"{prefix}/run")
    assert server.objects(f"{prefix}/run").keys() == {"run.json"}


def test_of_two_simultaneous_starts_one_is_refused(
    server: Server, elsewhere: Elsewhere, on_other_hosts: None, prefix: str
) -> None:
    timing = Timing(interval=0.1, settle=0.5)
    together, ended = threading.Barrier(2), threading.Event()
    owners: list[Mirror] = []
    refused: list[str] = []

    def start(mirror: Mirror) -> None:
        together.wait()
        try:
            mirror.lease.acquire(lambda line: None)
        except ConfigError as error:
            refused.append(str(error))
            ended.set()
        else:
            owners.append(mirror)
            mirror.lease.renew(ended)

    threads = []
    for _ in range(2):
        elsewhere()
        mirror = Mirror(storage.local(f"s3://{BUCKET}/{prefix}/run"), timing)
        threads.append(threading.Thread(target=start, args=(mirror,), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert (len(owners), len(refused)) == (1, 1)
    assert "in use by process" in refused[0]


def test_the_lease_is_renewed_while_the_run_is_fetched(
    server: Server, elsewhere: Elsewhere, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetching a large run may take longer than others wait for a renewal."""
    path = storage.local(f"s3://{BUCKET}/{prefix}/run")
    Objects(storage.shown(path)).put("run.json", b"{}")
    pull = Mirror.pull

    def slow_pull(self: Mirror) -> None:
        def beats() -> int:
            return int(json.loads(server.objects(f"{prefix}/run")[OWNER_OBJECT])["beats"])

        wait_until(lambda: beats() >= 2, 30, "the owner's second beat", interval=0.01)
        pull(self)

    monkeypatch.setattr(Mirror, "pull", slow_pull)
    with acquired(path, Timing(interval=0.05, settle=0.05)):
        assert (path / "run.json").read_text() == "{}"


def test_a_silent_owner_is_replaced_after_a_while(server: Server, elsewhere: Elsewhere, prefix: str) -> None:
    run, timing = RunDir(storage.local(f"s3://{BUCKET}/{prefix}/run")), Timing(silence=0.2, settle=0.05)
    lease = Mirror(run.path, timing).lease
    lease.write(dataclasses.replace(lease.me, host="elsewhere"))
    said: list[str] = []
    with storage.acquired(run, said.append, timing=timing):
        pass
    assert len(said) == 1
    lease.write(dataclasses.replace(lease.me, started=0.0))  # a process of this machine, long gone
    with storage.acquired(run, said.append, timing=timing):
        pass
    assert len(said) == 1
    assert not server.objects(f"{prefix}/run")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3://nowhere/runs", "NO_SUCH_BUCKET"),
        ("s3://bucket/runs?endpoint=127.0.0.1", "Unexpected query parameter"),
        ("s3://me:hunter2@bucket/runs", "contains a password or key"),
        ("s3://bucket/runs?secret_key=hunter2", "contains a password or key"),
        ("s3://bucket/../other", "write s3://BUCKET/PREFIX"),
        ("ftp://host/runs", "give a folder, s3://BUCKET/PREFIX"),
        ("file://host/runs", "with three slashes"),
    ],
)
def test_an_unusable_address_is_a_one_line_error(
    address: str,
    said: str,
    server: Server,
    elsewhere: Elsewhere,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = istanas("search", *tiny(tmp_path, address), capsys=capsys)
    assert code != 0
    assert out == []
    assert len(err) == 1
    assert said in err[0]
    assert "hunter2" not in err[0]
    assert not list(tmp_path.rglob("run.json"))


def test_missing_credentials_are_named(
    server: Server, elsewhere: Elsewhere, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask_for_credentials_after(requests: int) -> None:
        url, as_text = f"{server.url}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, str(requests).encode(), as_text)).close()

    ask_for_credentials_after(0)
    try:
        code, out, err = istanas("search", *tiny(tmp_path, f"s3://{BUCKET}/{prefix}"), capsys=capsys)
    finally:
        ask_for_credentials_after(10**9)
    assert (code, out, len(err)) == (1, [], 1)
    assert "AWS_ACCESS_KEY_ID" in err[0]
