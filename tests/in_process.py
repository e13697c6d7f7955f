"""A command line in this process, for tests that do not need a process of its own: each start of one takes seconds."""

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cli.commands import run


@dataclass(frozen=True)
class Done:
    """A command that has ended: its exit code, and what it wrote."""

    code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> Any:
        """The JSON object that a command with `--json` writes as the last line of stdout."""
        return json.loads(self.stdout.splitlines()[-1])


def istanas(folder: Path, arguments: Sequence[str], code: int = 0) -> Done:
    """Run a command in a folder, and check its exit code."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        done = Done(run(list(arguments)), out.getvalue(), err.getvalue())
    assert done.code == code, f"exit code {done.code}:\n{done.stdout}{done.stderr}"
    return done
