"""The space of NAS-Bench-201 through the commands: both searches, resumption, retraining, export, bad input."""

import json
from pathlib import Path
from typing import Any

import pytest

from istanas.space import Genotype
from istanas.space.nas_bench_201 import index_of
from pipeline.cli.commands import run
from pipeline.config.load import load
from pipeline.runs.directory import RunDir
from pipeline.runs.network_files import load_network

SPACE = "{name: nas_bench_201, n_measurements: 3}"
COMMON = """
data: {{crop_padding: 1}}
space: {space}
retrain: {{epochs: 2, batch_size: 256, init_channels: 2, layers: 5, auxiliary_weight: 0.4, drop_path: 0.2, cutout: 2}}
runtime: {{threads: 1, device: cpu, runs_dir: runs, activation_checkpointing: {checkpointing}}}
tracking: {{enabled: false}}
"""
TWO_STAGE = (
    "search: {epochs: 3, batch_size: 64, init_channels: 2, layers: 5, max_pictures: 300, arch_lr: 0.05}"
)
ONE_STAGE = """
method: one_stage
search: {max_search_epochs: 2, train_epochs: 2, batch_size: 128, init_channels: 2, layers: 5, max_pictures: 300,
  auxiliary_weight: 0.4, drop_path: 0.2, cutout: 2, arch_lr: 0.05, test_every: 2}
"""
ALL_NONE = "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(file: Path, search: str = TWO_STAGE, *, space: str = SPACE, checkpointing: bool = False) -> str:
    file.write_text(search + COMMON.format(space=space, checkpointing=str(checkpointing).lower()))
    return str(file)


