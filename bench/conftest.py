"""Options and the summary of the benchmarks."""

import pytest

ROWS: list[tuple[str, str]] = []


def pytest_addoption(parser):
    parser.addoption("--check-floors", action="store_true", help="fail when a ratio is below its committed floor")


@pytest.fixture
def check_floors(request):
    return request.config.getoption("--check-floors")


@pytest.fixture
def report_row():
    """Add a line to the table printed at the end."""
    return lambda case, result: ROWS.append((case, result))


def pytest_terminal_summary(terminalreporter):
    for case, result in ROWS:
        terminalreporter.write_line(f"{case}: {result}")
