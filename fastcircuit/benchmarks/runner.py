"""The one runner: gate, then time in turns, then memory; a row per variant, and what is wrong."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastcircuit.benchmarks.case import Case, Target
from fastcircuit.benchmarks.ceilings import ceilings
from fastcircuit.benchmarks.environment import environment
from fastcircuit.benchmarks.memory import peak_bytes
from fastcircuit.benchmarks.rows import Row
from fastcircuit.benchmarks.timing import Budget, Clock, Spread, clock, interleave, pinned_threads
from fastcircuit.errors import RunError

NOISE = 0.1  # what a measurement may lie above its bound before one of the two is called wrong
AGAIN = 3  # times the ceilings are measured again before that
QUICK, FULL = Budget(2.0, least_rounds=5), Budget(6.0, least_rounds=7)

OnCase = Callable[[str, int, int], None]


@dataclass
class Results:
    """Rows of the cases whose gate is green, and one line for everything that is not as it should be.

    Args:
        seconds: that each suite took, with its gates, compilers and processes.
    """

    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, other: "Results") -> None:
        self.rows += other.rows
        self.problems += other.problems
        for suite, seconds in other.seconds.items():
            self.seconds[suite] = self.seconds.get(suite, 0.0) + seconds


def run(
    cases: Sequence[Case],
    target: Target,
    *,
    threads: int | None = None,
    budget: Budget | None = None,
    timer: Clock | None = None,
    on_case: OnCase | None = None,
    keep: Callable[[list[Row]], object] = lambda rows: None,
) -> Results:
    """Measure ``cases`` one after the other.

    Args:
        threads: of torch and of our kernels; None: as many as torch has.
        budget: time per case; None: that of the target.
        timer: the clock; None: the device's.
        on_case: called with a case's key, how many are done and how many there are.
        keep: called with the rows of every case as soon as there are any, so that an interrupted run keeps them.
    """
    results = Results()
    with pinned_threads(threads) as count:
        for number, case in enumerate(cases):
            if on_case is not None:
                on_case(case.key, number, len(cases))
            start = time.perf_counter()
            measure = _Measurement(case, target, count, budget or (QUICK if target.quick else FULL))
            try:
                found = measure.run(timer or clock(case.device))
            except (RuntimeError, MemoryError) as error:  # no memory, no compiler: the other cases go on
                found = Results(problems=[f"{case.key}: {_one_line(error)}"])
            if found.rows:
                keep(found.rows)
            found.seconds[case.suite] = time.perf_counter() - start
            results.add(found)
        if on_case is not None and cases:
            on_case(cases[-1].key, len(cases), len(cases))
    return results


@dataclass
class _Measurement:
    case: Case
    target: Target
    threads: int
    budget: Budget

    def run(self, timer: Clock) -> Results:
        problems = self._measure(timer)
        if not problems:
            problems = [error for name in self.times if (error := self._impossible(name)) is not None]
        if problems:
            return Results(problems=[f"{self.case.key}: {problem}" for problem in problems])
        about = environment(self.case.device)
        return Results([self._row(name, about) for name in self.times])

    def _measure(self, timer: Clock) -> list[str]:
        """Fill ``times`` and what they are compared with, unless something is wrong: then says what."""
        case = self.case
        torch.manual_seed(0)
        state = case.setup()
        variants = {name: make(state) for name, make in case.variants.items()}
        try:
            wrong = {name: variant.check() for name, variant in variants.items()}
            if any(wrong.values()):
                return [f"{name}: {error}" for name, error in wrong.items() if error is not None]
            first = {name: timer.check(variant.call) for name, variant in variants.items()}
            seconds = interleave({name: variant.call for name, variant in variants.items()}, timer, self.budget, first)
            self.bound = None if case.bound is None else case.bound(state)
        finally:
            for variant in variants.values():
                variant.close()
        self.parts = {name: variant.parts for name, variant in variants.items()}
        self.work = {name: variant.work or case.work for name, variant in variants.items()}
        self.times = {name: [part * self.parts[name] for part in parts] for name, parts in seconds.items()}
        self.ceilings = ceilings(case.device, self.threads)
        return []

    def _impossible(self, name: str) -> str | None:
        """Why the time of ``name`` cannot be right, or None."""
        work, fastest = self.work[name], Spread.of(self.times[name]).p50
        if work is not None:
            dtype = getattr(torch, self.case.dtype)
            for _ in range(AGAIN):
                if fastest * (1 + NOISE) >= self.ceilings.floor(work, dtype):
                    break
                self.ceilings.measure_again(work, dtype)
            floor = self.ceilings.floor(work, dtype)
            if fastest * (1 + NOISE) < floor:
                return (
                    f"{name} took {fastest * 1e3:.4g} ms, less than its work takes at full speed, {floor * 1e3:.4g} ms"
                )
        if self.bound is not None and name in self.case.bounded:
            ratio = self._ratios(name).p50
            if ratio > self.bound * (1 + NOISE):
                return f"{name} is {ratio:.3g} times as fast, and the work left allows {self.bound:.3g}"
        return None

    def _ratios(self, name: str) -> Spread:
        assert self.case.baseline is not None
        pairs = zip(self.times[self.case.baseline], self.times[name], strict=True)
        return Spread.of([theirs / ours for theirs, ours in pairs])

    def _row(self, name: str, about: dict[str, Any]) -> Row:
        case, work = self.case, self.work[name]
        dtype = getattr(torch, case.dtype)
        spread = Spread.of(self.times[name])
        ratio = self._ratios(name) if case.baseline is not None else None
        floor = None if work is None else self.ceilings.floor(work, dtype)
        counted = case.counts_memory and name not in case.no_memory
        return Row(
            suite=case.suite,
            name=case.name,
            shape=case.shape,
            dtype=case.dtype,
            axis=case.axis or "",
            variant=name,
            p20_ms=spread.p20 * 1e3,
            p50_ms=spread.p50 * 1e3,
            p80_ms=spread.p80 * 1e3,
            rounds=len(self.times[name]),
            parts=self.parts[name],
            baseline=case.baseline or "",
            ratio=None if ratio is None else ratio.p50,
            ratio_low=None if ratio is None else ratio.low,
            ratio_high=None if ratio is None else ratio.high,
            bound=self.bound if name in case.bounded else None,
            flops=None if work is None else work.flops,
            bytes=None if work is None else work.bytes,
            floor_ms=None if floor is None else floor * 1e3,
            percent_of_floor=None if floor is None else 100 * floor / spread.p50,
            matmul_gflops=None if work is None else self.ceilings.flops_per_second(dtype) / 1e9,
            stream_gbs=None if work is None else self.ceilings.bytes_per_second(work.bytes) / 1e9,
            peak_bytes=peak_bytes(case, name, self.target, self.threads) if counted else None,
            quick=self.target.quick,
            **about,
        )


def _one_line(error: BaseException) -> str:
    """What went wrong, and of what is not ours what kind of error it was."""
    if isinstance(error, RunError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
