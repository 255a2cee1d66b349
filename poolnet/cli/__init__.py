"""The command line of poolnet."""

from poolnet.cli.commands import main

__all__ = ["main"]
