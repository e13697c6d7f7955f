"""The command line `istanas`."""

from pipeline.cli.commands import main

__all__ = ["main"]
