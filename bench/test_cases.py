"""Every case of the registry under pytest-benchmark: ``pytest bench/test_cases.py [--full] [--device cuda] [-k step]``.

The gate first, then the clock. Ratios, memory, floors and rows are ``fastcircuit bench``'s.
"""

import functools

from fastcircuit.benchmarks.case import Target
from fastcircuit.benchmarks.registry import load
from fastcircuit.benchmarks.timing import clock
from fastcircuit.submodel.speed import without_collection


def pytest_generate_tests(metafunc):
    target = Target(metafunc.config.getoption("--device"), quick=not metafunc.config.getoption("--full"))
    pairs = [(case, name) for case in load("all", target) for name in case.variants]
    metafunc.parametrize(("case", "name"), pairs, ids=[f"{case.key}/{name}" for case, name in pairs])


@functools.lru_cache(maxsize=1)
def operands(case):
    """What the variants of a case share, made once as they come one after the other."""
    return case.setup()


def test_case(benchmark, case, name):
    variant = case.variants[name](operands(case))
    try:
        assert variant.check() is None
        timer = clock(case.device)

        def call():
            variant.call()
            timer.synchronize()

        benchmark.group = case.key
        benchmark.extra_info["parts"] = variant.parts
        with without_collection():
            benchmark.pedantic(call, setup=timer.between, rounds=3, warmup_rounds=1)
    finally:
        variant.close()
