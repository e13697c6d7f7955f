"""The command line for users and programs: exit codes, streams, one-line errors, JSON as the last line on stdout."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from istanas.space import PUBLISHED, CellSpace, Genotype, random_genotype
from pipeline.base.interruption import STILL_CLOSING
from pipeline.cli import options
from pipeline.cli.commands import cli, run
from pipeline.cli.options import RESUMES, STARTS_OVER, hint_after_interrupt
from pipeline.config.load import load, run_hash
from pipeline.runs.directory import RunDir
from tests.warm import warm_program

TINY = """
space: {nodes: 2}
search: {epochs: 2, batch_size: 64, init_channels: 2, layers: 3, max_pictures: 200}
retrain: {epochs: 2, batch_size: 256, init_channels: 2, layers: 2, auxiliary_weight: 0, cutout: 0}
runtime: {threads: 1, device: cpu}
tracking: {enabled: false}
"""
COMMANDS = (
    "benchmark",
    "versus",
    "rank",
    "search",
    "retrain",
    "run",
    "predict",
    "evaluate",
    "export",
    "draw",
    "results",
    "ui",
    "doctor",
    "sweep",
    "sync",
    "new",
    "pack",
    "config",
    "profile",
    "latency",
    "promote",
    "compare",
    "submit",
    "jobs",
    "stop",
)
SERVED = ("submit", "jobs", "stop")  # these use a cluster's job server, and have no configuration
WITHOUT_SET = (*SERVED, "pack")
WITHOUT_CONFIG = (*WITHOUT_SET, "new")  # which writes one
KEYS = {
    "search": {"run_dir", "mlflow_run_id", "digest", "genotype", "params", "macs", "seconds"},
    "retrain": {"run_dir", "mlflow_run_id", "digest", "genotype", "test_top1", "params", "macs", "seconds"},
    "run": {
        "run_dir",
        "mlflow_run_id",
        "retrain_run_id",
        "digest",
        "genotype",
        "test_top1",
        "params",
        "macs",
        "seconds",
    },
}

Outcome = tuple[int, str, str]
Command = Callable[..., Outcome]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a tiny configuration; runs and stores are written there."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def istanas(here: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def command(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = run(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return command


def as_process(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a command line in a process of its own."""
    return subprocess.run(
        [*warm_program(), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def error_lines(err: str) -> list[str]:
    """Return the lines of an error, none of which belongs to a traceback."""
    lines = err.splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines), err
    return lines


# ---------- the configurations of the package
def test_shipped_configurations_are_listed_copied_and_named(istanas: Command, repo_root: Path) -> None:
    code, out, err = istanas("config", "--list")
    names = {file.stem for file in (repo_root / "tune_configs").glob("*.yaml")}
    assert (code, err, {line.split()[0] for line in out.splitlines()}) == (0, "", names)
    assert set(json.loads(istanas("config", "--list", "--json")[1])["configurations"]) == names
    shipped = (repo_root / "tune_configs" / "gdas_digits.yaml").read_text()
    assert istanas("config", "--copy", "gdas_digits") == (0, shipped, "")
    copied = json.loads(istanas("config", "--copy", "gdas_digits", "--json")[1])
    assert copied == {"name": "gdas_digits", "text": shipped}
    by_name = istanas("config", "--config", "gdas_digits")
    assert by_name == istanas("config", "--config", str(repo_root / "tune_configs" / "gdas_digits.yaml"))
    for arguments in (["config", "--copy", "gdas_digit"], ["search", "--config", "gdas_digit"]):
        code, _, err = istanas(*arguments)
        assert (code, "did you mean gdas_digits?" in error_lines(err)[0]) == (2, True)


# ---------- help and bad arguments
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(istanas: Command, command: str) -> None:
    code, out, err = istanas(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: istanas {command} ")
    assert ("--set KEY.PATH=VALUE" in out) == (command not in WITHOUT_SET)
    assert ("--config FILE" in out) == (command not in WITHOUT_CONFIG)
    assert ("--address URL" in out) == (command in SERVED)
    jobs = command in ("search", "retrain", "run", "sweep", "benchmark", "versus", "rank")
    assert ("--fresh" in out) == jobs
    for option in ("--workers N|MIN:MAX", "--address ADDR"):
        assert (option in out) == (jobs or command == "doctor")


@pytest.mark.parametrize(
    "command", ["predict", "results", "compare", "ui", "evaluate", "export", "promote", "sync"]
)
def test_the_help_says_what_a_configuration_is_for(istanas: Command, command: str) -> None:
    text = " ".join(istanas(command, "--help")[1].split())
    assert "handwritten digits" not in text
    assert "runtime.runs_dir" in text
    assert ("It only says where runs are found" in text) == (
        command in ("predict", "results", "compare", "ui")
    )


def test_help_lists_the_commands(istanas: Command) -> None:
    assert tuple(sorted(COMMANDS)) == tuple(sorted(cli.commands))
    code, out, err = istanas()
    assert code == 2
    assert "Usage: istanas" in out + err


def test_help_groups_the_commands_with_a_whole_line_each(
    istanas: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 80 columns, no line is cut off or wrapped, and every command is in exactly one group."""
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = istanas("--help")
    assert code == 0
    groups = out.partition("Search and train:\n")[2]
    headings = [line for line in groups.splitlines() if line.endswith(":")]
    assert headings == ["Prediction:", "Results:", "Benchmarks:", "Cluster:", "Tools:"]
    entries = [line for line in groups.splitlines() if line.startswith("  ")]
    assert sorted(line.split()[0] for line in entries) == sorted(COMMANDS)
    assert all(re.fullmatch(r"  [a-z]+ +[A-Z].*[^.]\.", line) for line in entries), entries
    assert max(map(len, entries)) <= 80


def test_the_version_is_that_of_the_package(istanas: Command) -> None:
    import istanas as package

    assert package.__version__ in istanas("--version")[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serch"], "serch"),
        (["search", "--bogus"], "--bogus"),
        (
            ["search", "extra"],
            "error: 'extra': an unexpected argument; leave it out. See: istanas search --help",
        ),
        (["run", "tiny.yaml"], "did you mean --config tiny.yaml? See: istanas run --help"),
        (
            ["doctor", "one_stage_digits"],
            "did you mean --config one_stage_digits? See: istanas doctor --help",
        ),
        (
            ["pack", "pictures", "tiny.yaml", "--out", "x"],
            "'tiny.yaml': an unexpected argument; leave it out. ",
        ),
        (["evaluate", "nothing", "--out", "x"], "leave it out. See: istanas evaluate --help"),
        (["retrain"], "--genotype"),
        (["sync"], "RUN"),
        (["promote"], "RUN"),
        (["promote", "nothing"], "nothing"),
        (["promote", "nothing", "--metric", "top1"], "valid/top1"),
        (["compare"], "RUN: 0 given, name at least two runs to compare"),
        (["compare", "one"], "RUN: 1 given, name at least two runs to compare"),
        (["compare", "one", "two"], "run 'one': unknown"),
        (["results", "--kind", "trial"], "--kind"),
        (["results", "--method", "dart"], "method 'dart': unknown; choose two_stage, one_stage"),
        (["results", "--dataset", "cifar"], "dataset 'cifar': unknown; choose digits, cifar10"),
        (["results", "--sweep", "x", "--where", "a"], "--where: --sweep has all trials of one run"),
        (["results", "--one-stage", "--method", "one_stage"], "--method: --one-stage takes --dataset only"),
        (["results", "--one-stage", "--sweep", "x"], "different tables; give one of them"),
        (["draw"], "FILE"),
        (["predict", "nothing"], "FILE|DIR"),
        (["predict", "nothing", "a.png"], "run 'nothing': unknown"),
        (["evaluate", "nothing"], "run 'nothing': unknown"),
        (["evaluate", "nothing", "--out", "x"], "without --data"),
        (["predict", "models:/x", "a.png"], "write models:/NAME@ALIAS or models:/NAME/VERSION"),
        (["predict", "x", "a.png", "--json", "--csv", "-"], "give one of them"),
        (["search", "--set"], "--set"),
        (["ui", "--port", "http"], "http"),
        (["search", "--set", "search.epoch=3"], "did you mean epochs?"),
        (["search", "--set", "search.epochs"], "not of the form key.path=value"),
        (["search", "--set", "search.epochs=ten"], "search.epochs: 'ten' is invalid"),
        (["search", "--config", "absent.yaml"], "absent.yaml: cannot be read"),
        (
            ["run", "--config", "tiny.yaml", "--set", "search.max_pictures=5000"],
            "search.max_pictures: 5000 is above",
        ),
        (["retrain", "--genotype", "ISTA_twostag"], "ISTA_twostage"),
        (["retrain", "--genotype", "random:x"], "random:SEED"),
        (["retrain", "--genotype", "tiny.yaml"], "tiny.yaml"),
        (["draw", "nothing"], "nothing"),
        (["sync", "nothing"], "nothing"),
        (["results", "--set", "runtime.threads=none"], "runtime.threads"),
        *(
            ([*command, *wrong], says)
            for command in (["search"], ["retrain", "--genotype", "random:0"], ["run"], ["doctor"])
            for wrong, says in (
                (
                    ["--workers", "abc"],
                    "'abc' is not a number of workers; give a number or MIN:MAX, such as 2 or 1:4",
                ),
                (
                    ["--address", "somewhere"],
                    "runtime.workers: 0 runs the job in this process, not on the cluster at runtime.address",
                ),
            )
        ),
        (["search", "--workers", "4:1"], "'4:1' is not"),
        (["search", "--workers", "-1"], "'-1' is not"),
        (["search", "--workers"], "--workers"),
        (["search", "--set", "runtime.workers=abc"], "runtime.workers: 'abc' is not a number"),
        (
            ["search", "--set", "runtime.workers=2", "--workers", "0", "--address", "somewhere"],
            "runtime.address",
        ),
        (
            ["search", "--config", "tiny.yaml", "--workers", "33"],
            "search.batch_size: 64 is too small for 33 workers; use at least 66, or lower",
        ),
        (
            ["run", "--config", "tiny.yaml", "--workers", "1:20", "--set", "retrain.batch_size=39"],
            "retrain.batch_size: 39 is too small for 20 workers; use at least 40, or lower",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_bad_argument_or_configuration_is_one_line_and_exit_code_2(
    istanas: Command, here: Path, arguments: list[str], says: str
) -> None:
    code, out, err = istanas(*arguments)
    (line,) = error_lines(err)
    assert code == 2
    assert says in line
    assert out == ""


def test_every_mistake_of_a_configuration_has_its_line(istanas: Command) -> None:
    code, _, err = istanas(
        "search", "--set", "search.epochs=0", "--set", "retrain.layers=x", "--set", "seed=-1"
    )
    assert code == 2
    assert len(error_lines(err)) == 3


def test_data_that_is_not_there_is_a_failed_job_in_one_line(istanas: Command, here: Path) -> None:
    code, _, err = istanas("search", "--config", "tiny.yaml", "--set", "data={name: folder, root: nowhere}")
    (line,) = error_lines(err)
    assert code == 1
    assert "nowhere" in line


def test_a_folder_that_cannot_be_written_is_one_line(istanas: Command, here: Path) -> None:
    (here / "file").write_text("")
    code, _, err = istanas("search", "--config", "tiny.yaml", "--set", "runtime.runs_dir=file/runs")
    (line,) = error_lines(err)
    assert code == 1
    assert "Not a directory" in line


# ---------- jobs
@pytest.mark.parametrize("command", ["search", "retrain", "run"])
def test_json_is_the_last_and_only_line_on_stdout(istanas: Command, here: Path, command: str) -> None:
    genotype = ["--genotype", "random:0"] if command == "retrain" else []
    code, out, err = istanas(command, *genotype, "--config", "tiny.yaml", "--json")
    assert code == 0
    assert out.count("\n") == 1
    result = json.loads(out)
    assert result.keys() >= KEYS[command]
    assert Genotype.from_dict(result["genotype"]).digest() == result["digest"]
    assert (here / result["run_dir"] / "genotype.json").is_file()
    if "test_top1" in result:
        assert 0 <= result["test_top1"] <= 1
    assert "epoch 1: loss" in err
    assert "Traceback" not in err


def test_without_json_the_table_and_the_paths_are_on_stdout(istanas: Command, here: Path) -> None:
    code, out, err = istanas("run", "--config", "tiny.yaml")
    assert (code, err) == (0, "")
    for text in ("test top-1", "parameters", "multiply-adds", "seconds", "epoch 2: loss"):
        assert text in out
    pages = [line.removeprefix("report: ") for line in out.splitlines() if line.startswith("report: ")]
    assert [(here / page).is_file() for page in pages] == [True, True], "of the search and of the retraining"
    for label in ("genotype: ", "cell pictures: ", "network: "):
        (line,) = [line for line in out.splitlines() if line.startswith(label)]
        assert (here / line.removeprefix(label)).exists()
    assert re.search(r"^classify pictures: \S.* predict \S+-retrain-\w+ FILE_OR_FOLDER$", out, re.MULTILINE)


def test_a_finished_run_prints_its_result_without_training_again(istanas: Command, here: Path) -> None:
    _, out, _ = istanas("run", "--config", "tiny.yaml", "--json")
    first = json.loads(out)
    files = {p: p.stat().st_mtime_ns for p in Path(first["run_dir"]).rglob("*.jsonl")}
    code, out, err = istanas("run", "--config", "tiny.yaml", "--json")
    assert code == 0
    assert json.loads(out) == first
    assert "epoch" not in err
    assert err.count("already finished") == 2
    assert {p: p.stat().st_mtime_ns for p in files} == files


def test_a_finished_run_is_found_whatever_the_workers_and_needs_none(istanas: Command) -> None:
    first = json.loads(istanas("search", "--config", "tiny.yaml", "--json")[1])
    for place in (["--workers", "2"], ["--workers", "1:3", "--address", "127.0.0.1:9"], ["--workers", "0"]):
        code, out, err = istanas("search", "--config", "tiny.yaml", *place, "--json")
        assert code == 0
        assert json.loads(out) == first
        assert "already finished" in err


def test_fresh_trains_again(istanas: Command) -> None:
    assert istanas("search", "--config", "tiny.yaml")[0] == 0
    code, out, _ = istanas("search", "--config", "tiny.yaml", "--fresh")
    assert code == 0
    assert "epoch 2: loss" in out
    assert "already finished" not in out


def test_a_random_cell_is_retrained_as_a_baseline(istanas: Command, here: Path) -> None:
    results = []
    for seed in (0, 0, 1):
        code, out, _ = istanas("retrain", "--genotype", f"random:{seed}", "--config", "tiny.yaml", "--json")
        assert code == 0
        results.append(json.loads(out))
    assert results[0] == results[1]
    assert results[0]["digest"] == random_genotype(0, CellSpace(n_nodes=2)).digest() != results[2]["digest"]
    assert results[0]["run_dir"] != results[2]["run_dir"]
    assert RunDir(results[0]["run_dir"]).read().parent is None


def test_a_search_is_retrained_by_its_directory_or_name(istanas: Command, here: Path) -> None:
    found = json.loads(istanas("search", "--config", "tiny.yaml", "--json")[1])
    for reference in (found["run_dir"], "tiny-search", f"{found['run_dir']}/genotype.json"):
        code, out, _ = istanas("retrain", "--genotype", reference, "--config", "tiny.yaml", "--json")
        result = json.loads(out)
        assert code == 0
        assert result["digest"] == found["digest"]
    assert RunDir(result["run_dir"]).read().parent == found["run_dir"]


def write_pictures(root: Path) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for shade, name in enumerate(("dark", "light")):
            for number in range(8):
                file = root / split / name / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 200 * shade + number).save(file)


def test_without_a_file_a_retraining_is_on_the_pictures_of_its_run(istanas: Command, here: Path) -> None:
    write_pictures(here / "my pics #1")
    own = ["--set", "data.name=folder", "--set", "data.root=my pics #1", "--set", "data.horizontal_flip=true"]
    config = [
        "--config",
        "tiny.yaml",
        "--set",
        "search={batch_size: 8, epochs: 1, init_channels: 2, layers: 3}",
        *own,
        "--set",
        "tracking={enabled: true, models: false}",
    ]
    found = json.loads(istanas("search", *config, "--set", "tracking.experiment=mine", "--json")[1])
    short = ["--set", "retrain={epochs: 1, batch_size: 16, init_channels: 2, layers: 2, auxiliary_weight: 0}"]
    references = (
        found["run_dir"],
        "tiny-search",
        f"{found['run_dir']}/genotype.json",
        found["mlflow_run_id"],
    )
    for seed, reference in enumerate(references):
        arguments = (
            "--genotype",
            reference,
            *short,
            "--set",
            "retrain.cutout=0",
            "--set",
            f"seed={seed}",
            "--json",
        )
        code, out, err = istanas("retrain", *arguments)
        assert code == 0, err
        assert (
            f"data (folder in my pics #1), space and tracking settings are those of {found['run_dir']}; the others are "
            "those of digits_quickstart.yaml" in err
        )
        record = RunDir(json.loads(out)["run_dir"]).read()
        assert (record.dataset, record.name, record.parent) == ("folder", "tiny-retrain", found["run_dir"])
        assert record.params["data.horizontal_flip"] is True
        settings = load(Path(json.loads(out)["run_dir"]) / "config.yaml")
        assert (settings.tracking.experiment, settings.retrain.epochs) == ("mine", 1)
    code, out, _ = istanas(
        "profile", "--genotype", found["run_dir"], "--steps", "1", *short, "--set", "retrain.cutout=0"
    )
    assert code == 0
    assert "data (folder in my pics #1)" in out
    code, out, err = istanas("retrain", "--genotype", found["run_dir"], "--config", "tiny.yaml", "--json")
    assert RunDir(json.loads(out)["run_dir"]).read().dataset == "digits"
    assert "settings are those of" not in err
    shutil.copytree(found["run_dir"], here / "copy")
    (here / "copy" / "config.yaml").unlink()
    code, _, err = istanas("retrain", "--genotype", "copy")
    assert (code, error_lines(err)) == (
        2,
        ["error: run copy: has no config.yaml, which says on which pictures to train; give --config"],
    )


def test_a_diverging_run_fails_in_one_line_and_leaves_nothing_running(istanas: Command, here: Path) -> None:
    for job, genotype in (("search", []), ("retrain", ["--genotype", "random:0"])):
        settings = [f"{job}.lr=1e30", f"{job}.grad_clip=null", "tracking.enabled=true"]
        overrides = [part for setting in settings for part in ("--set", setting)]
        code, out, err = istanas(job, *genotype, "--config", "tiny.yaml", *overrides, "--json")
        assert code == 1
        assert out == ""
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert line.startswith(
            "error: training loss is nan in epoch 1: the run diverged; there is no checkpoint before it; "
        )
        assert line.endswith(
            "; lower the learning rate (lr) or grad_clip, or resume from the start at half the rate with "
            "--set runtime.on_nan=rollback"
        )
        assert "Traceback" not in err
        (path,) = (here / "runs").glob(f"tiny-{job}-*")
        assert RunDir(path).read().status == "FAILED"

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{here / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("istanas")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FAILED", "FAILED"]


# ---------- the other commands
def test_draw_a_published_cell(istanas: Command, here: Path) -> None:
    code, out, err = istanas("draw", "ISTA_twostage", "--out", "figures", "--json")
    assert code == 0
    assert out.count("\n") == 1
    drawn = json.loads(out)
    assert drawn["digest"] == PUBLISHED["ISTA_twostage"].digest()
    assert len(drawn["files"]) == 4
    for file in drawn["files"]:
        head = (here / file).read_bytes()[:500]
        assert head.startswith(b"\x89PNG") if file.endswith(".png") else b"<svg" in head or b"<?xml" in head
    assert "skip_connect" in err


def test_doctor_has_one_line_a_check_and_exits_0_here(istanas: Command) -> None:
    code, out, err = istanas("doctor")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert all(line.split()[0] in ("ok", "warn", "info") for line in lines), out
    names = [line.split()[1].rstrip(":") for line in lines]
    assert {"packages", "gpu", "mlflow", "mosek", "data"} <= set(names)


def test_doctor_counts_the_threads_of_the_workers_that_are_asked_for(istanas: Command) -> None:
    def cores(*arguments: str) -> str:
        code, out, err = istanas("doctor", *arguments)
        assert (code, err) == (0, "")
        (line,) = [line for line in out.splitlines() if line.split()[1] == "cores:"]
        return line

    assert "in one process, " in cores()
    assert "in one process, 3 threads each" in cores("--workers", "0", "--set", "runtime.threads=3")
    assert "4096 workers, 1 thread each; workers x threads should not exceed" in cores("--workers", "1:4096")
    code, out, _ = istanas("doctor", "--workers", "4096", "--address", "127.0.0.1:1")
    assert code == 1
    assert "cores:" not in out, "this machine's cores say nothing about a cluster"
    assert any(
        line.startswith("fail  cluster: ") and "no process listens" in line for line in out.splitlines()
    )


def test_doctor_fails_with_a_remedy_where_the_data_lacks(istanas: Command) -> None:
    code, out, _ = istanas("doctor", "--set", "data={name: folder, root: nowhere}")
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("fail")]
    assert "nowhere" in line
    assert "; " in line


def test_results_without_a_store_are_an_empty_table_and_make_none(istanas: Command, here: Path) -> None:
    code, out, _ = istanas("results")
    assert code == 0
    assert "no runs yet" in out
    code, out, _ = istanas("results", "--csv", "table.csv", "--json")
    assert code == 0
    assert json.loads(out) == {"results": []}
    with (here / "table.csv").open() as stream:
        assert "test_top1" in next(csv.reader(stream))
    assert istanas("results", "--csv", "-")[1] == (here / "table.csv").read_text()
    assert not (here / "mlflow.db").exists()


def test_sync_delivers_an_untracked_run_and_is_safe_to_repeat(istanas: Command, here: Path) -> None:
    run_dir = json.loads(istanas("search", "--config", "tiny.yaml", "--json")[1])["run_dir"]
    ids = []
    for _ in range(2):
        code, out, _ = istanas("sync", run_dir, "--json")
        assert code == 0
        ids.append(json.loads(out)["mlflow_run_id"])
    assert ids[0] == ids[1]

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{here / 'mlflow.db'}")
    assert [m.step for m in client.get_metric_history(ids[0], "train/loss")] == [1, 2]
    code, out, _ = istanas("results", "--json")
    (row,) = json.loads(out)["results"]
    assert (row["run_id"], row["kind"], row["status"]) == (ids[0], "search", "FINISHED")


def test_results_are_filtered_and_runs_compared(istanas: Command, here: Path) -> None:
    tracked = ("--config", "tiny.yaml", "--set", "tracking={enabled: true, models: false}", "--json")
    first = json.loads(istanas("run", *tracked)[1])
    code, out, err = istanas("search", *tracked, "--set", "seed=1", "--set", "tracking.name='[red]$x$ [b]'")
    second = json.loads(out)
    assert "search: runs/[red]$x$ [b]-search-" in err, "a name's brackets are no markup"

    def ids(*filters: str) -> set[str]:
        code, out, _ = istanas("results", *filters, "--json")
        assert code == 0
        return {row["run_id"] for row in json.loads(out)["results"]}

    searches = {first["mlflow_run_id"], second["mlflow_run_id"]}
    assert ids() == {*searches, first["retrain_run_id"]}
    assert ids("--kind", "search", "--dataset", "digits", "--method", "two_stage") == searches
    assert ids("--where", "metrics.`test/top1` >= 0") == {first["retrain_run_id"]}
    assert ids("--kind", "search", "--where", 'params.seed = "1"') == {second["mlflow_run_id"]}
    assert ids("--one-stage", "--dataset", "digits") == set()
    assert "[red]$x$ [b]-search" in istanas("results")[1].replace("\n", "")
    assert istanas("compare", first["run_dir"], second["run_dir"])[0] == 0
    code, out, err = istanas("results", "--csv", ".")
    assert (code, error_lines(err)) == (2, ["error: --csv .: a folder; name a file"])
    assert istanas("results", "--csv", "/dev/null")[0] == 0
    assert not Path("/dev/null").is_file(), "a device was replaced"
    code, out, err = istanas("results", "--where", "metrics.test/top1 > 0.9")
    assert (code, out) == (2, "")
    (line,) = error_lines(err)
    assert "MLflow refuses it (Invalid comparison clause" in line
    assert "write for example: metrics.`test/top1` > 0.9" in line
    assert "no run fits the filters" in istanas("results", "--dataset", "svhn")[1]

    code, out, err = istanas(
        "compare", first["run_dir"], second["mlflow_run_id"], "--config", "tiny.yaml", "--json"
    )
    assert code == 0
    assert out.count("\n") == 1
    result = json.loads(out)
    assert [row["digest"] for row in result["runs"]] == [first["digest"], second["digest"]]
    assert result["differing"] == {"seed": ["0", "1"]}
    assert result["files"] == ["compare/compare.html", "compare/compare.png"]
    assert all((here / file).stat().st_size > 1000 for file in result["files"])
    assert "latency: one picture at a time" in err


def test_an_unreachable_store_is_one_line_and_sync_delivers_later(istanas: Command, here: Path) -> None:
    """Missing records are sent to the store of the configuration, not to the default one."""
    (here / "away").write_text("")  # a file where the store's folder belongs
    store = f"sqlite:///{here / 'away' / 'mlflow.db'}"
    settings = [f"tracking={{enabled: true, models: false, uri: '{store}', experiment: elsewhere}}"]
    overrides = [part for setting in settings for part in ("--set", setting)]
    done = as_process(here, "run", "--config", "tiny.yaml", *overrides, "--json")  # pytest captures warnings
    assert done.returncode == 0, done.stderr
    result, err = json.loads(done.stdout), done.stderr
    assert result["mlflow_run_id"] is None
    assert result["test_top1"] > 0
    said = [line for line in err.splitlines() if "can't be used" in line]
    assert len(said) == 1
    for run_dir in (result["run_dir"], result["retrain_run_dir"]):
        assert f"not in MLflow yet: deliver it with istanas sync {run_dir}" in err

    (here / "away").unlink()
    (here / "away").mkdir()
    code, out, err = istanas("sync", result["retrain_run_dir"], "--json")
    assert code == 0, err
    retrain_id = json.loads(out)["mlflow_run_id"]
    assert not (here / "mlflow.db").exists()

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("elsewhere")
    assert experiment is not None
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    assert len(runs) == 2
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs[retrain_id].data.tags["mlflow.parentRunId"] in runs


def test_a_password_in_the_stores_address_reaches_no_file(istanas: Command, here: Path) -> None:
    secret = "hunter2"
    settings = ["tracking.enabled=true", f"tracking.uri=http://me:{secret}@127.0.0.1:9"]
    overrides = [part for setting in settings for part in ("--set", setting)]
    code, out, err = istanas("search", "--config", "tiny.yaml", *overrides, "--json")
    assert code == 0
    assert secret not in out + err
    files = [path for path in here.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if secret.encode() in path.read_bytes()]


# ---------- whole processes
def test_a_process_has_the_same_codes_and_streams_in_any_directory(
    here: Path,
) -> None:
    bad = as_process(here, "search", "--set", "search.epochs=0")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert len(error_lines(bad.stderr)) == 1
    nowhere = ("--set", "data={name: folder, root: nowhere}", "--set", "tracking.enabled=false")
    failed = as_process(here, "search", *nowhere)
    assert failed.returncode == 1
    assert len(error_lines(failed.stderr)) == 1
    assert failed.stdout == ""


def test_help_imports_neither_torch_nor_mlflow(here: Path) -> None:
    code = (
        "import sys; from pipeline.cli.commands import run; assert run(['run', '--help']) == 0;"
        "print([m for m in ('torch', 'mlflow', 'ray', 'cvxpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_search_in_process_imports_no_ray(here: Path) -> None:
    code = (
        "import sys; from pipeline.cli.commands import run; assert run(['search', '--config', 'tiny.yaml']) == 0;"
        "print([m for m in sys.modules if m.partition('.')[0] == 'ray'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    assert "epoch 2: loss" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def searching(here: Path, arguments: list[str]) -> subprocess.Popen[str]:
    """Start a search, and return when it has printed its second epoch."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=unignore_sigint,
    )
    assert process.stdout is not None
    assert any(line.startswith("epoch 2:") for line in process.stdout)
    return process


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (signal.SIGINT, 130, "interrupted: run the same command again to resume"),
        (signal.SIGTERM, 143, "terminated (SIGTERM): run the same command again to resume"),
        (signal.SIGHUP, 129, "the terminal was closed (SIGHUP): run the same command again to resume"),
    ],
    ids=["ctrl-c", "sigterm", "sighup"],
)
def test_an_interrupt_in_mid_epoch_is_one_line_and_the_run_resumes(
    istanas: Command, here: Path, number: signal.Signals, code: int, says: str
) -> None:
    arguments = ["search", "--config", "tiny.yaml", "--set", "search.epochs=12", "--set", "search.layers=4"]
    process = searching(here, arguments)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, out + err
    assert err.strip() == says  # below the terminal's ^C
    (path,) = (here / "runs").iterdir()
    stopped = RunDir(path)
    assert stopped.read().status == "FAILED"
    assert stopped.read().tags["istanas.outcome"] == "INTERRUPTED"
    done = len(stopped.metrics())
    assert 2 <= done < 12
    if number != signal.SIGINT:
        return  # the resumption does not depend on the signal
    resumed, out, err = istanas(*arguments, "--json")
    assert resumed == 0, err
    assert out.count("\n") == 1
    assert json.loads(out).keys() >= KEYS["search"]
    assert "resumed after epoch" in err
    assert f"epoch {done - 1}: loss" not in err
    assert [m.step for m in stopped.metrics()] == list(range(1, 13))
    assert stopped.read().tags["istanas.outcome"] == "FINISHED"


