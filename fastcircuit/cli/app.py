"""All commands together. A new one: a file beside this one, and its function in ``COMMANDS``."""

import sys
from typing import NoReturn

import typer

from fastcircuit.cli import bench
from fastcircuit.cli.compare import compare
from fastcircuit.cli.console import stderr
from fastcircuit.cli.convert import convert
from fastcircuit.cli.demo import demo
from fastcircuit.cli.discover import discover
from fastcircuit.cli.draw import draw
from fastcircuit.cli.evaluate import evaluate
from fastcircuit.cli.extract import extract
from fastcircuit.cli.info import info
from fastcircuit.cli.serve import serve
from fastcircuit.cli.sweep import sweep
from fastcircuit.errors import InputError, RunError

COMMANDS = (info, discover, evaluate, compare, sweep, convert, extract, draw, demo, serve)  # in the order of the help

app = typer.Typer(
    help="Find circuits in transformers, and extract them as smaller models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(bench.app, name="bench")
INTERRUPTED = 130  # what typer returns when a command is stopped by Ctrl-C
# ClickException, which some versions of typer take from click and others from a copy of their own.
UsageError: type[Exception] = typer.BadParameter.__mro__[2]


def main() -> None:
    """Run the command line; user errors become one line and exit code 2 (bad input) or 1 (the run failed)."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        sys.exit(_run(arguments or ["--help"]))
    except (InputError, UsageError) as error:
        if debug:
            raise
        _fail(error.format_message() if hasattr(error, "format_message") else str(error), 2)
    except RunError as error:
        if debug:
            raise
        _fail(str(error), 1)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.filename is not None:
            _fail(f"cannot use {error.filename}: {error.strerror}", 2)
        _fail(f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1)


def _run(arguments: list[str]) -> int:
    """The exit code of a command that was not stopped by an error."""
    try:
        code = app(args=arguments, prog_name="fastcircuit", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        _fail("interrupted; nothing was left half-written", 1)
    return code or 0


def _fail(message: str, code: int) -> NoReturn:
    """Print ``message`` as one line on stderr and exit."""
    stderr.print(f"error: {' '.join(message.split())}", style="red", markup=False, soft_wrap=True)
    sys.exit(code)
