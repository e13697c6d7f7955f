"""Shell completion: the protocol of the shells, the scripts of docs/completion.md, and a real bash."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli.commands import cli
from pipeline.config.choices import METRICS

SHELLS = ("bash", "zsh", "fish")


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A folder with the program `istanas`, as after an installation."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "istanas"
    script.write_text(
        f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c 'from pipeline.cli.commands import main; main()' \"$@\"\n"
    )
    script.chmod(0o755)
    return folder


def on_path(folder: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **more}


def completions(program: Path, shell: str, *words: str) -> list[str]:
    """Return the program's answers to a shell; the last word is incomplete."""
    asked = {
        "_ISTANAS_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": shlex.join(["istanas", *words]),
        "COMP_CWORD": words[-1] if shell == "fish" else str(len(words)),
    }
    done = subprocess.run(
        [program / "istanas"], env=on_path(program, **asked), capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_commands_are_completed_in_every_shell(program: Path) -> None:
    assert completions(program, "bash", "se") == ["plain,search"]
    assert completions(program, "zsh", "se")[:2] == ["plain", "search"]
    assert completions(program, "fish", "se")[0].startswith("plain,search")
    names = {line.removeprefix("plain,") for line in completions(program, "bash", "")}
    assert names == set(cli.commands)


def test_options_and_choices_are_completed(program: Path) -> None:
    assert completions(program, "bash", "config", "--js") == ["plain,--json-schema", "plain,--json"]
    metrics = completions(program, "bash", "promote", "--metric", "")
    assert metrics == [f"plain,{metric}" for metric in METRICS]
    assert completions(program, "bash", "results", "--kind", "sea") == ["plain,search"]


@pytest.mark.parametrize(
    "command", [name for name, c in cli.commands.items() if any(p.name == "file" for p in c.params)]
)
def test_configuration_files_are_completed_by_the_shell(program: Path, command: str) -> None:
    assert completions(program, "bash", command, "--config", "tune") == ["file,tune"]


def test_runs_are_completed_as_folders(program: Path) -> None:
    for command in ("export", "sync", "promote", "compare"):
        assert completions(program, "bash", command, "runs/d") == ["dir,runs/d"]
    assert completions(program, "bash", "results", "--sweep", "runs/d") == ["dir,runs/d"]
    assert completions(program, "bash", "retrain", "--genotype", "cells/g") == ["file,cells/g"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_documented_command_writes_a_script(program: Path, repo_root: Path, shell: str) -> None:
    """If the shell is installed, it also parses the script."""
    page = (repo_root / "docs" / "completion.md").read_text()
    (command,) = set(re.findall(rf"_ISTANAS_COMPLETE={shell}_source istanas", page))
    script = subprocess.run(
        command, shell=True, env=on_path(program), capture_output=True, text=True, check=True
    ).stdout
    assert f"_ISTANAS_COMPLETE={shell}_complete" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_bash_completes_a_command_and_a_choice(program: Path) -> None:
    ask = """
eval "$(_ISTANAS_COMPLETE=bash_source istanas)"
COMP_WORDS=(istanas swe); COMP_CWORD=1; _istanas_completion istanas; echo "${COMPREPLY[@]}"
COMPREPLY=(); COMP_WORDS=(istanas results --method one); COMP_CWORD=3; _istanas_completion istanas
echo "${COMPREPLY[@]}"
complete -p istanas
"""
    done = subprocess.run(
        ["bash", "--norc", "-c", ask], env=on_path(program), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "sweep",
        "one_stage",
        "complete -o nosort -F _istanas_completion istanas",
    ]
