"""The parts of a sweep without Ray: resources, dry run, checks, report and figures; the test split is not read."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib import pyplot as plt
from PIL import Image
from rich.console import Console

from istanas.data import load_dataset
from istanas.errors import ConfigError, IstanasError
from istanas.space import CellSpace, random_genotype
from istanas.statistics import difference_interval
from pipeline.cli.commands import run
from pipeline.config.load import load, to_yaml
from pipeline.config.schema import Config
from pipeline.config.workers import Node
from pipeline.jobs.opening import as_written
from pipeline.report.trials import COLUMNS, kendall_tau, read_table, trials_table, write_table
from pipeline.sweeps.bookkeeping import describe_trial
from pipeline.sweeps.check import check_sweep
from pipeline.sweeps.figures import draw_plots
from pipeline.sweeps.front import draw_front, front_of
from pipeline.sweeps.plan import plan_trials
from pipeline.sweeps.report import sweep_frame, write_figures
from pipeline.sweeps.searcher import StudySearcher
from pipeline.sweeps.space import trial_config
from pipeline.sweeps.study import open_study, own_study, own_trials
from pipeline.sweeps.tune import max_epochs
from pipeline.training.epoch_record import FolderStore
from pipeline.training.loop import retrain_worker, search_worker
from pipeline.training.observer import Silent
from tests.pipeline.sweeps.test_study import Listener

SWEEP = "sweep={space: {search.lr: {uniform: [0.01, 0.1]}}}"


def config_of(*overrides: str) -> Config:
    return load(None, [SWEEP, *overrides])


@pytest.mark.parametrize(
    ("overrides", "nodes", "plan"),
    [
        ([], [Node(2)], (1, 0, 0, 2, 2)),
        (["sweep.cpus_per_trial=2"], [Node(5), Node(3)], (2, 0, 0, 3, 3)),
        (["sweep.max_concurrent=1"], [Node(8)], (1, 0, 0, 8, 1)),
        (["sweep.trials=3"], [Node(8)], (1, 0, 0, 8, 3)),
        (["runtime.workers=1"], [Node(4)], (1, 0, 0, 4, 4)),
        (["runtime.workers=2"], [Node(2)], (1, 0, 2, 1, 1)),
        (["runtime.workers=2", "runtime.threads=3"], [Node(8), Node(4)], (3, 0, 2, 1, 1)),
        ([], [Node(8, 2)], (1, 1, 0, 2, 2)),
        (["sweep.gpus_per_trial=0.25"], [Node(16, 2), Node(3, 1)], (1, 0.25, 0, 11, 11)),
        (["sweep.gpus_per_trial=2"], [Node(16, 5)], (1, 2, 0, 2, 2)),
        (["runtime.device=cpu"], [Node(4, 2)], (1, 0, 0, 4, 4)),
        (["runtime.workers=2"], [Node(8, 4)], (1, 1, 2, 2, 2)),
    ],
)
def test_the_machines_are_divided_among_trials(overrides: list[str], nodes: list[Node], plan: Any) -> None:
    found = plan_trials(config_of(*overrides), nodes)
    assert (found.cpus, found.gpus, found.workers, found.fit, found.at_once) == plan


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["sweep.cpus_per_trial=4"],
            "no trial fits: a trial needs 4 cores, and there are 2 cores and 0 GPUs; lower",
        ),
        (["runtime.workers=3"], "no trial fits: a trial needs 3 workers of 1 core, and there are 2 cores"),
        (
            ["runtime.device=cuda"],
            "no trial fits: a trial needs 1 core and 1 GPU, and there are 2 cores and 0 GPUs",
        ),
    ],
)
def test_machines_too_small_for_a_trial_are_an_error(overrides: list[str], line: str) -> None:
    with pytest.raises(IstanasError) as caught:
        plan_trials(config_of(*overrides), [Node(2)])
    assert str(caught.value).startswith(line)


def test_a_dry_run_shows_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    digits = Path(__file__).resolve().parents[3] / "tune_configs" / "sweep_digits.yaml"
    arguments = ["sweep", "--config", str(digits), "--dry-run", "--max-concurrent", "1", "--json"]
    assert run(arguments) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["at_once"] == 1
    assert sum(line.startswith("sampled settings: ") for line in err.splitlines()) == 5
    assert (
        "sampled settings: space.sparsity=2, space.n_measurements=7, space.matrix=uniform, search.lr=0.1"
        in err
    )
    assert "loguniform 0.01 .. 0.3" in err
    assert "12 trials, objective retrained (top1), searcher tpe, scheduler asha (grace 1, factor 3)" in err
    assert list(tmp_path.iterdir()) == []
    for arguments in (["sweep"], ["sweep", "--dry-run"]):
        assert run(arguments) == 2
        assert "sweep: no such section; give a configuration with a sweep" in capsys.readouterr().err
    assert run(["sweep", "--max-concurrent", "2"]) == 2
    assert "has no sweep section; give --config with a file that has one" in capsys.readouterr().err


def test_passwords_of_databases_are_not_written(tmp_path: Path) -> None:
    config = config_of("sweep.storage=postgresql://me:secret@host/db", "tracking.uri=http://me:secret@host")
    assert "secret" not in to_yaml(as_written(config))
    assert "postgresql://host/db" in to_yaml(as_written(config))
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_USERNAME"):
        check_sweep(config, load_dataset("digits"))


@pytest.mark.parametrize(
    ("space", "line"),
    [
        (
            "search.cutout: {int: [0, 9]}",
            "sweep.space allows search.cutout=9: search.cutout: 9 is larger than the",
        ),
        (
            "space.matrix: {choice: [uniform, gaussian]}, "
            "search.max_pictures: {int: [9, 5000], when: {space.matrix: gaussian}}",
            "search.max_pictures: 5000 is above the 1438 available",
        ),
        ("search.cutout: {choice: [2, 20]}", "sweep.space allows search.cutout=20: search.cutout: 20 is"),
        (
            "search.max_pictures: {choice: [null, 5000]}",
            "search.max_pictures: 5000 is above the 1438 available",
        ),
        (
            "search.alpha_fraction: {uniform: [0.0001, 0.5]}",
            "search.alpha_fraction: 0.0001 leaves 1438 of 1438 pictures",
        ),
    ],
)
def test_the_space_is_checked_against_the_pictures(space: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_sweep(load(None, [f"sweep={{space: {{{space}}}}}"]), load_dataset("digits"))
    assert line in str(caught.value)


def test_settings_that_the_space_replaces_are_not_checked() -> None:
    space = "retrain.cutout: {fixed: 0}, search.cutout: {int: [0, 4]}"
    overrides = [f"sweep={{space: {{{space}}}, objective: retrained}}", "data.holdout=0.1"]
    check_sweep(load(None, [*overrides, "retrain.cutout=16", "search.cutout=12"]), load_dataset("digits"))


def test_max_epochs_is_the_length_of_the_longest_possible_trial() -> None:
    assert max_epochs(config_of("search.epochs=7")) == 7
    space = "search.epochs: {choice: [3, 30]}, search.lr: {fixed: 0.1}"
    assert max_epochs(load(None, [f"sweep={{space: {{{space}}}}}"])) == 30
    space = (
        "method: {choice: [two_stage, one_stage]}, search.epochs: {int: [2, 4], when: {method: two_stage}}, "
        "search.max_search_epochs: {int: [5, 6], when: {method: one_stage}}, "
        "search.train_epochs: {fixed: 3, when: {method: one_stage}}"
    )
    assert max_epochs(load(None, ["data.holdout=0.1", f"sweep={{space: {{{space}}}}}"])) == 10
    low = [
        "data.holdout=0.1",
        "search.lr_min=0.05",
        f"sweep={{space: {{{space}, search.lr: {{fixed: 0.1}}}}}}",
    ]
    assert max_epochs(load(None, low)) == 10


class Unread:
    """A test split that fails when it is read."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the test split was read: {name}")

    def __len__(self) -> int:
        raise AssertionError("the test split was counted")


