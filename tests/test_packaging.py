"""The package and the repository: imports, dependencies, licence, citation, files."""

import ast
import csv
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from ruamel.yaml import YAML

import istanas
from pipeline.base.extras import EXTRAS
from pipeline.config.load import load
from pipeline.runs.directory import RunDir
from tests.test_docs import run_blocks, runnable_blocks
from tests.textures import write_archive

PACKAGES = ("istanas", "pipeline")
TOP_LEVEL = {
    ".ci",
    ".gitignore",
    ".pre-commit-config.yaml",
    "docs",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "clusters",
    "constraints.txt",
    "istanas",
    "pipeline",
    "pyproject.toml",
    "requirements.lock",
    "tests",
    "tune_configs",
}
# The system of constraints.txt: Linux on x86-64, CPython 3.11.
TESTED_ON = {
    "python_version": "3.11",
    "python_full_version": "3.11.7",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
}
STATISTICS_OFF = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def output_of(command: list[str], folder: Path, env: dict[str, str] | None = None) -> str:
    """Run a command that must succeed, and return its output."""
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def fresh_python(code: str, root: Path, **environment: str) -> str:
    """Run code in a new interpreter without the tests' settings, and return its output."""
    env = {k: v for k, v in os.environ.items() if k not in STATISTICS_OFF} | environment
    return output_of([sys.executable, "-c", code], root, env)


def normal_name(requirement: str) -> str:
    """Return a distribution's name, normalised as in PEP 503, without extras, version and marker."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None, requirement
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def requirements_of_developers(project: dict) -> list[str]:
    """Return the requirements of `pip install -e '.[dev]'`, whose extra names the others."""
    extras = project["optional-dependencies"]
    own, *tools = extras["dev"]
    return [
        *project["dependencies"],
        *tools,
        *(each for name in Requirement(own).extras for each in extras[name]),
    ]


@pytest.fixture(scope="module")
def project(repo_root: Path) -> dict:
    return tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def files(repo_root: Path) -> list[Path]:
    """The files that git tracks or would track, relative to the root."""
    if not (repo_root / ".git").exists():
        pytest.skip("not a git checkout: the project's files are unknown")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = output_of(listing, repo_root).split("\0")
    found = [Path(name) for name in names if name and (repo_root / name).exists()]
    assert Path("istanas/__init__.py") in found
    return found


@pytest.fixture(scope="module")
def imported_by_istanas(repo_root: Path) -> set[str]:
    """The top-level modules of a new interpreter after importing all of istanas and loading the digits."""
    code = """
import importlib, json, pkgutil, sys
import istanas
def fail(name): raise ImportError(name)
for module in pkgutil.walk_packages(istanas.__path__, "istanas.", onerror=fail):
    if module.name != "istanas.small_svg":  # a backend of matplotlib, which istanas.draw imports when it draws
        importlib.import_module(module.name)
