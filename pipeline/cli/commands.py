"""The entry point of the command line `istanas`. Each section of the help has a module with its commands.

Exit codes: 0 done, 1 failed job, 2 bad argument or configuration, 129 terminal closed (SIGHUP), 130 interrupted, 143
terminated (SIGTERM). Errors are one line each on stderr. The modules of this package import only cheap modules at their
top, because every completion in a shell imports them; a command imports the rest when it runs.
"""

from __future__ import annotations

import itertools
import logging
import signal
import sys
import warnings
from typing import Any

import click

from istanas import __version__
from istanas.errors import ConfigError, GenotypeError, IstanasError
from pipeline.base.files import is_full, is_out_of_memory
from pipeline.base.home_folder import ensure_usable_home
from pipeline.base.interruption import HUNG_UP, INTERRUPTED, TERMINATED, signals_interrupt
from pipeline.cli import benchmarks, cluster, prediction, results, search_and_train, tools
from pipeline.cli.options import RESUMES
from pipeline.cli.output import printable
from pipeline.cli.streams import ignore_closed_readers

ENDS = {
    signal.SIGINT: ("interrupted", INTERRUPTED),
    signal.SIGTERM: ("terminated (SIGTERM)", TERMINATED),
    signal.SIGHUP: ("the terminal was closed (SIGHUP)", HUNG_UP),
}
"""Signal -> message and exit code of a command that it terminated."""

SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "Search and train": search_and_train.COMMANDS,
    "Prediction": prediction.COMMANDS,
    "Results": results.COMMANDS,
    "Benchmarks": benchmarks.COMMANDS,
    "Cluster": cluster.COMMANDS,
    "Tools": tools.COMMANDS,
}
"""The sections of `istanas --help` with their commands, in the order of the help."""


def main() -> None:
    """Entry point of the console script."""
    ignore_closed_readers()
    sys.exit(run(leaving=True))


def run(arguments: list[str] | None = None, *, leaving: bool = False) -> int:
    """Run one command line and return its exit code.

    Args:
        arguments: The arguments without the program's name; None for those of the process.
        leaving: Whether the process exits after this call.
    """
    signals: list[int] = []
    try:
        with signals_interrupt(leaving=leaving) as signals:
            return _run(arguments)
    except (click.Abort, KeyboardInterrupt) as error:  # outside the `with`, which ignores further signals
        what, code = ENDS[signal.Signals(signals[0]) if signals else signal.SIGINT]
        cause = error.__cause__ if isinstance(error, click.Abort) else error
        # Of the command, see `options.hint_after_interrupt`.
        hint = str(cause) if isinstance(cause, KeyboardInterrupt) else ""
        click.echo(f"{what}: {hint or RESUMES}", err=True)
        return code


def _run(arguments: list[str] | None) -> int:
    try:
        # Without the standalone mode, click returns the code of an Exit, or the command's return value, which is None.
        return cli.main(args=arguments, prog_name="istanas", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "istanas"
        problem = " ".join(error.format_message().split())
        stop = "" if problem.endswith((".", "?", "!")) else "."
        click.echo(f"error: {problem}{stop} See: {path} --help", err=True)
        return 2
    except IstanasError as error:
        for line in str(error).splitlines():
            click.echo(f"error: {printable(line)}", err=True)
        return 2 if isinstance(error, ConfigError | GenotypeError) else 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = f" ({printable(str(error).splitlines()[0]):.200})" if str(error) else ""
        remedy = "free some, or use a smaller batch_size, fewer init_channels or layers"
        click.echo(f"error: out of memory{reason}: {remedy}", err=True)
        return 1
    except OSError as error:  # a full disk, a folder that may not be written
        if error.strerror is None:  # a bug, not an error of the system: show the traceback
            raise
        where = f"{error.filename}: " if error.filename else ""
        remedy = "correct the path or its permissions"
        if is_full(error):
            remedy = "free space there (old runs, their ray folders, mlartifacts)"
        click.echo(f"error: {where}{error.strerror}: {remedy}, then run the same command again", err=True)
        return 1


class Sections(click.Group):
    """A group whose help lists the commands by task."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for heading, commands in SECTIONS.items():
            with formatter.section(heading):
                limit = formatter.width - width - 6
                formatter.write_dl(
                    [(f"{command.name:{width}}", command.get_short_help_str(limit)) for command in commands]
                )


@click.group(cls=Sections, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Neural architecture search as sparse coding: find a network for your pictures, train it, track it in MLflow."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.showwarning = _show_warning
    ensure_usable_home()


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    for line in str(message).splitlines():
        click.echo(f"warning: {printable(line)}", err=True)


for _command in itertools.chain.from_iterable(SECTIONS.values()):
    cli.add_command(_command)