@pytest.mark.parametrize("method", ["two_stage", "one_stage"])
def test_no_trial_reads_the_test_split(tmp_path: Path, method: str) -> None:
    tiny = "batch_size: 256, init_channels: 2, layers: 3, cutout: 0"
    epochs = (
        "epochs: 1" if method == "two_stage" else "max_search_epochs: 1, train_epochs: 1, auxiliary_weight: 0"
    )
    base = config_of(
        f"method={method}",
        f"search={{{epochs}, {tiny}}}",
        f"retrain={{epochs: 1, auxiliary_weight: 0, {tiny}}}",
        *("space.nodes=1", "data.holdout=0.2", "runtime={threads: 1, device: cpu}"),
    )
    config = trial_config(base, {"search.lr": 0.05})
    dataset = dataclasses.replace(load_dataset("digits"), test=Unread())  # type: ignore[arg-type]
    for done in (
        search_worker(config, dataset, FolderStore(tmp_path / "s"), Silent()),
        retrain_worker(
            config, dataset, FolderStore(tmp_path / "r"), Silent(), random_genotype(0, CellSpace(n_nodes=1))
        ),
    ):
        assert 0 <= done.newest.metrics["valid/top1"] <= 1
        assert not any(name.startswith("test/") for name in done.newest.metrics)


