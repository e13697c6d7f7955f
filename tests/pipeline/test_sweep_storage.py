"""Sweeps on `s3://`: what their process and their trials' do there; a whole one on nodes that share nothing else."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState
from rich.console import Console

from istanas.errors import ConfigError, IstanasError
from pipeline import storage
from pipeline.cluster import Runtime
from pipeline.config import load
from pipeline.jobs.job import announce, close, close_below
from pipeline.jobs.search import run_search, search_spec
from pipeline.references import resolve_genotype
from pipeline.rundir import RunDir
from pipeline.schema import Config
from pipeline.searcher import first_settings
from pipeline.study import keep_study, open_study
from pipeline.sweep_report import COLUMNS
from pipeline.sweep_space import trial_config
from pipeline.tracking import open_client
from tests.pipeline import test_storage
from tests.pipeline.test_jobs import TINY
from tests.pipeline.test_storage import BUCKET, Elsewhere, Server, comparable, istanas
from tests.ray_cluster import ENVIRONMENT, PROGRAM, RayCluster

server, elsewhere, prefix = test_storage.server, test_storage.elsewhere, test_storage.prefix
on_other_hosts = test_storage.on_other_hosts

SWEEP = "tiny-sweep-0123456789"  # a run directory
SPACE = "sweep={trials: 3, searcher: random, space: {search.lr: {loguniform: [0.01, 0.3]}}}"


@contextlib.contextmanager
def on(cache: Path) -> Any:
    """On another machine for a while."""
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
        return dict(
            run_search(config, name="trial-0000", fresh=False, console=console, runtime=runtime, tell=tell)
        )


def test_a_trial_that_is_stopped_on_another_node_is_closed_in_the_bucket_and_can_go_on_anywhere(
    server: Server, elsewhere: Elsewhere, prefix: str, tmp_path: Path
) -> None:
    config = trial(f"s3://{BUCKET}/{prefix}", tmp_path)
    spec = search_spec(config, "trial-0000")
    address, here = storage.shown(spec.path), elsewhere()
    run_id = announce(search_spec(config, "trial-0000"))  # anew: a machine's path of it is its own
    record = json.loads(in_bucket(server, address)["run.json"])
    assert record["status"] == "RUNNING"
    reached = {"valid_top1": 0.5}

    def stop(history: list[Any]) -> None:
        """As Ray Tune does: the sweep's process closes the run, then the trial's report never returns."""
        assert storage.OWNER_OBJECT in in_bucket(server, address)
        with on(here):
            path = storage.local(address)
            assert close(path, config, "KILLED", {"istanas.trial_state": "PRUNED"}, reached)
            assert len(RunDir(path).metrics()) == 1
            assert not (path / "checkpoints").exists()  # what nobody here needs
        raise SystemExit

    elsewhere()
    with pytest.raises(SystemExit):
        search(config, tell=stop)
    there = in_bucket(server, address)
    assert storage.OWNER_OBJECT not in there
    record = json.loads(there["run.json"])
    assert (record["status"], record["result"]) == ("KILLED", reached)
    assert "checkpoints/epoch-0001.json" in there
    client = open_client(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'istanas'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.status) == (run_id, "KILLED")
    assert run.data.tags["istanas.trial_state"] == "PRUNED"

    # The next sitting takes it up on a third machine; its process is on a fourth, and sees it finished.
    elsewhere()
    result = search(config)
    elsewhere()
    assert announce(search_spec(config, "trial-0000")) == run_id
    assert close(storage.local(address), config, "FINISHED", {"istanas.trial_state": "COMPLETE"}, {})
    record = json.loads(in_bucket(server, address)["run.json"])
    assert (record["status"], record["tags"]["istanas.trial_state"]) == ("FINISHED", "COMPLETE")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.data.tags["istanas.trial_state"]) == ("FINISHED", "COMPLETE")
    storage.fetch(address)
    undisturbed = config.model_copy(
        update={"runtime": config.runtime.model_copy(update={"runs_dir": str(tmp_path / "folder")})}
    )
    assert search(undisturbed)["genotype"] == result["genotype"]
    (folder,) = (tmp_path / "folder").iterdir()
    assert comparable(RunDir(storage.local(address))) == comparable(RunDir(folder))


def test_what_a_sweep_leaves_running_is_closed_though_it_ran_elsewhere(
    server: Server, elsewhere: Elsewhere, prefix: str
) -> None:
    config = load(None, [*TINY, f"runtime.runs_dir=s3://{BUCKET}/{prefix}/{SWEEP}"])
    announce(search_spec(config, "trial-0000"))
    elsewhere()
    folder = storage.local(config.runtime.runs_dir)
    assert close_below(folder, config)
    (record,) = (
        json.loads(data)
        for name, data in server.objects(f"{prefix}/{SWEEP}").items()
        if name.endswith("/run.json")
    )
    assert record["status"] == "KILLED"


def test_a_sweeps_run_directory_and_its_trials_do_not_touch_each_other(
    server: Server, elsewhere: Elsewhere, prefix: str
) -> None:
    address = f"s3://{BUCKET}/{prefix}/{SWEEP}"
    names = [f"{name}-{kind}-0123456789" for name, kind in (("trial-0000", "search"), ("cell", "retrain"))]

    path = storage.local(address)
    with storage.held(path, print):
        (path / "run.json").write_text("{}")
        (path / "best").mkdir()
        (path / "best" / "genotype.json").write_text("{}")
        for name in names:  # one on this machine, one on another
            trial = storage.local(f"{address}/{name}")
            with storage.held(trial, print):
                (trial / "run.json").write_text("{}")
                storage.push(path)
                assert f"{name}/run.json" not in in_bucket(server, address)
                storage.push(trial)
            cache = elsewhere()
    with on(cache):
        copy = storage.fetch(address)
        assert {file.name for file in copy.iterdir() if not file.name.startswith(".")} == {"run.json", "best"}
        storage.fetch_records(copy.parent)
        assert {file.parent.name for file in copy.parent.glob("**/run.json")} == {SWEEP, *names}
        with storage.held(copy, print):
            shutil.rmtree(copy / names[0])  # as on a machine that has not seen it
            storage.push(copy)
            assert {f"{name}/run.json" for name in names} < in_bucket(server, address).keys()
            # Started over, nothing is left of either.
            (copy / "run.json").unlink()
            storage.push_cleared(copy)
            assert in_bucket(server, address).keys() == {"best/genotype.json", storage.OWNER_OBJECT}


def test_of_many_that_want_one_run_each_waits_for_the_others(
    server: Server, elsewhere: Elsewhere, on_other_hosts: None, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As trials of several nodes do that have found the same cell."""
    monkeypatch.setattr(storage, "SECONDS_TO_SETTLE", 0.5)
    mirrors = []
    for _ in range(3):
        elsewhere()
        mirrors.append(storage._Mirror(storage.local(f"s3://{BUCKET}/{prefix}/run")))
    together = threading.Barrier(3)
    inside: list[int] = []
    seen: list[int] = []

    def work(mirror: storage._Mirror) -> None:
        together.wait()
        mirror.take(lambda line: None, -1)
        inside.append(1)
        seen.append(len(inside))
        time.sleep(0.3)
        seen.append(len(inside))
        inside.pop()
        mirror.leave()

    threads = [threading.Thread(target=work, args=(mirror,)) for mirror in mirrors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert seen == 6 * [1]
    assert not server.objects(f"{prefix}/run")


def test_a_trial_waits_for_an_owner_that_lives_as_long_as_it_may_and_takes_over_from_one_that_is_silent(
    server: Server, elsewhere: Elsewhere, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "SECONDS_BETWEEN_BEATS", 0.05)
    monkeypatch.setattr(storage, "SECONDS_TO_BEAT", 0.5)
    address = f"s3://{BUCKET}/{prefix}/run"
    mirror = storage._Mirror(storage.local(address))
    mirror._me = dataclasses.replace(mirror._me, host="a node that is cut off")
    mirror._write_owner(mirror._me)
    ended = threading.Event()
    heart = threading.Thread(target=mirror.beat, args=(ended,))
    heart.start()
    elsewhere()
    path, said, began = storage.local(address), list[str](), time.monotonic()
    try:
        with (
            pytest.raises(ConfigError, match=r"in use by process .* on a node that is cut off"),
            storage.held(path, said.append, wait=1.0),
        ):
            pytest.fail("two owners")
        assert time.monotonic() - began >= 1.0
    finally:
        ended.set()
        heart.join()
    assert len(said) == 1
    path.mkdir(parents=True)
    (path / "run.json").write_text("of this machine only")
    mirror.put("run.json", b"as it was left")
    with storage.held(path, said.append, wait=1.0):
        assert (path / "run.json").read_text() == "as it was left"
        # The node comes back, and is told so before it writes anything.
        with pytest.raises(IstanasError, match="was taken over by process"):
            mirror.push()


def sitting(config: Config, *, fresh: bool = False) -> optuna.Study:
    run_dir = storage.local(config.runtime.runs_dir) / SWEEP
    return open_study(config, SWEEP, fresh=fresh, run_dir=run_dir)


def test_the_study_outlives_the_machine_and_knows_no_more_than_was_sent(
    server: Server, elsewhere: Elsewhere, prefix: str, tmp_path: Path
) -> None:
    place = f"s3://{BUCKET}/{prefix}"
    config = load(None, [*TINY, SPACE, f"runtime.runs_dir={place}"])

    def contents(study: optuna.Study) -> list[Any]:
        return [(t.number, t.state, t.params, t.values, t.user_attrs) for t in study.get_trials()]

    def run_dir() -> Path:
        return storage.local(f"{place}/{SWEEP}")

    with storage.held(run_dir(), print):
        study = sitting(config)
        (run_dir() / "run.json").write_text("{}")
        trial = study.ask()
        trial.suggest_float("search.lr", 0.01, 0.3, log=True)
        study.tell(trial, 0.5)
        trial = study.ask()
        keep_study(config, run_dir())
        storage.push(run_dir())
        sent = contents(study)
        study.tell(trial, 0.9)  # and here the process is killed
    for _ in range(2):  # on this machine, and on one with an empty disk
        with storage.held(run_dir(), print):
            again = sitting(config)
            assert contents(again) == sent
            assert again.user_attrs["run_dir"] == f"{place}/{SWEEP}"
        elsewhere()
    with storage.held(run_dir(), print):
        assert not contents(sitting(config, fresh=True))
        assert contents(sitting(config)) == sent  # until the new one is sent
    assert server.objects(f"{prefix}/{SWEEP}").keys() == {"run.json", "optuna.db"}

    # Another sweep of the same storage learns from it; from one of which it has none it does not.
    elsewhere()
    other = load(None, [*TINY, SPACE, f"runtime.runs_dir={place}", f"sweep.start_from={SWEEP}"])
    learnt = open_study(other, "other", fresh=False).get_trials()
    assert [(t.state, t.values, t.user_attrs["start_from"]) for t in learnt] == [
        (TrialState.COMPLETE, [0.5], SWEEP)
    ]
    for unknown in ("nothing", "../x", "."):
        bad = load(None, [*TINY, SPACE, f"runtime.runs_dir={place}", f"sweep.start_from={unknown}"])
        with pytest.raises(ConfigError, match=f"no such study, name the run directory of a sweep in {place}"):
            open_study(bad, "bad", fresh=False)

    # With a database of its own it is there, and nowhere else.
    elsewhere()
    database = f"sqlite:///{tmp_path}/study.db"
    own = load(None, [*TINY, SPACE, f"runtime.runs_dir={place}", f"sweep.storage={database}"])
    sitting(own)
    keep_study(own, run_dir())
    assert optuna.get_all_study_names(database) == [SWEEP]
    assert not (run_dir() / "optuna.db").exists()


# ---------- a whole one
TRIALS = 3
CONFIG = f"""
data: {{name: digits, holdout: 0.2}}
space: {{nodes: 1, ops: [skip_connect, sep_conv_3x3]}}
search: {{epochs: 4, batch_size: 64, init_channels: 4, layers: 3, arch_lr: 0.01}}
retrain: {{epochs: 1, batch_size: 64, init_channels: 4, layers: 3, auxiliary_weight: 0, drop_path: 0, cutout: 0}}
runtime: {{threads: 1, device: cpu}}
sweep:
  trials: {TRIALS}
  objective: retrained
  searcher: random
  scheduler: none
  space: {{search.lr: {{loguniform: [0.02, 0.3]}}}}
"""


class Table:
    """A sweep's table in the bucket."""

    def __init__(self, server: Server, prefix: str) -> None:
        self._client, self._prefix = server.client, prefix

    def read(self) -> pd.DataFrame:
        """Empty before there is one."""
        found = self._client.list_objects_v2(Bucket=BUCKET, Prefix=f"{self._prefix}/").get("Contents", [])
        keys = [entry["Key"] for entry in found if entry["Key"].endswith("/trials.csv")]
        if not keys:
            return pd.DataFrame({"state": []})
        return pd.read_csv(self._client.get_object(Bucket=BUCKET, Key=keys[0])["Body"], dtype=COLUMNS)

    @property
    def ended(self) -> int:
        return sum(state == "COMPLETE" for state in self.read()["state"])

    def has(self, end: str) -> bool:
        """Whether there is an object whose name ends so, or is like that."""
        found = self._client.list_objects_v2(Bucket=BUCKET, Prefix=f"{self._prefix}/").get("Contents", [])
        return any(re.search(end, entry["Key"]) for entry in found)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come to pass"
        time.sleep(0.05)


def expected(folder: Path) -> list[tuple[dict[str, Any], str, float]]:
    """Settings, genotype and top-1 of the trials, each searched in this process, without sweep, Ray and bucket."""
    (folder / "tiny.yaml").write_text(CONFIG)
    config = load(folder / "tiny.yaml", ["tracking.enabled=false", f"runtime.runs_dir={folder}/alone"])
    found = []
    for settings in first_settings(config, TRIALS):
        result = search(trial_config(config, settings))
        found.append((settings, result["digest"], result["valid_top1"]))
    return found


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a node a disk of its own")
def test_two_nodes_and_a_command_that_is_killed_share_nothing_but_the_bucket(
    server: Server,
    elsewhere: Elsewhere,
    prefix: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk, table, place = tmp_path / "disk", Table(server, prefix), f"s3://{BUCKET}/{prefix}"
    disk.mkdir()
    store = f"sqlite:///{tmp_path}/mlflow.db"  # stands for a server, and not on anybody's disk
    of_machine = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    of_machine |= {"HOME": str(disk), "XDG_CACHE_HOME": str(disk / "cache")}
    cluster = RayCluster(1, environment=of_machine)

    def start() -> subprocess.Popen[str]:
        (disk / "tiny.yaml").write_text(CONFIG)
        arguments = ["--config", "tiny.yaml", "--json", "--address", cluster.address]
        for setting in (f"runtime.runs_dir={place}", f"tracking.uri={store}"):
            arguments += ["--set", setting]
        return subprocess.Popen(
            [*PROGRAM, "sweep", *arguments],
            cwd=disk,
            env={**ENVIRONMENT, **of_machine},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    try:
        cluster.add(1, disk)  # where the first one has its disk, this one has another
        killed = start()
        alone = expected(tmp_path)  # meanwhile
        try:  # at a moment when a trial has ended, and the last one is in the middle of its search
            wait_for(lambda: killed.poll() is not None or table.has(r"/trial-0002-.*/epoch-0001\.json"), 120)
        finally:
            killed.kill()
        _, said = killed.communicate()
        assert 1 <= table.ended < TRIALS, said
        wait_for(lambda: not cluster.trials(), 20)
        shutil.rmtree(disk)
        disk.mkdir()
        again = start()
        out, err = again.communicate(timeout=200)
        assert again.returncode == 0, err
    finally:
        cluster.close()
    assert f"pre-flight: storage: 2 nodes and this process share {place}" in err
    assert re.search(r"resumed: [12] trials? done, [12] to go on with, 0 to come", err)
    result, frame = json.loads(out), table.read()
    assert result["run_dir"] == f"{place}/{Path(result['run_dir']).name}"
    assert list(frame["state"]) == ["COMPLETE"] * TRIALS
    assert [
        ({"search.lr": row["search.lr"]}, row["digest"], row["valid_top1"])
        for row in frame.to_dict("records")
    ] == alone
    best = int(frame["retrained_top1"].astype(float).argmax())
    assert (result["best_trial"], result["digest"]) == (best, frame["digest"][best])

    client = open_client(store)
    (experiment,) = client.search_experiments(filter_string="name = 'istanas'")
    runs = list(client.search_runs([experiment.experiment_id]))
    by_kind = {
        kind: [r for r in runs if r.data.tags["istanas.kind"] == kind]
        for kind in ("sweep", "search", "retrain")
    }
    (parent,) = by_kind["sweep"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert [len(by_kind["search"]), len(by_kind["retrain"])] == [TRIALS, frame["digest"].nunique()]
    assert {run.data.tags["mlflow.parentRunId"] for run in by_kind["search"]} == {parent.info.run_id}
    assert {run.data.tags["istanas.run_dir"] for run in by_kind["search"]} == set(frame["run_dir"])
    assert {run.info.run_id for run in by_kind["search"]} == set(frame["mlflow_run_id"])
    names = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert names >= {"config.yaml", "trials.csv", "sweep.html", "report.html", "best"}
    there = in_bucket(server, result["run_dir"])
    assert {
        "optuna.db",
        "trials.csv",
        "sweep.html",
        "report.html",
        "best/genotype.json",
        "metrics.jsonl",
    } <= there.keys()
    third = next(data.decode() for name, data in there.items() if re.match(r"trial-0002-.*/trial\.log", name))
    assert re.search(r"^resumed after epoch [123]$", third, re.MULTILINE)
    logs = [data.decode() for name, data in there.items() if name.endswith("/trial.log")]
    assert len(logs) == TRIALS
    assert len({line for log in logs for line in log.splitlines() if line.startswith("on node")}) == 2, (
        "all on one"
    )
    assert not [name for name in there if name.endswith(storage.OWNER_OBJECT)]

    # From a machine that has never seen it.
    elsewhere()
    trial_dir = frame["run_dir"][best]
    common = [f"--set=tracking.uri={store}", f"--set=runtime.runs_dir={place}"]
    assert istanas("results", "--sweep", result["run_dir"], *common, "--json", capsys=capsys)[0] == 0
    for reference in (result["run_dir"], f"{result['run_dir']}/best/genotype.json", trial_dir):
        code, lines, err_lines = istanas(
            "draw", reference, *common, "--out", str(tmp_path / "cells"), "--json", capsys=capsys
        )
        assert code == 0, err_lines
        assert json.loads(lines[-1])["digest"] == result["digest"]
    code, _, lines = istanas(
        "compare", *frame["run_dir"][:2], *common, "--out", str(tmp_path / "page"), capsys=capsys
    )
    assert code == 0, lines
    settings = load(None)
    _, parent_dir = resolve_genotype(
        result["run_dir"],
        space=settings.space.cell_space(),
        runs_dir=storage.local(place),
        tracking_uri=store,
    )
    assert parent_dir == trial_dir  # of a retraining of the sweep's best
