"""The command line's fixtures."""

from tests.cli.conftest import answer, finished, here, refuses, run, shelf

__all__ = ["answer", "finished", "here", "refuses", "run", "shelf"]