# ---------- the report
def ended_sweep(folder: Path, *overrides: str, spread: float = 0.01, trials: int = 6) -> tuple[Config, Any]:
    """Return the configuration and the study of a sweep with made-up figures."""
    config = config_of(
        f"runtime.runs_dir={folder}", "sweep.scheduler=none", f"sweep.trials={trials}", *overrides
    )
    study = open_study(config, "made-up", fresh=True)
    searcher = StudySearcher(config, study, Listener())
    for n in range(trials):
        searcher.suggest("t")
        top1 = 0.9 + spread * (n % 4)
        figures = {
            "valid_top1": top1,
            "retrained_top1": 0.95 - 0.01 * (n % 4),
            "params": 1000 + n,
            "macs": 5000 - n,
            "epochs": 3,
            "seconds": 1.5,
            "digest": "ab" * 32,
            "reused": n > 3,
            "frozen_epochs": [n + 1, n + 2],
        }
        values = {"objective/top1": top1, "objective/params": 1000.0 + n}
        last = (
            {"failed": "IstanasError: the loss is NaN"} if n == 1 else {"finished": True, **figures, **values}
        )
        searcher.on_trial_complete("t", last)
        assert searcher.error is None
    return config, study


def test_the_table_has_every_trial_and_is_read_back(tmp_path: Path) -> None:
    config, study = ended_sweep(tmp_path)
    frame = sweep_frame(config, study)
    assert list(frame.columns) == ["trial", "state", "search.lr", *list(COLUMNS)[2:]]
    assert {name: str(frame[name].dtype) for name in COLUMNS} == COLUMNS
    assert list(frame["state"]) == ["COMPLETE", "FAIL", *["COMPLETE"] * 4]
    assert frame["reason"][1] == "IstanasError: the loss is NaN"
    assert frame["search.lr"].between(0.01, 0.1).all()
    assert kendall_tau(frame) == -1
    assert kendall_tau(frame.head(2)) is None
    write_table(tmp_path, frame)
    pd.testing.assert_frame_equal(read_table(tmp_path), frame, check_exact=True)
    kinds = (
        "{search.lr: {fixed: 0.1}, search.max_pictures: {choice: [null, 1200]}, seed: {int: [1, 9], when: "
    )
    kinds += (
        "{search.max_pictures: 1200}}, space.ops: {choice: [[skip_connect, sep_conv_3x3], [skip_connect]]}}"
    )
    (tmp_path / "kinds").mkdir()
    config, study = ended_sweep(tmp_path / "kinds", f"sweep={{space: {kinds}}}", trials=8)
    frame = sweep_frame(config, study)
    write_table(tmp_path, frame)
    pd.testing.assert_frame_equal(read_table(tmp_path), frame, check_exact=True)
    assert str(frame["seed"].dtype) == "Int64"
    assert set(map(str, frame["search.max_pictures"])) == {"null", "1200"}
    assert set(frame["space.ops"]) == {"[skip_connect, sep_conv_3x3]", "[skip_connect]"}
    config, study = ended_sweep(tmp_path)
    frame = sweep_frame(config, study)
    with pytest.raises(ConfigError, match=r"no trials\.csv in this run; name a sweep"):
        read_table(tmp_path / "nowhere")

    console = Console(width=170, file=io.StringIO(), record=True)
    console.print(trials_table(frame))
    text = console.export_text()
    assert "failed: IstanasError: the loss is NaN" in text
    assert text.count("(same)") == 2
    assert "0.9" not in describe_trial(0, own_trials(study)[0]).split(";")[0], "accuracies are in per cent"


def test_importances_of_few_trials_are_not_drawn(tmp_path: Path) -> None:
    config, study = ended_sweep(tmp_path, trials=8)  # one of which failed
    said: list[str] = []
    files = write_figures(tmp_path, config, own_study(study), sweep_frame(config, study), said.append)
    assert "plots/importances.png" not in files
    assert "plots/history.png" in files
    assert said == ["importances: not drawn (only 7 finished trials; fewer than 8 give noise)"]
    page = (tmp_path / "sweep.html").read_text()
    assert "prefers-color-scheme: dark" in page
    assert 'id="importances"' not in page


