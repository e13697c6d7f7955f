"""Databases that another program has locked for too long: jobs continue, and no data are lost."""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.exceptions import StorageInternalError

from pipeline.cluster.tune import FINISHED
from pipeline.config.load import load
from pipeline.runs.directory import RunDir
from pipeline.sweeps.searcher import StudySearcher
from pipeline.sweeps.study import open_study, own_trials
from pipeline.tracking.notices import OF_THIS_PROCESS
from pipeline.tracking.store import open_client
from pipeline.training.epoch_record import Progress
from tests.pipeline.jobs.tiny_search import SETTINGS, search


@contextlib.contextmanager
def locked(file: Path) -> Iterator[sqlite3.Connection]:
    """Lock a database as another program does."""
    with contextlib.closing(sqlite3.connect(file, isolation_level=None, check_same_thread=False)) as database:
        database.execute("BEGIN EXCLUSIVE")
        yield database


@pytest.mark.slow  # the search waits for the lock at its start and at its end
@pytest.mark.parametrize("until", ["the end", "the second epoch"])
def test_a_search_with_a_locked_store_delivers_later(
    tmp_path: Path, until: str, caplog: pytest.LogCaptureFixture
) -> None:
    OF_THIS_PROCESS.clear()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = ["tracking.enabled=true", f"tracking.uri={uri}"]
    open_client(uri)
    with locked(tmp_path / "mlflow.db") as other:

        def release(progress: Progress) -> None:
            if progress.epochs == 2 and until != "the end":
                other.execute("ROLLBACK")

        found, seen = search(tmp_path / "runs", *settings, on_epoch=release)
    path = Path(found["run_dir"])
    assert RunDir(path).read().status == "FINISHED"
    said = [r.getMessage() for r in caplog.records if "can't be used" in r.getMessage()]
    assert said == [
        f"MLflow store {uri}: can't be used (OperationalError: database is locked); everything stays in {path}; "
        f"when it is back, run: istanas sync {path}"
    ]
    assert not [r for r in caplog.records if r.name.startswith("mlflow")], "MLflow's own tries, of minutes"
    if until == "the end":
        assert f"not in MLflow yet: deliver it with istanas sync {path}" in seen
        assert found["mlflow_run_id"] is None
        found, _ = search(tmp_path / "runs", *settings)
    (run,) = open_client(uri).search_runs(["1"])
    assert (run.info.run_id, run.info.status) == (found["mlflow_run_id"], "FINISHED")
    history = open_client(uri).get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [1, 2, 3]


class Ends:
    """Receives the events of trials and ignores them."""

    def trial_started(self, index: int, settings: dict[str, Any]) -> dict[str, Any]:
        return {}

    def trial_ended(self, index: int, state: Any, result: dict[str, Any]) -> None:
        pass

    def study_updated(self, index: int) -> None:
        pass


def test_a_sweep_stops_at_a_locked_study_and_loses_no_trial(tmp_path: Path) -> None:
    sweep = json.dumps({"trials": 3, "space": {"search.lr": {"uniform": [0.01, 0.1]}}})
    config = load(None, [*SETTINGS, f"runtime.runs_dir={tmp_path}", f"sweep={sweep}"])
    done = {FINISHED: True, "objective/top1": 0.5, "valid_top1": 0.5}
    searcher = StudySearcher(config, open_study(config, "locked", fresh=False, lock_seconds=0.5), Ends())
    searcher.suggest("a")
    with locked(tmp_path / "optuna.db"):
        searcher.on_trial_complete("a", dict(done))
        assert isinstance(searcher.error, StorageInternalError)
        assert "database is locked" in str(searcher.error.__cause__)
        assert searcher.suggest("b") == "FINISHED"

    study = open_study(config, "locked", fresh=False)
    (trial,) = own_trials(study)
    assert trial.state.name == "RUNNING"
    searcher = StudySearcher(config, study, Ends())
    for name in "abc":
        searcher.suggest(name)
        searcher.on_trial_complete(name, dict(done))
    assert searcher.error is None
    assert searcher.suggest("d") == "FINISHED"
    assert [trial.state.name for trial in own_trials(study)] == ["COMPLETE"] * 3
