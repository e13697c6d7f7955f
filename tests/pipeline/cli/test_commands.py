"""The command line for users and programs: exit codes, streams, one-line errors, JSON as the last line on stdout."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest

from istanas.space import PUBLISHED, CellSpace, Genotype, random_genotype
from pipeline.config.load import load
from pipeline.runs.directory import RunDir
from tests.pipeline.cli.tiny_commands import (
    KEYS,
    Command,
    as_process,
    error_lines,
)

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
