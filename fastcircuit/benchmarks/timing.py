"""Times of calls that take turns, so that a slow moment of the machine meets all of them."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_leaves

from fastcircuit.errors import RunError
from fastcircuit.submodel.speed import without_collection

SHORTEST = 1e-3  # seconds: shorter calls are repeated, so that the clock is not what is measured
MOST_PER_ROUND = 5
SLOW_ROUNDS = 3  # at least, of calls that take longer than a case's budget
ONCE = 7  # budgets: a call that takes longer is timed once, its first time
LEFT_OVER = 0.5  # of a call's time that may pass until its result can be read

Call = Callable[[], object]


@dataclass(frozen=True)
class Clock:
    """Seconds of a call, from an idle device to an idle device.

    Args:
        synchronize: returns when the device is idle.
        between: untimed, before every call (empties the device's cache).
    """

    synchronize: Callable[[], None]
    between: Callable[[], None] = lambda: None

    def seconds(self, call: Call, repeats: int = 1) -> float:
        self.between()
        self.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        self.synchronize()
        return (time.perf_counter() - start) / repeats

    def check(self, call: Call) -> float:
        """Seconds of ``call``; RunError when it is still at work after that (a clock that does not synchronise)."""
        timed: list[float] = []
        waited: list[float] = []
        while len(timed) < 3 and sum(timed) < 1:
            self.synchronize()
            start = time.perf_counter()
            result = call()
            self.synchronize()
            timed.append(time.perf_counter() - start)
            first, again = _read(result), _read(result)
            waited.append(first - again)
        if min(waited) > max(SHORTEST, LEFT_OVER * min(timed)):
            raise RunError(
                f"the clock stopped {min(waited):.3g} s before the work was done (it says {min(timed):.3g} s): "
                "the device was not synchronised"
            )
        return timed[-1]


def clock(device: str) -> Clock:
    """The clock of ``cpu`` or ``cuda``; a GPU's second-level cache is emptied before every call."""
    if device != "cuda":
        return Clock(lambda: None)
    size = torch.cuda.get_device_properties(0).L2_cache_size
    waste = torch.empty(max(2 * size, 1), dtype=torch.uint8, device="cuda")

    def empty_cache() -> None:
        waste.zero_()

    return Clock(torch.cuda.synchronize, empty_cache)


def _read(result: object) -> float:
    """Seconds until all of ``result`` is on the host."""
    start = time.perf_counter()
    for leaf in tree_leaves(result):
        if hasattr(leaf, "cpu"):
            leaf.cpu()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Budget:
    """How long to measure a case: until ``seconds`` have passed, within the limits on rounds."""

    seconds: float
    least_rounds: int = 5
    most_rounds: int = 60


def interleave(
    calls: Mapping[str, Call], clock: Clock, budget: Budget, first: Mapping[str, float] | None = None
) -> dict[str, list[float]]:
    """Seconds of each call in every round.

    A round calls every variant, the fast ones several times (its number is their median), and each round starts with
    another one. Where one takes more than ``ONCE`` budgets there is one round, and that call is not repeated for it.

    Args:
        first: seconds of a first call of each, which compiles, allocates and fills caches; None: they are made here.
    """
    names = list(calls)
    with without_collection():
        if first is None:
            first = {name: clock.seconds(calls[name]) for name in names}
        estimate = {
            name: first[name] if first[name] > budget.seconds / 2 else clock.seconds(calls[name]) for name in names
        }
        once = {name: first[name] for name in names if first[name] > ONCE * budget.seconds}
        repeats = {name: max(1, math.ceil(SHORTEST / max(estimate[name], 1e-9))) for name in names}
        slowest = max(estimate[name] * repeats[name] for name in names)
        turns = {name: _turns(slowest, estimate[name] * repeats[name]) for name in names}
        one_round = sum(turns[name] * repeats[name] * estimate[name] for name in names)
        least = budget.least_rounds if one_round < budget.seconds else min(budget.least_rounds, SLOW_ROUNDS)
        rounds = 1 if once else min(max(round(budget.seconds / one_round), least), budget.most_rounds)
        times: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds):
            start = number % len(names)
            taken: dict[str, list[float]] = {name: [once[name]] if name in once else [] for name in names}
            for turn in range(max(turns.values())):
                for name in names[start:] + names[:start]:
                    if turn < turns[name] and name not in once:
                        taken[name].append(clock.seconds(calls[name], repeats[name]))
            for name in names:
                times[name].append(statistics.median(taken[name]))
    return times


def _turns(slowest: float, mine: float) -> int:
    return max(1, min(MOST_PER_ROUND, int(slowest / max(mine, 1e-9))))


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile, and an interval that holds the median with a probability of at least 95 %."""

    p20: float
    p50: float
    p80: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        ordered = sorted(values)
        tenths = statistics.quantiles(ordered, n=5, method="inclusive") if len(ordered) > 1 else [ordered[0]] * 4
        skipped = _outside_interval(len(ordered))
        return cls(
            tenths[0], statistics.median(ordered), tenths[3], ordered[skipped], ordered[len(ordered) - 1 - skipped]
        )


def _outside_interval(count: int) -> int:
    """How many values on either side can be left out of a 95 % interval of the median: by the binomial distribution.

    Fewer than six values have no such interval; then it is all of them.
    """
    tail, skipped = 0.0, 0
    for k in range(count // 2):
        tail += math.comb(count, k) / 2**count
        if tail > 0.025:
            break
        skipped = k
    return skipped


@contextmanager
def pinned_threads(threads: int | None) -> Iterator[int]:
    """Torch and our kernels on ``threads`` threads; None: as many as they have."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
