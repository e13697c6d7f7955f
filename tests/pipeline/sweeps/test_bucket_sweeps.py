"""Sweeps whose runs are kept on `s3://`: run directories of the sweep and its trials, ownership, and the study."""

import contextlib
import dataclasses
import io
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console

from istanas.errors import ConfigError, IstanasError
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.jobs.closing import close, close_below
from pipeline.jobs.context import JobContext
from pipeline.jobs.lifecycle import announce
from pipeline.jobs.search import run_search, search_spec
from pipeline.runs import bucket
from pipeline.runs.bucket import Timing
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import OWNER_OBJECT
from pipeline.runs.lease import Lease
from pipeline.runs.mirror import Mirror
from pipeline.sweeps.study import open_study, save_study
from pipeline.tracking.store import open_client
from pipeline.training.epoch_record import Progress
from tests.pipeline.jobs.test_lifecycle import TINY
from tests.pipeline.runs import test_bucket as test_storage
from tests.pipeline.runs.test_bucket import BUCKET, Elsewhere, Server, acquired, comparable

server, elsewhere, prefix = test_storage.server, test_storage.elsewhere, test_storage.prefix
on_other_hosts = test_storage.on_other_hosts

SWEEP = "tiny-sweep-0123456789"  # a run directory
SPACE = "sweep={trials: 3, searcher: random, space: {search.lr: {loguniform: [0.01, 0.3]}}}"


@contextlib.contextmanager
def on(cache: Path) -> Any:
    """Act as another machine, which has its own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield


def in_bucket(server: Server, address: str) -> dict[str, bytes]:
    return server.objects(address.removeprefix(f"s3://{BUCKET}/"))


def trial(place: str, store: Path) -> Config:
    settings = [f"runtime.runs_dir={place}/{SWEEP}", "tracking.enabled=true", "tracking.models=false"]
    return load(None, [*TINY, *settings, f"tracking.uri=sqlite:///{store}/mlflow.db", "data.holdout=0.2"])


def search(config: Config, tell: Any = None) -> dict[str, Any]:
    console = Console(file=io.StringIO(), width=200)
    with Runtime(config.runtime) as runtime:
        return dict(run_search(JobContext(config, "trial-0000", console, runtime, on_epoch=tell)))


def test_a_trial_stopped_on_another_node_is_closed_and_resumes_anywhere(
    server: Server, elsewhere: Elsewhere, prefix: str, tmp_path: Path, blank_database: Path
) -> None:
    shutil.copy(blank_database, tmp_path)
    config = trial(f"s3://{BUCKET}/{prefix}", tmp_path)
    spec = search_spec(config, "trial-0000")
    address, here = bucket.shown(spec.path), elsewhere()
    run_id = announce(search_spec(config, "trial-0000"))  # A new one, with the path on this machine.
    record = json.loads(in_bucket(server, address)["run.json"])
    assert record["status"] == "RUNNING"
    reached = {"valid_top1": 0.5}

    def stop(progress: Progress) -> None:
        """Stop like Ray Tune: the sweep's process closes the run, and the report of the trial never returns."""
        assert OWNER_OBJECT in in_bucket(server, address)
        with on(here):
            path = bucket.local(address)
            assert close(path, config, "KILLED", {"istanas.trial_state": "PRUNED"}, reached)
            assert len(RunDir(path).metrics()) == 1
            assert not (path / "checkpoints").exists()  # Closing a run does not fetch them.
        raise SystemExit

    elsewhere()
    with pytest.raises(SystemExit):
        search(config, tell=stop)
    there = in_bucket(server, address)
    assert OWNER_OBJECT not in there
    record = json.loads(there["run.json"])
    assert (record["status"], record["result"]) == ("KILLED", reached)
    assert "checkpoints/epoch-0001.json" in there
    client = open_client(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'istanas'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.status) == (run_id, "KILLED")
    assert run.data.tags["istanas.trial_state"] == "PRUNED"

    # A third machine resumes the trial; a fourth one, with the next process of the sweep, sees it finished.
    elsewhere()
    result = search(config)
    elsewhere()
    assert announce(search_spec(config, "trial-0000")) == run_id
    assert close(bucket.local(address), config, "FINISHED", {"istanas.trial_state": "COMPLETE"}, {})
    record = json.loads(in_bucket(server, address)["run.json"])
    assert (record["status"], record["tags"]["istanas.trial_state"]) == ("FINISHED", "COMPLETE")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.data.tags["istanas.trial_state"]) == ("FINISHED", "COMPLETE")
    bucket.fetch(address)
    undisturbed = config.model_copy(
        update={"runtime": config.runtime.model_copy(update={"runs_dir": str(tmp_path / "folder")})}
    )
    assert search(undisturbed)["genotype"] == result["genotype"]
    (folder,) = (tmp_path / "folder").iterdir()
    assert comparable(RunDir(bucket.local(address))) == comparable(RunDir(folder))