importlib.import_module("istanas.data").load_dataset("digits")
print(json.dumps(sorted(sys.modules)))
"""
    modules = json.loads(fresh_python(code, repo_root))
    assert {"istanas.draw", "istanas.errors"} <= set(modules)
    return {name.partition(".")[0] for name in modules}


def test_importing_istanas_loads_no_ray_mlflow_or_solver(imported_by_istanas: set[str]) -> None:
    assert not imported_by_istanas & {"ray", "mlflow", "optuna", "cvxpy", "mosek"}


def test_istanas_imports_no_heavy_library_before_it_is_needed(imported_by_istanas: set[str]) -> None:
    assert not imported_by_istanas & {"matplotlib", "torchvision", "sklearn", "pandas"}


def test_the_version_is_the_same_everywhere(repo_root: Path, project: dict) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", istanas.__version__)
    assert "version" in project["dynamic"]
    assert YAML(typ="safe").load(repo_root / "CITATION.cff")["version"] == istanas.__version__
    try:
        installed = importlib.metadata.version("istanas")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("istanas is not installed, only importable from here: no metadata to compare with")
    assert installed == istanas.__version__


def test_every_imported_distribution_is_declared(repo_root: Path, project: dict) -> None:
    imported: dict[str, str] = {}
    for path in (p for package in PACKAGES for p in (repo_root / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            imported |= {name.partition(".")[0]: str(path.relative_to(repo_root)) for name in names}
    assert {"numpy", "torch", "matplotlib"} <= set(imported)

    distributions = importlib.metadata.packages_distributions()
    extras = project["optional-dependencies"]
    declared = {
        normal_name(text)
        for text in project["dependencies"] + [each for name in EXTRAS for each in extras[name]]
    }
    undeclared = {
        module: path
        for module, path in imported.items()
        if module not in sys.stdlib_module_names
        and module not in PACKAGES
        and not declared & {normal_name(name) for name in distributions.get(module, [module])}
    }
    assert not undeclared


def test_the_constraints_pin_each_dependency_within_its_range(repo_root: Path, project: dict) -> None:
    lines = (repo_root / "constraints.txt").read_text().splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    pinned = {normal_name(line): line.partition("==")[2] for line in lines}
    assert len(pinned) == len(lines)
    for text in requirements_of_developers(project):
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[normal_name(requirement.name)]), text


def test_the_lock_has_the_constraints_releases_with_their_files_hashes(
    repo_root: Path, project: dict
) -> None:
    lines = (repo_root / "constraints.txt").read_text().splitlines()
    pinned = {normal_name(line): line.partition("==")[2] for line in lines if not line.startswith("#")}
    text = re.sub(r"^#.*\n", "", (repo_root / "requirements.lock").read_text(), flags=re.MULTILINE)
    locked: dict[str, str] = {}
    elsewhere = set()  # dependencies of other systems only
    for entry in text.replace("\\\n", " ").splitlines():
        requirement, *hashes = entry.split(" --hash=")
        assert hashes, entry
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64} *", digest) for digest in hashes), requirement
        parsed = Requirement(requirement)
        (version,) = [specifier.version for specifier in parsed.specifier]
        if parsed.marker is None or parsed.marker.evaluate(TESTED_ON):
            locked[normal_name(parsed.name)] = version
        else:
            elsewhere.add(normal_name(parsed.name))
    assert locked == pinned, "run `make lock`"
    assert not elsewhere & set(pinned)
    for wanted in requirements_of_developers(project):
        assert normal_name(Requirement(wanted).name) in locked


def test_the_first_part_of_the_lock_has_what_the_quick_start_needs(repo_root: Path, project: dict) -> None:
    text, _, rest = (repo_root / "requirements.lock").read_text().partition("\n# Extras and developer tools")
    first, later = (
        {normal_name(line) for line in part.splitlines() if "==" in line} for part in (text, rest)
    )
    assert first >= {normal_name(each) for each in project["dependencies"]}
    assert later >= {"onnx", "onnxruntime", "onnxscript", "opencensus", "pathspec", "pytest", "ruff"}
    assert first & later <= {"colorama"}  # with another marker


def test_make_installs_nothing_whose_hash_it_does_not_know(repo_root: Path) -> None:
    said = output_of(["make", "-n", "-B", ".venv", "PYTHON=python3"], repo_root)
    first, second = [line for line in said.splitlines() if "pip" in line]
    assert first.startswith("cat requirements.lock > .venv/lock.txt && ")
    assert "--require-hashes -r .venv/lock.txt" in first
    assert "--no-deps --no-build-isolation -e ." in second
    said = output_of(["make", "-n", "-B", ".venv", "PYTHON=python3", "LOCK="], repo_root)
    (only,) = [line for line in said.splitlines() if "pip" in line]
    assert "-c constraints.txt -e '.[dev]'" in only


def test_the_quick_start_installs_no_developer_tools(repo_root: Path) -> None:
    said = output_of(["make", "-n", "quickstart", "VENV=no-such-folder", "PYTHON=python3"], repo_root)
    first, second, run = [line for line in said.splitlines() if "/bin/" in line]
    taken = output_of(["sh", "-c", first.partition(" > ")[0]], repo_root)
    assert (repo_root / "requirements.lock").read_text().partition("# Extras")[0] == taken
    assert "--require-hashes -r no-such-folder/lock.txt" in first
    assert "--no-deps --no-build-isolation -e ." in second
    assert run == "no-such-folder/bin/istanas run --config tune_configs/digits_quickstart.yaml"


def test_the_oldest_releases_are_installed_in_their_own_environment(repo_root: Path) -> None:
    said = output_of(["make", "-n", "test-oldest", "SELECT=tests/istanas", "PYTHON=python3"], repo_root)
    *_, install, tests = said.splitlines()
    assert install.endswith("--python build/oldest/bin/python --resolution lowest-direct -e '.[dev]'")
    assert tests.startswith("build/oldest/bin/python -m pytest ")
    assert tests.endswith(" tests/istanas")
    assert ".venv" not in said


def test_cvxpy_and_mosek_import_without_a_licence(repo_root: Path, tmp_path: Path) -> None:
    code = "import cvxpy, mosek; print(cvxpy.CLARABEL in cvxpy.installed_solvers())"
    nowhere = str(tmp_path / "no-such-licence.lic")
    assert fresh_python(code, repo_root, MOSEKLM_LICENSE_FILE=nowhere, HOME=str(tmp_path)).strip() == "True"


def test_no_usage_statistics_unless_the_user_asks(repo_root: Path) -> None:
    names = list(STATISTICS_OFF)
    code = f"import json, os, pipeline; print(json.dumps({{k: os.environ.get(k) for k in {names}}}))"
    assert json.loads(fresh_python(code, repo_root)) == STATISTICS_OFF
    asked = dict.fromkeys(STATISTICS_OFF, "set by the user")
    assert json.loads(fresh_python(code, repo_root, **asked)) == asked


def test_the_citation_names_the_method_and_credits_the_space(repo_root: Path) -> None:
    citation = YAML(typ="safe").load(repo_root / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == "Apache-2.0"
    paper = citation["preferred-citation"]
    assert paper["title"].startswith("ISTA-NAS: ")
    assert paper["year"] == 2020
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Yang", "Li", "You", "Wang", "Qian", "Lin"]
    assert [reference["title"].partition(":")[0] for reference in citation["references"]] == ["DARTS"]


def test_the_licence_is_whole(repo_root: Path) -> None:
    text = (repo_root / "LICENSE").read_text()
    assert "Apache License" in text
    assert "9. Accepting Warranty or Additional Liability." in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_top_level_has_only_its_fixed_entries(files: list[Path]) -> None:
    assert not {path.parts[0] for path in files} - TOP_LEVEL


def test_no_large_file(repo_root: Path, files: list[Path]) -> None:
    assert not [str(path) for path in files if (repo_root / path).stat().st_size > 1_000_000]


def test_no_path_of_one_machine(repo_root: Path, files: list[Path]) -> None:
    # Composed of pieces, so that it does not match this file.
    pattern = re.compile(r"(?<![\w.])/" + "(work|root)/")
    found = []
    for path in files:
        try:
            text = (repo_root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        found += [f"{path}:{n}" for n, line in enumerate(text.splitlines(), 1) if pattern.search(line)]
    assert not found


def test_continuous_integration_script_runs_the_one_check(repo_root: Path) -> None:
    script = repo_root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make --no-print-directory test" in script.read_text()
    shown = output_of(["make", "-n", "test"], repo_root)
    commands = [line.partition("/bin/")[2] for line in shown.splitlines() if ".venv/bin/" in line]
    for tool in (
        "ruff check",
        "ruff format --check",
        "mypy --strict istanas",
        "mypy pipeline",
        "lint-imports",
    ):
        assert any(line.startswith(tool) for line in commands), tool
    assert commands[-1].startswith("python -m pytest")


@pytest.fixture(scope="module")
def wheel(repo_root: Path, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the committed files."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in files:
        (folder / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / path).write_bytes((repo_root / path).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    output_of(build, folder / "source")
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_the_wheel_holds_the_two_packages_and_the_configurations(wheel: Path, files: list[Path]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        scripts = next(n for n in names if n.endswith("entry_points.txt"))
        assert "istanas = pipeline.cli:main" in archive.read(scripts).decode()
    info = f"istanas-{istanas.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, "tune_configs", info}
    configurations = {str(path) for path in files if path.parts[0] == "tune_configs"}
    assert {name for name in names if name.startswith("tune_configs/")} == configurations
    expected = {str(path) for path in files if path.parts[0] in PACKAGES and path.suffix == ".py"}
    assert {name for name in names if name.endswith(".py")} == expected
    templates = {str(path) for path in files if path.parts[:3] == ("pipeline", "report", "templates")}
    assert templates
    assert {name for name in names if name.startswith("pipeline/report/templates/")} == templates
    assert "istanas/py.typed" in names
    templates = {str(path) for path in files if path.parts[:3] == ("pipeline", "report", "templates")}
    assert templates
    assert templates <= set(names)
    assert f"{info}/licenses/LICENSE" in names


def test_a_script_finds_the_package_beside_a_folder_named_pipeline(repo_root: Path, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("run = 'of the user'")
    (tmp_path / "script.py").write_text("import pipeline; print(pipeline.__file__)")
    env = {**os.environ, "PYTHONPATH": str(repo_root)}
    found = [output_of([sys.executable, *flags, "script.py"], tmp_path, env) for flags in ([], ["-P"])]
    assert [Path(each.strip()).parent for each in found] == [tmp_path / "pipeline", repo_root / "pipeline"]


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment in which the wheel is installed, with the dependencies of this one."""
    environment = tmp_path_factory.mktemp("installed") / "environment"
    venv.create(environment, with_pip=False)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    python = str(environment / "bin" / "python")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "--ignore-installed",  # this package in the environment of the tests
        str(wheel),
    ]
    output_of(install, environment)
    return environment