def result(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capfd.readouterr()
    code = run([*arguments, "--json"])
    out, err = capfd.readouterr()
    assert code == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def error(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    capfd.readouterr()
    assert run(arguments) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def decided(run_dir: str | Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in line.metrics.items() if name != "images_per_second"}
        for line in RunDir(Path(run_dir)).metrics()
    ]


@pytest.mark.slow
def test_two_stages_with_checkpointing_are_the_same(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = [
        result(capfd, "run", "--config", write(project / f"{on}.yaml", checkpointing=on))
        for on in (False, True)
    ]
    assert found[0]["digest"] == found[1]["digest"]
    genotype = Genotype.from_dict(found[0]["genotype"])
    assert 0 <= index_of(genotype) < 15_625
    searches = sorted((project / "runs").glob("*-search-*"))
    retrainings = sorted((project / "runs").glob("*-retrain-*"))
    assert [len(decided(folder)) for folder in (*searches, *retrainings)] == [3, 3, 2, 2]
    assert decided(searches[0]) == decided(searches[1])
    assert decided(retrainings[0]) == decided(retrainings[1])
    net, pictures = load_network(retrainings[0])
    assert net(pictures).shape == (2, 10)
    exported = result(capfd, "export", str(retrainings[0]))
    assert set(exported["exports"]) == {"safetensors", "program", "onnx"}
    assert all(each["difference"] <= 1e-4 for each in exported["exports"].values())


@pytest.mark.parametrize("search", [TWO_STAGE, ONE_STAGE], ids=["two_stage", "one_stage"])
def test_an_interrupted_search_ends_as_an_undisturbed_one(
    project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, search: str
) -> None:
    whole = result(capfd, "search", "--config", write(project / "whole.yaml", search))
    config = write(project / "cut.yaml", search)
    from pipeline.jobs.observer import RunObserver

    after_epoch = RunObserver.epoch_done

    def stop(self: RunObserver, *arguments: Any) -> Any:
        after_epoch(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunObserver, "epoch_done", stop)
        for _ in range(2):
            assert run(["search", "--config", config]) == 130
    cut = result(capfd, "search", "--config", config)
    assert cut["digest"] == whole["digest"]
    assert decided(cut["run_dir"]) == decided(whole["run_dir"])


def test_a_run_is_retrained_in_its_own_space_without_its_configuration(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    search = result(capfd, "search", "--config", write(project / "tiny.yaml"))
    settings = (
        "retrain={epochs: 1, batch_size: 256, init_channels: 2, layers: 5, auxiliary_weight: 0, cutout: 0}"
    )
    short = ("--set", settings, "--set", "runtime={threads: 1, device: cpu}")
    found = result(capfd, "retrain", "--genotype", search["run_dir"], *short)
    assert found["digest"] == search["digest"]
    assert load(Path(found["run_dir"]) / "config.yaml").space.n_measurements == 3
    assert not (project / "mlflow.db").exists()


@pytest.mark.slow
def test_a_one_stage_run_exports_the_absorbed_network(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = result(capfd, "run", "--config", write(project / "one.yaml", ONE_STAGE))
    files = list((Path(found["run_dir"]) / "export").iterdir())
    assert {file.name for file in files} >= {"model.safetensors", "model.pt2", "model.onnx"}
    net, pictures = load_network(found["run_dir"])
    assert net(pictures).shape == (2, 10)
    assert 0 <= found["test_top1"] <= 1


@pytest.mark.parametrize("form", ["text", "index", "file"])
def test_a_cell_without_any_path_is_trained_to_chance(
    project: Path, capfd: pytest.CaptureFixture[str], form: str
) -> None:
    (project / "cell.txt").write_text(ALL_NONE + "\n")
    genotype = {"text": ALL_NONE, "index": "nas_bench_201:1651", "file": "cell.txt"}[form]
    config = write(project / "none.yaml")
    found = result(capfd, "retrain", "--config", config, "--genotype", genotype)
    assert str(Genotype.from_dict(found["genotype"])) == ALL_NONE
    assert found["test_top1"] < 0.2
    if form == "text":
        assert RunDir(Path(found["run_dir"])).read().tags["istanas.genotype_from"] == ALL_NONE
        exported = result(capfd, "export", found["run_dir"])
        assert all(each["difference"] <= 1e-4 for each in exported["exports"].values())
        profiled = result(
            capfd, "profile", "--config", config, "--job", "retrain", "--genotype", genotype, "--steps", "1"
        )
        assert profiled["seconds_per_step"] > 0


def test_a_search_where_no_edge_passes_anything(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = write(project / "none.yaml", space="{name: nas_bench_201, ops: [none]}")
    found = result(capfd, "search", "--config", config)
    assert str(Genotype.from_dict(found["genotype"])) == ALL_NONE
    assert found["valid_top1"] < 0.3


def test_a_search_is_profiled_and_checked(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = write(project / "tiny.yaml")
    assert result(capfd, "profile", "--config", config, "--steps", "1")["method"] == "two_stage"
    capfd.readouterr()
    assert run(["doctor", "--config", config]) == 0, capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--genotype", "ISTA_twostage"],
            "belongs to the space darts, not to nas_bench_201; set space.name=darts",
        ),
        (
            ["--genotype", "nas_bench_201:15625"],
            "'15625' is not an index of nas_bench_201; choose 0 to 15624",
        ),
        (["--genotype", "|none~0|"], "has 1 nodes, not 3; give |op~0|+"),
        (
            ["--genotype", ALL_NONE, "--set", "space.ops=[skip_connect]"],
            "('none', 0) is no candidate of cell 0",
        ),
        (
            ["--genotype", ALL_NONE, "--set", "space.ops=[sep_conv_3x3]"],
            "space.ops.0: 'sep_conv_3x3' is invalid",
        ),
        (["--genotype", ALL_NONE, "--set", "space.ops=[]"], "space.ops: [] is empty"),
        (["--genotype", ALL_NONE, "--set", "space.nodes=4"], "unknown key; it belongs to space.name: darts"),
        (["--genotype", ALL_NONE, "--set", "retrain.layers=7"], "retrain.layers: 7 is not 3 N + 2"),
        (["--genotype", ALL_NONE, "--set", "retrain.stem=imagenet"], "retrain.stem: imagenet is not a stem"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    project: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    config = write(project / "tiny.yaml")
    assert message in error(capfd, "retrain", "--config", config, *arguments)
    assert not list(project.glob("runs/*"))


def test_a_cell_of_the_benchmark_does_not_fit_the_darts_space(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    message = error(capfd, "retrain", "--genotype", "nas_bench_201:12")
    assert "belongs to the space nas_bench_201, not to darts; set space.name=nas_bench_201" in message


def test_the_size_of_the_retraining_is_checked_before_a_search(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The cost of what a search finds is that of the network of its retraining."""
    file = write(project / "two.yaml")
    line = error(capfd, "search", "--config", file, "--set", "retrain.layers=7")
    assert line.startswith("error: retrain.layers: 7 is not 3 N + 2")
    assert not list(project.glob("runs/*"))