def test_unfinished_trials_of_another_machine_are_closed(
    server: Server, elsewhere: Elsewhere, prefix: str
) -> None:
    config = load(None, [*TINY, f"runtime.runs_dir=s3://{BUCKET}/{prefix}/{SWEEP}"])
    announce(search_spec(config, "trial-0000"))
    elsewhere()
    folder = bucket.local(config.runtime.runs_dir)
    assert close_below(folder, config)
    (record,) = (
        json.loads(data)
        for name, data in server.objects(f"{prefix}/{SWEEP}").items()
        if name.endswith("/run.json")
    )
    assert record["status"] == "KILLED"


def test_a_sweep_and_its_trials_do_not_change_each_others_files(
    server: Server, elsewhere: Elsewhere, prefix: str
) -> None:
    address = f"s3://{BUCKET}/{prefix}/{SWEEP}"
    names = [f"{name}-{kind}-0123456789" for name, kind in (("trial-0000", "search"), ("cell", "retrain"))]

    path = bucket.local(address)
    with acquired(path) as sweep:
        (path / "run.json").write_text("{}")
        (path / "best").mkdir()
        (path / "best" / "genotype.json").write_text("{}")
        for name in names:  # The first one is on this machine, the second on another.
            trial = bucket.local(f"{address}/{name}")
            with acquired(trial) as run:
                (trial / "run.json").write_text("{}")
                sweep.push()
                assert f"{name}/run.json" not in in_bucket(server, address)
                run.push()
            cache = elsewhere()
    with on(cache):
        copy = bucket.fetch(address)
        assert {file.name for file in copy.iterdir() if not file.name.startswith(".")} == {"run.json", "best"}
        bucket.fetch_records(copy.parent)
        assert {file.parent.name for file in copy.parent.glob("**/run.json")} == {SWEEP, *names}
        with acquired(copy) as sweep:
            shutil.rmtree(copy / names[0])  # The machine may not have a copy of it.
            sweep.push()
            assert {f"{name}/run.json" for name in names} < in_bucket(server, address).keys()
            # Starting over deletes the trials, too.
            (copy / "run.json").unlink()
            sweep.push_cleared()
            assert in_bucket(server, address).keys() == {"best/genotype.json", OWNER_OBJECT}


