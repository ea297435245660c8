"""What a benchmark case is: variants of one computation, made when they are needed, each with its correctness gate."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

BASE_COLUMNS = ("suite", "name", "shape", "dtype")


@dataclass(frozen=True)
class Target:
    """Where cases run, and how long they may take: ``quick`` is a suite in about a minute on two cores.

    Args:
        device: ``cpu`` or ``cuda``.
    """

    device: str = "cpu"
    quick: bool = False


@dataclass(frozen=True)
class Work:
    """The least a computation must do, counted from shapes: floating-point operations, and bytes moved.

    Every operand is read once and every result written once.
    """

    flops: int
    bytes: int


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Args:
        call: what is timed. It may be called any number of times.
        check: the correctness gate: None, or one line that says what is wrong. Runs before anything is timed.
        parts: a call is one of so many equal parts of the whole (the published loop, one candidate at a time).
        work: where it is not the case's.
        close: called when nothing more is measured (ends threads).
    """

    call: Callable[[], object]
    check: Callable[[], str | None]
    parts: int = 1
    work: Work | None = None
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True, eq=False)
class Case:
    """Variants of one computation on shared operands, timed in turns.

    Args:
        shape: for people, and what tells cases of one name apart ("36 readers, 26 writers, 512 x 768").
        setup: makes what the variants share (a model, operands); nothing is allocated before it is called.
        variants: name -> what makes it from what ``setup`` returned. Memory is counted from after ``setup``.
        baseline: the variant that ratios are relative to; None: no ratios.
        work: the least that any variant must do.
        bound: the largest speed-up over the baseline that the work left allows, from what ``setup`` returned.
        bounded: the variants the bound is for.
        counts_memory: measure every variant's peak memory too, each in a process of its own.
        no_memory: the variants whose peak would be a compiler's, or that of weights they make; it is not measured.
        axis: the variants are points of a curve against this quantity, and their names its values.
        exponents: what a curve's fitted exponent may be.
        falls: a curve's time at its last point must be lower than at its first.
        ours: the variants that are this package's, which floors are kept of.
    """

    suite: str
    name: str
    shape: str
    dtype: str
    device: str
    setup: Callable[[], Any]
    variants: Mapping[str, Callable[[Any], Variant]]
    baseline: str | None = None
    work: Work | None = None
    bound: Callable[[Any], float] | None = None
    bounded: tuple[str, ...] = ()
    counts_memory: bool = False
    no_memory: tuple[str, ...] = ()
    axis: str | None = None
    exponents: tuple[float, float] | None = None
    falls: bool = False
    ours: tuple[str, ...] = field(default=("fastcircuit",))

    @property
    def key(self) -> str:
        """What the case is called in floors, comparisons and errors."""
        return "/".join(getattr(self, name) for name in BASE_COLUMNS)
