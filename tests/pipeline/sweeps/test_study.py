"""A sweep's study under a searcher that is used like Ray Tune does, also if it is killed between any two steps."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from istanas.errors import ConfigError, IstanasError
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.sweeps.searcher import StudySearcher, make_scheduler
from pipeline.sweeps.space import Settings
from pipeline.sweeps.study import best_trial, n_failed, open_study, own_study, own_trials, storage_uri

SWEEP = """
sweep:
  trials: {trials}
  space:
    space.matrix: {{choice: [uniform, gaussian]}}
    space.sparsity: {{int: [1, 4]}}
    search.lr: {{loguniform: [0.01, 0.3]}}
    search.arch_lr: {{uniform: [0.001, 0.01], when: {{space.matrix: uniform}}}}
"""


class Killed(BaseException):
    """Ends a process like SIGKILL."""


class Listener:
    """Records the events of trials, and is killed at the given call."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.started: list[tuple[int, Settings]] = []
        self._calls, self._dies_at = 0, dies_at

    def _live_or_die(self) -> None:
        self._calls += 1
        if self._calls == self._dies_at:
            raise Killed

    def trial_started(self, index: int, settings: Settings) -> dict[str, Any]:
        self._live_or_die()
        self.started.append((index, settings))
        return {"index": index, "settings": settings}

    def trial_ended(self, index: int, state: TrialState, result: dict[str, Any]) -> None:
        self._live_or_die()

    def study_updated(self, index: int) -> None:
        self._live_or_die()


def config_of(folder: Path, *overrides: str, trials: int = 14) -> Config:
    (folder / "sweep.yaml").write_text(SWEEP.format(trials=trials))
    return load(folder / "sweep.yaml", [f"runtime.runs_dir={folder}", *overrides])


def accuracy(settings: Settings, epoch: int) -> float:
    """Return a made-up accuracy, which increases with the learning rate, the sparsity and the epochs."""
    return float(settings["search.lr"] + 0.01 * settings["space.sparsity"] + 0.001 * epoch)


def run_process(config: Config, listener: Listener, *, epochs: int = 6, name: str = "s") -> Any:
    """Run trials one at a time, like Ray Tune, until none is left; return the study."""
    study = open_study(config, name, fresh=False)
    searcher = StudySearcher(config, study, listener)
    scheduler = make_scheduler(config, study, epochs)
    n = 0
    while True:
        n += 1
        trial_id = f"tune-{n}"
        task = searcher.suggest(trial_id)
        if searcher.error is not None:
            raise searcher.error
        if task == Searcher.FINISHED:
            return study
        trial: Any = SimpleNamespace(trial_id=trial_id)
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        for epoch in range(1, epochs + 1):
            top1 = accuracy(task["settings"], epoch)
            result = {"epoch": epoch, "valid/top1": top1, "valid_top1": top1, "epochs": epoch}
            if scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP:  # type: ignore[arg-type]
                break
            searcher.on_trial_result(trial_id, result)
        else:
            result = {"finished": True, "objective/top1": top1, "valid_top1": top1, "epochs": epochs}
        searcher.on_trial_complete(trial_id, result)
        if searcher.error is not None:
            raise searcher.error


def contents(study: Any) -> list[Any]:
    return [
        (t.number, t.state, t.params, t.values, t.intermediate_values, t.user_attrs)
        for t in study.get_trials()
    ]


def test_warm_up_tasks_come_first_and_are_not_part_of_the_study(tmp_path: Path) -> None:
    config = config_of(tmp_path, trials=1)
    study, listener = open_study(config, "s", fresh=False), Listener()
    searcher = StudySearcher(config, study, listener, warm_ups=[{"warm_up": 1}, {"warm_up": 2}])
    assert [searcher.suggest(n) for n in "ab"] == [{"warm_up": 2}, {"warm_up": 1}]
    searcher.on_trial_result("a", {"finished": True})
    searcher.on_trial_complete("a", {"finished": True})
    searcher.on_trial_complete("b", error=True)  # A killed warm-up has no effect.
    assert searcher.error is None
    assert not study.get_trials()
    assert not listener.started
    assert searcher.suggest("c")["index"] == 0  # type: ignore[index]
    searcher.on_trial_complete("c", {"finished": True, "objective/top1": 0.5})
    over = StudySearcher(config, study, listener, warm_ups=[{"warm_up": 1}])
    assert over.suggest("d") == Searcher.FINISHED, "no trial is left"