A_COMMAND = """
import signal, time
from pipeline.cli import commands as cli

class Finalised:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

@cli.cli.command()
def wait():
    {where}
    time.sleep(60)

cli.main()
"""


@pytest.mark.parametrize(
    "where",
    [
        'exec("signal.raise_signal(signal.SIGINT)")',  # as in the creation of a dataclass
        "Finalised()",  # Python swallows exceptions there
    ],
    ids=["in an import", "in a finaliser"],
)
def test_an_interrupt_ends_the_command_wherever_it_strikes(where: str, here: Path) -> None:
    (here / "waiting.py").write_text(A_COMMAND.format(where=where))
    command = [sys.executable, "-m", "waiting", "wait"]
    done = subprocess.run(
        command, cwd=here, capture_output=True, text=True, preexec_fn=unignore_sigint, timeout=50
    )
    assert (done.returncode, done.stderr.strip()) == (
        130,
        "interrupted: run the same command again to resume",
    )


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return the contents and times of files. Some releases of filelock change the time of a lock that is held."""
    return {
        file.name: (file.read_bytes(), 0 if file.suffix == ".lock" else file.stat().st_mtime_ns)
        for file in folder.iterdir()
    }


@pytest.mark.parametrize("job", ["search", "run", "retrain", "sweep"])
@pytest.mark.parametrize("fresh", [[], ["--fresh"]], ids=["resume", "fresh"])
def test_a_second_identical_command_names_the_first_and_changes_nothing(
    istanas: Command, here: Path, job: str, fresh: list[str]
) -> None:
    sweep = "sweep={trials: 2, space: {search.lr: {uniform: [0.01, 0.1]}}}"
    overrides = ["tracking.enabled=true", *([sweep] if job == "sweep" else [])]
    config = load("tiny.yaml", overrides)
    genotype = random_genotype(0, CellSpace(n_nodes=2))
    kind = "search" if job == "run" else job
    extra = {"genotype": genotype.to_json()} if job == "retrain" else {}
    path = Path("runs") / f"tiny-{kind}-{run_hash(config, kind, **extra)}"
    path.mkdir(parents=True)
    (path / "run.json").write_text("what the first one writes")
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(path=str(path))], stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        before = contents(path)
        command = [job, *(["--genotype", "random:0"] if job == "retrain" else []), "--config", "tiny.yaml"]
        sets = [part for override in overrides for part in ("--set", override)]
        code, _, err = istanas(*command, *sets, *fresh)
        after = contents(path)
    finally:
        first.kill()
        first.communicate()
    assert code == 2
    (line,) = err.splitlines()
    assert line == (
        f"error: run directory {path}: in use by process {first.pid} on {socket.gethostname()}; wait until it ends "
        "or stop it"
    )
    assert after == before
    assert {entry.name for entry in here.iterdir()} == {"tiny.yaml", "runs"}, "a store was written"
    assert [entry.name for entry in (here / "runs").iterdir()] == [path.name]


HOLD = """
import time
from pipeline.runs.directory import RunDir
with RunDir("{path}").lock():
    print("held", flush=True)
    time.sleep(600)
