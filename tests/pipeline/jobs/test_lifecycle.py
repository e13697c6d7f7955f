"""The life cycle of jobs: the run directory after success, failure and `--fresh`, and with a second process."""

import csv
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from PIL import Image
from rich.console import Console

from istanas.errors import CheckpointError, ConfigError, IstanasError
from istanas.measure import count_macs, count_params
from istanas.search import NodeReport
from istanas.space import CellSpace, Genotype, Operation, random_genotype
from istanas.sparse import mosek_licence
from pipeline.base.files import atomic_write
from pipeline.cluster.ray_runtime import Runtime
from pipeline.config.load import load, run_hash
from pipeline.config.schema import Config
from pipeline.jobs.closing import close_below
from pipeline.jobs.context import JobContext
from pipeline.jobs.lifecycle import write_page
from pipeline.jobs.retrain import run_retrain
from pipeline.jobs.run import run_whole
from pipeline.jobs.search import run_search
from pipeline.jobs.search_tables import (
    TRAJECTORY_COLUMNS,
    KeptCodes,
    SearchTables,
    codes_rows,
    trajectory_rows,
)
from pipeline.runs import checkpoint
from pipeline.runs.checkpoint import serialize
from pipeline.runs.directory import RunDir
from pipeline.runs.layout import LOCK_FILE
from pipeline.runs.network_files import load_network
from pipeline.runs.record import new_key
from pipeline.tracking.store import open_client
from pipeline.tracking.tracker import MLflowTracker
from pipeline.training.epoch_record import Progress, load_latest, load_progress, read_records
from tests.pipeline.training.made_up import as_version_0_1, record_of, save_epoch
from tests.user_operations import USER_OPERATIONS, registered

TINY = [
    "space.nodes=2",
    "search={epochs: 2, batch_size: 64, init_channels: 2, layers: 3, max_pictures: 200, arch_lr: 0.1}",
    "retrain={epochs: 2, batch_size: 256, init_channels: 2, layers: 2, auxiliary_weight: 0, cutout: 0}",
    "runtime={threads: 1, device: cpu}",
    "tracking.enabled=false",
]
GENOTYPE = random_genotype(0, CellSpace(n_nodes=2))


class Job:
    """Runs jobs in one folder and keeps their terminal output."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen = ""

    def config(self, *overrides: str) -> Config:
        return load(None, [*TINY, f"runtime.runs_dir={self.folder}", *overrides])

    def __call__(
        self, kind: str, *overrides: str, fresh: bool = False, genotype: Genotype = GENOTYPE
    ) -> dict[str, Any]:
        out = io.StringIO()
        config = self.config(*overrides)
        try:
            with Runtime(config.runtime) as runtime:
                context = JobContext(config, "tiny", Console(file=out, width=200), runtime, fresh)
                jobs: Any = {"search": run_search, "run": run_whole}
                return run_retrain(context, genotype) if kind == "retrain" else jobs[kind](context)
        finally:
            self.seen = out.getvalue()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "runs")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with a finished search."""
    folder = tmp_path_factory.mktemp("searched") / "runs"
    Job(folder)("search")
    return folder


@pytest.fixture
def finished(searched: Path, job: Job) -> Path:
    """The run directory of the finished search, copied into the job's folder."""
    shutil.copytree(searched, job.folder)
    (path,) = job.folder.iterdir()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the result of a search with its retraining."""
    folder = tmp_path_factory.mktemp("whole") / "runs"
    return folder, Job(folder)("run", "data.holdout=0.1")


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return all files except the lock, with content and modification time."""
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith(".run.lock")
    }


