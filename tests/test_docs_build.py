"""The documentation's site: it builds without a warning, its links are checked, and its reference is complete."""

import html
import importlib
import inspect
import re
import resource
import shutil
import subprocess
import sys
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
    """The built site; its CPU time stays below the two minutes that `make docs` may take."""
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
    assert "largest |z|; of equal entries" in text_of(site / "reference" / "python.html")


@pytest.mark.parametrize(
    ("link", "says"),
    [
        ("[x](nowhere.md)", "cross-reference target not found: 'nowhere.md'"),
        ("[x](other.md#nothing)", "local id not found in doc 'other': 'nothing'"),
        ("[x](../nowhere.yaml)", "cross-reference target not found: '../nowhere.yaml'"),
        ("![x](images/nowhere.png)", "image file not readable: images/nowhere.png"),
        ("[x](other.md#heading)", ""),
        ("[x](../CONTRIBUTING.md)", ""),
    ],
)
def test_a_broken_link_fails_the_build(tmp_path: Path, link: str, says: str) -> None:
    """A link to a file of the repository outside docs/ becomes the file's name."""
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in ("conf.py", "_ext"):
        copy = shutil.copytree if (ROOT / "docs" / name).is_dir() else shutil.copyfile
        copy(ROOT / "docs" / name, docs / name)
    (tmp_path / "CONTRIBUTING.md").write_text("# Contributing\n")
    (docs / "other.md").write_text("# Other\n\n## Heading\n")
    (docs / "index.md").write_text(f"# Index\n\n{link}\n\n```{{toctree}}\nother\n```\n")
    done = build(docs, tmp_path / "html", builder="dummy")
    if says:
        assert done.returncode == 1
        assert says in done.stderr
    else:
        assert (done.returncode, done.stderr) == (0, "")
