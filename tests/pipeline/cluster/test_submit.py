"""`istanas submit` without a cluster: rejected commands, shipped files, and values that others can see."""

import os
import shlex
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from istanas.errors import ConfigError, IstanasError
from istanas.space import PUBLISHED
from pipeline.cli.commands import run
from pipeline.cluster import working_tree as shipping
from pipeline.cluster.job_server import JobServer, job_address
from pipeline.cluster.submit import Submission, _not_shipped, check, command_line, environment, pack
from pipeline.cluster.working_tree import working_tree
from pipeline.config.load import load
from pipeline.config.plugins import load_plugins
from tests.pipeline.tracking.test_references import make_run

Write = Callable[..., Path]
HEAD = "http://head:8265"
NO_STORE = ("tracking.enabled=false",)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    return folder


def write(folder: Path, *names: str) -> None:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)


def submission(
    *settings: str, job: str = "search", options: dict[str, str] | None = None, cluster: bool = False
) -> Submission:
    given = [part for setting in settings for part in ("--set", setting)]
    given += [part for name, value in (options or {}).items() for part in (f"--{name}", value)]
    named = {"file" if key == "config" else key: value for key, value in (options or {}).items()}
    return Submission(job, (job, *given), named, load(None, settings), "tiny", cluster)


GOOD = ("runtime.workers=2", "runtime.runs_dir=/shared/runs")


# ---------- rejected on this machine
def rejections(*settings: str, address: str = HEAD, job: str = "search", cluster: bool = False) -> list[str]:
    try:
        check(submission(*settings, job=job, cluster=cluster), address)
    except ConfigError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["runtime.workers=2"], ["runtime.runs_dir: runs would be deleted with the job's"]),
        (
            ["runtime.workers=2", "runtime.runs_dir=~/runs"],
            ["runtime.runs_dir: ~/runs would be deleted with the"],
        ),
        (["runtime.workers=2", "runtime.runs_dir=s3://bucket/runs"], []),
        (["runtime.runs_dir=/shared"], ["runtime.workers: not set; give the command --workers N"]),
        (["runtime.runs_dir=/shared", "runtime.workers=0"], []),
        (
            [*GOOD, "data={name: cifar10, root: data}"],
            ["data.root: data is relative, and data are not shipped"],
        ),
        ([*GOOD, "data={name: cifar10, root: /data}"], []),
        ([*GOOD, "data={name: cifar10, root: ~/data}"], []),
        ([*GOOD, "runtime.address=auto"], ["runtime.address: auto is not used: the job joins the cluster"]),
        # The configuration rejects a password in an address.
        (
            [*GOOD, "runtime.address='ray://me:pw@h:1'"],
            ["--set \"runtime.address='ray://h:1'\": runtime.address: 'ray://h:1' contains a password"],
        ),
        (["runtime.workers=2", "runtime.runs_dir=file:///shared/runs"], []),
        (
            [*GOOD, "search.batch_size=3"],
            ["search.batch_size: 3 is too small for 2 workers; use at least"],
        ),
        ([*GOOD, "retrain.batch_size=3"], []),
    ],
    ids=str,
)
def test_settings_that_do_not_hold_on_the_cluster_are_rejected(settings: list[str], says: list[str]) -> None:
    lines = rejections(*settings, *NO_STORE)
    assert len(lines) == len(says), lines
    assert all(line.startswith(start) for line, start in zip(lines, says, strict=True)), lines


def test_each_job_is_checked_for_its_own_sections() -> None:
    assert rejections(*GOOD, *NO_STORE, "retrain.batch_size=3", job="retrain")[0].startswith(
        "retrain.batch_size: 3"
    )
    assert rejections(*GOOD, *NO_STORE, "retrain.batch_size=3", job="run")[0].startswith(
        "retrain.batch_size: 3"
    )
    space = [
        "data.holdout=0.1",
        "sweep={space: {search.lr: {uniform: [0.1, 0.2]}}, storage: 'sqlite:///study.db'}",
    ]
    # A sweep needs no workers, because its trials are the workers.
    (line,) = rejections("runtime.runs_dir=/shared", *NO_STORE, *space, job="sweep")
    assert line.startswith("sweep.storage: sqlite:///study.db would be deleted with the job's")