def test_a_search_leaves_its_artifacts_and_figures(job: Job) -> None:
    result = job("search")
    config = job.config()
    path = Path(result["run_dir"])
    assert path == job.folder / f"tiny-search-{run_hash(config, 'search')}"
    run = RunDir(path)
    record = run.read()
    assert (record.status, record.kind, record.name, record.parent) == (
        "FINISHED",
        "search",
        "tiny-search",
        None,
    )
    assert set(record.artifacts) == {
        "config.yaml",
        "genotype.json",
        "trajectory.csv",
        "trajectory.html",
        "codes.csv",
        "environment.json",
        "report.html",
        *(f"cells/{cell}.{form}" for cell in ("normal", "reduce") for form in ("svg", "png")),
    }
    for name in record.artifacts:
        assert (path / name).stat().st_size > 0, name
    genotype = Genotype.from_json((path / "genotype.json").read_text())
    assert genotype.to_dict() == result["genotype"]
    assert genotype.digest() == result["digest"] == record.tags["istanas.genotype"]
    assert load(path / "config.yaml") == config
    lines = run.metrics()
    assert [line.step for line in lines] == [1, 2]
    assert result["valid_top1"] == lines[-1].metrics["valid/top1"]
    assert result["params"] == lines[-1].metrics["target/params"]
    assert result["mlflow_run_id"] is None
    assert "epoch 1: loss" in job.seen
    assert "epoch 2: loss" in job.seen


def test_on_a_terminal_a_bar_shows_loss_top1_and_time_left(job: Job) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160)
    with Runtime(job.config().runtime) as runtime:
        run_search(JobContext(job.config(), "tiny", console, runtime))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert re.search(r"search epoch \d/2 .* \d+/4 .*loss \d+\.\d+  top-1 [\d.]+ % .* left +[\d:-]+", shown), (
        shown
    )
    assert "epoch 2: loss" in shown


def test_the_trajectory_has_every_node_of_every_epoch_and_of_the_start(finished: Path) -> None:
    path = finished
    with (path / "trajectory.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["epoch"], row["cell"], row["node"]) for row in rows] == [
        (str(epoch), cell, str(node))
        for epoch in (0, 1, 2)
        for cell in ("normal", "reduce")
        for node in (0, 1)
    ]
    assert {row["changed"] for row in rows if row["epoch"] == "0"} == {"False"}
    picks = {epoch: [row["picks"] for row in rows if row["epoch"] == epoch] for epoch in "012"}
    for before, after in ("01", "12"):
        changed = [row["changed"] == "True" for row in rows if row["epoch"] == after]
        moved = [set(a.split()) != set(b.split()) for a, b in zip(picks[before], picks[after], strict=True)]
        assert changed == moved
    genotype = Genotype.from_json((path / "genotype.json").read_text())
    last = [{f"{op}<-{state}" for op, state in node} for node in (*genotype.normal, *genotype.reduce)]
    assert [set(text.split()) for text in picks["2"]] == last


def test_codes_have_every_candidate_of_every_epoch_and_keep_the_largest(job: Job, finished: Path) -> None:
    codes = pd.read_csv(finished / "codes.csv")
    assert list(codes.columns) == ["epoch", "cell", "node", "state", "op", "magnitude"]
    space = job.config().space.build()
    candidates = [(state, op) for node in (0, 1) for state in range(node + 2) for op in space.ops]
    assert [*zip(codes["state"], codes["op"], strict=True)] == 6 * candidates  # three recoveries, two cells
    assert (codes["magnitude"] >= 0).all()
    trajectory = pd.read_csv(finished / "trajectory.csv")
    for place, rows in codes.groupby(["epoch", "cell", "node"]):
        kept = set(rows.nlargest(2, "magnitude")[["op", "state"]].itertuples(index=False, name=None))
        (row,) = trajectory[(trajectory[["epoch", "cell", "node"]] == list(place)).all(axis=1)].to_dict(
            "records"
        )
        assert kept == {(op, int(state)) for op, state in (pick.split("<-") for pick in row["picks"].split())}


