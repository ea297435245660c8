"""Options and the summary of the benchmarks."""

import pytest

from bench.results import record

ROWS: list[tuple[str, str]] = []


def pytest_addoption(parser):
    parser.addoption("--check-floors", action="store_true", help="fail when a ratio is below its committed floor")
    parser.addoption("--full", action="store_true", help="the full cases of the registry, not the quick ones")
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the registry's cases run")
    parser.addoption("--record", action="store_true", help="append what was measured to bench/results/*.csv")


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
