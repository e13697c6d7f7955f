"""References to runs and genotypes on the command line."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from istanas.errors import ConfigError, GenotypeError
from istanas.space import PUBLISHED, CellSpace, random_genotype
from istanas.space.nas_bench_201 import genotype_at
from pipeline.config.load import load
from pipeline.runs.directory import RunDir
from pipeline.runs.record import RunRecord, new_key
from pipeline.tracking.references import genotype_to_train, resolve_genotype, resolve_run
from pipeline.tracking.tracker import MLflowTracker

RECORD = RunRecord(
    name="digits-search",
    kind="search",
    method="two_stage",
    dataset="digits",
    key="",
    params={},
    tags={},
    description="",
    parent=None,
    status="FINISHED",
    started_ms=1000,
    ended_ms=2000,
    artifacts=("genotype.json",),
    result={},
)
FOUND = random_genotype(5, CellSpace())
NO_STORE = "sqlite:////nowhere/mlflow.db"


def make_run(path: Path, *, genotype: bool = True, **changes: object) -> RunDir:
    run = RunDir(path)
    run.write(dataclasses.replace(RECORD, **{"key": new_key(), **changes}))  # type: ignore[arg-type]
    if genotype:
        (path / "genotype.json").write_text(FOUND.to_json())
    return run


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    make_run(folder / "digits-1111")
    make_run(folder / "cifar-2222", name="cifar-search")
    make_run(
        folder / "cifar-3333", name="cifar-search", started_ms=1_700_000_000_000, result={"test_top1": 0.9221}
    )
    return folder


def run_named(ref: str, runs_dir: Path) -> Path:
    return resolve_run(ref, runs_dir=runs_dir, tracking_uri=NO_STORE).path


def test_a_run_by_directory_or_name(runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = runs_dir / "digits-1111"
    for ref in (str(digits), "digits-1111", "digits-search"):
        assert run_named(ref, runs_dir) == digits
    monkeypatch.chdir(tmp_path)
    assert run_named("runs/digits-1111", Path("elsewhere")) == Path("runs/digits-1111")


def test_a_run_one_folder_down(runs_dir: Path) -> None:
    inner = make_run(runs_dir / "both-4444" / "search", name="both")
    assert run_named("both", runs_dir) == inner.path
    assert run_named("both-4444/search", runs_dir) == inner.path


def test_an_ambiguous_name_lists_the_candidates(runs_dir: Path) -> None:
    with pytest.raises(ConfigError, match="means 2 runs") as caught:
        run_named("cifar-search", runs_dir)
    assert str(caught.value) == (
        "run 'cifar-search': means 2 runs; give one of these directories: "
        f"{runs_dir}/cifar-2222 (1970-01-01 00:00 UTC), "
        f"{runs_dir}/cifar-3333 (2023-11-14 22:13 UTC, test top-1 92.21 %)"
    )
    assert run_named("cifar-3333", runs_dir) == runs_dir / "cifar-3333"


@pytest.mark.parametrize("ref", ["digit-serch", "no such thing", "", "../..", "[", "*"])
def test_an_unknown_name_tells_the_nearest(ref: str, runs_dir: Path) -> None:
    with pytest.raises(ConfigError, match="unknown") as caught:
        run_named(ref, runs_dir)
    assert "digits-search" in str(caught.value) or "cifar" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_runs_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are no runs in"):
        run_named("x", tmp_path / "runs")


def test_a_broken_run_does_not_hide_others(runs_dir: Path) -> None:
    (runs_dir / "broken").mkdir()
    (runs_dir / "broken" / "run.json").write_text("{")
    assert run_named("digits-search", runs_dir) == runs_dir / "digits-1111"


def test_an_mlflow_id_without_a_store_creates_none(runs_dir: Path, tmp_path: Path) -> None:
    store = tmp_path / "mlflow.db"
    uri = f"sqlite:///{store}"
    with pytest.raises(ConfigError, match="does not exist"):
        resolve_run("0" * 32, runs_dir=runs_dir, tracking_uri=uri)
    with pytest.raises(ConfigError, match="does not exist"):
        resolve_genotype("0" * 32, space=CellSpace(), runs_dir=runs_dir, tracking_uri=uri)
    assert not store.exists()


def test_mlflow_ids(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    runs_dir = tmp_path / "runs"
    here = make_run(runs_dir / "here")
    elsewhere = make_run(tmp_path / "other" / "elsewhere")
    ids = {}
    for run in (here, elsewhere):
        tracker = MLflowTracker(run, tracking_uri=uri, experiment="x")
        assert tracker.deliver()
        ids[run] = str(tracker.run_id)

    def named(ref: str, store: str = uri) -> Path:
        return resolve_run(ref, runs_dir=runs_dir, tracking_uri=store).path

    assert named(ids[here], NO_STORE) == here.path  # its mlflow.json says so, no store is needed
    assert named(ids[elsewhere]) == elsewhere.path
    with pytest.raises(ConfigError, match="no such run"):
        named("0" * 32)

    def genotype(ref: str) -> tuple[object, str | None]:
        return resolve_genotype(ref, space=CellSpace(), runs_dir=runs_dir, tracking_uri=uri)

    assert genotype(ids[elsewhere]) == (FOUND, str(elsewhere.path))
    shutil.rmtree(elsewhere.path)  # as on another machine: the store has the artifact
    with pytest.raises(ConfigError, match="is not here"):
        named(ids[elsewhere])
    assert genotype(ids[elsewhere]) == (FOUND, None)
    with pytest.raises(ConfigError, match=r"no genotype\.json in"):
        genotype("0" * 32)


def test_genotypes(runs_dir: Path, tmp_path: Path) -> None:
    space = CellSpace(n_nodes=3, sparsity=1)

    def genotype(ref: str) -> tuple[object, str | None]:
        return resolve_genotype(ref, space=space, runs_dir=runs_dir, tracking_uri=NO_STORE)

    for name, published in PUBLISHED.items():
        assert genotype(name) == (published, None)
    assert genotype("random:7") == (random_genotype(7, space), None)
    of_benchmark = genotype_at(1462)
    assert genotype("nas_bench_201:1462") == genotype(str(of_benchmark)) == (of_benchmark, None)
    with pytest.raises(
        GenotypeError, match=r"^--genotype: '99999' is not an index of nas_bench_201; choose 0"
    ):
        genotype("nas_bench_201:99999")
    assert genotype("digits-search") == (FOUND, str(runs_dir / "digits-1111"))
    file = tmp_path / "mine.json"
    file.write_text(FOUND.to_json())
    assert genotype(str(file)) == (FOUND, None)


def test_a_retraining_passes_its_search_on(runs_dir: Path) -> None:
    parent = str(runs_dir / "digits-1111")
    make_run(runs_dir / "again", name="again", kind="retrain", parent=parent)
    found = resolve_genotype("again", space=CellSpace(), runs_dir=runs_dir, tracking_uri=NO_STORE)
    assert found == (FOUND, parent)


def test_the_best_of_a_sweep_belongs_to_the_trial_that_found_it(runs_dir: Path, tmp_path: Path) -> None:
    sweep = make_run(runs_dir / "sweep", name="sweep", kind="sweep")
    trial = make_run(sweep.path / "trial-0001", name="trial-0001", parent=str(sweep.path))
    best = sweep.path / "best"
    best.mkdir()
    shutil.copy(sweep.path / "genotype.json", best)

    def parent(ref: str) -> str | None:
        return resolve_genotype(ref, space=CellSpace(), runs_dir=runs_dir, tracking_uri=NO_STORE)[1]

    references = ("sweep", str(sweep.path), str(best / "genotype.json"), str(sweep.path / "genotype.json"))
    assert {parent(ref) for ref in references} == {str(sweep.path)}  # it does not know its best trial yet
    sweep.write(dataclasses.replace(sweep.read(), result={"best_run_dir": "/elsewhere/sweep/trial-0001"}))
    assert {parent(ref) for ref in references} == {str(trial.path)}
    (best / "genotype.json").write_text(random_genotype(0, CellSpace()).to_json())  # edited by hand
    assert parent(str(best / "genotype.json")) is None


@pytest.mark.parametrize("ref", ["random:", "random:-1", "random:x", "random:1.5", "random:" + "9" * 40])
def test_a_random_genotype_needs_a_seed(ref: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not random:SEED"):
        resolve_genotype(ref, space=CellSpace(), runs_dir=tmp_path, tracking_uri=NO_STORE)


def test_invalid_genotypes_are_refused(runs_dir: Path, tmp_path: Path) -> None:
    def genotype(ref: str) -> object:
        return resolve_genotype(ref, space=CellSpace(), runs_dir=runs_dir, tracking_uri=NO_STORE)

    bad = tmp_path / "bad.json"
    for content in (b'{"version": 9}', b"{", b"\xff\xfe"):
        bad.write_bytes(content)
        with pytest.raises(GenotypeError, match=r"bad\.json: ") as caught:
            genotype(str(bad))
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="ISTA_twostage"):
        genotype("ISTA_twostge")
    make_run(runs_dir / "young", genotype=False, status="RUNNING")
    with pytest.raises(ConfigError, match=r"young: has no genotype\.json \(it is RUNNING\)"):
        genotype("young")


def test_a_one_stage_cell_is_retrained_with_its_batch_norms(runs_dir: Path, tmp_path: Path) -> None:
    """Published, of a run, of a file in a run or a copy of the published cell, of a retraining, of a sweep's best."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    search = make_run(runs_dir / "one", name="one", method="one_stage")
    make_run(runs_dir / "again", name="again", kind="retrain", parent=str(search.path))
    sweep = make_run(runs_dir / "sweep", name="sweep", kind="sweep", method="one_stage")
    trial = make_run(sweep.path / "trial-1", name="trial-1", method="one_stage", parent=str(sweep.path))
    sweep.write(dataclasses.replace(sweep.read(), result={"best_run_dir": str(trial.path)}))
    copied = tmp_path / "copied.json"
    copied.write_text(PUBLISHED["ISTA_onestage"].to_json())
    tracker = MLflowTracker(search, tracking_uri=uri, experiment="x")
    assert tracker.deliver()

    where = [f"runtime.runs_dir={runs_dir}", f"tracking.uri={uri}"]
    without, with_norms = load(None, where), load(None, [*where, "retrain.op_batchnorm=true"])
    one_stage = ["ISTA_onestage", "one", "again", "sweep", str(search.path / "genotype.json"), str(copied)]
    one_stage.append(str(tracker.run_id))
    for ref in one_stage:
        with pytest.raises(ConfigError) as caught:
            genotype_to_train(ref, without)
        assert str(caught.value).startswith(
            f"retrain.op_batchnorm: false, but genotype {ref} comes from a one-stage search"
        )
        assert str(caught.value).endswith("set retrain.op_batchnorm=true")
        assert "\n" not in str(caught.value)
        found = genotype_to_train(ref, with_norms)[0]
        assert found == (PUBLISHED["ISTA_onestage"] if ref in ("ISTA_onestage", str(copied)) else FOUND)
    for ref in ("ISTA_twostage", "ISTA_ImageNet", "random:3", "digits-search", str(runs_dir / "digits-1111")):
        assert genotype_to_train(ref, without)[0] == genotype_to_train(ref, with_norms)[0]

    lone = make_run(runs_dir / "lone", name="lone", kind="retrain", params={"retrain.op_batchnorm": True})
    lone_tracker = MLflowTracker(lone, tracking_uri=uri, experiment="x")
    assert lone_tracker.deliver()
    orphan = make_run(runs_dir / "orphan", name="orphan", kind="sweep", method="one_stage")
    orphan.write(dataclasses.replace(orphan.read(), result={"best_run_dir": str(tmp_path / "gone")}))
    plain = make_run(runs_dir / "plain", name="plain", kind="retrain", params={"retrain.op_batchnorm": False})
    assert genotype_to_train(plain.path.name, without)[0] == FOUND
    for path in (search.path, lone.path):  # as on another machine: the store tells
        shutil.rmtree(path)
    for ref in (str(tracker.run_id), str(lone_tracker.run_id), "again", "orphan"):
        if ref == "again":  # its search has gone, and its own network had no batch norms
            assert genotype_to_train(ref, without)[0] == FOUND
            continue
        with pytest.raises(ConfigError, match="comes from a one-stage search"):
            genotype_to_train(ref, without)


