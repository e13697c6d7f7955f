"""SECURITY.md has the ports of the files in clusters/, the limits of the code, and names that exist."""

import re
from pathlib import Path

import pytest

from istanas import limits
from pipeline.cluster.submit import STORE

PORTS = r"(?:--port[= ]|--dashboard-port=|--ray-client-server-port=|containerPort: |PORT:-|http://[\w.]+:|port=)(\d{4,5})\b"


@pytest.fixture(scope="module")
def policy(repo_root: Path) -> str:
    return (repo_root / "SECURITY.md").read_text()


def rows(policy: str) -> list[list[str]]:
    table = policy.partition("## Ports")[2].partition("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_table_has_every_port_of_the_cluster_files_and_no_other(repo_root: Path, policy: str) -> None:
    used = {
        port for path in (repo_root / "clusters").iterdir() for port in re.findall(PORTS, path.read_text())
    }
    told = {port for row in rows(policy) for port in re.findall(r"\b\d{4,5}\b", row[1])}
    assert {"6379", "8265", "5000"} <= used
    assert used <= told
    assert told - used == {"8080", "10001"}, "optuna-dashboard's and Ray Client's, which no file here names"


def test_the_table_has_the_address_and_authentication_of_each_service(policy: str) -> None:
    for what, _, address, who in rows(policy):
        assert re.search(r"127\.0\.0\.1|network|as the head", address), what
        assert re.search(r"token|password|none", who), what


def test_the_limits_are_those_of_the_code(policy: str) -> None:
    megabytes, nodes, picks = limits.GENOTYPE_BYTES // limits.MB, limits.GENOTYPE_NODES, limits.GENOTYPE_PICKS
    assert f"at most {megabytes} MB, {nodes} nodes and {picks} inputs" in policy


def test_the_names_in_it_exist(repo_root: Path, policy: str) -> None:
    assert STORE in policy
    for name in re.findall(r"`((?:pipeline|istanas|clusters|tests|\.ci)/[\w./]+)`", policy):
        assert (repo_root / name).exists(), name
    makefile = (repo_root / "Makefile").read_text()
    for target in re.findall(r"`make ([\w.]+)`", policy):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


def test_the_readme_links_to_it(repo_root: Path) -> None:
    assert "](SECURITY.md)" in (repo_root / "README.md").read_text()
