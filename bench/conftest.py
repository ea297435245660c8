"""Options and the summary of the benchmarks."""

import pytest

from bench.results import DIRECTORY, record
from fastcircuit.benchmarks.environment import check_committed
from fastcircuit.errors import InputError

ROWS: list[tuple[str, str]] = []


def pytest_addoption(parser):
    parser.addoption("--check-floors", action="store_true", help="fail when a ratio is below its committed floor")
    parser.addoption("--full", action="store_true", help="the full cases of the registry, not the quick ones")
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the registry's cases run")
    parser.addoption("--record", action="store_true", help="append what was measured to bench/results/*.csv")


def pytest_configure(config):
    if config.getoption("record", False):
        try:
            check_committed(DIRECTORY)
        except InputError as error:
            raise pytest.UsageError(f"{error}, or leave out --record") from error


@pytest.fixture
def check_floors(request):
    return request.config.getoption("--check-floors")


@pytest.fixture
def keep(request):
    """Append rows to the results of a case, with ``--record``."""
    return record if request.config.getoption("--record") else lambda case, rows: None


@pytest.fixture
def report_row():
    """Add a line to the table printed at the end."""
    return lambda case, result: ROWS.append((case, result))


def pytest_terminal_summary(terminalreporter):
    for case, result in ROWS:
        terminalreporter.write_line(f"{case}: {result}")
