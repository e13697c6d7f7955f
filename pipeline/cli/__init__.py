"""The command line `istanas` and its `doctor`."""

from pipeline.cli.commands import main

__all__ = ["main"]
