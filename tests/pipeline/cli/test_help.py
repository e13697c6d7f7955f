"""Help and arguments: every command has help, and every mistake is one line with exit code 2."""

import re
from pathlib import Path

import pytest

from pipeline.cli.commands import cli
from tests.pipeline.cli.tiny_commands import (
    COMMANDS,
    SERVED,
    WITHOUT_CONFIG,
    WITHOUT_SET,
    Command,
    error_lines,
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(istanas: Command, command: str) -> None:
    code, out, err = istanas(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: istanas {command} ")
    assert ("--set KEY.PATH=VALUE" in out) == (command not in WITHOUT_SET)
    assert ("--config FILE" in out) == (command not in WITHOUT_CONFIG)
    assert ("--address URL" in out) == (command in SERVED)
    jobs = command in ("search", "retrain", "run", "sweep", "benchmark", "versus", "rank")
    assert ("--fresh" in out) == jobs
    for option in ("--workers N|MIN:MAX", "--address ADDR"):
        assert (option in out) == (jobs or command == "doctor")


@pytest.mark.parametrize(
    "command", ["predict", "results", "compare", "ui", "evaluate", "export", "promote", "sync"]
)
def test_the_help_says_what_a_configuration_is_for(istanas: Command, command: str) -> None:
    text = " ".join(istanas(command, "--help")[1].split())
    assert "handwritten digits" not in text
    assert "runtime.runs_dir" in text
    assert ("It only says where runs are found" in text) == (
        command in ("predict", "results", "compare", "ui")
    )


def test_help_lists_the_commands(istanas: Command) -> None:
    assert tuple(sorted(COMMANDS)) == tuple(sorted(cli.commands))
    code, out, err = istanas()
    assert code == 2
    assert "Usage: istanas" in out + err


def test_help_groups_the_commands_with_a_whole_line_each(
    istanas: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 80 columns, no line is cut off or wrapped, and every command is in exactly one group."""
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = istanas("--help")
    assert code == 0
    groups = out.partition("Search and train:\n")[2]
    headings = [line for line in groups.splitlines() if line.endswith(":")]
    assert headings == ["Prediction:", "Results:", "Benchmarks:", "Cluster:", "Tools:"]
    entries = [line for line in groups.splitlines() if line.startswith("  ")]
    assert sorted(line.split()[0] for line in entries) == sorted(COMMANDS)
    assert all(re.fullmatch(r"  [a-z]+ +[A-Z].*[^.]\.", line) for line in entries), entries
    assert max(map(len, entries)) <= 80


def test_the_version_is_that_of_the_package(istanas: Command) -> None:
    import istanas as package

    assert package.__version__ in istanas("--version")[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serch"], "serch"),
        (["search", "--bogus"], "--bogus"),
        (
            ["search", "extra"],
            "error: 'extra': an unexpected argument; leave it out. See: istanas search --help",
        ),
        (["run", "tiny.yaml"], "did you mean --config tiny.yaml? See: istanas run --help"),
        (
            ["doctor", "one_stage_digits"],
            "did you mean --config one_stage_digits? See: istanas doctor --help",
        ),
        (
            ["pack", "pictures", "tiny.yaml", "--out", "x"],
            "'tiny.yaml': an unexpected argument; leave it out. ",
        ),
        (["evaluate", "nothing", "--out", "x"], "leave it out. See: istanas evaluate --help"),
        (["retrain"], "--genotype"),
        (["sync"], "RUN"),
        (["promote"], "RUN"),
        (["promote", "nothing"], "nothing"),
        (["promote", "nothing", "--metric", "top1"], "valid/top1"),
        (["compare"], "RUN: 0 given, name at least two runs to compare"),
        (["compare", "one"], "RUN: 1 given, name at least two runs to compare"),
        (["compare", "one", "two"], "run 'one': unknown"),
        (["results", "--kind", "trial"], "--kind"),
        (["results", "--method", "dart"], "method 'dart': unknown; choose two_stage, one_stage"),
        (["results", "--dataset", "cifar"], "dataset 'cifar': unknown; choose digits, cifar10"),
        (["results", "--sweep", "x", "--where", "a"], "--where: --sweep has all trials of one run"),
        (["results", "--one-stage", "--method", "one_stage"], "--method: --one-stage takes --dataset only"),
        (["results", "--one-stage", "--sweep", "x"], "different tables; give one of them"),
        (["draw"], "FILE"),
        (["predict", "nothing"], "FILE|DIR"),
        (["predict", "nothing", "a.png"], "run 'nothing': unknown"),
        (["evaluate", "nothing"], "run 'nothing': unknown"),
        (["evaluate", "nothing", "--out", "x"], "without --data"),
        (["predict", "models:/x", "a.png"], "write models:/NAME@ALIAS or models:/NAME/VERSION"),
        (["predict", "x", "a.png", "--json", "--csv", "-"], "give one of them"),
        (["search", "--set"], "--set"),
        (["ui", "--port", "http"], "http"),
        (["search", "--set", "search.epoch=3"], "did you mean epochs?"),
        (["search", "--set", "search.epochs"], "not of the form key.path=value"),
        (["search", "--set", "search.epochs=ten"], "search.epochs: 'ten' is invalid"),
        (["search", "--config", "absent.yaml"], "absent.yaml: cannot be read"),
        (
            ["run", "--config", "tiny.yaml", "--set", "search.max_pictures=5000"],
            "search.max_pictures: 5000 is above",
        ),
        (["retrain", "--genotype", "ISTA_twostag"], "ISTA_twostage"),
        (["retrain", "--genotype", "random:x"], "random:SEED"),
        (["retrain", "--genotype", "tiny.yaml"], "tiny.yaml"),
        (["draw", "nothing"], "nothing"),
        (["sync", "nothing"], "nothing"),
        (["results", "--set", "runtime.threads=none"], "runtime.threads"),
        *(
            ([*command, *wrong], says)
            for command in (["search"], ["retrain", "--genotype", "random:0"], ["run"], ["doctor"])
            for wrong, says in (
                (
                    ["--workers", "abc"],
                    "'abc' is not a number of workers; give a number or MIN:MAX, such as 2 or 1:4",
                ),
                (
                    ["--address", "somewhere"],
                    "runtime.workers: 0 runs the job in this process, not on the cluster at runtime.address",
                ),
            )
        ),
        (["search", "--workers", "4:1"], "'4:1' is not"),
        (["search", "--workers", "-1"], "'-1' is not"),
        (["search", "--workers"], "--workers"),
        (["search", "--set", "runtime.workers=abc"], "runtime.workers: 'abc' is not a number"),
        (
            ["search", "--set", "runtime.workers=2", "--workers", "0", "--address", "somewhere"],
            "runtime.address",
        ),
        (
            ["search", "--config", "tiny.yaml", "--workers", "33"],
            "search.batch_size: 64 is too small for 33 workers; use at least 66, or lower",
        ),
        (
            ["run", "--config", "tiny.yaml", "--workers", "1:20", "--set", "retrain.batch_size=39"],
            "retrain.batch_size: 39 is too small for 20 workers; use at least 40, or lower",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_bad_argument_or_configuration_is_one_line_and_exit_code_2(
    istanas: Command, here: Path, arguments: list[str], says: str
) -> None:
    code, out, err = istanas(*arguments)
    (line,) = error_lines(err)
    assert code == 2
    assert says in line
    assert out == ""


def test_every_mistake_of_a_configuration_has_its_line(istanas: Command) -> None:
    code, _, err = istanas(
        "search", "--set", "search.epochs=0", "--set", "retrain.layers=x", "--set", "seed=-1"
    )
    assert code == 2
    assert len(error_lines(err)) == 3


def test_data_that_is_not_there_is_a_failed_job_in_one_line(istanas: Command, here: Path) -> None:
    code, _, err = istanas("search", "--config", "tiny.yaml", "--set", "data={name: folder, root: nowhere}")
    (line,) = error_lines(err)
    assert code == 1
    assert "nowhere" in line


def test_a_folder_that_cannot_be_written_is_one_line(istanas: Command, here: Path) -> None:
    (here / "file").write_text("")
    code, _, err = istanas("search", "--config", "tiny.yaml", "--set", "runtime.runs_dir=file/runs")
    (line,) = error_lines(err)
    assert code == 1
    assert "Not a directory" in line
