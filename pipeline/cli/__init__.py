"""The command-line interface `istanas`."""

from pipeline.cli.commands import main

__all__ = ["main"]