"""


def test_repeated_signals_do_not_interrupt_the_closing(here: Path) -> None:
    """Repeated Ctrl-C and SIGTERM do not prevent the closing of the run, in MLflow included."""
    settings = ["--set", "search.epochs=12", "--set", "tracking.enabled=true"]
    process = searching(here, ["search", "--config", "tiny.yaml", *settings])
    sent = 0
    while process.poll() is None and sent < 3000:
        process.send_signal(signal.SIGTERM if sent % 10 == 9 else signal.SIGINT)
        sent += 1
        time.sleep(0.01)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    *closing, last = err.strip().splitlines()
    assert last == "interrupted: run the same command again to resume"
    assert set(filter(None, closing)) == {STILL_CLOSING.decode().strip()}
    assert sent > 1
    (path,) = (here / "runs").iterdir()
    assert RunDir(path).read().status == "FAILED"

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{here / 'mlflow.db'}")
    (run,) = client.search_runs(["1"])
    assert run.info.status == "FAILED"


def unignore_sigint() -> Any:
    """Restore the handlers, which background jobs of a shell (SIGINT) and of nohup (SIGHUP) ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


RESUMING = ("search", "retrain", "run", "sweep", "benchmark", "versus", "rank", "promote", "sync")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in WITHOUT_CONFIG])
def test_after_an_interrupt_only_a_job_is_said_to_resume(istanas: Command, here: Path, command: str) -> None:
    (here / "interrupted.py").write_text("raise KeyboardInterrupt")
    says = "run the same command again to resume"
    if command not in RESUMING:
        says = "nothing was stored; the same command starts over"
    code, out, err = istanas(command, "--plugin", "interrupted.py")
    assert (code, out, err.strip()) == (130, "", f"interrupted: {says}")


@pytest.mark.parametrize(("resumes", "says"), [(False, STARTS_OVER), (True, RESUMES)])
def test_an_interrupt_while_a_command_works_has_the_hint(resumes: bool, says: str) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    command = options.Command("interrupted", callback=interrupted, resumes=resumes)
    with pytest.raises(KeyboardInterrupt, match=says):
        command.invoke(command.make_context("interrupted", []))


def test_a_command_may_give_its_own_hint_after_an_interrupt() -> None:
    with (
        pytest.raises(KeyboardInterrupt, match="the inner hint"),
        hint_after_interrupt("another hint"),
        hint_after_interrupt("the inner hint"),
    ):
        raise KeyboardInterrupt