@pytest.mark.slow
@pytest.mark.ray
def test_an_installed_wheel_runs_beside_a_folder_named_pipeline(environment: Path, tmp_path: Path) -> None:
    """Ray puts the working directory in front of its workers' paths."""
    here = tmp_path / "here"
    (here / "pipeline").mkdir(parents=True)
    (here / "pipeline" / "__init__.py").write_text("raise RuntimeError('the package of the user')")
    settings = (
        "search={epochs: 1, batch_size: 64, init_channels: 2, layers: 3, max_pictures: 128}",
        "space.nodes=1",
        "tracking.enabled=false",
    )
    command = [
        str(environment / "bin" / "istanas"),
        "search",
        "--config",
        "digits_quickstart",
        "--workers",
        "1",
    ]
    command += [argument for each in settings for argument in ("--set", each)]
    result = json.loads(output_of([*command, "--json"], here))
    assert (here / result["run_dir"] / "genotype.json").exists()


@pytest.mark.slow
def test_the_page_on_own_pictures_leads_from_an_archive_to_a_csv(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of the page run as they are, except that the written configuration is short."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # the wheel is used, not the checkout
    write_archive(tmp_path)
    short = (
        " --set search.epochs=1 --set retrain.epochs=2 --set retrain.warmup_epochs=0 --set runtime.threads=1"
    )
    blocks = [
        block.replace("new photos\n", f"new photos{short}\n") for block in runnable_blocks("docs/pictures.md")
    ]
    assert short in "".join(blocks)
    done = run_blocks(blocks, tmp_path, [str(environment / "bin" / "istanas")])
    assert done.returncode == 0, done.stdout
    assert "240 training and 60 test pictures of 4 classes" in done.stdout
    config = load(tmp_path / "photos.yaml")
    assert (config.data.test_fraction, config.data.image_size, config.search.stem) == (0.2, 96, "imagenet")
    runs = sorted((tmp_path / "runs").glob("photos-*/run.json"))
    assert [RunDir(file.parent).read().kind for file in runs] == ["retrain", "search"]
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["file"] for row in rows}) == 300
    assert {row["class"] for row in rows} <= {"checks", "dots", "rings", "stripes"}
