"""The command line."""

from poolnet.cli.commands import main

__all__ = ["main"]