def test_a_search_resumes_from_an_old_checkpoint_without_codes(job: Job, finished: Path) -> None:
    """Epochs of the older version are left out of codes.csv, and are pink in the page."""
    path = finished
    whole = pd.read_csv(path / "codes.csv")
    found = load_latest(path / "checkpoints")
    assert found is not None
    records = read_records(path / "checkpoints", load_progress(path / "checkpoints"))
    history = [as_version_0_1(record) for record in records]
    for node in (*history[0]["start_nodes"], *history[0]["nodes"]):
        del node["magnitudes"]
    del found.state["progress"]
    checkpoint.write_state(path / "checkpoints", 2, serialize({**found.state, "history": history}))
    record = json.loads((path / "run.json").read_text())
    record["status"] = "RUNNING"  # as a kill before the end would have left it
    (path / "run.json").write_text(json.dumps(record))
    job("search")
    pd.testing.assert_frame_equal(
        pd.read_csv(path / "codes.csv"), whole[whole["epoch"] == 2].reset_index(drop=True)
    )
    assert "epochs that were not recorded are pink" in (path / "trajectory.html").read_text()


def test_a_retraining_leaves_the_network_that_was_measured(job: Job) -> None:
    result = job("retrain")
    path = Path(result["run_dir"])
    record = RunDir(path).read()
    assert {"network.json", "model.safetensors", "genotype.json", "config.yaml"} <= set(record.artifacts)
    assert all((path / name).stat().st_size > 0 for name in record.artifacts)
    assert not (path / "trajectory.csv").exists()
    assert record.tags["istanas.genotype"] == GENOTYPE.digest()
    assert result["digest"] == GENOTYPE.digest()
    assert result["test_top1"] == RunDir(path).metrics()[-1].metrics["test/top1"]

    from istanas.data import ArrayPictures, load_dataset, normalize

    digits = load_dataset("digits")
    assert isinstance(digits.test, ArrayPictures)
    net, _ = load_network(path)
    logits = net(normalize(digits.test.images, digits.mean, digits.std))
    top1 = (logits.argmax(1) == digits.test.labels).double().mean().item()
    assert top1 == pytest.approx(result["test_top1"], abs=1e-12)


def test_a_run_says_which_pictures_it_used(job: Job, whole: tuple[Path, dict[str, Any]]) -> None:
    from istanas.data import load_dataset, pictures_digest

    _, result = whole
    digits = load_dataset("digits")
    search, retrain = (
        {use.context: use for use in RunDir(result[key]).read().datasets}
        for key in ("run_dir", "retrain_run_dir")
    )
    assert {context: use.pictures for context, use in search.items()} == {"training": 100, "alphas": 100}
    numbers = {"training": 1294, "hold-out": 144, "test": 359}
    assert {context: use.pictures for context, use in retrain.items()} == numbers
    assert len({use.digest for use in (*search.values(), *retrain.values())}) == 5
    for use in (*search.values(), *retrain.values()):
        assert (use.name, use.classes, use.shape, len(use.digest)) == ("digits", 10, (1, 8, 8), 16)
    every = torch.arange(len(digits.test))
    assert pictures_digest(digits.test, every, digits.class_names).startswith(retrain["test"].digest)
    again = job("retrain", "data.holdout=0.1", "retrain.epochs=1", "seed=1")
    other = {use.context: use.digest for use in RunDir(again["run_dir"]).read().datasets}
    assert other["test"] == retrain["test"].digest, "the same for every seed"
    assert other["hold-out"] != retrain["hold-out"].digest


def test_a_run_is_found_by_its_seed_and_workers(job: Job) -> None:
    record = RunDir(job("search", "seed=3")["run_dir"]).read()
    assert {"istanas.seed": "3", "istanas.workers": "0"}.items() <= record.tags.items()


