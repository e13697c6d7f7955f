"""Options that several commands share, and their completion in a shell."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from istanas.errors import ConfigError
from istanas.methods import METHODS

Function = Callable[..., Any]

RESUMES = "run the same command again to resume"
STARTS_OVER = "nothing was stored; the same command starts over"


@contextmanager
def hint_after_interrupt(hint: str) -> Iterator[None]:
    """Let the message after an interrupt of the body end with a hint, unless the interrupt has one already.

    Args:
        hint: `RESUMES` or `STARTS_OVER`.

    Raises:
        KeyboardInterrupt: With the hint, instead of one without a text.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if str(error):
            raise
        raise KeyboardInterrupt(hint) from None


class Command(click.Command):
    """A command of istanas: what its message after an interrupt says, and its error about an unexpected argument.

    Args:
        arguments: As for `click.Command`.
        resumes: Whether the same command resumes after an interrupt. Otherwise it starts over.
        settings: As for `click.Command`.
    """

    allow_extra_args = True  # for `parse_args`

    def __init__(self, *arguments: Any, resumes: bool = False, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.hint = RESUMES if resumes else STARTS_OVER

    def make_context(self, *arguments: Any, **settings: Any) -> click.Context:
        """Parse the arguments, which also loads the plugins."""
        with hint_after_interrupt(self.hint):
            return super().make_context(*arguments, **settings)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments.

        Raises:
            click.UsageError: An argument is wrong, or there are too many.
        """
        rest = super().parse_args(ctx, args)
        if ctx.args and not ctx.resilient_parsing:
            extra = ctx.args[0]
            has_config = any("--config" in param.opts for param in self.params)
            meant = has_config and _is_configuration(extra)
            remedy = f"did you mean --config {shlex.quote(extra)}?" if meant else "leave it out"
            raise click.UsageError(f"{extra!r:.80}: an unexpected argument; {remedy}", ctx)
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with hint_after_interrupt(self.hint):
            return super().invoke(ctx)


def _is_configuration(argument: str) -> bool:
    """Return whether an argument names a YAML file, or a configuration of the package."""
    from pipeline.config.load import shipped_files

    return Path(argument).suffix in (".yaml", ".yml") or argument in shipped_files()


def complete_file(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete the name of a file."""
    return [CompletionItem(incomplete, type="file")]


def complete_folder(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete the name of a folder, such as a run directory."""
    return [CompletionItem(incomplete, type="dir")]


def complete_method(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete the name of a search method."""
    return [CompletionItem(name) for name in METHODS if name.startswith(incomplete)]


GIVEN_PLUGINS = "istanas.plugins"
"""The key of a command's `click.Context.meta` that holds the files of --plugin as they were given."""


def _load_plugins(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> None:
    """Load the plugins before anything else of a command, because its configuration may depend on them."""
    if ctx.resilient_parsing:  # a shell that completes must not execute them
        return
    from pipeline.config.plugins import load_plugins

    load_plugins(value)
    ctx.meta[GIVEN_PLUGINS] = value


_FILE = "Configuration file (YAML), or the name of one that istanas config --list shows."
_PLACES = "runs and mlflow.db in the working directory (the store may also be named by MLFLOW_TRACKING_URI)"


def config_options(command: Function) -> Function:
    """Add the options of a command whose configuration says what to do."""
    default = "Without it, the configuration of the handwritten digits is used."
    return _config_options(command, f"{_FILE} {default}")


def store_options(command: Function) -> Function:
    """Add the options of a command whose configuration only says where runs are found."""
    return _config_options(
        command,
        f"{_FILE} It only says where runs are found: the folder runtime.runs_dir and the MLflow store tracking.uri. "
        f"Without it, these are {_PLACES}.",
    )


def run_options(command: Function) -> Function:
    """Add the options of a command that uses the configuration of a run, unless another one is given."""
    return _config_options(
        command,
        f"{_FILE} It replaces the configuration of RUN, and says where RUN is found: in the folder runtime.runs_dir or "
        f"the MLflow store tracking.uri. Without it, RUN keeps its own configuration and is looked up in {_PLACES}.",
    )


def _config_options(command: Function, help_of_config: str) -> Function:
    command = click.option(
        "--plugin",
        multiple=True,
        metavar="FILE",
        shell_complete=complete_file,
        callback=_load_plugins,
        expose_value=False,
        is_eager=True,
        help="Python file that registers your own operations, spaces, methods or data sets; repeatable. The file is "
        "executed.",
    )(command)
    return click.option(
        "--config", "file", metavar="FILE|NAME", shell_complete=complete_file, help=help_of_config
    )(set_option(command))


def set_option(command: Function) -> Function:
    """Add --set, which overrides settings."""
    return click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY.PATH=VALUE",
        help="Override a setting of the configuration; repeatable. istanas config --describe explains the keys.",
    )(command)


class Workers(click.ParamType):
    """The parameter type of --workers."""

    name = "workers"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from pipeline.config.workers import parse_workers

        try:
            return str(parse_workers(value))
        except ConfigError as error:
            self.fail(f"{error.problem}; {error.remedy}", param, ctx)


def placement_options(command: Function) -> Function:
    """Add the options that decide where workers run. Each sets a key of `runtime`."""
    command = click.option(
        "--address",
        metavar="ADDR",
        help="Ray cluster to run on: HOST:PORT of its head node, or auto (the cluster that this machine belongs to). "
        "Without it, RAY_ADDRESS is used if it is set, and otherwise this machine. From outside: istanas submit.",
    )(command)
    return click.option(
        "--workers",
        type=Workers(),
        metavar="N|MIN:MAX",
        help="Number of Ray Train workers; MIN:MAX lets the number follow the cluster. 0 runs the job in this process, "
        "without Ray.",
    )(command)


def job_options(command: Function) -> Function:
    """Add the options that every job has."""
    command = click.option(
        "--fresh", is_flag=True, help="Delete the contents of the run directory, and start over."
    )(command)
    return config_options(placement_options(json_option(command)))


def csv_option(what: str) -> Callable[[Function], Function]:
    """Return the option --csv, see `pipeline.cli.output.check_csv` and `write_csv`.

    Args:
        what: What the file has, for the help.
    """
    return click.option(
        "--csv",
        "csv_file",
        type=click.Path(path_type=Path, allow_dash=True),
        help=f"Write {what} to this file (CSV); - is stdout.",
    )


def json_option(command: Function) -> Function:
    """Add --json, which prints the result for programs."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object as the last line on stdout."
    )(command)