def test_concurrent_owners_of_one_run_wait_for_each_other(
    server: Server, elsewhere: Elsewhere, on_other_hosts: None, prefix: str
) -> None:
    """Trials on several nodes may retrain the same cell."""
    timing = Timing(interval=0.1, settle=0.5)
    leases = []
    for _ in range(3):
        elsewhere()
        leases.append(Mirror(bucket.local(f"s3://{BUCKET}/{prefix}/run"), timing).lease)
    together = threading.Barrier(3)
    inside: list[int] = []
    seen: list[int] = []
    waiting: list[str] = []
    both_wait = threading.Event()

    def say(line: str) -> None:
        waiting.append(line)
        if len(waiting) == 2:
            both_wait.set()

    def work(lease: Lease) -> None:
        together.wait()
        lease.acquire(say, -1)
        inside.append(1)
        seen.append(len(inside))
        both_wait.wait(30)
        seen.append(len(inside))
        inside.pop()
        lease.release()

    threads = [threading.Thread(target=work, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert seen == 6 * [1]
    assert not server.objects(f"{prefix}/run")


def test_a_trial_waits_for_a_live_owner_and_replaces_a_silent_one(
    server: Server, elsewhere: Elsewhere, prefix: str
) -> None:
    timing = Timing(interval=0.05, settle=0.05)
    address = f"s3://{BUCKET}/{prefix}/run"
    mirror = Mirror(bucket.local(address), timing)
    lease = mirror.lease
    lease.me = dataclasses.replace(lease.me, host="a node that is cut off")
    lease.write(lease.me)
    ended = threading.Event()
    heart = threading.Thread(target=lease.renew, args=(ended,))
    heart.start()
    elsewhere()
    path, said, began = bucket.local(address), list[str](), time.monotonic()
    try:
        with (
            pytest.raises(ConfigError, match=r"in use by process .* on a node that is cut off"),
            bucket.acquired(RunDir(path), said.append, wait=1.0, timing=timing),
        ):
            pytest.fail("two owners")
        assert time.monotonic() - began >= 1.0
    finally:
        ended.set()
        heart.join()
    assert len(said) == 1
    timing = dataclasses.replace(timing, silence=0.5)
    path.mkdir(parents=True)
    (path / "run.json").write_text("of this machine only")
    mirror.objects.put("run.json", b"as it was left")
    with bucket.acquired(RunDir(path), said.append, wait=1.0, timing=timing):
        assert (path / "run.json").read_text() == "as it was left"
        # The node is reachable again, and fails before it writes anything.
        with pytest.raises(IstanasError, match="was taken over by process"):
            mirror.push()


def opened(config: Config, *, fresh: bool = False) -> optuna.Study:
    run_dir = bucket.local(config.runtime.runs_dir) / SWEEP
    return open_study(config, SWEEP, fresh=fresh, run_dir=run_dir)


def test_the_study_is_restored_from_the_bucket_on_any_machine(
    server: Server, elsewhere: Elsewhere, prefix: str, tmp_path: Path
) -> None:
    place = f"s3://{BUCKET}/{prefix}"
    config = load(None, [*TINY, SPACE, f"runtime.runs_dir={place}"])

    def contents(study: optuna.Study) -> list[Any]:
        return [(t.number, t.state, t.params, t.values, t.user_attrs) for t in study.get_trials()]

    def run_dir() -> Path:
        return bucket.local(f"{place}/{SWEEP}")

    with acquired(run_dir()) as sweep:
        study = opened(config)
        (run_dir() / "run.json").write_text("{}")
        trial = study.ask()
        trial.suggest_float("search.lr", 0.01, 0.3, log=True)
        study.tell(trial, 0.5)
        trial = study.ask()
        save_study(config, run_dir())
        sweep.push()
        sent = contents(study)
        study.tell(trial, 0.9)  # The process is killed here, before it saves the study.
    for _ in range(2):  # on this machine, and on one with an empty disk
        with acquired(run_dir()):
            again = opened(config)
            assert contents(again) == sent
            assert again.user_attrs["run_dir"] == f"{place}/{SWEEP}"
        elsewhere()
    with acquired(run_dir()):
        assert not contents(opened(config, fresh=True))
        assert contents(opened(config)) == sent  # The new study was not sent.
    assert server.objects(f"{prefix}/{SWEEP}").keys() == {"run.json", "optuna.db"}

    # Another sweep in the same bucket learns from its trials; unknown names are rejected.
    elsewhere()
    other = load(None, [*TINY, SPACE, f"runtime.runs_dir={place}", f"sweep.start_from={SWEEP}"])
    learnt = open_study(other, "other", fresh=False).get_trials()
    assert [(t.state, t.values, t.user_attrs["start_from"]) for t in learnt] == [
        (TrialState.COMPLETE, [0.5], SWEEP)
    ]
    for unknown in ("nothing", "../x", "."):
        bad = load(None, [*TINY, SPACE, f"runtime.runs_dir={place}", f"sweep.start_from={unknown}"])
        with pytest.raises(
            ConfigError, match=f"no such study: {unknown!r}; name the run directory of a sweep in {place}"
        ):
            open_study(bad, "bad", fresh=False)

    # With sweep.storage, the study is only in that database.
    elsewhere()
    database = f"sqlite:///{tmp_path}/study.db"
    own = load(None, [*TINY, SPACE, f"runtime.runs_dir={place}", f"sweep.storage={database}"])
    opened(own)
    save_study(own, run_dir())
    assert optuna.get_all_study_names(database) == [SWEEP]
    assert not (run_dir() / "optuna.db").exists()