def test_a_sweep_that_would_fail_or_start_nothing_is_rejected(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = ["data.holdout=0.1", "sweep={space: {search.lr: {uniform: [0.1, 0.2]}}}"]
    assert rejections("runtime.runs_dir=s3://bucket/runs", *NO_STORE, *space, job="sweep") == []
    (line,) = rejections("runtime.runs_dir=runs", *NO_STORE, *space, job="sweep")
    assert line.endswith("(--set runtime.runs_dir=/SHARED/runs) or s3://BUCKET/PREFIX")
    assert run(["submit", "--address", "127.0.0.1:1", "--", "sweep", "--dry-run"]) == 2
    assert (
        "error: --dry-run: it starts nothing; run the same command on this machine" in capsys.readouterr().err
    )
    assert run(["submit", "--address", "127.0.0.1:1", "--", "sweep", "--set", "runtime.workers=2"]) == 2
    assert "error: sweep: no such section" in capsys.readouterr().err


def test_an_incomplete_address_is_an_error_without_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://[::1")
    (line,) = rejections(*GOOD)
    assert line.startswith("MLFLOW_TRACKING_URI: not the address of a server")


@pytest.mark.parametrize(
    ("store", "address", "says"),
    [
        (None, HEAD, "MLFLOW_TRACKING_URI: not set: MLflow's store would be deleted"),
        (
            "sqlite:///mlflow.db",
            HEAD,
            "MLFLOW_TRACKING_URI: sqlite:///mlflow.db would be deleted",
        ),
        ("mlruns", HEAD, "MLFLOW_TRACKING_URI: mlruns would be deleted"),
        (
            "http://127.0.0.1:5000",
            HEAD,
            "MLFLOW_TRACKING_URI: http://127.0.0.1:5000 is another machine on the cluster",
        ),
        ("http://127.0.0.1:5000", "http://localhost:8265", None),
        ("http://mlflow:5000", HEAD, None),
        ("sqlite:////shared/mlflow.db", HEAD, None),
    ],
)
def test_a_store_that_the_cluster_does_not_reach_is_rejected(
    monkeypatch: pytest.MonkeyPatch, store: str | None, address: str, says: str | None
) -> None:
    if store is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    lines = rejections(*GOOD, address=address)
    assert [line.startswith(says or "-") for line in lines] == ([] if says is None else [True]), lines
    assert all("--set tracking.enabled=false" in line for line in lines)
    assert rejections(*GOOD, cluster=True) == []
    assert rejections(*GOOD, "tracking.uri=http://mlflow:5000") == []
    (line,) = rejections(*GOOD, "tracking.uri=sqlite:///a.db", cluster=True)
    assert line.startswith("tracking.uri: sqlite:///a.db would be deleted")


def test_a_password_is_neither_sent_nor_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@mlflow:5000")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    lines = rejections(*GOOD)
    assert len(lines) == 1
    assert "MLFLOW_TRACKING_PASSWORD on the cluster's nodes" in lines[0]
    lines += rejections(*GOOD, "tracking.uri=http://me:hunter2@mlflow:5000")
    assert len(lines) == 2
    assert "hunter2" not in "".join(lines)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert environment(submission(*GOOD))["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert "hunter2" not in str(environment(submission(*GOOD)))
    for given in (submission(*GOOD, cluster=True), submission(*GOOD, *NO_STORE)):
        assert "MLFLOW_TRACKING_URI" not in environment(given)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serch"], "COMMAND: 'serch' can't be submitted, choose search, retrain, run, sweep"),
        (["ui"], "COMMAND: 'ui' can't be submitted"),
        (["search", "--bogus"], "See: istanas search --help"),  # before it, releases of click differ
        (["search", "--workers", "4:1"], "'4:1' is not a number"),
        (["search", "--set", "search.epoch=3"], "did you mean epochs?"),
        (["search", "--config", "absent.yaml"], "absent.yaml: cannot be read"),
        (["retrain", "--workers", "1"], "--genotype"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_is_rejected_as_if_it_ran_here(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert run(["submit", "--address", "127.0.0.1:1", "--", *arguments]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert says in line
    if "--bogus" in arguments:  # word for word
        run(arguments)
        assert capsys.readouterr().err == line


# ---------- shipped files
def test_code_is_shipped_without_data_runs_secrets_and_ignored_files(here: Path, tmp_path: Path) -> None:
    shipped = ("a.yaml", "istanas/data/x.py", "pipeline/runs.py", "notes/b.txt", "my runs/x.py")
    write(
        here, *shipped, "data/x.bin", "runs/a/run.json", "mlflow.db", "mlruns/1/a", ".git/HEAD", ".venv/a.py"
    )
    write(
        here, "a/__pycache__/a.pyc", ".env", "key.pem", "notes/c.log", "kept/pictures/1.png", "out/1", "big/x"
    )
    (here / "notes" / ".gitignore").write_text("*.log\n!kept.log\n")
    (here / ".rayignore").write_text("/big/\n")
    (tmp_path / "elsewhere").mkdir()
    (here / "link").symlink_to(tmp_path / "elsewhere")
    (here / "nowhere").symlink_to(tmp_path / "nowhere")
    package = working_tree(here, [here / "kept" / "pictures", here / "out"])
    assert set(package.files) == {*shipped, "notes/.gitignore", ".rayignore"}
    assert package.links == ("link",)


@pytest.mark.parametrize(
    "name",
    [
        *(
            ".env.production",
            ".envrc",
            "certs/tls.key",
            "id_rsa",
            "id_ed25519.pub",
            "id_ecdsa",
            "x/.git-credentials",
        ),
        *(".pypirc", ".kube/config", ".mlflow/credentials", ".ray/x", "home/.config/gcloud/adc.json"),
        *("my-credentials-1.json", "terraform.tfstate.backup", "client.p12", "mosek.lic"),
    ],
)
def test_a_secret_is_recognised_by_its_name_or_the_target_of_a_link(
    here: Path, tmp_path: Path, name: str
) -> None:
    write(here, "a.py", name)
    write(tmp_path / "home", name)
    (here / "inside.txt").symlink_to(here / name)
    (here / "outside.txt").symlink_to(tmp_path / "home" / name)
    assert set(working_tree(here).files) == {"a.py"}


@pytest.mark.parametrize("variable", shipping.NAMED_SECRETS)
def test_a_file_that_the_environment_names_as_secret_is_not_shipped(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    write(here, "a.py", "sub/plain.txt")
    (here / "linked.txt").symlink_to("sub/plain.txt")
    (tmp_path / "other").symlink_to(here)
    assert set(working_tree(here).files) == {"a.py", "sub/plain.txt", "linked.txt"}
    monkeypatch.setenv(variable, str(tmp_path / "other" / "sub" / ".." / "sub" / "plain.txt"))
    assert set(working_tree(here).files) == {"a.py"}


def test_links_to_code_are_shipped_and_links_to_data_are_not(here: Path, tmp_path: Path) -> None:
    write(here, "a.py", "kept/pictures/1.png")
    write(tmp_path, "b.py")
    (here / "b.py").symlink_to(tmp_path / "b.py")
    (here / "1.png").symlink_to("kept/pictures/1.png")
    assert set(working_tree(here, [here / "kept"]).files) == {"a.py", "b.py"}


def test_data_and_runs_are_not_shipped_in_any_form_of_their_path(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(here, "a.py", "mydata/1", "myruns/1")
    link = tmp_path / "link"
    link.symlink_to(here)

    def shipped(**settings: str) -> set[str]:
        given = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
        return set(working_tree(Path.cwd(), _not_shipped(submission(*given).config)).files)

    assert shipped() == {"a.py", "mydata/1", "myruns/1"}
    for runs in (f"{here}/../here/myruns", f"file://{here}/myruns", f"{link}/myruns"):
        assert shipped(runtime__runs_dir=runs) == {"a.py", "mydata/1"}
    for root in (f"{link}/mydata", f"{here}/mydata"):
        assert shipped(data=f"{{name: cifar10, root: {root}}}") == {"a.py", "myruns/1"}
    outside = "contains the working directory, .* submit from the folder of your code"
    for folder in (link, tmp_path, here / "mydata" / ".."):
        with pytest.raises(ConfigError, match=f"^runtime.runs_dir: .*{outside}"):
            shipped(runtime__runs_dir=str(folder))
        with pytest.raises(ConfigError, match=f"^data.root: .*{outside}"):
            shipped(data=f"{{name: cifar10, root: {folder}}}")
    assert shipped(runtime__runs_dir="s3://bucket/runs") == {"a.py", "mydata/1", "myruns/1"}


def test_lines_that_are_no_patterns_ignore_nothing(here: Path) -> None:
    write(here, "a.py", "b.log")
    (here / ".gitignore").write_text("!\n\\\nx\\\n*.log\n")
    assert set(working_tree(here).files) == {"a.py", ".gitignore"}


def test_a_file_name_that_is_not_utf_8_is_rejected_unless_ignored(here: Path) -> None:
    write(here, "a.py")
    (here / os.fsdecode(b"caf\xe9.txt")).write_text("")
    with pytest.raises(ConfigError, match=r"^'caf\\udce9.txt': a file name that is not UTF-8"):
        working_tree(here)
    (here / ".rayignore").write_text("caf*\n")
    assert set(working_tree(here).files) == {"a.py", ".rayignore"}


def test_files_from_elsewhere_are_shipped_and_packages_are_reproducible(here: Path, tmp_path: Path) -> None:
    write(here, "a.yaml")
    write(tmp_path, "b.yaml", "other/b.yaml")
    package = working_tree(here)
    assert package.add(Path("a.yaml")) == "a.yaml"
    names = [package.add(tmp_path / name) for name in ("b.yaml", "other/b.yaml", "b.yaml")]
    assert names == [".submitted/0/b.yaml", ".submitted/1/b.yaml", ".submitted/0/b.yaml"]
    for number in (1, 2):
        package.write(tmp_path / f"{number}.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert {name: archive.read(name).decode() for name in archive.namelist()} == {
            "a.yaml": "a.yaml",
            ".submitted/0/b.yaml": "b.yaml",
            ".submitted/1/b.yaml": "other/b.yaml",
        }


def test_a_too_large_package_is_rejected_with_its_largest_folders(here: Path) -> None:
    write(here, "a.yaml")
    for name, size in (
        ("old/weights/x", 80),
        ("old/weights/y", 30),
        ("video.mp4", 20),
        ("pics/1", 5),
        ("z", 1),
    ):
        write(here, name)
        os.truncate(here / name, size * 1024**2)
    with pytest.raises(ConfigError) as refusal:
        working_tree(here).check()
    assert str(refusal.value) == (
        f"{here}: 142.6 MB to ship, above Ray's limit of 104.9 MB; the largest parts are old/weights (115.3 MB), "
        "video.mp4 (21.0 MB), pics (5.2 MB); list files that the job does not need in a .rayignore here, or submit "
        "from the folder of your code"
    )
    with pytest.raises(ConfigError, match="more than 3 files to ship"):
        working_tree(here, max_files=3).check()


def test_the_size_limit_is_rays() -> None:
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    assert shipping.MAX_BYTES == DASHBOARD_CLIENT_MAX_SIZE


def test_the_command_names_files_as_in_the_package(here: Path, tmp_path: Path) -> None:
    write(here, "a.yaml", "sub/c.json")
    cells = PUBLISHED["ISTA_twostage"].to_json()
    (tmp_path / "g.json").write_text(cells)
    (here / "sub" / "c.json").write_text(cells)

    def packed(genotype: str, *settings: str) -> list[str]:
        options = {"config": "./a.yaml", "genotype": genotype}
        given = submission(*settings, job="retrain", options=options)
        return pack(given, working_tree(here))[-3:]

    assert packed("../g.json") == ["a.yaml", "--genotype", ".submitted/0/g.json"]
    assert packed("sub/c.json") == ["a.yaml", "--genotype", "sub/c.json"]
    for reference in ("ISTA_ImageNet", "random:3", "/shared/runs/x-search-1", "x-search"):
        assert packed(reference) == ["a.yaml", "--genotype", reference]
    space = "space.name=nas_bench_201"
    assert packed("nas_bench_201:3", space) == ["a.yaml", "--genotype", "nas_bench_201:3"]
    with pytest.raises(IstanasError, match="belongs to the space nas_bench_201, not to darts"):
        packed("nas_bench_201:3")
    for runs in (tmp_path, f"file://{tmp_path}", f"{here}/.."):
        assert packed(str(tmp_path / "g.json"), f"runtime.runs_dir={runs}")[-1] == str(tmp_path / "g.json")
    for reference in ("nope/genotype.json", "nope.json"):
        with pytest.raises(ConfigError, match=f"--genotype: no such file on this machine: {reference}"):
            packed(reference)
    with pytest.raises(ConfigError, match="random:SEED"):
        packed("random:x")
    with pytest.raises(ConfigError, match="comes from a one-stage search"):
        packed("ISTA_onestage")  # rejected before the job queues
    assert packed("ISTA_onestage", "retrain.op_batchnorm=true")[-1] == "ISTA_onestage"
    with pytest.raises(ConfigError, match="--genotype: sub is a folder on this machine, which the cluster"):
        packed("sub")


def test_plugins_are_shipped_from_anywhere_and_named_in_the_package(here: Path, tmp_path: Path) -> None:
    """One lies outside the working directory, one is ignored by git, and one is shipped anyway."""
    write(here, "ours.py", "ignored.py", "a.yaml")
    write(tmp_path, "mine.py")
    (here / ".gitignore").write_text("ignored.py")
    files = ("../mine.py", "ignored.py", "./ours.py", "../mine.py")
    given = [part for file in files for part in ("--plugin", file)]
    options = {"file": "a.yaml", "plugins": files}
    command = ("search", "--config", "a.yaml", *given[:-2], "--plugin=../mine.py")
    package = working_tree(here)
    arguments = pack(Submission("search", command, options, load(None, GOOD), "tiny", False), package)
    assert arguments == [
        *("search", "--config", "a.yaml"),
        *("--plugin", ".submitted/0/mine.py", "--plugin", ".submitted/1/ignored.py"),
        *("--plugin", "ours.py", "--plugin=.submitted/0/mine.py"),
    ]
    package.write(tmp_path / "package.zip")
    with zipfile.ZipFile(tmp_path / "package.zip") as archive:
        assert archive.read(".submitted/0/mine.py") == (tmp_path / "mine.py").read_bytes()
        assert archive.read(".submitted/1/ignored.py") == (here / "ignored.py").read_bytes()


def test_the_plugins_of_a_submitted_command_are_loaded_here(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The configuration is checked on this machine, and may name what a plugin registers."""
    (here / "own.py").write_text(
        "from istanas.data import register_dataset\nregister_dataset('own_pictures', print)\n"
    )
    search = ("search", "--set", "data.name=own_pictures", "--set", "tracking.enabled=false")
    assert run(["submit", "--", *search]) == 2
    assert "'own_pictures' is not a registered data set" in capsys.readouterr().err
    assert run(["submit", "--", *search, "--plugin", "own.py"]) == 2
    err = capsys.readouterr().err
    assert "own_pictures" not in err
    assert "runtime.runs_dir: runs would be deleted" in err
    load_plugins([])


@pytest.mark.parametrize("folder", ["../elsewhere", "runs"])
def test_a_file_of_a_run_is_not_shipped_without_the_settings_of_the_run(folder: str, here: Path) -> None:
    run_dir = make_run(here / folder / "mine-search-1").path
    (run_dir / "config.yaml").write_text("data: {name: mnist}\n")
    write(here, "a.yaml")
    file = os.path.relpath(run_dir / "genotype.json", here)
    with pytest.raises(ConfigError) as refusal:
        pack(submission(job="retrain", options={"genotype": file}), working_tree(here))
    assert str(refusal.value).startswith(f"--genotype: {file} is a file of ")
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).endswith("give --config with a file that has the settings of the retraining")
    given = submission(job="retrain", options={"config": "a.yaml", "genotype": file})
    assert pack(given, working_tree(here))[-1].endswith("genotype.json")


def test_the_shell_receives_the_arguments_unchanged() -> None:
    arguments = ["search", "--set", "data={name: 'digits'}", "--config", "my file.yaml", "$HOME;ls"]
    assert shlex.split(command_line(arguments)) == ["python", "-m", "pipeline.cli", *arguments]
    asked = ["sh", "-c", command_line(["search"], store_of_cluster=True)]
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "MLFLOW_TRACKING_URI: is not set on this node" in done.stderr


def test_a_generated_name_describes_the_job_and_is_unique() -> None:
    given = submission()
    assert given.id.startswith("search-tiny-")
    assert given.id != given.id


@pytest.mark.parametrize(
    "address", ["ray://head:10001", "auto", "local", "http://", "head:port", "ftp://head:1"]
)
def test_an_address_of_another_kind_is_rejected(address: str) -> None:
    with pytest.raises(ConfigError, match="give http://HOST:8265"):
        job_address(address)
    with pytest.raises(ConfigError, match="give http://HOST:8265"):
        JobServer(address)
