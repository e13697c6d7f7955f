"""The guide's pages: their links lead somewhere, and their commands name configurations, keys and cells that exist."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

from pipeline.cli import cli
from pipeline.config import load
from pipeline.references import genotype_to_train

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))


def commands(page: str) -> list[list[str]]:
    """The words of every `istanas` command in a page's shell blocks."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    # `istanas submit ... -- search ...` holds two commands.
    lines = [part for line in lines for part in line.replace(" -- ", "\nistanas ").splitlines()]
    return [
        shlex.split(line.replace("$seed", "0"), comments=True)
        for line in lines
        if line.startswith("istanas ")
    ]


def options(words: list[str], name: str) -> list[str]:
    """The values of a repeatable option."""
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
        for file in set(options(words, "--config")) - {"FILE"}:
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
    """It links to every page of the guide."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    assert [page for page in PAGES if f"]({page})" not in text] == []


@pytest.mark.parametrize("page", [*PAGES, "README.md"])
def test_lines_are_short(page: str) -> None:
    """Tables aside, whose rows cannot be broken."""
    text = (ROOT / page).read_text().splitlines()
    assert [line for line in text if len(line) > 120 and not line.startswith("|")] == []