def test_figures_are_pictures_and_a_self_contained_page(tmp_path: Path) -> None:
    config, study = ended_sweep(tmp_path, "sweep.objectives=[top1, params]", trials=9)
    said: list[str] = []
    files = write_figures(tmp_path, config, own_study(study), sweep_frame(config, study), said.append)
    assert said == []
    assert files == (
        "plots/importances.png",
        "plots/parallel_coordinates.png",
        "plots/history.png",
        "plots/pareto_front.png",
        "plots/freezing.png",
        "sweep.html",
    )
    for name in files[:-1]:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "sweep.html").read_text()
    assert all(
        f'id="{name}"' in page for name in ("importances", "parallel_coordinates", "history", "pareto_front")
    )
    assert page.count("<script") >= 5
    assert '<script src="http' not in page
    assert " src=" not in page.replace(" src=src", "")[:2000]


@pytest.mark.parametrize("overrides", [[], ["sweep.objectives=[top1, params]"]])
def test_the_labels_of_parallel_coordinates_can_be_read(tmp_path: Path, overrides: list[str]) -> None:
    labels = ["top-1", "init_channels", "lr", "matrix", "weight_decay"]
    space = (
        "search.lr: {loguniform: [0.001, 0.3]}, search.weight_decay: {uniform: [0, 0.001]}, "
        "search.init_channels: {int: [4, 9]}, space.matrix: {choice: [uniform, gaussian]}"
    )
    sweep = f"sweep={{trials: 9, scheduler: none, space: {{{space}}}}}"
    config, study = ended_sweep(tmp_path, sweep, *overrides, trials=9)
    (plot,) = (
        p for p in draw_plots(config, own_study(study), pytest.fail) if p.name == "parallel_coordinates"
    )
    figure = figure_of(plot.html)
    assert figure["layout"]["xaxis"]["ticktext"] == labels
    assert figure["layout"]["xaxis"]["tickangle"] == 0
    texts = [(labels[int(each["x"])], each["text"]) for each in figure["layout"]["annotations"]]
    assert {text for label, text in texts if label == "matrix"} == {"uniform", "gaussian"}
    assert all(text.isdigit() for label, text in texts if label == "init_channels")
    assert all(len(text.replace("0.", "").lstrip("0")) <= 3 for label, text in texts if label == "lr")
    assert plot.width >= 100 * len(labels)
    width, height = Image.open(io.BytesIO(plot.png)).size
    assert width / len(labels) > 150
    assert height < 620, "horizontal labels need little room below the axes"


def figure_of(html: str) -> Any:
    """Return the data and the layout of a plotly figure in a page."""
    decoder, start = json.JSONDecoder(), html.rindex("Plotly.newPlot(")
    data, end = decoder.raw_decode(html, html.index("[", start))
    layout, _ = decoder.raw_decode(html, html.index("{", end))
    return {"data": data, "layout": layout}


def test_interactive_figures_have_a_transparent_background(tmp_path: Path) -> None:
    config, study = ended_sweep(tmp_path, "sweep.objectives=[top1, params]", trials=9)
    plots = draw_plots(config, own_study(study), pytest.fail)
    assert len(plots) == 4
    for plot in plots:
        layout = figure_of(plot.html)["layout"]
        assert layout["paper_bgcolor"] == layout["plot_bgcolor"] == "rgba(0,0,0,0)"
        assert "bgcolor" not in json.dumps(layout["template"])


def test_a_figure_that_cannot_be_drawn_is_reported(tmp_path: Path) -> None:
    config, study = ended_sweep(tmp_path, spread=0)
    said: list[str] = []
    files = write_figures(tmp_path, config, own_study(study), sweep_frame(config, study), said.append)
    assert any(line.startswith("importances: not drawn (") for line in said)
    assert "plots/history.png" in files


