"""Fixtures of the tests of the command line: a working directory, and commands in this process."""

from pathlib import Path

import pytest

from pipeline.cli.commands import run
from tests.pipeline.cli.tiny_commands import TINY, Command, Outcome


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a tiny configuration; runs and stores are written there."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def istanas(here: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def command(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = run(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return command
