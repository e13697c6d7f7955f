"""Planted secrets: jobs with passwords and tokens in their environment write none of them to any file or stream."""

import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.mlflow_server import server
from tests.ports import unused_port
from tests.ray_cluster import ENVIRONMENT, PROGRAM

# All secrets differ, and each one has characters that an address encodes.
SECRETS = {
    name: f"planted+{name}/{number}f3a91="
    for number, name in enumerate(
        ["uri", "password", "token", "aws-key", "aws-session", "ray", "storage", "command", "failing"],
        start=3,
    )
}
CONFIG = f"""
data: {{name: digits, holdout: 0.2, cache_dir: cache}}
space: {{nodes: 1, sparsity: 1}}
search: {{epochs: 1, max_pictures: 64, batch_size: 32, init_channels: 2, layers: 3, cutout: 2}}
retrain: {{epochs: 1, batch_size: 512, init_channels: 2, layers: 1, auxiliary_weight: 0, cutout: 2}}
runtime: {{threads: 1, device: cpu}}
sweep:
  trials: 2
  max_concurrent: 1
  storage: "sqlite:///file:PLACE/study.db?uri=true&password={quote(SECRETS["storage"], safe="")}"
  space: {{search.lr: {{choice: [0.1, 0.2]}}}}
"""

ONE_AFTER_ANOTHER = """
import json, sys
from pipeline.cli.commands import run
for command in json.loads(sys.argv[1]):
    print(f"exit code {run(command)}", flush=True)
"""

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]


def forms(secret: str) -> set[bytes]:
    """Return a secret in plain text, in an address, in JSON, and in base64 at every offset."""
    raw = secret.encode()
    found = {
        raw,
        quote(secret, safe="").encode(),
        quote(secret).encode(),
        secret.replace("/", "\\/").encode(),
    }
    for before in range(3):
        text = base64.b64encode(b"x" * before + raw)
        # The first and last characters also depend on the text around the secret.
        found.add(text[4 if before else 0 : -4])
    return found


def test_a_planted_secret_is_found_in_every_form() -> None:
    secret = SECRETS["token"]
    for text in (
        secret,
        f"http://me:{quote(secret, safe='')}@host",
        json.dumps({"a": secret}),
        base64.b64encode(f"me:{secret}".encode()).decode(),
        base64.b64encode(f"them:{secret}:".encode()).decode(),
        base64.b64encode(secret.encode()).decode(),
    ):
        assert any(form in text.encode() for form in forms(secret)), text


def leaks(content: bytes) -> set[str]:
    return {name for name, secret in SECRETS.items() if any(form in content for form in forms(secret))}


