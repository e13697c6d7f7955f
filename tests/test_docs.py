"""The guide's pages: links, commands, names of files, and shell blocks that are marked as runnable."""

import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.cli.commands import cli
from pipeline.config.load import load
from pipeline.tracking.references import genotype_to_train
from tests.warm import warm_program

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))


def commands(page: str) -> list[list[str]]:
    """Return the words of every `istanas` command in a page's shell blocks."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```sh(?: runnable)?\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    # `istanas submit ... -- search ...` holds two commands.
    lines = [part for line in lines for part in line.replace(" -- ", "\nistanas ").splitlines()]
    return [
        shlex.split(line.replace("$seed", "0"), comments=True)
        for line in lines
        if line.startswith("istanas ")
    ]


def runnable_blocks(page: str) -> list[str]:
    """Return the shell blocks of a page whose first line is ```sh runnable."""
    return re.findall(
        r"^```sh runnable\n(.*?)^```", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE
    )


def written_by(page: str) -> set[str]:
    """Return the files that the runnable blocks of a page write."""
    text = "\n".join(runnable_blocks(page))
    configured = {f"{folder}.yaml" for folder in re.findall(r"^istanas new (\S+)", text, flags=re.MULTILINE)}
    return configured | set(re.findall(r"^cat > (\S+) <<", text, flags=re.MULTILINE))


RUNNABLE = [page for page in [*PAGES, "README.md"] if runnable_blocks(page)]
ELSEWHERE = {
    "docs/extending.md",  # Its blocks run in tests/integration/test_extending.py, which uses their runs.
    "docs/pictures.md",  # Its blocks run in tests/test_packaging.py, from the wheel, with pictures made there.
}


def options(words: list[str], name: str) -> list[str]:
    """Return the values of a repeatable option."""
    return [value for option, value in itertools.pairwise(words) if option == name]


def test_there_are_pages_with_commands() -> None:
    assert {"docs/reproducing.md", "docs/differences.md"} <= set(PAGES)
    assert len(commands("docs/reproducing.md")) >= 8


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_what_exists(page: str) -> None:
    for words in commands(page):
        assert words[1] in cli.commands, words
        known = {name for parameter in cli.commands[words[1]].params for name in parameter.opts}
        given = {word for word in words[2:] if word.startswith("--")}
        assert given <= known, words
        for file in set(options(words, "--config")) - {"FILE"} - written_by(page):
            config = load(ROOT / file, options(words, "--set"))
            for cell in options(words, "--genotype"):
                if cell.startswith("ISTA_"):
                    genotype_to_train(cell, config)


@pytest.mark.parametrize("page", [*PAGES, "README.md"])
def test_links_inside_the_project_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", [*PAGES, "README.md"])
def test_files_that_are_named_exist(page: str) -> None:
    names = re.findall(
        r"`((?:istanas|pipeline|tune_configs|tests|clusters)/[\w/.-]+)`", (ROOT / page).read_text()
    )
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_readme_is_a_front_page() -> None:
    """It is short and links to every page of the guide."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    site = {
        "docs/index.md",
        *(page for page in PAGES if page.startswith("docs/reference/")),
    }  # of `make docs` alone
    assert [page for page in PAGES if page not in site and f"]({page})" not in text] == []


@pytest.mark.parametrize("page", [*PAGES, "README.md"])
def test_lines_are_short(page: str) -> None:
    """Except in tables, whose rows cannot be wrapped."""
    text = (ROOT / page).read_text().splitlines()
    assert [line for line in text if len(line) > 120 and not line.startswith("|")] == []


def run_blocks(
    blocks: list[str], folder: Path, program: Sequence[str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run shell blocks in order, in a folder with `tune_configs`, its own home and its own MLflow store.

    Args:
        blocks: The blocks.
        folder: The folder.
        program: The words that start `istanas`; None: those of `warm_program`.
    """
    programs, home = folder / "bin", folder / "home"
    programs.mkdir(parents=True)
    home.mkdir()
    command = programs / "istanas"
    command.write_text(f'#!/bin/sh\nexec {shlex.join(program or warm_program())} "$@"\n')
    command.chmod(0o755)
    (folder / "tune_configs").symlink_to(ROOT / "tune_configs")
    search_path = f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "--norc", "-euo", "pipefail", "-c", "\n".join(blocks)],
        cwd=folder,
        env={**os.environ, "PATH": search_path, "HOME": str(home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=290,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in RUNNABLE if page not in ELSEWHERE])
def test_runnable_blocks_run(page: str, tmp_path: Path) -> None:
    """All blocks of a page run in one shell, so that a block may use the files of an earlier one."""
    done = run_blocks(runnable_blocks(page), tmp_path)
    assert done.returncode == 0, done.stdout


def test_a_failing_block_is_noticed(tmp_path: Path) -> None:
    """Also if a later command of the block or the last command of a pipe succeeds."""
    for number, block in enumerate(
        ["istanas --no-such-option\ntrue", "istanas draw nothing | cat", "no-such-command"]
    ):
        assert run_blocks([block, "true"], tmp_path / str(number)).returncode != 0
    assert run_blocks(["istanas --version"], tmp_path / "good").returncode == 0


def test_the_pages_with_runnable_blocks() -> None:
    assert {"docs/completion.md", "docs/reference/configuration.md", *ELSEWHERE} <= set(RUNNABLE)