def test_a_sweep_killed_at_any_call_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = run_process(config_of(tmp_path / "whole"), Listener())
    states = [t.state for t in whole.get_trials()]
    assert states.count(TrialState.PRUNED) >= 3
    assert states.count(TrialState.COMPLETE) >= 2
    assert len(states) == 14

    (tmp_path / "killed").mkdir()
    config = config_of(tmp_path / "killed")
    kills = 0
    while True:
        try:
            study = run_process(
                config, Listener(dies_at=2 + kills % 4)
            )  # at an end, after it, at a start, in turn
            break
        except Killed:
            kills += 1
    assert kills >= 10
    assert contents(study) == contents(whole)


def test_a_trial_killed_between_two_suggestions_gets_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    whole = run_process(config_of(tmp_path / "whole"), Listener())
    (tmp_path / "killed").mkdir()
    config = config_of(tmp_path / "killed")
    suggest, calls, kills = optuna.trial.Trial.suggest_float, [0], 0

    def dying(self: Any, *args: Any, **kwargs: Any) -> float:
        calls[0] += 1
        if calls[0] % 3 == 0:
            raise Killed
        return suggest(self, *args, **kwargs)

    monkeypatch.setattr(optuna.trial.Trial, "suggest_float", dying)
    while True:
        try:
            study = run_process(config, Listener())
            break
        except Killed:
            kills += 1
    assert kills >= 5
    assert contents(study) == contents(whole)


def test_a_stopped_trial_is_pruned_with_its_last_figures(tmp_path: Path) -> None:
    study = run_process(config_of(tmp_path), Listener())
    pruned = [t for t in study.get_trials() if t.state == TrialState.PRUNED]
    for trial in pruned:
        reached = trial.user_attrs["epochs"]
        assert list(trial.intermediate_values) == list(range(1, reached + 1))
        assert reached in (1, 3)  # the rungs of grace 1 and factor 3, below six epochs
        assert trial.value == trial.intermediate_values[reached]
    assert best_trial(own_study(study)).state == TrialState.COMPLETE  # type: ignore[union-attr]


def test_failed_trials_keep_their_reason_and_end_the_sweep_above_the_limit(tmp_path: Path) -> None:
    config = config_of(tmp_path, "sweep.max_failures=1")
    study = open_study(config, "s", fresh=False)
    searcher = StudySearcher(config, study, Listener())
    searcher.suggest("a")
    searcher.on_trial_complete("a", {"failed": "IstanasError: the loss is NaN"})
    assert searcher.suggest("b") != Searcher.FINISHED
    searcher.on_trial_result("b", {"epoch": 1, "valid/top1": 0.4, "valid_top1": 0.4, "run_dir": "somewhere"})
    searcher.on_trial_complete("b", error=True)
    assert searcher.suggest("c") == Searcher.FINISHED
    reasons = [t.user_attrs["failed"] for t in own_trials(study)]
    assert reasons[0] == "IstanasError: the loss is NaN"
    assert "its process was lost more than 2 times (sweep.max_restarts)" in reasons[1]
    assert own_trials(study)[1].user_attrs["valid_top1"] == 0.4
    assert own_trials(study)[1].user_attrs["run_dir"] == "somewhere"
    assert n_failed(study) == 2
    assert (
        StudySearcher(config_of(tmp_path, "sweep.max_failures=2"), study, Listener()).suggest("d")
        != "FINISHED"
    )


def test_the_points_come_first_and_equal_seeds_give_equal_trials(tmp_path: Path) -> None:
    points = "sweep.points=[{space.sparsity: 3, search.lr: 0.2}, {space.matrix: gaussian}]"
    found = []
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        seed = "seed=1" if folder == "c" else "seed=0"
        listener = Listener()
        run_process(config_of(tmp_path / folder, points, seed, trials=5), listener)
        assert [index for index, _ in listener.started] == [0, 1, 2, 3, 4]
        found.append([settings for _, settings in listener.started])
    first, second = found[0][:2]
    assert (first["space.sparsity"], first["search.lr"]) == (3, 0.2)
    assert second["space.matrix"] == "gaussian"
    assert "search.arch_lr" not in second
    assert found[0] == found[1] != found[2]