class Place:
    """A folder in which commands run with planted secrets; `said` is their output.

    Args:
        folder: The folder.
        store: Address of the MLflow server, without a password.
    """

    def __init__(self, folder: Path, store: str) -> None:
        self.folder, self.said = folder, b""
        self.config = folder / "tiny.yaml"  # has a secret, as a user may write one
        self.config.write_text(CONFIG.replace("PLACE", str(folder)))
        address = store.replace("://", f"://planted:{quote(SECRETS['uri'], safe='')}@")
        self.environment = {
            **ENVIRONMENT,
            "MLFLOW_TRACKING_URI": address,
            "MLFLOW_TRACKING_USERNAME": "planted",
            "MLFLOW_TRACKING_PASSWORD": SECRETS["password"],
            "MLFLOW_TRACKING_TOKEN": SECRETS["token"],
            "AWS_ACCESS_KEY_ID": "PLANTED",
            "AWS_SECRET_ACCESS_KEY": SECRETS["aws-key"],
            "AWS_SESSION_TOKEN": SECRETS["aws-session"],
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": SECRETS["ray"],
        }

    def run(self, *arguments: str, code: int = 0, **environment: str) -> str:
        return self._call([*PROGRAM, *arguments], code, environment)

    def run_all(self, commands: Sequence[tuple[int, Sequence[str]]], **environment: str) -> str:
        """Run commands, each with its exit code, in one process: each start of Python takes seconds."""
        codes, lines = [str(code) for code, _ in commands], json.dumps([line for _, line in commands])
        said = self._call([sys.executable, "-c", ONE_AFTER_ANOTHER, lines], 0, environment)
        assert re.findall(r"^exit code (\d+)$", said, re.MULTILINE) == codes, said
        return said

    def _call(self, command: list[str], code: int, environment: dict[str, str]) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=600,
        )
        self.said += done.stdout
        assert done.returncode == code, done.stdout.decode()
        return done.stdout.decode()

    def found(self, fewest: int) -> dict[str, set[str]]:
        """Return the secrets in each place: all files, of which there are more than `fewest`, and the output."""
        written = {
            path: path.read_bytes()
            for path in self.folder.rglob("*")
            if path.is_file() and path != self.config
        }
        assert len(written) > fewest
        places = {str(path.relative_to(self.folder)): leaks(content) for path, content in written.items()}
        return {place: names for place, names in {**places, "printed": leaks(self.said)}.items() if names}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A folder with an MLflow server, whose database, files and log are searched, too."""
    folder, port = tmp_path_factory.mktemp("secrets"), unused_port()
    (folder / "mlflow").mkdir()
    with server(folder / "mlflow", port):
        yield Place(folder, f"http://127.0.0.1:{port}")


def test_jobs_on_workers_and_a_sweep_write_no_secret(place: Place) -> None:
    config = ("--config", "tiny.yaml")
    # One address is given on the command line, another one in the environment.
    given, secret = (quote(SECRETS[name], safe="") for name in ("uri", "command"))
    uri = place.environment["MLFLOW_TRACKING_URI"].replace(given, secret)
    place.run("search", *config, "--workers", "1", "--set", f"tracking.uri={uri}")
    found, trained = str(next(place.folder.glob("runs/tiny-search-*"))), "tiny-retrain"
    place.run("sweep", *config)
    (Path(found) / "mlflow.json").unlink()  # `sync` writes it again.
    commands = [
        ["retrain", *config, "--genotype", found],
        ["results", *config],
        ["export", *config, trained],
        ["promote", *config, trained],
        ["compare", *config, found, trained, "--out", "page"],
        ["draw", *config, found],
        ["sync", found],
    ]
    assert "search" in place.run_all([(0, command) for command in commands])
    runs = {path.name for path in (place.folder / "runs").iterdir()}
    assert {name.split("-")[1] for name in runs if name.startswith("tiny-")} == {"search", "retrain", "sweep"}
    logs = list(place.folder.glob("runs/*/ray/**/*"))
    assert any(path.suffix in (".log", ".out", ".err") for path in logs), "Ray's logs are searched too"
    assert (place.folder / "study.db").is_file()
    assert list(place.folder.glob("runs/*/trial-*/trial.log"))
    assert {path.name for path in place.folder.iterdir()} >= {"page", "cells"}
    assert not place.found(50)


def test_errors_show_an_address_without_its_secrets(place: Place) -> None:
    secret = quote(SECRETS["failing"], safe="")
    nowhere = f"http://planted:{secret}@127.0.0.1:{unused_port()}"
    quick = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    config = ("--config", "tiny.yaml")
    storage = f"postgresql://planted:{secret}@127.0.0.1:1/db?sslpassword={secret}"
    said = place.run_all(
        [
            (0, ["search", *config, "--set", "seed=2"]),
            (1, ["sweep", *config, "--set", f"sweep.storage={storage}", "--set", "seed=3"]),
            (1, ["sweep", *config, "--set", f"sweep.storage=nosuch://x:{secret}@h/db", "--set", "seed=4"]),
            (2, ["results", *config]),
            (2, ["compare", *config, "a" * 32, "b" * 32]),
            (2, ["search", *config, "--set", f"runtime.address=ray://planted:{secret}@127.0.0.1:1"]),
            (2, ["search", *config, "--set", f"tracking={{uri: [{nowhere}]}}"]),
            (2, ["search", *config, "--set", f"runtime.runs_dir=s3://planted:{secret}@bucket/runs"]),
            (2, ["search", "--config", f"http://planted:{secret}@127.0.0.1/tiny.yaml"]),
            (2, ["draw", f"http://planted:{secret}@127.0.0.1/genotype.json"]),
            (1, ["doctor", *config]),
        ],
        MLFLOW_TRACKING_URI=nowhere,
        **quick,
    )
    assert "127.0.0.1" in said.partition("exit code")[0], "the store that can't be reached is named"
    assert not place.found(15)