@pytest.mark.parametrize(
    ("ref", "says"),
    [
        ("nofile.json", "genotype 'nofile.json': no such file"),
        ("a/b/none.json", "genotype 'a/b/none.json': no such file"),
        ("ISTA_twostag", "did you mean ISTA_twostage?"),
        ("ista_imagenet", "did you mean ISTA_ImageNet?"),
        ("ISTA_onestgae", "did you mean ISTA_onestage?"),
    ],
)
def test_an_unknown_genotype_is_reported(ref: str, says: str, runs_dir: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_genotype(ref, space=CellSpace(), runs_dir=runs_dir, tracking_uri=NO_STORE)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_run_is_reported(runs_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a folder without run\.json, unknown in"):
        run_named(str(tmp_path), runs_dir)


DARTS = """Genotype(normal=[('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 0), ('sep_conv_3x3', 1)],
    normal_concat=range(2, 4),
    reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 0)], reduce_concat=[2, 3])
"""


@pytest.mark.parametrize(
    "before",
    ["import os\nos.mkdir('evaluated')\n", "from collections import namedtuple\n", "print = "],
    ids=["import and call", "import", "an assignment"],
)
def test_python_code_in_a_file_is_not_executed(
    before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "darts.py"
    file.write_text(f"{before}{DARTS}\n{DARTS}")
    with pytest.raises(GenotypeError, match=r"one `Genotype\(\.\.\.\)`") as caught:
        resolve_genotype(str(file), space=CellSpace(), runs_dir=tmp_path, tracking_uri=NO_STORE)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("before", ["", "DARTS_V2 = ", "\n  genotype = ", "# found by DARTS\n\nDARTS = "])
@pytest.mark.parametrize("after", ["", "  # 97.24 %\n"])
def test_a_file_in_the_text_form_of_darts_is_a_genotype(before: str, after: str, tmp_path: Path) -> None:
    file = tmp_path / "darts.txt"
    file.write_text(before + DARTS + after)
    found, run = resolve_genotype(str(file), space=CellSpace(), runs_dir=tmp_path, tracking_uri=NO_STORE)
    assert run is None
    assert found.normal == (
        (("sep_conv_3x3", 1), ("sep_conv_3x3", 0)),
        (("skip_connect", 0), ("sep_conv_3x3", 1)),
    )
    assert found.normal_concat == found.reduce_concat == (2, 3)
