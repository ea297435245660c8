"""Cases of no size, and rows of no run."""

import torch

from fastcircuit.benchmarks.case import Case, Target, Variant
from fastcircuit.benchmarks.rows import COLUMNS, Row
from fastcircuit.benchmarks.runner import run
from fastcircuit.benchmarks.timing import Budget, Clock

SHORT = Budget(0.02, least_rounds=6, most_rounds=6)
QUICK = Target("cpu", quick=True)


class Believing(Clock):
    """A clock that takes what a call returns for the seconds it took."""

    def seconds(self, call, repeats=1):
        return call()

    def check(self, call):
        return call()


BELIEVING = Believing(lambda: None)


def claims(seconds, wrong=None, **changes):
    """A variant that says how long it takes."""
    return Variant(lambda: seconds, lambda: wrong, **changes)


def toy(name="sleep", baseline="slow", fast=0.002, slow=0.008, wrong=None, **changes):
    variants = {"fastcircuit": lambda _: claims(fast, wrong), "slow": lambda _: claims(slow)}
    settings = {"suite": "toy", "shape": "small", "dtype": "float32", "device": "cpu", "setup": lambda: torch.ones(1)}
    return Case(name=name, variants=variants, baseline=baseline, **{**settings, **changes})


def measured(*cases, **options):
    return run(cases, QUICK, **{"budget": SHORT, "threads": 1, "timer": BELIEVING, **options})


def row(**changes):
    """A row of nothing, with changes."""
    values = dict.fromkeys(COLUMNS, "x") | {
        "rounds": 7, "parts": 1, "threads": 2, "quick": False, "axis": "", "suite": "ops", "variant": "fastcircuit",
        "p20_ms": 9.0, "p50_ms": 10.0, "p80_ms": 11.0, "ratio": 3.0, "ratio_low": 2.8, "ratio_high": 3.3,
        "bound": None, "flops": None, "bytes": None, "floor_ms": None, "percent_of_floor": None,
        "matmul_gflops": None, "stream_gbs": None, "peak_bytes": None, "device": "cpu toy", "dtype": "float32",
        "cpu_flags": "avx2 fma", "baseline": "torch.addmm", "date": "2026-01-01",
    }  # fmt: skip
    return Row(**(values | changes))
