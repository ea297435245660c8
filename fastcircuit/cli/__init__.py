"""The command line: one file per command, gathered in ``app``."""

from fastcircuit.cli.app import main

__all__ = ["main"]