def test_a_sweep_learns_from_an_earlier_one_without_counting_its_trials(tmp_path: Path) -> None:
    earlier = run_process(config_of(tmp_path), Listener(), name="earlier")
    listener = Listener()
    config = config_of(tmp_path, "sweep.start_from=earlier", "sweep.scheduler=none", trials=3)
    later = run_process(config, listener, name="later")
    assert [index for index, _ in listener.started] == [0, 1, 2]
    assert len(own_trials(later)) == 3
    assert len(later.get_trials()) == 3 + len(earlier.get_trials())
    own = own_study(later)
    assert [t.params for t in own.get_trials()] == [t.params for t in own_trials(later)]
    best_of_own = best_trial(own)
    assert best_of_own is not None
    assert best_of_own.value == max(t.value for t in own_trials(later))  # type: ignore[type-var]
    assert best_of_own.number in (0, 1, 2)
    # With 14 known trials, TPE samples near the best of them; without any, it would still sample at random.
    rates = [settings["search.lr"] for _, settings in listener.started]
    assert sum(rates) / 3 > 0.15

    narrow = config_of(tmp_path, "sweep.start_from=earlier", trials=3)
    space = {"search.lr": narrow.sweep.space["search.lr"]}  # type: ignore[union-attr]
    fewer = narrow.model_copy(update={"sweep": narrow.sweep.model_copy(update={"space": space})})  # type: ignore[union-attr]
    assert all("start_from" not in t.user_attrs for t in open_study(fewer, "fewer", fresh=False).get_trials())

    with pytest.raises(ConfigError, match="the study 'earlier' has other objectives; leave it out"):
        open_study(
            config_of(tmp_path, "sweep.start_from=earlier", "sweep.objective=retrained", "data.holdout=0.1"),
            "y",
            fresh=False,
        )
    with pytest.raises(ConfigError, match="no such study: 'unknown'; choose one of: earlier, later, fewer"):
        open_study(config_of(tmp_path, "sweep.start_from=unknown"), "x", fresh=False)


def test_fresh_deletes_a_study_and_a_dashboard_can_read_it(tmp_path: Path) -> None:
    config = config_of(tmp_path, trials=4)
    run_process(config, Listener())
    from optuna_dashboard._app import create_app

    storage = optuna.storages.RDBStorage(storage_uri(config, "s"))
    app = create_app(storage)
    status: list[str] = []
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/api/studies",
        "wsgi.url_scheme": "http",
        "SERVER_NAME": "x",
        "SERVER_PORT": "1",
    }
    body = b"".join(app(environ, lambda s, *_: status.append(s)))
    assert status == ["200 OK"]
    assert b'"s"' in body
    assert open_study(config, "s", fresh=True).get_trials() == []


def test_an_unusable_database_is_a_one_line_error_without_its_password(tmp_path: Path) -> None:
    config = config_of(tmp_path, "sweep.storage=nosuch://me:secret@host/x")
    with pytest.raises(IstanasError) as caught:
        open_study(config, "s", fresh=False)
    assert str(caught.value).startswith("sweep.storage: cannot use the database nosuch://host/x (")
    assert "secret" not in str(caught.value)


def test_the_best_trial_of_a_pareto_front_has_the_best_top1(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, "sweep.objectives=[top1, params]", "sweep.searcher=nsga2", "sweep.scheduler=none", trials=6
    )
    study = open_study(config, "s", fresh=False)
    searcher = StudySearcher(config, study, Listener())
    values = [(0.9, 300.0), (0.5, 100.0), (0.95, 900.0), (0.4, 200.0), (0.7, 150.0), (0.6, 400.0)]
    for top1, params in values:
        searcher.suggest("t")
        searcher.on_trial_result(
            "t", {"epoch": 1, "valid/top1": top1}
        )  # With several objectives, epochs are not recorded.
        searcher.on_trial_complete(
            "t", {"finished": True, "objective/top1": top1, "objective/params": params}
        )
    assert searcher.error is None
    assert sorted(t.number for t in study.best_trials) == [0, 1, 2, 4]
    assert best_trial(own_study(study)).number == 2  # type: ignore[union-attr]


def test_a_study_belongs_to_one_run_directory(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    open_study(config, "s", fresh=False, run_dir=tmp_path / "here")
    assert open_study(config, "s", fresh=False, run_dir=tmp_path / "here").get_trials() == []
    with pytest.raises(
        ConfigError, match=r"the study s in this database belongs to .*here; resume the sweep there"
    ):
        open_study(config, "s", fresh=False, run_dir=tmp_path / "there")
    open_study(config, "s", fresh=True, run_dir=tmp_path / "there")


def test_contradicting_settings_fail_their_trial_only(tmp_path: Path) -> None:
    class Refusing(Listener):
        def trial_started(self, index: int, settings: Settings) -> dict[str, Any]:
            if index == 1:
                raise ConfigError("trial: search.lr_min is above search.lr")
            return super().trial_started(index, settings)

    listener = Refusing()
    study = run_process(config_of(tmp_path, trials=3), listener)
    assert [index for index, _ in listener.started] == [0, 2]
    assert study.get_trials()[1].state == TrialState.FAIL
    assert study.get_trials()[1].user_attrs["failed"].endswith("search.lr_min is above search.lr")
