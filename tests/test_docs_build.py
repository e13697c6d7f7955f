"""The documentation's site builds without a warning, its links are checked, and its reference is complete."""

import html
import importlib
import inspect
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import click
import pytest

import istanas.measure
import istanas.nets
import istanas.space
import istanas.sparse
from pipeline.cli.commands import cli
from pipeline.config.describe import all_keys

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = {
    **{f"istanas.{name}": getattr(istanas, name).__all__ for name in ("sparse", "space", "nets")},
    "istanas.measure": ["count_params", "count_macs"],
    "pipeline.report": [f"{name}_frame" for name in ("results", "searches", "epochs", "genotypes", "sweeps")],
}

pytestmark = pytest.mark.slow


def build(docs: Path, out: Path, builder: str = "html") -> "subprocess.CompletedProcess[str]":
    """Build a site with the options of `make docs`."""
    options = ["-E", "-W", "--keep-going", "-q", "-b", builder, "-d", str(out.with_name("doctrees"))]
    command = [sys.executable, "-m", "sphinx", *options, str(docs), str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site, which `make docs` must build in less than two minutes of CPU time."""
    out = tmp_path_factory.mktemp("docs") / "html"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = build(ROOT / "docs", out)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "")
    assert 0 < after.ru_utime - before.ru_utime < 120
    return out


def text_of(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text()))


def test_make_docs_treats_warnings_as_errors() -> None:
    shown = subprocess.run(
        ["make", "-n", "docs"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "-m sphinx -E -W --keep-going -q -b html docs build/docs" in shown


def test_every_key_is_in_the_reference_with_its_default(site: Path) -> None:
    text = text_of(site / "reference" / "configuration.html")
    for key in all_keys():
        assert key.path in text
        for variant in key.variants.values():
            assert variant.meaning.replace("`", "") in text, key.path
            assert variant.type in text, key.path
            assert variant.shown_default in text, key.path


def test_every_command_and_option_is_in_the_reference(site: Path) -> None:
    text = text_of(site / "reference" / "commands.html")
    for name, command in cli.commands.items():
        assert f"istanas {name}" in text
        section = text[text.index(f"\nistanas {name} ") :]
        for option in command.params:
            if isinstance(option, click.Option):
                assert f"{option.opts[0]}" in section, (name, option.opts)
                assert (option.help or "?").replace("`", "") in section, (name, option.opts)


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    page = (site / "reference" / "python.html").read_text()
    assert 'id="istanas.space.published.PUBLISHED"' in page
    for module, names in PUBLIC.items():
        documented = set(re.findall(rf'id="{re.escape(module)}\.(\w+)"', page))
        there = {name: getattr(importlib.import_module(module), name) for name in names}
        wanted = {
            name for name, value in there.items() if inspect.isclass(value) or inspect.isfunction(value)
        }
        assert wanted <= documented
        assert wanted


def test_norms_in_docstrings_stay_as_they_are_written(site: Path) -> None:
    assert "largest |z|; among equal entries" in text_of(site / "reference" / "python.html")


BROKEN = {
    "[x](nowhere.md)": "cross-reference target not found: 'nowhere.md'",
    "[x](other.md#nothing)": "local id not found in doc 'other': 'nothing'",
    "[x](../nowhere.yaml)": "cross-reference target not found: '../nowhere.yaml'",
    "![x](images/nowhere.png)": "image file not readable: images/nowhere.png",
}


def build_with(links: Iterable[str], tmp_path: Path) -> "subprocess.CompletedProcess[str]":
    """Build a small site whose first page has these links."""
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in ("conf.py", "_ext"):
        copy = shutil.copytree if (ROOT / "docs" / name).is_dir() else shutil.copyfile
        copy(ROOT / "docs" / name, docs / name)
    (tmp_path / "CONTRIBUTING.md").write_text("# Contributing\n")
    (docs / "other.md").write_text("# Other\n\n## Heading\n")
    text = "\n\n".join(links)
    (docs / "index.md").write_text(f"# Index\n\n{text}\n\n```{{toctree}}\nother\n```\n")
    return build(docs, tmp_path / "html", builder="dummy")


def test_every_broken_link_is_an_error_of_the_build(tmp_path: Path) -> None:
    """One build of seconds has all of them: each is a warning, which `make docs` treats as an error."""
    done = build_with(BROKEN, tmp_path)
    assert done.returncode == 1
    assert [says for says in BROKEN.values() if says not in done.stderr] == []
    assert done.stderr.count("WARNING") == len(BROKEN), done.stderr


def test_links_to_a_heading_and_to_a_file_of_the_repository_are_good(tmp_path: Path) -> None:
    """A link to a file of the repository outside of docs/ becomes the file's name."""
    done = build_with(["[x](other.md#heading)", "[x](../CONTRIBUTING.md)"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