def test_a_whole_run_has_one_lineage(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, result = whole
    search, retrain = RunDir(result["run_dir"]), RunDir(result["retrain_run_dir"])
    assert retrain.read().parent == result["run_dir"]
    assert retrain.read().result["digest"] == search.read().result["digest"] == result["digest"]
    assert result["test_top1"] == retrain.read().result["test_top1"]
    assert result["seconds"] == pytest.approx(
        search.read().result["seconds"] + retrain.read().result["seconds"]
    )
    assert len(list(folder.iterdir())) == 2


def test_a_finished_job_is_not_run_again(job: Job) -> None:
    first = job("search")
    path = Path(first["run_dir"])
    before = snapshot(path)
    assert job("search") == first
    assert snapshot(path) == before
    assert "already finished" in job.seen
    assert "epoch" not in job.seen


@pytest.mark.usefixtures("finished")
def test_settings_of_runtime_and_tracking_belong_to_the_same_run(job: Job) -> None:
    first = job("search")
    again = job("search", "runtime.device=cpu", "runtime.precision=fp32", "tracking.experiment=other")
    assert again == first
    assert job("search", "seed=1")["run_dir"] != first["run_dir"]


def test_fresh_starts_over(job: Job, finished: Path) -> None:
    first, path = job("search"), finished
    key, started = RunDir(path).read().key, RunDir(path).read().started_ms
    (path / "checkpoints" / "strange").mkdir()
    (path / "left.txt").write_text("of another time")
    outside = path.parent.parent / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    (path / "link").symlink_to(outside)
    second = job("search", fresh=True)
    assert "epoch 1: loss" in job.seen
    record = RunDir(path).read()
    assert record.key != key
    assert record.started_ms >= started
    assert not (path / "left.txt").exists()
    assert not (path / "link").exists()
    assert (outside / "precious").read_text() == "kept"
    timed = ("seconds",)
    assert {k: v for k, v in second.items() if k not in timed} == {
        k: v for k, v in first.items() if k not in timed
    }
    assert len(RunDir(path).metrics()) == 2


def test_a_failed_job_says_so_in_its_record_and_resumes_later(job: Job, finished: Path) -> None:
    path = finished
    first = (path / "genotype.json").read_bytes()
    record = json.loads((path / "run.json").read_text())
    record["status"] = "RUNNING"  # as a kill before the end would have left it
    (path / "run.json").write_text(json.dumps(record))
    # A file is in the place of the folder of checkpoints, and is then removed.
    shutil.rmtree(path / "checkpoints")
    (path / "checkpoints").write_text("")
    with pytest.raises(OSError, match="checkpoints"):
        job("search")
    failed = RunDir(path).read()
    assert failed.status == "FAILED"
    assert failed.ended_ms is not None
    assert failed.ended_ms >= failed.started_ms

    (path / "checkpoints").unlink()
    result = job("search")
    record = RunDir(path).read()
    assert Path(result["run_dir"]) == path
    assert (record.status, record.key, record.started_ms) == ("FINISHED", failed.key, failed.started_ms)
    assert (path / "genotype.json").read_bytes() == first


@pytest.mark.parametrize(
    ("kind", "override"),
    [
        ("search", "data={name: folder, root: nowhere}"),
        ("search", "search.max_pictures=5000"),
        ("search", "space.solver=mosek"),
        ("retrain", "data={name: folder, root: nowhere}"),
        ("retrain", "retrain.cutout=9"),
        # Refused before Ray is started.
        ("search", "runtime.workers=33"),
        ("retrain", "runtime.workers='1:129'"),
    ],
)
def test_invalid_settings_are_refused_before_any_work_and_leave_nothing(
    job: Job, kind: str, override: str
) -> None:
    if "mosek" in override and mosek_licence() is not None:
        pytest.skip("a MOSEK licence is here, so MOSEK works")
    with pytest.raises(IstanasError) as refusal:
        job(kind, override)
    assert "\n" not in str(refusal.value)
    assert not job.folder.exists() or list(job.folder.iterdir()) == []


@pytest.mark.parametrize("kind", ["search", "retrain"])
def test_an_operation_that_changes_the_size_is_refused_before_work(job: Job, kind: str) -> None:
    with registered(Operation("smaller", lambda channels, stride, affine: torch.nn.AvgPool2d(3, stride))):
        picks = ((("smaller", 0),),)
        genotype = Genotype(normal=picks, reduce=picks)
        message = r"^operation smaller: returns \(2, 2, 7, 6\) for \(2, 2, 9, 8\) and stride 1; keep"
        with pytest.raises(ConfigError, match=message) as refusal:
            job(kind, "space.ops=[skip_connect, smaller]", genotype=genotype)
    assert "\n" not in str(refusal.value)
    assert not job.folder.exists() or list(job.folder.iterdir()) == []


def test_operations_of_a_plugin_are_searched_and_retrained(job: Job) -> None:
    names = [operation.name for operation in USER_OPERATIONS]
    with registered(*USER_OPERATIONS):
        result = job("run", f"space.ops=[{', '.join(names)}]", "runtime.activation_checkpointing=true")
        genotype = Genotype.from_json((Path(result["run_dir"]) / "genotype.json").read_text())
        assert set(genotype.operations()) <= set(names)
        net, _ = load_network(result["retrain_run_dir"])
        assert count_params(net) == result["params"]
        assert count_macs(net, (1, 8, 8)) == result["macs"]
    assert 0 < result["test_top1"] <= 1


def test_a_refused_fresh_start_deletes_nothing(job: Job, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    for split in ("train", "test"):
        for label, name in enumerate(("dark", "light")):
            for number in range(4):
                file = pictures / split / name / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 200 * label + number).save(file)
    overrides = ("data.name=folder", f"data.root={pictures}", f"data.cache_dir={tmp_path / 'cache'}")
    path = Path(job("retrain", *overrides)["run_dir"])
    before = snapshot(path)
    pictures.rename(tmp_path / "moved")
    with pytest.raises(IstanasError):
        job("retrain", *overrides, fresh=True)
    assert snapshot(path) == before


def test_a_damaged_record_is_replaced_with_and_without_a_fresh_start(job: Job, finished: Path) -> None:
    path = finished
    for fresh in (False, True):
        (path / "run.json").write_text("{")
        job("search", fresh=fresh)
        assert RunDir(path).read().status == "FINISHED"
        assert ("replaced, the damaged file is run.json.damaged" in job.seen) == (not fresh)
        assert ("epoch 1: loss" in job.seen) == fresh


def test_a_fresh_start_that_was_killed_is_still_a_fresh_start(job: Job, finished: Path) -> None:
    """A mark is written before the record is deleted: with the mark, checkpoints are leftovers and not resumed."""
    (finished / ".clearing").touch()
    (finished / "run.json").unlink()
    job("search")
    assert "epoch 1: loss" in job.seen
    assert "resumed" not in job.seen


def test_a_run_does_not_resume_with_changed_pictures(job: Job, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"

    def write(brightness: int) -> None:
        for split in ("train", "test"):
            for label, name in enumerate(("dark", "light")):
                for number in range(8):
                    file = pictures / split / name / f"{number}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("L", (8, 8), brightness * label + number).save(file)

    overrides = ("data.name=folder", f"data.root={pictures}", f"data.cache_dir={tmp_path / 'cache'}")
    write(200)
    path = Path(job("retrain", *overrides)["run_dir"])
    record = json.loads((path / "run.json").read_text())
    record["status"] = "RUNNING"  # as a kill before the end would have left it
    (path / "run.json").write_text(json.dumps(record))
    write(100)
    with pytest.raises(CheckpointError, match="data set folder has changed since this run began") as refusal:
        job("retrain", *overrides)
    assert "--fresh" in str(refusal.value)
    assert json.loads((path / "run.json").read_text())["datasets"] == record["datasets"], (
        "it was of the others"
    )


def test_a_second_process_is_refused(job: Job) -> None:
    path = job.folder / f"tiny-search-{run_hash(job.config(), 'search')}"
    path.mkdir(parents=True)
    with (
        FileLock(path / LOCK_FILE),
        pytest.raises(ConfigError, match=r"in use by .*; wait until it ends or stop it"),
    ):
        job("search", fresh=True)
    assert not RunDir(path).exists()


def test_metrics_follow_the_checkpoint_when_a_run_resumes(job: Job, finished: Path) -> None:
    """Lines after the last checkpoint are measured again, lost lines are restored."""
    result, run = job("search"), RunDir(finished)
    whole = run.metrics()
    for lines in (whole[:1], [*whole, whole[-1]._replace(step=3)]):
        record = json.loads((run.path / "run.json").read_text())
        record["status"] = "RUNNING"  # as a kill before the end would have left it
        (run.path / "run.json").write_text(json.dumps(record))
        run.replace_metrics(lines)
        with (run.path / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 9, "timesta')
        again = job("search")
        assert run.metrics() == whole
        assert again == result
        assert "resumed after epoch 2" in job.seen


def test_resuming_with_another_number_of_workers_says_what_is_lost(job: Job, finished: Path) -> None:
    path, folder = finished, finished / "checkpoints"
    for workers, says in (
        (1, None),
        (2, "1 worker instead of 2: the global batch and the schedule stay the same, but"),
    ):
        found = load_latest(folder)
        assert found is not None
        first, last = read_records(folder, load_progress(folder))
        before, _ = Progress().after(first)
        save_epoch(folder, before, dataclasses.replace(last, workers=workers), **found.state)
        record = json.loads((path / "run.json").read_text())
        record["status"] = "RUNNING"  # as a kill before the end would have left it
        (path / "run.json").write_text(json.dumps(record))
        job("search")
        assert "resumed after epoch 2" in job.seen
        assert ("no longer identical" in job.seen) == (says is not None)
        assert says is None or says in job.seen
    place = r"^in this process, cpu, 1 thread, \d+ cores? on this machine$"
    assert re.search(place, job.seen, re.MULTILINE)


def test_rows_of_a_trajectory_start_before_any_training() -> None:
    first, second = record_of(1), record_of(2)
    rows = [*trajectory_rows(first), *trajectory_rows(second)]
    assert [(row[0], row[6]) for row in rows] == [*[(0, False)] * 2, *[(1, True)] * 2, *[(2, True)] * 2]
    node = dataclasses.replace(
        first.found().nodes[0],
        picks=["skip_connect<-0", "sep_conv_3x3<-1"],
        edge_weights=[0.123456789, -1.0],
        margin=0.25,
    )

    def rows_of(**changes: Any) -> list[dict[str, Any]]:
        record = dataclasses.replace(second, search=dataclasses.replace(second.found(), **changes))
        return [dict(zip(TRAJECTORY_COLUMNS, row, strict=True)) for row in trajectory_rows(record)]

    (row,) = rows_of(nodes=(node,))
    assert row["picks"] == "skip_connect<-0 sep_conv_3x3<-1"
    assert row["edge_weights"] == "0.123457 -1"
    assert (row["margin"], rows_of()[0]["margin"]) == (0.25, None)
    assert rows_of(searching=False) == []  # the architecture of a one-stage search is fixed
    assert not list(trajectory_rows(dataclasses.replace(second, search=None)))


def test_tables_of_a_search_are_what_pandas_writes(tmp_path: Path) -> None:
    """Version 0.1 wrote the trajectory with pandas; the text of the figures must be the same."""
    space = CellSpace(n_nodes=2)
    tables, records = SearchTables(tmp_path, space), [record_of(epoch, space) for epoch in range(1, 31)]
    draw = np.random.default_rng(0)
    for number, record in enumerate(records):
        figures = {
            name: float(draw.normal() * 10.0 ** draw.integers(-20, 20)) for name in ("gap", "truncation")
        }
        margin = None if number % 3 == 0 else float(draw.normal())
        nodes = tuple(dataclasses.replace(n, margin=margin, **figures) for n in record.found().nodes)
        records[number] = dataclasses.replace(record, search=dataclasses.replace(record.found(), nodes=nodes))
        assert tables.append(records[number])
    rows = [row for record in records for row in trajectory_rows(record)]
    assert (tmp_path / "trajectory.csv").read_text() == pd.DataFrame(rows, columns=TRAJECTORY_COLUMNS).to_csv(
        index=False
    )
    written = {name: (tmp_path / name).read_bytes() for name in ("trajectory.csv", "codes.csv")}
    assert SearchTables(tmp_path, space).replace(records, finished=True) == []
    assert SearchTables(tmp_path / "again", space).replace(records[:1]) == []
    SearchTables(tmp_path / "again", space).replace(records)
    assert {name: (tmp_path / "again" / name).read_bytes() for name in written} == written


def test_a_table_that_was_truncated_meanwhile_is_noticed(tmp_path: Path) -> None:
    tables = SearchTables(tmp_path, CellSpace(n_nodes=1))
    assert tables.append(record_of(1))
    (tmp_path / "codes.csv").unlink()
    assert not tables.append(record_of(2))


def test_a_node_that_froze_keeps_the_code_that_it_froze_with() -> None:
    space = CellSpace(n_nodes=1, ops=("skip_connect", "sep_conv_3x3"))
    record = record_of(1, space)
    node = record.found().nodes[0]

    def rows_of(epoch: int, kept: KeptCodes, *nodes: NodeReport, **changes: Any) -> list[Any]:
        found = dataclasses.replace(record.found(), nodes=nodes, **{"start_nodes": (), **changes})
        return list(codes_rows(dataclasses.replace(record, epoch=epoch, search=found), space, kept))

    kept: KeptCodes = {}
    start = dataclasses.replace(node, magnitudes=[0.0, 1.0, 0.0, 0.5])
    moved = dataclasses.replace(node, magnitudes=[0.25, 0.0, 1e-7, 0.0])
    resting = dataclasses.replace(node, recovered=False, magnitudes=[])
    rows = rows_of(1, kept, moved, start_nodes=(start,))
    assert rows[:4] == [
        (0, "normal", 0, 0, "skip_connect", "0"),
        (0, "normal", 0, 0, "sep_conv_3x3", "1"),
        (0, "normal", 0, 1, "skip_connect", "0"),
        (0, "normal", 0, 1, "sep_conv_3x3", "0.5"),
    ]
    assert [row[-1] for row in rows[4:]] == ["0.25", "0", "1e-07", "0"]
    assert rows_of(2, kept, resting) == [(2, *row[1:]) for row in rows[4:]]
    assert rows_of(3, kept, resting, searching=False) == []
    unknown = dataclasses.replace(node, magnitudes=[])  # an early version did not record them
    assert rows_of(1, older := {}, unknown) == rows_of(2, older, resting) == []


def test_a_page_that_can_not_be_written_is_a_warning(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "there").mkdir()
    page = write_page("report.html", lambda: atomic_write(tmp_path / "there", "<html>"), said.append)
    assert page == ()
    (line,) = said
    assert line.startswith("report.html: not written (IsADirectoryError")
    assert write_page("report.html", lambda: atomic_write(tmp_path / "report.html", "x"), said.append) == (
        "report.html",
    )


def test_a_fresh_start_closes_the_killed_run_in_mlflow_before_deleting_it(job: Job, tmp_path: Path) -> None:
    tracked = ("tracking.enabled=true", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
    run = RunDir(Path(job("search", *tracked)["run_dir"]))
    below = RunDir(run.path / "trial-0000")  # as those of a sweep
    below.path.mkdir()
    for each in (run, below):  # as a SIGKILL leaves it
        each.write(dataclasses.replace(run.read(), status="RUNNING", ended_ms=None, key=new_key()))
        assert MLflowTracker(each, tracking_uri=tracked[1].partition("=")[2], experiment="istanas").deliver()

    def statuses() -> list[str]:
        client = open_client(f"sqlite:///{tmp_path}/mlflow.db")
        return sorted(found.info.status for found in client.search_runs(["1"]))

    assert statuses() == ["RUNNING", "RUNNING"]
    job("search", *tracked, fresh=True)
    assert statuses() == ["FINISHED", "KILLED", "KILLED"]
    assert close_below(run.path, job.config(*tracked)), "nothing is left to be closed"
