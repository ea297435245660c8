"""Options of the benchmarks."""


def pytest_addoption(parser):
    parser.addoption("--check-floors", action="store_true", help="fail when a speed-up is below its floor")