def test_a_front_has_the_trials_of_a_grid(tmp_path: Path) -> None:
    """Its figures are those of the literal means and differences, and equal cells are counted once."""
    space = "{seed: {choice: [0, 1, 2]}, search.cost_weight: {choice: [0.0, 2.0]}}"
    sweep = f"sweep={{trials: 6, searcher: grid, scheduler: none, space: {space}}}"
    config = load(None, [sweep, f"runtime.runs_dir={tmp_path}", "search.cost=params"])
    study = open_study(config, "s", fresh=False)
    searcher = StudySearcher(config, study, Listener())
    top1, params = [0.8, 0.7, 0.9, 0.7, 0.7, 0.7], [100, 80, 120, 80, 110, 80]
    for n in range(6):
        searcher.suggest("t")
        figures = {"params": params[n], "macs": 9, "digest": str(params[n]), "objective/top1": top1[n]}
        searcher.on_trial_complete("t", {"finished": True, "run_dir": str(tmp_path / "none"), **figures})
        assert searcher.error is None
    assert searcher.suggest("t") == "FINISHED"
    assert [trial.params for trial in own_trials(study)] == [
        {"seed": seed, "search.cost_weight": weight} for seed in (0, 1, 2) for weight in (0.0, 2.0)
    ]
    free, cheap = front_of(config, own_study(study))
    assert (free.cost, free.cost_weight, free.seeds, free.cells, free.mean_cost) == ("params", 0.0, 3, 3, 110)
    assert (free.saved, free.change, free.change_low, free.change_high) == (0, 0, 0, 0)
    assert (cheap.cost_weight, cheap.seeds, cheap.cells, cheap.mean_cost) == (2.0, 3, 1, 80)
    assert cheap.saved == pytest.approx(1 - 80 / 110)
    expected = difference_interval(top1[1::2], top1[::2])
    assert (cheap.change, cheap.change_low, cheap.change_high) == pytest.approx(
        (expected.estimate, expected.low, expected.high)
    )
    assert (free.low, free.high) == pytest.approx((0.8 - 0.1 * 4.302653 / 3**0.5, 1.0))
    said: list[str] = []
    files = write_figures(tmp_path, config, own_study(study), sweep_frame(config, study), said.append)
    assert not [line for line in said if "against" in line]
    assert {"plots/accuracy_against_params.png", "front.csv"} <= set(files)
    assert pd.read_csv(tmp_path / "front.csv")["saved"].tolist() == pytest.approx([0, 1 - 80 / 110], rel=1e-5)
    assert 'id="accuracy_against_params"' in (tmp_path / "sweep.html").read_text()


def test_a_front_has_a_line_for_each_choice_of_the_other_settings(tmp_path: Path) -> None:
    conditional = "search.arch_lr: {choice: [0.001, 0.01], when: {search.cost: macs}}"
    space = f"{{search.cost: {{choice: [macs, params]}}, {conditional}, search.cost_weight: {{choice: [0.0, 1.0]}}}}"
    config = load(
        None, [f"sweep={{trials: 6, searcher: grid, space: {space}}}", f"runtime.runs_dir={tmp_path}"]
    )
    study = open_study(config, "s", fresh=False)
    searcher = StudySearcher(config, study, Listener())
    for n in range(6):
        searcher.suggest("t")
        figures = {"params": 10 - n, "macs": 20 - n, "digest": str(n), "objective/top1": 0.5}
        searcher.on_trial_complete("t", {"finished": True, **figures})
    points = front_of(config, own_study(study))
    assert [(p.line, p.cost, p.cost_weight, p.mean_cost) for p in points] == [
        ("search.cost=macs, search.arch_lr=0.001", "macs", 0.0, 20),
        ("search.cost=macs, search.arch_lr=0.001", "macs", 1.0, 19),
        ("search.cost=macs, search.arch_lr=0.01", "macs", 0.0, 18),
        ("search.cost=macs, search.arch_lr=0.01", "macs", 1.0, 17),
        ("search.cost=params", "params", 0.0, 6),
        ("search.cost=params", "params", 1.0, 5),
    ]
    assert all(p.low == p.top1 == p.high for p in points), "one seed has no interval"
    axes, figure = draw_front(points, "macs")
    assert len(figure.data) == len(axes.lines) // 3 == 2, "a line and two caps for each"
    plt.close("all")


def test_the_front_of_predicted_latencies(tmp_path: Path) -> None:
    space = "{search.cost_weight: {choice: [0.0, 1.0]}}"
    table = ["search.cost=latency", f"search.latency_table={tmp_path}/table.json"]
    config = load(
        None, [f"sweep={{trials: 2, searcher: grid, space: {space}}}", f"runtime.runs_dir={tmp_path}", *table]
    )
    study = open_study(config, "s", fresh=False)
    searcher = StudySearcher(config, study, Listener())
    for latency in (3.5, 2.0):
        searcher.suggest("t")
        figures = {"params": 1, "macs": 1, "latency_ms": latency, "digest": "d", "objective/top1": 0.5}
        searcher.on_trial_complete("t", {"finished": True, **figures})
    assert [(p.cost, p.mean_cost) for p in front_of(config, own_study(study))] == [
        ("latency", 3.5),
        ("latency", 2.0),
    ]
